"""What a code means: the quantizer as plain data, with its definition in numpy.

The torch side (fitting, and quantizing on a device) is `latentprep.quantize`; both agree to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import DatasetError, UsageError


def check_bits(bits: int) -> int:
    """`bits` itself if it is 1 to 8, else a `UsageError`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise UsageError(f"bits must be 1 to 8, got {bits}", "4 keeps nearly all of the accuracy; use --bits 4")
    return bits


@dataclass(frozen=True)
class Quantizer:
    """Uniform scalar quantizer, one range per channel: ``latent ≈ lo + (code + 0.5) * step``.

    bits: 1 to 8; codes are u8, each below ``2**bits``.
    lo, step: one float32 value per latent channel, in latent units; ``step`` is positive.
    """

    bits: int
    lo: tuple[float, ...]
    step: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise DatasetError(f"the quantizer's bits must be 1 to 8, got {self.bits}")
        if len(self.lo) != len(self.step) or not self.lo:
            raise DatasetError(
                f"the quantizer has {len(self.lo)} lows and {len(self.step)} steps; one of each a channel"
            )
        if not all(map(math.isfinite, self.lo + self.step)) or not all(s > 0 for s in self.step):
            raise DatasetError("the quantizer's lows must be finite and its steps finite and above zero")

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def quantize(self, latents: np.ndarray) -> np.ndarray:
        """f32 [..., C, h, w] -> u8 [..., C, h, w]; values outside the range take the end codes."""
        lo, step = self._columns()
        return np.clip(np.floor((latents - lo) / step), 0, self.levels - 1).astype(np.uint8)

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """u8 [..., C, h, w] -> f32 [..., C, h, w], the middle of each code's cell."""
        lo, step = self._columns()
        return lo + (codes.astype(np.float32) + np.float32(0.5)) * step

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """f32 [C,1,1] each."""
        lo, step = np.array(self.lo, np.float32), np.array(self.step, np.float32)
        return lo[:, None, None], step[:, None, None]

    def to_json(self) -> dict:
        return {"bits": self.bits, "lo": list(self.lo), "step": list(self.step)}
