"""What a fixed source becomes: the same bytes from version to version, so that old datasets can be resumed and checked.

The images are PNG files made here byte by byte, and the codec keeps their pixels, so that the codes depend neither on
a JPEG decoder nor on the order in which a CPU adds floats. Codes that do depend on it are compared one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numcodecs import zstd

import latentprep
from latentprep.codecs import make_codec
from latentprep.format.packing import pack, unpack

ZSTD = 10506
"""The version of zstd, 1.5.6, that the hashes in `WRITTEN` were made with: another one's frames may differ."""

WRITTEN = {
    "zarr": "e5411828530f630bb63306ca9c98736ae010091c12b188c43aae1851d50ed0e6",
    "wds": "0dd5f35eeda921c86eb3f7bb9116ee82aa2e40f60946ace50ad74131e2574f55",
    "views": "75f2e46bbec537a8cd17d85a3c0dc8b38d39c969f545c7c2811d717bbe68b860",
    "converted": "0dd5f35eeda921c86eb3f7bb9116ee82aa2e40f60946ace50ad74131e2574f55",
    "fewer bits": "c7e43f761289ec893a42d667ff14879b4a627ed74307a1e4241e57f0d13b9a6b",
    "subset": "72f27b2baaf74b7e57b58e370b00a335903692ebe3bb6ea8a20d058a60f7efa8",
    "more": "6225441578b0ec5a1acc39bd09117e6199c669ca4ff7908a3d4dc39596f0819b",
    "merged": "21d416550c0f2a361fbb699ffc57f84eaae5d3a4cb91ed0662c82d185904c3e2",
}
"""`written` of each dataset."""

HELD = {
    "zarr": "bf9e1b0638c86a0b652e0183effe215c5ae7b0d5d0305d889b9e781ff3bbddc9",
    "wds": "b0ec23aad06f06d5024512b9977422d8d570edccf49869901be8789c27c8d9e7",
    "views": "0d5b8f39c6961c06e95493ff3ea63f5ba08b5b3745454503c7d8e863b67260c4",
    "converted": "b0ec23aad06f06d5024512b9977422d8d570edccf49869901be8789c27c8d9e7",
    "fewer bits": "5993f577c80cebe6661b29868960660654cb4767102e40fb1ca5bf77937baf42",
    "subset": "bbb73b0060393dd0a4bee29ab0fd621e6004824aef0002d6dbca5ddbc6146c57",
    "more": "f340a1623bc60997671b46ece2f00e968db34efa9256ded4508d2bd6120e35bc",
    "merged": "d59dc6dfdc545c3f28fef2822087ded81cb3e9bce1460b3d43c81dd71a91eb77",
}
"""`held` of each dataset."""

CODES = {
    "dct": (
        (
            "0020499244922449926b898848c6e0532ee873898888c8e0c32ee1f793b76149e0344894ff13dba949e054c9866a89a4"
            "48c6c0532cc86b89a448c8e0c32cc1fc87e4484ee0244992"
        ),
        (-879.144, -186.292, -193.8615, -80.5329, -332.3961, -343.3796),
        (188.6935, 64.72828, 75.65974, 18.54399, 71.44215, 76.59031),
        0,
    ),
    "joint": (
        (
            "000000480000000000000000000048000000001000000000004288e0e2fcf4ffe8faf47d3f1f0f078090a4c0f0f8fafc"
            "80aae0c8f0f0fee8faf4fe7d3f1f0f07004290d2e0fdf8ff3e3d3f1e1f1d4f07ffffff7f3f0f0f03beebfeff1f074100"
            "ffffff3f37170301ffffff7f3f1f0f03ff3f3f3f1f0f070f004080d0a2f8f4fff4e8fe7c7f1d1f070090c0a0e8f0fafc"
            "80a8a0c0e8f0daf0fcd2fefd3f3d0f0f004000d260fef0fff2ecfb743e3b1e0feadcfaf5ff3d5f0fe8d5faf47f3d0f0f"
        ),
        (0.5495224, -28.86333, -0.528389),
        (116.925, 145.847, 118.6035),
        7.155508,
    ),
    "joint from 4 bits": (
        (
            "0000000800000000000000400000480000000000000000008000d460f0fef8fff4faf47e3d1f0f0700a8a0e0ecf0fcf4"
            "90a2f0c0faf0fee8fadafc7f3d1f0f07004002f064f5fcff3e3d3f1f1d1f4f07fdf7ff7d3f1f0f03b6fdefff1f074100"
            "ffffff3f2f170301fffdff7f3f1f0f03ff3f3f3f1f0f0f0f00029060e27cf8ffe8f4f8ff3c3f0f0f0088c0a0f8e0faf4"
            "80a8c048f0f0aef8f8e6fcfd7f1d1f07000000d2a8eaf8ffd0fdea793f3e5f0fecb2fcedfd3b2e0fe8a9f6f57e3f0f0f"
        ),
        (0.3072586, -23.69795, 1.029259),
        (116.868, 144.2113, 118.8277),
        7.685017,
    ),
}
"""The codes of train, packed, in hexadecimal; lo; step; the sum of the filter's absolute values."""


