"""Find the Parquet files that a path, a pattern or a URL stands for, and read them by byte ranges."""

from __future__ import annotations

import glob
import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentprep.errors import SourceError
from latentprep.format.thrift import read_struct
from latentprep.sources.kinds import has_parquet_name
from latentprep.sources.offsets import PlainFile
from latentprep.sources.splits import SPLIT_NAMES, splits_of_files
from latentprep.storage.buckets import HubRepository, open_bucket
from latentprep.storage.places import RemotePath, place

MAGIC = b"PAR1"
MOST_FOOTER = 64 << 20  # bytes of a file's footer: thousands of row groups take less than one MiB
_TAIL = 1 << 16  # bytes at the end that are read first: as a rule the whole footer
_LARGE_PAGE, _MOST_RATIO = 64 << 20, 100  # bytes of a page, or their ratio to those compressed, at most: either
_MOST_HEADER = 16 << 20  # bytes of a page's header, which may hold its smallest and largest value
_CONVERTED = "refs/convert/parquet"  # where the hub keeps Parquet files that it made of other datasets
_REVISION = re.compile(r"([^@]*)@(refs/(?:convert|pr)/[^/]+|~parquet|[^/]+)(.*)", re.S)
_WAY_OUT = "give a Parquet file, a folder of them, or a pattern such as 'data/train-*.parquet'"


@dataclass(frozen=True)
class RemoteFile:
    """An object in a bucket, on a server or on the hub. It can be pickled, and has no connection of its own."""

    bucket: str
    key: str

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.key}"

    def pread(self, size: int, offset: int) -> bytes:
        """The ``size`` bytes from ``offset``. Raises SourceError if it is gone, SystemFault if requests fail."""
        try:
            return open_bucket(self.bucket).read(self.key, offset, size) if size else b""
        except FileNotFoundError as error:
            raise SourceError(f"{self.path} is gone, or shorter than it was", "open the source again") from error


@dataclass(frozen=True)
class ParquetFile:
    """One Parquet file of a source. It can be pickled.

    name: its path or URL. size: in bytes. identity: SHA-256 (hex) of its size and footer.
    """

    file: PlainFile | RemoteFile
    size: int
    identity: str = ""

    @property
    def name(self) -> str:
        return str(self.file.path)

    def footer(self) -> bytes:
        """The file's last bytes, from the beginning of its footer. Raises SourceError if it has none."""
        if self.size < 12:
            raise _no_parquet(self.name, f"it has {self.size} bytes")
        tail = self.file.pread(min(self.size, _TAIL), max(0, self.size - _TAIL))
        if tail[-4:] != MAGIC:
            why = "it is cut short" if self.file.pread(4, 0) == MAGIC else "it ends in other bytes than one"
            raise _no_parquet(self.name, "it is encrypted" if tail[-4:] == b"PARE" else why)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > min(MOST_FOOTER, self.size - 4):
            raise _no_parquet(self.name, f"it declares a footer of {length - 8} bytes")
        if length > len(tail):
            tail = self.file.pread(length, self.size - length)
        return tail[-length:]

    def digest(self, footer: bytes) -> str:
        """What `identity` is for this footer."""
        return hashlib.sha256(b"%d " % self.size + footer).hexdigest()

    def open(self) -> io.RawIOBase:
        """The file as pyarrow takes it: it seeks, and reads what it is asked for."""
        return _Stream(self)


class _Stream(io.RawIOBase):
    def __init__(self, parquet: ParquetFile) -> None:
        self._parquet, self._at = parquet, 0
        self._pages: dict[int, _Pages] = {}  # of each column: by the place where its next read begins

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._parquet.size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._parquet.size - self._at)
        data = self._parquet.file.pread(left if size is None or size < 0 else min(size, left), self._at)
        pages = self._pages.pop(self._at, None) or _Pages()
        pages.follow(data)
        self._at += len(data)
        self._pages[self._at] = pages
        return data


