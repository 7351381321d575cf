from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentprep.errors import DatasetError, LatentError, UsageError
from latentprep.format import Codes, LatentDataset, Manifest, Quantizer, ShardId, ShardRecord, open_dataset, zarr_store
from latentprep.format.commit import commit_shard, create_dataset, remove_dataset
from latentprep.format.shard import encoded_shard
from latentprep.format.zarr_store import (
    CANDIDATES,
    choose_compression,
    chunk_rows,
    decode_codes,
    decode_shard_files,
    encode_shard_files,
    shard_files,
)
from latentprep.storage.atomic import locked, write_atomic
from quantizers import quantizer_of

GOLDEN = Path(__file__).parents[2] / "golden"


def manifest(rows: int = 10, shard: int = 4, views: int = 2, compression: int = 0, **changes: object) -> Manifest:
    base = Manifest(
        codec={"name": "resample", "factor": 8},
        quantizer=Quantizer(3, (-1.0, 0.5), (0.25, 0.125)),
        transform={"size": 24, "views": views, "seed": 0, "resize": "bicubic"},
        source={"spec": "somewhere", "sha256": "ab" * 32},
        classes=("cat", "dög"),
        latent=(2, 3, 5),
        flip=(1, -1),
        shard_rows=shard,
        chunk_rows=2,
        compression=CANDIDATES[compression],
        splits={"train": rows, "val": 3},
        written_by="test",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def rows_of(m: Manifest, split: str, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    n = m.rows_in_shard(split, index)
    random = np.random.default_rng([len(split), index])
    codes = random.integers(0, m.quantizer.levels, (n, *m.row_shape("train")), dtype=m.quantizer.dtype)
    labels = random.integers(-1, len(m.classes), n).astype(np.int32)
    return codes, labels, [f"{split}/ä{index}-{i}.jpg" for i in range(n)]


def write(root: Path, m: Manifest) -> LatentDataset:
    root.mkdir(parents=True, exist_ok=True)
    create_dataset(root, m)
    dataset = open_dataset(root)
    for split in m.splits:
        for index in range(m.shard_count(split)):
            rows = Codes(*rows_of(m, split, index))
            commit_shard(root, encoded_shard(m, ShardId(split, index), rows, source_bytes=100, saturated=(0, 1)))
    return dataset


@pytest.fixture
def dataset(tmp_path: Path) -> LatentDataset:
    return write(tmp_path / "data", manifest())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    views=st.integers(1, 3),
    bits=st.integers(1, 16),
    compression=st.integers(0, len(CANDIDATES) - 1),
    keys=st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=9, max_size=9),
)
def test_shard_files_round_trip(n: int, views: int, bits: int, compression: int, keys: list[str]) -> None:
    quantizer = quantizer_of(bits)
    m = manifest(n, 9, views, compression, quantizer=quantizer, chunk_rows=3, splits={"train": n})
    codes = np.random.default_rng(n).integers(0, 2**bits, (n, *m.row_shape("train")), dtype=quantizer.dtype)
    labels = np.arange(-1, n - 1, dtype=np.int32)
    files = encode_shard_files(m, "train", 0, codes, labels, keys[:n])
    assert files == encode_shard_files(m, "train", 0, codes, labels, keys[:n])  # deterministic
    assert files[shard_files(m, "train", 0)["codes"]] == zarr_store._chunk_bytes(
        m, "train", "codes", codes
    )  # Zarr's own
    again = decode_shard_files(m, "train", 0, files)
    assert again[0].dtype == quantizer.dtype and np.array_equal(again[0], codes)
    assert np.array_equal(again[1], labels)
    assert again[2] == keys[:n]


