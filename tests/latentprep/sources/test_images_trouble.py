"""Files with something odd about them: the picture is read where it is whole, and else the reason names the cause."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

import profiles
from latentprep.sources.images import BadImage, canonical_view, decode, load_views
from latentprep.sources.kinds import KINDS, has_image_name, has_unsupported_name, is_image, kind_of
from latentprep.sources.metadata import jpeg_info
from pictures import jpeg, picture

PIXELS = picture(3, 16, 32)


def saved(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def upright(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments before all of its own."""
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG of `PIXELS` with a chunk after its header."""
    data = saved(PIXELS, "PNG")
    return data[:33] + chunk(kind, body) + data[33:]


# --- orientation


FILLERS = [segment(0xEF, bytes(60_000)), segment(0xEF, bytes(60_000))]  # 120 kB


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0xE1, turned(6))],
        [*FILLERS, segment(0xE1, turned(6))],
        [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))],
        [*FILLERS, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))],
        [segment(0xE1, turned(6)), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(3))],
        [segment(0xED, b"\xff\xda with a thumbnail's scan"), segment(0xE1, turned(6))],
        [b"\xff\xff\xff", segment(0xE1, turned(6))],
    ],
    ids=["exif", "exif far in", "xmp", "xmp far in", "exif before xmp", "after a scan's mark", "fill bytes"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_turned_wherever_the_tag_lies(segments: list[bytes], mode: str) -> None:
    data = with_segments(saved(Image.fromarray(PIXELS).convert(mode), "JPEG"), *segments)
    assert upright(data).shape == (32, 16, 3)
    assert np.array_equal(decode(data), upright(data))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(compression: str, orientation: int) -> None:
    data = saved(PIXELS, "TIFF", compression=compression, tiffinfo={0x0112: orientation})
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # Pillow turns it while loading
    assert np.array_equal(decode(data), expected)
    assert expected.shape == ((32, 16, 3) if orientation > 4 else (16, 32, 3))


RAW_PROFILE = f"\nexif\n{len(turned(6)):8}\n{turned(6).hex()}\n".encode()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"eXIf", turned(6)[6:]),
        (b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(6))),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_png_is_turned_as_pillow_does(kind: bytes, body: bytes, after: bool) -> None:
    data = saved(PIXELS, "PNG") if after else with_chunk(kind, body)
    if after:  # the picture's data
        data = data[:-12] + chunk(kind, body) + data[-12:]
    assert upright(data).shape == (32, 16, 3)
    assert np.array_equal(decode(data), upright(data))


# --- what cannot lose a row


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "garbage", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff"]
)
def test_garbage_in_exif_is_not_the_picture(kind: str, garbage: bytes) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = saved(PIXELS, kind, **options)
    assert np.array_equal(decode(saved(PIXELS, kind, exif=garbage, **options)), decode(plain))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"iCCP", b"p\0\0" + zlib.compress(profiles.SRGB.ljust(3 << 20, b"\0"))),
        (b"iCCP", b"p\0\0 not packed"),
        (b"iCCP", b"p\0\7what"),
        (b"iCCP", b""),
        (b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20))),
        (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        (b"tEXt", b"k\0" + bytes(3 << 20)),
        (b"gAMA", b"\0"),
        (b"sRGB", b""),
        (b"tIME", b"now"),
        (b"fcTL", bytes(26)),
    ],
)
def test_side_chunks_of_a_png_cannot_lose_it(kind: bytes, body: bytes) -> None:
    assert np.array_equal(decode(with_chunk(kind, body)), PIXELS)


def test_a_large_profile_counts_and_a_wrong_checksum_does_not_matter() -> None:
    large = profiles.DISPLAY_P3.ljust(3 << 20, b"\0")
    large = struct.pack(">I", len(large)) + large[4:]
    body = b"p\0\0" + zlib.compress(large)
    image = saved(Image.new("RGB", (4, 4), (200, 100, 50)), "PNG")
    assert np.abs(decode(image[:33] + chunk(b"iCCP", body) + image[33:])[0, 0] - [216.0, 93, 31]).max() <= 1
    data = with_chunk(b"tEXt", b"k\0text")
    assert np.array_equal(decode(data.replace(b"k\0text", b"k\0taxt")), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "JPEG"])
def test_our_limit_of_pixels_is_the_only_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"exif": turned(6)} if kind in ("PNG", "JPEG", "WEBP") else {}
    data = saved(Image.fromarray(PIXELS), kind, **options)
    expected = upright(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 32 // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(decode(data).astype(int) - expected).max() <= 2
        with pytest.raises(BadImage, match=r"×.* is more than the limit of 511 pixels"):
            decode(data, max_pixels=511)
    assert Image.MAX_IMAGE_PIXELS == 16 * 32 // 3  # as it was, for others
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --- depth


def test_sixteen_bits_are_never_guessed_from_the_picture() -> None:
    dark = np.array([[0, 128, 255, 257]], np.uint16)
    for data in (
        saved(dark, "PNG"),
        saved(dark, "TIFF"),
        saved(dark.astype(">u2"), "TIFF"),
        saved(dark.astype(np.int32), "PPM"),
        saved(dark, "JPEG2000", irreversible=False),
        b"P5 4 1 65535\n" + dark.astype(">u2").tobytes(),
    ):
        assert decode(data)[0, :, 0].tolist() == [0, 0, 1, 1]
    twelve = b"P5 4 1 4095\n" + np.array([0, 2048, 4095, 16], ">u2").tobytes()
    assert decode(twelve)[0, :, 0].tolist() == [0, 128, 255, 1]


def test_sixteen_bits_of_colour_are_read() -> None:
    rows = b"".join(b"\0" + np.array([[65535, 25700, 12850]] * 4, ">u2").tobytes() for _ in range(2))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode(data)[0, 0].tolist() == [255, 100, 50]


def test_white_is_zero_in_sixteen_bits_too() -> None:
    data = saved(np.array([[0, 65535, 257]], np.uint16), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert decode(data)[0, :, 0].tolist() == [255, 0, 254]


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("TIFF", np.ones((4, 4), np.float32), "TIFF with floating-point numbers, for which white is undefined"),
        ("TIFF", np.ones((4, 4), np.int32), "TIFF with signed or 32-bit integers"),
        ("PPM", np.ones((4, 4), np.float32), "PPM with floating-point numbers"),
    ],
)
def test_numbers_without_a_range_are_refused(kind: str, values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(saved(values, kind))


# --- colour


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (profiles.DISPLAY_P3, (216, 93, 31)),
        (profiles.P3_GAMMA, (216, 93, 24)),
        (profiles.ADOBE_RGB, (227, 100, 42)),
        (profiles.PROPHOTO, (255, 80, 46)),
        (profiles.SRGB, (200, 100, 50)),
        (b"no profile", (200, 100, 50)),
        (profiles.DISPLAY_P3[:200], (200, 100, 50)),
        (profiles.CMYK, (200, 100, 50)),
        (profiles.LINEAR_GREY, (200, 100, 50)),
    ],
    ids=["Display P3", "P3 of gamma 2.2", "Adobe RGB", "ProPhoto", "sRGB", "noise", "cut", "for CMYK", "for grey"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_embedded_profile_is_converted_from(kind: str, profile: bytes, expected: tuple[int, ...]) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(Image.new("RGB", (16, 16), (200, 100, 50)), kind, icc_profile=profile, **options)
    assert np.abs(decode(data)[8, 8] - np.array(expected, float)).max() <= 2
    assert np.abs(decode(data, colour="stored")[8, 8] - [200.0, 100, 50]).max() <= 1
    for transform, wanted in (({"size": 8, "colour": "srgb"}, expected), ({"size": 8}, (200, 100, 50))):
        assert np.abs(canonical_view(data, transform)[4, 4] - np.array(wanted, float)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_grey_profile_is_converted_from(kind: str) -> None:
    data = saved(Image.new("L", (16, 16), 134), kind, icc_profile=profiles.LINEAR_GREY)
    assert np.abs(decode(data)[8, 8] - 192.0).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_with_a_profile_for_colours_is_such_a_grey(kind: str, mode: str) -> None:
    if (kind, mode) == ("JPEG", "LA"):
        mode = "L"
    options = {"icc_profile": profiles.PROPHOTO} | ({"quality": 100} if kind == "JPEG" else {})
    grey = decode(saved(Image.new(mode, (16, 16), (134, 255)[: len(mode)]), kind, **options))
    colour = decode(saved(Image.new("RGB", (16, 16), (134, 134, 134)), kind, **options))
    assert colour[8, 8, 0] > 140
    assert np.abs(grey.astype(int) - colour).max() <= 1


def test_a_long_profile_of_a_jpeg_is_put_together() -> None:
    profile = profiles.DISPLAY_P3 + bytes(100_000)
    data = saved(PIXELS, "JPEG", icc_profile=profile)
    assert data.count(b"ICC_PROFILE\0") == 2
    assert jpeg_info(data)["icc_profile"] == profile == Image.open(io.BytesIO(data)).info["icc_profile"]


def test_threads_share_a_profile() -> None:
    files = [saved(picture(seed, 64, 64), "JPEG", icc_profile=profiles.DISPLAY_P3) for seed in range(8)] * 8
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(lambda data: load_views(data, 64), files))
    assert all(np.array_equal(view, load_views(data, 64)) for view, data in zip(views[:8], files, strict=False))
    assert all(np.array_equal(views[i], views[i % 8]) for i in range(64))


# --- kinds


def test_one_list_of_kinds() -> None:
    assert {k.format for k in KINDS} >= {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF"}
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"):
        data = saved(PIXELS, kind, **({"lossless": True} if kind == "WEBP" else {}))
        found = kind_of(data[:32])
        assert found is not None
        assert found.format == kind
        assert is_image(data[:32])
        assert np.abs(decode(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).max() <= 2
    assert all(
        has_image_name(f"a/B.{end}") for end in ("JPG", "heic", "Avif", "jxl", "ppm", "pgm", "pbm", "pnm", "jp2")
    )
    assert all(has_unsupported_name(f"a/b.{end}") for end in ("svg", "PSD", "ico", "tga", "dds", "cr2", "DNG", "exr"))
    assert not any(has_image_name(n) or has_unsupported_name(n) for n in ("notes.txt", "jpg", "a.b/c", "x.cls", ""))
    for text in (b"P5 is a group", b"BMW, a maker of cars, in a text", b"P1, P2\n", b"", b"II* twice"):
        assert not is_image(text.ljust(32))


HEIC = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"


@pytest.mark.parametrize(
    ("data", "module", "reason"),
    [
        (HEIC, "pillow_heif", "reading HEIC needs a package: pip install pillow-heif"),
        (b"\xff\x0a" + bytes(30), "pillow_jxl", "reading JPEG XL needs a package: pip install pillow-jxl-plugin"),
    ],
)
def test_a_plug_in_that_lacks_is_named(data: bytes, module: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert is_image(data[:32])
    with pytest.raises(BadImage) as error:
        decode(data)
    assert str(error.value) == reason


def test_a_plug_in_is_registered_when_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        monkeypatch.setitem(
            Image.OPEN, "HEIF", (lambda file, name: Image.open(io.BytesIO(file.read()[len(HEIC) :])), None)
        )

    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    assert np.array_equal(decode(HEIC + saved(PIXELS, "PNG")), PIXELS)


# --- reasons


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image but an empty file"),
        (bytes(3000), "not an image but nothing but zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
        (gzip.compress(jpeg(PIXELS), mtime=0), "a gzip file; unpack it"),
        (b"PK\x03\x04 archive", "a packed archive; unpack it"),
        (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "an HTML page"),
        (b"\n<!-- error -->\n<HTML><head>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg xmlns="x">', "an SVG drawing; convert it to PNG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "a raw camera file"),
        (bytes(4) + b"ftypisom" + bytes(20), "a video"),
        ("Datei nicht gefunden: schön".encode(), "not an image but text, 'Datei nicht gefunden: schön'"),
        (b"\x80\x04\x95\x10\0\0\0", "not a known kind of image: it begins with the bytes 80 04 95"),
        (saved(PIXELS, "PNG")[:-300], "damaged PNG: .*truncated"),
        (saved(PIXELS, "PNG")[:20], "damaged PNG"),
        (saved(PIXELS, "WEBP")[:60], "damaged WebP"),
        (saved(PIXELS, "GIF")[:300], "damaged GIF"),
        (saved(PIXELS, "BMP")[:300], "damaged BMP"),
        (saved(PIXELS, "TIFF")[:300], "damaged TIFF"),
        (saved(PIXELS, "JPEG2000")[:150], "damaged JPEG 2000"),
        (saved(PIXELS, "AVIF")[:200], "damaged AVIF"),
        (saved(PIXELS, "PPM")[:300], "damaged PPM"),
        (jpeg(PIXELS)[:300], "damaged JPEG"),
        (jpeg(PIXELS)[:30], "damaged JPEG"),
    ],
)  # fmt: skip
def test_the_reason_names_the_cause(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as error:
        decode(data)
    assert "cannot identify" not in str(error.value)
    assert "0x" not in str(error.value)


def test_markup_without_end_takes_no_time() -> None:
    for data in (b"<!>" * 400, b"<?" * 600, b" " * 100_000, b"<!--" * 300, b"\0" * 100_000 + b"\1"):
        with pytest.raises(BadImage):
            decode(data)
