"""Datasets made of others' codes: convert, subset, merge. (requantize has its own file.)"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import latentprep
from latentprep.derived import derive as derived
from latentprep.encoding import driver
from latentprep.errors import DatasetError, UsageError
from latentprep.format import Codes, EncodedShard, LatentDataset, Manifest, ShardId
from pictures import make_folder


def digest(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def encode(images: Path, out: Path, **options: object) -> LatentDataset:
    latentprep.encode(images, **{"codec": "dct", "size": 32, "shard_rows": 5, "out": out, **options})
    return latentprep.open(out)


def same_samples(a: LatentDataset, b: LatentDataset) -> bool:
    """All rows of all splits, invalid ones included, are equal."""
    assert a.splits == b.splits
    for split in a.splits:
        for index in range(a.manifest.shard_count(split)):
            ours, theirs = a.read_shard(split, index), b.read_shard(split, index)
            assert np.array_equal(ours.codes, theirs.codes)
            assert np.array_equal(ours.labels, theirs.labels)
            assert ours.keys == theirs.keys
            assert a.committed(split, index).invalid == b.committed(split, index).invalid
    return True


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 8 images of 2 classes, of which one does not decode, with three views in shards of five, in each store."""
    root = tmp_path_factory.mktemp("derived")
    images = make_folder(root / "images", train=12, val=4)
    (images / "train" / "class_1" / "003.jpg").write_bytes(b"junk")
    encode(images, root / "zarr", views=3)
    for store in ("wds", "parquet"):
        encode(images, root / store, views=3, store=store)
    return root


@pytest.mark.parametrize("first", ["zarr", "wds", "parquet"])
@pytest.mark.parametrize("second", ["zarr", "wds", "parquet"])
def test_there_and_back_gives_the_same_bytes(root: Path, tmp_path: Path, first: str, second: str) -> None:
    there = latentprep.convert(root / first, out=tmp_path / second, store=second)
    assert there.encoded == 32
    assert digest(tmp_path / second) == digest(root / second)  # nor does it matter which way it was encoded
    latentprep.convert(tmp_path / second, out=tmp_path / "back" / first, store=first)
    assert digest(tmp_path / "back" / first) == digest(root / first)
    assert latentprep.verify(tmp_path / second, deep=True).ok
    assert same_samples(latentprep.open(root / first), latentprep.open(root / second))
    for split in ("train", "val"):
        ours, theirs = (latentprep.open(root / store).load(split) for store in ("zarr", second))
        assert np.array_equal(ours.codes, theirs.codes) and ours.keys == theirs.keys
        assert np.array_equal(ours.labels, theirs.labels)
        rows = latentprep.open(root / second).valid_rows(split)
        assert np.array_equal(rows, latentprep.open(root / "zarr").valid_rows(split))


@pytest.mark.parametrize(
    ("store", "file"), [("wds", "train-000001.tar"), ("parquet", "data/train-00001-of-00005.parquet")]
)
def test_an_encode_to_another_store_resumes_and_is_replaced(root: Path, tmp_path: Path, store: str, file: str) -> None:
    out = tmp_path / "out"
    encode(root / "images", out, views=3, store=store)
    (out / file).unlink()
    (out / "records" / "val-000000.json").unlink()
    assert latentprep.encode(
        root / "images", codec="dct", size=32, shard_rows=5, out=out, views=3, store=store
    ).encoded == 10  # fmt: skip
    assert digest(out) == digest(root / store)
    with pytest.raises(DatasetError, match=f"store is {store}, but zarr was requested"):
        encode(root / "images", out, views=3)
    encode(root / "images", out, views=3, overwrite=True)
    assert digest(out) == digest(root / "zarr")
    with pytest.raises(UsageError, match="store must be zarr or wds or parquet, got tar"):
        encode(root / "images", out, store="tar")