@settings(max_examples=60, deadline=None)
@given(
    compression=st.integers(0, len(CANDIDATES) - 1),
    bits=st.sampled_from([3, 10]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.floats(0, 1),
)
def test_damaged_codes_are_an_error_or_codes_never_a_crash(
    compression: int, bits: int, places: list, keep: float
) -> None:
    m = manifest(9, 9, 2, compression, quantizer=quantizer_of(bits), chunk_rows=3, splits={"train": 7})
    codes = np.random.default_rng(0).integers(0, 4, (7, *m.row_shape("train")), dtype=m.quantizer.dtype)
    files = encode_shard_files(m, "train", 0, codes, np.zeros(7, np.int32), [""] * 7)
    data = bytearray(files[shard_files(m, "train", 0)["codes"]])
    for place, value in places:
        data[int(place * len(data))] = value
    for damaged in (bytes(data), bytes(data[: int(keep * len(data))])):
        try:
            assert decode_codes(m, "train", 0, damaged).shape == codes.shape
        except DatasetError as error:
            assert "cannot be decoded" in error.message


def test_all_zero_codes_are_stored_not_left_out() -> None:
    m = manifest(4)
    files = encode_shard_files(
        m, "train", 0, np.zeros((4, *m.row_shape("train")), np.uint8), np.zeros(4, np.int32), [""] * 4
    )
    assert set(files) == set(shard_files(m, "train", 0).values())
    assert all(files.values())


def test_load_leaves_invalid_rows_out_and_keeps_order(dataset: LatentDataset) -> None:
    m = dataset.manifest
    parts = [rows_of(m, "train", index) for index in range(3)]
    codes = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    loaded = dataset.load("train")
    assert (labels == -1).any()
    assert np.array_equal(loaded.codes, codes[labels != -1])
    assert np.array_equal(loaded.labels, labels[labels != -1])
    keys = [key for part in parts for key in part[2]]
    assert loaded.keys == [key for key, label in zip(keys, labels, strict=True) if label != -1]
    assert len(dataset.load("train", limit=3)) == 3
    assert len(dataset.load("train", limit=999)) == len(loaded)
    for limit in (None, 3):
        without = dataset.load("train", limit, keys=False)
        assert np.array_equal(without.codes, dataset.load("train", limit).codes)
        assert np.array_equal(without.labels, dataset.load("train", limit).labels)
        assert without.keys == []


@pytest.mark.parametrize("bits", [3, 10])
@pytest.mark.parametrize("compression", range(len(CANDIDATES)))
def test_tensorstore_and_zarr_read_what_we_wrote(tmp_path: Path, compression: int, bits: int) -> None:
    dataset = write(tmp_path, manifest(compression=compression, quantizer=quantizer_of(bits)))
    ours = [dataset.read_shard("train", index) for index in range(3)]
    codes, labels = (np.concatenate([getattr(part, name) for part in ours]) for name in ("codes", "labels"))
    for name, expected in (("codes", codes), ("labels", labels)):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "train" / name)}}
        assert np.array_equal(tensorstore.open(spec).result().read().result(), expected)
        assert np.array_equal(zarr.open_array(tmp_path / "train" / name, mode="r")[:], expected)
    keys = zarr.open_array(tmp_path / "train" / "keys", mode="r")[:]
    assert list(keys) == [key for part in ours for key in part.keys]
    group = zarr.open_group(tmp_path, mode="r")
    assert group["train"].attrs["classes"] == ["cat", "dög"]


