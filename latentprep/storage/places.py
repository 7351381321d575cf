"""Where a dataset is stored: a folder, or a URL that works like one. `place(text)` returns either."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from latentprep.errors import UsageError
from latentprep.storage.buckets import Bucket, open_bucket

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.S)
SCHEMES = ("s3", "gs", "http", "https", "hf")


class _Stat(NamedTuple):
    st_size: int


@dataclass(frozen=True)
class RemotePath:
    """A key in a bucket, with the methods of `pathlib.Path` that datasets need. Every folder counts as existing.

    Raises `SystemFault` for a request that fails after all attempts, `UsageError` for writing to a read-only place.
    """

    bucket: Bucket
    key: str

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.key}".rstrip("/")

    def __truediv__(self, below: str) -> RemotePath:
        return RemotePath(self.bucket, f"{self.key}/{below}".strip("/"))

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.bucket, self.key.rpartition("/")[0])

    def resolve(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        return self.is_file() or bool(self.bucket.names(self.key))

    def is_file(self) -> bool:
        return self.bucket.size(self.key) is not None

    def is_dir(self) -> bool:
        return True

    def stat(self) -> _Stat:
        size = self.bucket.size(self.key)
        if size is None:
            raise FileNotFoundError(str(self))
        return _Stat(size)

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self.bucket.names(self.key))

    def read_bytes(self) -> bytes:
        return self.bucket.get(self.key)

    def open(self, mode: str) -> io.BytesIO:
        """The contents of a small file, in memory."""
        return io.BytesIO(self.bucket.get(self.key, most=1 << 30))

    def write_bytes(self, data: bytes) -> None:
        """Write all of it or nothing."""
        self.bucket.put(self.key, data)

    def unlink(self, missing_ok: bool = False) -> None:
        self.bucket.delete(self.key)


Place = Path | RemotePath


def path_of(where: str | os.PathLike[str]) -> Path:
    """A user's path, with ``~`` and ``~name`` replaced by the home folder.

    Raises `UsageError` if there is no such home folder (and no file of that name), or the path is invalid.
    """
    path = Path(where)
    if not os.fspath(where):
        raise UsageError("the path is empty", "give one; write . for the current folder")
    if "\0" in str(path):
        raise UsageError(f"{path} is not a valid path: it contains a zero byte")
    try:
        return path.expanduser()
    except (RuntimeError, KeyError) as error:
        if os.path.lexists(path):
            return path
        user = path.parts[0][1:]
        hint = "give the full path" if user else "set HOME, or give the full path"
        whose = f"there is no user {user}" if user else "the home folder is unknown: HOME is not set"
        raise UsageError(f"{path}: {whose}", hint) from error


def several(given: Any) -> list[Any]:
    """One thing or several, as a list: a text or a path is one, not the letters it is made of."""
    return [given] if isinstance(given, str | os.PathLike) else list(given)


def place(where: str | os.PathLike[str] | RemotePath) -> Place:
    """A folder's path, or ``s3://bucket/…``, ``gs://bucket/…``, ``http(s)://server/…``, ``hf://datasets/owner/name/…``.

    Raises `UsageError` for another kind of URL, `SystemFault` if the package for it is missing.
    """
    if isinstance(where, RemotePath):
        return where
    text = os.fspath(where)
    url = _URL.fullmatch(text)
    if url is None:
        return path_of(text)
    scheme, rest = url[1].lower(), url[2].rstrip("/")
    parts = rest.split("/")
    deep = 3 if scheme == "hf" else 1  # parts that name the bucket
    if scheme not in SCHEMES or not all(parts) or len(parts) < deep or (scheme == "hf" and parts[0] != "datasets"):
        raise UsageError(
            f"a dataset cannot be at {text}",
            "use a folder, s3://bucket/…, gs://bucket/…, http(s)://server/… or hf://datasets/owner/name",
        )
    bucket = open_bucket(f"{scheme}://{'/'.join(parts[:deep])}")
    return RemotePath(bucket, "/".join(parts[deep:]))


def local(where: str | os.PathLike[str] | RemotePath, what: str) -> Path:
    """`place` for something that must be a local folder; `UsageError` for a URL."""
    folder = place(where)
    if isinstance(folder, RemotePath):
        raise UsageError(f"{what} must be a folder on this machine, got {folder}")
    return folder
