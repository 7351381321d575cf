"""From a sample's bytes to pixels: decoding, orientation, colour, depth, and the views of a sample.

libjpeg-turbo (simplejpeg) decodes JPEGs. Pillow decodes those that it refuses, and all other `kinds`. Nothing here
knows about codecs.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from latentprep.format.manifest import SRGB, STORED
from latentprep.sources.colour import lab_to_srgb, to_srgb
from latentprep.sources.kinds import BadSample, Kind, kind_of, other_kind
from latentprep.sources.metadata import jpeg_info, orientation, split_png

MAX_PIXELS = 1 << 27  # 134 megapixels: 400 MB decoded
RESIZE = "bicubic"  # antialiased, as Pillow does it
CROP_AREA = (0.35, 1.0)  # of the image, as in random-resized crops (Szegedy et al. 2014, section 6)
CROP_RATIO = (3 / 4, 4 / 3)

# Reduced-size JPEG decoding keeps at least this many times the needed pixels per side, so that the final
# antialiased resize still decides what the image looks like (as Pillow's `reducing_gap` does).
_REDUCING_GAP = 2.0

# libjpeg's warnings (jerror.h) that mean that part of the image is lost. After all others, Pillow decides.
_DAMAGE = ("premature end", "bad huffman", "bad arithmetic", "instead of rst")

_LARGE = 1 << 26  # pixels; Pillow's own limit is a little higher
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags

_huge = threading.Lock()  # held while Pillow's limit is off

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class BadImage(BadSample):
    """Bytes that cannot be decoded to an image."""


class _Refused(Exception):
    """A JPEG that libjpeg-turbo refuses, but Pillow may decode."""


def load_views(
    data: bytes,
    size: int,
    views: int = 1,
    seed: int = 0,
    key: str = "",
    max_pixels: int = MAX_PIXELS,
    out: np.ndarray | None = None,
    colour: str = SRGB,
) -> np.ndarray:
    """An encoded image -> u8 [V, size, size, 3] RGB, written to `out` if given. colour: see `decode`.

    View 0 is the canonical one: the shorter side is resized to `size`, then the centre is cropped. Views 1… are
    random-resized crops, mirrored or not, drawn from (`seed`, `key`, view) alone.

    Raises `BadImage`.
    """
    smallest = math.sqrt(CROP_AREA[0] * CROP_RATIO[0]) if views > 1 else 1.0
    out = np.empty((views, size, size, 3), np.uint8) if out is None else out
    canonical = out[0]
    pixels = decode(data, math.ceil(size / smallest), max_pixels, canonical if views == 1 else None, colour)
    if views == 1 and pixels.shape[:2] == (size, size):  # a Pillow image and back would take half as long as decoding
        if pixels is not canonical:
            canonical[:] = pixels
        return out
    image = Image.fromarray(pixels)
    for view in range(views):
        box, mirror = centre_box(*image.size), False
        if view:
            box, mirror = random_box(*image.size, seed, key, view)
        pixels = np.asarray(_resize(image, size, box))
        out[view] = pixels[:, ::-1] if mirror else pixels
    return out


def canonical_view(data: bytes, transform: dict[str, Any]) -> np.ndarray:
    """View 0 by a manifest's ``transform``: u8 [size, size, 3] RGB. Raises `BadImage`."""
    return load_views(data, transform["size"], colour=colour_of(transform))[0]


def colour_of(transform: dict[str, Any]) -> str:
    """`SRGB` or `STORED`. Older datasets do not record it: they kept colours as stored."""
    return str(transform.get("colour", STORED))


def decode(
    data: bytes,
    need_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    out: np.ndarray | None = None,
    colour: str = SRGB,
) -> np.ndarray:
    """An encoded image of one of the `kinds` -> u8 [H, W, 3] RGB.

    The image is turned upright, as by Pillow's `ImageOps.exif_transpose`. Colours are converted from an embedded
    profile to sRGB, unless `colour` is `STORED`. Grey is repeated, alpha is composited on white. The full range of
    16-bit values becomes 0 to 255. 32-bit integers and floats are refused, because their files do not say what white
    is. Of several frames or pages, the first is decoded.

    With `need_side`, a JPEG that is much larger on both sides is decoded at a half, a quarter or an eighth of its size,
    but never below twice `need_side`. A JPEG with exactly the shape of `out`, contiguous u8 [H, W, 3], may be decoded
    into it; then `out` is returned if nothing else is left to do.

    Raises `BadImage` for bytes that cannot be decoded, are cut short, or hold more than `max_pixels`; the text names
    the cause.
    """
    if data[:3] != b"\xff\xd8\xff":
        return _decode_other(data, max_pixels, colour)
    try:
        return _decode_jpeg(data, need_side, max_pixels, out, colour)
    except _Refused as refusal:
        try:
            return _decode_other(data, max_pixels, colour)
        except BadImage as error:
            raise BadImage(f"{refusal}") from error


