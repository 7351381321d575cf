"""Named datasets: their tables, copies given with `data`, and downloads that resume, against a server on loopback."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from told import Told

from latentprep.errors import SourceError, SystemFault, UsageError
from latentprep.sources import named as datasets
from latentprep.sources.source import open_source
from loopback import Loopback

PAYLOAD = bytes(range(256)) * 4000  # 1 MB


class Server(Loopback):
    """Serves ``payload``; ``cuts`` are the byte counts after which the next answers break off."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.payload = PAYLOAD
        self.cuts: list[int] = []
        self.codes: list[int] = []
        self.ranges = True
        self.requests: list[str | None] = []
        self.url += "/set.tgz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        if server.codes:
            self.send_error(server.codes.pop(0))
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(server.payload):
            self.send_error(416)
            return
        body = server.payload[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(datasets, "_BACKOFF", 0.0)
    with Server() as server:
        yield server


MD5 = hashlib.md5(PAYLOAD).hexdigest()


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_download_with_progress(server, tmp_path):
    told = Told()
    datasets.download(server.url, tmp_path / "set.tgz", MD5, told)
    assert (tmp_path / "set.tgz").read_bytes() == PAYLOAD
    assert files(tmp_path) == ["set.tgz"]
    assert told.begun == [(f"{what} set.tgz", len(PAYLOAD), "bytes", 0) for what in ("downloading", "checking")]
    assert sum(told.steps) == 2 * len(PAYLOAD)


def test_a_transfer_that_breaks_off_goes_on_where_it_was(server, tmp_path):
    server.cuts = [300_000, 0, 300_000]
    datasets.download(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz").read_bytes() == PAYLOAD
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in server.requests[1:] if asked]
    assert server.requests[0] is None
    assert 200_000 < starts[0] == starts[1] < starts[2]


def test_a_later_run_goes_on_from_the_part_file(server, tmp_path):
    (tmp_path / "set.tgz.part").write_bytes(PAYLOAD[:777])
    datasets.download(server.url, tmp_path / "set.tgz", MD5)
    assert server.requests == ["bytes=777-"]
    (tmp_path / "other.part").write_bytes(PAYLOAD)
    datasets.download(server.url, tmp_path / "other", MD5)
    assert (tmp_path / "other").read_bytes() == (tmp_path / "set.tgz").read_bytes() == PAYLOAD


def test_two_at_once_download_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: datasets.download(server.url, tmp_path / "set.tgz", MD5), range(4)))
    assert (tmp_path / "set.tgz").read_bytes() == PAYLOAD
    assert len(server.requests) == 1
    assert files(tmp_path) == ["set.tgz"]


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "set.tgz.part").write_bytes(b"x" * 777)
    datasets.download(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz").read_bytes() == PAYLOAD


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.codes = [503, 429, 500]
    datasets.download(server.url, tmp_path / "set.tgz", MD5)
    assert (tmp_path / "set.tgz").read_bytes() == PAYLOAD


def test_a_wrong_checksum_keeps_nothing(server, tmp_path):
    server.payload = b"something else"
    with pytest.raises(SourceError, match=r"has MD5 .*, not .*; it was deleted"):
        datasets.download(server.url, tmp_path / "set.tgz", MD5)
    assert files(tmp_path) == []


@pytest.mark.parametrize(("codes", "message"), [([404], "404 Not Found"), ([403], "403"), ([503] * 9, "503")])
def test_a_refusal_names_the_way_out(server, tmp_path, monkeypatch, codes, message):
    server.codes = list(codes)
    monkeypatch.setattr(datasets, "_URL", server.url + "?{}")
    with pytest.raises(SourceError, match=rf"imagenette-160: cannot download .*{message}.*with data"):
        open_source("imagenette-160", cache=tmp_path)
    assert not (tmp_path / "imagenette2-160.tgz").exists()
    assert len(server.requests) == min(len(codes), 5)


def test_no_network(server, tmp_path, monkeypatch):
    server.server_close()
    monkeypatch.setattr(datasets, "_URL", server.url + "?{}")
    with pytest.raises(SourceError, match=r"refused; check the network and run again, or .*with data") as caught:
        open_source("imagewoof", cache=tmp_path)
    assert " at 0x" not in str(caught.value)


def test_a_cached_archive_is_used_without_a_request(server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_URL", server.url + "?{}")
    monkeypatch.setenv("LATENTPREP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(datasets._ARCHIVES, "imagenette", ("set.tgz", MD5))
    assert datasets.fetch("imagenette") == datasets.fetch("imagenette") == tmp_path / "cache" / "set.tgz"
    assert len(server.requests) == 1


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemFault):
        open_source("imagenette", cache=tmp_path / "file" / "cache")


def test_a_copy_that_is_here_already(tmp_path):
    for split in ("train", "val"):
        for wnid in datasets._IMAGEWOOF:
            (tmp_path / "imagewoof2" / split / wnid).mkdir(parents=True)
            (tmp_path / "imagewoof2" / split / wnid / "1.JPEG").write_bytes(b"\xff\xd8\xff")
    source = open_source("imagewoof-320", data=tmp_path)
    assert source.spec == "imagewoof-320"
    assert source.classes[:2] == ("Shih-Tzu", "Rhodesian ridgeback")
    assert source.keys("val")[0] == "val/n02086240/1.JPEG"
    with pytest.raises(SourceError, match=r"is no copy of imagenette: its classes are n02086240, n02087394 …"):
        open_source("imagenette", data=tmp_path)
    with pytest.raises(SourceError, match="no such file or folder: nothing"):
        open_source("imagenette", data="nothing")


@pytest.mark.parametrize("spec", ["shapes", "some/folder"])
def test_data_is_for_datasets_that_are_downloaded(tmp_path, spec):
    with pytest.raises(UsageError, match="use it with imagenette, imagenette-320, "):
        open_source(spec, data=tmp_path)


def test_a_name_goes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    for name in ("shapes/ant", "shapes/bee"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert open_source("shapes").size("train") == 5000
    assert open_source("./shapes").classes == open_source(Path("shapes")).classes == ("ant", "bee")


assets = os.environ.get("LATENTPREP_ASSETS", "")


@pytest.mark.skipif(not assets, reason="LATENTPREP_ASSETS is not set")
def test_all_of_imagenette():
    source = open_source("imagenette", data=Path(assets) / "imagenette2-224.tar")
    assert {split: source.size(split) for split in source.splits} == {"train": 9469, "val": 3925}
    assert source.classes[:2] == ("tench", "English springer")
    assert source.read("val", 3924).data.startswith(b"\xff\xd8\xff")
