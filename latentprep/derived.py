"""Datasets made from the codes of others, shard by shard: no image is read and no codec runs.

`derive` is what `requantize`, `convert`, `subset` and `merge` share. They differ in the manifest that they ask for, in
the rows that they take, and in what they do to codes and labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from .console import ProgressFactory, silent
from .encoder import EncodeResult, encode_result, plan
from .errors import DatasetError, UsageError, nearest, opt, system_fault
from .format.commit import commit_shard, create_dataset, locked, make_folder, write_errors
from .format.dataset import Codes, LatentDataset, open_dataset
from .format.manifest import INVALID_LABEL, STORES, Manifest, ShardRecord
from .format.places import place
from .format.stores import store_of
from .resume import check_same, stored_manifest
from .source_files import read_stats, write_stats

Rows = dict[str, np.ndarray]
"""Of each split the rows that it takes, i64 [n,2]: which of the parts, and the row in that part's split of the name."""

Change = Callable[[Codes, tuple[int, ...]], tuple[Codes, tuple[int, ...]]]
"""What happens to a shard: codes with labels, and how many of their latents saturate a channel."""


def convert(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path,
    store: str,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Make `out`, the same dataset in another store. Run again, it resumes; there and back gives the same bytes.

    Raises `UsageError` for an unknown store, `DatasetError` if the dataset is damaged or not complete.
    """
    if store not in STORES:
        raise UsageError(f"{opt('store')} must be {' or '.join(STORES)}, got {store}", nearest(store, STORES))
    source = opened(dataset)
    manifest = replace(source.manifest, store=store)
    return derive(
        out, manifest, [source], every_row([source]), title="converting", overwrite=overwrite, progress=progress
    )


def opened(dataset: str | Path | LatentDataset) -> LatentDataset:
    """The dataset, opened, if all its shards are committed; else `DatasetError`."""
    found = open_dataset(dataset)
    for split in found.splits:
        found.check_complete(split)
    return found


def every_row(parts: Sequence[LatentDataset]) -> Rows:
    """All rows of all splits of all parts, in this order."""
    rows: Rows = {}
    for number, part in enumerate(parts):
        for split, count in part.manifest.splits.items():
            taken = np.stack([np.full(count, number), np.arange(count)], axis=1)
            rows[split] = np.concatenate([rows[split], taken]) if split in rows else taken
    return rows


def derive(
    out: str | Path,
    manifest: Manifest,
    parts: Sequence[LatentDataset],
    rows: Rows,
    change: Change | None = None,
    *,
    title: str,
    overwrite: bool,
    progress: ProgressFactory,
) -> EncodeResult:
    """Write the dataset of `manifest` to the folder `out`, of the `rows` of `parts`. Run again, it resumes.

    Every shard is read back from where it was written and compared. Raises `UsageError` if `out` is one of the parts,
    `DatasetError` if it holds another dataset, `SystemFault` if the disk is full.
    """
    root, start, made = place(out), time.monotonic(), 0
    for part in parts:
        if root.resolve() == part.root.resolve():
            raise UsageError(f"{opt('out')} is the dataset itself, {root}", "name another folder")
    try:
        make_folder(root)
        with locked(root):
            stored = stored_manifest(root, overwrite)
            if stored is not None:
                check_same(root, stored, manifest, fitted=True)
                if stored.quantizer != manifest.quantizer or stored.compression != manifest.compression:
                    raise DatasetError(f"{root} was not made from {parts[0].root}", f"choose another {opt('out')}")
                manifest = stored
            create_dataset(root, manifest)
            target, take = open_dataset(root), _taker(parts)
            with progress(title, sum(manifest.splits.values()), "samples", 0) as bar:
                for split, index in plan(manifest):
                    record = target.record(split, index)
                    if record is None or not target.is_whole(record):
                        first = index * manifest.shard_rows
                        codes, record = take(split, rows[split][first : first + manifest.shard_rows], first)
                        saturated = record.saturated
                        if change is not None:
                            codes, saturated = change(codes, saturated)
                        record = replace(record, index=index, saturated=saturated, manifest=target.manifest_sha256)
                        _commit(target, record, codes)
                        made += record.rows
                    bar.advance(record.rows)
            if manifest.source == parts[0].manifest.source:  # the same rows
                stats = read_stats(parts[0].root)
                if stats is not None:
                    write_stats(root, stats)
            records = [record for split in manifest.splits for record in target.records(split)]
            write_errors(root, records)
    except OSError as error:
        raise system_fault(error) from error
    return encode_result(root, manifest, records, encoded=made, seconds=time.monotonic() - start)


def _taker(parts: Sequence[LatentDataset]) -> Callable[[str, np.ndarray, int], tuple[Codes, ShardRecord]]:
    """``take(split, rows [n,2], first)`` -> the samples in these rows of the parts, invalid ones included, and a record
    of them, for rows from `first` on in the new split. Its counts are shares of the old records' counts, by samples."""

    @lru_cache(2)  # a shard that ends in the next one is read once
    def read(part: int, split: str, index: int) -> Codes:
        return parts[part].read_shard(split, index)

    def take(split: str, rows: np.ndarray, first: int) -> tuple[Codes, ShardRecord]:
        taken: list[Codes] = []
        invalid: list[dict] = []
        source_bytes, saturated = 0, np.zeros(parts[0].manifest.latent[0], np.int64)
        shard_rows = np.array([part.manifest.shard_rows for part in parts])
        shards = np.stack([rows[:, 0], rows[:, 1] // shard_rows[rows[:, 0]]], axis=1)
        for part, index in np.unique(shards, axis=0).tolist():
            here = np.flatnonzero((shards == (part, index)).all(axis=1))
            shard, record = read(part, split, index), parts[part].committed(split, index)
            places = rows[here, 1] - index * shard_rows[part]
            labels = shard.labels[places]
            taken.append(Codes(shard.codes[places], labels, [shard.keys[place] for place in places]))
            new_row = dict(zip(rows[here, 1].tolist(), (here + first).tolist(), strict=True))
            invalid += [{**entry, "row": new_row[entry["row"]]} for entry in record.invalid if entry["row"] in new_row]
            valid, all_valid = (int((found != INVALID_LABEL).sum()) for found in (labels, shard.labels))
            source_bytes += record.source_bytes * valid // max(1, all_valid)
            saturated += np.array(record.saturated) * valid // max(1, all_valid)
        codes, labels = (np.concatenate([getattr(found, name) for found in taken]) for name in ("codes", "labels"))
        found = Codes(codes, labels, [key for found in taken for key in found.keys])
        counts = tuple(saturated.tolist())
        return found, ShardRecord(split, 0, len(found), {}, source_bytes, counts, "", tuple(invalid))

    return take


def _commit(target: LatentDataset, record: ShardRecord, codes: Codes) -> None:
    """Commit a shard and compare what can be read of it then."""
    arrays = (record.split, record.index, codes.codes, codes.labels, codes.keys)
    commit_shard(target.root, record, store_of(target.manifest).encode_shard_files(target.manifest, *arrays))
    target.record(record.split, record.index)  # what is on the disk now, in place of an earlier one
    found = target.read_shard(record.split, record.index)
    if not (
        np.array_equal(found.codes, codes.codes)
        and np.array_equal(found.labels, codes.labels)
        and found.keys == codes.keys
    ):
        raise DatasetError(
            f"{target.root}: shard {record.split} {record.index} reads back otherwise than it was written",
            "the disk or the memory of this machine is at fault",
        )
