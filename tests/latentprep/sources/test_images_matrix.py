"""Four hundred small files, format × mode × depth × orientation × profile × alpha, against Pillow's own rendering."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

import profiles
from latentprep.sources.images import decode

WIDTH, HEIGHT = 16, 8
SRGB = ImageCms.createProfile("sRGB")
PROFILES = {
    "L": profiles.LINEAR_GREY,
    "LA": profiles.LINEAR_GREY,
    "RGB": profiles.DISPLAY_P3,
    "RGBA": profiles.ADOBE_RGB,
    "CMYK": profiles.CMYK,
}
# The modes that each format is saved in; `+key` makes one colour of it transparent.
CASES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "L+key", "LA", "P", "P+key", "RGB", "RGB+key", "RGBA", "I;16", "I;16+key"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "LAB"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "GIF": ("L", "P", "P+key"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I"),
}
OPTIONS = {
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 95, "speed": 10},
    "TIFF": {"compression": "tiff_lzw"},
}
HAVE_EXIF, HAVE_PROFILE = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"), ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")


def pattern(mode: str) -> Image.Image:
    """A picture that no turn and no mirror leaves as it is, with every alpha where it has any."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    colours = np.stack([15 * x, 30 * y, 255 - 12 * x - 5 * y], axis=-1).astype(np.uint8)
    colours[:3, :4] = (200, 100, 50)
    rgb = Image.fromarray(colours)
    if mode.startswith("I"):
        deep = (4000 * x + 500 * y).astype(np.uint16)
        if mode == "I":
            return Image.fromarray(deep.astype(np.int32))
        return Image.fromarray(deep.astype(">u2" if mode == "I;16B" else "<u2"))
    if mode in ("LA", "RGBA"):
        rgb.putalpha(Image.fromarray((17 * x).astype(np.uint8)))
    if mode == "LAB":
        return ImageCms.profileToProfile(rgb, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")  # type: ignore[return-value]
    return rgb.quantize(16) if mode == "P" else rgb.convert(mode)


def files(kind: str, mode: str) -> Iterator[bytes]:
    mode, key, _ = mode.partition("+")
    image = pattern(mode)
    first = {"RGB": (200, 100, 50), "I;16": 4000}.get(mode, image.getpixel((0, 0)))
    base = {"P": "RGB", "1": "L", "I;16": "L", "I;16B": "L"}.get(mode, mode)
    for profile in (None, PROFILES.get(base)) if kind in HAVE_PROFILE and base in PROFILES else (None,):
        for orientation in range(1, 9) if kind in HAVE_EXIF else (1,):
            options = dict(OPTIONS.get(kind, {}))
            if key:
                options["transparency"] = first
            if profile:
                options["icc_profile"] = profile
            if orientation > 1:
                exif = Image.Exif()
                exif[0x0112] = orientation
                options["exif"] = exif
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            yield buffer.getvalue()


def rendered(data: bytes) -> np.ndarray:
    """By Pillow alone: upright, in sRGB, on white."""
    image = Image.open(io.BytesIO(data))
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(float)
        grey = Image.fromarray((deep / 257).round().astype(np.uint8))
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray(np.uint8(255) * (deep != image.info["transparency"]).astype(np.uint8)))
        image = grey
    elif image.mode == "LAB":
        image, profile = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB"), None
    elif image.mode in ("P", "1") or "transparency" in image.info:
        plain = "L" if image.mode in ("1", "L") else "RGB"
        image = image.convert(plain + "A" if image.has_transparency_data else plain)
    if profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "LA":
            alpha = image.getchannel("A")
            image = ImageCms.profileToProfile(image.getchannel("L"), source, SRGB, outputMode="RGB")
            image.putalpha(alpha)
        else:
            image = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGBA" if image.mode == "RGBA" else "RGB")
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in CASES for mode in CASES[kind]])
def test_it_is_rendered_as_pillow_does(kind: str, mode: str) -> None:
    seen = set()
    for data in files(kind, mode):
        expected, ours = rendered(data), decode(data)
        assert ours.shape == expected.shape
        assert np.abs(ours.astype(int) - expected).max() <= 2
        seen.add(ours.tobytes())
    assert len(seen) >= (8 if kind in HAVE_EXIF else 1)  # each orientation is another picture


def test_the_matrix_is_as_large_as_it_says() -> None:
    both = {"P", "1", "I;16", "I;16B"} | set(PROFILES)
    count = sum(
        (8 if kind in HAVE_EXIF else 1) * (2 if kind in HAVE_PROFILE and mode.split("+")[0] in both else 1)
        for kind in CASES
        for mode in CASES[kind]
    )
    assert count > 400
