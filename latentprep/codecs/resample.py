"""Plain resampling: the baseline that every other codec must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprep.codecs.base import check_multiple, to_pixels
from latentprep.errors import check_whole


class ResampleCodec:
    """Antialiased shrinking by an integer factor; factor 1 keeps the pixels themselves. Needs no weights.

    Latents are RGB in 0…255.
    """

    name = "resample"
    joint_bits = 2
    light = True

    def __init__(self, *, factor: int = 4, device: torch.device | str = "cpu") -> None:
        check_whole(f"{self.name}:factor", factor, 1, 64)
        self.factor, self.device = factor, torch.device(device)

    def config(self) -> dict:
        return {"name": self.name, "factor": self.factor}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (3, *check_multiple(self.name, self.factor, height, width))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,3,H/f,W/f]."""
        pixels = images.to(self.device).float().contiguous()
        if self.factor == 1:
            return pixels
        shape = [side // self.factor for side in images.shape[-2:]]
        return F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 255)

    def graph(self) -> nn.Module:
        """What `encode` does, as a module that can be exported."""
        return _Shrink(self.factor)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,3,h,w] -> u8 [B,3,fh,fw], bicubic."""
        shape = [side * self.factor for side in latents.shape[-2:]]
        return to_pixels(F.interpolate(latents.to(self.device), shape, mode="bicubic", align_corners=False))

    def flip(self, latents: Tensor) -> Tensor:
        """f32 [B,3,h,w] -> f32 [B,3,h,w], columns in reverse order."""
        return latents.to(self.device).flip(-1)


class _Shrink(nn.Module):
    """Shrinking is linear, and along each side by itself: a matrix, of what it makes of single pixels."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pixels: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,3,H/f,W/f]."""
        values = pixels.float()
        if self.factor == 1:
            return values
        rows, columns = (self._matrix(side) for side in values.shape[-2:])
        return (rows @ values @ columns.T).clamp(0, 255)

    def _matrix(self, side: int) -> Tensor:
        """f32 [side/f,side]"""
        shape = [side // self.factor, side]
        return F.interpolate(torch.eye(side)[None, None], shape, mode="bicubic", antialias=True)[0, 0]
