"""Latents to learn from: colour and gradients of 8×8 cells, and the texture around each. No weights, an exact mirror.

Texture is what a cell's spectrum says without its phase: the mean power in sectors, 3 octave-like bands of 4
orientations, of a windowed 16×16 block. That is the first order of a scattering transform (Bruna & Mallat 2013;
Oyallon et al., ECCV 2018, learn from it in place of pixels) and near to histograms of oriented gradients (Dalal &
Triggs 2005). Phases of fine detail cost most of an image's bytes, and tell a small network next to nothing.

As in the cepstrum of speech, the decibels of the sectors are transformed orthonormally along bands and orientations,
so that few channels hold most of what varies.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprep.codecs.base import check_multiple
from latentprep.codecs.dct import BLOCK, DctCodec
from latentprep.device import full_float32

WINDOW = 2 * BLOCK
BANDS = (2.0, 3.5, 5.5, 8.0)  # cycles per window: from periods of 8 pixels to 2; corners belong to the last band
ORIENTATIONS = 4
FLOOR = 1.0  # squared grey levels added to powers: less is rounding and compression noise
_IN_CACHE = 8  # images


class ScatterCodec:
    """Colours, gradients and oriented texture of 8×8 cells, made to learn from; needs no weights.

    Channels: brightness Y, its two gradients, Cb and Cr, in grey levels; then 12 of texture, in decibels. Pictures
    are decoded from the first five alone.
    """

    name = "scatter"
    joint_bits = 2

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._dct = DctCodec(luma=3, chroma=1, device=device)
        self._texture = _Texture().to(self.device)
        self._own = self._dct.latent_shape(BLOCK, BLOCK)[0]
        self.error_weights = (1.0,) * self.latent_shape(BLOCK, BLOCK)[0]

    def config(self) -> dict:
        return {"name": self.name}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        grid = check_multiple(self.name, BLOCK, height, width)
        return (self._own + len(self._texture.signs), *grid)

    @torch.inference_mode()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,17,H/8,W/8]"""
        images = images.to(self.device)
        parts = images.split(_IN_CACHE) if self.device.type == "cpu" else (images,)
        return torch.cat([torch.cat([self._dct.encode(part) / BLOCK, self._texture(part)], 1) for part in parts])

    def graph(self) -> nn.Module:
        """What `encode` does, as a module that can be exported."""
        return _Graph(self._dct.graph(), _Texture())

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,17,h,w] -> u8 [B,3,8h,8w], without texture."""
        return self._dct.decode(latents[:, : self._own] * BLOCK)

    def flip(self, latents: Tensor) -> Tensor:
        """f32 [B,17,h,w] -> f32 [B,17,h,w]: cells in reverse order; what leans to one side changes its sign."""
        plain, texture = latents.to(self.device).split([self._own, len(self._texture.signs)], 1)
        return torch.cat([self._dct.flip(plain), texture.flip(-1) * self._texture.signs.view(-1, 1, 1)], 1)


class _Texture(nn.Module):
    """u8 [B,3,8h,8w] -> f32 [B,12,h,w]: the texture of the brightness in decibels; four orientation terms (all, across
    less along, the two diagonals' difference, both axes less both diagonals) of three band terms each."""

    waves: Tensor
    sectors: Tensor
    terms: Tensor
    signs: Tensor

    def __init__(self) -> None:
        super().__init__()
        waves, sectors = _spectrum()
        axes = torch.tensor([[1, 1, 1, 1], [1, 0, -1, 0], [0, 1, 0, -1], [1, -1, 1, -1]], dtype=torch.float64)
        axes /= axes.norm(dim=1, keepdim=True)
        n = torch.arange(len(BANDS) - 1, dtype=torch.float64)
        bands = torch.cos(math.pi / len(n) * torch.outer(n, n + 0.5))
        bands /= bands.norm(dim=1, keepdim=True)
        terms = 10 / math.log(10) * torch.kron(axes, bands)
        for name, values in (("waves", waves[:, None]), ("sectors", sectors[..., None, None])):
            self.register_buffer(name, values.float())
        self.register_buffer("terms", terms[..., None, None].float())
        self.register_buffer("signs", torch.tensor([1.0, 1, -1, 1]).repeat_interleave(len(n)))

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.float().split(1, 1)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-T T.871
        margin = (WINDOW - BLOCK) // 2
        spectrum = F.conv2d(F.pad(grey, (margin,) * 4, mode="reflect"), self.waves, stride=BLOCK)
        return F.conv2d((F.conv2d(spectrum.square(), self.sectors) + FLOOR).log(), self.terms)


class _Graph(nn.Module):
    def __init__(self, plain: nn.Module, texture: nn.Module) -> None:
        super().__init__()
        self.plain, self.texture = plain, texture

    def forward(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,17,H/8,W/8]"""
        return torch.cat([self.plain(images) / BLOCK, self.texture(images)], 1)


def _spectrum() -> tuple[Tensor, Tensor]:
    """Windowed cosines and sines, f64 [2F,16,16], whose squares' mean is the power at F frequencies, and for white
    noise its variance; and the weights that give the mean of each sector, f64 [12,2F], orientations slowest.

    A Hann window blurs frequencies over two, so every second one, like the white squares of a chessboard, will do.
    """
    half = WINDOW // 2
    at = torch.arange(WINDOW, dtype=torch.float64) + 0.5 - half
    hann = torch.cos(math.pi * at / WINDOW) ** 2
    window = torch.outer(hann, hann)
    window *= math.sqrt(2) / window.norm()
    waves: list[Tensor] = []
    sectors: list[int] = []
    count = len(BANDS) - 1
    for down in range(-half, half + 1):
        for along in range(half + 1):  # the other half of the plane is the same, conjugate
            radius = math.hypot(down, along)
            if (down + along) % 2 or radius < BANDS[0] or (along == 0 and down < 0):
                continue
            band = min(count, sum(radius >= edge for edge in BANDS)) - 1
            orientation = round(math.atan2(down, along) / math.pi * ORIENTATIONS) % ORIENTATIONS
            phase = 2 * math.pi / WINDOW * (down * at[:, None] + along * at)
            waves += [window * torch.cos(phase), window * torch.sin(phase)]
            sectors += [orientation * count + band] * 2
    weights = F.one_hot(torch.tensor(sectors), ORIENTATIONS * count).T.double()
    return torch.stack(waves), weights / weights.sum(1, keepdim=True)
