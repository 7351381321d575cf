"""Joint quantization: choose all codes of a grid together, so that a small filter over them restores the latents.

Plain rounding minimizes each value's own error. But neighbours say something about a value, and at few bits a lot. With
``latents ≈ centre + filter * (dequantized - centre)``, a 3×3 filter over all channels, codes can be moved so that
their errors cancel. This is analysis by synthesis, as in speech coders (Schroeder and Atal 1985); coordinate descent
looks for the nearest lattice point. On TAESD's latents it gains 2.5 dB at 1 bit and 1.0 dB at 4, on those of `scatter`
3.8 and 2.0 dB.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.device import full_float32
from latentprep.format.quantizer import FILTER_SIDE, Quantizer

_CELLS = 1 << 18  # cells of the grids that the filter is fitted to, at most
_ROUNDS = 8  # rounds of fitting the filter to the codes and the codes to the filter; more gain less than 0.02 dB
_SHARES = (1 / 2, 1, 1, 1)  # of the filter in each sweep; starting with all of it loses 0.1 dB at 1 bit
_MARGIN = FILTER_SIDE // 2


@full_float32()
def fit_filter(latents: Tensor, quantizer: Quantizer) -> Quantizer:
    """The quantizer with the filter and the centres that restore `latents`, f32 [B,C,h,w], with least squared error.

    Filter and codes are fitted in turn, each to the other. Errors are measured in steps of their channel.
    """
    latents = latents.detach().cpu()  # for float64, which MPS lacks, and the same result for every device
    few = -(-len(latents) * latents[0, 0].numel() // _CELLS)
    centre, step = _columns(quantizer, latents)
    wanted = ((latents[::few].float() - centre) / step).permute(1, 2, 3, 0).contiguous()
    codes = _nearest(wanted, quantizer.levels)
    kernel, offset = _least_squares(wanted, codes)
    for _ in range(_ROUNDS):
        _sweep(wanted - offset, codes, kernel, quantizer.levels)
        kernel, offset = _least_squares(wanted, codes)
    kernel = kernel * step[:, :, None] / step.view(1, -1, 1, 1)
    lo = (centre + offset[..., 0] * step - quantizer.levels / 2 * step).flatten()
    return replace(quantizer, lo=tuple(lo.tolist()), filter=tuple(kernel.flatten().tolist()))


@full_float32()
def search(latents: Tensor, quantizer: Quantizer) -> Tensor:
    """f32 [B,C,h,w] -> u8 [B,C,h,w] on the same device: codes whose filtered values are close to the latents.

    Samples do not depend on each other. The search starts from plain rounding and ends in a local minimum.
    """
    centre, step = _columns(quantizer, latents)
    wanted = ((latents - centre) / step).permute(1, 2, 3, 0).contiguous()  # samples last: fastest
    codes = _nearest(wanted, quantizer.levels)
    kernel = constants(quantizer, latents.device)[2] * step.view(1, -1, 1, 1) / step[:, :, None]
    plain = torch.zeros_like(kernel)
    plain[:, :, _MARGIN, _MARGIN] = torch.eye(len(kernel), device=kernel.device)
    for share in _SHARES:
        _sweep(wanted, codes, torch.lerp(plain, kernel, share), quantizer.levels)
    return (codes + (quantizer.levels - 1) / 2).permute(3, 0, 1, 2).to(torch.uint8).contiguous()


@full_float32()
def restore(dequantized: Tensor, quantizer: Quantizer) -> Tensor:
    """f32 [B,C,h,w], the middles of the codes' cells -> f32 [B,C,h,w], the latents they stand for."""
    centre, _ = _columns(quantizer, dequantized)
    return centre + F.conv2d(dequantized - centre, constants(quantizer, dequantized.device)[2], padding=_MARGIN)


