"""The sizes and times of the files a dataset was made from, so that the next run notices a replaced image.

They are stored beside the manifest, not in it: the same images give the same manifest, records and shards, wherever and
whenever they were copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from latentprep.errors import DatasetError, opt
from latentprep.format.dataset import LatentDataset
from latentprep.format.manifest import SOURCE_FILES, ShardId, ShardRecord
from latentprep.sources.source import Source
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import Place

Stats = dict[str, np.ndarray]
"""For each split, i64 [2,N]: every sample's size in bytes, and when its file last changed, in ns since 1970."""

_CHECKSUM = "sha256"
_NAMED = 3  # samples that a message names


def source_stats(source: Source, splits: list[str]) -> Stats | None:
    """The sizes and times of the source's files now; None if its samples are not in files."""
    stats = {split: source.stat(split) for split in splits}
    if any(values is None for values in stats.values()):
        return None
    return {split: np.array(values, np.int64).reshape(-1, 2).T.copy() for split, values in stats.items()}


def write_stats(root: Place, stats: Stats) -> None:
    write_atomic(root / SOURCE_FILES, to_bytes(stats))


def read_stats(root: Place) -> Stats | None:
    """The sizes and times stored with the dataset at `root`, None if there are none; `DatasetError` if damaged."""
    try:
        data = (root / SOURCE_FILES).read_bytes()
    except FileNotFoundError:
        return None
    try:
        stats = from_bytes(data)
    except Exception as error:  # safetensors raises many kinds
        raise DatasetError(
            f"{root / SOURCE_FILES} is damaged",
            "delete it: encoding writes it again, without checking for replaced images",
        ) from error
    return stats


def joined_stats(parts: list[Stats | None]) -> Stats | None:
    """The sizes and times of the parts' rows one after the other; None if those of a part are not known."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    splits = dict.fromkeys(split for part in known for split in part)
    return {split: np.concatenate([part[split] for part in known if split in part], axis=1) for split in splits}


def check_unchanged(
    dataset: LatentDataset, source: Source, stats: Stats | None, kept: Mapping[ShardId, ShardRecord]
) -> str:
    """Compare the source's files with those that the dataset was made from, and store what they are now.

    kept: the shards that are not made again; only their files must be unchanged. An image counts as replaced if its
    size differs, or if its time differs while the times of other files are the same. If all times differ, the source
    was copied or packed again, and only sizes count. Returns a note about that for the user, usually empty.

    Raises `DatasetError` naming the images that were replaced.
    """
    root, before = dataset.root, read_stats(dataset.root)
    if stats is None:
        return ""
    differ: dict[str, np.ndarray] = {}  # bool [2,n]: which sizes and times have changed
    compared: dict[str, np.ndarray] = {}
    for split in stats.keys() & (before or {}).keys():
        if before is not None and before[split].shape == stats[split].shape:
            compared[split] = _encoded_rows(dataset, split, kept)
            differ[split] = (stats[split] != before[split])[:, compared[split]]
    rows = sum(map(len, compared.values()))
    moved = rows > 1 and all(other[1].all() for other in differ.values())
    replaced = [
        source.keys(split)[row]
        for split in dataset.splits
        if split in differ
        for row in compared[split][differ[split][0] if moved else differ[split].any(axis=0)].tolist()
    ]
    if replaced:
        raise DatasetError(
            f"{len(replaced)} of {rows} images were replaced since {root} was made: {some(replaced)}",
            f"to resume, restore them, or delete {root / SOURCE_FILES} if they are the same images; to encode "
            f"only the new ones, use {opt('reuse', str(root))} and another folder as {opt('out')}; to start again, "
            f"choose another folder as {opt('out')}, or use {opt('overwrite', True)}",
        )
    if before is None or before.keys() != stats.keys() or not all(np.array_equal(before[s], stats[s]) for s in stats):
        write_stats(root, stats)
    if not moved:
        return ""
    return (
        f"all {rows} images have new times but the same sizes as when {root} was made, as after a copy: "
        f"they are taken to be the same; latentprep verify, given the source, compares some of them"
    )


def _encoded_rows(dataset: LatentDataset, split: str, kept: Mapping[ShardId, ShardRecord]) -> np.ndarray:
    """i64 [n]: the valid rows of the shards that are kept."""
    valid = np.zeros(dataset.manifest.splits[split], bool)
    for shard, record in kept.items():
        if shard.split == split:
            first = shard.index * dataset.manifest.shard_rows
            valid[first : first + record.rows] = True
            valid[[entry["row"] for entry in record.invalid]] = False
    return np.flatnonzero(valid)


def added_and_removed(dataset: LatentDataset, source: Source) -> str:
    """How the source's keys differ from those of the dataset's committed shards; empty if they do not."""
    texts = []
    for split in dataset.splits:
        now = source.keys(split) if split in source.splits else []
        records = dataset.records(split)
        before = [key for record in records for key in dataset.read_keys(split, record.index)]
        whole = len(records) == dataset.manifest.shard_count(split)
        removed = sorted(set(before) - set(now))
        added = sorted(set(now) - set(before)) if whole else []
        if added:
            texts.append(f"{len(added)} added to {split} ({some(added)})")
        if removed:
            texts.append(f"{len(removed)} removed from {split} ({some(removed)})")
    return ", ".join(texts)


def some(names: list[str]) -> str:
    """The first few of the names."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def to_bytes(stats: Stats) -> bytes:
    """A safetensors file of 16 bytes per sample, with a checksum. Inverse of `from_bytes`."""
    import safetensors.numpy

    digest = hashlib.sha256(b"".join(name.encode() + stats[name].tobytes() for name in sorted(stats))).hexdigest()
    return safetensors.numpy.save({name: np.ascontiguousarray(stats[name]) for name in stats}, {_CHECKSUM: digest})


def from_bytes(data: bytes) -> Stats:
    """Inverse of `to_bytes`. Raises an exception of some kind for any other bytes."""
    import safetensors.numpy

    stats = safetensors.numpy.load(data)
    if any(a.dtype != np.int64 or a.ndim != 2 or len(a) != 2 for a in stats.values()) or to_bytes(stats) != data:
        raise ValueError("not bytes that `to_bytes` wrote")
    return stats
