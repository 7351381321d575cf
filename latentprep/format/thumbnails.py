"""Small pictures of codes, for viewers: latents to colours by one matrix, in numpy."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from latentprep.errors import DatasetError
from latentprep.format.quantizer import Quantizer

_SIDE = 48  # pixels, at least: the grid of latents is enlarged by a whole factor
_QUALITY = 50  # 610 bytes for one of 56 pixels by TAESD, whose 4-bit codes take 1,370
_BATCH = 64


@dataclass(frozen=True)
class ColourMap:
    """A linear map from latents to colours, ``colours = latents @ matrix + bias``; colours are −1…1.

    matrix: [C,3], flattened; bias: [3].
    """

    matrix: tuple[float, ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.matrix) % 3 or not self.matrix or len(self.bias) != 3:
            raise DatasetError("a thumbnail's map must have three numbers per channel, and three more")
        if not all(map(math.isfinite, self.matrix + self.bias)):
            raise DatasetError("the numbers of a thumbnail's map must be finite")

    def to_json(self) -> dict:
        return {"matrix": list(self.matrix), "bias": list(self.bias)}


def thumbnails(quantizer: Quantizer, colours: ColourMap, codes: np.ndarray) -> Iterator[bytes]:
    """u8 [n,C,h,w] -> a WebP file of each, at least 48 pixels per side."""
    from PIL import Image

    matrix, bias = np.array(colours.matrix).reshape(-1, 3), np.array(colours.bias)
    height, width = codes.shape[2:]
    factor = -(-_SIDE // min(height, width))
    for start in range(0, len(codes), _BATCH):
        latents = quantizer.dequantize(codes[start : start + _BATCH]).astype(np.float64)
        values = (np.einsum("nchw,ck->nhwk", latents, matrix) + bias + 1) * 127.5
        for pixels in values.round().clip(0, 255).astype(np.uint8):
            buffer = io.BytesIO()
            large = Image.fromarray(pixels).resize((factor * width, factor * height), Image.Resampling.BICUBIC)
            large.save(buffer, "WEBP", quality=_QUALITY)
            yield buffer.getvalue()
