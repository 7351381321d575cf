"""A quantizer for a given number of bits on disk: one step for all channels, in terms of what is decoded.

With an entropy coder behind it, a uniform quantizer with one step for all coefficients of an orthonormal transform is
within a quarter of a bit per value of the rate-distortion bound at high rates (Gish & Pierce, IEEE Trans. Inf. Theory
14, 1968). Channels with little energy then take few bits or none, and the bits go where they count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from latentprep.errors import CodecError, UsageError, opt
from latentprep.format.quantizer import MOST_BITS, Quantizer

_CLOSE = 0.002  # of the rate, at which the search ends
_HALVINGS = 24


def fit_rate(latents: Tensor, rate: float, weights: Tensor, on_disk: Callable[[Tensor], float]) -> Quantizer:
    """The quantizer whose codes of `latents`, f32 [B,C,h,w], take `rate` bits per code on disk.

    weights: f32 [C], the squared error in decoded pixels for a unit of squared error in each channel; a channel's step
    is inverse to its root. on_disk: bits per code that codes u8 [B,C,h,w] take with the store's compressor. The median
    of each channel is the middle of a cell, and codes have as few bits as the ranges of all channels need, at most 8.

    The nearest rate that is found, where compressed bytes jump as the step grows.

    Raises `UsageError` for a rate that is out of reach, `CodecError` if a value is NaN or infinite.
    """
    if not torch.isfinite(latents).all():
        raise CodecError("the calibration latents hold NaN or infinity", "give the codec the option dtype=float32")
    values = latents.detach().float().cpu().transpose(0, 1).flatten(1)
    lows, highs, medians = (of.double().numpy() for of in (values.amin(1), values.amax(1), values.median(1).values))
    scale = 1 / np.sqrt(np.maximum(weights.double().cpu().numpy(), 1e-12 * float(weights.max())))
    widest = float(((highs - lows) / scale).max()) or 1.0

    def at(step: float) -> tuple[Quantizer, float]:
        quantizer = _with_steps(lows, highs, medians, step * scale)
        lo, steps = (torch.tensor(of)[:, None, None] for of in (quantizer.lo, quantizer.step))
        codes = ((latents.detach().float().cpu() - lo) / steps).clamp_(0, quantizer.levels - 1).to(torch.uint8)
        return quantizer, on_disk(codes)

    coarse, fine = widest, widest / (1 << MOST_BITS + 4)  # all but one cell empty; and 12 bits where 8 are the most
    for step, out_of_reach in ((coarse, lambda bits: bits > rate), (fine, lambda bits: bits < rate)):
        bits = at(step)[1]
        if out_of_reach(bits):
            raise UsageError(
                f"{rate:g} bits per code on disk are out of reach: these latents take {bits:.3g} at the "
                f"{'least' if step == coarse else 'most'}",
                f"use {opt('bits', 8)}, or a rate from there" if step == fine else f"ask for more than {bits:.3g} bits",
            )
    tried = []
    for _ in range(_HALVINGS):
        middle = math.sqrt(coarse * fine)
        quantizer, bits = at(middle)
        tried.append((abs(bits - rate), quantizer))
        if abs(bits - rate) <= _CLOSE * rate:
            break
        coarse, fine = (middle, fine) if bits < rate else (coarse, middle)
    return min(tried, key=lambda one: one[0])[1]


def _with_steps(lows: np.ndarray, highs: np.ndarray, medians: np.ndarray, steps: np.ndarray) -> Quantizer:
    """Cells of these widths about each channel's median, from its least value to its largest, in as few bits."""
    steps = np.maximum(steps, (highs - lows) / ((1 << MOST_BITS) - 1)).astype(np.float32).astype(np.float64)
    below, above = (np.ceil(np.abs(end - medians) / steps - 0.5).clip(0) for end in (lows, highs))
    cells = below + 1 + above
    bits = max(1, math.ceil(math.log2(cells.max())))
    lower = np.minimum((1 << bits) - cells, 1)  # a spare cell; those above come with the bits
    lo = medians - (below + lower + 0.5) * steps
    return Quantizer(bits, tuple(lo.astype(np.float32).tolist()), tuple(steps.tolist()))