@lru_cache(maxsize=32)
def constants(quantizer: Quantizer, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Low ends and steps, f32 [C,1,1] each, and the filter, f32 [C,C,3,3], or [0] if there is no filter.

    Kept on the device: copying them again would wait for all queued work. They must not be changed.
    """
    with torch.inference_mode(False):  # usable inside inference mode and outside
        lo, step, kernel = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in (quantizer.lo, quantizer.step, quantizer.filter)
        )
        if quantizer.filter:
            kernel = kernel.view(len(lo), len(lo), FILTER_SIDE, FILTER_SIDE)
        return lo.view(-1, 1, 1), step.view(-1, 1, 1), kernel


def _columns(quantizer: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of each channel's range and its step, f32 [C,1,1] each."""
    lo, step, _ = constants(quantizer, like.device)
    return lo + quantizer.levels / 2 * step, step


def _nearest(wanted: Tensor, levels: int) -> Tensor:
    """Plain rounding. Values and codes are in steps from the centre, as everywhere in this module."""
    return (wanted + levels / 2).floor_().clamp_(0, levels - 1).sub_((levels - 1) / 2)


def _least_squares(wanted: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel f32 [C,C,3,3] and offset f32 [C,1,1,1] that bring codes [C,h,w,B] nearest to what is wanted."""
    channels = len(codes)
    size = channels * FILTER_SIDE**2 + 1
    squares = torch.zeros(size, size, dtype=torch.float64, device=codes.device)
    products = torch.zeros(size, channels, dtype=torch.float64, device=codes.device)
    for some, goal in zip(codes.split(16, dim=3), wanted.split(16, dim=3), strict=True):
        patches = F.unfold(some.permute(3, 0, 1, 2), FILTER_SIDE, padding=_MARGIN).transpose(1, 2).flatten(0, 1)
        patches = F.pad(patches, (0, 1), value=1.0)
        squares += patches.T @ patches  # in float32: of few bits exact, as codes are halves
        products += patches.T @ goal.permute(3, 1, 2, 0).reshape(-1, channels)
    squares += 1e-6 * squares.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=codes.device)
    solved = torch.linalg.solve(squares, products).float()
    kernel = solved[:-1].T.reshape(channels, channels, FILTER_SIDE, FILTER_SIDE).contiguous()
    return kernel, solved[-1].view(channels, 1, 1, 1)


def _sweep(wanted: Tensor, codes: Tensor, kernel: Tensor, levels: int) -> None:
    """Move each code, in place, to where the squared error is least while the others stay. f32 [C,h,w,B] both.

    Cells that are three apart share no residual, so a ninth of them moves at a time, channel after channel. How far the
    residual pulls these codes, and what moving them changes in it, are matrix products.
    """
    top, channels = (levels - 1) / 2, len(codes)
    height, width = codes.shape[1:3]
    residual = F.pad(wanted - _filtered(codes, kernel), (0, 0, *(_MARGIN,) * 4))
    margins = [residual[:, :_MARGIN], residual[:, height + _MARGIN :]]
    margins += [residual[:, :, :_MARGIN], residual[:, :, width + _MARGIN :]]
    outward = kernel.flip(2, 3).transpose(0, 1).flatten(1)  # what a code adds to each value around it, [C,9C]
    shared = outward @ outward.T
    power = shared.diagonal().clamp(min=1e-12)  # it may be 0 for a constant channel
    for row, column in product(range(FILTER_SIDE), repeat=2):
        some = codes[:, row::FILTER_SIDE, column::FILTER_SIDE]
        rows, columns = some.shape[1:3]
        around = residual[:, row : row + FILTER_SIDE * rows, column : column + FILTER_SIDE * columns]
        around = around.unflatten(2, (columns, FILTER_SIDE)).unflatten(1, (rows, FILTER_SIDE))
        around = around.permute(0, 2, 4, 1, 3, 5)  # [C,3,3,rows,columns,B]
        pull = outward @ around.reshape(channels * FILTER_SIDE**2, -1)
        moved = some.reshape(channels, -1).clone()
        for channel, code in enumerate(moved):
            best = (code + pull[channel] / power[channel] + top).round_().clamp_(0, levels - 1).sub_(top)
            code.copy_(best.sub_(code))
            pull.addr_(shared[channel], code, alpha=-1)
        around -= (outward.T @ moved).view_as(around)
        for margin in margins:  # nothing is wanted there
            margin.zero_()
        some += moved.view_as(some)


def _filtered(codes: Tensor, kernel: Tensor) -> Tensor:
    """f32 [C,h,w,B] -> f32 [C,h,w,B]; zeros lie outside the grid."""
    height, width = codes.shape[1:3]
    padded = F.pad(codes, (0, 0, *(_MARGIN,) * 4))
    result = torch.zeros_like(codes)
    for row, column in product(range(FILTER_SIDE), repeat=2):
        part = padded[:, row : row + height, column : column + width]
        result += torch.tensordot(kernel[:, :, row, column], part, 1)
    return result