def test_a_conversion_resumes(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    latentprep.convert(root / "zarr", out=out, store="wds")
    (out / "records" / "train-000001.json").unlink()
    (out / "train-000002.tar").unlink()
    assert latentprep.convert(root / "zarr", out=out, store="wds").encoded == 10
    assert digest(out) == digest(root / "wds")
    encode(root / "images", tmp_path / "other", bits=3)
    with pytest.raises(DatasetError, match="has different settings: bits is 4, but 3 was requested"):
        latentprep.convert(tmp_path / "other", out=out, store="wds")
    with pytest.raises(UsageError, match="is the dataset itself"):
        latentprep.convert(out, out=out, store="zarr")
    with pytest.raises(UsageError, match="store must be zarr or wds"):
        latentprep.convert(out, out=tmp_path / "x", store="webdataset")


def test_a_shard_that_decodes_otherwise_is_not_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = derived.encoded_shard

    def other(manifest: Manifest, shard: ShardId, rows: Codes, **facts: object) -> EncodedShard:
        return real(manifest, shard, Codes(rows.codes ^ 1, rows.labels, rows.keys), **facts)

    monkeypatch.setattr(derived, "encoded_shard", other)
    with pytest.raises(DatasetError, match="does not decode to the codes"):
        latentprep.convert(root / "zarr", out=tmp_path / "out", store="wds")
    assert not list((tmp_path / "out").rglob("records/*"))


def test_a_file_that_reads_back_otherwise_is_not_kept_quiet(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = driver.commit_shard

    def other(target: Path, shard: EncodedShard) -> object:
        changed = {path: data.replace(b"ustar", b"Ustar") for path, data in shard.files.items()}
        return real(target, replace(shard, files=changed))

    monkeypatch.setattr(driver, "commit_shard", other)
    with pytest.raises(DatasetError, match="was altered"):
        latentprep.convert(root / "zarr", out=tmp_path / "out", store="wds")


def test_requantize_keeps_the_store(root: Path, tmp_path: Path) -> None:
    few = [latentprep.requantize(root / store, bits=2, out=tmp_path / store).out for store in ("zarr", "wds")]
    ours, theirs = map(latentprep.open, few)
    assert (ours.manifest.store, theirs.manifest.store) == ("zarr", "wds")
    assert same_samples(ours, theirs)


@pytest.mark.parametrize("store", ["zarr", "wds", "parquet"])
def test_a_subset_is_some_samples_as_they_were(root: Path, tmp_path: Path, store: str) -> None:
    source = latentprep.open(root / store).load("train")
    latentprep.subset(root / store, out=tmp_path / "half", fraction=0.5, seed=3)
    latentprep.subset(root / store, out=tmp_path / "quarter", fraction=0.25, seed=3)
    half, quarter = (latentprep.open(tmp_path / name) for name in ("half", "quarter"))
    found = half.load("train")
    assert len(found) == half.manifest.splits["train"] == 12
    assert np.bincount(found.labels).tolist() == [6, 6]
    assert set(quarter.load("train").keys) < set(found.keys)
    assert found.keys == [key for key in source.keys if key in set(found.keys)]  # in their order
    places = [source.keys.index(key) for key in found.keys]
    assert np.array_equal(found.codes, source.codes[places])
    assert np.array_equal(found.labels, source.labels[places])
    assert half.quantizer == latentprep.open(root / store).quantizer
    latentprep.subset(root / store, out=tmp_path / "again", fraction=0.5, seed=3)
    assert digest(tmp_path / "again") == digest(tmp_path / "half")
    latentprep.subset(root / store, out=tmp_path / "other", fraction=0.5, seed=4)
    assert latentprep.open(tmp_path / "other").load("train").keys != found.keys


def test_a_subset_of_classes_numbers_them_anew(root: Path, tmp_path: Path) -> None:
    latentprep.subset(root / "zarr", out=tmp_path / "one", classes=["class_1"])
    one, source = latentprep.open(tmp_path / "one"), latentprep.open(root / "zarr").load("train")
    assert one.classes == ("class_1",)
    found = one.load("train")
    assert found.labels.tolist() == [0] * 11  # the twelfth could not be read
    assert np.array_equal(found.codes, source.codes[source.labels == 1])
    assert not one.records("train")[0].invalid
    with pytest.raises(UsageError, match="no class 'class_7'.*did you mean class_"):
        latentprep.subset(root / "zarr", out=tmp_path / "x", classes=["class_7"])
    with pytest.raises(UsageError, match="fraction must be a number above 0"):
        latentprep.subset(root / "zarr", out=tmp_path / "x", fraction=0)


@pytest.mark.parametrize("store", ["zarr", "wds", "parquet"])
def test_splits_encoded_apart_merge_to_the_encode_of_all(root: Path, tmp_path: Path, store: str) -> None:
    train = encode(root / "images", tmp_path / "train", views=3, store=store, splits=["train"])
    val = encode(root / "images", tmp_path / "val", splits=["val"], store=store, quantizer=train.root)
    latentprep.merge([train, val], out=tmp_path / "both")
    both, whole = latentprep.open(tmp_path / "both"), latentprep.open(root / store)
    assert same_samples(both, whole)
    assert both.manifest.transform == whole.manifest.transform
    assert [r.files for s in both.splits for r in both.records(s)] == [
        r.files for s in both.splits for r in whole.records(s)
    ]


def test_rows_of_one_split_follow_each_other(root: Path, tmp_path: Path) -> None:
    a = encode(make_folder(tmp_path / "ia", train=4, val=2), tmp_path / "a")
    images = make_folder(tmp_path / "ib", train=7, val=1)
    for path in sorted(images.rglob("*.jpg")):
        path.rename(path.with_name(f"more-{path.name}"))
    (images / "train" / "class_0" / "more-002.jpg").write_bytes(b"junk")
    b = encode(images, tmp_path / "b", quantizer=a.root, shard_rows=3)
    result = latentprep.merge([a, b], out=tmp_path / "ab")
    ab = latentprep.open(tmp_path / "ab")
    assert (result.rows, ab.manifest.shard_rows) == ({"train": 22, "val": 6}, 5)
    ours, first, second = (dataset.load("train") for dataset in (ab, a, b))
    assert np.array_equal(ours.codes, np.concatenate([first.codes, second.codes]))
    assert ours.labels.tolist() == first.labels.tolist() + second.labels.tolist()
    assert ours.keys == first.keys + second.keys
    (line,) = (tmp_path / "ab" / "errors.jsonl").read_text().splitlines()
    assert (json.loads(line)["row"], json.loads(line)["key"]) == (8 + 2, "train/class_0/more-002.jpg")
    sizes = [sum(r.source_bytes for r in dataset.records("train")) for dataset in (ab, a, b)]
    assert sizes[0] == pytest.approx(sizes[1] + sizes[2], abs=20)
    with pytest.raises(DatasetError, match="two of the parts hold the sample train/class_0/000.jpg of split 'train'"):
        latentprep.merge([a, a], out=tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"splits": ["val"]}, r"quantizer.lo is .* quantizer"),
        ({"bits": 3}, " bits is 3 in the first and 4 in the second"),
        ({"codec": "resample:factor=4"}, "codec.name is resample in the first and dct"),
        ({"size": 48}, "latent is"),
        ({"views": 2}, "views.train is 2 in the first and 3 in the second"),
        ({"seed": 1}, "transform.seed is 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(root: Path, tmp_path: Path, options: dict, what: str) -> None:
    part = encode(root / "images", tmp_path / "part", **{"views": 3, **options})
    with pytest.raises(DatasetError, match=what):
        latentprep.merge([root / "zarr", part], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantizer_of_other_latents_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not fit: bits is 4 there, but 2 was requested"):
        encode(root / "images", tmp_path / "out", bits=2, quantizer=root / "zarr")
    encode(root / "images", tmp_path / "out", splits=["val"], quantizer=root / "zarr")
    encode(root / "images", tmp_path / "val", splits=["val"])
    with pytest.raises(DatasetError, match=r"its quantizer was fitted to other codes"):
        encode(root / "images", tmp_path / "out", splits=["val"], quantizer=tmp_path / "val")


def test_merge_takes_two_or_more(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two or more datasets"):
        latentprep.merge([root / "zarr"], out=tmp_path / "x")


def test_the_command_line_converts_selects_and_merges(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from latentprep.cli.commands import main

    for stream in ("stdout", "stderr"):  # which a program changes for good
        monkeypatch.setattr(sys, stream, getattr(sys, stream))

    def run(*arguments: object) -> dict:
        monkeypatch.setattr("sys.argv", ["latentprep", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (None, 0, 3)  # 3: one of the images cannot be read
        return json.loads(capfd.readouterr().out)

    assert run("convert", root / "zarr", tmp_path / "wds", "--store", "wds")["rows"] == {"train": 24, "val": 8}
    assert digest(tmp_path / "wds") == digest(root / "wds")
    for name in ("class_0", "class_1"):
        options = ("--classes", name, "--fraction", "0.5", "--seed", 1, "--out", tmp_path / name)
        assert run("subset", root / "zarr", *options)["classes"] == [name]
    options = ("--codec", "dct", "--size", 32, "--splits", "val", "--store", "wds", "--quantizer", root / "wds")
    run("encode", root / "images", *options, "--out", tmp_path / "val")
    run("encode", root / "images", *options, "--splits", "train", "--out", tmp_path / "train")
    assert run("merge", tmp_path / "val", tmp_path / "train", "--out", tmp_path / "both")["invalid"] == 1
    assert latentprep.open(tmp_path / "both").splits == ("val", "train")
    assert run("info", tmp_path / "both")["compression"] == "bit-packed"
