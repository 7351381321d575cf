"""The WebDataset store: the tars themselves. What both stores share is tested in test_format and test_derived."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprep.errors import DatasetError
from latentprep.format import Manifest
from latentprep.format.packing import pack, packed_bytes, unpack
from latentprep.format.quantizer import code_dtype
from latentprep.format.wds_store import (
    decode_labels,
    decode_shard_files,
    encode_shard_files,
    quote_key,
    shard_files,
    unquote_key,
)
from latentprep.format.zarr_store import CANDIDATES
from quantizers import quantizer_of

GOLDEN = Path(__file__).parents[2] / "golden"
KEYS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=150)


def manifest(rows: int = 7, views: int = 2, bits: int = 3) -> Manifest:
    return Manifest(
        codec={"name": "resample", "factor": 8},
        quantizer=quantizer_of(bits),
        transform={"size": 24, "views": views, "seed": 0, "resize": "bicubic"},
        source={"spec": "somewhere", "sha256": "ab" * 32},
        classes=("cat", "dog"),
        latent=(2, 3, 5),
        flip=None,
        shard_rows=9,
        chunk_rows=3,
        compression=CANDIDATES[0],
        splits={"train": rows},
        store="wds",
    )


def arrays(m: Manifest, invalid: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    rows = m.rows_in_shard("train", 0)
    levels, shape, dtype = m.quantizer.levels, (rows, *m.row_shape("train")), m.quantizer.dtype
    codes = np.random.default_rng(rows).integers(0, levels, shape, dtype=dtype)
    labels = (np.arange(rows) % 2).astype(np.int32)
    codes[list(invalid)], labels[list(invalid)] = 0, -1
    return codes, labels


def tar_of(m: Manifest, invalid: tuple[int, ...] = (), keys: list[str] | None = None) -> bytes:
    codes, labels = arrays(m, invalid)
    (data,) = encode_shard_files(
        m, "train", 0, codes, labels, keys or [f"a/{i}.jpg" for i in range(len(codes))]
    ).values()
    return data


def decoded(m: Manifest, data: bytes) -> tuple[np.ndarray, np.ndarray, list[str]]:
    return decode_shard_files(m, "train", 0, {shard_files(m, "train", 0)["codes"]: data})


@given(st.integers(1, 16), st.integers(1, 30), st.integers(0, 5))
def test_packing_is_unpackings_inverse_and_the_bits_in_a_row(bits: int, count: int, rows: int) -> None:
    codes = np.random.default_rng(count).integers(0, 2**bits, (rows, count), dtype=code_dtype(bits))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(count, bits))
    found = unpack(packed, bits, count)
    assert found.dtype == codes.dtype and np.array_equal(found, codes)
    of_each = codes[..., None].view(np.uint8)
    stream = np.unpackbits(of_each, axis=-1, count=bits, bitorder="little").reshape(rows, count * bits)
    expected = np.packbits(stream, axis=-1, bitorder="little")
    assert np.array_equal(packed[:, : expected.shape[1]], expected)
    assert not packed[:, expected.shape[1] :].any()


@given(KEYS)
def test_any_key_survives_webdatasets_names(key: str) -> None:
    name = quote_key(key)
    assert unquote_key(name) == key
    assert not set(name) & set(". \\") and not name.startswith("/")
    assert webdataset.tariterators.base_plus_ext(f"{name}.1.codes") == (name, "1.codes")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    views=st.integers(1, 3),
    bits=st.integers(1, 16),
    keys=st.lists(KEYS, min_size=9, max_size=9, unique=True),
    invalid=st.sets(st.integers(0, 8)),
)
def test_tars_round_trip(rows: int, views: int, bits: int, keys: list[str], invalid: set[int]) -> None:
    m, bad = manifest(rows, views, bits), tuple(i for i in invalid if i < rows)
    codes, labels = arrays(m, bad)
    data = tar_of(m, bad, keys[:rows])
    assert data == tar_of(m, bad, keys[:rows])  # deterministic
    found = decoded(m, data)
    assert np.array_equal(found[0], codes)
    assert np.array_equal(found[1], labels)
    assert found[2] == keys[:rows]
    assert np.array_equal(decode_labels(m, "train", 0, data), labels)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # an ordinary tar, of files that nobody owns
        members = tar.getmembers()
    assert len(members) == (rows - len(bad)) * (views + 1) + len(bad)
    assert {(i.type, i.mode, i.mtime, i.uid, i.gid, i.uname, i.gname) for i in members} == {
        (tarfile.REGTYPE, 0o644, 0, 0, 0, "", "")
    }


def test_webdataset_passes_over_rows_that_could_not_be_read(tmp_path: Path) -> None:
    m = manifest()
    codes, labels = arrays(m, (0, 3))
    path = tmp_path / "train-000000.tar"
    keys = [f"train/ä b.{i}/x y.jpg" for i in range(7)]
    path.write_bytes(tar_of(m, (0, 3), keys))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [unquote_key(sample["__key__"]) for sample in samples] == [keys[i] for i in (1, 2, 4, 5, 6)]
    for sample, row in zip(samples, (1, 2, 4, 5, 6), strict=True):
        assert {"codes", "1.codes", "cls"} <= sample.keys()
        assert int(sample["cls"]) == labels[row]
        for view, name in enumerate(("codes", "1.codes")):
            found = unpack(np.frombuffer(sample[name], np.uint8), 3, 30)
            assert np.array_equal(found, codes[row, view].ravel())


@pytest.mark.parametrize(
    ("keys", "what"), [(["a", "b", "a"], "two samples have the key 'a'"), (["a", "", "b"], "empty key")]
)
def test_keys_that_webdataset_could_not_tell_apart_are_refused(keys: list[str], what: str) -> None:
    with pytest.raises(DatasetError, match=f"{what}.*store='zarr'"):
        tar_of(manifest(3), (), keys)


def rebuilt(data: bytes, change: str) -> bytes:
    """The tar written anew by the standard library, with one member that does not belong."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for place, info in enumerate(old.getmembers()):
            content = old.extractfile(info).read()  # type: ignore[union-attr]
            if place == 4:
                extra = tarfile.TarInfo("../../escape" if change == "outside" else "/etc/passwd")
                extra.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
                    change, tarfile.REGTYPE
                )
                extra.linkname = "elsewhere"
                if change == "folder":
                    extra.type = tarfile.DIRTYPE
                for _ in range(100_000 if change == "many" else 1):
                    new.addfile(extra)
            if change == "short" and place == 4:
                info.size, content = info.size - 1, content[:-1]
            if change == "label" and info.name.endswith("cls"):
                info.size, content = 2, b"-1"
            new.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(
    "change", ["outside", "absolute", "link", "hard link", "device", "folder", "many", "short", "label"]
)
def test_tars_that_we_would_not_write_are_refused(change: str) -> None:
    m = manifest()
    with pytest.raises(DatasetError, match=r"train-000000.tar cannot be decoded"):
        decoded(m, rebuilt(tar_of(m), change))


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.floats(0, 1),
)
def test_damaged_tars_are_an_error_or_codes_never_a_crash(places: list, keep: float) -> None:
    m = manifest()
    good = tar_of(m, (2,), [f"{'long' * 30}/{i}.jpg" for i in range(7)])
    data = bytearray(good)
    for place, value in places:
        data[int(place * len(data))] = value
    for damaged in (bytes(data), bytes(data[: int(keep * len(data))])):
        try:
            codes, labels, keys = decoded(m, damaged)
            assert len(codes) == len(labels) == len(keys) == 7
        except DatasetError as error:
            assert "cannot be decoded" in error.message
    with pytest.raises(DatasetError):
        decoded(m, good[:-512])


@pytest.mark.parametrize("name", ["v1-wds", "v2-wds"])
def test_the_golden_tars_are_written_again_to_the_byte(name: str) -> None:
    from latentprep.format import open_dataset

    dataset = open_dataset(GOLDEN / name)
    for split in dataset.splits:
        for index in range(dataset.manifest.shard_count(split)):
            shard = dataset.read_shard(split, index)
            files = encode_shard_files(dataset.manifest, split, index, shard.codes, shard.labels, shard.keys)
            assert files == {path: (dataset.root / path).read_bytes() for path in files}
