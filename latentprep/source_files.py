"""Which files a dataset was made of: their sizes and times, so that the next run sees a picture that was replaced.

They are kept beside the manifest and not in it: shards, records and manifest are the same bytes for the same images,
wherever and whenever these were copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from .errors import DatasetError, opt
from .format.commit import write_atomic
from .format.dataset import LatentDataset
from .format.manifest import SOURCE_FILES, ShardId, ShardRecord
from .format.places import Place
from .sources import Source

Stats = dict[str, np.ndarray]
"""Of each split: i64 [2,N], every sample's bytes and the time of the last change of its file, ns since 1970."""

_CHECKSUM = "sha256"
_NAMED = 3  # samples, in a message


def source_stats(source: Source, splits: list[str]) -> Stats | None:
    """What the source says of its files now; None where it has none."""
    stats = {split: source.stat(split) for split in splits}
    if any(found is None for found in stats.values()):
        return None
    return {split: np.array(found, np.int64).reshape(-1, 2).T.copy() for split, found in stats.items()}


def write_stats(root: Place, stats: Stats) -> None:
    write_atomic(root / SOURCE_FILES, to_bytes(stats))


def read_stats(root: Place) -> Stats | None:
    """What was kept with the dataset at `root`, None where nothing was; `DatasetError` if it is damaged."""
    try:
        data = (root / SOURCE_FILES).read_bytes()
    except FileNotFoundError:
        return None
    try:
        stats = from_bytes(data)
    except Exception as error:  # safetensors raises one of many
        raise DatasetError(
            f"{root / SOURCE_FILES} is damaged", "delete it: then it is written anew, and nothing is compared"
        ) from error
    return stats


def check_unchanged(
    dataset: LatentDataset, source: Source, stats: Stats | None, kept: Mapping[ShardId, ShardRecord]
) -> str:
    """Compare the source's files with those that the dataset was made of, and keep what they are now.

    kept: shards that are not made again; the files of all others may be others by now. Returns what the user should
    know, as a rule nothing. A picture counts as replaced where its size differs, or its time while other files have
    theirs still.
    Where all times differ, the source was copied or packed anew, and sizes alone count; that is said.

    Raises `DatasetError` naming the pictures that were replaced.
    """
    root, before = dataset.root, read_stats(dataset.root)
    if stats is None:
        return ""
    differ: dict[str, np.ndarray] = {}  # bool [2,n]: sizes and times that are others now
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
            f"{len(replaced)} of {rows} images replaced since {root} was made of them: {some(replaced)}",
            f"restore them to resume; choose another folder as {opt('out')}, or {opt('overwrite', True)} to encode all "
            f"anew; or, if they are the same pictures, delete {root / SOURCE_FILES}",
        )
    if before is None or before.keys() != stats.keys() or not all(np.array_equal(before[s], stats[s]) for s in stats):
        write_stats(root, stats)
    if not moved:
        return ""
    return (
        f"all {rows} images have other times than when {root} was made of them, and the same sizes, as after a copy: "
        f"they are taken for the same; verify, given the source, compares some of them"
    )


def _encoded_rows(dataset: LatentDataset, split: str, kept: Mapping[ShardId, ShardRecord]) -> np.ndarray:
    """i64 [n]: the rows whose codes are there and stay there."""
    valid = np.zeros(dataset.manifest.splits[split], bool)
    for shard, record in kept.items():
        if shard.split == split:
            first = shard.index * dataset.manifest.shard_rows
            valid[first : first + record.rows] = True
            valid[[entry["row"] for entry in record.invalid]] = False
    return np.flatnonzero(valid)


def added_and_removed(dataset: LatentDataset, source: Source) -> str:
    """How the source's keys differ from those of the dataset's committed shards; empty if that cannot be told."""
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
    """A safetensors file of 16 bytes a sample, with a checksum. Inverse of `from_bytes`."""
    import safetensors.numpy

    digest = hashlib.sha256(b"".join(name.encode() + stats[name].tobytes() for name in sorted(stats))).hexdigest()
    return safetensors.numpy.save({name: np.ascontiguousarray(stats[name]) for name in stats}, {_CHECKSUM: digest})


def from_bytes(data: bytes) -> Stats:
    """Raises one of many for bytes that `to_bytes` did not make."""
    import safetensors.numpy

    stats = safetensors.numpy.load(data)
    if any(a.dtype != np.int64 or a.ndim != 2 or len(a) != 2 for a in stats.values()) or to_bytes(stats) != data:
        raise ValueError("not what was written")
    return stats
