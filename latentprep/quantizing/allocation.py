"""Bits for each channel by what they are worth: 0 to 8 each, as many on average as asked for.

Optimal bit allocation (Shoham and Gersho, IEEE Trans. Acoust. Speech Signal Process. 36, 1988) by dynamic programming,
on distortions that are measured: those of coefficients fall unevenly, since the second bit gives a sparse channel its
zero. Where channels differ in energy, that is 6 to 8 dB better than equal bits (`dct` at 1 and 2 bits).
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from latentprep.format.quantizer import MOST_BITS, Quantizer, check_mean_bits
from latentprep.quantizing.scalar import channel_values, fit_channel, fit_quantizer

_VALUES = 1 << 14  # of each channel that distortions are measured on, at most
_STARTS, _STEPS = 12, 20  # of rough fits


def fit_allocated(latents: Tensor, bits: float, exponent: float = 0.0) -> Quantizer:
    """The quantizer of `bits` bits on average, 0.25 to 8, each channel fitted as by `fit_quantizer`: f32 [B,C,h,w].

    Raises `UsageError` if that is less than one bit for all channels together, `CodecError` if a value is not finite.
    """
    return fit_quantizer(latents, allocate(latents, bits, exponent))


def allocate(latents: Tensor, bits: float, exponent: float = 0.0) -> list[int]:
    """Bits of each channel of the latents, f32 [B,C,h,w], together at most `bits` times their number.

    They make the sum of the channels' squared errors least, each divided by the power `exponent` of the channel's
    variance. At high rates, steps then grow with that power of the deviation: 0 is one step for all, 1 equal bits.
    """
    check_mean_bits(bits, channels=latents.shape[1])
    values, constant = channel_values(latents, _VALUES)
    budget = math.floor(bits * len(values) + 1e-9)
    costs = np.zeros(budget + 1)  # the least error of the channels so far, with at most so many bits
    chosen = np.zeros((len(values), budget + 1), int)  # and what the last of them has of these
    for channel, own in enumerate(values):
        most = 0 if constant[channel] else min(MOST_BITS, budget)
        errors = [_error(own, each) / own.var() ** exponent for each in range(1, most + 1)]
        ways = np.full((most + 1, budget + 1), np.inf)
        ways[0] = costs + (0 if constant[channel] else own.var() ** (1 - exponent))
        for each, error in enumerate(errors, 1):
            ways[each, each:] = costs[: budget + 1 - each] + error
        chosen[channel], costs = ways.argmin(0), ways.min(0)
    allocated: list[int] = []
    for own in chosen[::-1]:
        allocated.insert(0, int(own[budget]))
        budget -= allocated[0]
    return allocated if any(allocated) else [1, *allocated[1:]]  # of constant channels one has a bit, to have codes


def _error(values: np.ndarray, bits: int) -> float:
    """The mean squared error of a channel's values, f64 [n], not all the same, at so many bits."""
    lo, step = fit_channel(values, 1 << bits, _STARTS, _STEPS)
    codes = ((values - lo) / step).clip(0, (1 << bits) - 1).astype(np.int64)
    return float(np.square(lo + (codes + 0.5) * step - values).mean())
