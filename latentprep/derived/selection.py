"""Some of a dataset's samples, and several datasets' samples together, without images and without the codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentprep.derived.derive import Rows, derive, every_row, opened
from latentprep.encoding.driver import differences
from latentprep.encoding.encode import EncodeResult
from latentprep.errors import DatasetError, UsageError, nearest, opt
from latentprep.format.dataset import Codes, LatentDataset
from latentprep.format.manifest import INVALID_LABEL, Manifest
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.source import fingerprint


def subset(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Make `out` of the samples of `dataset` that are of these classes, and of these a share. Run again, it resumes.

    classes: names, numbered anew in the dataset's order; None is all. fraction: of each class of each split, drawn by
    `seed`, at least one; what a smaller fraction draws, a larger one draws too. Rows that could not be read are left
    out.

    Raises `UsageError` for an unknown class or a fraction out of range, `DatasetError` if the dataset is damaged.

    >>> latentprep.subset("shards", classes=["circle", "star"], fraction=0.5, out="few").rows
    {'train': 6, 'val': 6}
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"{opt('fraction')} must be above 0 and at most 1, got {fraction:g}")
    source = opened(dataset)
    for name in classes or ():
        if name not in source.classes:
            raise UsageError(f"{source.root} has no class '{name}'", nearest(name, source.classes))
    chosen = [label for label, name in enumerate(source.classes) if classes is None or name in classes]
    table = np.full(len(source.classes) + 1, INVALID_LABEL, np.int32)  # the last for label -1
    table[chosen] = np.arange(len(chosen))
    rows: Rows = {}
    for split in source.splits:
        labels = _labels(source, split)
        found = [_draw(np.flatnonzero(labels == label), fraction, [seed, label, *split.encode()]) for label in chosen]
        kept = np.sort(np.concatenate(found))
        rows[split] = np.stack([np.zeros_like(kept), kept], axis=1)
    names = tuple(source.classes[label] for label in chosen)
    manifest = _manifest(source.manifest, [source], rows, names, table, source.manifest.source["spec"])

    def renumber(shard: Codes, saturated: tuple[int, ...]) -> tuple[Codes, tuple[int, ...]]:
        return replace(shard, labels=table[shard.labels]), saturated

    return derive(
        out, manifest, [source], rows, renumber, title="selecting", overwrite=overwrite, progress=progress
    )  # fmt: skip


def merge(
    datasets: Sequence[str | Path | LatentDataset],
    *,
    out: str | Path,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Make `out` of several encodes' samples: their splits side by side, and rows of one split in the order given.

    Store, rows a shard and compression are the first one's. Encode the parts with ``quantizer=`` the first one, or
    their quantizers are fitted to different images and differ. Run again, it resumes.

    Raises `UsageError` for fewer than two, `DatasetError` naming the first field in which their configurations differ,
    or a sample that two of them hold.
    """
    if len(datasets) < 2:
        raise UsageError("merge takes two datasets or more", "name all parts")
    parts = [opened(dataset) for dataset in datasets]
    first = parts[0].manifest
    for part in parts[1:]:
        for name, there, here in differences(
            _configuration(first, part.manifest), _configuration(part.manifest, first)
        ):
            hint = f"encode it again with {opt('quantizer')} {parts[0].root}" if name.startswith("quantizer") else ""
            raise DatasetError(
                f"{part.root} and {parts[0].root} are no parts of one dataset: "
                f"{name} is {here} in the one and {there} in the other",
                hint or "encode all parts with the same options",
            )
    rows = every_row(parts)
    views = {split: part.manifest.views(split) for part in parts for split in part.splits}
    crops = {
        name: value for part in parts for name, value in part.manifest.transform.items() if name.startswith("crop")
    }
    one = len(set(views.values())) == 1
    transform = {**first.transform, "views": next(iter(views.values())) if one else views, **crops}
    spec = " + ".join(dict.fromkeys(part.manifest.source["spec"] for part in parts))
    merged = _manifest(replace(first, transform=transform), parts, rows, first.classes, None, spec)
    return derive(out, merged, parts, rows, title="merging", overwrite=overwrite, progress=progress)


def _configuration(manifest: Manifest, other: Manifest) -> dict[str, Any]:
    """What must be alike in `manifest` and `other` for their codes to lie in one dataset."""
    shared = [split for split in manifest.splits if split in other.splits]
    crops = {name for name in manifest.transform if name.startswith("crop")} & set(other.transform)
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "latent": list(manifest.latent),
        "quantizer": manifest.quantizer.to_json(),
        "classes": list(manifest.classes),
        "flip": None if manifest.flip is None else list(manifest.flip),
        "transform": {
            name: manifest.transform.get(name) for name in ("size", "resize", "colour", "seed", *sorted(crops))
        },
        "views": {split: manifest.views(split) for split in shared},
    }


def _manifest(
    base: Manifest,
    parts: Sequence[LatentDataset],
    rows: Rows,
    classes: tuple[str, ...],
    table: np.ndarray | None,
    spec: str,
) -> Manifest:
    """`base` for these rows, with the fingerprint that a source of them has. `DatasetError` for a sample twice."""
    samples: dict[str, list[tuple[str, int]]] = {}
    for split, taken in rows.items():
        found: list[tuple[str, int]] = []
        for number, part in enumerate(parts):
            if split in part.splits:
                keys, labels = _keys(part, split), _labels(part, split)
                labels = labels if table is None else table[labels]
                found += [(keys[row], int(labels[row])) for row in taken[taken[:, 0] == number, 1].tolist()]
        seen: set[str] = set()
        for key, _ in found:
            if key in seen and len(parts) > 1:
                raise DatasetError(
                    f"two of the parts hold the sample {key} of split '{split}'", "give parts that share no sample"
                )
            seen.add(key)
        samples[split] = found
    splits = {split: len(taken) for split, taken in rows.items()}
    return replace(base, classes=classes, splits=splits, source={"spec": spec, "sha256": fingerprint(classes, samples)})


def _labels(dataset: LatentDataset, split: str) -> np.ndarray:
    """i32 [N], invalid rows included."""
    shards = [dataset.read_labels(split, index) for index in range(dataset.manifest.shard_count(split))]
    return np.concatenate([*shards, np.empty(0, np.int32)])


def _keys(dataset: LatentDataset, split: str) -> list[str]:
    shards = range(dataset.manifest.shard_count(split))
    return [key for index in shards for key in dataset.read_keys(split, index)]


def _draw(rows: np.ndarray, fraction: float, seed: list[int]) -> np.ndarray:
    """A share of the rows, at least one of them."""
    count = max(1, round(fraction * len(rows)))
    return np.random.default_rng(seed).permutation(rows)[:count]
