"""Codes of few bits side by side in bytes: eight codes of b bits in b bytes, and a resident split held that way.

The bits lie as in `latentprep.format.packing`, which also says how many bytes they take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latenttrain.data import Split


def pack(codes: Tensor, bits: int) -> Tensor:
    """u8 [...,n], each below ``2**bits``, -> u8 [...,p]: the bits of all codes in a row, the lowest first.

    Inverse of `unpack`.
    """
    groups = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = codes.new_zeros((*groups.shape[:-1], bits))
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        packed[..., byte] |= groups[..., place] << shift  # what leaves the byte on the left is lost …
        if shift + bits > 8:
            packed[..., byte + 1] |= groups[..., place] >> (8 - shift)  # … and starts the next one
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """u8 [...,p] -> u8 [...,count]. Inverse of `pack`; shifts on the device, no table."""
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # no code straddles two bytes, so all are shifted at once
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & mask).flatten(-2)[..., :count]
    groups = packed.unflatten(-1, (-1, bits))
    codes = packed.new_empty((*groups.shape[:-1], 8))
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        codes[..., place] = groups[..., byte] >> shift
        if shift + bits > 8:
            codes[..., place] |= groups[..., byte + 1] << (8 - shift)
    return codes.bitwise_and_(mask).flatten(-2)[..., :count]


@dataclass(frozen=True)
class PackedSplit(Split):
    """A `Split` whose codes are packed, u8 [n,V,p], and unpacked batch by batch. Its batches are the same.

    bits: per code; latent: (C, h, w) of one view.
    """

    bits: int
    latent: tuple[int, int, int]

    def unpacked(self, codes: Tensor) -> Tensor:
        return unpack(codes, self.bits, math.prod(self.latent)).unflatten(-1, self.latent)
