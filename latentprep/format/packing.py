"""Pack low-bit codes into bytes: eight codes of b bits take b bytes. The torch side is `latenttrain.packed`."""

from __future__ import annotations

import numpy as np


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` codes take, in whole groups of eight codes."""
    return -(-count // 8) * bits


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8 [...,n], each below ``2**bits``, -> u8 [...,p]: the bits of all codes, one after another, lowest first.

    Inverse of `unpack`.
    """
    *lead, count = codes.shape
    groups = np.zeros((*lead, -(-count // 8), 8), np.uint8)
    groups.reshape(*lead, 8 * groups.shape[-2])[..., :count] = codes
    packed = np.zeros((*groups.shape[:-1], bits), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        packed[..., byte] |= groups[..., place] << shift  # bits beyond the byte are lost …
        if shift + bits > 8:
            packed[..., byte + 1] |= groups[..., place] >> (8 - shift)  # … and go into the next one
    return packed.reshape(*lead, packed_bytes(count, bits))


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """u8 [...,p] -> u8 [...,count]. Inverse of `pack`."""
    *lead, size = packed.shape
    groups = packed.reshape(*lead, size // bits, bits)
    codes = np.empty((*groups.shape[:-1], 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        codes[..., place] = groups[..., byte] >> shift
        if shift + bits > 8:
            codes[..., place] |= groups[..., byte + 1] << (8 - shift)
    codes &= (1 << bits) - 1
    return codes.reshape(*lead, 8 * groups.shape[-2])[..., :count]
