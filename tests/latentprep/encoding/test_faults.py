"""What a crash, a power cut, a full disk or a vanishing source may not do. `benchmarks/chaos.py` does more of each."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest

import latentprep
from faults import Disk, committed, digest, full_after, read_only
from latentprep.codecs import make_codec
from latentprep.encoding import driver
from latentprep.encoding.encode import EncodeResult
from latentprep.encoding.pipeline import encode_shard
from latentprep.errors import DatasetError, SourceError, SystemFault
from latentprep.format import EncodedShard, ShardRecord, zarr_store
from latentprep.sources import media
from latentprep.sources.source import Sample, Source, open_source
from latentprep.storage.places import RemotePath
from pictures import jpeg, make_folder, picture


def encode(source: Path | Source, out: Path, **options: object) -> EncodeResult:
    return latentprep.encode(source, **{"codec": "dct", "size": 32, "out": out, "shard_rows": 4, **options})


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, int]]]:
    """The shards whose commit has returned."""
    real, done = driver.commit_shard, set()

    def commit_shard(root: Path, shard: EncodedShard) -> ShardRecord:
        done.discard((shard.record.split, shard.record.index))
        record = real(root, shard)
        done.add((record.split, record.index))
        return record

    monkeypatch.setattr(driver, "commit_shard", commit_shard)
    yield done


@pytest.mark.parametrize("again", [False, True])
def test_a_power_cut_loses_nothing_committed_and_leaves_nothing_half(
    images: Path, tmp_path: Path, commits: set, again: bool
) -> None:
    """At drawn moments, what an unlucky disk keeps: whole shards, and a resumed run ends as an unbroken one."""
    draw, states, left = random.Random(again), 0, []
    out = tmp_path / "disk" / "new" / "folder" / "out"
    (tmp_path / "disk").mkdir()
    if again:  # a shard is made again, with other bytes of the same files
        good = (images / "train" / "class_0" / "001.jpg").read_bytes()
        (images / "train" / "class_0" / "001.jpg").write_bytes(b"junk")
        for folder in (tmp_path / "whole", out):
            encode(images, folder)
        (images / "train" / "class_0" / "001.jpg").write_bytes(good)
    encode(images, tmp_path / "whole")
    commits.clear()
    commits |= committed(out)

    def at(event: str) -> None:
        nonlocal states
        if draw.random() > (1 if again else 0.15):  # at every moment of the few that one shard has
            return
        for lost in (1.0, 0.0, 0.5):
            states += 1
            kept = tmp_path / f"cut{states}"
            disk.cut(kept, lost, draw)
            here = committed(kept / "new" / "folder" / "out")
            assert commits <= here, (event, lost)
            if states % 12 == 0 and here:
                left.append(kept / "new" / "folder" / "out")

    disk = Disk(tmp_path / "disk", tmp_path / "attic", at)
    with disk.watching():
        encode(images, out)
    assert states > 30
    assert digest(out) == digest(tmp_path / "whole")
    assert left
    for kept in left:
        encode(images, kept)
        assert digest(kept) == digest(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
def test_a_disk_full_in_the_middle_of_a_shard(images: Path, tmp_path: Path, share: float) -> None:
    encode(images, tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    with full_after(int(share * size)), pytest.raises(SystemFault, match=r"no space left.*free some space"):
        encode(images, tmp_path / "out")
    before = committed(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with full_after(10), pytest.raises(SystemFault):
        encode(images, tmp_path / "out")
    assert committed(tmp_path / "out") == before
    encode(images, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_read_only_target(images: Path, tmp_path: Path) -> None:
    with read_only(), pytest.raises(SystemFault, match=r"read-only file system.*choose another folder"):
        encode(images, tmp_path / "out")
    encode(images, tmp_path / "out")
    before = digest(tmp_path / "out")
    (tmp_path / "out" / "records" / "val-000000.json").unlink()
    with read_only(), pytest.raises(SystemFault, match="read-only"):
        encode(images, tmp_path / "out")
    with read_only():
        assert not latentprep.verify(tmp_path / "out").ok  # which needs no writing
    encode(images, tmp_path / "out")
    assert digest(tmp_path / "out") == before


class Meddled:
    """A source in which something happens just before its `count`-th read."""

    def __init__(self, source: Source, count: int, what) -> None:  # type: ignore[no-untyped-def]
        self.source, self.left, self.what, self.lock = source, count, what, threading.Lock()
        self.real, source.read = source.read, self.read  # type: ignore[method-assign]

    def read(self, split: str, i: int) -> Sample:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.what()
        return self.real(split, i)


@pytest.mark.parametrize("how", ["vanish", "cut short"])
def test_a_source_that_changes_under_way_costs_its_rows_only(images: Path, tmp_path: Path, how: str) -> None:
    encode(images, tmp_path / "whole")
    file = images / "val" / "class_1" / "002.jpg"
    good = file.read_bytes()
    source = open_source(images)
    Meddled(source, 20, file.unlink if how == "vanish" else lambda: file.write_bytes(good[:300]))
    result = encode(source, tmp_path / "out", max_error_fraction=0.5)
    assert result.invalid == 1
    (line,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "val/class_1/002.jpg"
    file.write_bytes(good)
    assert encode(images, tmp_path / "out").encoded == 2  # the shard of that row
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_image_swapped_for_another_under_way_is_found_by_verify(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "whole")
    file = images / "val" / "class_1" / "002.jpg"
    good = file.read_bytes()
    source = open_source(images)
    Meddled(source, 20, lambda: file.write_bytes(jpeg(picture(99))))
    assert encode(source, tmp_path / "out").invalid == 0
    file.write_bytes(good)
    found = latentprep.verify(tmp_path / "out", source=open_source(images))
    assert [(p.split, p.index) for p in found.problems] == [("val", 1)]
    assert latentprep.verify(tmp_path / "out", source=open_source(images), repair=True).ok
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_whole_source_that_vanishes_ends_the_run_and_can_come_back(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "whole")
    source = open_source(images)
    Meddled(source, 24, lambda: images.rename(tmp_path / "away"))
    with pytest.raises(SourceError, match="cannot be read, more than"):
        encode(source, tmp_path / "out")
    (tmp_path / "away").rename(images)
    encode(images, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(("module", "where"), [(media, "load_views"), (zarr_store, "encode_shard_files")])
def test_a_worker_that_dies_ends_the_run_and_loses_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, where: str
) -> None:
    encode(images, tmp_path / "whole")
    real, calls = getattr(module, where), []

    def die(*args: object, **kwargs: object) -> object:
        calls.append(0)
        if len(calls) == (26 if where == "load_views" else 3):
            raise MemoryError("worker")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, where, die)
    with pytest.raises(MemoryError, match="worker"):
        encode(images, tmp_path / "out")
    monkeypatch.undo()
    before = committed(tmp_path / "out")
    encode(images, tmp_path / "out")
    assert before
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_of_two_encodes_at_once_the_second_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images", train=150, val=10)
    command = [sys.executable, "-m", "latentprep", "encode", str(source), "--codec", "dct", "--shard-rows", "4"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stdout=-3, stderr=-3)
    try:
        while process.poll() is None and not (tmp_path / "out" / "records").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)  # alive, and holding the folder
        with pytest.raises(DatasetError, match="is being written by another latentprep encode"):
            encode(source, tmp_path / "out", size=None)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    encode(source, tmp_path / "out", size=None)
    encode(source, tmp_path / "whole", size=None)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_what_makes_shards_is_closed_when_a_commit_fails(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads wait for zarr's, in which the garbage collector may close it: both would stop for ever."""
    encode(images, tmp_path / "whole")
    dataset, closed = latentprep.open(tmp_path / "whole"), []

    def shards() -> Generator[EncodedShard, None, None]:
        try:
            for shard in dataset.manifest.shards():
                yield encode_shard(dataset.manifest, open_source(images), make_codec("dct"), shard)
        finally:
            closed.append(True)

    def full(root: Path, shard: EncodedShard) -> ShardRecord:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(driver, "commit_shard", full)
    kept = shards()  # a reference, as a traceback has
    with pytest.raises(OSError, match="No space"):
        driver.commit_shards(dataset, kept, lambda record: None)
    assert closed == [True]


@pytest.mark.parametrize(("kind", "at_once"), [(Path, 1), (RemotePath, 16)])
def test_shards_are_written_one_by_one_to_a_disk_and_many_at_once_to_a_bucket(
    kind: type, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, active, done = threading.Barrier(at_once), list[int](), list[int]()

    def commit(root: Path, shard: int) -> int:
        active.append(shard)
        together.wait(10)  # broken if fewer come
        time.sleep(0.002)
        assert len(active) <= at_once
        active.remove(shard)
        return shard

    monkeypatch.setattr(driver, "commit_shard", commit)
    dataset = Mock(root=Mock(spec=kind), remember=lambda record: record)
    driver.commit_shards(dataset, (shard for shard in range(32)), done.append)
    assert done == list(range(32))
