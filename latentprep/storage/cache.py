"""Local copies of remote shards, by checksum. The least recently used ones are deleted first."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from latentprep.errors import SystemFault
from latentprep.storage.places import path_of

LIMIT = 10 << 30  # bytes in the cache, by default


def cache_folder() -> Path:
    """``LATENTPREP_CACHE``, or ``latentprep`` in the user's cache folder. Raises `SystemFault` if there is none."""
    if folder := os.environ.get("LATENTPREP_CACHE"):
        return path_of(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "latentprep"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "latentprep"
    except (RuntimeError, KeyError) as error:
        hint = "set HOME, or set LATENTPREP_CACHE to a folder for downloads"
        raise SystemFault("there is no home folder to keep downloads in", hint) from error


class ShardCache:
    """Files named by the SHA-256 of their contents, `limit` bytes at most. Safe for many threads and processes.

    If the cache cannot be written, or a file in it is damaged, that only costs time, because readers check checksums.
    So all datasets share one folder, and no entry is ever stale.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder or cache_folder() / "shards", limit
        self._evicting = threading.Lock()

    def read(self, sha256: str) -> bytes | None:
        """The entry, marked as just used; None if there is none."""
        path = self.folder / sha256
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    @contextlib.contextmanager
    def fetching(self, sha256: str) -> Iterator[None]:
        """One thread of one process at a time for each entry, so that those who waited find it in the cache.

        Where files cannot be locked nobody waits, which costs a second download.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, ImportError):
                import fcntl

                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{sha256}.lock"
                lock = stack.enter_context(path.open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)  # which ends with the process
                stack.callback(_unlink, path)
            yield

    def write(self, sha256: str, data: bytes) -> None:
        """Add an entry, unless it is larger than the cache, and delete the oldest ones if the cache is full."""
        if len(data) > self.limit:
            return
        part = self.folder / f"{sha256}.{os.getpid()}-{threading.get_ident()}.tmp"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(self.folder / sha256)
            self._evict()
        _unlink(part)

    def _evict(self) -> None:
        with self._evicting:
            entries = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):  # another process was faster
                    stat = entry.stat()
                    entries.append((stat.st_mtime_ns, stat.st_size, entry.path))
            total = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if total <= self.limit:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
