from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import latentprep
from inprocess import command
from latentprep.audit.verify import SourceImages, VerifyResult
from latentprep.errors import DatasetError, SourceError, UsageError
from latentprep.format import FileRecord, LatentDataset, ShardRecord, open_dataset
from latentprep.format.commit import commit_shard, write_errors
from latentprep.format.hashes import CONTENT_HASH
from latentprep.format.shard import encoded_shard
from latentprep.format.zarr_store import encode_shard_files, metadata_files, shard_files
from latentprep.progress import silent
from latentprep.sources.source import Source, open_source
from pictures import jpeg, make_folder, picture

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with two damaged images, and the dataset made of it: 5 shards."""
    folder = tmp_path_factory.mktemp("verify")
    source = make_folder(folder / "images")
    for name in ("train/class_1/002.jpg", "val/class_0/001.jpg"):
        (source / name).write_bytes(b"junk")
    latentprep.encode(source, codec="dct", size=32, out=folder / "data", shard_rows=4, max_error_fraction=0.5)
    return source, folder / "data"


@pytest.fixture
def data(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return shutil.copytree(made[1], tmp_path / "data")


@pytest.fixture
def source(made: tuple[Path, Path]) -> Source:
    return open_source(made[0])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return command("latentprep", *arguments)


def shards(found: VerifyResult) -> list[tuple[str | None, int | None]]:
    return [(problem.split, problem.index) for problem in found.problems]


def paths(split: str, index: int) -> dict[str, str]:
    return shard_files(SimpleNamespace(content_hash=CONTENT_HASH), split, index)  # Zarr's follow from these alone


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def flip(path: Path, bit: int) -> None:
    changed = bytearray(path.read_bytes())
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    path.write_bytes(changed)


def test_a_whole_dataset_is_whole(made: tuple[Path, Path], source: Source) -> None:
    found = latentprep.verify(made[1], deep=True, source=source, samples=9)
    assert found.ok
    assert (found.shards, found.checked, found.decoded) == (5, 5, 5)
    assert (found.rows, found.invalid) == (18, 2)
    assert found.compared is not None
    assert (found.compared.images, found.compared.differing, found.compared.unreadable) == (9, 0.0, ())
    assert latentprep.verify(GOLDEN / "v1", deep=True).ok  # whose records have no checksum of their own


def test_every_bit_flip_is_found(data: Path) -> None:
    """`benchmarks/bit_flips.py` makes ten thousand."""
    draw = random.Random(0)
    files = sorted(path for path in data.rglob("*") if path.is_file())
    kinds = {path.name for path in files}
    assert {"manifest.json", "errors.jsonl", "zarr.json", "train-000000.json"} <= kinds
    for path in files:
        good = path.read_bytes()
        for _ in range(6):
            flip(path, bit := draw.randrange(8 * len(good)))
            try:
                found = latentprep.verify(data)
            except DatasetError as error:
                assert path.name == "manifest.json", path
                assert "manifest.json" in error.message or "quantizer" in error.message
            else:
                assert not found.ok, (path, bit)
            path.write_bytes(good)
    assert latentprep.verify(data).ok


def test_damaged_and_missing_shards_are_named_and_repaired(data: Path, source: Source) -> None:
    before = everything(data)
    flip(data / paths("train", 1)["codes"], 77)
    (data / paths("val", 0)["keys"]).unlink()
    (data / "records" / "train-000002.json").unlink()
    flip(data / "records" / "val-000001.json", 900)
    flip(data / "errors.jsonl", 3)
    (data / "zarr.json").write_text("{")
    found = latentprep.verify(data)
    assert shards(found) == [("train", 1), ("train", 2), ("val", 0), ("val", 1), (None, None)]
    repaired = latentprep.verify(data, source=source, repair=True)
    assert repaired.ok
    assert repaired.repaired == {"train 2": None, "val 1": None, "train 1": True, "val 0": True}
    assert repaired.checked == 5
    assert everything(data) == before


def test_repairing_leaves_whole_shards_alone(data: Path, source: Source) -> None:
    times = {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()}
    flip(data / paths("train", 1)["labels"], 5)
    assert latentprep.verify(data, source=source, repair=True, samples=0).ok
    changed = {str(path.relative_to(data)) for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {*paths("train", 1).values(), "records/train-000001.json", "errors.jsonl"}


def test_an_altered_manifest_is_not_repaired_over(data: Path, source: Source) -> None:
    text = (data / "manifest.json").read_text()
    (data / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DatasetError, match=r"manifest.json was altered: no record matches it"):
        latentprep.verify(data, source=source, repair=True)


def test_a_part_of_another_encode_is_named(data: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    """Stale and new parts never mix: not a record, nor a shard's file."""
    latentprep.encode(
        made[0], codec="dct", size=32, bits=5, out=tmp_path / "other", shard_rows=4, max_error_fraction=0.5
    )
    shutil.copy(tmp_path / "other" / "records" / "train-000001.json", data / "records")
    with pytest.raises(DatasetError, match="does not belong to"):
        open_dataset(data).load("train")
    shutil.copy(tmp_path / "other" / paths("val", 0)["codes"], data / paths("val", 0)["codes"])
    with pytest.raises(DatasetError, match="shard val 0"):
        open_dataset(data).load("val")
    assert shards(latentprep.verify(data)) == [("train", 1), ("val", 0)]
    with pytest.raises(DatasetError, match="does not belong to"):
        latentprep.encode(made[0], codec="dct", size=32, out=data, shard_rows=4, max_error_fraction=0.5)


