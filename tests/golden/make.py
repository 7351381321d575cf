"""Made `v1`, `v1-wds` and `v1.json`, once, with the first release. Not run again: a new version gets its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import latentprep

sys.path.insert(0, str(Path(__file__).parent.parent))
from pictures import make_folder


def main(images: Path, name: str) -> None:
    here = Path(__file__).parent
    make_folder(images, train=3, val=2, classes=2, side=32)
    (images / "train" / "class_1" / "001.jpg").write_bytes(b"\xff\xd8\xff damaged")
    latentprep.encode(
        images,
        codec="resample:factor=8",
        bits=5,
        size=32,
        views=2,
        shard_rows=4,
        out=here / name,
        max_error_fraction=0.5,
    )
    latentprep.convert(here / name, out=here / f"{name}-wds", store="wds")
    (here / f"{name}.json").write_text(json.dumps(expected(here / name, "train/class_1/001.jpg")))


def expected(root: Path, invalid_key: str) -> dict:
    """What every reader must find in the dataset."""
    dataset = latentprep.open(root)
    splits = {split: dataset.load(split) for split in dataset.splits}
    return {
        "classes": list(dataset.classes),
        "splits": {
            split: {"codes": c.codes.tolist(), "labels": c.labels.tolist(), "keys": c.keys}
            for split, c in splits.items()
        },
        "val_latents": np.round(dataset.quantizer.dequantize(splits["val"].codes), 4).tolist(),
        "invalid_key": invalid_key,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
