"""A dataset's latents before quantization, for studies of what quantizing costs: ``{split}.npy`` and what they are of.

latents.json   the dataset they belong to: its manifest's codec, transform, source and splits
{split}.npy    f16 [N,C,h,w], view 0; row i is row i of the split, and those that cannot be read are 0
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, opt
from .dataset import LatentDataset

LATENTS = "latents.json"


def described(dataset: LatentDataset) -> dict[str, Any]:
    """What latents depend on, and must be alike in a dataset and the float latents of it."""
    manifest = dataset.manifest
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "transform": {k: v for k, v in manifest.transform.items() if k in ("size", "resize", "colour")},
        "source": manifest.source["sha256"],
        "splits": manifest.splits,
    }


def check_latents(folder: Path, dataset: LatentDataset) -> None:
    """`DatasetError` if the folder holds latents of another dataset; one that holds none is free."""
    try:
        found = json.loads((folder / LATENTS).read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):
        found = None
    if found != described(dataset):
        raise DatasetError(
            f"{folder} holds the latents of another dataset than {dataset.root}",
            f"choose another folder as {opt('out')}",
        )


def read_latents(folder: Path, dataset: LatentDataset, split: str) -> np.ndarray:
    """f16 [N,C,h,w], mapped, of a split. Raises `DatasetError` if they are not there or not of this dataset."""
    way_out = f"make them with latentprep latents {dataset.root} SOURCE --out {folder}"
    try:
        found = json.loads((folder / LATENTS).read_bytes())
        values = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy takes the header for Python's literals, which fail in many ways
        raise DatasetError(f"{folder} holds no float latents of split '{split}' ({error})", way_out) from error
    want = described(dataset)
    if found != want or values.shape != (want["splits"][split], *dataset.manifest.latent) or values.dtype != np.float16:
        raise DatasetError(f"{folder} holds the latents of another dataset than {dataset.root}", way_out)
    return values
