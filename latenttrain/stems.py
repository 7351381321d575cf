"""Stems: how a network reads codes.

A stem turns codes ``u8 [B,C,h,w]``, i32 where they have more than 8 bits, into planes ``f32 [B,P,h,w]`` of about unit
scale, on which the network's first convolution works. ``affine`` and ``embedding`` scale by each channel's own mean and
deviation, where the dataset has them; the planes of ``bitplane`` and ``ordinal`` are -1 and 1, or between the two,
whatever the distribution. All stems carry the same information. Channels may differ in bits; one without bits has a
constant plane, or none. Tokens, whose codes name vectors, have `CodebookStem`.

Codes may also be fractional, ``f32 [B,C,h,w]`` from -0.5 to ``levels - 0.5``: that is how augmentation adds noise
within a quantizer step. ``affine`` and ``ordinal`` keep the fraction; ``embedding`` and ``bitplane`` round to the
nearest code, where such noise vanishes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_STD = 0.1  # codes; a channel that deviates less carries nothing, and to enlarge it would enlarge chance


class AffineStem(nn.Module):
    """The dequantized latents, normalized, in units of codes: ``(codes - mean) / std``; ``P = C``.

    mean, std: a value a channel, as counted when the dataset was made (`latentprep.format.quantizer.Statistics`); a
    channel whose codes hardly vary has the scale of the rule below. Where nothing was counted, ``mean`` is the centre
    of the range, and ``std`` the deviation of the normal distribution for which that range is the best one at this
    many bits: (1.25 + 0.34 * bits) standard deviations to each side (Max 1960, within 4%). ``lo`` and ``step`` cancel
    out. Codes that were chosen jointly (`latentprep.quantizing.joint`) are filtered, too.
    """

    centre: Tensor
    scale: Tensor
    kernel: Tensor | None
    shift: Tensor | None

    def __init__(
        self, channels: int, bits: int | Sequence[int], mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.planes = channels
        each = bits_of_each(bits, channels)
        self.middle = (2 ** max(each) - 1) / 2
        usual = [2 * (1.25 + 0.34 * b) / 2**b for b in each]
        scales = [1 / s if s >= LEAST_STD else u for s, u in zip(std or [0.0] * channels, usual, strict=True)]
        middles = [(2**b - 1) / 2 for b in each]
        # Buffers that no file holds: the configuration has what they follow from.
        self.register_buffer("centre", torch.tensor(mean or middles)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(scales)[:, None, None], persistent=False)
        self.register_buffer("kernel", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def set_filter(self, weights: tuple[float, ...], step: tuple[float, ...]) -> None:
        """The quantizer's filter, [C,C,3,3] in a row, and its steps; channels then have equal bits. It works about the
        middle of the range, which is also what lies outside of the grid, so that the mean is taken off after it."""
        steps = torch.tensor(step)
        kernel = torch.tensor(weights).view(self.planes, self.planes, 3, 3)
        kernel = kernel * steps.view(1, -1, 1, 1) / steps.view(-1, 1, 1, 1)
        self.kernel = kernel * (self.scale[..., None] / self.scale.view(1, -1, 1, 1))
        self.shift = (self.centre - self.middle) * self.scale
        self.centre = torch.full_like(self.centre, self.middle)

    def forward(self, codes: Tensor) -> Tensor:
        """u8 or f32 [B,C,h,w] -> f32 [B,C,h,w]"""
        planes = (codes.float() - self.centre) * self.scale
        if self.kernel is None or self.shift is None:
            return planes
        return F.conv2d(planes, self.kernel, padding=1) - self.shift

    def normalized(self, codes: Tensor) -> Tensor:
        """The planes of latents that stand, unfiltered, where these codes would: f32 [...,C,h,w] -> the same"""
        planes = (codes - self.centre) * self.scale
        return planes if self.shift is None else planes - self.shift


class EmbeddingStem(nn.Module):
    """A learned vector for each channel and level, summed over the channels; ``P = 16``.

    The only stem with parameters. Its vectors start on random lines through the normalized values, so that
    neighbouring levels start as neighbours; from random vectors, 8-bit codes would have to learn their own order.
    Each plane's share of the channels is of length one, so that the planes start at unit scale.
    """

    first: Tensor
    tops: Tensor

    def __init__(
        self, channels: int, bits: int | Sequence[int], mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.planes = 16
        levels = [2**b for b in bits_of_each(bits, channels)]
        values = AffineStem(channels, bits, mean, std)(torch.arange(max(levels))).view(channels, max(levels), 1)
        directions = F.normalize(torch.randn(channels, 1, self.planes), dim=0)
        vectors = values * directions
        self.vectors = nn.Parameter(torch.cat([own[:n] for own, n in zip(vectors, levels, strict=True)]))
        first = torch.tensor([0, *levels[:-1]]).cumsum(0)  # of each channel's vectors, [sum of levels, P] in all
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("tops", top_codes(levels), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """u8 or f32 [B,C,h,w] -> f32 [B,16,h,w]"""
        batch, channels, height, width = codes.shape
        rows = whole(codes, self.tops).long().permute(0, 2, 3, 1).reshape(-1, channels) + self.first
        summed = F.embedding_bag(rows, self.vectors, mode="sum")
        return summed.view(batch, height, width, self.planes).permute(0, 3, 1, 2)


class BitplaneStem(nn.Module):
    """Each bit of each channel as a plane of -1 and 1, the highest bit first; ``P`` is the sum of their bits."""

    shifts: Tensor
    of: Tensor
    tops: Tensor

    def __init__(
        self, channels: int, bits: int | Sequence[int], mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        each = bits_of_each(bits, channels)
        self.planes = sum(each)
        shifts = [bit for b in each for bit in reversed(range(b))]
        of = [channel for channel, b in enumerate(each) for _ in range(b)]
        self.register_buffer("shifts", torch.tensor(shifts, dtype=torch.uint8)[:, None, None], persistent=False)
        self.register_buffer("of", torch.tensor(of), persistent=False)
        self.register_buffer("tops", top_codes([2**b for b in each]), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """u8 or f32 [B,C,h,w] -> f32 [B,P,h,w]"""
        ones = (whole(codes, self.tops).index_select(1, self.of) >> self.shifts) & 1
        return ones.float() * 2 - 1


class OrdinalStem(nn.Module):
    """Thermometer code: plane ``k`` of a channel is 1 above its ``k``-th threshold and -1 below it.

    A threshold between every two levels up to 4 bits, ``levels - 1`` planes of a channel. Beyond that 15 wide ones,
    each plane rising linearly from one threshold to the next, so that nothing is lost.
    """

    thresholds: Tensor
    spacing: Tensor
    of: Tensor

    def __init__(
        self, channels: int, bits: int | Sequence[int], mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        each = bits_of_each(bits, channels)
        counts = [min(2**b, 16) - 1 for b in each]
        self.planes = sum(counts)
        thresholds = [float(k) for count in counts for k in range(count)]
        spacing = [(2**b - 1) / count for b, count in zip(each, counts, strict=True) for _ in range(count)]
        of = [channel for channel, count in enumerate(counts) for _ in range(count)]
        self.register_buffer("thresholds", torch.tensor(thresholds)[:, None, None], persistent=False)
        self.register_buffer("spacing", torch.tensor(spacing)[:, None, None], persistent=False)
        self.register_buffer("of", torch.tensor(of), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """u8 or f32 [B,C,h,w] -> f32 [B,P,h,w]"""
        height = codes.float().index_select(1, self.of) / self.spacing - self.thresholds
        return height.clamp(0, 1) * 2 - 1


class CodebookStem(nn.Module):
    """The latents that tokens name, normalized: the sum of the stages' vectors; ``P`` is their dimension.

    The stem ``codebook`` keeps the vectors as they are, and ``embedding`` learns from there. Both take codes of the
    first stages alone, and a code below zero for a stage that is left out: its vector is zero, the mean of its stage.
    """

    vectors: Tensor
    first: Tensor
    top: Tensor

    def __init__(self, stages: int, bits: int, dim: int, learned: bool) -> None:
        super().__init__()
        self.planes = dim
        self.levels = 2**bits
        vectors = torch.zeros(stages * self.levels, dim)  # the dataset's are filled in: `table_of`
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.register_buffer("first", self.levels * torch.arange(stages), persistent=False)
        self.register_buffer("top", torch.tensor(self.levels - 1.0), persistent=False)

    @staticmethod
    def table_of(tables: Sequence[np.ndarray], bits: int) -> Tensor:
        """A codebook's tables, f32 [levels,D] each -> f32 [stages * 2**bits, D].

        Each stage is about zero, and their sum of unit deviation in each dimension, if every vector is as likely as the
        others.
        """
        stages = np.zeros((len(tables), 2**bits, tables[0].shape[1]))
        for stage, table in zip(stages, tables, strict=True):
            stage[: len(table)] = table - table.mean(0, dtype=np.float64)
        spread = np.sqrt(sum(table.var(0, dtype=np.float64) for table in tables))
        stages /= np.maximum(spread, 1e-3 * spread.max() or 1)
        return torch.from_numpy(stages.astype(np.float32)).flatten(0, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """u8, i32 or f32 [B,stages,h,w] -> f32 [B,P,h,w]"""
        batch, stages, height, width = codes.shape
        there = codes >= 0 if codes.dtype == torch.int32 else None
        rows = whole(codes, self.top).long().clamp(min=0).permute(0, 2, 3, 1).reshape(-1, stages)
        rows = rows + self.first[:stages]
        weights = None if there is None else there.permute(0, 2, 3, 1).reshape(-1, stages).to(self.vectors.dtype)
        summed = F.embedding_bag(rows, self.vectors, mode="sum", per_sample_weights=weights)
        return summed.view(batch, height, width, self.planes).permute(0, 3, 1, 2)


STEMS: dict[str, type[nn.Module]] = {
    "affine": AffineStem,
    "embedding": EmbeddingStem,
    "bitplane": BitplaneStem,
    "ordinal": OrdinalStem,
}
TOKEN_STEM = "codebook"  # the default for tokens
TOKEN_STEMS = (TOKEN_STEM, "embedding")  # that read vectors by tokens, if there are any: `CodebookStem`


def whole(codes: Tensor, tops: Tensor) -> Tensor:
    """The nearest whole codes, at most `tops`, f32 [C,1,1]: u8 or i32 [B,C,h,w] as they are, f32 -> i32"""
    return codes.round().clamp(min=0).minimum(tops).int() if codes.is_floating_point() else codes


def top_codes(levels: Sequence[int]) -> Tensor:
    """The largest code of each channel, f32 [C,1,1]"""
    return torch.tensor(levels, dtype=torch.float32)[:, None, None] - 1


def bits_of_each(bits: int | Sequence[int], channels: int) -> list[int]:
    """The bits of each channel, of which `bits` may be those of all."""
    return [bits] * channels if isinstance(bits, int) else list(bits)
