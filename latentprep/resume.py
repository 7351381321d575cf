"""Going on with a dataset: what a folder holds already, and whether it is what is asked for now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DatasetError
from .format.commit import remove_dataset
from .format.dataset import open_dataset
from .format.manifest import MANIFEST, Manifest


def stored_manifest(root: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the dataset to resume; None for an empty folder. Refuses folders that hold other things."""
    if (root / MANIFEST).exists():
        if not overwrite:
            return open_dataset(root).manifest
        remove_dataset(root)
        return None
    others = sorted(entry.name for entry in root.iterdir() if entry.name != MANIFEST + ".tmp")
    if others:
        raise DatasetError(
            f"{root} is not empty and holds no latent dataset (it has {others[0]})", "choose another --out"
        )
    return None


def check_same(root: Path, stored: Manifest, asked: Manifest) -> None:
    """`DatasetError` naming the first field in which the dataset at `root` is not the one asked for."""
    for name, have, want in _differences(_comparable(stored), _comparable(asked)):
        hints = {
            "source.sha256": "its files, labels, or --limit, --val-fraction or --seed changed; ",
            "codec.dtype": f"pass --dtype {have}; ",
            **dict.fromkeys((f"splits.{n}" for n in stored.splits), "--limit or --val-fraction may have changed; "),
        }
        what = (
            "the source has changed" if name == "source.sha256" else f"{name} is {have}, this command asks for {want}"
        )
        raise DatasetError(
            f"{root} was made otherwise: {what}",
            hints.get(name, "") + "give the same options to resume, another --out, or --overwrite to start anew",
        )


def _comparable(manifest: Manifest) -> dict:
    """What the user decided; quantizer ranges and compression follow from it."""
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "bits": manifest.quantizer.bits,
        "transform": manifest.transform,
        "splits": manifest.splits,
        "classes": list(manifest.classes),
        "source": {"sha256": manifest.source["sha256"]},
        "shard_rows": manifest.shard_rows,
    }


def _differences(have: Any, want: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(have, dict) and isinstance(want, dict):
        for key in dict.fromkeys([*have, *want]):
            yield from _differences(have.get(key), want.get(key), f"{name}.{key}".lstrip("."))
    elif have != want:
        yield name, have, want
