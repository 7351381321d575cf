"""WaLLoC (Jacobellis & Yadwadkar, "Learned Compression for Compressed Learning", 2024): a linear layer over wavelets.

A wavelet packet transform of J levels turns each colour into 4^J bands on a grid of 1/2^J per side. One linear layer
makes latents of them (in heavy models a small network), and a convolutional network turns latents back into bands.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprep.codecs.autoencoder import find_weights, missing_extra
from latentprep.codecs.base import check_multiple, to_pixels
from latentprep.device import full_float32
from latentprep.errors import CodecError, UsageError

# Taps of the CDF 9/7 wavelet (Cohen, Daubechies & Feauveau 1992), scaled to be nearly orthonormal: ten for each filter.
_A, _B, _C = 0.03782845550726404, 0.023849465019556843, 0.11062440441843718
_D, _E, _F = 0.37740285561283066, 0.8526986790088938, 0.06453888262869706
_G, _H, _I = 0.04068941760916406, 0.41809227322161724, 0.7884856164055829
_ANALYSIS = ((_A, -_B, -_C, _D, _E, _D, -_C, -_B, _A, 0), (0, 0, -_F, _G, _H, -_I, _H, _G, -_F, 0))  # low, high
_SYNTHESIS = ((0, -_F, -_G, _H, _I, _H, -_G, -_F, 0, 0), (0, -_A, -_B, _C, _D, -_E, _D, _C, -_B, -_A))
_TAPS = 10
_SPREAD = 1.85  # the range of codes, from the middle, is so many deviations of the linear layer's results
_TAIL = 1e-4  # probability that the inverse leaves out at either end
_RANGES = {
    "channels": (3, 3),
    "J": (1, 5),
    "Ne": (0, 4096),
    "Nd": (32, 4096),
    "latent_dim": (1, 1024),
    "latent_bits": (2, 8),
}
_WAY_OUT = "give the folder, or the hub's repository, with a checkpoint of WaLLoC for images"


@dataclass(frozen=True)
class Architecture:
    """The numbers of a checkpoint's JSON file, by the names that they have there. channels: 3. J: levels. Ne, Nd:
    channels of the encoder's and the decoder's hidden layers. lightweight_encode: the encoder is one linear layer."""

    channels: int
    J: int
    Ne: int
    Nd: int
    latent_dim: int
    latent_bits: int
    lightweight_encode: bool

    @classmethod
    def read(cls, path: Path) -> Architecture:
        """Raises `CodecError` for a file that is none, or for numbers out of range."""
        try:
            document = json.loads(path.read_bytes())
            given = {field.name: document[field.name] for field in fields(cls)}
        except OSError as error:
            raise CodecError(f"{path} cannot be read: {error.strerror or error}", _WAY_OUT) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CodecError(
                f"{path} is no description of a WaLLoC checkpoint for images: {error!r:.80}", _WAY_OUT
            ) from error
        for name, (low, high) in _RANGES.items():
            if type(given[name]) is not int or not low <= given[name] <= high:
                raise CodecError(f"{path} has {name} {given[name]!r:.60}, allowed are {low} to {high}", _WAY_OUT)
        return cls(**given | {"lightweight_encode": bool(given["lightweight_encode"])})


class Networks(nn.Module):
    """Encoder and decoder of bands, with the names that the published checkpoints give their parameters."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        bands = of.channels * 4**of.J
        first: nn.Module = nn.Conv2d(bands, of.latent_dim, 1)
        if not of.lightweight_encode:
            first = Encoder(bands, of.latent_dim, ("DownEncoderBlock2D",), (of.Ne,), layers_per_block=2, double_z=False)
        self.encoder = nn.Sequential(first)
        self.decoder = nn.Sequential(
            nn.Identity(), Decoder(of.latent_dim, bands, ("UpDecoderBlock2D",), (of.Nd,), layers_per_block=2)
        )


class WallocCodec:
    """WaLLoC: one linear layer over wavelet packets as the encoder, by D. Jacobellis; needs its checkpoint.

    weights: folder or hub id. checkpoint: which of the models there, a JSON file and one of weights, safetensors or
    (read as tensors alone) ``.pth``. Latents are the linear layer's results through a normal distribution function,
    within ±2^(latent_bits − 1), where a step of 1 is natural. It always computes in float32.
    """

    name, default_weights = "walloc", "danjacobellis/walloc"
    joint_bits = 1
    files = ("RGB_16x.json", "RGB_16x.safetensors", "RGB_16x.pth")  # of the default checkpoint

    def __init__(
        self, *, weights: str | None = None, checkpoint: str = "RGB_16x", device: torch.device | str = "cpu"
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", checkpoint):
            raise UsageError(f"walloc:checkpoint must be the name of a model, got {checkpoint!r:.60}", "use RGB_16x")
        self.weights, self.checkpoint, self.device = weights or self.default_weights, checkpoint, torch.device(device)
        files = [name.replace("RGB_16x", checkpoint) for name in self.files]
        folder = find_weights(self.weights, self.name, files)
        self.architecture = Architecture.read(folder / files[0])
        networks, self._sha256 = _load(self.architecture, folder / files[1], folder / files[2])
        self._encoder = _Encoder(self.architecture, networks.encoder).to(self.device)
        self._decoder = networks.decoder.to(self.device)

    def config(self) -> dict:
        return {
            "name": self.name, "weights": self.weights, "checkpoint": self.checkpoint, "weights_sha256": self._sha256,
        }  # fmt: skip

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.architecture.latent_dim, *check_multiple(self.name, 2**self.architecture.J, height, width))

    @torch.inference_mode()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,H/2^J,W/2^J]."""
        return self._encoder(images.to(self.device))

    def graph(self) -> nn.Module:
        """What `encode` does, as a module that can be exported."""
        return self._encoder.cpu()

    @torch.inference_mode()
    @full_float32()
    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,2^J h,2^J w]."""
        most, scale = _bottleneck(self.architecture.latent_bits)
        places = (latents.to(self.device) / (2 * most) + 0.5).clamp(_TAIL, 1 - _TAIL)
        bands = self._decoder(scale * torch.special.ndtri(places))
        for _ in range(self.architecture.J):
            bands = synthesis(bands)
        return to_pixels((bands + 0.5) * 255).contiguous()

    def flip(self, latents: Tensor) -> None:
        """None: the mirror is another linear map of the bands than one of latents."""
        return


