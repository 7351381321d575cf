"""Fit a quantizer, and quantize tensors on their device; tokens pass as they are.

What a code means: `latentprep.format.quantizer`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentprep.errors import CodecError
from latentprep.format.quantizer import Codebook, Quantizer, Statistics, check_bits
from latentprep.quantizing.joint import constants, fit_filter, restore, search
from latentprep.quantizing.tokens import kept, summed

_VALUES = 1 << 18  # calibration values per channel that the fit uses, at most
_NOISE = 2.0**-22  # of the largest latent: smaller differences are rounding, as in the chroma of grey images
_STARTS = 64  # initial ranges, from the full range down to a small part
_STEPS = 60  # alternations from each start; more gain less than 0.01 dB
_SLACK = 0.02  # squared error traded for a wider step: 1.5% fewer bytes at 4 bits for 0.09 dB
_WIDER = np.linspace(1, 1.2, 81)  # steps to try, as multiples of the best one


def quantize(latents: Tensor, quantizer: Quantizer) -> Tensor:
    """f32 [B,C,h,w] -> u8 [B,C,h,w] on the same device. Inverse of `dequantize` up to half a step.

    Values outside the quantizer's range get an end code. With a filter, the codes of a sample are chosen jointly. With
    a codebook, `latents` are tokens, u8 [B,S,h,w].
    """
    if isinstance(quantizer, Codebook):
        return kept(latents, quantizer)
    if quantizer.filter:
        return search(latents, quantizer)
    lo, step = _columns(quantizer, latents)
    return _whole((latents - lo).div_(step), quantizer)


def dequantize(codes: Tensor, quantizer: Quantizer) -> Tensor:
    """u8 [B,C,h,w] -> f32 [B,C,h,w], the middle of each code's cell, filtered if there is a filter.

    With a codebook, u8 [B,N,h,w] -> f32 [B,D,h,w].
    """
    if isinstance(quantizer, Codebook):
        return summed(codes, quantizer)
    lo, step = _columns(quantizer, codes)
    middles = lo + (codes.float() + 0.5) * step
    return restore(middles, quantizer) if quantizer.filter else middles


def quantize_counting(latents: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """f32 [B,C,h,w] -> codes u8 [B,C,h,w], saturated i64 [C], finite bool [B], in few passes over the latents.

    saturated: values outside the quantizer's range, per channel; finite: whether an image has no NaN or infinity.
    """
    if isinstance(quantizer, Codebook):
        codes = kept(latents, quantizer)
        saturated = torch.zeros(codes.shape[1], dtype=torch.int64, device=codes.device)
        return codes, saturated, torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    lo, step = _columns(quantizer, latents)
    cells = (latents - lo).div_(step)
    finite = torch.isfinite(cells.sum((1, 2, 3)))  # one value that is not finite makes the sum so
    inside = cells.clamp(0, quantizer.levels)
    # Compared in place, as floats: comparing into booleans takes CPUs four times as long.
    saturated = cells.ne_(inside).sum((2, 3)).long().sum(0)
    return search(latents, quantizer) if quantizer.filter else _whole(inside, quantizer), saturated, finite


def _whole(cells: Tensor, quantizer: Quantizer) -> Tensor:
    """Positions in cells, f32, overwritten -> codes u8. Through int32: CPUs convert floats to bytes one at a time."""
    return cells.clamp_(0, quantizer.levels - 1).int().to(torch.uint8)


def fit_quantizer(latents: Tensor, bits: int, joint: bool = False) -> Quantizer:
    """The uniform quantizer of `bits` bits with the least mean squared error on `latents`, f32 [B,C,h,w], within 2%.

    Each channel that varies is fitted by Lloyd's algorithm (IEEE Trans. Inf. Theory 28, 1982) with a uniform codebook:
    give each value its nearest code, then solve for the lo and step that reconstruct best (a linear least-squares fit
    of values on codes). Both steps can only lower the error. The best result from `_STARTS` ranges is taken. Around it
    the error is flat, while the codes' entropy falls with log2 of the step. So the widest step whose error is within
    `_SLACK` of the least is kept. A constant channel has its value in the middle of the range, and a step like those of
    the other channels, so that later values on both sides of it get codes of their own.
    joint: add a filter, see `latentprep.quantizing.joint`.

    Raises `CodecError` if a value is NaN or infinite.
    """
    check_bits(bits)
    if not torch.isfinite(latents).all():
        raise CodecError("the calibration latents hold NaN or infinity", "give the codec the option dtype=float32")
    values = latents.detach().float().cpu().transpose(0, 1).flatten(1)
    values = values[:, _spread(values.shape[1])]
    lows, highs = (values.amin(1).double(), values.amax(1).double())
    constant = (highs - lows <= _NOISE * values.abs().max()).tolist()
    fits = {
        place: _fit_channel(channel.numpy().astype(np.float64), 1 << bits)
        for place, channel in enumerate(values)
        if not constant[place]
    }
    usual = _usual_step([step for _, step in fits.values()])
    middles = ((lows + highs) / 2).tolist()
    ranges = [fits.get(place) or _around(middle, usual, 1 << bits) for place, middle in enumerate(middles)]
    quantizer = Quantizer(bits, tuple(lo for lo, _ in ranges), tuple(step for _, step in ranges))
    return fit_filter(latents.detach(), quantizer) if joint else quantizer


def code_statistics(codes: Tensor, quantizer: Quantizer) -> Statistics:
    """u8 [B,C,h,w] on the CPU -> their `Statistics`. Sums of codes are exact, whatever the order."""
    values = codes.double()
    if quantizer.filter:
        lo, step = _columns(quantizer, codes)
        values = ((dequantize(codes, quantizer) - lo) / step - 0.5).double()
    count = values[:, 0].numel()
    mean, square = values.sum((0, 2, 3)) / count, values.square().sum((0, 2, 3)) / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    return Statistics(tuple(map(_float32, mean.tolist())), tuple(map(_float32, std.tolist())))


def _spread(count: int) -> np.ndarray:
    """Up to `_VALUES` of `count` places, i64: one drawn from each of equal stretches.

    A fixed stride would hit the same columns of every grid.
    """
    if count <= _VALUES:
        return np.arange(count)
    edges = np.arange(_VALUES + 1) * count // _VALUES
    return np.random.default_rng(count).integers(edges[:-1], edges[1:])


def _usual_step(steps: list[float]) -> float:
    """The power of two nearest to the median step, so that constants stay exact; 1 if there are no steps."""
    return float(2.0 ** np.round(np.log2(np.median(steps)))) if steps else 1.0


def _around(value: float, step: float, levels: int) -> tuple[float, float]:
    """The range, (lo, step), whose middle cell has this value as its middle."""
    step = max(step, 2.0 ** np.ceil(np.log2(max(abs(value), 1e-30) * 2**-20)))  # float32 must tell the cells apart
    return _float32(value - (levels // 2 + 0.5) * step), step


def _fit_channel(values: np.ndarray, levels: int) -> tuple[float, float]:
    """f64 [n], not all the same -> (lo, step), both exact in float32.

    All starts run at once, one per row. In the sorted values a cell is a run, so prefix sums give its count and sum,
    and an alternation costs O(levels log n) rather than O(n).
    """
    values = np.sort(values)
    low, high, n = values[0], values[-1], len(values)
    sums = np.concatenate([[0.0], values.cumsum()])
    codes = np.arange(levels) + 0.5
    # Ranges that leave more and more of both tails outside.
    tails = (np.concatenate([[0.0], np.logspace(-4.5, -0.5, _STARTS - 1)]) * (n - 1)).astype(int)
    lo = values[tails][:, None]
    step = np.maximum(values[n - 1 - tails][:, None] - lo, (high - low) * 1e-6) / levels
    best = (np.inf, low, (high - low) / levels)
    ends = np.zeros((_STARTS, levels + 1), int)
    ends[:, -1] = n
    for _ in range(_STEPS):
        ends[:, 1:-1] = np.searchsorted(values, lo + (codes[1:] - 0.5) * step)
        count, total = np.diff(ends), np.diff(sums[ends])
        middle = lo + codes * step
        error = ((count * middle - 2 * total) * middle).sum(1)  # squared error, less the values' own squares
        i = int(error.argmin())
        if error[i] < best[0]:
            best = (error[i], lo[i, 0], step[i, 0])
        mean_code, mean_value = (count * codes).sum(1, keepdims=True) / n, sums[-1] / n
        spread = (count * codes**2).sum(1, keepdims=True) / n - mean_code**2
        slope = ((codes * total).sum(1, keepdims=True) / n - mean_code * mean_value) / np.maximum(spread, 1e-12)
        step = np.maximum(np.where(spread > 1e-9, slope, step), (high - low) * 1e-9)
        lo = mean_value - mean_code * step
    lo, step = _widest(values, sums, levels, best[1], best[2])
    return _float32(lo), _float32(step)


def _widest(values: np.ndarray, sums: np.ndarray, levels: int, lo: float, step: float) -> tuple[float, float]:
    """The widest step about the same middle whose squared error is within `_SLACK`: sorted f64 [n] -> (lo, step)."""
    steps = step * _WIDER[:, None]
    middles = lo + levels / 2 * step + (np.arange(levels) + 0.5 - levels / 2) * steps
    ends = np.zeros((len(steps), levels + 1), int)
    ends[:, -1] = len(values)
    ends[:, 1:-1] = np.searchsorted(values, middles[:, 1:] - steps / 2)
    error = ((np.diff(ends) * middles - 2 * np.diff(sums[ends])) * middles).sum(1) + np.square(values).sum()
    chosen = int(np.flatnonzero(error <= (1 + _SLACK) * error[0])[-1])
    return lo + levels / 2 * (step - steps[chosen, 0]), steps[chosen, 0]


def _float32(value: float) -> float:
    """The nearest float32, so that numpy, torch and JSON agree on the value."""
    return float(np.float32(value))


def _columns(quantizer: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [C,1,1] each, on the device of `like`."""
    lo, step = constants(quantizer, like.device)[:2]
    return lo, step
