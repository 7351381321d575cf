"""The Parquet store: the files themselves, and what the `datasets` library makes of them without code of ours."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import latentprep
from latentprep.errors import DatasetError, SystemFault, UsageError
from latentprep.format import Manifest, Quantizer, open_dataset, parquet_store
from latentprep.format.parquet_store import (
    decode_keys,
    decode_labels,
    decode_shard_files,
    encode_shard_files,
    shard_files,
)
from latentprep.format.thumbnails import ColourMap
from latentprep.format.zarr_store import CANDIDATES
from pictures import make_folder
from quantizers import quantizer_of

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq  # noqa: E402

KEYS = st.text(st.characters(exclude_categories=("Cs",)), max_size=150)
COLOURS = ColourMap((0.5, 0.0, -0.5, 0.1, 0.2, 0.3), (0.0, 0.1, -0.1))


def manifest(rows: int = 7, views: int | dict[str, int] = 2, bits: int = 3, **changes: object) -> Manifest:
    return replace(
        Manifest(
            codec={"name": "resample", "factor": 8},
            quantizer=quantizer_of(bits, -1.0, 0.3),
            transform={"size": 24, "views": views, "seed": 0, "resize": "bicubic"},
            source={"spec": "somewhere", "sha256": "ab" * 32},
            classes=("cat", "dög"),
            latent=(2, 3, 5),
            flip=None,
            shard_rows=9,
            chunk_rows=3,
            compression=CANDIDATES[0],
            splits={"train": rows, "val": 10},
            store="parquet",
        ),
        **changes,
    )


def arrays(m: Manifest, invalid: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rows = m.rows_in_shard("train", 0)
    levels, shape, dtype = m.quantizer.levels, (rows, *m.row_shape("train")), m.quantizer.dtype
    codes = np.random.default_rng(rows).integers(0, levels, shape, dtype=dtype)
    labels = (np.arange(rows) % 2).astype(np.int32)
    codes[list(invalid)], labels[list(invalid)] = 0, -1
    return codes, labels, [f"a/{i}.jpg" for i in range(rows)]


def file_of(m: Manifest, invalid: tuple[int, ...] = ()) -> bytes:
    (data,) = encode_shard_files(m, "train", 0, *arrays(m, invalid)).values()
    return data


def decoded(m: Manifest, data: bytes) -> tuple[np.ndarray, np.ndarray, list[str]]:
    return decode_shard_files(m, "train", 0, {shard_files(m, "train", 0)["codes"]: data})


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    views=st.sampled_from([1, 3, {"train": 2, "val": 1}]),
    bits=st.integers(1, 16),
    keys=st.lists(KEYS, min_size=9, max_size=9),
    invalid=st.sets(st.integers(0, 8)),
    colours=st.sampled_from([None, COLOURS]),
)
def test_files_round_trip(
    rows: int, views: int | dict[str, int], bits: int, keys: list[str], invalid: set[int], colours: ColourMap | None
) -> None:
    m = manifest(rows, views, bits, thumbnail=colours if bits <= 8 else None)
    codes, labels, _ = arrays(m, tuple(i for i in invalid if i < rows))
    files = encode_shard_files(m, "train", 0, codes, labels, keys[:rows])
    assert list(files) == ["data/train-00000-of-00001.parquet"]
    assert files == encode_shard_files(m, "train", 0, codes, labels, keys[:rows])  # deterministic
    found = decode_shard_files(m, "train", 0, files)
    assert found[0].dtype == m.quantizer.dtype and np.array_equal(found[0], codes)
    assert found[1].dtype == np.int32 and np.array_equal(found[1], labels)
    assert found[2] == keys[:rows]
    found[0][:] = 0  # it may be written to
    (data,) = files.values()
    assert np.array_equal(decode_labels(m, "train", 0, data), labels)
    assert decode_keys(m, "train", 0, data) == keys[:rows]


def test_names_say_how_many_shards_there_are() -> None:
    m = manifest()
    assert shard_files(m, "val", 1)["labels"] == "data/val-00001-of-00002.parquet"
    assert Manifest.from_bytes(replace(m, thumbnail=COLOURS).to_bytes()).thumbnail == COLOURS
    with pytest.raises(DatasetError, match="thumbnail"):
        Manifest.from_bytes(replace(m, thumbnail=ColourMap((0.0,) * 3, COLOURS.bias)).to_bytes())
    with pytest.raises(DatasetError, match="thumbnail"):
        Manifest.from_bytes(m.to_bytes().replace(b'"splits"', b'"thumbnail": {"matrix": [], "bias": []},\n "splits"'))


def test_without_pyarrow_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = file_of(manifest())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SystemFault, match=r"pyarrow, which is not installed.*latentprep\[parquet\]"):
        latentprep.encode(make_folder(tmp_path / "images"), codec="dct", size=32, store="parquet", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemFault, match="pyarrow"):
        decoded(manifest(), data)
    with pytest.raises(UsageError, match="store must be zarr or wds or parquet"):
        latentprep.convert(tmp_path, out=tmp_path / "out", store="arrow")


def test_more_codes_than_arrow_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_store, "_MAX_CODES", 100)
    with pytest.raises(DatasetError, match="would hold 420 codes.*smaller shard_rows"):
        file_of(manifest())


# --- hostile bytes ----------------------------------------------------------------------------------------------------


def written(m: Manifest, change: str) -> bytes:
    """The file written anew by pyarrow, with something that we would not write."""
    table = pq.read_table(io.BytesIO(file_of(m)))
    options: dict = {"compression": "zstd", "use_dictionary": False}
    codes = table.column("codes").to_pylist()
    columns = {name: table.column(name) for name in table.column_names}
    if change == "shape":
        codes[3] = codes[3][:1]
    elif change == "null codes":
        codes[3] = None
    elif change == "null inside":
        codes[3][0][0][0][0] = None
    elif change == "wide codes":
        columns["codes"] = pa.array(codes, pa.list_(pa.list_(pa.list_(pa.list_(pa.int64())))))
    elif change == "bytes":
        columns["codes"] = pa.array([bytes(30)] * len(codes))
    elif change == "no key":
        del columns["key"]
    elif change == "null key":
        columns["key"] = pa.array([None] * len(codes), pa.string())
    elif change == "key of numbers":
        columns["key"] = pa.array(range(len(codes)))
    elif change == "large label":
        columns["label"] = pa.array([1 << 40] * len(codes))
    elif change == "valid":
        columns["valid"] = pa.array([False] * len(codes))
    elif change == "groups":
        options["row_group_size"] = 3
    elif change == "snappy":
        options["compression"] = "snappy"
    elif change == "dictionary":
        options["use_dictionary"] = True
    elif change == "newer pages":
        options["data_page_version"] = "2.0"
    if change in ("shape", "null codes", "null inside"):
        columns["codes"] = pa.array(codes, table.schema.field("codes").type)
    made = pa.table(columns)
    if change == "twice":
        made = made.append_column("key", made.column("key"))
    if change == "rows":
        made = pa.concat_tables([made, made])
    sink = io.BytesIO()
    pq.write_table(made, sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        "shape", "null codes", "null inside", "wide codes", "bytes", "no key", "null key", "key of numbers",
        "large label", "valid", "groups", "snappy", "dictionary", "newer pages", "twice", "rows",
    ],
)  # fmt: skip
def test_files_that_we_would_not_write_are_refused(change: str) -> None:
    m = manifest()
    with pytest.raises(DatasetError) as caught:
        decoded(m, written(m, change))
    assert re.fullmatch(r"data/train-00000-of-00001.parquet cannot be decoded \(.*\)", caught.value.message)


def page_header(values: int, size: int, packed: int) -> bytes:
    """The header of a data page in Thrift's compact protocol."""

    def number(value: int) -> bytes:
        value, out = (value << 1) ^ (value >> 63), b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    head = b"\x15" + number(0) + b"\x15" + number(size) + b"\x15" + number(packed)
    return head + b"\x2c\x15" + number(values) + b"\x15\x00\x15\x06\x15\x06\x00\x00"


