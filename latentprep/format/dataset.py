"""Read a latent dataset: `open_dataset(path)` and what it returns."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from latentprep.errors import DatasetError, UsageError, opt
from latentprep.format.manifest import INVALID_LABEL, FileRecord, ShardId, ShardRecord, read_manifest, read_record
from latentprep.format.quantizer import Quantizer
from latentprep.format.shard import Codes
from latentprep.format.stores import store_of
from latentprep.storage.cache import LIMIT, ShardCache
from latentprep.storage.places import Place, RemotePath, local, place

_FETCHES = 3  # of a remote file, before a wrong checksum is an error
_READERS = 4  # threads that read, verify and decompress shards; all three release the interpreter lock


class ForeignRecord(DatasetError):
    """A record made with another manifest than the dataset's."""


class LatentDataset:
    """A latent dataset. Shards are checked against their records when they are first read, and at every download.

    root: its folder or URL. manifest: see `Manifest`.
    cache: keeps copies of remote shards on this machine.
    verify: False skips these checks: reading is a little faster, but damage may go unnoticed.
    """

    def __init__(self, root: Place, verify: bool = True, cache: ShardCache | None = None) -> None:
        self.root, self.verify, self.cache = root, verify, cache
        self.manifest = read_manifest(root)
        self._store = store_of(self.manifest)
        self._verified: set[str] = set()
        self._records: dict[tuple[str, int], ShardRecord] = {}  # records read so far

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest.splits)

    @property
    def quantizer(self) -> Quantizer:
        return self.manifest.quantizer

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {count}" for name, count in self.manifest.splits.items())
        shape, bits = "×".join(map(str, self.manifest.latent)), f"{self.quantizer.mean_bits:.3g} bits"
        return f"<LatentDataset {self.root} {self.manifest.codec['name']} {shape} {bits}: {rows}>"

    def records(self, split: str) -> list[ShardRecord]:
        """The records of the split's committed shards, in order.

        Each record is read once: open the dataset again to see shards that were made again.
        """
        shards = range(self.manifest.shard_count(self._known(split)))
        with ThreadPoolExecutor(_READERS) as pool:
            return [record for record in pool.map(partial(self._known_record, split), shards) if record is not None]

    def record(self, split: str, index: int) -> ShardRecord | None:
        """One shard's record as it is now, None if it is not committed.

        Raises `DatasetError` if it does not belong to this dataset.
        """
        record = read_record(self.root, self._known(split), index)
        if record is None:
            return None
        if record.manifest != self.manifest.sha256:
            raise ForeignRecord(
                f"{self.root / record.path} does not belong to {self.root / 'manifest.json'}",
                f"one was altered or copied from elsewhere; restore it, or encode again with {opt('overwrite', True)}",
            )
        start = index * self.manifest.shard_rows
        if (
            record.rows != self.manifest.rows_in_shard(split, index)
            or len(record.saturated) != self.manifest.latent[0]
            or not all(start <= entry["row"] < start + record.rows for entry in record.invalid)
        ):
            raise DatasetError(
                f"{self.root / record.path} does not describe shard {split} {index}", "delete it and encode again"
            )
        return self.remember(record)

    def remember(self, record: ShardRecord) -> ShardRecord:
        """Keep a record that was just read or committed, so that it is not read again. Returns it."""
        self._records[record.split, record.index] = record
        return record

    def is_whole(self, record: ShardRecord) -> bool:
        """Whether all files of a committed shard exist in their recorded sizes. Their contents are not read."""
        try:
            return all((self.root / path).stat().st_size == file.bytes for path, file in record.files.items())
        except (OSError, ValueError):  # a NUL in a path
            return False

    def whole_records(self) -> dict[ShardId, ShardRecord]:
        """The committed shards whose files all exist, with their records, in order."""
        records = (record for split in self.splits for record in self.records(split))
        return {record.shard: record for record in records if self.is_whole(record)}

    def committed(self, split: str, index: int) -> ShardRecord:
        """One shard's record; `DatasetError` if it is not committed."""
        record = self._known_record(split, index)
        if record is None:
            raise DatasetError(f"{self.root}: shard {split} {index} is not committed", "run latentprep encode again")
        return record

    def check_complete(self, split: str) -> None:
        """`DatasetError` if a shard of the split is not committed."""
        have, want = len(self.records(split)), self.manifest.shard_count(split)
        if have < want:
            raise DatasetError(
                f"{self.root}: {want - have} of {want} shards of split '{split}' are missing",
                "run the same latentprep encode again: it makes only those",
            )

    def read_shard(self, split: str, index: int, keys: bool = True) -> Codes:
        """All rows of one shard, including invalid ones (label −1, codes all 0). Without `keys`, a tenth faster.

        Raises `DatasetError` naming the shard if it is missing, cut short, altered, or from another encode.
        """
        record = self.committed(split, index)
        paths = self._store.shard_files(self.manifest, split, index)
        wanted = {paths[name] for name in ("codes", "labels", *(["keys"] if keys else []))}
        files = {path: self._read(record, path) for path in wanted}
        codes, labels, names = self._store.decode_shard_files(self.manifest, split, index, files)
        if self.verify:
            self._check_values(codes, labels, f"shard {split} {index}")
        return Codes(codes, labels, names if keys else [])

    def read_labels(self, split: str, index: int) -> np.ndarray:
        """i32 [n]: the labels of one shard's rows, −1 for invalid ones. Its codes are not decoded."""
        record = self.committed(split, index)
        path = self._store.shard_files(self.manifest, split, index)["labels"]
        return self._store.decode_labels(self.manifest, split, index, self._read(record, path))

    def read_keys(self, split: str, index: int) -> list[str]:
        """The keys of one shard's rows, including invalid ones. Its codes are not decoded."""
        record = self.committed(split, index)
        path = self._store.shard_files(self.manifest, split, index)["keys"]
        return self._store.decode_keys(self.manifest, split, index, self._read(record, path))

    def read_hashes(self, split: str, index: int) -> np.ndarray | None:
        """u8 [n,16]: the content hashes of one shard's rows, all 0 where unknown. None in a dataset without them. Its
        codes are not decoded."""
        if self.manifest.content_hash is None:
            return None
        record = self.committed(split, index)
        path = self._store.shard_files(self.manifest, split, index)["hashes"]
        return self._store.decode_hashes(self.manifest, split, index, self._read(record, path))

    def check_files(self, record: ShardRecord) -> None:
        """Raise `DatasetError` if a file of the shard does not match its record, which may list other files, too."""
        paths = set(self._store.shard_files(self.manifest, record.split, record.index).values())
        if not paths <= set(record.files):
            raise DatasetError(
                f"{self.root / record.path} does not list the files of shard {record.split} {record.index}"
            )
        for path in sorted(paths):
            self._read(record, path)

    def load(self, split: str, limit: int | None = None, keys: bool = True) -> Codes:
        """The whole split in memory, without invalid rows. limit: load at most this many rows, spread evenly.

        Without `keys`, which training does not need, a tenth faster.
        """
        self.check_complete(split)
        rows = self.manifest.splits[split]
        codes = np.empty((rows, *self.manifest.row_shape(split)), self.quantizer.dtype)
        labels = np.empty(rows, np.int32)
        names = [""] * rows if keys else []

        def place(index: int) -> None:
            shard = self.read_shard(split, index, keys)
            start = index * self.manifest.shard_rows
            codes[start : start + len(shard)] = shard.codes
            labels[start : start + len(shard)] = shard.labels
            if keys:
                names[start : start + len(shard)] = shard.keys

        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(place, range(self.manifest.shard_count(split))):
                pass
        kept = _kept(labels, limit)
        if len(kept) < rows:
            codes, labels, names = codes[kept], labels[kept], [names[i] for i in kept] if keys else []
        return Codes(codes, labels, names)

    def valid_rows(self, split: str, limit: int | None = None) -> np.ndarray:
        """i64 [n]: the rows of a split that `load` returns, in order."""
        self.check_complete(split)
        return _kept(self.labels(split), limit)

    def labels(self, split: str) -> np.ndarray:
        """i32 [N]: the labels of all rows of a split, −1 for invalid ones."""
        shards = [self.read_labels(split, index) for index in range(self.manifest.shard_count(split))]
        return np.concatenate([*shards, np.empty(0, np.int32)])

    def _known(self, split: str) -> str:
        if split not in self.manifest.splits:
            raise UsageError(f"{self.root} has no split '{split}'", f"use one of {', '.join(self.splits)}")
        return split

    def _known_record(self, split: str, index: int) -> ShardRecord | None:
        return self._records.get((split, index)) or self.record(split, index)

    def _read(self, record: ShardRecord, path: str) -> bytes:
        """One file of a shard, checked against its record, unless checked before or `verify` is off.

        Of several processes that share a cache, one downloads it.
        """
        if self.cache is None or not isinstance(self.root, RemotePath) or path not in record.files:
            return self._fetch(record, path)
        sha256 = record.files[path].sha256
        data = self._cached(record, path)
        if data is None:
            with self.cache.fetching(sha256):
                data = self._cached(record, path)
                if data is None:
                    data = self._fetch(record, path)
                    if self.verify:
                        self.cache.write(sha256, data)
        return data

    def _cached(self, record: ShardRecord, path: str) -> bytes | None:
        """A file of a shard as the cache has it, whole; None if it has not."""
        assert self.cache is not None
        data, expected = self.cache.read(record.files[path].sha256), record.files[path]
        if data is None or (path not in self._verified and _damage(path, data, expected)):
            return None
        self._verified.add(path)
        return data

    def _fetch(self, record: ShardRecord, path: str) -> bytes:
        """A file of a shard from where the dataset is."""
        again = f"delete {record.path} and run the same latentprep encode again: it makes only that shard"
        shard = f"{self.root}: shard {record.split} {record.index}"
        if path not in record.files:
            raise DatasetError(f"{shard} is missing its file {path}", again)
        expected, remote = record.files[path], isinstance(self.root, RemotePath)
        for _ in range(_FETCHES if remote else 1):
            try:
                data = (self.root / path).read_bytes()
            except FileNotFoundError as error:
                raise DatasetError(f"{shard} is missing its file {path}", again) from error
            fresh = remote or path not in self._verified
            damage = _damage(path, data, expected) if self.verify and fresh else ""
            if not damage:
                break
        else:
            raise DatasetError(f"{shard}: {damage}", again)
        if self.verify:
            self._verified.add(path)
        return data

    def _check_values(self, codes: np.ndarray, labels: np.ndarray, where: str) -> None:
        if codes.size:
            quantizer = self.quantizer
            parts = [(codes, quantizer.levels, quantizer.bits)]  # all at once is twice as fast as channel by channel
            if len(set(quantizer.channel_levels)) > 1:
                each = zip(quantizer.channel_levels, quantizer.channel_bits, strict=True)
                parts = [(codes[:, :, channel], *both) for channel, both in enumerate(each)]
            for part, levels, bits in parts:
                if (most := int(part.max())) >= levels:
                    raise DatasetError(f"{self.root}: {where} holds the code {most}, too large for {bits} bits")
        if labels.size and not (labels.min() >= INVALID_LABEL and labels.max() < len(self.classes)):
            raise DatasetError(f"{self.root}: {where} holds a label outside the {len(self.classes)} classes")