def png(pixels: np.ndarray) -> bytes:
    """u8 [H,W,3] -> a PNG file, of less than 64 KiB, whose one block is stored as it is."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": stored + struct.pack(">I", zlib.adler32(rows)),
        b"IEND": b"",
    }
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def picture(seed: int) -> np.ndarray:
    """u8 [16,16,3]: a ramp of its own in each colour, and some noise, in whole numbers."""
    at = np.arange(16)
    slopes = 1 + seed * np.array([3, 5, 7]) % 11
    noise = (seed * 7919 + np.arange(16 * 16 * 3) * 2654435761) % 4294967296 // 16777216 % 32
    ramp = at[:, None, None] * slopes + at[None, :, None] * slopes[::-1]
    return ((ramp + noise.reshape(16, 16, 3) + 9 * seed) % 256).astype(np.uint8)


def make_source(root: Path, splits: dict[str, int], first: int = 0, damaged: bool = False) -> Path:
    for split, count in splits.items():
        for label in range(3):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{first + i}.png").write_bytes(png(picture(first + 100 * label + 2 * i + (split == "val"))))
    if damaged:
        (root / "train" / "class_1" / "1.png").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """``made(name)`` -> a dataset, made once: of the images, or of another dataset."""
    root = tmp_path_factory.mktemp("same")
    images = make_source(root / "images", {"train": 3, "val": 2}, damaged=True)
    more = make_source(root / "more images", {"train": 2}, first=1000)
    pixels = make_codec("resample", factor=1)

    def encode(source: Path, out: Path, **options: object) -> None:
        fixed = {"codec": pixels, "size": 16, "bits": 4, "equal_bits": True, "shard_rows": 4, "out": out}
        fixed["max_error_fraction"] = 0.5
        with contextlib.chdir(root):  # a manifest names the source as it was given
            latentprep.encode(source.name, **fixed | options)

    makers = {
        "zarr": lambda out: encode(images, out),
        "wds": lambda out: encode(images, out, store="wds"),
        "views": lambda out: encode(images, out, views=3, seed=5),
        "converted": lambda out: latentprep.convert(dataset("zarr"), out=out, store="wds"),
        "fewer bits": lambda out: latentprep.requantize(dataset("zarr"), bits=2, equal_bits=True, joint=False, out=out),
        "subset": lambda out: latentprep.subset(
            dataset("zarr"), classes=["class_2", "class_0"], fraction=0.6, seed=3, out=out
        ),
        "more": lambda out: encode(more, out, quantizer=dataset("zarr")),
        "merged": lambda out: latentprep.merge([dataset("zarr"), dataset("more")], out=out),
        "dct": lambda out: encode(images, out, codec=make_codec("dct", luma=4, chroma=1), bits=3),
        "joint": lambda out: encode(images, out, codec=make_codec("resample", factor=2), bits=1, joint=True),
        "halved": lambda out: encode(images, out, codec=make_codec("resample", factor=2)),
        "joint from 4 bits": lambda out: latentprep.requantize(dataset("halved"), bits=1, joint=True, out=out),
    }

    def dataset(name: str) -> Path:
        if not (root / name).exists():
            makers[name](root / name)
        return root / name

    with pytest.MonkeyPatch.context() as patch:  # a manifest names the version that wrote it
        patch.setattr("latentprep.encoding.encode.__version__", "0.1.0")
        patch.setattr("latentprep.derived.requantize.__version__", "0.1.0")
        yield dataset


def written(root: Path) -> str:
    """SHA-256 over the names and bytes of all files but the one that holds times."""
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "source-files.safetensors"):
        total.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def held(root: Path) -> str:
    """SHA-256 over what the dataset says and holds, however it is compressed."""
    dataset = latentprep.open(root)
    settings = json.loads((root / "manifest.json").read_bytes())
    del settings["compression"]
    settings.pop("content_hash")  # hashes are among the bytes of `written`
    total = hashlib.sha256(json.dumps(settings).encode())
    for record in sorted((root / "records").iterdir()):
        facts = json.loads(record.read_bytes())
        del facts["files"], facts["manifest"], facts["sha256"]
        total.update(json.dumps(facts).encode())
    for split in dataset.splits:
        for index in range(dataset.manifest.shard_count(split)):
            shard = dataset.read_shard(split, index)
            total.update(shard.codes.tobytes() + shard.labels.tobytes() + "\0".join(shard.keys).encode())
    return total.hexdigest()


@pytest.mark.parametrize("name", ["zarr", "wds", "views", "converted", "fewer bits", "subset", "more", "merged"])
def test_a_fixed_source_gives_the_same_bytes(made: Callable[[str], Path], name: str) -> None:
    root = made(name)
    assert held(root) == HELD[name]
    if zstd.VERSION_NUMBER != ZSTD:
        pytest.skip(f"its hash was made with zstd {ZSTD}, here is {zstd.VERSION_NUMBER}; what it holds is the same")
    assert written(root) == WRITTEN[name]


@pytest.mark.parametrize("name", ["dct", "joint", "joint from 4 bits"])
def test_codes_from_sums_of_floats_are_the_same_but_for_rounding(made: Callable[[str], Path], name: str) -> None:
    """Where a value lies on the edge between two codes, a CPU may take the one and another CPU the other."""
    dataset = latentprep.open(made(name))
    packed, lo, step, taps = CODES[name]
    quantizer = dataset.quantizer
    assert quantizer.step == pytest.approx(step, rel=1e-4)
    assert np.abs((np.array(quantizer.lo) - lo) / step).max() < 0.02
    assert float(np.abs(quantizer.filter).sum()) == pytest.approx(taps, rel=0.02)
    found = dataset.load("train").codes.ravel()
    wanted = unpack(np.frombuffer(bytes.fromhex(packed), np.uint8), quantizer.bits, found.size)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (found == wanted).mean() >= 0.98


def show() -> None:
    """Print the constants above, as the version makes them that is run."""
    import tempfile

    class Folders:
        def mktemp(self, name: str) -> Path:
            return Path(tempfile.mkdtemp())

    make = next(made.__wrapped__(Folders()))  # type: ignore[attr-defined]
    names = ["zarr", "wds", "views", "converted", "fewer bits", "subset", "more", "merged"]
    print("ZSTD =", zstd.VERSION_NUMBER)
    print("WRITTEN =", {name: written(make(name)) for name in names})
    print("HELD =", {name: held(make(name)) for name in names})
    codes = {}
    for name in ("dct", "joint", "joint from 4 bits"):
        dataset = latentprep.open(make(name))
        q = dataset.quantizer
        taps = float(np.abs(q.filter).sum())
        codes[name] = (pack(dataset.load("train").codes.ravel(), q.bits).tobytes().hex(), q.lo, q.step, taps)
    print("CODES =", codes)


if __name__ == "__main__":
    show()
