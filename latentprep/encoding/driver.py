"""Going on with a dataset: what a folder holds already, whether it is what is asked for now, and who may write it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from latentprep.encoding.source_files import added_and_removed
from latentprep.errors import DatasetError, opt, system_fault
from latentprep.format.commit import commit_shard, create_dataset, remove_dataset
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.fields import differences
from latentprep.format.manifest import MANIFEST, STORED, Manifest, Plan, ShardRecord
from latentprep.format.shard import EncodedShard
from latentprep.sources.source import Source
from latentprep.storage.atomic import locked, make_folder
from latentprep.storage.locks import LOCK
from latentprep.storage.places import Place

_UNCOMMITTED = 2  # made shards that wait to be written


@contextlib.contextmanager
def writing(root: Place) -> Iterator[None]:
    """Hold the dataset at `root`, made if need be, for this one writer. A fault of the machine is a `SystemFault`."""
    try:
        make_folder(root)
        with locked(root):
            yield
    except OSError as error:
        raise system_fault(error) from error


def start(root: Place, manifest: Manifest) -> LatentDataset:
    """Make `root` the dataset of this manifest, or go on with the one that is there; to be called while `writing`."""
    create_dataset(root, manifest)
    return open_dataset(root)


def committed(dataset: LatentDataset, shards: Iterable[EncodedShard]) -> Iterator[ShardRecord]:
    """Commit shards as they come, in a thread, and yield each one's record when it is.

    However it ends, shards whose writing had begun are committed whole.
    """
    waiting: deque[Future[ShardRecord]] = deque()
    with ThreadPoolExecutor(1) as writer:
        for shard in shards:
            waiting.append(writer.submit(commit_shard, dataset.root, shard))
            while waiting and (waiting[0].done() or len(waiting) > _UNCOMMITTED):
                yield dataset.remember(waiting.popleft().result())
        while waiting:
            yield dataset.remember(waiting.popleft().result())


def stored_manifest(root: Place, asked: Plan, overwrite: bool, source: Source | None = None) -> Manifest | None:
    """The manifest of the dataset to resume; None for an empty folder, or one that `overwrite` emptied.

    asked: what is to be made there, a `Manifest` where quantizer and compression are decided, too. source: what is to
    be encoded, to say which images were added or removed. Raises `DatasetError` for a folder that holds anything else,
    naming the first setting in which it differs.
    """
    if (root / MANIFEST).is_file():
        if overwrite:
            remove_dataset(root)
            return None
        stored = open_dataset(root).manifest
        _check_same(root, stored, asked, source)
        return stored
    others = sorted(entry.name for entry in root.iterdir() if entry.name not in (MANIFEST + ".tmp", LOCK))
    if others:
        raise DatasetError(
            f"{root} is not empty and holds no latent dataset (it has {others[0]})", f"choose another {opt('out')}"
        )
    return None


def _check_same(root: Place, stored: Manifest, asked: Plan, source: Source | None) -> None:
    fitted = isinstance(asked, Manifest)
    for name, there, here in differences(_decided(stored, fitted), _decided(asked, fitted)):
        share = opt("val_fraction")
        of_source = name.partition(".")[0] in ("splits", "classes", "source")
        if source is not None and of_source and (changes := added_and_removed(open_dataset(root), source)):
            raise DatasetError(
                f"{root} was made otherwise: the source has changed: {changes}",
                f"undo that, and give the same {opt('limit')}, {share} and {opt('seed')}, to resume; choose another "
                f"{opt('out')}, or {opt('overwrite')} to encode all anew",
            )
        hints = {
            "source.sha256": f"its files, labels, or {opt('limit')}, {share} or {opt('seed')} changed; ",
            "joint": f"pass {opt('joint', bool(there))}; ",
            "codec.dtype": f"pass {opt('dtype', there)}; ",
            "codec.revision": f"an earlier version began it; verify with {opt('repair')} completes it; ",
            "transform.colour": f"from Python, colour={there!r} goes on with it; ",
            **dict.fromkeys((f"splits.{n}" for n in stored.splits), f"{opt('limit')} or {share} may have changed; "),
        }
        if name == "source.sha256":
            what = "the source has changed"
        elif name.partition(".")[0] in ("quantizer", "compression"):
            what = "its quantizer was fitted to other codes"
        else:
            what = f"{name} is {there}, this command asks for {here}"
        raise DatasetError(
            f"{root} was made otherwise: {what}",
            hints.get(name, "")
            + f"give the same options to resume, another {opt('out')}, or {opt('overwrite')} to start anew",
        )


def with_quantizer_of(dataset: LatentDataset, asked: Plan) -> Manifest:
    """The plan finished with the dataset's quantizer, what was counted with it, and compression, so that the two can be
    merged.

    Raises `DatasetError` naming the first field in which codes of the two cannot mean the same.
    """
    for name, there, here in differences(_meaning(dataset.manifest), _meaning(asked)):
        raise DatasetError(
            f"the quantizer of {dataset.root} is for other latents: {name} is {there}, this command asks for {here}",
            f"give the same options as for that dataset, or leave out {opt('quantizer')}",
        )
    given = dataset.manifest
    return asked.manifest(given.quantizer, given.statistics, given.compression)


def _meaning(plan: Plan) -> dict:
    """What decides which latents an image has, and into how many codes they go."""
    return {
        "codec": {key: value for key, value in plan.codec.items() if key != "weights"},
        "bits": plan.bits,
        "joint": plan.joint,
        "transform": {key: plan.transform.get(key) for key in ("size", "resize", "colour")},
    }


def _decided(plan: Plan, fitted: bool) -> dict:
    """What the user decided; where the manifest is `fitted`, also what calibration did."""
    decided = _meaning(plan) | {
        "transform": {"colour": STORED, **plan.transform},  # older datasets took colours as they are stored
        "splits": plan.splits,
        "classes": list(plan.classes),
        "source": {"sha256": plan.source["sha256"]},
        "shard_rows": plan.shard_rows,
        "store": plan.store,
    }
    if fitted and isinstance(plan, Manifest):
        decided |= {"quantizer": plan.quantizer.to_json(), "compression": plan.compression}
    return decided
