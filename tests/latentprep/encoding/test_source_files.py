"""Pictures that were replaced, added or removed since a dataset was made of them."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import latentprep
from latentprep.encoding.source_files import from_bytes, read_stats, to_bytes
from latentprep.errors import DatasetError
from latentprep.format.manifest import SOURCE_FILES
from pictures import make_folder

OPTIONS = {"codec": "dct", "size": 64, "shard_rows": 4}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", train=8, val=4)


def packed(images: Path, tar: Path) -> Path:
    if tar.suffix == ".zip":
        shutil.make_archive(str(tar.with_suffix("")), "zip", images.parent, images.name)
        return tar
    with tarfile.open(tar, "w:gz" if tar.suffix == ".tgz" else "w") as file:
        file.add(images, "images")
    return tar


def replaced(images: Path) -> str:
    """Puts another picture of the same size in pixels under an old name; returns its key."""
    file = images / "train" / "class_1" / "003.jpg"
    assert file.is_file()
    file.write_bytes((images / "val" / "class_0" / "001.jpg").read_bytes() + b"longer")
    return "train/class_1/003.jpg"


@pytest.mark.parametrize("kind", ["folder", "tar", "tgz", "zip"])
def test_a_replaced_picture_is_named(images: Path, tmp_path: Path, kind: str) -> None:
    source = images if kind == "folder" else packed(images, tmp_path / f"images.{kind}")
    latentprep.encode(source, **OPTIONS, out=tmp_path / "out")
    assert latentprep.encode(source, **OPTIONS, out=tmp_path / "out").note == ""
    key = replaced(images)
    if kind != "folder":
        packed(images, source)
    with pytest.raises(DatasetError, match=f"1 of 24 images .* since .*out was made: {key}; .*overwrite"):
        latentprep.encode(source, **OPTIONS, out=tmp_path / "out")
    result = latentprep.encode(source, **OPTIONS, out=tmp_path / "out", overwrite=True)
    assert result.encoded == 24
    assert latentprep.encode(source, **OPTIONS, out=tmp_path / "out").encoded == 0


def test_a_picture_of_the_same_size_at_another_time_is_replaced(images: Path, tmp_path: Path) -> None:
    latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    os.utime(images / "train" / "class_0" / "000.jpg", ns=(1, 1))
    with pytest.raises(DatasetError, match=r"1 of 24 images .*: train/class_0/000.jpg; .*delete .*source-files"):
        latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    (tmp_path / "out" / SOURCE_FILES).unlink()
    for _ in range(2):  # it is written anew
        result = latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
        assert (result.encoded, result.note) == (0, "")
    assert read_stats(tmp_path / "out")["train"][1, 0] == 1


def test_a_copy_of_the_source_is_said_and_taken(images: Path, tmp_path: Path) -> None:
    latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copy)
    result = latentprep.encode(tmp_path / "copy", **OPTIONS, out=tmp_path / "out")
    assert result.encoded == 0
    assert "all 24 images have new times" in result.note
    assert result.note.isprintable()
    assert latentprep.encode(tmp_path / "copy", **OPTIONS, out=tmp_path / "out").note == ""


def test_what_is_still_to_be_encoded_may_change(images: Path, tmp_path: Path) -> None:
    bad = images / "train" / "class_0" / "001.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"junk")
    latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    bad.write_bytes(good)  # mended
    (tmp_path / "out" / "records" / "train-000002.json").unlink()  # as if it had not come so far
    replaced(images)
    result = latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    assert (result.encoded, result.invalid) == (8, 0)
    assert latentprep.encode(images, **OPTIONS, out=tmp_path / "out").encoded == 0


def test_added_and_removed_pictures_are_named(images: Path, tmp_path: Path) -> None:
    latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    new = images / "train" / "class_0" / "new.jpg"
    shutil.copy(images / "train" / "class_0" / "000.jpg", new)
    with pytest.raises(DatasetError, match=r"has changed: 1 added to train \(train/class_0/new.jpg\); to resume"):
        latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    for name in ("002", "003"):
        (images / "val" / "class_1" / f"{name}.jpg").unlink()
    words = r"1 added to train \(.*\), 2 removed from val \(val/class_1/002.jpg, val/class_1/003.jpg\)"
    with pytest.raises(DatasetError, match=words):
        latentprep.encode(images, **OPTIONS, out=tmp_path / "out")


def test_shards_are_the_same_whatever_the_files_times(images: Path, tmp_path: Path) -> None:
    tar = packed(images, tmp_path / "images.tar")
    for source, out in ((images, "a"), (tar, "b")):
        latentprep.encode(source, **OPTIONS, out=tmp_path / out)
    a, b = (
        {
            str(path.relative_to(tmp_path / out)): path.read_bytes()
            for path in (tmp_path / out).rglob("*")
            if path.is_file() and path.name not in (SOURCE_FILES, "manifest.json") and "records" not in path.parts
        }
        for out in "ab"
    )
    assert a == b


def test_the_file_is_small_optional_and_goes_along(images: Path, tmp_path: Path) -> None:
    latentprep.encode(images, **OPTIONS, out=tmp_path / "out")
    latentprep.convert(tmp_path / "out", out=tmp_path / "tars", store="wds")
    kept = (tmp_path / "out" / SOURCE_FILES).read_bytes()
    assert (tmp_path / "tars" / SOURCE_FILES).read_bytes() == kept
    assert len(kept) < 16 * 24 + 400
    (tmp_path / "out" / SOURCE_FILES).unlink()
    assert latentprep.verify(tmp_path / "out").ok
    latentprep.encode("shapes", **OPTIONS, limit=8, out=tmp_path / "shapes")
    assert not (tmp_path / "shapes" / SOURCE_FILES).exists()
    (tmp_path / "tars" / SOURCE_FILES).write_bytes(kept[:-1] + b"x")
    assert [p.what for p in latentprep.verify(tmp_path / "tars").problems] == [
        f"{tmp_path / 'tars' / SOURCE_FILES} is damaged"
    ]


@given(st.dictionaries(st.sampled_from(["train", "val", "test"]), st.lists(st.tuples(*[st.integers(-1, 2**62)] * 2))))
@settings(max_examples=30)
def test_what_is_written_is_read(rows: dict[str, list[tuple[int, int]]]) -> None:
    stats = {split: np.array(found, np.int64).reshape(-1, 2).T.copy() for split, found in rows.items()}
    back = from_bytes(to_bytes(stats))
    assert back.keys() == stats.keys()
    assert all(np.array_equal(back[split], stats[split]) for split in stats)
