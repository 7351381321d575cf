"""Small colour profiles (ICC.1:2001-04) made by hand: matrix and curve for RGB, a curve for grey, a table for CMYK."""

from __future__ import annotations

import struct

import numpy as np

D50, D65 = (0.9642, 1.0, 0.8249), (0.95047, 1.0, 1.08883)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_SRGB_NUMBERS = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # IEC 61966-2-1
_SRGB_CURVE = struct.pack(">4s4xH2x5i", b"para", 3, *(round(number * 65536) for number in _SRGB_NUMBERS))


def _number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_number, values))


def _gamma(value: float) -> bytes:
    return struct.pack(">4s4xIH2x", b"curv", 1, round(value * 256))


def _profile(space: bytes, connection: bytes, device: bytes, tags: dict[bytes, bytes]) -> bytes:
    at = 128 + 4 + 12 * len(tags)
    table, bodies = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += struct.pack(">4sII", name, at + len(bodies), len(body))
        bodies += body
    header = struct.pack(">I4sI4s4s4s12x4s", at + len(bodies), bytes(4), 0x02400000, device, space, connection, b"acsp")
    header = header.ljust(68, b"\0") + b"".join(map(_number, D50))
    return header.ljust(128, b"\0") + table + bodies


def rgb_profile(primaries: tuple[tuple[float, float], ...], white: tuple[float, ...], curve: bytes) -> bytes:
    """primaries: x and y of red, green and blue."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    columns = columns * np.linalg.solve(columns, white)
    scale = np.diag((_BRADFORD @ D50) / (_BRADFORD @ white))
    red, green, blue = (np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ columns).T
    tags = {b"wtpt": _xyz(np.array(white)), b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)}
    return _profile(b"RGB ", b"XYZ ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def _cmyk_profile() -> bytes:
    """A table of the 16 overprints: each ink takes some of the light, and tints."""
    inks = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    light = (1 - inks * [0.35, 0.45, 0.1, 0.85]).prod(axis=1)
    tint = inks @ [[-30, -40], [60, 0], [-5, 80], [0, 0]] * light[:, None]
    lab = np.column_stack([255 * light, 128 + tint]).round().clip(0, 255).astype(np.uint8)
    curve = bytes(range(256))
    header = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0) + b"".join(map(_number, np.eye(3).ravel()))
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": header + 4 * curve + lab.tobytes() + 3 * curve})


SRGB = rgb_profile(((0.64, 0.33), (0.3, 0.6), (0.15, 0.06)), D65, _SRGB_CURVE)
_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
DISPLAY_P3 = rgb_profile(_P3, D65, _SRGB_CURVE)
P3_GAMMA = rgb_profile(_P3, D65, _gamma(2.2))
ADOBE_RGB = rgb_profile(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), D65, _gamma(563 / 256))
PROPHOTO = rgb_profile(((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), D50, _gamma(1.8))
LINEAR_GREY = _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": _xyz(np.array(D50)), b"kTRC": _gamma(1.0)})
CMYK = _cmyk_profile()
