"""Tables of labels, given or the hub's beside the images; and the splits that they or folders name."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

import latentprep
import latenttrain
from latentprep.errors import SourceError
from latentprep.sources.source import open_source
from pictures import jpeg, make_folder, picture

JPEG = b"\xff\xd8\xff\xe0"


FOUR = {f"images/{i}.jpg": JPEG + bytes([i]) for i in range(4)}
CSV = b"file_name,label\nimages/0.jpg,cat\nimages/1.jpg,dog\nimages/2.jpg,cat\nimages/3.jpg,dog\n"


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def labelled(root: Path, table: bytes, name: str = "labels.csv", files: dict[str, bytes] = FOUR, **options: Any) -> Any:
    """The labels of the images by key; those of other files are given as `options`."""
    write_tree(root / "set", files)
    (root / name).write_bytes(table)
    options = {"val_fraction": 0, **options}
    return open_source(root / "set", labels=root / name, **options)


def by_key(source: Any) -> dict[str, str]:
    return {
        key: source.classes[label] if label >= 0 else ""
        for split in source.splits
        for key, label in zip(source.keys(split), source.labels(split), strict=True)
    }


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("labels.csv", CSV),
        ("labels.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")),
        ("labels.csv", CSV.replace(b"images/", b"")),
        ("labels.csv", CSV.replace(b"images/", b"").replace(b".jpg", b"")),
        ("labels.csv", CSV.replace(b",", b";").replace(b"file_name;label", b"Filename;Class")),
        ("labels.csv", CSV.replace(b"images/", b"./images/").replace(b"cat", b'"cat"')),
        ("labels.tsv", CSV.replace(b",", b"\t")),
        ("labels.jsonl", b"".join(b'{"label": "%s", "file_name": "%d.jpg", "x": [1]}\n' % ((b"cat", b"dog")[i % 2], i)
                                  for i in range(4))),
    ],
)  # fmt: skip
def test_tables_of_labels(tmp_path: Path, name: str, table: bytes) -> None:
    source = labelled(tmp_path, table, name)
    assert source.classes == ("cat", "dog")
    assert by_key(source) == {"0.jpg": "cat", "1.jpg": "dog", "2.jpg": "cat", "3.jpg": "dog"}
    assert source.read("train", 3).data == FOUR["images/3.jpg"]
    assert source.left_out == {}
    tar = open_source(write_tar(tmp_path / "set.tar", {f"a/b/{k}": v for k, v in FOUR.items()}),
                      labels=tmp_path / name, val_fraction=0) if b"images" not in table else source  # fmt: skip
    assert by_key(tar) == by_key(source)


def test_a_table_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    table = pa.table({"id": ["0", "1", "2"], "breed": [3, 1, 3], "label": [None, None, None]})
    pq.write_table(table, tmp_path / "labels.parquet")
    table_bytes = (tmp_path / "labels.parquet").read_bytes()
    source = labelled(tmp_path, table_bytes, "labels.parquet", image_column="id", label_column="breed")
    assert by_key(source) == {"0.jpg": "3", "1.jpg": "1", "2.jpg": "3"}
    assert source.left_out == {"images not named in labels.parquet": 1}


def test_a_column_of_splits(tmp_path: Path) -> None:
    table = b"file,label,split\n0.jpg,a,training\n1.jpg,b,train\n2.jpg,a,dev\n3.jpg,b,test\n"
    source = labelled(tmp_path, table, val_fraction=None)
    assert {split: source.keys(split) for split in source.splits} == {
        "train": ["0.jpg", "1.jpg"], "val": ["2.jpg"], "test": ["3.jpg"]
    }  # fmt: skip


def test_folders_name_the_splits_of_a_table(tmp_path: Path) -> None:
    files = {f"set/{split}/{i}.jpg": JPEG for split in ("train", "valid") for i in range(2)}
    table = b"file_name,label\n" + b"".join(f"{name[4:]},{'ab'[int(name[-5])]}\n".encode() for name in files)
    source = labelled(tmp_path, table, files=files, val_fraction=None)
    assert (source.keys("train"), source.keys("val")) == (
        ["train/0.jpg", "train/1.jpg"],
        ["valid/0.jpg", "valid/1.jpg"],
    )


def test_what_a_table_lacks_is_counted_or_reported(tmp_path: Path) -> None:
    table = b"file_name,label\n0.jpg,a\n1.jpg,b\n2.jpg,\n9.jpg,a\n8.jpg,b\n"
    source = labelled(tmp_path, table)
    assert source.left_out == {"images not named in labels.csv": 1, "rows of labels.csv without an image": 2}
    with pytest.raises(SourceError, match=r"2\.jpg has no label"):
        source.read("train", 2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "has no rows"),
        (b"file_name,label\n", "has no rows"),
        (b"name,label\n0.jpg,a\n", r"no column of file names \(it has: name, label\); name it with image_column"),
        (b"file_name,breed\n0.jpg,a\n", r"no column of labels \(it has: file_name, breed\); name it with label_column"),
        (b"file_name,label\n,a\n", "row 1 of .* has no file name in column file_name"),
        (b"file_name,label\n0.jpg,a\n0.jpg,b\n", "names images/0.jpg with two labels or splits"),
        (b"file_name,label\nx/0.jpg,a\n", "names none of the 4 images .*such as images/0.jpg"),
        (b"file_name,label,split\n0.jpg,a,train\n1.jpg,b,extra\n", "has 'extra' as the split of 1.jpg"),
        (b"file_name,label\n0.jpg,a\n1.jpg,a\n", "only one class: a"),
        (b"file_name,label\n\xff.jpg,a\n", "is no table that can be read"),
        (b'file_name,label\n"0.jpg,a\n', "is no table that can be read"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, table: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        labelled(tmp_path, table)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "0.jpg", "label": 1.5}', "has 1.5 as its label"),
        (b'{"file_name": "0.jpg", "label": ["a"]}', "as its label"),
        (b'{"file_name": 0, "label": 1}', "has no file name"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "is no table that can be read"),
    ],
    ids=range(5),
)
def test_json_lines_that_are_wrong(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        labelled(tmp_path, line, "labels.jsonl")


def test_names_that_two_images_have(tmp_path: Path) -> None:
    files = {"a/0.jpg": JPEG, "b/0.jpg": JPEG, "c/1.jpg": JPEG}
    with pytest.raises(SourceError, match=r"names 0\.jpg, which may be [ab]/0\.jpg or [ab]/0\.jpg"):
        labelled(tmp_path, b"file_name,label\n0.jpg,x\n1.jpg,y\n", files=files)
    source = labelled(tmp_path, b"file_name,label\na/0.jpg,x\nb/0.jpg,y\n1.jpg,y\n", files=files)
    assert by_key(source) == {"a/0.jpg": "x", "b/0.jpg": "y", "c/1.jpg": "y"}


@pytest.mark.parametrize("pack", ["folder", "tar", "zip"])
def test_the_hubs_metadata_beside_the_images(tmp_path: Path, pack: str) -> None:
    files = {
        "set/train/metadata.csv": b"file_name,label,text\n0.jpg,cat,hello\nin/1.jpg,dog,you\n",
        "set/train/0.jpg": JPEG,
        "set/train/in/1.jpg": JPEG,
        "set/train/2.jpg": JPEG,
        "set/test/metadata.jsonl": b'{"file_name": "0.jpg", "label": "dog"}\n',
        "set/test/0.jpg": JPEG,
    }
    root = write_tar(tmp_path / "hub.tar", files) if pack == "tar" else write_tree(tmp_path / "hub", files)
    if pack == "zip":
        root = Path(shutil.make_archive(str(tmp_path / "hub"), "zip", root))
    source = open_source(root, val_fraction=0)
    assert by_key(source) == {"train/0.jpg": "cat", "train/in/1.jpg": "dog", "test/0.jpg": "dog"}
    tables = "set/test/metadata.jsonl, set/train/metadata.csv"
    assert source.notes == (f"labels are those in {tables}",)
    assert source.left_out == {f"images not named in {tables}": 1}


def test_metadata_without_labels_changes_nothing(tmp_path: Path) -> None:
    files = {"a/0.jpg": JPEG, "b/0.jpg": JPEG, "metadata.csv": b"file_name,text\na/0.jpg,hello\n"}
    source = open_source(write_tree(tmp_path, files), val_fraction=0)
    assert by_key(source) == {"a/0.jpg": "a", "b/0.jpg": "b"}
    assert open_source(tmp_path, label_column="text", val_fraction=0, labels=None) if False else True


def test_train_and_test_alone(tmp_path: Path) -> None:
    """The test split is encoded, and `eval` takes it; what is taken for val is said."""
    images = make_folder(tmp_path / "images", train=10, val=4, side=32)
    (images / "val").rename(images / "test")
    source = open_source(images)
    assert source.splits == ("train", "val", "test")
    assert source.notes == ("no val split beside train and test: 10% of train becomes val",)
    latentprep.encode(images, codec="resample:factor=4", size=32, out=tmp_path / "codes", shard_rows=16)
    latenttrain.fit(tmp_path / "codes", epochs=1, width=0.25, depth=0.25, batch_size=8, out=tmp_path / "run")
    assert latenttrain.evaluate(tmp_path / "run", tmp_path / "codes", split="test").samples == 8


def test_encode_and_verify_take_a_table(tmp_path: Path) -> None:
    files = {f"{i}.jpg": jpeg(picture(i, 32, 32)) for i in range(12)}
    write_tree(tmp_path / "set", files)
    table = tmp_path / "labels.csv"
    table.write_text("file_name,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(files)))
    made = latentprep.encode(tmp_path / "set", labels=table, codec="dct", size=32, out=tmp_path / "out")
    assert made.classes == ("a", "b")
    assert latentprep.verify(tmp_path / "out", source=tmp_path / "set", labels=table, samples=4).ok
