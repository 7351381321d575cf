"""`verify`: check a latent dataset against its manifest and records and, given its source, against the images.

Everything in a dataset's folder either has a checksum (a shard's files in its record, the manifest in every record, a
record in itself) or follows from files that have one (`zarr.json`, `errors.jsonl`). So one changed bit is always found.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentprep.audit.reencode import SAMPLES, Comparison, compare, own_rows, own_stages
from latentprep.encoding.driver import commit_shards, writing
from latentprep.encoding.source_files import read_stats, source_stats, write_stats
from latentprep.errors import DatasetError, SourceError, UsageError, check_whole, opt, system_fault
from latentprep.format.commit import create_dataset, error_lines, write_errors
from latentprep.format.dataset import ForeignRecord, LatentDataset, open_dataset
from latentprep.format.hashes import content_hash, known
from latentprep.format.manifest import ERRORS, INVALID_LABEL, MANIFEST, ShardId, ShardRecord
from latentprep.format.stores import store_of
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.kinds import BadSample
from latentprep.sources.media import Medium, medium_of
from latentprep.sources.source import Source, open_own_source
from latentprep.storage.places import Place
from latentprep.text import plural

if TYPE_CHECKING:
    from latentprep.encoding.pipeline import Stages

_SHALLOW = 4  # shards of each split whose codes are decoded without ``deep``
_READERS = 4  # threads; reading, hashing and decompressing release the interpreter lock


@dataclass(frozen=True)
class Problem:
    """Something that is wrong. split, index: the shard, or None if it is not about a shard."""

    split: str | None
    index: int | None
    what: str


@dataclass(frozen=True)
class SourceImages:
    """The source's images, compared with the dataset by their content hashes.

    images: how many could be read. changed: the keys of those that are others than were encoded. unreadable: images
    that cannot be read now, or are damaged, with the reason: their codes are still good.
    """

    images: int = 0
    changed: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def __add__(self, other: SourceImages) -> SourceImages:
        return SourceImages(
            self.images + other.images, self.changed + other.changed, self.unreadable + other.unreadable
        )


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found.

    shards: how many are planned; checked: how many are committed and intact; decoded: how many had their codes decoded.
    rows, invalid, bytes: of the checked shards. problems: what is wrong (after `repair`: what is still wrong).
    repaired: shard -> whether it got the same bytes as its old record names; None if there was no readable record.
    hashed: all images of the intact and the changed shards, if there is a source and the dataset has content hashes
    (after `repair`, as they were before).
    """

    path: str
    shards: int
    checked: int
    decoded: int
    rows: int
    invalid: int
    bytes: int
    problems: tuple[Problem, ...]
    compared: Comparison | None = None
    hashed: SourceImages | None = None
    repaired: dict[str, bool | None] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict:
        return {"ok": self.ok, **asdict(self)}


def verify(
    dataset: str | Path | LatentDataset,
    *,
    deep: bool = False,
    source: str | Path | Source | None = None,
    samples: int = SAMPLES,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    repair: bool = False,
    weights: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: ProgressFactory = silent,
) -> VerifyResult:
    """Check a dataset: the count, size and checksum of every file, labels, keys, codes and derived files.

    deep: decode every shard, not only some of each split. source: the images that the dataset was made from. Keys,
    labels and content hashes are compared with it, so that all changed images are found, and `samples` images, drawn by
    `seed`, are encoded again; with 0 samples no codec is needed. data, labels, image_column, label_column,
    val_fraction, limit, seed: the values used to encode it. repair: encode the damaged and missing shards, and those
    with changed images, again, and no others.
    weights, device, batch_size, workers: for the codec, as in `encode`.

    Raises `DatasetError` if there is no dataset or its manifest is damaged (then nothing can be checked or repaired),
    `SourceError` if the source is not the dataset's, `UsageError` for `repair` without a source.

    >>> latentprep.verify("shards", deep=True).problems
    ()
    """
    if repair and source is None:
        raise UsageError(
            f"{opt('repair', True)} encodes damaged shards again, so it needs the images",
            f"say where they are with {opt('source')}",
        )
    check_whole("samples", samples, 0, hint=f"use {opt('samples', SAMPLES)}")
    root = dataset.root if isinstance(dataset, LatentDataset) else dataset  # as it is now
    dataset = open_dataset(root)
    source = open_own_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed, limit=limit,
    )  # fmt: skip
    stages = None
    if source is not None and (samples or repair):
        stages = own_stages(dataset, source, weights, device, batch_size, workers)
    source = None if source is None else own_rows(dataset, source)
    compared, repaired = None, {}
    try:
        check = _Check(dataset, deep, source, progress)
        hashed = None if source is None or dataset.manifest.content_hash is None else check.hashed
        if stages is not None and samples:
            compared, wrong = compare(dataset, stages, check.good, samples, seed, progress)
            for shard, what in wrong.items():
                check.damaged(shard, check.good.pop(shard), what)
        if stages is not None and repair and check.problems:
            repaired = _repair(dataset, stages, check.bad, bool(hashed and hashed.changed), progress)
            check = _Check(open_dataset(root), deep, source, progress)
    except OSError as error:
        raise system_fault(error) from error
    records = check.good.values()
    return VerifyResult(
        path=str(dataset.root),
        shards=len(check.good) + len(check.bad),
        checked=len(check.good),
        decoded=check.decoded,
        rows=sum(record.rows for record in records),
        invalid=sum(len(record.invalid) for record in records),
        bytes=sum(file.bytes for record in records for file in record.files.values()),
        problems=tuple(sorted(check.problems, key=lambda p: (p.split is None, p.split or "", p.index or 0))),
        compared=compared,
        hashed=hashed,
        repaired=repaired,
    )


