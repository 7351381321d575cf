"""A dataset's latents before quantization, in a folder of their own, to study what quantizing costs.

latents.json   the dataset they belong to: codec, transform, source and splits of its manifest
{split}.npy    f16 [N,C,h,w], view 0; row i is row i of the split, 0 if it could not be read
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from latentprep.errors import DatasetError, opt
from latentprep.format.dataset import LatentDataset

LATENTS = "latents.json"


def described(dataset: LatentDataset) -> dict[str, Any]:
    """What latents depend on. It must be the same for a dataset and its float latents."""
    manifest = dataset.manifest
    return {
        "codec": {key: value for key, value in manifest.codec.items() if key != "weights"},
        "transform": {k: v for k, v in manifest.transform.items() if k in ("size", "resize", "colour")},
        "source": manifest.source["sha256"],
        **({"part": manifest.source["part"]} if "part" in manifest.source else {}),
        "splits": manifest.splits,
    }


def check_latents(folder: Path, dataset: LatentDataset) -> None:
    """Raise `DatasetError` if the folder holds latents of another dataset. A folder without latents passes."""
    try:
        saved = json.loads((folder / LATENTS).read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):
        saved = None
    if saved != described(dataset):
        raise DatasetError(
            f"{folder} holds the latents of another dataset, not of {dataset.root}",
            f"choose another folder as {opt('out')}",
        )


def read_latents(folder: Path, dataset: LatentDataset, split: str) -> np.ndarray:
    """A split's latents, f16 [N,C,h,w], memory-mapped. `DatasetError` if missing or of another dataset."""
    way_out = f"make them with latentprep latents {dataset.root} SOURCE --out {folder}"
    try:
        saved = json.loads((folder / LATENTS).read_bytes())
        values = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python literals, which fails in many ways
        raise DatasetError(f"{folder} holds no float latents of split '{split}' ({error})", way_out) from error
    want = described(dataset)
    if saved != want or values.shape != (want["splits"][split], *dataset.manifest.latent) or values.dtype != np.float16:
        raise DatasetError(f"{folder} holds the latents of another dataset, not of {dataset.root}", way_out)
    return values
