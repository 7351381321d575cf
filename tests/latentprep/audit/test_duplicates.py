"""Duplicates within and between splits are found by content hashes: all that were planted, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import latentprep
from inprocess import command
from latentprep.audit.duplicates import Leak, find_duplicates
from pictures import make_folder

GOLDEN = Path(__file__).parents[2] / "golden"
PLANTED = [  # the image at the first key is also at the others
    {"train": ["train/class_0/000.jpg", "train/class_0/copy.jpg", "train/class_1/copy.jpg"]},
    {"train": ["train/class_0/005.jpg"], "val": ["val/class_1/copy.jpg"]},
    {"train": ["train/class_1/001.jpg", "train/class_1/again.jpg"], "val": ["val/class_0/x.jpg", "val/class_0/y.jpg"]},
    {"val": ["val/class_0/000.jpg", "val/class_1/twin.jpg"]},
]
COUNTS = "train repeats 3 images; val repeats 2 images; 3 of val are in train too"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("duplicates")
    images = make_folder(root / "images", train=10, val=5)
    for image in PLANTED:
        first, *others = [key for keys in image.values() for key in keys]
        for key in others:
            shutil.copy(images / first, images / key)
    for name in ("train/class_0/009.jpg", "val/class_0/004.jpg"):  # unreadable images are no duplicates
        (images / name).write_bytes(b"damaged")
    options = {"codec": "dct", "size": 16, "shard_rows": 4, "max_error_fraction": 0.5}
    latentprep.encode(images, out=root / "data", **options)
    return root / "data"


def planted(images: tuple[dict[str, list[str]], ...]) -> list[dict[str, list[str]]]:
    return sorted(images, key=lambda image: next(iter(image.values())))


def test_planted_duplicates_are_found_all_and_only_those(made: Path) -> None:
    found = find_duplicates(latentprep.open(made))
    assert found is not None
    assert planted(found.images) == planted(tuple(PLANTED))
    assert found.within == {"train": 3, "val": 2}
    assert found.between == (Leak("val", "train", 3),)
    assert (found.unknown, found.text()) == (0, COUNTS)


def test_info_and_report_name_them(made: Path, tmp_path: Path) -> None:
    shown = command("latentprep", "info", made).stdout
    assert COUNTS in " ".join(shown.split())
    found = json.loads(command("latentprep", "info", made, "--json").stdout)["duplicates"]
    assert found["between"] == [{"split": "val", "other": "train", "rows": 3}]
    assert planted(found["images"]) == planted(tuple(PLANTED))
    result = latentprep.report(made, out=tmp_path / "report.html", samples=1)
    page = (tmp_path / "report.html").read_text()
    assert COUNTS in page and "val: val/class_0/x.jpg, val/class_0/y.jpg" in page
    assert result.duplicates is not None and result.duplicates.within == {"train": 3, "val": 2}


def test_derived_datasets_carry_the_hashes_along(made: Path, tmp_path: Path) -> None:
    whole = find_duplicates(latentprep.open(made))
    for store in ("wds", "parquet"):
        latentprep.convert(made, out=tmp_path / store, store=store)
        assert find_duplicates(latentprep.open(tmp_path / store)) == whole
    latentprep.requantize(made, bits=2, out=tmp_path / "fewer")
    assert find_duplicates(latentprep.open(tmp_path / "fewer")) == whole
    latentprep.subset(made, classes=["class_1"], out=tmp_path / "subset")
    found = find_duplicates(latentprep.open(tmp_path / "subset"))
    assert found is not None and found.images == ({"train": ["train/class_1/001.jpg", "train/class_1/again.jpg"]},)


def test_rows_without_hashes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_duplicates(latentprep.open(GOLDEN / "v1")) is None
    assert "unknown" in command("latentprep", "info", GOLDEN / "v1").stdout
    images, options = make_folder(tmp_path / "images"), {"codec": "dct", "size": 16, "shard_rows": 5}
    with monkeypatch.context() as patch:
        patch.setattr("latentprep.encoding.encode.CONTENT_HASH", None)
        latentprep.encode(images, out=tmp_path / "old", **options)
    for path in sorted(images.rglob("*.jpg")):
        path.rename(path.with_name(f"new {path.name}"))
    latentprep.encode(images, out=tmp_path / "new", quantizer=tmp_path / "old", **options)
    for names in (["old", "new"], ["new", "old"]):
        latentprep.merge([tmp_path / name for name in names], out=tmp_path / "merged", overwrite=True)
        found = find_duplicates(latentprep.open(tmp_path / "merged"))
        assert found is not None and (found.images, found.unknown) == ((), 18)
        assert found.text() == "18 rows without a content hash not compared"
        assert latentprep.verify(tmp_path / "merged", deep=True).ok