@pytest.mark.parametrize(
    ("values", "size", "packed", "what"),
    [
        (7, 1 << 31, 10, "not 7 in"),
        (1 << 31, 100, 10, "declare 2147483648 values"),
        (7, 100, 1 << 20, "ends outside"),
        (7, 100, -5, "ends outside"),
        (-7, 100, 10, "of kind 0"),
        (6, 100, 10, "declare 6 values"),
    ],
)
def test_sizes_are_checked_before_anything_is_decompressed(values: int, size: int, packed: int, what: str) -> None:
    good = page_header(7, 100, 10) + bytes(10)
    parquet_store._check_pages(memoryview(good), 7, 1000, 0)
    with pytest.raises(ValueError, match=what):
        parquet_store._check_pages(memoryview(page_header(values, size, packed) + bytes(10)), 7, 1000, 0)
    with pytest.raises(ValueError, match="declare 14 values"):
        parquet_store._check_pages(memoryview(good * 2), 7, 1000, 0)
    for end in range(len(good)):
        with pytest.raises((ValueError, IndexError)):
            parquet_store._check_pages(memoryview(good[:end]), 7, 1000, 0)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([3, 8]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.floats(0, 1, exclude_max=True),
)
def test_damaged_files_are_an_error_or_codes_never_a_crash(bits: int, places: list, keep: float) -> None:
    m = manifest(bits=bits)
    good = file_of(m, (2,))
    data = bytearray(good)
    for place, value in places:
        data[int(place * len(data))] = value
    for damaged in (bytes(data), good[: int(keep * len(good))]):
        try:
            codes, labels, keys = decoded(m, damaged)
            assert codes.shape == (7, 2, 2, 3, 5) and len(labels) == len(keys) == 7
        except DatasetError as error:
            assert "cannot be decoded" in error.message and "\n" not in error.message


# --- the datasets library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images of 2 classes, one of them damaged, in shards of five: with one view, and with three in train."""
    root = tmp_path_factory.mktemp("parquet")
    images = make_folder(root / "images", train=12, val=4)
    (images / "train" / "class_1" / "003.jpg").write_bytes(b"junk")
    for name, views in (("one", 1), ("three", 3)):
        latentprep.encode(
            images, codec="dct", size=32, shard_rows=5, views=views, store="parquet", out=root / name
        )  # fmt: skip
    return root


