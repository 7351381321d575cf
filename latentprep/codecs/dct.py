"""The 8×8 block DCT of JPEG: no weights, an exact inverse on what it keeps, and an exact mirror."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprep.codecs.base import check_multiple, to_pixels
from latentprep.device import full_float32
from latentprep.errors import check_whole

BLOCK = 8
_IN_CACHE = 8  # images

# R'G'B' in 0…255 to full-range Y'CbCr, all three centred on zero (ITU-T T.871, section 7).
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)


class DctCodec:
    """8×8 block DCT in YCbCr, first coefficients in zigzag order as channels; needs no weights.

    luma, chroma: how many coefficients to keep of Y, and of Cb and of Cr: 1 to 64, 0 to 64 (0: no colour).
    Channels: Y's, then Cb's, then Cr's, each by rising frequency. Latents are orthonormal coefficients of
    pixels in 0…255, the mean grey of 128 taken off.
    """

    name = "dct"
    light = True

    def __init__(self, *, luma: int = 10, chroma: int = 3, device: torch.device | str = "cpu") -> None:
        check_whole(f"{self.name}:luma", luma, 1, BLOCK * BLOCK)
        check_whole(f"{self.name}:chroma", chroma, 0, BLOCK * BLOCK)
        self.luma, self.chroma, self.device = luma, chroma, torch.device(device)
        zigzag = _zigzag()
        kept = [(plane, u, v) for plane, count in enumerate((luma, chroma, chroma)) for u, v in zigzag[:count]]
        basis, colour = _dct_basis().double(), torch.tensor(_YCBCR, dtype=torch.float64)
        inverse = torch.linalg.inv(colour)
        # Colour transform, DCT and selection are one linear map of a block: a convolution of stride 8.
        analysis = [colour[p].view(3, 1, 1) * torch.outer(basis[u], basis[v]) for p, u, v in kept]
        synthesis = [inverse[:, p].view(3, 1, 1) * torch.outer(basis[u], basis[v]) for p, u, v in kept]
        self._analysis = torch.stack(analysis).float().to(self.device)
        self._synthesis = torch.stack(synthesis).float().to(self.device)
        # A mirrored cosine of odd horizontal frequency is its negative.
        self._signs = torch.tensor([(-1.0) ** v for _, _, v in kept], device=self.device).view(-1, 1, 1)

    def config(self) -> dict:
        return {"name": self.name, "luma": self.luma, "chroma": self.chroma}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.luma + 2 * self.chroma, *check_multiple(self.name, BLOCK, height, width))

    @torch.inference_mode()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B, luma + 2 chroma, H/8, W/8]."""
        images = images.to(self.device)
        # On a CPU a few images at a time, whose float pixels stay in the cache: less than half the time of 32.
        parts = images.split(_IN_CACHE) if self.device.type == "cpu" else (images,)
        return torch.cat([F.conv2d(_centred(part), self._analysis, stride=BLOCK) for part in parts])

    def graph(self) -> nn.Module:
        """What `encode` does, as a module that can be exported."""
        analysis = nn.Conv2d(3, len(self._analysis), BLOCK, BLOCK, bias=False)
        analysis.weight.data.copy_(self._analysis)
        return nn.Sequential(_Centred(), analysis).requires_grad_(False)

    @torch.inference_mode()
    @full_float32()
    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,8h,8w]: exact where all 64 coefficients of each plane are kept."""
        return to_pixels(F.conv_transpose2d(latents.to(self.device), self._synthesis, stride=BLOCK) + 128)

    def flip(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> f32 [B,C,h,w]: blocks in reverse order, odd horizontal frequencies negated."""
        return latents.to(self.device).flip(-1) * self._signs


class _Centred(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        """u8 -> f32, less 128"""
        return pixels.float() - 128


def _centred(pixels: Tensor) -> Tensor:
    """u8 -> f32, less 128: in bytes, which are a quarter of the floats."""
    return pixels.bitwise_xor(128).view(torch.int8).float()


def _dct_basis() -> Tensor:
    """f64 [8,8]: row k is the orthonormal DCT-II vector of frequency k."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    basis = torch.cos(math.pi / BLOCK * torch.outer(n, n + 0.5)) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis


def _zigzag() -> list[tuple[int, int]]:
    """(vertical, horizontal) frequencies in JPEG's zigzag order (ITU-T T.81, figure 5)."""
    pairs = [(u, v) for u in range(BLOCK) for v in range(BLOCK)]
    # Along each antidiagonal: upward where the sum is even, downward where it is odd.
    return sorted(pairs, key=lambda p: (sum(p), p[1] if sum(p) % 2 == 0 else p[0]))
