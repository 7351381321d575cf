"""Autoencoders of the diffusers library: Stable Diffusion's VAEs and their tiny distillations."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentprep.codecs.base import check_multiple, check_revision, to_pixels
from latentprep.device import full_float32, has_fast_bfloat16
from latentprep.errors import CodecError, SystemFault, UsageError, check_word, opt
from latentprep.storage.places import path_of

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REVISION = 2  # of how pixels become the model's input; see `AutoencoderCodec`
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


class AutoencoderCodec:
    """Any image autoencoder that diffusers loads, from a local folder or a hub repository.

    weights: folder or hub id. posterior: ``mean``, or ``sample`` for one draw from the encoder's posterior,
    whose noise depends on `seed` and the image alone. dtype: ``bfloat16`` where the device computes in it,
    else ``float32``; never float16, in which SDXL's VAE overflows to NaN.
    revision: 2 scales pixels in float32 and then rounds them to `dtype`; 1 scales them in it, half a grey level less
    exact in bfloat16. Datasets whose codec names none have 1; in float32 the two are one, and none is recorded.
    Latents are ``(z - shift_factor) * scaling_factor`` by the model's own configuration, or, where that has them,
    ``(z - latents_mean) * scaling_factor / latents_std`` by channel. A video autoencoder sees an image as one frame.
    """

    name = ""
    joint_bits = 1
    default_weights = ""
    files = ("config.json", *_WEIGHT_FILES)

    def __init__(
        self,
        *,
        weights: str | None = None,
        posterior: str = "mean",
        seed: int = 0,
        dtype: str | None = None,
        revision: int = REVISION,
        device: torch.device | str = "cpu",
    ) -> None:
        check_word(f"{self.name}:posterior", posterior, ("mean", "sample"))
        if dtype is not None:
            check_word(f"{self.name}:dtype", dtype, tuple(_DTYPES), "float16 overflows in some VAEs")
        self.device, self.revision = torch.device(device), check_revision(self.name, revision, REVISION)
        self.weights = weights or self.default_weights
        self.posterior, self.seed = posterior, seed
        self.dtype_name = dtype or ("bfloat16" if has_fast_bfloat16(self.device) else "float32")
        folder = find_weights(self.weights, self.name, self.files)
        model = _load(folder, self.name)
        scale, shift = _factors(model.config)
        self._sha256 = weights_sha256(folder, [scale, shift])
        self._scale, self._shift = (torch.tensor(of, device=self.device).reshape(-1, 1, 1) for of in (scale, shift))
        self._model = model.to(self.device, _DTYPES[self.dtype_name])
        if not _is_video(model):
            model.to(memory_format=torch.channels_last)
        self._shape = self._probe()

    def config(self) -> dict:
        config: dict[str, Any] = {"name": self.name, "weights": self.weights, "weights_sha256": self._sha256}
        config["model"] = type(self._model).__name__
        config |= {"posterior": self.posterior, "dtype": self.dtype_name}
        if self.dtype_name != "float32" and self.revision > 1:
            config["revision"] = self.revision
        return config | ({"seed": self.seed} if self.posterior == "sample" else {})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels, factor = self._shape
        return (channels, *check_multiple(self.name, factor, height, width))

    @torch.inference_mode()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,H/f,W/f]."""
        dtype = _DTYPES[self.dtype_name]
        pixels = images.to(self.device).to(torch.float32 if self.revision > 1 else dtype)
        pixels = (pixels / 127.5 - 1).to(dtype).contiguous(memory_format=torch.channels_last)
        z, posterior = _encode(self._model, pixels)
        z = z.float()
        if self.posterior == "sample":
            if posterior is None:
                raise UsageError(f"{self.weights} has no posterior to sample from", "use posterior=mean")
            z = z + posterior.float() * self._noise(images, z.shape[1:])
        return ((z - self._shift) * self._scale).contiguous()

    def graph(self) -> nn.Module:
        """What `encode` does in float32, as a module that can be exported.

        Raises `UsageError` if it draws from a posterior.
        """
        if self.posterior == "sample":
            raise UsageError("a codec that draws from a posterior cannot be exported", "encode with posterior=mean")
        return _Graph(copy.deepcopy(self._model).float().cpu(), self._scale.cpu(), self._shift.cpu())

    @torch.inference_mode()
    @full_float32()
    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,fh,fw]."""
        z = latents.to(self.device) / self._scale + self._shift
        z = z.to(_DTYPES[self.dtype_name])
        if _is_video(self._model):
            pixels = self._model.decode(z[:, :, None]).sample[:, :, 0]
        else:
            pixels = self._model.decode(z.contiguous(memory_format=torch.channels_last)).sample
        return to_pixels((pixels.float() + 1) * 127.5).contiguous()

    def flip(self, latents: Tensor) -> None:
        """None: an autoencoder's mirrored latents are not the mirrored image's latents."""
        return

    def _noise(self, images: Tensor, shape: torch.Size) -> Tensor:
        """f32 [B,C,h,w], standard normal; each image's own, so that it does not depend on the batch."""
        draws = []
        for image in images.cpu().numpy():
            # torch's CPU generator looks at 32 bits of a seed, so both must go into those.
            generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes(), self.seed & 0xFFFFFFFF))
            draws.append(torch.randn(shape, generator=generator))
        return torch.stack(draws).to(self.device)

    def _probe(self) -> tuple[int, int]:
        """(channels, factor), measured: no model configuration states both."""
        (channels, *cells), (_, *more) = (
            tuple(self.encode(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape)[1:] for side in (64, 128)
        )
        if len(cells) != 2 or cells[0] != cells[1] or 64 % cells[0] or more != [2 * cells[0]] * 2:
            raise CodecError(
                f"{self.weights} is not an autoencoder whose latents grow with the image: 64×64 pixels give "
                f"{'×'.join(map(str, cells))} cells, 128×128 give {'×'.join(map(str, more))}"
            )
        return channels, 64 // cells[0]


class _Graph(nn.Module):
    def __init__(self, model: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.model, self.scale, self.shift = model, scale, shift

    def forward(self, pixels: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,H/f,W/f]."""
        return (_encode(self.model, pixels.float() / 127.5 - 1)[0] - self.shift) * self.scale


def _encode(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """[B,3,H,W] in -1…1 -> latents [B,C,h,w] before any factor, and their posterior's deviation if there is one."""
    video = _is_video(model)
    output = model.encode(pixels[:, :, None] if video else pixels)
    if hasattr(output, "latent_dist"):
        found = output.latent_dist.mean, output.latent_dist.std
    else:
        found = (output.latents if hasattr(output, "latents") else output.latent), None
    return tuple(of[:, :, 0] if video and of is not None else of for of in found)


def _is_video(model: nn.Module) -> bool:
    """Whether it takes [B,3,T,H,W]."""
    return any(isinstance(module, nn.Conv3d) for module in model.modules())


def _factors(config: Any) -> tuple[float | list[float], float | list[float]]:
    """(scale, shift) of latents, one number or one a channel."""
    scale, mean, std = float(config.get("scaling_factor") or 1.0), config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, float(config.get("shift_factor") or 0.0)
    return [scale / float(of) for of in std], [float(of) for of in mean]


class SdVae(AutoencoderCodec):
    """Stable Diffusion 1/2's VAE (84 M parameters), fine-tuned for low squared error."""

    name, default_weights = "sd-vae", "stabilityai/sd-vae-ft-mse"


class SdxlVae(AutoencoderCodec):
    """Stable Diffusion XL's VAE (84 M parameters)."""

    name, default_weights = "sdxl-vae", "stabilityai/sdxl-vae"


class Taesd(AutoencoderCodec):
    """TAESD: tiny distillation (2.4 M parameters) of sd-vae, to the same latents."""

    name, default_weights = "taesd", "madebyollin/taesd"


class Taesdxl(AutoencoderCodec):
    """TAESDXL: tiny distillation of sdxl-vae, to the same latents."""

    name, default_weights = "taesdxl", "madebyollin/taesdxl"


class Taesd3(AutoencoderCodec):
    """TAESD3: tiny distillation of Stable Diffusion 3's VAE, 16 channels."""

    name, default_weights = "taesd3", "madebyollin/taesd3"


class Taef1(AutoencoderCodec):
    """TAEF1: tiny distillation of FLUX.1's VAE, 16 channels."""

    name, default_weights = "taef1", "madebyollin/taef1"


def find_weights(
    weights: str,
    name: str,
    files: Sequence[str] = AutoencoderCodec.files,
    *,
    download: bool = True,
    instead: str = "scatter",
) -> Path:
    """The local folder of a model: `weights` itself, the ``vae`` in a pipeline's folder, or a snapshot of the hub's.

    files: what a snapshot has of them. It is in the hub's cache, or downloaded if allowed. instead: a codec to propose.

    Raises `CodecError` if it is neither, `SystemFault` if the packages that read it are not installed.
    """
    folder = path_of(weights)
    if folder.is_dir():
        inner = folder / "vae"  # of a whole pipeline
        return inner if (inner / "config.json").is_file() and not (folder / "config.json").is_file() else folder
    other = f"use {opt('codec', instead)}, which needs no download"
    way_out = f"set {opt('weights')} to a local folder for codec '{name}', or {other}"
    if folder.exists() or weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise CodecError(f"no model folder at {weights}", way_out)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_extra(name) from error
    try:
        return Path(snapshot_download(weights, allow_patterns=list(files), local_files_only=not download))
    except Exception as error:  # the hub client raises its own, requests', httpx's and OS errors
        raise CodecError(f"cannot get the weights {weights}: {_first_line(error)}", way_out) from error


def missing_extra(name: str) -> SystemFault:
    return SystemFault(f"codec '{name}' needs the diffusers package", "pip install 'latentprep[vae]'")


def weights_sha256(folder: Path, settings: list[Any]) -> str:
    """SHA-256 over what latents depend on: the weights file, and settings that its tensors do not tell."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in (folder / name for name in _WEIGHT_FILES):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _load(folder: Path, name: str) -> Any:
    """The diffusers model in `folder`, in float32, ready to run. Safetensors only: nothing is unpickled."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = str(config.get("_class_name", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise CodecError(f"{folder} has no readable config.json", "give the folder of a diffusers model") from error
    try:
        import diffusers
    except ImportError as error:
        raise missing_extra(name) from error
    known = kind.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel"))
    model_class = getattr(diffusers, kind, None) if known else None
    if model_class is None:
        raise CodecError(f"{folder} holds a {kind or 'model without a class'}, not an image autoencoder of diffusers")
    # It advises to install accelerate, which saves nothing here.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    try:
        model = model_class.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder
        raise CodecError(f"the model in {folder} does not load: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