def rewrite(data: Path, change: Callable[[np.ndarray, np.ndarray, list[str]], object]) -> None:
    """Make shard train 0 say something else, with checksums that agree."""
    dataset = open_dataset(data)
    record, shard = dataset.committed("train", 0), dataset.read_shard("train", 0)
    change(shard.codes, shard.labels, shard.keys)
    facts = {"source_bytes": record.source_bytes, "saturated": record.saturated, "invalid": record.invalid}
    commit_shard(data, encoded_shard(dataset.manifest, record.shard, shard, **facts))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda codes, labels, keys: codes.__setitem__((1, 0, 0, 0, 0), 255), "holds the code 255, too large for"),
        (lambda codes, labels, keys: labels.__setitem__(1, 2), "label outside the 2 classes"),
        (lambda codes, labels, keys: labels.__setitem__(1, -2), "label outside the 2 classes"),
        (lambda codes, labels, keys: labels.__setitem__(1, -1), "different invalid rows than its record lists"),
        (lambda codes, labels, keys: keys.__setitem__(1, keys[2]), "holds a key twice"),
        (lambda codes, labels, keys: keys.__setitem__(1, "train/class_1/000.jpg"), "which is also in shard train 0"),
    ],
)
def test_values_that_cannot_be_are_found_though_checksums_agree(data: Path, change: Callable, what: str) -> None:
    rewrite(data, change)
    found = latentprep.verify(data)
    assert len(found.problems) == 1
    assert what in found.problems[0].what


def test_rows_that_are_not_the_sources_are_found(data: Path, source: Source) -> None:
    rewrite(data, lambda codes, labels, keys: keys.__setitem__(1, "elsewhere.jpg"))
    assert latentprep.verify(data).ok
    found = latentprep.verify(data, source=source, samples=0)
    assert shards(found) == [("train", 0)]
    assert "different keys or labels than the source" in found.problems[0].what


def test_codes_that_are_not_the_images_are_found(data: Path, source: Source) -> None:
    rewrite(data, lambda codes, labels, keys: codes.__setitem__(slice(None), codes[::-1].copy()))
    assert latentprep.verify(data, deep=True).ok
    found = latentprep.verify(data, source=source, samples=100)
    assert set(shards(found)) == {("train", 0)}
    assert "encodes to other codes now" in found.problems[0].what
    assert found.compared is not None
    assert found.compared.farthest > 0.02
    repaired = latentprep.verify(data, source=source, samples=100, repair=True)
    assert repaired.ok
    assert repaired.repaired == {"train 0": False}


