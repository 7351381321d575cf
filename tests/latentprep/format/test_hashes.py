"""Content hashes: the same from every store, and no part of what readers without them see."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import latentprep
from fuzz_targets import make_manifest
from latentprep.errors import DatasetError
from latentprep.format import Codes, Manifest, ShardId
from latentprep.format.shard import encoded_shard
from latentprep.format.stores import store_of
from pictures import make_folder

STORES = ["zarr", "wds", "parquet"]


@pytest.mark.parametrize("store", STORES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), seed=st.integers(0, 99), unknown=st.sets(st.integers(0, 3)))
def test_hashes_round_trip(store: str, rows: int, seed: int, unknown: set[int]) -> None:
    m = replace(make_manifest(), store=store, splits={"train": rows})
    functions = store_of(m)
    hashes = np.random.default_rng(seed).integers(0, 256, (rows, 16), np.uint8)
    hashes[[row for row in unknown if row < rows]] = 0
    codes = np.zeros((rows, *m.row_shape("train")), np.uint8)
    samples = Codes(codes, np.zeros(rows, np.int32), list("abcd")[:rows], hashes)
    facts = {"source_bytes": 1, "saturated": (0, 0)}
    shard, again = (encoded_shard(m, ShardId("train", 0), samples, **facts) for _ in range(2))
    assert shard == again
    paths = functions.shard_files(m, "train", 0)
    assert set(shard.files) == set(paths.values())
    found = functions.decode_hashes(m, "train", 0, shard.files[paths["hashes"]])
    assert found.dtype == np.uint8 and np.array_equal(found, hashes)
    without = replace(m, content_hash=None)  # then hashes are left out, and the rest is the same
    old = encoded_shard(without, ShardId("train", 0), samples, **facts)
    if store != "parquet":
        assert old.files == {path: data for path, data in shard.files.items() if path != paths["hashes"]}
    assert store_of(without).decode_shard_files(without, "train", 0, shard.files)[2] == samples.keys
    none = encoded_shard(m, ShardId("train", 0), replace(samples, hashes=None), **facts)
    assert not functions.decode_hashes(m, "train", 0, none.files[paths["hashes"]]).any()


@pytest.mark.parametrize("store", STORES)
def test_encode_hashes_every_image_that_it_can_read(tmp_path: Path, store: str) -> None:
    images = make_folder(tmp_path / "images")
    (images / "train/class_0/003.jpg").write_bytes(b"damaged")
    options = {"codec": "dct", "size": 16, "shard_rows": 5, "store": store, "max_error_fraction": 0.5}
    latentprep.encode(images, out=tmp_path / "data", **options)
    dataset = latentprep.open(tmp_path / "data")
    for split in dataset.splits:
        for index in range(dataset.manifest.shard_count(split)):
            hashes = dataset.read_hashes(split, index)
            assert hashes is not None
            for key, found in zip(dataset.read_keys(split, index), hashes, strict=True):
                wanted = bytes(16) if "class_0/003" in key and split == "train" else sha256(images / key)
                assert found.tobytes() == wanted
    if store == "zarr":
        array = zarr.open_group(tmp_path / "data", mode="r")["train/hashes"]
        assert np.array_equal(array[:5], dataset.read_hashes("train", 0)) and array.shape == (12, 16)


def sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()[:16]


def test_manifests_say_how_files_were_hashed() -> None:
    m = make_manifest()
    assert Manifest.from_bytes(m.to_bytes()) == m and m.content_hash == "sha256-128"
    old = replace(m, content_hash=None)
    assert b"content_hash" not in old.to_bytes() and Manifest.from_bytes(old.to_bytes()) == old
    with pytest.raises(DatasetError, match="content_hash"):
        Manifest.from_bytes(m.to_bytes().replace(b"sha256-128", b"crc32"))


def test_a_dataset_begun_without_hashes_is_resumed_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, options = make_folder(tmp_path / "images"), {"codec": "dct", "size": 16, "shard_rows": 5}
    with monkeypatch.context() as patch:
        patch.setattr("latentprep.encoding.encode.CONTENT_HASH", None)
        latentprep.encode(images, out=tmp_path / "data", **options)
    (tmp_path / "data/records/train-000001.json").unlink()
    before = (tmp_path / "data/train/codes/c/1/0/0/0/0").read_bytes()
    assert latentprep.encode(images, out=tmp_path / "data", **options).encoded == 5
    assert (tmp_path / "data/train/codes/c/1/0/0/0/0").read_bytes() == before
    assert not (tmp_path / "data/train/hashes").exists()
    assert latentprep.verify(tmp_path / "data", deep=True, source=images).hashed is None
    assert latentprep.open(tmp_path / "data").read_hashes("train", 1) is None
