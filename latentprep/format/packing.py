"""Pack codes into bytes: eight codes of b bits take b bytes. The torch side is `latenttrain.packed`.

Where channels have different bits, codes are taken apart into planes of single bits: of all channels that have a lowest
bit those, of all that have a second one those, and so on. They are packed like codes of one bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import numpy as np

from latentprep.format.quantizer import Quantizer, code_dtype

Bits = TypeVar("Bits", bound=Any)  # arrays of numpy or torch


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` codes take, in whole groups of eight codes."""
    return -(-count // 8) * bits


def view_bytes(latent: Sequence[int], quantizer: Quantizer) -> int:
    """How many bytes the packed codes of one view, (C, h, w), take."""
    if quantizer.equal_bits:
        return packed_bytes(math.prod(latent), quantizer.bits)
    return packed_bytes(sum(quantizer.channel_bits) * math.prod(latent[1:]), 1)


def pack_views(codes: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """u8 or u16 [...,C,h,w] -> u8 [...,p], p as `view_bytes` says. Inverse of `unpack_views`."""
    lead = codes.shape[:-3]
    if quantizer.equal_bits:
        return pack(codes.reshape(*lead, math.prod(codes.shape[-3:])), quantizer.bits)
    planes = [codes[..., channels, :, :] >> bit & 1 for bit, channels in bit_planes(quantizer.channel_bits)]
    together = np.concatenate(planes, axis=-3)
    return np.packbits(together.reshape(*lead, math.prod(together.shape[-3:])), axis=-1, bitorder="little")


def unpack_views(packed: np.ndarray, quantizer: Quantizer, latent: Sequence[int]) -> np.ndarray:
    """u8 [...,p] -> u8 or u16 [...,C,h,w]. Inverse of `pack_views`."""
    lead = packed.shape[:-1]
    if quantizer.equal_bits:
        return unpack(packed, quantizer.bits, math.prod(latent)).reshape(*lead, *latent)
    count = sum(quantizer.channel_bits)
    together = np.unpackbits(packed, axis=-1, count=count * math.prod(latent[1:]), bitorder="little")
    together = together.reshape(*lead, count, *latent[1:])
    codes, start = np.zeros((*lead, *latent), np.uint8), 0
    for bit, channels in bit_planes(quantizer.channel_bits):
        codes[..., channels, :, :] |= together[..., start : start + len(channels), :, :] << bit
        start += len(channels)
    return codes


def bit_planes(channel_bits: Sequence[int]) -> list[tuple[int, list[int]]]:
    """For each bit, the lowest first, the channels that have it."""
    return [
        (bit, [channel for channel, bits in enumerate(channel_bits) if bits > bit]) for bit in range(max(channel_bits))
    ]


def places(bits: int) -> list[list[tuple[int, int]]]:
    """For each of eight codes in a row, the bytes that hold its bits, and how far to the left it is `moved` for each.
    Bits beyond that byte are lost: they are in another one."""
    bytes_of = [range(code * bits // 8, ((code + 1) * bits - 1) // 8 + 1) for code in range(8)]
    return [[(byte, code * bits - 8 * byte) for byte in of] for code, of in enumerate(bytes_of)]


def moved(codes: Bits, left: int) -> Bits:
    """Their bits shifted to the left, or to the right if `left` is below 0."""
    return codes << left if left >= 0 else codes >> -left


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8 or u16 [...,n], each below ``2**bits``, -> u8 [...,p]: the bits of all codes, one after another, lowest first.

    Inverse of `unpack`.
    """
    *lead, count = codes.shape
    groups = np.zeros((*lead, -(-count // 8), 8), codes.dtype)
    groups.reshape(*lead, 8 * groups.shape[-2])[..., :count] = codes
    packed = np.zeros((*groups.shape[:-1], bits), np.uint8)
    for code, parts in enumerate(places(bits)):
        for byte, left in parts:
            packed[..., byte] |= moved(groups[..., code], left).astype(np.uint8, copy=False)
    return packed.reshape(*lead, packed_bytes(count, bits))


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """u8 [...,p] -> u8 or u16 [...,count]. Inverse of `pack`."""
    *lead, size = packed.shape
    groups = packed.reshape(*lead, size // bits, bits).astype(code_dtype(bits), copy=False)
    codes = np.empty((*groups.shape[:-1], 8), groups.dtype)
    for code, parts in enumerate(places(bits)):
        codes[..., code] = reduce(or_, [moved(groups[..., byte], -left) for byte, left in parts])
    codes &= (1 << bits) - 1
    return codes.reshape(*lead, 8 * groups.shape[-2])[..., :count]