@pytest.mark.parametrize(("name", "kind"), [("one", "Array3D"), ("three", "Array4D")])
def test_datasets_reads_it_with_no_code_of_ours(root: Path, tmp_path: Path, name: str, kind: str) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    ours = open_dataset(root / name)
    files = {split: str(root / name / f"data/{split}-*.parquet") for split in ("train", "val")}
    by_files = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    by_folder = datasets.load_dataset(str(root / name), cache_dir=str(tmp_path))
    for loaded in (by_files, by_folder):
        assert list(loaded) == ["train", "val"]
        for split, found in loaded.items():
            assert list(found.features) == ["key", "label", "codes", "valid", "hash"]
            assert found.features["label"] == datasets.ClassLabel(names=["class_0", "class_1"])
            assert type(found.features["codes"]).__name__ == kind
            shards = [ours.read_shard(split, i) for i in range(ours.manifest.shard_count(split))]
            codes = np.concatenate([shard.codes for shard in shards])
            rows = found.with_format("numpy")[:]
            assert found.features["codes"].dtype == "uint8"
            assert np.array_equal(np.stack(rows["codes"]), codes[:, 0] if kind == "Array3D" else codes)
            assert rows["label"].tolist() == [label for shard in shards for label in shard.labels.tolist()]
            assert list(rows["key"]) == [key for shard in shards for key in shard.keys]
            assert np.array_equal(rows["valid"], rows["label"] >= 0)


def test_a_dataset_with_a_linear_decoder_gets_thumbnails(root: Path, tmp_path: Path) -> None:
    from PIL import Image

    images = root / "images"
    latentprep.encode(images, codec="resample:factor=4", size=32, shard_rows=5, out=tmp_path / "zarr")
    latentprep.fit_linear_decoder(tmp_path / "zarr", images)
    latentprep.convert(tmp_path / "zarr", out=tmp_path / "parquet", store="parquet")
    dataset = open_dataset(tmp_path / "parquet")
    table = pq.read_table(tmp_path / "parquet" / "data" / "train-00003-of-00005.parquet")
    about = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert about["thumbnail"] == {"_type": "Image"}
    cells = table.column("thumbnail").to_pylist()
    assert [cell is None for cell in cells] == [not valid for valid in table.column("valid").to_pylist()]
    assert None in cells
    shard = dataset.read_shard("train", 3)
    for cell, codes in zip(cells, shard.codes[:, 0], strict=True):
        if cell:
            with Image.open(io.BytesIO(cell["bytes"])) as picture:
                assert (picture.format, picture.size, cell["path"]) == ("WEBP", (48, 48), None)
                small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float32)
            wanted = dataset.quantizer.dequantize(codes).transpose(1, 2, 0)  # this codec's latents are pixels
            assert np.abs(small - wanted).mean() < 20

    assert latentprep.verify(tmp_path / "parquet", deep=True).ok
    path = tmp_path / "parquet" / "data" / "train-00001-of-00005.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:99])
    repaired = latentprep.verify(tmp_path / "parquet", source=images, repair=True)
    assert repaired.ok and repaired.repaired == {"train 1": True} and path.read_bytes() == good
    few = latentprep.subset(tmp_path / "parquet", fraction=0.5, out=tmp_path / "few")
    assert open_dataset(few.out).manifest.thumbnail == dataset.manifest.thumbnail
    latentprep.convert(tmp_path / "parquet", out=tmp_path / "back", store="zarr")
    for file in (tmp_path / "back").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "zarr" / file.relative_to(tmp_path / "back")).read_bytes()

    (tmp_path / "zarr" / "linear-decoder.safetensors").unlink()
    with pytest.raises(DatasetError, match="its thumbnails are not by this linear decoder"):
        latentprep.convert(tmp_path / "zarr", out=tmp_path / "parquet", store="parquet")


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_it_takes_about_as_many_bytes_as_zarr(tmp_path: Path, bits: int) -> None:
    """Of values spread as latents are; of real ones, see docs/format.md."""
    from latentprep.format.manifest import ShardId
    from latentprep.format.shard import Codes, encoded_shard

    values = np.random.default_rng(0).normal(2 ** (bits - 1), 2**bits / 6, (256, 1, 4, 16, 16))
    codes = values.clip(0, 2**bits - 1).astype(np.uint8)
    m = manifest(256, 1, bits, latent=(4, 16, 16), shard_rows=256, chunk_rows=256)
    m = replace(m, quantizer=Quantizer(bits, (0.0,) * 4, (1.0,) * 4))
    sizes, rows = {}, Codes(codes, np.zeros(256, np.int32), [f"{i}" for i in range(256)])
    for store in ("zarr", "parquet"):
        shard = encoded_shard(replace(m, store=store), ShardId("train", 0), rows, source_bytes=0, saturated=[0] * 4)
        sizes[store] = sum(map(len, shard.files.values()))
    assert sizes["parquet"] <= 1.03 * sizes["zarr"]