def centre_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, seed: int, key: str, view: int) -> tuple[Box, bool]:
    """A random-resized crop and whether to mirror it: the same for the same (seed, key, view) on every machine."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{view}".encode(errors="surrogateescape")).digest()
    random = np.random.default_rng(np.frombuffer(digest, np.uint32))
    mirror = bool(random.random() < 0.5)
    for _ in range(10):
        area = width * height * random.uniform(*CROP_AREA)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        left, top = random.random() * (width - w), random.random() * (height - h)
        if w <= width and h <= height:
            return (left, top, left + w, top + h), mirror
    return centre_box(width, height), mirror


def _resize(image: Image.Image, size: int, box: Box) -> Image.Image:
    if image.size == (size, size) == (round(box[2]), round(box[3])) and box[:2] == (0, 0):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _decode_jpeg(
    data: bytes, need_side: int | None, max_pixels: int, out: np.ndarray | None, colour: str
) -> np.ndarray:
    """u8 [H,W,3] by libjpeg-turbo."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception as error:  # even a KeyError for some damaged headers
        raise _Refused("damaged JPEG: no readable header") from error
    _check_pixels(width, height, max_pixels)
    if colours not in ("YCbCr", "RGB", "Gray"):
        raise _Refused(f"JPEG of colour space {colours}")
    least = 0 if need_side is None else math.ceil(_REDUCING_GAP * need_side)
    reduced = {"min_height": least, "min_width": least, "min_factor": 2} if 0 < 2 * least <= min(width, height) else {}
    try:
        if out is not None and colours != "Gray" and out.shape == (height, width, 3) and not reduced:
            simplejpeg.decode_jpeg(data, "RGB", buffer=out)
            pixels = out
        else:
            pixels = simplejpeg.decode_jpeg(data, "GRAY" if colours == "Gray" else "RGB", **reduced)
    except ValueError as error:
        if any(damage in str(error).lower() for damage in _DAMAGE):
            raise BadImage(f"damaged JPEG: {error}") from error
        raise _Refused(str(error)) from error
    if colours == "Gray":
        pixels = pixels.reshape(pixels.shape[:2])
    info = jpeg_info(data)
    if not info:
        return pixels if pixels.ndim == 3 else _grey_repeated(pixels)
    if colour == SRGB and "icc_profile" in info:
        image = Image.fromarray(pixels)
        converted = to_srgb(image, info["icc_profile"])
        pixels = pixels if converted is image else np.asarray(converted)
    return _upright(pixels if pixels.ndim == 3 else _grey_repeated(pixels), orientation(info))


def _decode_other(data: bytes, max_pixels: int, colour: str) -> np.ndarray:
    """u8 [H,W,3] by Pillow. Raises `BadImage` for everything it cannot read."""
    kind = kind_of(data)
    if kind is None:
        raise BadImage(other_kind(data))
    reader = _reader(kind)
    try:
        plain, info = split_png(data) if kind.format == "PNG" else (data, {})
        with _opened(reader, plain, max_pixels) as image:
            image.info.update(info)
            rgb = _to_rgb(image, kind, image.info.get("icc_profile") if colour == SRGB else None)
            return _upright(np.asarray(rgb), _orientation(image))
    except BadImage:
        raise
    except Exception as error:  # Pillow's plug-ins raise all kinds of errors for damaged bytes
        reason = " ".join(str(error).split(" <_io", maxsplit=1)[0].split())
        raise BadImage(f"damaged {kind.name}: {reason or type(error).__name__}") from error


def _reader(kind: Kind) -> Callable[[Any, str], Image.Image]:
    """The function that opens this kind: a plug-in of Pillow or of another package, registered when first needed."""
    for name in kind.modules:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if kind.format not in Image.OPEN and hasattr(module, "register_heif_opener"):
            module.register_heif_opener()
        if getattr(module, "SUPPORTED", True) and kind.format in Image.OPEN:
            return Image.OPEN[kind.format][0]
    raise BadImage(f"reading {kind.name} needs a package: pip install {kind.package}")


@contextmanager
def _opened(reader: Callable[[Any, str], Image.Image], data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image, loaded, if it has at most `max_pixels`. This limit replaces Pillow's own."""
    try:
        image = reader(io.BytesIO(data), "")
    except Image.DecompressionBombError:
        with _without_pillows_limit():
            image = reader(io.BytesIO(data), "")
    with image:
        _check_pixels(*image.size, max_pixels)
        # another thread may have switched the limit off for a moment, so do not rely on it alone
        if image.width * image.height > min(Image.MAX_IMAGE_PIXELS or _LARGE, _LARGE):
            with _without_pillows_limit():
                image.load()
        else:
            image.load()
        yield image


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Switch Pillow's limit off for one image at a time, so that it is back on as soon as possible."""
    with _huge:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """The orientation of a loaded image. Pillow has already turned TIFFs upright and removed their tag."""
    if hasattr(image, "tag_v2"):
        return 1
    return orientation(image.info)


def _to_rgb(image: Image.Image, kind: Kind, profile: bytes | None) -> Image.Image:
    """A loaded image of any mode -> sRGB, converted from the profile, on white if it is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, kind)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = to_srgb(image.convert("LA" if grey else "RGBA"), profile).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        return lab_to_srgb(image)
    if image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    return to_srgb(image, profile).convert("RGB")


def _eight_bits(image: Image.Image, kind: Kind) -> Image.Image:
    """Grey with 16 bits, or 12 in a TIFF -> mode L, or LA if one value is transparent. `BadImage` for more bits."""
    top, tags = 65535, getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and kind.format not in ("PNG", "PPM")):  # there, I means 16 bits
        numbers = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
        raise BadImage(f"{kind.name} with {numbers}, for which white is undefined: save it with 16 bits")
    deep = np.asarray(image).astype(np.uint32)
    if tags.get(_BITS) == (12,):  # Pillow does not scale these
        top = 4095
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow handles this only up to 8 bits
        deep = top - np.minimum(deep, top)
    grey = Image.fromarray(((np.minimum(deep, top) * 255 + top // 2) // top).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return grey


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width}×{height} is more than the limit of {max_pixels} pixels; raise it with max_pixels")


def _grey_repeated(pixels: np.ndarray) -> np.ndarray:
    """u8 [H,W] -> u8 [H,W,3]."""
    return np.repeat(pixels[:, :, None], 3, axis=2)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (Exif 2.32, tag 0x0112) to [H,W,3]; unknown values change nothing."""
    if orientation in (5, 6, 7, 8):  # stored sideways
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
