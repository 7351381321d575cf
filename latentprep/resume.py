"""Going on with a dataset: what a folder holds already, and whether it is what is asked for now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .errors import DatasetError, opt
from .format.commit import remove_dataset
from .format.dataset import LatentDataset, open_dataset
from .format.locks import LOCK
from .format.manifest import MANIFEST, STORED, Manifest
from .format.places import Place
from .source_files import added_and_removed
from .sources import Source


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
            f"{root} is not empty and holds no latent dataset (it has {others[0]})", f"choose another {opt('out')}"
        )
    return None


def check_same(root: Place, stored: Manifest, asked: Manifest, fitted: bool, source: Source | None = None) -> None:
    """`DatasetError` naming the first field in which the dataset at `root` is not the one asked for.

    fitted: the quantizer asked for is still to be fitted, so that only its bits and whether it is joint count.
    source: what is to be encoded, to say which images were added or removed.
    """
    have, want = _decided(stored), _decided(asked)
    if not fitted:
        have, want = have | {"quantizer": stored.quantizer.to_json()}, want | {"quantizer": asked.quantizer.to_json()}
    for name, there, here in differences(have, want):
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
        what = (
            "the source has changed" if name == "source.sha256" else f"{name} is {there}, this command asks for {here}"
        )
        raise DatasetError(
            f"{root} was made otherwise: {what}",
            hints.get(name, "")
            + f"give the same options to resume, another {opt('out')}, or {opt('overwrite')} to start anew",
        )


def with_quantizer_of(dataset: LatentDataset, asked: Manifest) -> Manifest:
    """The manifest asked for with the dataset's quantizer, what was counted with it, and compression, so that the two
    can be merged.

    Raises `DatasetError` naming the first field in which codes of the two cannot mean the same.
    """
    for name, there, here in differences(_meaning(dataset.manifest), _meaning(asked)):
        raise DatasetError(
            f"the quantizer of {dataset.root} is for other latents: {name} is {there}, this command asks for {here}",
            f"give the same options as for that dataset, or leave out {opt('quantizer')}",
        )
    given = dataset.manifest
    return replace(asked, quantizer=given.quantizer, statistics=given.statistics, compression=given.compression)


def _meaning(manifest: Manifest) -> dict:
    """What decides which latents an image has, and into how many codes they go."""
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "bits": manifest.quantizer.bits,
        "joint": bool(manifest.quantizer.filter),
        "transform": {key: manifest.transform.get(key) for key in ("size", "resize", "colour")},
    }


def _decided(manifest: Manifest) -> dict:
    """What the user decided; quantizer ranges and compression follow from it."""
    return _meaning(manifest) | {
        "transform": {"colour": STORED, **manifest.transform},  # older datasets took colours as they are stored
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
