"""Datasets at URLs: a real S3 server on loopback, behind a proxy that injects faults; and a plain web server."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from s3 import FAULTS, Proxy, running
from told import Interrupting

import latentprep
import latenttrain
from latentprep.errors import DatasetError, Interrupted, SystemFault, UsageError
from latentprep.storage import buckets, lease
from latentprep.storage.atomic import locked
from latentprep.storage.cache import ShardCache
from latentprep.storage.places import RemotePath, place
from loopback import Loopback
from pictures import make_folder

pytest.importorskip("obstore", reason="obstore is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytest.importorskip("flask", reason="flask, which moto's server needs, is not installed")

OPTIONS = {"codec": "dct", "size": 64, "shard_rows": 8}
SMALL = {"width": 0.25, "depth": 0.5, "epochs": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with running() as port:
        yield port


@pytest.fixture
def through(server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """``through(share, kinds)`` -> a proxy to the S3 server, which the library uses from then on."""
    quick = {"init_backoff": timedelta(milliseconds=2), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setattr(buckets, "_RETRIES", {**buckets._RETRIES, "backoff": quick})
    monkeypatch.setattr(buckets, "PAUSE", 0.005)
    monkeypatch.setenv("LATENTPREP_CACHE", str(tmp_path / "cache"))
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    proxies = []

    def use(share: float = 0.0, kinds: tuple[str, ...] = FAULTS) -> Proxy:
        proxies.append(Proxy(server, share, kinds))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxies[-1].port}")
        buckets.open_bucket.cache_clear()
        return proxies[-1]

    yield use
    buckets.open_bucket.cache_clear()
    for proxy in proxies:
        proxy.server.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("remote") / "images", train=20, val=5)
    (root / "train" / "class_1" / "003.jpg").write_bytes(b"junk")
    return root


def files(root: Path | RemotePath) -> dict[str, bytes]:
    """path: bytes of everything below a folder or key."""
    if isinstance(root, Path):
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    found: dict[str, bytes] = {}
    for entry in root.iterdir():
        below = files(entry)
        found |= {f"{entry.name}/{path}": data for path, data in below.items()} if below else {}
        if entry.is_file():
            found[entry.name] = entry.read_bytes()
    return found


def numbers(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("store", ["zarr", "wds", "parquet"])
def test_through_faults_an_encode_and_a_fit_equal_the_local_ones(
    through: Callable[..., Proxy], images: Path, tmp_path: Path, store: str
) -> None:
    faulty = through(0.3)
    url = f"s3://bucket/faults/{store}"
    latentprep.encode(images, **OPTIONS, store=store, out=tmp_path / "local")
    result = latentprep.encode(images, **OPTIONS, store=store, out=url)
    assert result.out == url
    assert result.encoded == 50
    remote, local = latentprep.open(url, cache_bytes=0), latentprep.open(tmp_path / "local")
    for split in ("train", "val"):
        ours, theirs = remote.load(split), local.load(split)
        assert np.array_equal(ours.codes, theirs.codes)
        assert np.array_equal(ours.labels, theirs.labels)
        assert ours.keys == theirs.keys
    for dataset, name in ((remote, "remote"), (local, "local-run")):
        latenttrain.fit(dataset, **SMALL, stream=True, out=tmp_path / name)
    assert numbers(tmp_path / "remote") == numbers(tmp_path / "local-run")
    weights = [(tmp_path / run / "best.safetensors").read_bytes() for run in ("remote", "local-run")]
    assert weights[0] == weights[1]
    assert min(faulty.injected[fault] for fault in FAULTS) >= 2, faulty.injected
    through()
    assert files(place(url)) == files(tmp_path / "local")  # byte for byte, and no lock is left


def test_a_broken_off_encode_goes_on_in_the_bucket(through: Callable[..., Proxy], images: Path, tmp_path: Path) -> None:
    through()
    url = "s3://bucket/resumed"

    with pytest.raises(Interrupted):
        latentprep.encode(images, **OPTIONS, batch_size=4, out=url, progress=Interrupting(30, "encoding"))
    some = sum(len(latentprep.open(url).records(split)) for split in ("train", "val"))
    assert 0 < some < 7
    latentprep.encode(images, **OPTIONS, batch_size=4, out=url)
    latentprep.encode(images, **OPTIONS, batch_size=4, out=tmp_path / "local")
    assert files(place(url)) == files(tmp_path / "local")
    latentprep.encode(images, **OPTIONS, store="wds", out=url, overwrite=True)
    latentprep.convert(tmp_path / "local", out=tmp_path / "tars", store="wds")
    assert files(place(url)) == files(tmp_path / "tars")


def test_one_writer_at_a_time(through: Callable[..., Proxy], images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through(0.3, ("503", "lost answer"))
    monkeypatch.setattr(lease, "LEASE", 0.6)
    root = place("s3://bucket/locked")
    with locked(root):
        with pytest.raises(DatasetError, match=r"s3://bucket/locked is being written by another"):
            latentprep.encode(images, **OPTIONS, out=str(root))
        time.sleep(1.5)  # longer than a lease: the holder renews it
        with pytest.raises(DatasetError, match="being written by another"), locked(root):
            pass
    (root / lease.LOCK).write_bytes(b'{"owner": "one that died"}')
    with locked(root):  # after a lease in which nobody renewed it
        pass
    assert not (root / lease.LOCK).is_file()
    with pytest.raises(DatasetError, match="another latentprep encode took over"), locked(root):
        (root / lease.LOCK).write_bytes(b'{"owner": "one that thought us dead"}')
        time.sleep(0.6)


def test_a_cache_keeps_what_was_fetched(through: Callable[..., Proxy], images: Path, tmp_path: Path) -> None:
    proxy = through()
    url, cache = "s3://bucket/cached", tmp_path / "kept"
    latentprep.encode(images, **OPTIONS, store="wds", out=url)
    first = latentprep.open(url, cache_dir=cache).load("train")
    assert len(list(cache.iterdir())) == 5

    def asked() -> int:
        before = proxy.asked
        found = latentprep.open(url, cache_dir=cache).load("train")
        assert np.array_equal(found.codes, first.codes)
        return proxy.asked - before

    assert asked() == 1 + 5  # manifest and records
    damaged = min(cache.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert asked() == 1 + 5 + 1  # and the one that is damaged here
    assert asked() == 1 + 5
    opened = latentprep.open(url, cache_bytes=0)
    assert opened.cache is None
    with pytest.raises(UsageError, match="must be a folder on this machine"):
        latentprep.open(url, cache_dir="s3://bucket/cache")


def test_what_is_damaged_in_the_bucket_is_named_and_repaired(through: Callable[..., Proxy], images: Path) -> None:
    from latentprep.sources.source import open_source

    through()
    root = place("s3://bucket/damaged")
    latentprep.encode(images, **OPTIONS, store="wds", out=str(root))
    whole = files(root)
    (root / "train-000001.tar").write_bytes(whole["train-000001.tar"].replace(b"ustar", b"Ustar", 1))
    with pytest.raises(DatasetError, match=r"s3://bucket/damaged: shard train 1: train-000001.tar was altered"):
        latentprep.open(str(root)).load("train")
    found = latentprep.verify(str(root))
    assert [(problem.split, problem.index) for problem in found.problems] == [("train", 1)]
    assert latentprep.verify(str(root), source=open_source(images), repair=True).ok
    assert files(root) == whole


def test_a_store_that_stays_away_is_said(through: Callable[..., Proxy], images: Path) -> None:
    through(1.0, ("503",))
    with pytest.raises(SystemFault, match=r"cannot read s3://bucket/away/manifest.json.*run the same command again"):
        latentprep.open("s3://bucket/away")
    through()
    with pytest.raises(DatasetError, match="s3://bucket/nothing: no such folder"):
        latentprep.open("s3://bucket/nothing")
    (place("s3://bucket/other") / "notes.txt").write_bytes(b"mine")
    with pytest.raises(DatasetError, match=r"is not empty and holds no latent dataset \(it has notes.txt\)"):
        latentprep.encode(images, **OPTIONS, out="s3://bucket/other")


@pytest.mark.parametrize("where", ["ftp://x/y", "s3://", "s3:///y", "hf://models/x/y", "hf://datasets/x", "file:///x"])
def test_urls_of_no_known_kind_are_refused(where: str) -> None:
    with pytest.raises(UsageError, match="a dataset cannot be at"):
        place(where)


@pytest.mark.parametrize("where", ["pipe:cat /etc/passwd", "$(ls)", "`ls`", "a b; ls"])
def test_commands_are_names_of_folders_and_nothing_else(where: str) -> None:
    assert place(where) == Path(where)
    with pytest.raises(DatasetError, match="no such folder"):
        latentprep.open(where)


def test_a_web_server_is_read_and_never_written(through: Callable[..., Proxy], images: Path, tmp_path: Path) -> None:
    through()
    latentprep.encode(images, **OPTIONS, out=tmp_path / "site" / "codes")
    (tmp_path / "site" / "codes" / "records" / "val-000001.json").unlink()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    web = Loopback(functools.partial(Quiet, directory=tmp_path / "site"))
    url = f"{web.url}/codes/"
    dataset, local = latentprep.open(url), latentprep.open(tmp_path / "site" / "codes")
    assert np.array_equal(dataset.load("train").codes, local.load("train").codes)
    with pytest.raises(DatasetError, match="1 of 2 shards of split 'val' are missing"):
        dataset.load("val")
    with pytest.raises(UsageError, match="can only be read"):
        latentprep.encode(images, **OPTIONS, out=url)
    web.close()


def test_processes_that_share_a_cache_download_a_file_once(images: Path, tmp_path: Path) -> None:
    latentprep.encode(images, **OPTIONS, out=tmp_path / "site" / "codes")
    asked, both = Counter[str](), threading.Event()

    class Slow(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            if self.path.endswith("manifest.json") and asked[self.path] == 2:
                both.set()
            if "/train/" in self.path:
                assert both.wait(60)
                time.sleep(0.1)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    web = Loopback(functools.partial(Slow, directory=tmp_path / "site"))
    cache, url = tmp_path / "cache", f"{web.url}/codes"
    read = f"import latentprep; print(latentprep.open({url!r}, cache_dir={str(cache)!r}).load('train').codes.sum())"
    running = [subprocess.Popen([sys.executable, "-c", read], stdout=subprocess.PIPE) for _ in range(2)]
    found = {process.communicate(timeout=120)[0] for process in running}
    web.close()
    assert found == {b"%d\n" % latentprep.open(tmp_path / "site" / "codes").load("train").codes.sum()}
    files = {path: count for path, count in asked.items() if "/train/" in path}
    assert len(files) >= 3
    assert set(files.values()) == {1}, files
    assert len(list(cache.iterdir())) == len(files)  # and no lock is left


def test_where_files_cannot_be_locked_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ShardCache(tmp_path / "file")
    with cache.fetching("a" * 64), cache.fetching("a" * 64):
        pass
    with pytest.raises(OSError, match="of the download"), ShardCache(tmp_path / "cache").fetching("a" * 64):
        raise OSError("of the download")
    assert not list((tmp_path / "cache").iterdir())


def test_the_oldest_entries_of_a_cache_go_first(tmp_path: Path) -> None:
    import os

    cache = ShardCache(tmp_path / "deep" / "cache", limit=30)
    for age, name in enumerate("abc"):
        cache.write(name * 64, bytes(10))
        os.utime(cache.folder / (name * 64), (age + 1, age + 1))
    assert cache.read("a" * 64) == bytes(10)  # from now on the newest
    cache.write("d" * 64, bytes(12))
    assert sorted(path.name[0] for path in cache.folder.iterdir()) == ["a", "d"]  # of 42 bytes, b and c went
    cache.write("e" * 64, bytes(31))
    assert cache.read("e" * 64) is None
    assert cache.read("b" * 64) is None
    (tmp_path / "file").write_bytes(b"")
    ShardCache(tmp_path / "file").write("a" * 64, b"x")  # a cache that cannot be made is none
