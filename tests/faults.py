"""Disks that fail: one that loses, at a power cut, what was not flushed; one that is full; one that is read-only. And
what must hold of a dataset afterwards.

They stand between the program and the real disk by replacing, for a while, the few functions that `pathlib` calls.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import latentprep


class Disk:
    """Watches what happens below the folder `root`, and builds what a power cut could leave of it at this moment.

    A file's bytes are sure to last since its last fsync, a folder's names since the folder's. Beyond that, anything
    goes: a name may be the old or the new one, a file may be empty, cut short, full of zeros or whole. What is there
    at the start lasts. `at(event)` is called after each event (and before each fsync), under a lock.
    """

    def __init__(self, root: Path, attic: Path, at: Callable[[str], None] = lambda event: None) -> None:
        self.root, self.attic, self.at, self.events = str(root.resolve()), attic, at, 0
        attic.mkdir()
        self._lock = threading.RLock()
        self._names: dict[str, dict[str, int]] = {}  # folder -> name -> inode, as flushed
        self._bytes: dict[int, bytes] = {}  # inode -> bytes, as flushed
        for folder, _, files in os.walk(self.root):
            self._names[folder] = self._listing(folder)
            for name in files:
                self._keep(f"{folder}/{name}")
                self._flush(f"{folder}/{name}")

    @contextmanager
    def watching(self) -> Iterator[Disk]:
        real_open, real_fsync = io.open, os.fsync

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode or not self._mine(file):
                return real_open(file, mode, *args, **kwargs)
            with self._lock:
                handle = real_open(file, mode, *args, **kwargs)
                self._keep(os.fspath(file))
                self._event("open")
                return handle

        def fsync(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if self._mine(path):
                with self._lock:
                    self._event("before fsync")
                    self._flush(path)
                    self._event("fsync")
            else:
                real_fsync(descriptor)

        def also(name: str) -> Any:
            real = getattr(os, name)

            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                with self._lock:
                    result = real(path, *args, **kwargs)
                    if self._mine(path):
                        self._event(name)
                    return result

            return mock.patch.object(os, name, call)

        with (
            mock.patch.object(io, "open", opened),
            mock.patch.object(os, "fsync", fsync),
            also("replace"),
            also("unlink"),
            also("mkdir"),
        ):
            yield self

    def cut(self, out: Path, lost: float, draw: random.Random) -> None:
        """Build in `out` what is left if each unflushed thing is lost with probability `lost`."""
        with self._lock:
            self._rebuild(self.root, out, lost, draw)

    def _rebuild(self, folder: str, out: Path, lost: float, draw: random.Random) -> None:
        out.mkdir()
        old, new = self._names.get(folder, {}), self._listing(folder) if Path(folder).is_dir() else {}
        for name in sorted(old.keys() | new.keys()):
            inode = (old if draw.random() < lost else new).get(name)
            if inode is None:
                continue
            kept = self.attic / str(inode)
            if not kept.exists():
                self._rebuild(f"{folder}/{name}", out / name, lost, draw)
                continue
            sure, now = self._bytes.get(inode, b""), kept.read_bytes()
            some = now[: draw.randrange(len(now) + 1)]
            (out / name).write_bytes(sure if sure == now else draw.choice((sure, now, some, bytes(len(now)))))

    def _event(self, name: str) -> None:
        self.events += 1
        self.at(name)

    def _mine(self, path: Any) -> bool:
        return os.path.realpath(path).startswith(f"{self.root}/") or os.path.realpath(path) == self.root

    def _keep(self, path: str) -> None:
        """A second name for the file, so that no other gets its inode's number."""
        kept = self.attic / str(Path(path).stat().st_ino)
        if not kept.exists():
            os.link(path, kept)

    def _flush(self, path: str) -> None:
        if Path(path).is_dir():
            self._names[path] = self._listing(path)
        else:
            self._bytes[Path(path).stat().st_ino] = Path(path).read_bytes()

    def _listing(self, folder: str) -> dict[str, int]:
        with os.scandir(folder) as entries:
            return {entry.name: entry.inode() for entry in entries}


@contextmanager
def full_after(count: int, code: int = errno.ENOSPC) -> Iterator[None]:
    """A disk that is full after so many bytes: the write that does not fit is half done, and all later ones fail."""
    real_open, left = io.open, [count]

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = real_open(file, mode, *args, **kwargs)
        if "w" in mode:
            real_write = handle.write

            def write(data: bytes) -> int:
                left[0] -= len(data)
                if left[0] < 0:
                    real_write(data[: len(data) // 2])
                    handle.flush()
                    raise OSError(code, os.strerror(code))
                return real_write(data)

            proxy = mock.MagicMock(wraps=handle)
            proxy.write = write
            proxy.__enter__.return_value = proxy
            proxy.__exit__.side_effect = lambda *error: handle.close()
            return proxy
        return handle

    with mock.patch.object(io, "open", opened):
        yield


@contextmanager
def read_only() -> Iterator[None]:
    """A disk on which nothing can be made."""

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    real_open = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return real_open(file, mode, *args, **kwargs) if set(mode) <= set("rbt") else refuse(file)

    with mock.patch.object(io, "open", opened), mock.patch.object(os, "mkdir", refuse):
        yield


def digest(root: Path) -> dict[str, str]:
    """path -> SHA-256 of every file of a dataset but the temporaries that a crash leaves, and the source's times."""
    files = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".tmp" and p.name != "source-files.safetensors")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def committed(root: Path) -> set[tuple[str, int]]:
    """The shards that are there, all of them whole; nothing else is wrong but what a resumed encode makes."""
    if not (root / "manifest.json").exists():
        return set()
    found = latentprep.verify(root, deep=True)
    missing = {(p.split, p.index) for p in found.problems if p.what == "is not committed"}
    others = [p for p in found.problems if p.what != "is not committed" and p.split is not None]
    assert not others, others
    dataset = latentprep.open(root)
    return {(s, i) for s in dataset.splits for i in range(dataset.manifest.shard_count(s))} - missing
