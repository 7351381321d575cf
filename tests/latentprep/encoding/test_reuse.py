"""`encode(reuse=)`: codes of unchanged images are taken over, byte for byte; the codec encodes the others alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import latentprep
from inprocess import command
from latentprep.codecs import make_codec
from latentprep.encoding.reuse import Reuse
from latentprep.errors import DatasetError, UsageError
from pictures import jpeg, make_folder, picture

OPTIONS = {"bits": 3, "size": 32, "shard_rows": 8}


class Counting:
    """The codec ``dct``, which counts the images that it encodes."""

    def __init__(self) -> None:
        self.inner, self.images = make_codec("dct"), 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def encode(self, images):
        self.images += len(images)
        return self.inner.encode(images)


def files(root: Path) -> dict[str, bytes]:
    """The dataset's files, but for the records' counts of saturated latents, which are shares, and the files' times."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "source-files.safetensors"):
        data = path.read_bytes()
        if path.parent.name == "records":
            facts = json.loads(data)
            del facts["saturated"], facts["sha256"]
            data = json.dumps(facts).encode()
        found[path.relative_to(root).as_posix()] = data
    return found


def new(path: Path, seed: int) -> None:
    path.write_bytes(jpeg(picture(seed)))


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """`images`, of which `old` was made; then 5 of 60 were replaced, 3 added and 2 removed."""
    images = make_folder(tmp_path / "images", train=20, val=10)
    latentprep.encode(images, codec="dct", out=tmp_path / "old", **OPTIONS)
    for i in range(4):
        new(images / "train/class_0" / f"{4 * i:03}.jpg", 9000 + i)
    new(images / "val/class_1/003.jpg", 9100)
    for i, name in enumerate(["000a", "010a", "zzz"]):
        new(images / "train/class_1" / f"{name}.jpg", 9200 + i)
    (images / "train/class_0/001.jpg").unlink()
    (images / "val/class_0/009.jpg").unlink()
    return images


@pytest.mark.parametrize("store", ["zarr", "wds", "parquet"])
def test_only_new_and_changed_images_go_through_the_codec(changed: Path, tmp_path: Path, store: str) -> None:
    if store == "parquet":
        pytest.importorskip("pyarrow")
    codec = Counting()
    made = latentprep.encode(changed, codec=codec, reuse=tmp_path / "old", out=tmp_path / "new", store=store, **OPTIONS)
    assert codec.images == 8
    assert (made.encoded, made.reused) == (61, 53)
    fresh = {"codec": "dct", "quantizer": tmp_path / "old", "store": store, **OPTIONS}
    assert latentprep.encode(changed, out=tmp_path / "fresh", **fresh).reused == 0
    assert files(tmp_path / "new") == files(tmp_path / "fresh")
    assert latentprep.verify(tmp_path / "new", deep=True, source=changed).ok


def test_counts_of_saturated_latents_are_exact_where_whole_shards_are_reused(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    latentprep.encode(images, codec="dct", out=tmp_path / "old", **OPTIONS)
    codec = Counting()
    latentprep.encode(images, codec=codec, reuse=tmp_path / "old", out=tmp_path / "new", **OPTIONS)
    assert codec.images == 0
    for record in (tmp_path / "old/records").iterdir():
        assert (tmp_path / "new/records" / record.name).read_bytes() == record.read_bytes()


def test_the_command_says_how_many_were_reused(changed: Path, tmp_path: Path) -> None:
    flags = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", value)]
    arguments = [changed, "--codec", "dct", *flags, "--reuse", tmp_path / "old", "--out", tmp_path / "new"]
    shown = command("latentprep", "encode", *arguments)
    assert "53 of 61 images; the codec encoded the others" in " ".join(shown.stdout.split())


def test_processes_reuse_too(changed: Path, tmp_path: Path) -> None:
    made = {}
    for name, devices in (("one", None), ("two", "cpu:2")):
        made[name] = latentprep.encode(
            changed, codec="dct", reuse=tmp_path / "old", devices=devices, out=tmp_path / name, **OPTIONS
        )
    assert made["one"].reused == made["two"].reused == 53
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_image_that_moved_keeps_view_0_but_its_further_views_are_drawn_by_its_key(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    latentprep.encode(images, codec="dct", out=tmp_path / "one", **OPTIONS)
    latentprep.encode(images, codec="dct", out=tmp_path / "two", views=2, **OPTIONS)
    (images / "train/class_0/000.jpg").rename(images / "train/class_0/renamed.jpg")
    (images / "val/class_0/000.jpg").rename(images / "val/class_0/renamed.jpg")
    cases = {  # of 12 train images in how many views, and 6 val images in one, those that the codec encodes
        "one": ({}, 0),
        "two": ({"views": 2}, 2),  # the two views of the image with a new key
        "seed": ({"views": 2, "seed": 1}, 24),
    }
    for name, (options, images_encoded) in cases.items():
        codec, old = Counting(), tmp_path / ("one" if name == "one" else "two")
        latentprep.encode(images, codec=codec, reuse=old, out=tmp_path / f"{name} new", **OPTIONS | options)
        assert codec.images == images_encoded
        latentprep.encode(images, codec="dct", quantizer=old, out=tmp_path / f"{name} fresh", **OPTIONS | options)
        assert files(tmp_path / f"{name} new") == files(tmp_path / f"{name} fresh")
    codec = Counting()  # view 0 of a dataset of two views is enough for one of one
    latentprep.encode(images, codec=codec, reuse=tmp_path / "two", out=tmp_path / "fewer", **OPTIONS)
    assert codec.images == 0
    shards = [latentprep.open(tmp_path / name).load("train") for name in ("fewer", "two new")]
    assert np.array_equal(shards[0].codes, shards[1].codes[:, :1])


def test_images_that_could_not_be_read_are_tried_again(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    good = (images / "train/class_0/002.jpg").read_bytes()
    (images / "train/class_0/002.jpg").write_bytes(b"damaged")
    latentprep.encode(images, codec="dct", out=tmp_path / "old", max_error_fraction=0.5, **OPTIONS)
    (images / "train/class_0/002.jpg").write_bytes(good)
    made = latentprep.encode(images, codec="dct", reuse=tmp_path / "old", out=tmp_path / "new", **OPTIONS)
    assert (made.invalid, made.encoded - made.reused) == (0, 1)


def test_what_cannot_be_reused_is_refused(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    old, out = tmp_path / "old", tmp_path / "new"
    latentprep.encode(images, codec="dct", out=old, **OPTIONS)
    with pytest.raises(DatasetError, match=r"bits is 3 there, but 4 was requested.*leave out reuse"):
        latentprep.encode(images, codec="dct", out=out, reuse=old, **OPTIONS | {"bits": 4})
    with pytest.raises(UsageError, match="quantizer has no effect"):
        latentprep.encode(images, codec="dct", out=out, reuse=old, quantizer=old, **OPTIONS)
    with pytest.raises(UsageError, match="is the dataset to write"):
        latentprep.encode(images, codec="dct", out=old, reuse=old, **OPTIONS)
    golden = latentprep.open(Path(__file__).parents[2] / "golden/v1")
    with pytest.raises(DatasetError, match="has no content hashes"):
        Reuse(golden, golden.manifest)
