"""Fit a quantizer, and quantize tensors on their device; tokens pass as they are.

What a code means: `latentprep.format.quantizer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    a codebook, `latents` are tokens, u8, i32 or i64 [B,S,h,w], and codes u8 or i32.
    """
    if isinstance(quantizer, Codebook):
        return kept(latents, quantizer)
    if quantizer.filter:
        return search(latents, quantizer)
    lo, step = _columns(quantizer, latents)
    return _whole((latents - lo).div_(step), quantizer)


def dequantize(codes: Tensor, quantizer: Quantizer) -> Tensor:
    """u8 [B,C,h,w] -> f32 [B,C,h,w], the middle of each code's cell, filtered if there is a filter.

    With a codebook, u8 or i32 [B,N,h,w] -> f32 [B,D,h,w].
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
    inside = _clamp(cells.clone(), quantizer)
    # Compared in place, as floats: comparing into booleans takes CPUs four times as long.
    saturated = cells.ne_(inside).sum((2, 3)).long().sum(0)
    return search(latents, quantizer) if quantizer.filter else _whole(inside, quantizer), saturated, finite


def _whole(cells: Tensor, quantizer: Quantizer) -> Tensor:
    """Positions in cells, f32, overwritten -> codes u8. Through int32: CPUs convert floats to bytes one at a time."""
    return _clamp(cells, quantizer, 1).int().to(torch.uint8)


def _clamp(cells: Tensor, quantizer: Quantizer, less: int = 0) -> Tensor:
    """Positions in cells, f32 [...,C,h,w], overwritten: from 0 to the channel's number of levels, less so much.

    Channel by channel where levels differ: CPUs take five times as long for bounds that are tensors.
    """
    if quantizer.equal_bits:
        return cells.clamp_(0, quantizer.levels - less)
    for plane, levels in zip(cells.unbind(-3), quantizer.channel_levels, strict=True):
        plane.clamp_(0, levels - less)
    return cells


def fit_quantizer(latents: Tensor, bits: int | Sequence[int], joint: bool = False) -> Quantizer:
    """The uniform quantizer of `bits` bits with the least mean squared error on `latents`, f32 [B,C,h,w], within 2%.

    bits: 1 to 8, or as many numbers from 0 to 8 as there are channels, not all of them 0.

    Each channel that varies is fitted by Lloyd's algorithm (IEEE Trans. Inf. Theory 28, 1982) with a uniform codebook:
    give each value its nearest code, then solve for the lo and step that reconstruct best (a linear least-squares fit
    of values on codes). Both steps can only lower the error. The best result from `_STARTS` ranges is taken. Around it
    the error is flat, while the codes' entropy falls with log2 of the step. So the widest step whose error is within
    `_SLACK` of the least is kept. A constant channel has its value in the middle of the range, and a step like those of
    the other channels, so that later values on both sides of it get codes of their own. A channel of 0 bits has one
    cell, about its mean. joint: add a filter, see `latentprep.quantizing.joint`.

    Raises `CodecError` if a value is NaN or infinite.
    """
    each = [check_bits(bits)] * latents.shape[1] if isinstance(bits, int) else list(bits)
    values, constant = channel_values(latents)
    fits = {
        place: fit_channel(channel, 1 << each[place]) if each[place] else _one_cell(channel)
        for place, channel in enumerate(values)
        if not constant[place]
    }
    usual = _usual_step([step for _, step in fits.values()])
    middles = ((values.min(1) + values.max(1)) / 2).tolist()
    ranges = [fits.get(place) or _around(middle, usual, 1 << each[place]) for place, middle in enumerate(middles)]
    quantizer = Quantizer(
        max(each), tuple(lo for lo, _ in ranges), tuple(step for _, step in ranges), channel_bits=tuple(each)
    )
    return fit_filter(latents.detach(), quantizer) if joint else quantizer


def channel_values(latents: Tensor, most: int = _VALUES) -> tuple[np.ndarray, list[bool]]:
    """f32 [B,C,h,w] -> up to `most` values of each channel, f64 [C,n], and whether the channel is constant.

    Raises `CodecError` if a value is NaN or infinite.
    """
    if not torch.isfinite(latents).all():
        raise CodecError("the calibration latents hold NaN or infinity", "give the codec the option dtype=float32")
    values = latents.detach().float().cpu().transpose(0, 1).flatten(1)
    chosen = values[:, _spread(values.shape[1], most)].numpy().astype(np.float64)
    constant = chosen.max(1) - chosen.min(1) <= _NOISE * np.abs(chosen).max()
    return chosen, constant.tolist()


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


def _spread(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` places, i64: one drawn from each of equal stretches.

    A fixed stride would hit the same columns of every grid.
    """
    if count <= most:
        return np.arange(count)
    edges = np.arange(most + 1) * count // most
    return np.random.default_rng(count).integers(edges[:-1], edges[1:])


def _usual_step(steps: list[float]) -> float:
    """The power of two nearest to the median step, so that constants stay exact; 1 if there are no steps."""
    return float(2.0 ** np.round(np.log2(np.median(steps)))) if steps else 1.0


def _around(value: float, step: float, levels: int) -> tuple[float, float]:
    """The range, (lo, step), whose middle cell has this value as its middle."""
    step = max(step, 2.0 ** np.ceil(np.log2(max(abs(value), 1e-30) * 2**-20)))  # float32 must tell the cells apart
    return _float32(value - (levels // 2 + 0.5) * step), step


def _one_cell(values: np.ndarray) -> tuple[float, float]:
    """The range, (lo, step), of one cell, that of the uniform distribution of the values' mean and variance: f64 [n]"""
    step = _float32(math.sqrt(12 * values.var()))
    return _float32(values.mean() - step / 2), step


def fit_channel(values: np.ndarray, levels: int, starts: int = _STARTS, steps: int = _STEPS) -> tuple[float, float]:
    """f64 [n], not all the same -> (lo, step), both exact in float32.

    All starts run at once, one per row. In the sorted values a cell is a run, so prefix sums give its count and sum,
    and an alternation costs O(levels log n) rather than O(n).
    """
    values = np.sort(values)
    low, high, n = values[0], values[-1], len(values)
    sums = np.concatenate([[0.0], values.cumsum()])
    codes = np.arange(levels) + 0.5
    # Ranges that leave more and more of both tails outside.
    tails = (np.concatenate([[0.0], np.logspace(-4.5, -0.5, starts - 1)]) * (n - 1)).astype(int)
    lo = values[tails][:, None]
    step = np.maximum(values[n - 1 - tails][:, None] - lo, (high - low) * 1e-6) / levels
    best = (np.inf, low, (high - low) / levels)
    ends = np.zeros((starts, levels + 1), int)
    ends[:, -1] = n
    for _ in range(steps):
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
    most = (1 + _SLACK) * max(error[0], 0.0)  # rounding may make an error of nothing negative
    chosen = int(np.flatnonzero(error <= most)[-1])
    return lo + levels / 2 * (step - steps[chosen, 0]), steps[chosen, 0]


def _float32(value: float) -> float:
    """The nearest float32, so that numpy, torch and JSON agree on the value."""
    return float(np.float32(value))


def _columns(quantizer: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [C,1,1] each, on the device of `like`."""
    lo, step = constants(quantizer, like.device)[:2]
    return lo, step
