"""The codec protocol, and codecs by name: ``dct``, or ``dct:luma=20,chroma=5`` with options.

A codec is registered by an entry point in the group `latentprep.codecs` (ours are too), whose value is a class
called with keyword options; its docstring's first line is what `latentprep codecs` shows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from latentprep.errors import CodecError, UsageError, nearest, opt
from latentprep.sources.kinds import IMAGES

GROUP = "latentprep.codecs"
MAX_SIZE = 1 << 14  # pixels per side that images may be made to have


@runtime_checkable
class Codec(Protocol):
    """A lossy transform of images to latents and back.

    A codec class takes ``device`` (a torch device) and its own options, all as keywords with defaults. Options in a
    codec's name become what their annotations say: int, float, bool or str, or one of these or None. An option
    ``seed`` gets the seed of the encode, unless the name sets it.

    ``encode`` is a pure function of image and configuration: which images share a batch changes nothing but
    rounding.

    A codec is for images, or for sound: then ``media = "sound"``, it says ``rate``, the samples per second that it
    takes, and ``hop``, how many of them make one cell of its latents. What is said of images below then holds for
    sounds, f32 [B,T], full scale at 1, whose latents are f32 [B,C,1,T/hop]; `latent_shape` gets (1, T), and `flip` has
    nothing to give.

    A codec that computes little for each pixel may set ``light = True``: on a CPU it then gets one thread and leaves
    the other cores to decoding, since to share every small operation among busy cores costs more than it gains.

    A codec whose latents hold more than it decodes may have ``error_weights``, a float for each channel: what a unit of
    squared error there counts. Without it, what it does to decoded pixels is measured, where bytes are to be met.

    A codec whose channels are worth about the same to whoever reads them may set ``joint_bits``: at so many whole bits
    or fewer its codes are chosen jointly by default, in place of giving channels different numbers of bits.

    A codec may give codes itself: then it has ``codebooks``, a table f32 [levels,D] for each of its stages, with 2 to
    65,536 levels, and ``tokens``, which takes what ``encode`` takes and gives u8, i32 or i64 [B,stages,h,w], indices
    into them. Stages go from coarse to fine: the latents that ``decode`` takes, f32 [B,D,h,w], are the sum of the
    vectors that a cell's tokens name, and the first stages alone make a coarser sum. `latent_shape` is then
    (stages, h, w). No quantizer is fitted.

    A codec may have ``graph()``, a module that does what ``encode`` does, on the CPU in float32, in operations that
    can be exported; ``latenttrain export --with-codec`` needs it.
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


def encoder_of(codec: Any) -> Callable[[Tensor], Tensor]:
    """What turns samples into what the quantizer takes: the codec's ``tokens``, if it has them, else its ``encode``."""
    return getattr(codec, "tokens", codec.encode)


def media_of(codec: Any) -> str:
    """What a codec, or a class of codecs, is for: ``images`` or ``sound``."""
    return str(getattr(codec, "media", IMAGES))


def joint_bits(codec: Any) -> int:
    """``joint_bits`` of a codec, or of the one of a name; 0 for one that is not installed, or does not say."""
    try:
        return int(getattr(codec_class(codec) if isinstance(codec, str) else codec, "joint_bits", 0))
    except CodecError:
        return 0


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


def codec_options(name: str) -> dict[str, Any]:
    """The options of a codec and their defaults, in order; None where there is no default.

    Raises `CodecError` for an unknown name.
    """
    own = {key: p.default for key, p in _options(codec_class(name)).items() if key != "revision"}
    return {key: None if value is inspect.Parameter.empty else value for key, value in own.items()}


def parse_codec(spec: str) -> tuple[str, dict[str, Any]]:
    """``dct:luma=20,chroma=5`` -> ``("dct", {"luma": 20, "chroma": 5})``, each value of its option's type.

    A value may hold any character but a comma. Raises `CodecError` for an unknown codec, `UsageError` for anything
    else that is wrong with the text.
    """
    name, colon, rest = spec.partition(":")
    parameters = _options(codec_class(name))
    options: dict[str, Any] = {}
    for pair in rest.split(",") if colon else ():
        option, equals, value = pair.partition("=")
        if not equals or not value:
            raise UsageError(
                f"codec '{spec}' has {repr(pair) if pair else 'nothing'} where option=value is needed",
                f"write {name}:option=value,option=value; {_takes(parameters)}",
            )
        _check_option(name, option, parameters)
        if option in options:
            raise UsageError(f"codec '{spec}' sets {option} twice", "set it once")
        options[option] = _typed(f"{name}:{option}", value, parameters[option])
    return name, options


def codec_spec(name: str, options: dict[str, Any]) -> str:
    """``("dct", {"luma": 20, "chroma": 5})`` -> ``dct:luma=20,chroma=5``: the inverse of `parse_codec`.

    Raises `UsageError` for a value with a comma, which a codec's name cannot hold.
    """
    for option, value in options.items():
        if "," in str(value) or value == "":
            raise UsageError(f"a codec's name cannot hold {option} {value!r}", "choose a value without commas")
    return name + ":" * bool(options) + ",".join(f"{option}={_plain(value)}" for option, value in options.items())


def split_codecs(specs: str) -> list[str]:
    """``dct:luma=20,chroma=5,taesd`` -> ``["dct:luma=20,chroma=5", "taesd"]``: several codecs' names with a comma
    between them. What follows a comma is an option of the codec before it if it has the form ``option=value``."""
    return [spec.lstrip(" ") for spec in re.split(r",(?!\w+=)", specs)]


