"""Parquet files as sources: as `datasets` writes them, on this machine, in a bucket, on a web server and on the hub."""

from __future__ import annotations

import json
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

import latentprep
from inprocess import at_hub
from latentprep.errors import SourceError, SystemFault, UsageError
from latentprep.sources import parquet as parquet_module
from latentprep.sources.source import Source, open_source
from loopback import Loopback
from pictures import jpeg, make_folder, picture

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OPTIONS: dict[str, Any] = {"codec": "dct", "size": 64, "shard_rows": 8}


def write(
    path: Path,
    rows: list[tuple[bytes | None, str | None, Any]],
    names: list[str] | None = None,
    label_type: Any = None,
    group: int = 4,
) -> Path:
    """A file as `datasets` writes it: rows of image, its name and label. names: of a ClassLabel."""
    images = [None if data is None and name is None else {"bytes": data, "path": name} for data, name, _ in rows]
    labels = [label for _, _, label in rows]
    table = pa.table({"image": pa.array(images, IMAGE), "label": pa.array(labels, label_type or pa.int64())})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def some(count: int, classes: int = 2, first: int = 0) -> list[tuple[bytes, str, int]]:
    return [(jpeg(picture(first + i, 16, 16)), f"{first + i:03}.jpg", i % classes) for i in range(count)]


def contents(source: Source) -> dict:
    rows = {split: [source.read(split, i) for i in range(source.size(split))] for split in source.splits}
    return {"classes": source.classes, **rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("parquet") / "images", train=20, val=8)


@pytest.fixture(scope="module")
def files(folder: Path) -> Path:
    """The folder's images as Parquet files, in two parts of train and one of val."""
    root = folder.parent / "data"
    for split, word, parts in (("train", "train", 2), ("val", "validation", 1)):
        paths = sorted((folder / split).rglob("*.jpg"))
        rows = [(path.read_bytes(), path.name, int(path.parent.name[-1])) for path in paths]
        size = -(-len(rows) // parts)
        for part in range(parts):
            name = f"{word}-{part:05}-of-{parts:05}.parquet"
            write(root / name, rows[part * size : (part + 1) * size], ["class_0", "class_1"])
    return root


# --- the same as a folder


def test_as_datasets_writes_it_it_is_the_folder(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = sorted((folder / "train").rglob("*.jpg"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class_0", "class_1"])}
    )
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in rows],
         "label": [int(path.parent.name[-1]) for path in rows]},
        features=features,
    )  # fmt: skip
    made.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    source, same = open_source(tmp_path, val_fraction=0), open_source(folder)
    assert source.keys("train") == same.keys("train")
    assert source.notes == ()
    assert contents(source)["train"] == contents(same)["train"]


def codes(root: Path) -> list:
    dataset = latentprep.open(root)
    return [(s, d.keys, d.labels.tolist(), d.codes.tobytes()) for s in dataset.splits for d in [dataset.load(s)]]


def test_files_encode_to_the_codes_of_the_folder(tmp_path: Path, folder: Path, files: Path) -> None:
    latentprep.encode(folder, **OPTIONS, out=tmp_path / "folder")
    latentprep.encode(files, **OPTIONS, out=tmp_path / "files")
    assert codes(tmp_path / "files") == codes(tmp_path / "folder")
    assert latentprep.verify(tmp_path / "files", source=files, samples=8).ok
    again = latentprep.encode(files, **OPTIONS, out=tmp_path / "files")
    assert again.encoded == 0


