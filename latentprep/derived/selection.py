"""`subset` and `merge`: some of a dataset's samples, or the samples of several datasets, without images or codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentprep.derived.derive import Rows, derive, every_row, opened
from latentprep.encoding.encode import EncodeResult
from latentprep.encoding.parts import Part, part_of
from latentprep.encoding.source_files import some
from latentprep.errors import DatasetError, UsageError, check_number, nearest, opt
from latentprep.format.dataset import Codes, LatentDataset
from latentprep.format.fields import differences
from latentprep.format.manifest import INVALID_LABEL, Manifest
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.source import fingerprint
from latentprep.storage.places import several


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
    """Make a dataset in the folder `out` from some classes of `dataset`, or a share of them. Run again, it resumes.

    classes: names, numbered again in the dataset's order; None means all. fraction: the share of each class of each
    split, drawn by `seed`, at least one sample. A larger fraction includes what a smaller one draws. Rows that could
    not be read are left out.

    Raises `UsageError` for an unknown class or a fraction out of range, `DatasetError` if the dataset is damaged.

    >>> latentprep.subset("shards", classes=["circle", "star"], fraction=0.5, out="few").rows
    {'train': 6, 'val': 6}
    """
    check_number("fraction", fraction, 0, 1, above=True)
    source = opened(dataset)
    classes = None if classes is None else several(classes)
    for name in classes or ():
        if name not in source.classes:
            raise UsageError(f"{source.root} has no class '{name}'", nearest(name, source.classes))
    chosen = [label for label, name in enumerate(source.classes) if classes is None or name in classes]
    table = np.full(len(source.classes) + 1, INVALID_LABEL, np.int32)  # the last entry is for label -1
    table[chosen] = np.arange(len(chosen))
    rows: Rows = {}
    for split in source.splits:
        labels = source.labels(split)
        drawn = [_draw(np.flatnonzero(labels == label), fraction, [seed, label, *split.encode()]) for label in chosen]
        kept = np.sort(np.concatenate(drawn))
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
    """Make one dataset in the folder `out` from several. Rows of the same split follow each other in the order given.

    The store, the rows per shard and the compression are those of the first part. Encode the other parts with
    ``quantizer=`` the first one: otherwise each part has a quantizer of its own, and they differ. Run again, it
    resumes. Rows of a part without content hashes get unknown ones where another part has them.

    The parts of one source, encoded with ``shard_of=``, may be given in any order, and have the same quantizer by
    themselves. All together become, byte for byte, the dataset of one encode.

    Raises `UsageError` for fewer than two parts, `DatasetError` naming the first field in which their settings differ,
    a sample that two of them hold, or a part of a source that is missing.
    """
    datasets = several(datasets)
    if len(datasets) < 2:
        raise UsageError("merge takes two or more datasets", "name all parts")
    parts = _in_order([opened(dataset) for dataset in datasets])
    hashed = next((part.manifest.content_hash for part in parts if part.manifest.content_hash), None)
    first = replace(parts[0].manifest, content_hash=hashed)
    for part in parts[1:]:
        for name, there, here in differences(
            _configuration(first, part.manifest), _configuration(part.manifest, first)
        ):
            what = f"{name} is {here} in the first and {there} in the second"
            if name.startswith("quantizer") and part_of(first).of > 1:
                what = "their quantizers differ, as they do if they were calibrated on different kinds of machines"
            again = f"encode it again with {opt('quantizer', str(parts[0].root))}"
            raise DatasetError(
                f"{part.root} and {parts[0].root} cannot be merged: {what}",
                again if name.startswith("quantizer") else "encode all parts with the same settings",
            )
    rows = every_row(parts)
    if part_of(first).of > 1:
        splits = {split: len(taken) for split, taken in rows.items()}
        source = {name: value for name, value in first.source.items() if name != "part"}
        merged = replace(first, splits=splits, source=source)
        return derive(out, merged, parts, rows, title="merging", overwrite=overwrite, progress=progress)
    views = {split: part.manifest.views(split) for part in parts for split in part.splits}
    crops = {
        name: value for part in parts for name, value in part.manifest.transform.items() if name.startswith("crop")
    }
    one = len(set(views.values())) == 1
    transform = {**first.transform, "views": next(iter(views.values())) if one else views, **crops}
    spec = " + ".join(dict.fromkeys(part.manifest.source["spec"] for part in parts))
    merged = _manifest(replace(first, transform=transform), parts, rows, first.classes, None, spec)
    return derive(out, merged, parts, rows, title="merging", overwrite=overwrite, progress=progress)


def _in_order(datasets: list[LatentDataset]) -> list[LatentDataset]:
    """All parts of one source, in their order; datasets that are no parts, as they are.

    Raises `DatasetError` for a part that is missing, there twice, or of another source or encode.
    """
    first, found = datasets[0], dict[Part, LatentDataset]()
    of = part_of(first.manifest).of
    for dataset in datasets:
        part = part_of(dataset.manifest)
        if part.of != of:
            raise DatasetError(
                f"{first.root} has {part_of(first.manifest).text()}, and {dataset.root} has {part.text()}",
                "merge all parts of one source, and nothing else",
            )
        if of == 1:
            continue
        for name, here, there in differences(_cut(first.manifest), _cut(dataset.manifest)):
            changed = (
                f"files or labels changed in between, or {opt('limit')}, {opt('val_fraction')} or {opt('seed')} did"
            )
            what = f"{name} is {here} in the first and {there} in the second"
            raise DatasetError(
                f"{first.root} and {dataset.root} are not parts of one source: "
                + (changed if name == "source" else what),
                "encode all parts from the same source and with the same settings",
            )
        if part in found:
            raise DatasetError(f"{found[part].root} and {dataset.root} both have {part.text()}", "name each part once")
        found[part] = dataset
    if of == 1:
        return datasets
    if missing := [str(part) for part in (Part(index, of) for index in range(of)) if part not in found]:
        which = f"part {missing[0]} is" if len(missing) == 1 else f"parts {some(missing)} are"
        raise DatasetError(
            f"{which} missing",
            f"name all {of} parts, or encode with {opt('shard_of', missing[0])} and the same settings",
        )
    return [found[part] for part in sorted(found)]


def _cut(manifest: Manifest) -> dict[str, Any]:
    """What must be the same in all parts of one source for each row to be in one of them."""
    return {
        "source": manifest.source["sha256"], "splits": list(manifest.splits), "shard_rows": manifest.shard_rows,
    }  # fmt: skip


def _configuration(manifest: Manifest, other: Manifest) -> dict[str, Any]:
    """What must be the same in `manifest` and `other` for their codes to be in one dataset."""
    shared = [split for split in manifest.splits if split in other.splits]
    crops = {name for name in manifest.transform if name.startswith("crop")} & set(other.transform)
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "latent": list(manifest.latent),
        "bits": manifest.asked_bits,
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
    """`base` for these rows, with the fingerprint of their source. `DatasetError` if two parts hold the same sample."""
    samples: dict[str, list[tuple[str, int]]] = {}
    for split, taken in rows.items():
        entries: list[tuple[str, int]] = []
        for number, part in enumerate(parts):
            if split in part.splits:
                keys, labels = _keys(part, split), part.labels(split)
                labels = labels if table is None else table[labels]
                entries += [(keys[row], int(labels[row])) for row in taken[taken[:, 0] == number, 1].tolist()]
        seen: set[str] = set()
        for key, _ in entries:
            if key in seen and len(parts) > 1:
                raise DatasetError(
                    f"two of the parts hold the sample {key} of split '{split}'", "give parts that share no sample"
                )
            seen.add(key)
        samples[split] = entries
    splits = {split: len(taken) for split, taken in rows.items()}
    return replace(base, classes=classes, splits=splits, source={"spec": spec, "sha256": fingerprint(classes, samples)})


def _keys(dataset: LatentDataset, split: str) -> list[str]:
    shards = range(dataset.manifest.shard_count(split))
    return [key for index in shards for key in dataset.read_keys(split, index)]


def _draw(rows: np.ndarray, fraction: float, seed: list[int]) -> np.ndarray:
    """A share of the rows, at least one of them."""
    count = max(1, round(fraction * len(rows)))
    return np.random.default_rng(seed).permutation(rows)[:count]