def _kept(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Rows with a label, at most `limit` of them, spread evenly: i32 [N] -> i64 [n]"""
    kept = np.flatnonzero(labels != INVALID_LABEL)
    return kept if limit is None or limit >= len(kept) else kept[np.arange(limit) * len(kept) // limit]


def _damage(path: str, data: bytes, expected: FileRecord) -> str:
    """How a file's bytes differ from the recorded ones; empty if they do not."""
    if len(data) != expected.bytes:
        return f"{path} has {len(data)} bytes, but its record says {expected.bytes}"
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        return f"{path} was altered: its SHA-256 does not match its record"
    return ""


def open_dataset(
    path: str | os.PathLike[str] | RemotePath | LatentDataset,
    verify: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = LIMIT,
) -> LatentDataset:
    """Open the latent dataset in the folder, or at the URL, `path`. One that is already open is returned as it is.

    verify: compare each file with its checksum when it is first read. cache_dir: the folder for copies of remote shards
    (by default in the user's cache folder), at most `cache_bytes` of them; 0 keeps none.

    Raises `DatasetError` if there is none, or this version cannot read it; `UsageError` for an unknown kind of URL,
    `SystemFault` for a URL that cannot be reached.

    >>> val = latentprep.open("shards").load("val")
    >>> val.codes.shape, str(val.codes.dtype), val.keys[0]
    ((60, 1, 16, 16, 16), 'uint8', 'val/arrow/0080.jpg')
    """
    if isinstance(path, LatentDataset):
        return path
    if cache_bytes < 0:
        raise UsageError(f"the cache's size must be 0 or more, got {cache_bytes}")
    folder = None if cache_dir is None else local(cache_dir, "the cache")
    root = place(path)
    cached = bool(cache_bytes) and isinstance(root, RemotePath)  # local files are not copied
    return LatentDataset(root, verify, ShardCache(folder, cache_bytes) if cached else None)
