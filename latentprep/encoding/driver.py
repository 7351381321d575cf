"""Start or resume a dataset: lock its folder, compare what is there with what was requested, commit shards."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from latentprep.encoding.parts import part_of
from latentprep.encoding.source_files import added_and_removed
from latentprep.errors import DatasetError, opt, system_fault
from latentprep.format.commit import commit_shard, create_dataset, remove_dataset
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.fields import differences
from latentprep.format.manifest import CODEBOOKS, MANIFEST, STORED, Manifest, Plan, ShardRecord
from latentprep.format.shard import EncodedShard
from latentprep.sources.source import Source
from latentprep.storage.atomic import locked, make_folder
from latentprep.storage.locks import LOCK
from latentprep.storage.places import Place, RemotePath

_BUCKET_WRITERS = 16  # shards written at once to a bucket, where each takes some requests, one after the other
_UNCOMMITTED = 2  # finished shards that may wait to be written, besides
_BEFORE = (MANIFEST + ".tmp", CODEBOOKS, CODEBOOKS + ".tmp", LOCK)  # what may lie in a folder before its manifest


@contextlib.contextmanager
def writing(root: Place) -> Iterator[None]:
    """Lock the dataset at `root` for one writer; its folder is created if needed. OSErrors become `SystemFault`."""
    try:
        make_folder(root)
        with locked(root):
            yield
    except OSError as error:
        raise system_fault(error) from error


def start(root: Place, manifest: Manifest) -> LatentDataset:
    """Create the dataset of this manifest at `root`, or resume the one that is there. Call it while `writing`."""
    create_dataset(root, manifest)
    return open_dataset(root)


def commit_shards(
    dataset: LatentDataset, shards: Generator[EncodedShard, None, None], done: Callable[[ShardRecord], None]
) -> None:
    """Commit shards in threads, as they come, and call `done` with the record of each: one by one to a folder, where
    the disk is the limit, several at once to a bucket.

    Shards whose writing has begun are committed completely, and `done` called, even after an error. `shards` is closed
    at the end: left to the garbage collector, it could be closed in a thread for which its own threads wait.
    """
    waiting: deque[Future[ShardRecord]] = deque()
    writers = _BUCKET_WRITERS if isinstance(dataset.root, RemotePath) else 1
    with ThreadPoolExecutor(writers) as pool, contextlib.closing(shards):
        try:
            for shard in shards:
                waiting.append(pool.submit(commit_shard, dataset.root, shard))
                while waiting and (waiting[0].done() or len(waiting) > writers + _UNCOMMITTED):
                    done(dataset.remember(waiting.popleft().result()))
        finally:
            while waiting:
                done(dataset.remember(waiting.popleft().result()))


def stored_manifest(root: Place, asked: Plan, overwrite: bool, source: Source | None = None) -> Manifest | None:
    """The manifest of the dataset to resume; None for an empty folder, or one that `overwrite` emptied.

    asked: what was requested; a `Manifest` if quantizer and compression are decided too. source: the images to encode,
    so that the error can say which were added or removed. Raises `DatasetError` for a folder that holds anything else,
    naming the first setting that differs.
    """
    if (root / MANIFEST).is_file():
        if overwrite:
            remove_dataset(root)
            return None
        stored = open_dataset(root).manifest
        _check_same(root, stored, asked, source)
        return stored
    others = sorted(entry.name for entry in root.iterdir() if entry.name not in _BEFORE)
    if others:
        raise DatasetError(
            f"{root} is not empty and holds no latent dataset (it has {others[0]})",
            f"choose another folder as {opt('out')}",
        )
    return None


def _check_same(root: Place, stored: Manifest, asked: Plan, source: Source | None) -> None:
    fitted = isinstance(asked, Manifest)
    there, here = part_of(stored), part_of(asked)
    if there != here:
        raise DatasetError(
            f"{root} has {there.text()}, but {here.text()} was requested",
            f"give each part a folder of its own as {opt('out')}",
        )
    for name, stored_value, requested in differences(_decided(stored, fitted), _decided(asked, fitted)):
        share = opt("val_fraction")
        of_source = name.partition(".")[0] in ("splits", "classes", "source")
        if source is not None and of_source and (changes := added_and_removed(open_dataset(root), source)):
            raise DatasetError(
                f"the source of {root} has changed: {changes}",
                f"to resume, restore the source and use the same {opt('limit')}, {share} and {opt('seed')}; to start "
                f"again, choose another folder as {opt('out')}, or use {opt('overwrite', True)}",
            )
        hints = {
            "source.sha256": f"its files or labels changed, or {opt('limit')}, {share} or {opt('seed')} did; ",
            "joint": f"use {opt('joint', bool(stored_value))}; ",
            "equal_bits": f"use {opt('equal_bits', bool(stored_value))}; ",
            "codec.dtype": f"give the codec the option dtype={stored_value}; ",
            "codec.revision": f"an earlier version started it: verify with {opt('repair', True)} completes it; ",
            "transform.colour": f"from Python, colour={stored_value!r} resumes it; ",
            **dict.fromkeys((f"splits.{n}" for n in stored.splits), f"{opt('limit')} or {share} may have changed; "),
        }
        if name == "source.sha256":
            what = f"the source of {root} has changed"
        elif name.partition(".")[0] in ("quantizer", "compression"):
            what = f"{root} has different settings: its quantizer was fitted to other codes"
        elif name.partition(".")[0] == "thumbnail":
            what = f"{root} has different settings: its thumbnails are not by this linear decoder"
        else:
            stored_text, requested_text = _said(stored_value), _said(requested)
            what = f"{root} has different settings: {name} is {stored_text}, but {requested_text} was requested"
        raise DatasetError(
            what,
            hints.get(name, "")
            + f"use the same settings to resume; to start again, choose another folder as {opt('out')}, "
            + f"or use {opt('overwrite', True)}",
        )


def with_quantizer_of(dataset: LatentDataset, asked: Plan, option: str = "quantizer") -> Manifest:
    """Finish the plan with the quantizer, statistics and compression of `dataset`, so that the two can be merged.

    option: by which it was given.

    Raises `DatasetError` naming the first setting that would give their codes different meanings.
    """
    for name, there, requested in differences(_meaning(dataset.manifest), _meaning(asked)):
        raise DatasetError(
            f"the quantizer of {dataset.root} does not fit: {name} is {_said(there)} there, but {_said(requested)} was "
            "requested",
            f"use the same settings as for that dataset, or leave out {opt(option)}",
        )
    given = dataset.manifest
    return asked.manifest(given.quantizer, given.statistics, given.compression)


def _said(value: Any) -> str:
    """``none`` is said of what a codec's configuration leaves out."""
    return "none" if value is None else str(value)


def _meaning(plan: Plan) -> dict:
    """The settings that decide what an image's codes mean."""
    return {
        "codec": {key: value for key, value in plan.codec.items() if key != "weights"},
        "bits": plan.asked_bits,
        "rate": plan.rate,
        "joint": plan.joint,
        "equal_bits": plan.mean_bits is None,
        "transform": {key: plan.transform.get(key) for key in ("size", "resize", "colour")},
        "latent": list(plan.latent),
    }


def _decided(plan: Plan, fitted: bool) -> dict:
    """The settings that the user chose and, if `fitted`, those that calibration chose."""
    decided = _meaning(plan) | {
        "transform": {"colour": STORED, **plan.transform},  # older datasets kept colours as stored
        "splits": plan.splits,
        "classes": list(plan.classes),
        "source": {"sha256": plan.source["sha256"]},
        "shard_rows": plan.shard_rows,
        "store": plan.store,
    }
    if fitted and isinstance(plan, Manifest):
        decided |= {"quantizer": plan.quantizer.to_json(), "compression": plan.compression}
        decided |= {"thumbnail": None if plan.thumbnail is None else plan.thumbnail.to_json()}
    return decided