class _Pages:
    """Checks the sizes in headers of pages as they are read: pyarrow takes as much memory as they declare."""

    def __init__(self) -> None:
        self._rest, self._skip = b"", 0  # the beginning of a header; bytes before the next one

    def follow(self, data: bytes) -> None:
        """The next bytes of a column. Raises ValueError for a page that becomes too large, or no header."""
        data, at = self._rest + data if self._rest else data, self._skip
        while at < len(data):
            try:
                header, body = read_struct(memoryview(data), at)
            except IndexError:  # it goes on in the next read
                break
            large, packed = header.get(2, -1), header.get(3, -1)
            if min(large, packed) < 0 or large > max(_LARGE_PAGE, _MOST_RATIO * packed):
                raise ValueError(f"a page declares {large} bytes, {packed} when compressed")
            at = body + packed
        self._rest, self._skip = data[at:], max(0, at - len(data))
        if len(self._rest) > _MOST_HEADER:
            raise ValueError(f"the header of a page takes more than {_MOST_HEADER} bytes")


def _no_parquet(name: str, why: str) -> SourceError:
    return SourceError(f"{name} is not a whole Parquet file: {why}", "copy or download it again")


@dataclass
class Files:
    """The Parquet files of a source by split, in order; None where no path names a split.

    left_out: as `Tree.left_out`. root: what all their names begin with, up to a slash.
    """

    splits: dict[str | None, list[ParquetFile]]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def root(self) -> str:
        names = [file.name for files in self.splits.values() for file in files]
        first, last = min(names), max(names)
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return first[: first.rfind("/", 0, same) + 1]


def local_files(spec: str, paths: list[Path]) -> Files:
    """Files on this machine, by the split that each path names. Raises SourceError, OSError."""
    return _by_name(spec, [ParquetFile(PlainFile(path), path.stat().st_size) for path in paths])


def remote_files(spec: str, patterns: list[str]) -> Files:
    """The Parquet files at URLs: each names a file, a pattern of files, or, except on web servers, a folder.

    Raises SourceError if there are none, UsageError for another kind of URL, SystemFault if requests fail.
    """
    files: list[ParquetFile] = []
    for pattern in patterns:
        if pattern.startswith("hf://"):
            return _hub_files(spec)
        where = place(pattern)
        assert isinstance(where, RemotePath)
        files += [_at(where.bucket, key, size) for key, size in sorted(_keys(spec, where).items())]
    return _by_name(spec, files)


def _at(bucket: Any, key: str, size: int) -> ParquetFile:
    return ParquetFile(RemoteFile(bucket.url, key), size)


def _keys(spec: str, where: RemotePath) -> dict[str, int]:
    """The keys of Parquet files that a URL names, and their sizes."""
    if not glob.has_magic(where.key):
        size = where.bucket.size(where.key) if where.key else None
        if size is not None:
            return {where.key: size}
        if has_parquet_name(where.key):
            raise SourceError(f"there is no {where}", _WAY_OUT)
    folder = re.split(r"[*?\[]", where.key)[0].rpartition("/")[0] if glob.has_magic(where.key) else where.key
    found = {key: size for key, size in where.bucket.files(folder).items() if has_parquet_name(key)}
    if glob.has_magic(where.key):
        found = {key: size for key, size in found.items() if _matches(where.key, key)}
    if not found:
        lists = where.bucket.url.startswith("http")
        why = ": web servers do not list their files" if lists else ""
        way_out = "write {0..9} for * in a pattern, or name one file" if lists else _WAY_OUT
        raise SourceError(f"no Parquet files were found at {spec}{why}", way_out)
    return found


