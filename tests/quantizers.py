"""Quantizers that the tests make."""

from __future__ import annotations

from functools import cache

import numpy as np

from latentprep.format import Quantizer
from latentprep.format.quantizer import Codebook


@cache
def quantizer_of(bits: int, lo: float = 0.0, step: float = 1.0) -> Quantizer:
    """One of two channels: codes of more than 8 bits are tokens."""
    if bits <= 8:
        return Quantizer(bits, (lo, lo), (step, step))
    return Codebook.of_tables([np.zeros((2**bits, 1), np.float32)] * 2)