def test_real_images_encode_to_the_codes_of_their_folder(tmp_path: Path, assets: Path) -> None:
    import tarfile

    with tarfile.open(assets / "imagenette2-224.tar") as tar:
        members = []
        for member in tar:
            if member.isfile() and "/train/" in member.name and len(members) < 400:
                members.append(member)
        for member in members[::10]:
            path = tmp_path / "images" / member.name.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    if len(list((tmp_path / "images" / "train").iterdir())) < 2:  # a tar is class after class
        (tmp_path / "images" / "train" / "other").mkdir()
        for path in sorted((tmp_path / "images").rglob("*.JPEG"))[::2]:
            path.rename(tmp_path / "images" / "train" / "other" / path.name)
    paths = sorted((tmp_path / "images").rglob("*.JPEG"))
    names = sorted({path.parent.name for path in paths})
    write(
        tmp_path / "pq" / "train-0.parquet",
        [(p.read_bytes(), p.name, names.index(p.parent.name)) for p in paths],
        names,
    )
    for source in ("images", "pq"):
        latentprep.encode(tmp_path / source, codec="dct", size=64, out=tmp_path / f"{source}-codes")
    assert codes(tmp_path / "pq-codes") == codes(tmp_path / "images-codes")


@pytest.mark.parametrize(
    "spec", ["", "/*.parquet", "/{train-00000-of-00002,train-00001-of-00002,validation-00000-of-00001}.parquet"]
)
def test_a_folder_a_pattern_and_braces_name_files(folder: Path, files: Path, spec: str) -> None:
    assert contents(open_source(f"{files}{spec}")) == contents(open_source(folder))


def test_one_file_is_train_and_gives_a_part_to_val(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "photos.parquet", some(30), ["b", "a"]), seed=1)
    assert source.splits == ("train", "val")
    assert (source.size("train"), source.size("val")) == (26, 4)
    assert source.classes == ("b", "a")  # the numbers of the file, not of the alphabet
    assert source.keys("train")[:2] == ["b/000.jpg", "a/001.jpg"]


def test_folders_name_splits(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path / "hub" / split / "0000.parquet", some(4), ["a", "b"])
    source = open_source(tmp_path / "hub")
    assert source.splits == ("train", "val", "test")
    assert source.keys("val")[0] == "val/a/000.jpg"


# --- reading


def test_any_order_from_threads_and_after_pickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some(50)
    path = write(tmp_path / "train.parquet", rows, ["a", "b"], group=17)
    monkeypatch.setattr(parquet_module, "_BLOCK_ROWS", 3)
    source = open_source(path, val_fraction=0)
    monkeypatch.setattr(parquet_module, "_KEPT", 2000)
    order = list(range(50)) * 2
    random.Random(0).shuffle(order)
    for one in (source, pickle.loads(pickle.dumps(source))):
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda i, one=one: one.read("train", i).data, order))  # type: ignore[misc]
        assert read == [rows[i][0] for i in order]


def test_reading_in_order_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_source(write(tmp_path / "train.parquet", some(60), ["a", "b"], group=20), val_fraction=0)
    source = pickle.loads(pickle.dumps(opened))
    read, real = [], parquet_module.ParquetImages._read
    monkeypatch.setattr(
        parquet_module.ParquetImages, "_read", staticmethod(lambda part, group: read.append(group) or real(part, group))
    )
    for i in range(60):
        source.read("train", i)
    assert read == [0, 1, 2]


def test_a_changed_file_is_another_source(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", some(10), ["a", "b"])
    source = pickle.loads(pickle.dumps(before := open_source(path)))
    assert source.fingerprint() == before.fingerprint() == open_source(path).fingerprint()
    changed = some(10)
    changed[3] = (changed[4][0], *changed[3][1:])
    write(path, changed, ["a", "b"])
    assert open_source(path).fingerprint() != before.fingerprint()
    with pytest.raises(SourceError, match="has changed since it was opened"):
        source.read("train", 0)
    path.unlink()
    with pytest.raises(OSError, match="train.parquet"):
        pickle.loads(pickle.dumps(source)).read("train", 0)


def test_limit_keeps_the_files_order(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "train.parquet", some(40)[::-1], ["a", "b"]), val_fraction=0)
    few = source.take(6)
    assert few.keys("train") == [key for key in source.keys("train") if key in set(few.keys("train"))]
    assert sorted(few.labels("train")) == [0, 0, 0, 1, 1, 1]
    assert few.fingerprint() != source.fingerprint()


# --- labels, keys and columns


