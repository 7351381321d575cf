"""From a sample's bytes to pixels: decoding, orientation, and the views of a sample.

JPEGs go through libjpeg-turbo (simplejpeg), everything it refuses through Pillow. Nothing here knows codecs.
"""

from __future__ import annotations

import hashlib
import io
import math

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 1 << 27  # 134 megapixels: 400 MB decoded
RESIZE = "bicubic"  # antialiased, as Pillow does it
CROP_AREA = (0.35, 1.0)  # of the image, as in random-resized crops (Szegedy et al. 2014, section 6)
CROP_RATIO = (3 / 4, 4 / 3)

# Reduced-size JPEG decoding keeps at least this many times the pixels that are needed a side, so that the
# final antialiased resize still decides what the picture looks like (Pillow's `reducing_gap` has the same use).
_REDUCING_GAP = 2.0

# libjpeg's warnings (jerror.h) that mean part of the picture is lost. Its others are harmless, and Pillow decides.
_DAMAGE = ("premature end", "bad huffman", "bad arithmetic", "instead of rst")

# What Pillow may take bytes for. Left out: formats that run a program (EPS starts Ghostscript) and those nobody keeps.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class BadImage(Exception):
    """Bytes that cannot be made into a picture; the text is the reason, for `errors.jsonl`."""


class _Refused(Exception):
    """A JPEG that libjpeg-turbo does not take, but Pillow may."""


def load_views(
    data: bytes,
    size: int,
    views: int = 1,
    seed: int = 0,
    key: str = "",
    max_pixels: int = MAX_PIXELS,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """An encoded image -> u8 [V, size, size, 3] RGB, in `out` if that is given.

    View 0 is the canonical one: shorter side resized to `size`, centre crop. Views 1… are random-resized
    crops, each mirrored or not, drawn from (`seed`, `key`, view) alone.

    Raises `BadImage`.
    """
    smallest = math.sqrt(CROP_AREA[0] * CROP_RATIO[0]) if views > 1 else 1.0
    out = np.empty((views, size, size, 3), np.uint8) if out is None else out
    canonical = out[0]
    pixels = decode(data, math.ceil(size / smallest), max_pixels, canonical if views == 1 else None)
    if views == 1 and pixels.shape[:2] == (size, size):  # Pillow's image and back would take half as long as decoding
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


def decode(
    data: bytes, need_side: int | None = None, max_pixels: int = MAX_PIXELS, out: np.ndarray | None = None
) -> np.ndarray:
    """An encoded image of any common kind -> u8 [H, W, 3] RGB, upright.

    Grey is repeated, alpha is composited on white, EXIF orientation is applied. Where `need_side` is given, a
    JPEG whose sides are all much larger is decoded at a half, a quarter or an eighth, never below twice that. A JPEG
    of just the shape of `out`, contiguous u8 [H, W, 3], may be decoded into it, and it is what is returned.

    Raises `BadImage` for bytes that do not decode, are cut short, or hold more than `max_pixels`.
    """
    if data[:3] != b"\xff\xd8\xff":
        return _decode_other(data, max_pixels)
    try:
        return _decode_jpeg(data, need_side, max_pixels, out)
    except _Refused as refusal:
        try:
            return _decode_other(data, max_pixels)
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


def _decode_jpeg(data: bytes, need_side: int | None, max_pixels: int, out: np.ndarray | None) -> np.ndarray:
    """u8 [H,W,3] by libjpeg-turbo."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception as error:  # a KeyError for some damaged headers, too
        raise _Refused("no readable JPEG header") from error
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
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    return _upright(pixels, _orientation(data))


def _decode_other(data: bytes, max_pixels: int) -> np.ndarray:
    """u8 [H,W,3] by Pillow. `BadImage` for everything it cannot read."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_pixels(*image.size, max_pixels)
            orientation = image.getexif().get(0x0112, 1)
            image.load()
            return _upright(np.asarray(_to_rgb(image)), orientation)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever they meet in damaged bytes
        reason = str(error).split(" <_io", maxsplit=1)[0]
        raise BadImage(reason or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit grey scaled to 8, transparency composited on white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float64)
        top = 65535.0 if grey.max(initial=0) > 255 else 255.0
        return Image.fromarray((grey.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width}×{height} is more than the limit of {max_pixels} pixels; raise it with --max-pixels")


def _orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 where it has none or a damaged one."""
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata says nothing about the picture
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (Exif 2.32, tag 0x0112) to [H,W,3]; unknown values leave it as it is."""
    if orientation in (5, 6, 7, 8):  # stored on its side
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