class _Encoder(nn.Module):
    def __init__(self, of: Architecture, network: nn.Module) -> None:
        super().__init__()
        self.levels, self.network = of.J, network
        self.most, self.scale = _bottleneck(of.latent_bits)

    def forward(self, pixels: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,h,w]."""
        bands = pixels.float() / 255 - 0.5
        for _ in range(self.levels):
            bands = analysis(bands)
        return 2 * self.most * (torch.special.ndtr(self.network(bands) / self.scale) - 0.5)


def _bottleneck(bits: int) -> tuple[float, float]:
    """The largest latent, and the deviation that the linear layer's results are meant to have."""
    whole = 2 ** (bits - 1) - 1
    return whole + 0.5 - 1e-3, whole / _SPREAD


def analysis(planes: Tensor) -> Tensor:
    """One level of the wavelet packet transform: f32 [B,C,H,W], H and W even -> f32 [B,4C,H/2,W/2], periodic at the
    edges. The four bands of a plane follow each other: low, high along columns, high along rows, high along both."""
    for dim, side in ((-1, planes.shape[-1]), (-2, planes.shape[-2])):
        planes = planes.index_select(dim, torch.arange(-4, side + 4, device=planes.device) % side)
    count = planes.shape[1]
    return F.conv2d(planes, _kernels(_ANALYSIS, planes).repeat(count, 1, 1, 1), stride=2, groups=count)


def synthesis(bands: Tensor) -> Tensor:
    """Inverse of `analysis`: f32 [B,4C,h,w] -> f32 [B,C,2h,2w]."""
    height, width = bands.shape[-2:]
    for dim, side in ((-1, width), (-2, height)):
        bands = bands.index_select(dim, torch.arange(-2, side + 2, device=bands.device) % side)
    groups = bands.shape[1] // 4
    planes = F.conv_transpose2d(bands, _kernels(_SYNTHESIS, bands).repeat(groups, 1, 1, 1), stride=2, groups=groups)
    return planes[..., 8 : 8 + 2 * height, 8 : 8 + 2 * width]


def _kernels(filters: tuple, like: Tensor) -> Tensor:
    """f32 [4,1,10,10]: the outer products of a low and a high filter, in the order of `analysis`."""
    pair = torch.tensor(filters, dtype=like.dtype, device=like.device)
    return torch.einsum("xi,yj->xyji", pair, pair).reshape(4, 1, _TAPS, _TAPS)


def _load(of: Architecture, safe: Path, pickled: Path) -> tuple[Networks, str]:
    """Networks in float32 on the CPU, ready to run, and a SHA-256 over all that latents depend on.

    Raises `CodecError` for weights that are not there, damaged, or not of this architecture.
    """
    import safetensors
    import safetensors.torch

    path = safe if safe.exists() else pickled
    try:
        data = path.read_bytes()
        if path == safe:
            state: Any = safetensors.torch.load(data)
        else:
            with torch.serialization.safe_globals([SimpleNamespace]):  # in which checkpoints keep their settings
                state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CodecError(f"{path} cannot be read: {error.strerror or error}", _WAY_OUT) from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged or foreign file
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CodecError(f"{path} is damaged, or holds more than tensors: {why}", _WAY_OUT) from error
    state = state.get("model_state_dict", state) if isinstance(state, dict) else {}
    try:
        networks = Networks(of)
    except ImportError as error:
        raise missing_extra(WallocCodec.name) from error
    except ValueError as error:
        raise CodecError(f"no network has the numbers of {path.stem}.json: {error}", _WAY_OUT) from error
    # The wavelet's own filters are in the checkpoints too; they are always the same.
    own = {k: v for k, v in state.items() if isinstance(k, str) and not k.startswith(("wt.", "iwt."))}
    try:
        networks.load_state_dict(own)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CodecError(
            f"{path} is not of its JSON file's architecture: {str(error).splitlines()[-1].strip()}", _WAY_OUT
        ) from error
    numbers = json.dumps(asdict(of), sort_keys=True)
    digest = hashlib.sha256(numbers.encode() + hashlib.sha256(data).digest()).hexdigest()
    return networks.float().eval().requires_grad_(False), digest