def test_rows_without_image_or_label_are_reported(tmp_path: Path) -> None:
    rows: list[tuple[Any, Any, Any]] = some(40)
    rows[3], rows[7], rows[8] = (None, "003.jpg", 1), (rows[7][0], "007.jpg", None), (rows[8][0], "008.jpg", -1)
    write(tmp_path / "train.parquet", rows, ["a", "b"])
    result = latentprep.encode(tmp_path / "train.parquet", **OPTIONS, val_fraction=0, out=tmp_path / "out")
    assert result.invalid == 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["train/b/003.jpg", "train/007.jpg", "train/008.jpg"]
    assert "row 3" in lines[0]["reason"] and "has no bytes" in lines[0]["reason"]
    assert all("no label" in line["reason"] for line in lines[1:])
    assert latentprep.verify(tmp_path / "out", source=tmp_path / "train.parquet", val_fraction=0, samples=4).ok


def test_a_split_without_labels_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", some(20), ["a", "b"])
    write(tmp_path / "test.parquet", [(data, name, -1) for data, name, _ in some(5)], ["a", "b"])
    source = open_source(tmp_path)
    assert source.splits == ("train", "val")
    assert source.left_out == {"images in test (none has a label)": 5}


def test_images_without_names_have_files_and_rows_as_keys(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / f"train-{part}.parquet", [(data, None, label) for data, _, label in some(3)], ["a", "b"])
    source = open_source(tmp_path, val_fraction=0)
    assert source.keys("train")[:4] == [
        "train-0:000000000",
        "train-0:000000001",
        "train-0:000000002",
        "train-1:000000000",
    ]
    assert source.notes == ("some images of train have no name or share one: keys are files and rows",)


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (["10", "9", "9"], pa.string(), ("9", "10")),
        (["b", "a", "b"], pa.large_string(), ("a", "b")),
        ([10, 9, 9], pa.uint8(), ("9", "10")),
        ([True, False, True], pa.bool_(), ("false", "true")),
        (["b", "a", "b"], pa.dictionary(pa.int32(), pa.string()), ("a", "b")),
    ],
)
def test_labels_without_names_are_classes_themselves(tmp_path: Path, values: list, kind: Any, classes: tuple) -> None:
    rows = [(data, name, value) for (data, name, _), value in zip(some(3), values, strict=True)]
    source = open_source(write(tmp_path / "x.parquet", rows, label_type=kind), val_fraction=0)
    assert source.classes == classes
    assert source.notes[0] == "images are in column image, labels in label"
    assert ("classes are named by their numbers" in source.notes[-1]) == (kind == pa.uint8())
    assert [source.classes[label] for label in source.labels("train")] == [str(v).lower() for v in values]


def test_classes_without_images_keep_their_number(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.parquet", some(4), ["a", "b", "c"]), val_fraction=0)
    assert source.classes == ("a", "b", "c")
    assert source.notes == ("classes without images in train, of 3: 1 (c)",)


def test_columns_are_named_where_they_cannot_be_told(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    data = [row[0] for row in some(4)]
    pq.write_table(pa.table({"photo": data, "mask": data, "fine": [0, 1, 0, 1], "coarse": ["a", "b", "b", "b"]}), path)
    with pytest.raises(
        SourceError, match="several columns to choose from: photo, mask; name one with image_column='photo'"
    ):
        open_source(path)
    with pytest.raises(SourceError, match="no column of labels that can be told .*coarse string"):
        open_source(path, image_column="mask")
    source = open_source(path, image_column="photo", label_column="coarse", val_fraction=0)
    assert source.classes == ("a", "b")
    assert source.read("train", 2).data == data[2]
    for column, message in (("fin", "no single column fin"), ("coarse", "holds string, not images")):
        with pytest.raises(SourceError, match=message):
            open_source(path, image_column=column, label_column="fine")
    with pytest.raises(SourceError, match="column photo of .* holds binary, not one number or text"):
        open_source(path, image_column="photo", label_column="photo")


def test_files_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", some(4), ["a", "b"])
    write(tmp_path / "train-1.parquet", some(4), ["b", "a"])
    with pytest.raises(SourceError, match=r"train-1\.parquet has other columns or classes"):
        open_source(tmp_path)


def test_options_without_effect_are_refused(tmp_path: Path, folder: Path, files: Path) -> None:
    for spec, options in (
        (folder, {"image_column": "x"}),
        ("shapes", {"label_column": "x"}),
        (files, {"labels": tmp_path / "x.csv"}),
        (open_source("shapes"), {"labels": "x.csv"}),
    ):
        with pytest.raises(UsageError, match="has no effect on"):
            open_source(spec, **options)


def test_paths_in_place_of_bytes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [(None, "/etc/passwd", 0), (None, "/etc/hosts", 1)], ["a", "b"])
    with pytest.raises(SourceError, match="holds no bytes of images or sounds, perhaps their paths"):
        open_source(path)


def test_without_pyarrow_the_extra_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemFault, match=r"pip install 'latentprep\[parquet\]'"):
        open_source(files)


