"""Pictures and folders of pictures that the tests make."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """u8 [H,W,3] or [H,W] -> a JPEG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """u8 [H,W,3]: smooth colours with some detail, different for each seed."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


def make_folder(root: Path, train: int = 6, val: int = 3, classes: int = 2, side: int = 64) -> Path:
    """`root`/{train,val}/class_k/*.jpg with that many images a class."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 1000 * label + 2 * i + (split == "val")
                (folder / f"{i:03}.jpg").write_bytes(jpeg(picture(seed, side, side + 8)))
    return root