def _matches(pattern: str, path: str) -> bool:
    """Whether a path matches a pattern: ``**`` is any folders, ``*`` and ``?`` are inside a name."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    return re.fullmatch("".join(parts.get(t) or _one_of(t) for t in tokens), path, re.S) is not None


def _one_of(token: str) -> str:
    if not re.fullmatch(r"\[[^\]/]+\]", token):
        return re.escape(token)
    inverted, letters = token[1] == "!", token[1:-1].lstrip("!")
    return f"[{'^' * inverted}{re.escape(letters).replace(chr(92) + '-', '-')}]"


def _by_name(spec: str, files: list[ParquetFile]) -> Files:
    by_split: dict[str | None, list[ParquetFile]] = {}
    splits = splits_of_files(spec, [file.name for file in files])
    for file in files:
        by_split.setdefault(splits[file.name], []).append(file)
    return Files(by_split)


def _hub_files(spec: str) -> Files:
    """``hf://datasets/[OWNER/]NAME[@REVISION][/CONFIG or folder or pattern]``, also with the revision at the end."""
    rest, revision = spec.removeprefix("hf://datasets/").strip("/"), ""
    if match := _REVISION.fullmatch(rest):
        rest, revision = (match[1] + match[3]).strip("/"), {"~parquet": _CONVERTED}.get(match[2], match[2])
    parts = rest.split("/")
    if not spec.startswith("hf://datasets/") or not all(parts):
        raise SourceError(f"{spec} names no dataset of the hub", "write hf://datasets/OWNER/NAME[/CONFIG][@REVISION]")
    name, inside = "/".join(parts[:2]), "/".join(parts[2:])
    repository = HubRepository(f"hf://datasets/{name}" + (f"@{revision}" if revision else ""))
    try:
        commit, sizes, configs = repository.snapshot()
    except FileNotFoundError as error:
        raise SourceError(
            f"the hub has no dataset {name}" + (f" with revision {revision}" if revision else ""),
            "check its name; for a private one, log in with: hf auth login",
        ) from error
    pinned = HubRepository(f"hf://datasets/{name}@{commit}")  # what is read is what was listed
    known = {str(one["config_name"]): one for one in _dicts(configs) if "config_name" in one and "data_files" in one}
    if inside in known or (known and not inside):
        return _of_config(spec, pinned, sizes, known, inside)
    wanted = inside if glob.has_magic(inside) or has_parquet_name(inside) else f"{inside}/**" if inside else "**"
    found = [_at(pinned, key, sizes[key]) for key in sorted(sizes) if has_parquet_name(key) and _matches(wanted, key)]
    if not found:
        others = f"; it has the configurations {', '.join(known)}" if known else ""
        raise _none_at_hub(spec, name, others)
    return _by_name(spec, found)


def _of_config(spec: str, bucket: HubRepository, sizes: dict[str, int], known: dict[str, dict], inside: str) -> Files:
    """The files of one of the configurations that a dataset's card lists, by the splits that it gives them."""
    if not inside:
        first = [name for name, one in known.items() if one.get("default") is True or name == "default"]
        if not first and len(known) > 1:
            names = ", ".join(known)
            raise SourceError(
                f"{spec} has several configurations: {names}", f"name one, as in {spec}/{next(iter(known))}"
            )
        inside = (first or list(known))[0]
    given = known[inside]["data_files"]
    entries = _dicts(given) or [{"path": given}]
    files, unnamed = Files({}), []
    for entry in entries:
        paths = entry.get("path")
        patterns = [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
        found = [key for key in sorted(sizes) if has_parquet_name(key) and any(_matches(p, key) for p in patterns)]
        parquet = [_at(bucket, key, sizes[key]) for key in found]
        word = str(entry.get("split", ""))
        if word.lower() in SPLIT_NAMES:
            files.splits.setdefault(SPLIT_NAMES[word.lower()], []).extend(parquet)
        elif word:
            files.left_out[f"files of split {word} (not a known split)"] += len(parquet)
        else:
            unnamed += parquet
    if unnamed:
        files.splits |= _by_name(spec, unnamed).splits
    if not any(files.splits.values()):
        raise _none_at_hub(spec, bucket.url.partition("@")[0].removeprefix("hf://datasets/"), "")
    return files


def _dicts(value: Any) -> list[dict]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _none_at_hub(spec: str, name: str, others: str) -> SourceError:
    return SourceError(
        f"no Parquet files were found at {spec}{others}",
        f"the hub may have made some: try hf://datasets/{name}@~parquet",
    )