def test_a_little_noise_from_another_machine_is_no_damage(data: Path, source: Source) -> None:
    rewrite(data, lambda codes, labels, keys: codes.__ixor__((np.arange(codes.size) % 60 == 0).reshape(codes.shape)))
    found = latentprep.verify(data, source=source, samples=100)
    assert found.ok
    assert found.compared is not None
    assert 0 < found.compared.differing < 0.02


def test_further_views_are_encoded_again_too(made: tuple[Path, Path], source: Source, tmp_path: Path) -> None:
    latentprep.encode(
        made[0], codec="dct", size=32, views=3, out=tmp_path / "three", shard_rows=4, max_error_fraction=0.5
    )
    found = latentprep.verify(tmp_path / "three", source=source, samples=100)
    assert found.ok
    assert found.compared is not None
    assert (found.compared.images, found.compared.differing) == (16, 0.0)


def test_images_that_vanished_are_told_apart_from_damage(data: Path, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    for name in ("train/class_1/002.jpg", "val/class_0/001.jpg", "val/class_1/001.jpg"):
        (images / name).write_bytes(b"junk")
    found = latentprep.verify(data, source=open_source(images), samples=100)
    assert found.ok
    assert found.compared is not None
    assert len(found.compared.unreadable) == 1
    assert found.compared.unreadable[0].startswith("val/class_1/001.jpg: ")


def test_another_source_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not the source"):
        latentprep.verify(data, source=open_source(make_folder(tmp_path / "other", train=3)))
    with pytest.raises(UsageError, match="repair=True .* needs the images"):
        latentprep.verify(data, repair=True)


def test_an_interrupted_encode_is_incomplete_not_damaged(data: Path) -> None:
    (data / "records" / "val-000001.json").unlink()
    found = latentprep.verify(data)
    assert [problem.what for problem in found.problems] == ["is not committed"]


def test_verification_can_be_switched_off(data: Path) -> None:
    path = data / paths("train", 1)["labels"]
    other = open_dataset(data)
    files = encode_shard_files(
        other.manifest, "train", 1, *[v[::-1] for v in vars(other.read_shard("train", 1)).values() if v is not None]
    )
    path.write_bytes(files[paths("train", 1)["labels"]])
    with pytest.raises(DatasetError, match=r"shard train 1: .* was altered"):
        latentprep.open(data).read_shard("train", 1)
    assert len(latentprep.open(data, verify=False).load("train").keys) == 11


def test_records_of_the_first_release_had_no_checksum() -> None:
    """They read as ever; an unknown field in one may be the altered name of a checksum."""
    record = ShardRecord("train", 0, 4, {}, 1, (0,), "ab" * 32)
    document = json.loads(record.to_bytes())
    head = record.to_bytes().split(b',\n "sha256"')[0]
    assert document.pop("sha256") == hashlib.sha256(head).hexdigest()
    assert ShardRecord.from_bytes(json.dumps(document).encode(), "r") == record
    with pytest.raises(DatasetError, match="unknown field 'sha257' and no checksum"):
        ShardRecord.from_bytes(json.dumps({**document, "sha257": "0"}).encode(), "r")
    with pytest.raises(DatasetError, match="it does not match the SHA-256 at its end"):
        ShardRecord.from_bytes(record.to_bytes().replace(b'"source_bytes": 1', b'"source_bytes": 2'), "r")


def test_zarr_metadata_of_another_version_may_be_spelled_otherwise(data: Path) -> None:
    for path, expected in metadata_files(open_dataset(data).manifest).items():
        (data / path).write_text(json.dumps(json.loads(expected)))
    assert latentprep.verify(data).ok


def test_zarr_metadata_that_names_another_codec_is_never_used(data: Path) -> None:
    path = data / "train" / "codes" / "zarr.json"
    document = json.loads(path.read_bytes())
    document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    path.write_text(json.dumps(document))
    assert len(open_dataset(data).load("train")) == 11
    found = latentprep.verify(data)
    assert ["train/codes/zarr.json" in problem.what for problem in found.problems] == [True]


def test_exit_codes_and_json(data: Path, made: tuple[Path, Path]) -> None:
    done = run("verify", data)
    assert done.returncode == 0, done.stderr
    assert "is intact" in done.stdout
    flip(data / paths("train", 1)["codes"], 77)
    done = run("verify", data)
    assert done.returncode == 6
    assert "train 1" in done.stdout
    assert "was altered" in done.stdout
    assert run("verify", data, "--repair").returncode == 2
    done = run("verify", data, "--source", made[0], "--repair", "--samples", 3, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["ok"] is True
    assert facts["repaired"] == {"train 1": True}
    (data / "manifest.json").write_text("{}")
    assert run("verify", data).returncode == 6


def test_an_errors_file_follows_from_the_records(data: Path) -> None:
    dataset: LatentDataset = open_dataset(data)
    before = (data / "errors.jsonl").read_bytes()
    (data / "errors.jsonl").unlink()
    assert ["errors.jsonl" in problem.what for problem in latentprep.verify(data).problems] == [True]
    write_errors(data, [record for split in reversed(dataset.splits) for record in dataset.records(split)])
    assert (data / "errors.jsonl").read_bytes() == before
    assert latentprep.verify(data, progress=silent).ok


def test_every_changed_image_is_found_without_a_codec(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_folder(tmp_path / "images")
    for name in ("train/class_1/002.jpg", "val/class_0/001.jpg"):  # which could not be read then either
        (images / name).write_bytes(b"junk")
    assert latentprep.verify(data, source=images, samples=0).hashed == SourceImages(16)
    keys = ["train/class_0/000.jpg", "train/class_0/003.jpg", "val/class_1/002.jpg"]
    for seed, name in enumerate(keys):
        (images / name).write_bytes(jpeg(picture(5000 + seed)))
    (images / "train/class_1/000.jpg").write_bytes(b"damaged since")
    with monkeypatch.context() as patch:
        patch.setattr("latentprep.codecs.codec_from_config", None)
        found = latentprep.verify(data, source=images, samples=0)
    assert found.hashed is not None
    assert (found.hashed.images, found.hashed.changed) == (15, tuple(keys))
    assert [text.partition(":")[0] for text in found.hashed.unreadable] == ["train/class_1/000.jpg"]
    assert shards(found) == [("train", 0), ("val", 1)]
    assert "holds 2 images changed since, the first is train/class_0/000.jpg" in found.problems[0].what
    shown = run("verify", data, "--source", images, "--samples", 0)
    assert "15 images of the source, 3 changed" in " ".join(shown.stdout.split()) and shown.returncode == 6
    assert latentprep.verify(data, source=images, samples=0, repair=True).ok
    again = latentprep.verify(data, source=images, samples=0)
    assert again.ok and again.hashed is not None and not again.hashed.changed
    options = {"codec": "dct", "size": 32, "shard_rows": 4, "max_error_fraction": 0.5}
    assert latentprep.encode(images, out=data, **options).encoded == 0  # it takes no image for replaced
    assert latentprep.verify(GOLDEN / "v1", deep=True).hashed is None


def test_what_a_later_version_adds_is_passed_over_and_not_lost(data: Path, made: tuple[Path, Path]) -> None:
    """Further fields and files, as content hashes were: readers ignore them, and nothing writes over them."""
    text = (data / "manifest.json").read_bytes().replace(b'"version": 1,', b'"version": 1,\n "later": 1,')
    (data / "manifest.json").write_bytes(text)
    record: ShardRecord | None = None
    for path in (data / "records").iterdir():
        record = ShardRecord.from_bytes(path.read_bytes(), "r")
        later = {**record.files, "later": FileRecord(1, "ab" * 32)}
        path.write_bytes(replace(record, manifest=hashlib.sha256(text).hexdigest(), files=later).to_bytes())
    assert latentprep.verify(data, deep=True).ok
    assert record is not None
    (data / record.path).unlink()
    before = everything(data)
    options = {"codec": "dct", "size": 32, "shard_rows": 4, "max_error_fraction": 0.5}
    with pytest.raises(DatasetError, match="has fields of a later version"):
        latentprep.encode(made[0], out=data, **options)
    with pytest.raises(DatasetError, match="has fields of a later version"):
        latentprep.verify(data, source=made[0], repair=True)
    assert everything(data) == before
