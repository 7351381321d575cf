"""The codec protocol, and the registry of codecs by name.

A codec is registered by an entry point in the group `latentprep.codecs` (ours are too), whose value is a class
called with keyword options; its docstring's first line is what `latentprep codecs` shows.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from latentprep.errors import CodecError, UsageError, nearest, opt

GROUP = "latentprep.codecs"


@runtime_checkable
class Codec(Protocol):
    """A lossy transform of images to latents and back.

    A codec class takes ``device`` (a torch device) and its own options, all as keywords with defaults.
    ``encode`` is a pure function of image and configuration: which images share a batch changes nothing but
    rounding.

    A codec that computes little for each pixel may set ``light = True``: on a CPU it then gets one thread and leaves
    the other cores to decoding, since to share every small operation among busy cores costs more than it gains.
    """

    name: str

    def config(self) -> dict:
        """JSON; `codec_from_config` rebuilds the codec from it. Weights are named by their SHA-256."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for images of that many pixels. Raises `UsageError` for sizes it cannot take."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] on any device -> f32 [B,C,h,w] on the codec's device."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] on any device -> u8 [B,3,H,W] on the codec's device."""
        ...

    def flip(self, latents: Tensor) -> Tensor | None:
        """f32 [B,C,h,w] -> the latents of the horizontally mirrored images, exactly; None where there is none."""
        ...


def codec_names() -> list[str]:
    """Names of all installed codecs, ours first."""
    points = entry_points(group=GROUP)
    return sorted(points.names, key=lambda name: (not _ours(points[name]), name))


def codec_class(name: str) -> type:
    """The class registered under `name`. `CodecError` with the nearest names if there is none."""
    points = entry_points(group=GROUP, name=name)
    if not points:
        raise CodecError(f"unknown codec '{name}'", nearest(name, codec_names()))
    # Names are first come, first served: a plug-in cannot take over one of ours.
    point = sorted(points, key=lambda p: not _ours(p))[0]
    try:
        return point.load()
    except ImportError as error:
        raise CodecError(f"codec '{name}' ({point.value}) does not import: {error}", "reinstall the package") from error


def make_codec(name: str, *, device: str | torch.device = "cpu", **options: Any) -> Codec:
    """Build a codec; options that are None take the codec's default.

    Raises `CodecError` for an unknown name or missing weights, `UsageError` for an option it does not have.
    """
    kind = codec_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    taken = inspect.signature(kind).parameters
    allowed = [p for p in taken if p not in ("device", "revision")]
    for key in given:
        if key not in taken:
            own = " and ".join(map(opt, allowed)) or "no options"
            raise UsageError(f"codec '{name}' has no option {opt(key)}", f"it takes {own}")
    return kind(device=torch.device(device), **given)


def codec_from_config(config: dict, *, device: str | torch.device = "cpu", weights: str | None = None) -> Codec:
    """Rebuild the codec of a dataset's manifest; `weights` says where its weights are now.

    Raises `CodecError` if the codec is not installed, or the weights found are not those recorded.
    """
    options = {key: value for key, value in config.items() if key not in ("name", "model", "weights_sha256")}
    if weights is not None:
        options["weights"] = weights
    if "revision" in inspect.signature(codec_class(config["name"])).parameters:
        options.setdefault("revision", 1)  # what a dataset's codes mean does not change with our version
    codec = make_codec(config["name"], device=device, **options)
    want, have = config.get("weights_sha256"), codec.config().get("weights_sha256")
    if want != have:
        raise CodecError(
            f"the weights at {options.get('weights')} are not those this dataset was made with "
            f"(SHA-256 {str(have)[:12]}…, recorded {str(want)[:12]}…)",
            f"name the right ones with {opt('weights')}",
        )
    return codec


def flip_signs(codec: Codec, latent: tuple[int, int, int]) -> tuple[int, ...] | None:
    """The codec's mirror as one sign a channel, if that is what it is: ``flip(z) == sign * z mirrored``.

    This is the form in which a dataset records the mirror, so that training needs no codec. None for codecs
    without an exact mirror, and for those whose mirror is another map.
    """
    z = torch.rand(1, *latent, generator=torch.Generator().manual_seed(0)) + 0.5
    flipped = codec.flip(z)
    if flipped is None:
        return None
    ratio = flipped.cpu() / z.flip(-1)
    signs = ratio[0, :, 0, 0].round()
    exact = torch.allclose(ratio, signs[None, :, None, None].expand_as(ratio)) and bool((signs.abs() == 1).all())
    return tuple(int(s) for s in signs) if exact else None


def check_multiple(name: str, factor: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) / factor. `UsageError` naming the nearest good size if it does not divide."""
    for side in (height, width):
        if side < factor or side % factor:
            low = max(factor, side // factor * factor)
            raise UsageError(
                f"codec '{name}' takes sizes that are multiples of {factor}, got {side}",
                f"use {opt('size', low)} or {opt('size', low + factor)}",
            )
    return height // factor, width // factor


def to_pixels(images: Tensor) -> Tensor:
    """f32 [B,3,H,W] in 0…255 -> u8 [B,3,H,W], rounded and clamped."""
    return images.round().clamp(0, 255).to(torch.uint8)


def _ours(point: EntryPoint) -> bool:
    return point.value.startswith("latentprep.")
