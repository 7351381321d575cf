"""Convert embedded colour profiles (ICC) to sRGB, with LittleCMS in Pillow.

Conversions use the perceptual intent, Pillow's default. In a grey image with an RGB profile, red, green and blue are
equal. As in browsers, a profile is ignored if LittleCMS cannot use it, or if it is for another colour space than the
image's. Then the values count as sRGB, as in an image without a profile.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"L": "GRAY", "LA": "GRAY", "RGB": "RGB ", "RGBA": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}

_SPACE = slice(16, 20)  # where a profile names its colour space (ICC.1:2022, table 17)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, LA, RGB, RGBA or CMYK, with its embedded profile -> the same colours in sRGB, RGB or RGBA.

    The image is returned unchanged if it has no profile, an ignored one, or that of sRGB. Alpha is left alone.
    """
    if profile and profile[_SPACE] == b"RGB " and image.mode in ("L", "LA"):
        image = image.convert("RGB" if image.mode == "L" else "RGBA")
    transform = _transform(profile, image.mode) if profile and image.mode in _SPACES else None
    if transform is None:
        return image
    if image.mode != "LA":
        return transform.apply(image)
    colours = transform.apply(image.getchannel("L"))
    colours.putalpha(image.getchannel("A"))
    return colours


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """An image of mode LAB -> RGB. It needs no profile: L*a*b* defines colours."""
    return to_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None if there is nothing to do. Without LittleCMS's pixel cache, threads may share it."""
    out_mode = "RGBA" if mode == "RGBA" else "RGB"
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if parsed.profile.xcolor_space != _SPACES[mode]:
            return None
        transform = ImageCms.ImageCmsTransform(
            parsed, _srgb(), "L" if mode == "LA" else mode, out_mode, flags=ImageCms.Flags.NOCACHE
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode in ("L", "LA", "RGB", "RGBA") and _changes_nothing(transform) else transform


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether the profile is that of sRGB: no colour of a grid, and no grey, moves by more than one level."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, -1, 1), 3, axis=2)
    colours = greys if transform.input_mode == "L" else np.concatenate([grid, greys], axis=1)
    probe = Image.fromarray(colours).convert(transform.input_mode)
    moved = np.asarray(transform.apply(probe).convert("RGB")).astype(int) - colours
    return bool(np.abs(moved).max() <= 1)
