"""What a source's samples become for a codec: the size of images or the length of sounds, and their views.

`transform_for` decides it, and a manifest records it as ``transform``. What decodes samples by it:
`latentprep.sources.media`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentprep.codecs.base import MAX_SIZE, Codec, media_of
from latentprep.errors import SourceError, UsageError, check_number, check_whole, opt
from latentprep.format.manifest import SRGB, STORED, train_split
from latentprep.sources import images, sound
from latentprep.sources.kinds import SOUND, BadSample
from latentprep.sources.source import Source

# Networks learn best on grids of about 28 cells a side, and still well on 16: docs/results.md
ENOUGH_CELLS, GOOD_CELLS = 16, 28  # images that leave fewer than the first are enlarged, to the second
SMALL_SIDE = 48  # pixels; images up to it are enlarged to the first: more cells take more bytes than the pixels
RESOLUTION_BASE = 1.15  # gamma of compound scaling
MAX_DEFAULT_SIZE = 224  # pixels; larger sources are shrunk to it unless a size is given
LONG_ENOUGH = 95  # percent of the sounds that are not cut by default
MAX_DEFAULT_SECONDS = 10.0  # longer sounds are cut to it unless a length is given
_DURATIONS = 256  # sounds whose lengths are looked at


def transform_for(
    source: Source,
    codec: Codec,
    *,
    size: int | None = None,
    seconds: float | None = None,
    phi: float = 0.0,
    max_pixels: int | None = None,
    views: int = 1,
    splits: list[str] | None = None,
    seed: int = 0,
    colour: str = SRGB,
) -> dict[str, Any]:
    """How samples are decoded for this codec, as a manifest has it. Sizes that are not given suit source and codec.

    Raises `UsageError` for a codec of another medium than the source, and for parameters of the other medium.
    """
    check_whole("size", size, 1, MAX_SIZE, optional=True)
    if media_of(codec) != source.media:
        raise UsageError(
            f"codec '{codec.name}' is for {media_of(codec)}, and {source.spec} holds {source.media}",
            f"use {opt('codec', 'mdct' if source.media == SOUND else 'scatter')}, or another source",
        )
    if source.media == SOUND:
        for name, given in (("size", size), ("phi", phi or None), ("max_pixels", max_pixels)):
            if given is not None:
                raise UsageError(f"{opt(name)} is for images, and {source.spec} holds sound", "leave it out")
        transform: dict[str, Any] = {
            "media": SOUND, "size": sound_size(source, codec, seconds, seed), "rate": codec.rate,  # type: ignore[attr-defined]
            "views": views, "seed": seed, "resample": sound.RESAMPLE,
        }  # fmt: skip
        further: dict[str, Any] = {"shift": sound.SHIFT, "gain": sound.GAIN}
    else:
        if seconds is not None:
            raise UsageError(f"{opt('seconds')} is for sound, and {source.spec} holds images", f"use {opt('size')}")
        side = scaled_size(size or default_size(source, codec), phi, codec)
        transform = {"size": side, "views": views, "seed": seed, "resize": images.RESIZE, "colour": colour}
        further = {"crop_area": list(images.CROP_AREA), "crop_ratio": list(images.CROP_RATIO)}
    if views > 1:  # of the split that is learned from; the others are only looked at, in view 0
        names = splits or list(source.splits)
        transform["views"] = {name: views if name == train_split(names) else 1 for name in names}
        transform |= further
    return transform


def default_codec(source: Source, weights: str | None = None, size: int | None = None) -> str:
    """The codec for a source, if its images are made this large: the same on every machine, whatever it has.

    weights: of an autoencoder, if any are given.
    """
    if source.media == SOUND:
        return "mdct"
    if weights:
        return "taesd"
    if size is not None and size <= SMALL_SIDE:  # cells of 8 pixels would be too few
        return "resample:factor=1"
    return "scatter"


def sound_size(source: Source, codec: Any, seconds: float | None, seed: int) -> int:
    """Samples per view: a whole number of the codec's frames, near `seconds` or, by default, as long as most sounds."""
    if seconds is None:
        seconds = max(usual_seconds(source, seed), ENOUGH_CELLS * codec.hop / codec.rate)
    check_number("seconds", seconds, 0, 3600, f"use {opt('seconds', 1)}", above=True)
    return max(1, round(seconds * codec.rate / codec.hop)) * codec.hop


def usual_seconds(source: Source, seed: int) -> float:
    """As long as `LONG_ENOUGH` percent of the source's sounds, of a draw from its train split; at most
    `MAX_DEFAULT_SECONDS`. Rounded up to a tenth of a second."""
    split = train_split(source.splits)
    count = source.size(split)
    drawn = np.random.default_rng([seed, count]).permutation(count)[:_DURATIONS]
    lengths = []
    for i in sorted(drawn.tolist()):
        try:
            lengths.append(sound.duration(source.read(split, i).data))
        except (BadSample, SourceError, OSError):
            continue  # reported when its row comes up
    usual = float(np.percentile(lengths, LONG_ENOUGH)) if lengths else 1.0
    return min(MAX_DEFAULT_SECONDS, math.ceil(round(10 * usual, 6)) / 10)


def usual_side(source: Source) -> int | None:
    """The median of the shorter sides of some of the source's images, in pixels; None if none can be read."""
    sides = []
    for split in source.splits:
        count = source.size(split)
        for i in sorted({k * count // 8 for k in range(8)}) if count else ():
            try:
                sides.append(min(images.decode(source.read(split, i).data, colour=STORED).shape[:2]))
            except (BadSample, SourceError, OSError):
                continue  # reported when its row comes up
    return int(np.median(sides)) if sides else None


def default_size(source: Source, codec: Codec) -> int:
    """The usual shorter side of the source's images, at most `MAX_DEFAULT_SIZE`, as a size that the codec takes and
    that leaves a grid which networks learn from."""
    target = min(MAX_DEFAULT_SIZE, usual_side(source) or MAX_DEFAULT_SIZE)
    enlarged = ENOUGH_CELLS if target <= SMALL_SIDE else GOOD_CELLS
    sizes = [(size, ENOUGH_CELLS) for size in range(target, 0, -1)]
    for size, cells in (*sizes, *((size, enlarged) for size in range(target + 1, 1025))):
        try:
            if min(codec.latent_shape(size, size)[1:]) >= cells:
                return size
        except UsageError:
            continue
    raise UsageError(f"codec '{codec.name}' takes no size up to 1024", f"set {opt('size')}")


def scaled_size(size: int, phi: float, codec: Codec) -> int:
    """``size * 1.15**phi`` to the nearest that the codec takes; `size` itself at phi 0."""
    check_number("phi", phi, -10, 10, f"use {opt('phi', 1)} for 1.15 times the resolution")
    target = size * RESOLUTION_BASE**phi
    for candidate in sorted(range(1, 2 * round(target) + 2), key=lambda side: abs(side - target)) if phi else ():
        try:
            codec.latent_shape(candidate, candidate)
            return candidate
        except UsageError:
            continue
    return size