class _Check:
    """One pass over a dataset. good: intact shards with their records; bad: all others, with their records if readable;
    hashed: the images of its source, if there is one.

    Raises `DatasetError` if the shards were made with another manifest.
    """

    def __init__(self, dataset: LatentDataset, deep: bool, source: Source | None, progress: ProgressFactory) -> None:
        self.dataset, self.deep, self.source = dataset, deep, source
        self.problems: list[Problem] = []
        self.good: dict[ShardId, ShardRecord] = {}
        self.bad: dict[ShardId, ShardRecord | None] = {}
        self.decoded = 0
        self.hashed = SourceImages()
        self._check_shards(self._records(), progress)
        self._check_derived()

    def damaged(self, shard: ShardId, record: ShardRecord | None, what: str) -> None:
        self.bad[shard] = record
        self.problems.append(Problem(shard.split, shard.index, what))

    def _records(self) -> list[ShardRecord]:
        """The records that can be read and belong to the manifest."""
        records, foreign = [], 0
        for shard in self.dataset.manifest.shards():
            try:
                record = self.dataset.record(shard.split, shard.index)
            except DatasetError as error:
                foreign += isinstance(error, ForeignRecord)
                self.damaged(shard, None, error.message)
                continue
            if record is None:
                self.damaged(shard, None, "is not committed")
            else:
                records.append(record)
        if foreign and not records:
            raise DatasetError(
                f"{self.dataset.root / MANIFEST} was altered: no record matches it",
                f"restore it, or encode to another folder with the same options and copy {MANIFEST} from there",
            )
        return records

    def _check_shards(self, records: list[ShardRecord], progress: ProgressFactory) -> None:
        seen: dict[str, dict[str, int]] = {split: {} for split in self.dataset.splits}  # key -> shard
        with ThreadPoolExecutor(_READERS) as pool, progress("verifying", len(records), "shards", 0) as bar:
            for record, (problem, keys, images) in zip(records, pool.map(self._read, records), strict=True):
                shard, self.hashed = record.shard, self.hashed + images
                if not problem:
                    holders = [(key, seen[record.split].setdefault(key, record.index)) for key in keys]
                    twice = [(key, holder) for key, holder in holders if holder != record.index]
                    if len(set(keys)) < len(keys):
                        problem = "holds a key twice"
                    elif twice:
                        problem = f"holds the key {twice[0][0]}, which is also in shard {record.split} {twice[0][1]}"
                if problem:
                    self.damaged(shard, record, problem)
                else:
                    self.good[shard] = record
                self.decoded += self._decodes(record)
                bar.advance(1, shard=str(shard))

    def _decodes(self, record: ShardRecord) -> bool:
        """Whether the shard's codes are decoded as well."""
        count = self.dataset.manifest.shard_count(record.split)
        return self.deep or count <= _SHALLOW or record.index in {count * k // _SHALLOW for k in range(_SHALLOW)}

    def _read(self, record: ShardRecord) -> tuple[str, list[str], SourceImages]:
        """Read one shard: what is wrong with it (empty if nothing is), its keys, and how its images compare."""
        split, index, codes = record.split, record.index, None
        try:
            self.dataset.check_files(record)
            if self._decodes(record):
                shard = self.dataset.read_shard(split, index)
                codes, labels, keys = shard.codes, shard.labels, shard.keys
            else:
                labels, keys = self.dataset.read_labels(split, index), self.dataset.read_keys(split, index)
            hashes = self.dataset.read_hashes(split, index)
        except DatasetError as error:
            return error.message, [], SourceImages()
        problem, images = self._rows_problem(record, codes, labels, keys, hashes), SourceImages()
        if not problem and hashes is not None and self.source is not None:
            medium = medium_of(self.dataset.manifest.transform)
            images = _compare_images(
                self.source, medium, record, index * self.dataset.manifest.shard_rows, keys, hashes
            )
            if images.changed:
                problem = (
                    f"holds {plural(len(images.changed), 'image')} changed since, the first is {images.changed[0]}"
                )
        return problem, keys, images

    def _rows_problem(
        self,
        record: ShardRecord,
        codes: np.ndarray | None,
        labels: np.ndarray,
        keys: list[str],
        hashes: np.ndarray | None,
    ) -> str:
        classes, start = len(self.dataset.classes), record.index * self.dataset.manifest.shard_rows
        invalid = {entry["row"] - start: entry["key"] for entry in record.invalid}
        if not INVALID_LABEL <= labels.min() <= labels.max() < classes:
            return f"holds a label outside the {classes} classes"
        if set(np.flatnonzero(labels == INVALID_LABEL).tolist()) != set(invalid):
            return "has different invalid rows than its record lists"
        if any(keys[place] != key for place, key in invalid.items()):
            return "has a different key at an invalid row than its record lists"
        if codes is not None and codes[sorted(invalid)].any():
            return "holds codes in an invalid row"
        if hashes is not None and hashes[sorted(invalid)].any():
            return "has a content hash at an invalid row"
        if self.source is not None:
            rows = slice(start, start + record.rows)
            wanted = np.array(self.source.labels(record.split)[rows], np.int32)
            if keys != self.source.keys(record.split)[rows] or (labels != wanted)[labels != INVALID_LABEL].any():
                return "has different keys or labels than the source"
        return ""

    def _check_derived(self) -> None:
        """Check the files that follow from manifest and records."""
        root, manifest = self.dataset.root, self.dataset.manifest
        try:
            read_stats(root)
        except DatasetError as error:
            self.problems.append(Problem(None, None, error.message))
        for path, expected in store_of(manifest).metadata_files(manifest).items():
            if not _same_json(root / path, expected):
                what = f"{path} does not match the manifest (only other Zarr readers use it)"
                self.problems.append(Problem(None, None, what))
        if not self.bad:
            there = (root / ERRORS).read_bytes() if (root / ERRORS).is_file() else b""
            if there != error_lines(list(self.good.values())):
                self.problems.append(Problem(None, None, f"{ERRORS} does not match the records"))


def _compare_images(
    source: Source, medium: Medium, record: ShardRecord, start: int, keys: list[str], hashes: np.ndarray
) -> SourceImages:
    """Compare the source's images with one shard's content hashes, where these are known. start: its first row."""
    images, changed, unreadable = 0, [], []
    for place in np.flatnonzero(known(hashes)).tolist():
        try:
            data = source.read(record.split, start + place).data
            if content_hash(data) != hashes[place].tobytes():
                medium.check(data)
                changed.append(keys[place])
            images += 1
        except (BadSample, SourceError, OSError) as error:
            unreadable.append(f"{keys[place]}: {getattr(error, 'strerror', None) or error}")
    return SourceImages(images, tuple(changed), tuple(unreadable))


def _repair(
    dataset: LatentDataset,
    stages: Stages,
    bad: dict[ShardId, ShardRecord | None],
    changed: bool,
    progress: ProgressFactory,
) -> dict[str, bool | None]:
    """Encode the bad shards again, and write the derived files again. changed: whether images were, and all that were
    are in bad shards, so that the next encode should not take them for replaced."""
    from latentprep.encoding.pipeline import LocalEngine

    manifest, jobs = dataset.manifest, list(bad)
    repaired: dict[str, bool | None] = {}
    total = sum(manifest.rows_in_shard(shard.split, shard.index) for shard in jobs)
    with writing(dataset.root), progress("repairing", total, "images", 0) as bar:
        create_dataset(dataset.root, manifest)

        def done(record: ShardRecord) -> None:
            before = bad[record.shard]
            repaired[str(record.shard)] = None if before is None else before.files == record.files

        commit_shards(dataset, LocalEngine(manifest, stages, bar).run(jobs), done)
        if changed and (stats := source_stats(stages.source, list(dataset.splits))) is not None:
            write_stats(dataset.root, stats)
        write_errors(dataset.root, [record for split in dataset.splits for record in dataset.records(split)])
    return repaired


def _same_json(path: Place, expected: bytes) -> bool:
    try:
        data = path.read_bytes()
        return data == expected or json.loads(data) == json.loads(expected)
    except (FileNotFoundError, ValueError, RecursionError):
        return False
