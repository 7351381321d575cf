"""A small codec that `latentprep train-codec` trains on a user's own images, together with its quantizer.

Latents are a linear transform of overlapping blocks plus what a small convolutional network adds; the decoder mirrors
that. Training puts uniform noise of one step in place of rounding (Ballé et al., ICLR 2017), so a step of 1 is natural.

All layers are equivariant to the horizontal mirror (Cohen & Welling, ICML 2016): hidden channels come in pairs that the
mirror swaps, and a latent channel is even or odd, so that it keeps or changes its sign. So the mirrored image has the
mirrored latents by construction, up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprep.codecs.base import check_multiple, to_pixels
from latentprep.device import full_float32
from latentprep.errors import CodecError
from latentprep.storage.places import path_of

CONFIG, WEIGHTS = "codec.json", "codec.safetensors"
IN_PACKAGE = Path(__file__).parent / "weights"  # trained on Imagenette's train split
FORMAT, VERSION = "latentprep learned codec", 1
FACTORS = (4, 8, 16)
MAX_CHANNELS = 64
_STEM = 4  # the networks work on grids of a quarter of the pixels and coarser, where computing is cheap
MIDDLE = 128  # the grey level that is zero inside
_MOST_CONFIG = 1 << 20  # bytes
_WAY_OUT = "give the folder that latentprep train-codec wrote"


@dataclass(frozen=True)
class Architecture:
    """The numbers that make a learned codec.

    factor: pixels per side of a cell, 4, 8 or 16. channels: of the latents; the last `odd` of them are odd. step: grey
    levels of one step of the orthonormal transform that training began with. encoder, decoder: channels of the hidden
    layers on grids of a quarter, an eighth, … of the pixels, as many as the factor needs. encoder_blocks,
    decoder_blocks: residual blocks on each.
    """

    factor: int
    channels: int
    odd: int
    step: float
    encoder: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises `CodecError` for numbers out of range."""
        if not _whole(self.factor, 4, 16) or self.factor not in FACTORS:
            raise CodecError(f"the factor must be 4, 8 or 16, got {self.factor!r:.60}")
        if not _whole(self.channels, 1, MAX_CHANNELS) or not _whole(self.odd, 0, self.channels):
            raise CodecError(
                f"there must be 1 to {MAX_CHANNELS} channels, got {self.channels!r:.60}, {self.odd!r:.60} odd"
            )
        if isinstance(self.step, bool) or not isinstance(self.step, int | float) or not 0 < self.step <= 1e6:
            raise CodecError(f"the step must be a number above 0, got {self.step!r:.60}")
        for widths, blocks in ((self.encoder, self.encoder_blocks), (self.decoder, self.decoder_blocks)):
            for values, low, high in ((widths, 2, 512), (blocks, 0, 16)):
                enough = isinstance(values, tuple) and len(values) == grids(self.factor)
                if not enough or not all(_whole(value, low, high) for value in values):
                    count = grids(self.factor)
                    raise CodecError(f"networks must list {count} numbers from {low} to {high}, got {values!r:.60}")
            if any(width % 2 for width in widths):
                raise CodecError(f"networks must have even numbers of channels, got {widths!r:.60}")

    @property
    def signs(self) -> tuple[int, ...]:
        """1 for an even channel, -1 for an odd one."""
        return (1,) * (self.channels - self.odd) + (-1,) * self.odd

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> Architecture:
        """Raises `CodecError` for anything that `to_json` does not write."""
        names = [field.name for field in fields(cls)]
        if not isinstance(document, dict) or sorted(document) != sorted(names):
            raise CodecError(f"the architecture must have exactly {', '.join(names)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**values)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def grids(factor: int) -> int:
    """How many grids the networks work on: of a quarter of the pixels per side, an eighth, …, 1/factor."""
    return int(math.log2(factor // _STEM)) + 1


@dataclass(frozen=True)
class Channels:
    """What the mirror does to channels: swap the two halves (signs is None), or give each its sign."""

    count: int
    signs: tuple[int, ...] | None = None

    def mirrored(self, values: Tensor, dim: int) -> Tensor:
        """The mirror's effect along `dim`; columns stay where they are."""
        if self.signs is None:
            return values.roll(self.count // 2, dim)
        shape = [-1 if at == dim else 1 for at in range(values.ndim)]
        return values * torch.tensor(self.signs, dtype=values.dtype, device=values.device).view(shape)


RGB = Channels(3, (1, 1, 1))


class MirrorConv(nn.Module):
    """A convolution (`up`: a transposed one) that commutes with the mirror: f32 [B,Ci,H,W] -> f32 [B,Co,H/s,W/s], or
    [B,Co,sH,sW].

    The kernel has a side of `kernel` and reaches as far beyond a cell of `stride` on the left as on the right. For
    outputs in pairs only the first half of the kernels is learned: the second half is their mirror image.
    """

    def __init__(self, given: Channels, made: Channels, kernel: int, stride: int = 1, up: bool = False) -> None:
        super().__init__()
        self.given, self.made, self.stride, self.up = given, made, stride, up
        self.padding = (kernel - stride) // 2
        free = made.count // 2 if made.signs is None else made.count
        self.weight = nn.Parameter(torch.empty(free, given.count, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(free))

    def kernels(self) -> tuple[Tensor, Tensor]:
        """f32 [Co,Ci,k,k] and f32 [Co]: the kernels and biases as they are applied."""
        mirror = self.given.mirrored(self.weight.flip(-1), 1)
        if self.made.signs is None:
            return torch.cat([self.weight, mirror]), torch.cat([self.bias, self.bias])
        own, other = self.made.mirrored(mirror, 0), self.made.mirrored(self.bias, 0)
        return (self.weight + own) / 2, (self.bias + other) / 2

    def forward(self, values: Tensor) -> Tensor:
        weight, bias = self.kernels()
        if self.up:
            return F.conv_transpose2d(values, weight.transpose(0, 1), bias, self.stride, self.padding)
        return F.conv2d(values, weight, bias, self.stride, self.padding)

    def plain(self) -> nn.Module:
        """The same map as a layer of torch."""
        weight, bias = self.kernels()
        kind = nn.ConvTranspose2d if self.up else nn.Conv2d
        layer = kind(
            self.given.count, self.made.count, weight.shape[-1], self.stride, self.padding, device=weight.device
        )
        layer.weight.data = (weight.transpose(0, 1) if self.up else weight).detach().contiguous()
        layer.bias.data = bias.detach()  # type: ignore[union-attr]
        return layer


class Block(nn.Module):
    """A residual block: f32 [B,C,H,W] -> f32 [B,C,H,W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (MirrorConv(Channels(width), Channels(width), 3) for _ in range(2))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.second(F.relu(self.first(F.relu(values))))


class Encoder(nn.Module):
    """f32 [B,3,H,W], pixels about zero in steps -> f32 [B,C,H/f,W/f]."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        latents = Channels(of.channels, of.signs)
        self.linear = MirrorConv(RGB, latents, 2 * of.factor, of.factor)
        self.network = nn.Sequential(MirrorConv(RGB, Channels(of.encoder[0]), 2 * _STEM, _STEM))
        for at, (width, count) in enumerate(zip(of.encoder, of.encoder_blocks, strict=True)):
            if at:
                self.network.append(nn.ReLU())
                self.network.append(MirrorConv(Channels(of.encoder[at - 1]), Channels(width), 4, 2))
            self.network.extend(Block(width) for _ in range(count))
        self.network.append(nn.ReLU())
        self.network.append(MirrorConv(Channels(of.encoder[-1]), latents, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(pixels) + self.network(pixels)


class Decoder(nn.Module):
    """f32 [B,C,h,w] -> f32 [B,3,fh,fw], pixels about zero in steps."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        latents = Channels(of.channels, of.signs)
        self.linear = MirrorConv(latents, RGB, 2 * of.factor, of.factor, up=True)
        self.network = nn.Sequential(MirrorConv(latents, Channels(of.decoder[-1]), 3))
        for at in reversed(range(len(of.decoder))):
            self.network.extend(Block(of.decoder[at]) for _ in range(of.decoder_blocks[at]))
            self.network.append(nn.ReLU())
            if at:
                self.network.append(MirrorConv(Channels(of.decoder[at]), Channels(of.decoder[at - 1]), 4, 2, up=True))
        self.network.append(MirrorConv(Channels(of.decoder[0]), RGB, 2 * _STEM, _STEM, up=True))

    def forward(self, latents: Tensor) -> Tensor:
        return self.linear(latents) + self.network(latents)


class Networks(nn.Module):
    """Encoder and decoder, with parameters that are still to be set."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(of), Decoder(of)


def plain(module: nn.Module) -> nn.Module:
    """The module itself, every `MirrorConv` in it replaced by a layer of torch that computes the same, faster."""
    for name, child in module.named_children():
        setattr(module, name, child.plain() if isinstance(child, MirrorConv) else plain(child))
    return module


class LearnedCodec:
    """A small codec trained together with its quantizer, on photographs or images of one's own; with an exact mirror.

    weights: the folder that latentprep train-codec wrote, with codec.json and codec.safetensors; by default the one in
    this package, trained on photographs. Latents are in steps of the quantizer that they were trained with. It always
    computes in float32.
    """

    name = "learned"

    def __init__(self, *, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        self.weights, self.device = weights, torch.device(device)
        self._folder = IN_PACKAGE if weights is None else path_of(weights)
        self.architecture, networks, self._sha256 = load(self._folder)
        self._encoder = _of_levels(networks.encoder, self.architecture.step).to(self.device)
        self._decoder = plain(networks.decoder).eval().requires_grad_(False).to(self.device)

    def config(self) -> dict:
        given = {} if self.weights is None else {"weights": self.weights}
        return {"name": self.name, **given, "weights_sha256": self._sha256}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.architecture.channels, *check_multiple(self.name, self.architecture.factor, height, width))

    @torch.inference_mode()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,H/f,W/f]."""
        # Less 128 in bytes, which are a quarter of the floats.
        levels = images.to(self.device).bitwise_xor(MIDDLE).view(torch.int8)
        return self._encoder(levels.contiguous(memory_format=torch.channels_last).float()).contiguous()

    def graph(self) -> nn.Module:
        """What `encode` does, as a module that can be exported."""
        _, networks, _ = load(self._folder)
        return nn.Sequential(_Centred(), _of_levels(networks.encoder, self.architecture.step))

    @torch.inference_mode()
    @full_float32()
    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,fh,fw]."""
        latents = latents.to(self.device).contiguous(memory_format=torch.channels_last)
        return to_pixels(self._decoder(latents) * self.architecture.step + MIDDLE).contiguous()

    def flip(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> f32 [B,C,h,w]: columns in reverse order, odd channels negated."""
        return Channels(self.architecture.channels, self.architecture.signs).mirrored(
            latents.to(self.device).flip(-1), 1
        )


class _Centred(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        """u8 -> f32, less 128"""
        return pixels.float() - MIDDLE


def _of_levels(encoder: Encoder, step: float) -> nn.Module:
    """The encoder as plain layers, for pixels in grey levels about zero in place of steps."""
    plain(encoder)
    for layer in (encoder.linear, encoder.network[0]):
        layer.weight.data.div_(step)  # type: ignore[operator]
    return encoder.eval().requires_grad_(False)


def centred(pixels: Tensor, step: float) -> Tensor:
    """u8 [B,3,H,W] -> f32, about zero, in steps."""
    return (pixels.float() - MIDDLE) / step


def save(networks: Networks, of: Architecture, facts: dict) -> dict[str, bytes]:
    """The files of a codec, by name; its weights become float16. facts: JSON, such as origin and licence."""
    import safetensors.torch

    tensors = {name: value.detach().cpu().half().contiguous() for name, value in networks.state_dict().items()}
    document = {"format": FORMAT, "version": VERSION, "architecture": of.to_json(), **facts}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    return {WEIGHTS: safetensors.torch.save(tensors), CONFIG: text.encode()}


def load(folder: Path) -> tuple[Architecture, Networks, str]:
    """Inverse of `save`: architecture, networks in float32 on the CPU, and a SHA-256 over all that latents depend on.

    Raises `CodecError` if the folder holds no such codec, or a damaged one.
    """
    import safetensors
    import safetensors.torch

    of = Architecture.from_json(read_config(folder)["architecture"])
    with torch.device("meta"):
        networks = Networks(of)
    wanted = {name: tuple(value.shape) for name, value in networks.state_dict().items()}
    path = folder / WEIGHTS
    most = 4 * sum(map(math.prod, wanted.values())) + (256 * len(wanted) + (1 << 12))
    try:
        if path.stat().st_size > most:
            raise CodecError(f"{path} is larger than its architecture says", _WAY_OUT)
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
    except OSError as error:
        raise CodecError(f"{path} cannot be read: {error.strerror or error}", _WAY_OUT) from error
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CodecError(f"{path} is damaged: {error}".splitlines()[0], _WAY_OUT) from error
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in wanted or name not in tensors:
            raise CodecError(f"{path} {'lacks' if name in wanted else 'has an unknown'} tensor {name!r:.60}", _WAY_OUT)
        tensor = tensors[name]
        if tuple(tensor.shape) != wanted[name] or not tensor.is_floating_point():
            what = f"{tensor.dtype} {list(tensor.shape)}"
            raise CodecError(f"{path} has {name} as {what}, its architecture says {list(wanted[name])}", _WAY_OUT)
        tensors[name] = tensor.float()
        if not torch.isfinite(tensors[name]).all():
            raise CodecError(f"{path} has a value in {name} that is not finite", _WAY_OUT)
    networks.load_state_dict(tensors, assign=True)
    numbers = json.dumps(of.to_json(), sort_keys=True)
    return of, networks, hashlib.sha256(numbers.encode() + hashlib.sha256(data).digest()).hexdigest()


def read_config(folder: Path) -> dict:
    """A codec's codec.json, its format, version and architecture checked. Raises `CodecError`."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError("too large")
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"it is no {FORMAT}")
        if not _whole(document.get("version"), 1, VERSION):
            raise ValueError(f"its version is {document.get('version')!r:.60}, this latentprep knows 1 to {VERSION}")
        Architecture.from_json(document.get("architecture"))
        return document
    except OSError as error:
        raise CodecError(f"no learned codec in {folder}: {error.strerror or error}", _WAY_OUT) from error
    except (CodecError, ValueError, RecursionError) as error:
        reason = error.message if isinstance(error, CodecError) else str(error).splitlines()[0]
        raise CodecError(f"{path} is damaged: {reason}", _WAY_OUT) from error
