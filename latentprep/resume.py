"""Going on with a dataset: what a folder holds already, and whether it is what is asked for now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .errors import DatasetError
from .format.commit import remove_dataset
from .format.dataset import LatentDataset, open_dataset
from .format.lease import LOCK
from .format.manifest import MANIFEST, Manifest
from .format.places import Place


def stored_manifest(root: Place, overwrite: bool) -> Manifest | None:
    """The manifest of the dataset to resume; None for an empty folder. Refuses folders that hold other things."""
    if (root / MANIFEST).is_file():
        if not overwrite:
            return open_dataset(root).manifest
        remove_dataset(root)
        return None
    others = sorted(entry.name for entry in root.iterdir() if entry.name not in (MANIFEST + ".tmp", LOCK))
    if others:
        raise DatasetError(
            f"{root} is not empty and holds no latent dataset (it has {others[0]})", "choose another --out"
        )
    return None


def check_same(root: Place, stored: Manifest, asked: Manifest, fitted: bool) -> None:
    """`DatasetError` naming the first field in which the dataset at `root` is not the one asked for.

    fitted: the quantizer asked for is still to be fitted, so that only its bits and whether it is joint count.
    """
    have, want = _decided(stored), _decided(asked)
    if not fitted:
        have, want = have | {"quantizer": stored.quantizer.to_json()}, want | {"quantizer": asked.quantizer.to_json()}
    for name, there, here in differences(have, want):
        hints = {
            "source.sha256": "its files, labels, or --limit, --val-fraction or --seed changed; ",
            "joint": f"pass {'--joint' if there else '--no-joint'}; ",
            "codec.dtype": f"pass --dtype {there}; ",
            "codec.revision": "an earlier version began it; verify --repair completes it; ",
            **dict.fromkeys((f"splits.{n}" for n in stored.splits), "--limit or --val-fraction may have changed; "),
        }
        what = (
            "the source has changed" if name == "source.sha256" else f"{name} is {there}, this command asks for {here}"
        )
        raise DatasetError(
            f"{root} was made otherwise: {what}",
            hints.get(name, "") + "give the same options to resume, another --out, or --overwrite to start anew",
        )


def with_quantizer_of(dataset: LatentDataset, asked: Manifest) -> Manifest:
    """The manifest asked for with the dataset's quantizer and compression, so that the two can be merged.

    Raises `DatasetError` naming the first field in which codes of the two cannot mean the same.
    """
    for name, there, here in differences(_meaning(dataset.manifest), _meaning(asked)):
        raise DatasetError(
            f"the quantizer of {dataset.root} is for other latents: {name} is {there}, this command asks for {here}",
            "give the same options as for that dataset, or leave out --quantizer",
        )
    return replace(asked, quantizer=dataset.manifest.quantizer, compression=dataset.manifest.compression)


def _meaning(manifest: Manifest) -> dict:
    """What decides which latents an image has, and into how many codes they go."""
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "bits": manifest.quantizer.bits,
        "joint": bool(manifest.quantizer.filter),
        "transform": {key: manifest.transform.get(key) for key in ("size", "resize")},
    }


def _decided(manifest: Manifest) -> dict:
    """What the user decided; quantizer ranges and compression follow from it."""
    return _meaning(manifest) | {
        "transform": manifest.transform,
        "splits": manifest.splits,
        "classes": list(manifest.classes),
        "source": {"sha256": manifest.source["sha256"]},
        "shard_rows": manifest.shard_rows,
        "store": manifest.store,
    }


def differences(have: Any, want: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the dotted name and both values."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in dict.fromkeys([*have, *want]):
            yield from differences(have.get(key), want.get(key), f"{name}.{key}".lstrip("."))
    elif have != want:
        yield name, have, want
