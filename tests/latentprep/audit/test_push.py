"""`push`, and datasets on the hub: the real client against a small server on loopback that answers as the hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import latentprep
from inprocess import at_hub, command
from latentprep.audit.hub import card
from loopback import Loopback
from pictures import make_folder

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
NAME, COMMIT = "someone/codes", "a" * 40


class FakeHub:
    """What was pushed, and a server of it. faults: how many of the next file requests are answered with 503."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.commits, self.faults = 0, 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.get(body=False)

            def do_GET(self) -> None:
                self.get(body=True)

            def get(self, body: bool) -> None:
                prefix = f"/datasets/{NAME}/resolve/"
                path = self.path.partition("?")[0]
                name = path.removeprefix(prefix).partition("/")[2]
                if not path.startswith(prefix) or name not in hub.files:
                    self.reply(
                        404, b"{}", {"X-Error-Code": "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"}
                    )
                elif hub.faults > 0:
                    hub.faults -= 1
                    self.reply(503, b"")
                else:
                    data = hub.files[name]
                    etag = f'"{hashlib.sha1(data).hexdigest()}"'
                    self.reply(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/repos/create":
                    hub.made.append(json.loads(data))
                    self.json({"url": f"http://127.0.0.1/datasets/{NAME}"})
                elif "/preupload/" in self.path:
                    files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(data)["files"]]
                    self.json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
                elif "/commit/" in self.path:
                    hub.commits += 1
                    for line in map(json.loads, data.splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    self.json({"commitUrl": f"http://127.0.0.1/{NAME}/commit/{COMMIT}", "commitOid": COMMIT})
                else:
                    self.json({"warnings": [], "errors": []})

            def json(self, document: dict) -> None:
                self.reply(200, json.dumps(document).encode())

            def reply(self, status: int, data: bytes, headers: dict | None = None, body: bool = True) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Loopback(Handler)
        self.endpoint = self.server.url


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    yield fake
    fake.server.close()


def latentprep_cli(endpoint: str, home: Path, *arguments: object) -> CompletedProcess[str]:
    environment = {**os.environ, "HF_TOKEN": "hf_test", "LATENTPREP_CACHE": str(home / "cache")}
    with at_hub(endpoint, home / "hub"):
        return command("latentprep", *arguments, env=environment)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("store", ["zarr", "wds", "parquet"])
def test_what_is_pushed_is_read_again(hub: FakeHub, tmp_path: Path, store: str) -> None:
    images, data = make_folder(tmp_path / "images"), tmp_path / "data"
    (images / "train" / "class_0" / "001.jpg").write_bytes(b"junk")
    latentprep.encode(images, codec="dct", size=32, shard_rows=8, store=store, out=data)
    (data / "notes.txt").write_text("not of the dataset")
    done = latentprep_cli(hub.endpoint, tmp_path / "home", "push", data, NAME, "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["place"] == f"hf://datasets/{NAME}"
    others = ("notes.txt", "source-files.safetensors")  # neither is pushed
    ours = {path: content for path, content in files_of(data).items() if path not in others}
    assert hub.commits == 1
    assert (hub.made[0]["type"], hub.made[0]["visibility"]) == ("dataset", "private")
    assert hub.files.pop("README.md").decode() == card(latentprep.open(data), NAME)
    assert hub.files == ours

    hub.faults = 1
    line = ("convert", f"hf://datasets/{NAME}", tmp_path / "back", "--store", store)
    done = latentprep_cli(hub.endpoint, tmp_path / "home", *line)
    assert done.returncode == 0, done.stderr
    assert hub.faults == 0
    assert {
        str(p.relative_to(tmp_path / "back")): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()
    } == ours
    absent = latentprep_cli(hub.endpoint, tmp_path / "home", "info", "hf://datasets/someone/absent")
    assert absent.returncode == 6, absent.stderr
    assert "hf://datasets/someone/absent: no such folder" in absent.stderr


def test_a_damaged_dataset_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    latentprep.encode(make_folder(tmp_path / "images"), codec="dct", size=32, store="wds", out=data)
    (data / "val-000000.tar").write_bytes(b"cut short")
    done = latentprep_cli(hub.endpoint, tmp_path / "home", "push", data, NAME)
    assert done.returncode == 6
    assert "shard val 0: val-000000.tar has 9 bytes" in done.stderr
    assert not hub.files
    assert "must be owner/name" in latentprep_cli(hub.endpoint, tmp_path / "home", "push", data, "codes").stderr


def test_no_hub_says_the_way_out(tmp_path: Path) -> None:
    data = tmp_path / "data"
    latentprep.encode(make_folder(tmp_path / "images"), codec="dct", size=32, out=data)
    done = latentprep_cli("http://127.0.0.1:9", tmp_path / "home", "push", data, NAME)
    assert done.returncode == 8, done.stderr
    assert "cannot push to someone/codes" in done.stderr and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_card_says_what_the_dataset_is(tmp_path: Path) -> None:
    latentprep.encode(make_folder(tmp_path / "images"), codec="dct", size=32, bits=3, out=tmp_path / "data")
    text = card(latentprep.open(tmp_path / "data"), NAME)
    assert text.startswith('---\npretty_name: "codes"\n')
    for fact in (
        "bits per code: 3",
        '"name": "dct"',
        "latenttrain fit hf://datasets/someone/codes",
        "n<1K",
        '"class_0"',
    ):
        assert fact in text


@pytest.mark.parametrize("views", [1, 2])
def test_datasets_loads_a_pushed_parquet_store_by_its_card(tmp_path: Path, views: int) -> None:
    """As the hub would: the README beside the files, and no code of ours."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    names = ('say "cheese"', "naïve 🧀: #1", "no")
    root, images = tmp_path / "data", make_folder(tmp_path / "images", classes=3)
    for number, name in enumerate(names):
        for split in ("train", "val"):
            (images / split / f"class_{number}").rename(images / split / name)
    options = {"codec": "resample:factor=4", "size": 32, "views": views, "shard_rows": 8}
    latentprep.encode(images, **options, out=tmp_path / "zarr")
    latentprep.fit_linear_decoder(tmp_path / "zarr", images)
    latentprep.convert(tmp_path / "zarr", out=root, store="parquet")
    ours = latentprep.open(root)
    (root / "README.md").write_text(card(ours, NAME))
    loaded = datasets.load_dataset(str(root), cache_dir=str(tmp_path / "cache"))
    assert {split: len(found) for split, found in loaded.items()} == ours.manifest.splits
    info = datasets.load_dataset_builder(str(root), cache_dir=str(tmp_path / "other")).info  # by the card alone
    assert {split: found.num_examples for split, found in info.splits.items()} == ours.manifest.splits
    sizes = {split: sum(path.stat().st_size for path in root.glob(f"data/{split}-*")) for split in ours.splits}
    assert {split: found.num_bytes for split, found in info.splits.items()} == sizes
    assert info.features == loaded["val"].features
    assert list(info.features) == ["key", "label", "codes", "valid", "thumbnail", "hash"]
    assert info.features["label"].names == list(ours.classes) == sorted(names)
    shape = (3, 8, 8) if views == 1 else (None, 3, 8, 8)
    assert info.features["codes"].shape == shape and info.features["codes"].dtype == "uint8"
    found, wanted = loaded["val"].with_format("numpy")[:], ours.load("val")
    assert (found["codes"].reshape(wanted.codes.shape) == wanted.codes).all()
    assert loaded["val"][0]["thumbnail"].size == (48, 48)
    assert "load_dataset" not in card(latentprep.open(tmp_path / "zarr"), NAME)
