"""Datasets made from the codes of others, shard by shard: no image is read and no codec runs.

`requantize`, `convert`, `subset` and `merge` share `derive`. They differ in the manifest they ask for, in the rows they
take, and in what they do to codes and labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentprep.encoding.driver import commit_shards, start, stored_manifest, writing
from latentprep.encoding.encode import EncodeResult, encode_result
from latentprep.encoding.source_files import joined_stats, read_stats, write_stats
from latentprep.errors import DatasetError, UsageError, opt
from latentprep.format.commit import write_errors
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.hashes import HASH_BYTES
from latentprep.format.manifest import INVALID_LABEL, LINEAR_DECODER, MAX_SHARDS, Manifest, ShardId, ShardRecord
from latentprep.format.shard import Codes, EncodedShard, encoded_shard, joined_devices
from latentprep.format.stores import check_store, store_of
from latentprep.format.thumbnails import ColourMap
from latentprep.progress import ProgressFactory, silent
from latentprep.storage.places import place

Rows = dict[str, np.ndarray]
"""For each split, the rows to take, i64 [n,2]: the number of the part, and the row in that part's split."""

Change = Callable[[Codes, tuple[int, ...]], tuple[Codes, tuple[int, ...]]]
"""A change to a shard: its codes and labels, and how many latents saturate in each channel."""


class _Taken(NamedTuple):
    """Samples for a new shard, and what their old records say of them."""

    rows: Codes
    source_bytes: int
    saturated: tuple[int, ...]
    invalid: list[dict]
    device: str


