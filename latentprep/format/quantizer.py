"""What a code means: the quantizer as plain data, and from codes back to latents in numpy.

The torch side (fitting, and quantizing on a device) is `latentprep.quantizing.scalar`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from latentprep.errors import DatasetError, check_whole, opt

MOST_BITS = 8  # of a code
FILTER_SIDE = 3  # cells


def check_bits(bits: int) -> int:
    """`bits` itself if it is 1 to 8, else a `UsageError`."""
    check_whole("bits", bits, 1, 8, f"use {opt('bits', 4)}, which keeps nearly all of the accuracy")
    return bits


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel's codes; networks scale their inputs by them.

    In units of codes: of ``(latent - lo) / step - 0.5``, with the latents that codes stand for. Without a filter, these
    are the codes themselves. A channel whose codes are all the same has deviation 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise DatasetError(
                f"the statistics have {len(self.mean)} means and {len(self.std)} deviations; one per channel is needed"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or not all(s >= 0 for s in self.std):
            raise DatasetError("the statistics' means must be finite, and their deviations finite and 0 or more")

    def to_json(self) -> dict:
        return {"mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class Quantizer:
    """Uniform scalar quantizer, one range per channel: ``latent ≈ lo + (code + 0.5) * step``.

    bits: 1 to 8; codes are u8, each below ``2**bits``.
    lo, step: one float32 value per latent channel, in latent units; ``step`` is positive.
    filter: float32 [C,C,3,3], flattened, if codes were chosen jointly (`latentprep.quantizing.joint`). Then subtract
    the middle of each channel's range from the formula's result, convolve with the filter (without flipping it, zeros
    outside the grid), and add the middle again.
    """

    bits: int
    lo: tuple[float, ...]
    step: tuple[float, ...]
    filter: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise DatasetError(f"the quantizer's bits must be 1 to 8, got {self.bits}")
        if len(self.lo) != len(self.step) or not self.lo:
            raise DatasetError(
                f"the quantizer has {len(self.lo)} lows and {len(self.step)} steps; there must be one per channel"
            )
        if not all(map(math.isfinite, self.lo + self.step)) or not all(s > 0 for s in self.step):
            raise DatasetError("the quantizer's lows must be finite, and its steps finite and above 0")
        weights = (len(self.lo) * FILTER_SIDE) ** 2
        if self.filter and (len(self.filter) != weights or not all(map(math.isfinite, self.filter))):
            raise DatasetError(f"the quantizer's filter must be {weights} finite numbers, got {len(self.filter)}")

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """u8 [..., C, h, w] -> f32 [..., C, h, w]: the middle of each code's cell, filtered if there is a filter."""
        lo, step = (np.array(values, np.float32)[:, None, None] for values in (self.lo, self.step))
        latents = lo + (codes.astype(np.float32) + np.float32(0.5)) * step
        if not self.filter:
            return latents
        middle, (height, width) = lo + np.float32(self.levels / 2) * step, codes.shape[-2:]
        kernel = np.array(self.filter, np.float32).reshape(len(lo), len(lo), FILTER_SIDE, FILTER_SIDE)
        margin = FILTER_SIDE // 2
        padded = np.pad(latents - middle, [(0, 0)] * (codes.ndim - 2) + [(margin, margin)] * 2)
        filtered = sum(
            np.einsum("ck,...khw->...chw", kernel[:, :, i, j], padded[..., i : i + height, j : j + width])
            for i, j in np.ndindex(FILTER_SIDE, FILTER_SIDE)
        )
        return middle + filtered

    def to_json(self) -> dict:
        plain = {"bits": self.bits, "lo": list(self.lo), "step": list(self.step)}
        return plain | ({"filter": list(self.filter)} if self.filter else {})