# --- at URLs


class RangeServer:
    """A web server, or the hub, that serves a folder by ranges; `asked` has what was asked for."""

    def __init__(self, root: Path, prefix: str = "/", documents: dict[str, Any] | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                wanted = self.headers.get("Range", "")
                if self.command == "GET":
                    outer.asked.append((path, wanted))
                file = root / path.removeprefix(prefix)
                if path in (documents or {}):
                    self.reply(200, json.dumps(documents[path]).encode())  # type: ignore[index]
                elif not path.startswith(prefix) or not file.is_file():
                    self.reply(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
                elif wanted:
                    data = file.read_bytes()
                    first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                    span = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                    self.reply(206, data[first : last + 1], **{"Content-Range": span})
                else:
                    self.reply(200, file.read_bytes())

            do_HEAD = do_GET

            def reply(self, status: int, data: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Loopback(Handler)
        self.url = self.server.url


def test_a_web_server_is_read_by_ranges(tmp_path: Path, folder: Path, files: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    web = RangeServer(files)
    with web.server:
        url = f"{web.url}/{{train-00000-of-00002,train-00001-of-00002,validation-00000-of-00001}}.parquet"
        source = open_source(url)
        assert contents(pickle.loads(pickle.dumps(source))) == contents(open_source(folder))
        latentprep.encode(source, **OPTIONS, out=tmp_path / "web")
        with pytest.raises(SourceError, match="web servers do not list their files"):
            open_source(web.url)
        with pytest.raises(SourceError, match=r"there is no .*/gone\.parquet"):
            open_source(f"{web.url}/gone.parquet")
    latentprep.encode(folder, **OPTIONS, out=tmp_path / "folder")
    assert codes(tmp_path / "web") == codes(tmp_path / "folder")
    ranges = [wanted for path, wanted in web.asked if path.endswith("-of-00002.parquet")]
    assert ranges and all(ranges)


def test_a_bucket_is_read_by_ranges(tmp_path: Path, folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("obstore", "moto", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from s3 import running

    from latentprep.storage import buckets
    from latentprep.storage.places import place

    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with running() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        buckets.open_bucket.cache_clear()
        for path in files.iterdir():
            (place("s3://bucket/sets/data") / path.name).write_bytes(path.read_bytes())  # type: ignore[union-attr]
        (place("s3://bucket/sets") / "README.md").write_bytes(b"hello")  # type: ignore[union-attr]
        expected = contents(open_source(folder))
        for spec in ("s3://bucket/sets", "s3://bucket/sets/data/*.parquet", "s3://bucket/**/*-of-0000[12].parquet"):
            assert contents(open_source(spec)) == expected
        latentprep.encode("s3://bucket/sets", **OPTIONS, out=tmp_path / "bucket")
        with pytest.raises(SourceError, match="no Parquet files were found at s3://bucket/other"):
            open_source("s3://bucket/other")
    buckets.open_bucket.cache_clear()
    latentprep.encode(folder, **OPTIONS, out=tmp_path / "folder")
    assert codes(tmp_path / "bucket") == codes(tmp_path / "folder")


COMMIT = "c" * 40


def hub_of(root: Path, configs: Any = None, name: str = "someone/photos") -> RangeServer:
    """A hub with one dataset, whose files are those of a folder."""
    files = [{"rfilename": str(p.relative_to(root)), "size": p.stat().st_size} for p in root.rglob("*") if p.is_file()]
    info = {"id": name, "sha": COMMIT, "siblings": files, "cardData": {"configs": configs} if configs else {}}
    about = {f"/api/datasets/{name}{rest}": info for rest in ("", "/revision/v1", "/revision/refs%2Fconvert%2Fparquet")}
    return RangeServer(root, f"/datasets/{name}/resolve/{COMMIT}/", about)


@pytest.mark.parametrize(
    "spec",
    ["someone/photos", "someone/photos@v1", "someone/photos/data@v1", "someone/photos@v1/data",
     "someone/photos@~parquet", "someone/photos/data/*.parquet"],
)  # fmt: skip
def test_the_hub_is_read_by_ranges(tmp_path: Path, folder: Path, files: Path, spec: str) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    hub = hub_of(files.parent)
    with hub.server, at_hub(hub.url, tmp_path):
        source = open_source(f"hf://datasets/{spec}")
        assert contents(pickle.loads(pickle.dumps(source))) == contents(open_source(folder))
    assert not list(tmp_path.rglob("*.parquet"))
    assert source.fingerprint() == open_source(files).fingerprint()


def test_configurations_of_a_card(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    for name in ("a/x-0", "a/x-1", "a/y", "a/z", "b/train-0"):
        write(tmp_path / f"{name}.parquet", some(4), ["cat", "dog"])
    paths = {"train": "a/x-*", "validation": ["a/y.parquet"], "unsupervised": "a/z*"}
    configs = [
        {"config_name": "one", "data_files": [{"split": split, "path": path} for split, path in paths.items()]},
        {"config_name": "two", "data_files": "b/*"},
    ]
    hub = hub_of(tmp_path, configs)
    with hub.server, at_hub(hub.url, tmp_path / "cache"):
        with pytest.raises(SourceError, match="several configurations: one, two; name one, as in .*photos/one"):
            open_source("hf://datasets/someone/photos")
        one = open_source("hf://datasets/someone/photos/one@v1")
        two = open_source("hf://datasets/someone/photos/two", val_fraction=0)
        with pytest.raises(SourceError, match="no Parquet files .*configurations one, two; .*@~parquet"):
            open_source("hf://datasets/someone/photos/three")
        with pytest.raises(SourceError, match="the hub has no dataset someone/else"):
            open_source("hf://datasets/someone/else")
    assert (one.size("train"), one.size("val")) == (8, 4)
    assert one.left_out == {"files of split unsupervised (not a known split)": 1}
    assert two.keys("train")[0] == "train/cat/000.jpg"


# --- hostile files


def refused(path: Path, message: str, most: int = 64 << 20) -> None:
    """Opening it is one error of one line, and takes little memory."""
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with pytest.raises(SourceError, match=message) as caught:
        source = open_source(path, val_fraction=0)
        for i in range(source.size("train")):
            source.read("train", i)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert pool.bytes_allocated() - before < most


def with_footer(path: Path, footer: bytes) -> None:
    """Put another footer into a file."""
    data = path.read_bytes()
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:end] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def footer_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


def varint(number: int) -> bytes:
    """A signed number as Thrift's compact protocol writes it."""
    left, out = number * 2, b""
    while left > 127:
        out, left = out + bytes([left & 127 | 128]), left >> 7
    return out + bytes([left])


def test_files_that_are_cut_short_or_none(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", some(8), ["a", "b"])
    whole = path.read_bytes()
    for size in (0, 3, 11, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "is not a whole Parquet file")
    for end in (b"PARE", b"PAR2"):
        path.write_bytes(whole[:-4] + end)
        refused(path, "is not a whole Parquet file")
    path.write_bytes(whole[:-8] + b"\xff\xff\xff\xffPAR1")
    refused(path, "declares a footer of 4294967295 bytes")
    path.write_bytes(whole[:4] + bytes(len(whole) - 8 - len(footer_of(write(path, some(8), ["a", "b"])))) + whole[-4:])
    refused(path, "is damaged or cut short")


def test_sizes_that_a_file_cannot_have(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [(b"x", f"{i}", i % 2) for i in range(5000)], ["a", "b"], group=5000)
    footer = footer_of(path)
    assert footer.count(b"\x16" + varint(5000)) >= 2
    for rows in (1 << 40, (1 << 62) - 1):
        with_footer(path, footer.replace(b"\x16" + varint(5000), b"\x16" + varint(rows)))
        refused(path, f"declares {rows} rows in")
    with_footer(path, footer.replace(b"\x16" + varint(5000), b"\x16" + varint(5001)))
    refused(path, "is damaged or cut short|declares")


def test_a_page_that_becomes_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"image": [bytes(80 << 20), b"x"], "label": [0, 1]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    del table
    refused(path, "a page declares 83886[0-9]{3} bytes")


def test_a_value_that_is_repeated_is_not_copied(tmp_path: Path) -> None:
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([b"x" * (4 << 20)]))
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * (4 << 20)]))
    options: dict[str, Any] = {
        "compression": "zstd",
        "dictionary_pagesize_limit": 1 << 30,
        "store_schema": False,
    }
    pq.write_table(pa.table({"image": large, "label": [0, 1] * 1500}), tmp_path / "a.parquet", **options)
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    source = open_source(tmp_path / "a.parquet", val_fraction=0)
    before = pa.default_memory_pool().bytes_allocated()
    assert len(source.read("train", 2999).data) == 4 << 20
    assert pa.default_memory_pool().bytes_allocated() - before < 320 << 20  # not the 12 GB of 3000 copies
    pq.write_table(pa.table({"image": [b"x"] * 3000, "label": text}), tmp_path / "b.parquet", **options)
    refused(tmp_path / "b.parquet", "a name or label has 4194304 bytes")


def test_absurd_schemas(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    deep = pa.binary()
    for _ in range(90):
        deep = pa.struct([("bytes", deep)])
    pq.write_table(pa.table({"image": pa.array([], deep), "label": pa.array([], pa.int64())}), path)
    refused(path, "no column of images or sounds that can be told")
    pq.write_table(pa.table({f"c{i}": [1] for i in range(5000)}), path)
    refused(path, r"no column of images .* and 4992 more")
    lists = pa.array([[b"x"]], pa.list_(pa.binary()))
    pq.write_table(pa.table({"image": lists, "label": [1]}), path)
    refused(path, "no column of images or sounds that can be told")
    twice = pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"]), pa.array([1])], ["image", "image", "label"])
    pq.write_table(twice, path)
    refused(path, "several columns to choose from: image, image")
    pq.write_table(pa.table({"image": [b"x"], "label": [[1, 2]]}), path)
    refused(path, "column label of .* holds list<element: int64>, not one number or text")
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)
    refused(path, "has no rows with labels")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"info": NaN}', "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}', "no list of class names"),
        (b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "a"]}}}}', "have one name"),
        (
            b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a"]}}}}',
            "label 1, but there are 1 classes; name the labels' column",
        ),
        (b'{"info": {"features": {"other": {"_type": "ClassLabel", "names": ["a"]}}}}', "no single column other"),
        (b'{"info": {"features": {"label": {"_type": "Image"}}}}', "holds int64, not images"),
    ],
    ids=range(9),
)
def test_features_that_are_wrong(tmp_path: Path, features: bytes, message: str) -> None:
    table = pa.table({"image": [b"x"] * 4, "label": [0, 1] * 2}).replace_schema_metadata({b"huggingface": features})
    pq.write_table(table, tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", message)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    pickled = pickle.dumps(Harm())
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    fields = [pa.field("image", pa.binary(), metadata=kind), pa.field("label", pa.int64())]
    table = pa.Table.from_arrays([pa.array([pickled] * 20), pa.array([0, 1] * 10)], schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="none of 20 images drawn from split 'train' can be decoded"):
        latentprep.encode(tmp_path / "x.parquet", **OPTIONS, val_fraction=0, out=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
