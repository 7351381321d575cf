from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from latentprep.sources.images import BadImage, decode, load_views, random_box
from pictures import jpeg, picture


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_kinds_decode_as_pillow_does(kind: str) -> None:
    image = Image.fromarray(picture(1, 20, 30))
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)


def test_grey_is_repeated() -> None:
    pixels = decode(jpeg(picture(1)[:, :, 0]))
    assert pixels.shape == (64, 64, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_alpha_is_composited_on_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.paste((10, 20, 30, 255), (0, 0, 2, 4))
    pixels = decode(encoded(half, "PNG"))
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 3].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled() -> None:
    deep = Image.fromarray(np.array([[0, 65535], [32768, 257]], np.uint16))
    assert decode(encoded(deep, "PNG"))[..., 0].tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(orientation: int) -> None:
    image = Image.fromarray(picture(3, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode(data), expected)


def test_every_asset_jpeg_is_right_or_refused(assets) -> None:
    files = sorted((assets / "jpeg-cases").rglob("*.jpg"))
    assert len(files) > 40
    refused = []
    for file in files:
        data = file.read_bytes()
        try:
            ours = decode(data)
        except BadImage as error:
            assert str(error)
            refused.append(file.name)
            continue
        image = Image.open(io.BytesIO(data))
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
        if profile:
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image.convert("RGB"), source, srgb, outputMode="RGB")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        assert np.abs(ours.astype(int) - np.asarray(image.convert("RGB"))).max() <= 2, file.name
    # 12- and 16-bit lossless files, and one whose data ends early.
    assert set(refused) == {"MR4.jpg", "partial_progressive.jpg", *(f"jpeg_lossless_sel{i}.jpg" for i in range(1, 8))}


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", jpeg(picture(1))[:-300], jpeg(picture(1))[:40], b"\xff\xd8\xff" + bytes(200)],
    ids=["empty", "text", "cut", "header only", "noise"],
)
def test_damage_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(BadImage) as error:
        decode(data)
    assert len(str(error.value)) > 3


def test_a_lie_about_the_size_is_refused() -> None:
    data = bytearray(jpeg(picture(1)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x40\x00\x40\x00"  # 16384×16384
    with pytest.raises(BadImage, match="limit"):
        decode(bytes(data))
    data[at : at + 4] = b"\x01\x00\x01\x00"  # 256×256, within the limit, but the data is for 64×64
    with pytest.raises(BadImage):
        decode(bytes(data))


def test_pixel_limit_names_the_way_out() -> None:
    with pytest.raises(BadImage, match="64×64 is more than the limit of 100 pixels; raise it with max_pixels"):
        decode(jpeg(picture(1)), max_pixels=100)


def test_reduced_decoding_looks_the_same() -> None:
    data = jpeg(picture(5, 700, 900), quality=95)
    assert decode(data, need_side=64).shape[0] < 700  # it was decoded smaller
    small = load_views(data, 64)[0]
    full = Image.fromarray(decode(data)).resize((64, 64), Image.Resampling.BICUBIC, box=(100, 0, 800, 700))
    assert psnr(small, np.asarray(full)) > 40


def test_views_go_where_they_are_asked_to() -> None:
    grey, turned = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture(8)[:, :, 0]).save(grey, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(9)).save(turned, "JPEG", exif=exif)
    for data in (jpeg(picture(8)), jpeg(picture(8, 64, 96)), grey.getvalue(), turned.getvalue()):
        for views in (1, 2):
            batch = np.full((3, views, 64, 64, 3), 7, np.uint8)
            load_views(data, 64, views, out=batch[1])
            assert np.array_equal(batch[1], load_views(data, 64, views))
            assert (batch[[0, 2]] == 7).all()


def test_view_zero_is_the_centre_crop() -> None:
    pixels = picture(7, 64, 96)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert np.array_equal(load_views(buffer.getvalue(), 64)[0], pixels[:, 16:80])


def test_views_depend_on_seed_key_and_number_only() -> None:
    data = jpeg(picture(7, 80, 96))
    one = load_views(data, 32, views=4, seed=1, key="a")
    assert np.array_equal(one[:3], load_views(data, 32, views=3, seed=1, key="a"))
    assert not np.array_equal(one[1], one[2])
    assert not np.array_equal(one[1], load_views(data, 32, views=2, seed=2, key="a")[1])
    assert not np.array_equal(one[1], load_views(data, 32, views=2, seed=1, key="b")[1])
    assert np.array_equal(one[0], load_views(data, 32, seed=9, key="b")[0])


def test_random_boxes_stay_inside_and_mirror_half_the_time() -> None:
    mirrors = 0
    for view in range(300):
        (left, top, right, bottom), mirror = random_box(90, 60, 0, "k", view)
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        mirrors += mirror
    assert 110 < mirrors < 190