def convert(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path,
    store: str,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Convert a dataset to another store, losslessly: converting back gives the same bytes. Run again, it resumes.

    If a linear decoder was fitted to the dataset, a Parquet store gets a thumbnail of each sample by it.

    Raises `UsageError` for an unknown store, `SystemFault` if it needs a package that is not installed, `DatasetError`
    if the dataset or its linear decoder is damaged or it is incomplete.

    >>> made = latentprep.convert("shards", out="shards-tars", store="wds")
    >>> latentprep.open("shards-tars").manifest.store
    'wds'
    """
    check_store(store)
    source = opened(dataset)
    manifest = replace(source.manifest, store=store, thumbnail=_thumbnail(source) if store == "parquet" else None)
    return derive(
        out, manifest, [source], every_row([source]), title="converting", overwrite=overwrite, progress=progress
    )


def _thumbnail(dataset: LatentDataset) -> ColourMap | None:
    """How latents become thumbnails: by the dataset's linear decoder, or as in a Parquet store that is converted."""
    from latentprep.codecs.linear import load_linear_decoder

    if not (dataset.root / LINEAR_DECODER).is_file():
        return dataset.manifest.thumbnail
    linear = load_linear_decoder(dataset)
    return ColourMap(tuple(linear.small_matrix.ravel().tolist()), tuple(linear.small_bias.tolist()))


def opened(dataset: str | Path | LatentDataset) -> LatentDataset:
    """Open a dataset. Raises `DatasetError` unless all its shards are committed."""
    whole = open_dataset(dataset)
    for split in whole.splits:
        whole.check_complete(split)
    return whole


def every_row(parts: Sequence[LatentDataset]) -> Rows:
    """All rows of all splits of all parts, in order."""
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
    """Write a dataset with this manifest to the folder `out`, from the `rows` of `parts`. Run again, it resumes.

    Every shard is decoded again before it is written, and its files are read back afterwards. Raises `UsageError` if
    `out` is one of the parts or there are too many shards, `DatasetError` if it holds another dataset, `SystemFault` if
    the disk is full.
    """
    root, start_time = place(out), time.monotonic()
    for part in parts:
        if root.resolve() == part.root.resolve():
            raise UsageError(f"{opt('out')} is the dataset itself, {root}", "choose another folder")
    if (shards := sum(map(manifest.shard_count, manifest.splits))) > MAX_SHARDS:
        raise UsageError(f"{shards} shards are more than a dataset can have, {MAX_SHARDS}", "make several datasets")
    with writing(root):
        manifest = stored_manifest(root, manifest, overwrite) or manifest
        target, take = start(root, manifest), _taker(parts)
        records = target.whole_records()

        def encode(shard: ShardId) -> EncodedShard:
            first = shard.index * manifest.shard_rows
            taken = take(shard.split, rows[shard.split][first : first + manifest.shard_rows], first)
            if change is not None:
                codes, saturated = change(taken.rows, taken.saturated)
                taken = taken._replace(rows=codes, saturated=saturated)
            return _checked(manifest, shard, taken)

        jobs = [shard for shard in manifest.shards() if shard not in records]
        before = sum(record.rows for record in records.values())
        with progress(title, sum(manifest.splits.values()), "samples", before) as bar:

            def done(record: ShardRecord) -> None:
                target.check_files(record)
                records[record.shard] = record
                bar.advance(record.rows)

            commit_shards(target, (encode(shard) for shard in jobs), done)
        same_rows = manifest.source["sha256"] == parts[0].manifest.source["sha256"]
        if same_rows and (stats := joined_stats([read_stats(part.root) for part in parts])) is not None:
            write_stats(root, stats)
        write_errors(root, list(records.values()))
    encoded = sum(record.rows for record in records.values()) - before
    seconds = time.monotonic() - start_time
    return encode_result(root, manifest, list(records.values()), encoded=encoded, seconds=seconds)


def _taker(parts: Sequence[LatentDataset]) -> Callable[[str, np.ndarray, int], _Taken]:
    """``take(split, rows [n,2], first)`` -> the samples in these rows of the parts, invalid ones included. They become
    the rows from `first` on in the new split. Their counts are a share of the old records' counts, by samples."""

    @lru_cache(2)  # an old shard that two new ones need is read once
    def read(part: int, split: str, index: int) -> Codes:
        shard, hashes = parts[part].read_shard(split, index), parts[part].read_hashes(split, index)
        return replace(shard, hashes=np.zeros((len(shard), HASH_BYTES), np.uint8) if hashes is None else hashes)

    def take(split: str, rows: np.ndarray, first: int) -> _Taken:
        taken: list[Codes] = []
        invalid: list[dict] = []
        source_bytes, saturated = 0, np.zeros(parts[0].manifest.latent[0], np.int64)
        devices: set[str] = set()
        shard_rows = np.array([part.manifest.shard_rows for part in parts])
        shards = np.stack([rows[:, 0], rows[:, 1] // shard_rows[rows[:, 0]]], axis=1)
        for part, index in np.unique(shards, axis=0).tolist():
            here = np.flatnonzero((shards == (part, index)).all(axis=1))
            shard, record = read(part, split, index), parts[part].committed(split, index)
            devices.add(record.device)
            places = rows[here, 1] - index * shard_rows[part]
            labels = shard.labels[places]
            assert shard.hashes is not None
            keys = [shard.keys[place] for place in places]
            taken.append(Codes(shard.codes[places], labels, keys, shard.hashes[places]))
            new_row = dict(zip(rows[here, 1].tolist(), (here + first).tolist(), strict=True))
            invalid += [{**entry, "row": new_row[entry["row"]]} for entry in record.invalid if entry["row"] in new_row]
            valid, all_valid = (int((some != INVALID_LABEL).sum()) for some in (labels, shard.labels))
            source_bytes += record.source_bytes * valid // max(1, all_valid)
            saturated += np.array(record.saturated) * valid // max(1, all_valid)
        names = ("codes", "labels", "hashes")
        codes, labels, hashes = (np.concatenate([getattr(some, name) for some in taken]) for name in names)
        joined = Codes(codes, labels, [key for some in taken for key in some.keys], hashes)
        return _Taken(joined, source_bytes, tuple(saturated.tolist()), invalid, joined_devices(devices))

    return take


def _checked(manifest: Manifest, shard: ShardId, taken: _Taken) -> EncodedShard:
    """Encode the shard and check that it decodes to the same samples."""
    encoded = encoded_shard(
        manifest, shard, taken.rows,
        source_bytes=taken.source_bytes, saturated=taken.saturated, invalid=taken.invalid, device=taken.device,
    )  # fmt: skip
    store, where = store_of(manifest), (manifest, shard.split, shard.index)
    codes, labels, keys = store.decode_shard_files(*where, encoded.files)
    rows = taken.rows
    same = np.array_equal(codes, rows.codes) and np.array_equal(labels, rows.labels) and keys == rows.keys
    if manifest.content_hash is not None and rows.hashes is not None:
        hashes = store.decode_hashes(*where, encoded.files[store.shard_files(*where)["hashes"]])
        same = same and np.array_equal(hashes, rows.hashes)
    if not same:
        raise DatasetError(
            f"shard {shard} does not decode to the codes it was encoded from", "check this machine's memory for faults"
        )
    return encoded
