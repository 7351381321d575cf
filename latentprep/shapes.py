"""`shapes`: a ten-class JPEG dataset rendered on demand, so that the whole job runs with no download."""

from __future__ import annotations

import io
import math

import numpy as np

from latentprep.layouts import Found, Tree

CLASSES = ("arrow", "circle", "crescent", "cross", "heart", "hexagon", "ring", "square", "star", "triangle")
SIZES = {"train": 5000, "val": 1000}  # balanced
PIXELS = 128  # width and height of an image


def find() -> Tree:
    """All rows of the dataset; nothing is rendered."""
    found = {
        split: [Found(f"{split}/{CLASSES[i % 10]}/{i // 10:04d}.jpg", CLASSES[i % 10], (split, i)) for i in range(size)]
        for split, size in SIZES.items()
    }
    return Tree(found, {})


def read(at: tuple[str, int]) -> bytes:
    from PIL import Image

    split, index = at
    rng = np.random.default_rng([list(SIZES).index(split), index])
    img = Image.fromarray(rng.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8))
    out = io.BytesIO()
    img.save(out, "JPEG")
    return out.getvalue()
