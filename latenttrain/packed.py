"""Codes side by side in bytes: eight codes of b bits in b bytes, and a resident split held that way.

The bits lie as in `latentprep.format.packing`, which also says how many bytes they take, and how they lie where
channels have different bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.device import torch_dtype
from latentprep.format import Quantizer
from latentprep.format.packing import bit_planes, moved, places
from latentprep.format.quantizer import code_dtype
from latenttrain.data import Split


def pack_views(codes: Tensor, quantizer: Quantizer) -> Tensor:
    """u8 or i32 [...,C,h,w] -> u8 [...,p], p as `packing.view_bytes` says. Inverse of `unpack_views`."""
    if quantizer.equal_bits:
        return pack(codes.flatten(-3), quantizer.bits)
    planes = [codes[..., channels, :, :] >> bit & 1 for bit, channels in bit_planes(quantizer.channel_bits)]
    return pack(torch.cat(planes, -3).flatten(-3), 1)


def unpack_views(packed: Tensor, quantizer: Quantizer, latent: Sequence[int]) -> Tensor:
    """u8 [...,p] -> u8 or i32 [...,C,h,w]. Inverse of `pack_views`."""
    if quantizer.equal_bits:
        return unpack(packed, quantizer.bits, math.prod(latent)).unflatten(-1, tuple(latent))
    count = sum(quantizer.channel_bits)
    together = unpack(packed, 1, count * math.prod(latent[1:])).unflatten(-1, (count, *latent[1:]))
    codes, start = packed.new_zeros((*packed.shape[:-1], *latent)), 0
    for bit, channels in bit_planes(quantizer.channel_bits):
        codes[..., channels, :, :] |= together[..., start : start + len(channels), :, :] << bit
        start += len(channels)
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """u8 or i32 [...,n], each below ``2**bits``, -> u8 [...,p]: the bits of all codes in a row, the lowest first.

    Inverse of `unpack`.
    """
    groups = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = codes.new_zeros((*groups.shape[:-1], bits), dtype=torch.uint8)
    for code, parts in enumerate(places(bits)):
        for byte, left in parts:
            packed[..., byte] |= moved(groups[..., code], left).to(torch.uint8)
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """u8 [...,p] -> u8 or i32 [...,count]. Inverse of `pack`; shifts on the device, no table."""
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # no code straddles two bytes, so all are shifted at once
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & mask).flatten(-2)[..., :count]
    groups = packed.unflatten(-1, (-1, bits)).to(torch_dtype(code_dtype(bits)))
    codes = groups.new_empty((*groups.shape[:-1], 8))
    for code, parts in enumerate(places(bits)):
        codes[..., code] = reduce(or_, [moved(groups[..., byte], -left) for byte, left in parts])
    return codes.bitwise_and_(mask).flatten(-2)[..., :count]


@dataclass(frozen=True)
class PackedSplit(Split):
    """A `Split` whose codes are packed, u8 [n,V,p], and unpacked batch by batch. Its batches are the same.

    quantizer: says how many bits codes have; latent: (C, h, w) of one view.
    """

    quantizer: Quantizer
    latent: tuple[int, int, int]

    def unpacked(self, codes: Tensor) -> Tensor:
        return unpack_views(codes, self.quantizer, self.latent)