@pytest.mark.parametrize("name", ["v1", "v1-wds", "v2", "v2-wds", "v2-parquet"])
def test_golden_datasets_still_read(name: str) -> None:
    """Bytes written by the first release of each format version; never made anew."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    version = name.partition("-")[0]
    expected = json.loads((GOLDEN / f"{version}.json").read_text())
    dataset = open_dataset(GOLDEN / name)
    assert f'"version": {version[1]},' in (GOLDEN / name / "manifest.json").read_text()
    assert list(dataset.classes) == expected["classes"]
    for split, rows in expected["splits"].items():
        loaded = dataset.load(split)
        assert loaded.codes.tolist() == rows["codes"]
        assert loaded.codes.dtype == (np.uint8 if version == "v1" else np.uint16)
        assert loaded.labels.tolist() == rows["labels"]
        assert loaded.keys == rows["keys"]
    latents = dataset.quantizer.dequantize(dataset.load("val").codes)
    assert np.allclose(latents, expected["val_latents"], atol=1e-4)
    (invalid,) = [entry for record in dataset.records("train") for entry in record.invalid]
    assert invalid["key"] == expected["invalid_key"]


def test_readers_of_others_read_golden_tokens_of_ten_bits() -> None:
    import webdataset

    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for split, rows in json.loads((GOLDEN / "v2.json").read_text())["splits"].items():
        codes = np.array(rows["codes"])
        group = zarr.open_group(GOLDEN / "v2", mode="r")[split]
        found = group["codes"][:][group["labels"][:] >= 0]
        assert found.dtype == np.uint16 and np.array_equal(found, codes)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(GOLDEN / "v2" / split / "codes")}}
        stored = tensorstore.open(spec).result().read().result()
        assert np.array_equal(stored[group["labels"][:] >= 0], codes)

        tars = sorted(str(path) for path in (GOLDEN / "v2-wds").glob(f"{split}-*.tar"))
        for sample, row in zip(webdataset.WebDataset(tars, shardshuffle=False), codes, strict=True):
            bits = np.unpackbits(np.frombuffer(sample["codes"], np.uint8), bitorder="little")
            first = bits[: 10 * row[0].size].reshape(-1, 10) @ (1 << np.arange(10))
            assert np.array_equal(first.reshape(row[0].shape), row[0])

        tables = [parquet.read_table(path) for path in sorted((GOLDEN / "v2-parquet/data").glob(f"{split}-*.parquet"))]
        read = [row for table in tables for row in table.to_pylist() if row["valid"]]
        kind = tables[0].schema.field("codes").type
        assert "uint16" in str(getattr(kind, "storage_type", kind))  # `datasets`, once imported, has a type of its own
        assert np.array_equal([row["codes"] for row in read], codes)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:9] + bytes([data[9] ^ 4]) + data[10:])


@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
@pytest.mark.parametrize("name", ["codes", "labels", "keys"])
def test_a_damaged_shard_is_named(dataset: LatentDataset, name: str, how: str) -> None:
    damage(dataset.root / shard_files(dataset.manifest, "train", 1)[name], how)
    dataset.read_shard("train", 0)
    with pytest.raises(DatasetError, match=r"shard train 1.*encode again: it makes only that shard"):
        dataset.load("train")


def test_a_changed_manifest_is_not_that_of_the_records(dataset: LatentDataset) -> None:
    text = (dataset.root / "manifest.json").read_text()
    (dataset.root / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DatasetError, match="does not belong to"):
        open_dataset(dataset.root).load("train")


def test_missing_records_make_a_dataset_incomplete(dataset: LatentDataset) -> None:
    (dataset.root / "records" / "train-000002.json").unlink()
    assert len(dataset.records("train")) == 2
    with pytest.raises(DatasetError, match="1 of 3 shards of split 'train' are missing"):
        dataset.load("train")
    assert len(dataset.load("val").labels) <= 3
    with pytest.raises(UsageError, match="no split 'test'"):
        dataset.load("test")


def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DatasetError, match="no latent dataset"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(DatasetError, match="not a latent dataset's manifest"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "latentprep", "version": 3}')
    with pytest.raises(DatasetError, match=r"format version 3; this latentprep reads up to 2.*pip install --upgrade"):
        open_dataset(tmp_path)


def test_manifest_round_trip() -> None:
    m = manifest()
    assert Manifest.from_bytes(m.to_bytes()) == m
    assert Manifest.from_bytes(m.to_bytes()).to_bytes() == m.to_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent", [2, 3]),
        ("latent", [2, 3, 1 << 40]),
        ("latent", [5, 3, 5]),
        ("flip", [1, 2]),
        ("shard_rows", 0),
        ("shard_rows", True),
        ("classes", [1]),
        ("splits", {"../up": 3}),
        ("splits", {"train": -1}),
        ("quantizer", {"bits": 9, "lo": [0, 0], "step": [1, 1]}),
        ("quantizer", {"bits": 3, "lo": [0, 0], "step": [1, 0]}),
        ("quantizer", {"bits": 3, "lo": [0], "step": [1, 1]}),
        ("store", "pickle"),
        ("version", 0),
        ("codec", []),
    ],
)
def test_absurd_manifests_are_refused(field: str, value: object) -> None:
    document = json.loads(manifest().to_bytes())
    document[field] = value
    with pytest.raises(DatasetError):
        Manifest.from_bytes(json.dumps(document).encode())
    del document[field]
    with pytest.raises(DatasetError):
        Manifest.from_bytes(json.dumps(document).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_bytes_crash_the_parsers(data: st.DataObject) -> None:
    """Mutations of good files, and junk: our own errors, or a valid document, and nothing else."""
    good = data.draw(
        st.sampled_from(
            [
                manifest().to_bytes(),
                ShardRecord("train", 0, 4, {}, 1, (0,), "ab" * 32, ({"row": 1, "key": "k", "reason": "r"},)).to_bytes(),
                b"[" * 100_000,
                b'{"a": NaN}',
            ]
        )
    )
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    for parse in (Manifest.from_bytes, ShardRecord.from_bytes):
        try:
            parse(bytes(changed), "file")
        except LatentError as error:
            assert "file" in str(error) or "quantizer" in str(error)


def test_atomic_writes_leave_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    write_atomic(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in target.parent.iterdir()] == ["file"]


def test_a_shard_made_again_is_uncommitted_until_it_is_whole(
    dataset: LatentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, labels, keys = rows_of(dataset.manifest, "train", 1)
    rows = Codes(7 - codes, labels, keys)
    other = encoded_shard(dataset.manifest, ShardId("train", 1), rows, source_bytes=100, saturated=(0, 1))
    real, calls = Path.replace, []

    def crash(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:  # the codes are new, labels and keys still old
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        commit_shard(dataset.root, other)
    assert dataset.record("train", 1) is None


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(DatasetError, match="being written by another"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_remove_dataset_removes_nothing_else(dataset: LatentDataset) -> None:
    (dataset.root / "notes.txt").write_text("mine")
    remove_dataset(dataset.root)
    assert [entry.name for entry in dataset.root.iterdir()] == ["notes.txt"]


def test_chunks_hold_about_a_mebibyte_and_divide_the_shard() -> None:
    for shard_rows, row_bytes in ((1024, 3136), (1000, 4096), (7, 1), (1, 10**8), (997, 5000)):
        rows = chunk_rows(shard_rows, row_bytes)
        assert shard_rows % rows == 0
        assert rows == 1 or rows * row_bytes <= 1 << 20


def test_compression_is_chosen_by_size() -> None:
    random = np.random.default_rng(0)
    few_bits = random.integers(0, 2, (300, 1, 4, 16, 16), dtype=np.uint8)
    assert choose_compression(few_bits)[-1]["name"] == "blosc"  # bit planes of one bit: an eighth
    channels = np.stack([random.integers(60 * c, 60 * c + 20, (300, 1, 16, 16)) for c in range(4)], axis=2)
    assert choose_compression(channels.astype(np.uint8))[0]["name"] == "transpose"  # each channel its own statistics