def open_codec(
    codec: str | Codec, *, device: str | torch.device = "cpu", weights: str | None = None, seed: int | None = None
) -> Codec:
    """The codec of a name with options, such as ``dct:luma=20,chroma=5``; a `Codec` comes back as it is.

    weights: the same as the option ``weights`` in the name. seed: of codecs that draw, where the name sets none.

    Raises `CodecError` for an unknown codec or missing weights, `UsageError` for options that it does not take.
    """
    if not isinstance(codec, str):
        if weights is not None:
            raise UsageError(f"{opt('weights')} is for a codec given by name, not for a codec object", "leave it out")
        return codec
    name, options = parse_codec(codec)
    if weights is not None:
        if "weights" in options:
            raise UsageError(
                f"{opt('weights')} is given, and the codec '{codec}' names weights too", "give one of them"
            )
        options["weights"] = str(weights)
    if seed is not None and "seed" in codec_options(name):
        options.setdefault("seed", seed)
    return make_codec(name, device=device, **options)


def make_codec(name: str, *, device: str | torch.device = "cpu", **options: Any) -> Codec:
    """Build a codec; options that are None take the codec's default.

    Raises `CodecError` for an unknown name or missing weights, `UsageError` for an option it does not have.
    """
    kind = codec_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    for option in given:
        _check_option(name, option, _options(kind))
    return kind(device=torch.device(device), **given)


def _options(kind: type) -> dict[str, inspect.Parameter]:
    return {key: p for key, p in inspect.signature(kind).parameters.items() if key != "device"}


def _check_option(name: str, option: str, parameters: dict[str, inspect.Parameter]) -> None:
    if option not in parameters:
        raise UsageError(f"codec '{name}' has no option {option}", _takes(parameters))


def _takes(parameters: dict[str, inspect.Parameter]) -> str:
    *most, last = [option for option in parameters if option != "revision"] or ["no options"]
    return f"it takes {', '.join(most)} and {last}" if most else f"it takes {last}"


def _typed(option: str, text: str, parameter: inspect.Parameter) -> Any:
    """The value that `text` writes, of the type of its option: of its annotation, or else of its default.

    Raises `UsageError` if it is none of that type.
    """
    kind = parameter.annotation if parameter.annotation is not parameter.empty else type(parameter.default)
    words = re.findall(r"\w+", kind.__name__ if isinstance(kind, type) else str(kind))
    if "bool" in words and text in ("true", "false"):
        return text == "true"
    for word, read in (("int", int), ("float", float)):
        if word in words:
            try:
                return read(text)
            except ValueError:
                continue
    if "str" in words or not {"bool", "int", "float"} & set(words):
        return text
    allowed = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    raise UsageError(
        f"{option} must be {' or '.join(what for word, what in allowed.items() if word in words)}, got {text!r:.60}"
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def codec_from_config(config: dict, *, device: str | torch.device = "cpu", weights: str | None = None) -> Codec:
    """Rebuild the codec of a dataset's manifest; `weights` says where its weights are now.

    Raises `CodecError` if the codec is not installed, or the weights found are not those recorded.
    """
    options = {key: value for key, value in config.items() if key not in ("name", "model", "weights_sha256")}
    if weights is not None:
        options["weights"] = str(weights)
    if "revision" in inspect.signature(codec_class(config["name"])).parameters:
        options.setdefault("revision", 1)  # what a dataset's codes mean does not change with our version
    codec = make_codec(config["name"], device=device, **options)
    want, have = config.get("weights_sha256"), codec.config().get("weights_sha256")
    if want != have:
        where = f"at {options['weights']}" if options.get("weights") else "in this latentprep"
        raise CodecError(
            f"the weights {where} are not the ones this dataset was made with "
            f"(SHA-256 {str(have)[:12]}…, recorded {str(want)[:12]}…)",
            f"set {opt('weights')} to the folder of the right ones",
        )
    return codec


def flip_signs(codec: Codec, latent: tuple[int, int, int]) -> tuple[int, ...] | None:
    """The codec's mirror as one sign a channel, if that is what it is: ``flip(z) == sign * z mirrored``.

    This is the form in which a dataset records the mirror, so that training needs no codec. None for codecs
    without an exact mirror, and for those whose mirror is another map, as tokens' is.
    """
    if hasattr(codec, "tokens"):
        return None
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


def check_revision(name: str, revision: int, newest: int) -> int:
    """The revision that a dataset was encoded with. Raises `CodecError` for one of a later version of ours."""
    if revision not in range(1, newest + 1):
        raise CodecError(
            f"codec '{name}' has revision {revision}, this version knows 1 to {newest}",
            "upgrade with pip install --upgrade latentprep",
        )
    return revision


def frames(name: str, hop: int, height: int, width: int) -> int:
    """Frames of `hop` samples in a waveform, 1 × width. `UsageError` unless they are whole."""
    if height != 1 or width < hop or width % hop:
        raise UsageError(
            f"codec '{name}' takes whole frames of {hop} samples, got {height} × {width}", f"use {opt('seconds', 1)}"
        )
    return width // hop


def to_pixels(images: Tensor) -> Tensor:
    """f32 [B,3,H,W] in 0…255 -> u8 [B,3,H,W], rounded and clamped."""
    return images.round().clamp(0, 255).to(torch.uint8)


def to_wave(sounds: Tensor) -> Tensor:
    """f32 [B,T] -> the same, clamped to full scale, -1…1."""
    return sounds.clamp(-1, 1)


def _ours(point: EntryPoint) -> bool:
    return point.value.startswith("latentprep.")
