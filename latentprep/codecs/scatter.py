"""Latents to learn from: colour and gradients of 8×8 cells, and the texture around each. No weights, an exact mirror.

Texture is what a cell's spectrum says without its phase: the mean power in sectors, 3 octave-like bands of 4
orientations, of a windowed 16×16 block. That is the first order of a scattering transform (Bruna & Mallat 2013;
Oyallon et al., ECCV 2018, learn from it in place of pixels) and near to histograms of oriented gradients (Dalal &
Triggs 2005). Phases of fine detail cost most of an image's bytes, and tell a small network next to nothing.

The second order says how evenly that power is spread: the envelope of each sector, taken from windows of half the size,
is a picture of its own, and its wavelets' power tells a lone edge from a grid of them.

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
from latentprep.errors import check_whole

WINDOW = 2 * BLOCK
BANDS = (2.0, 3.5, 5.5, 8.0)  # cycles per window: from periods of 8 pixels to 2; corners belong to the last band
ORIENTATIONS = 4
FLOOR = 1.0  # squared grey levels added to powers: less is rounding and compression noise
EVEN = 0.003  # of an envelope's power, added to that of its wavelets: less is as good as evenly spread
SECOND_ORDER = 6  # terms of each wavelet: of all orientations together, and of across less along
_IN_CACHE = 8  # images


class ScatterCodec:
    """Colours, gradients and oriented texture of 8×8 cells, made to learn from; needs no weights.

    Channels: brightness Y, its two gradients, Cb and Cr, in grey levels; then 12 of texture, in decibels. Pictures
    are decoded from the first five alone. order: 1, or 2 for 30 channels more, in decibels: the texture of Cb and Cr
    together, and the second order of the brightness', 6 terms for each of 3 wavelets.
    """

    name = "scatter"
    joint_bits = 2

    def __init__(self, *, order: int = 1, device: torch.device | str = "cpu") -> None:
        check_whole(f"{self.name}:order", order, 1, 2)
        self.order, self.device = order, torch.device(device)
        self._dct = DctCodec(luma=3, chroma=1, device=device)
        self._texture = _Texture(order).to(self.device)
        self._own = self._dct.latent_shape(BLOCK, BLOCK)[0]
        self.error_weights = (1.0,) * self.latent_shape(BLOCK, BLOCK)[0]

    def config(self) -> dict:
        return {"name": self.name} | ({"order": self.order} if self.order > 1 else {})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        grid = check_multiple(self.name, BLOCK, height, width)
        return (self._own + len(self._texture.signs), *grid)

    @torch.inference_mode()
    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,H/8,W/8]; C is 17, of order 2 47"""
        images = images.to(self.device)
        parts = images.split(_IN_CACHE) if self.device.type == "cpu" else (images,)
        return torch.cat([torch.cat([self._dct.encode(part) / BLOCK, self._texture(part)], 1) for part in parts])

    def graph(self) -> nn.Module:
        """What `encode` does, as a module that can be exported."""
        return _Graph(self._dct.graph(), _Texture(self.order))

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,8h,8w], without texture."""
        return self._dct.decode(latents[:, : self._own] * BLOCK)

    def flip(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> f32 [B,C,h,w]: cells in reverse order; what leans to one side changes its sign."""
        plain, texture = latents.to(self.device).split([self._own, len(self._texture.signs)], 1)
        return torch.cat([self._dct.flip(plain), texture.flip(-1) * self._texture.signs.view(-1, 1, 1)], 1)


class _Sectors(nn.Module):
    """f32 [B,1,8h,8w] -> f32 [B,12,8h/s,8w/s]: the mean power in each sector around each s pixels, half a window."""

    waves: Tensor
    sectors: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        self.stride = window // 2
        waves, sectors = _spectrum(window)
        self.register_buffer("waves", waves[:, None].float())
        self.register_buffer("sectors", sectors[..., None, None].float())

    def forward(self, plane: Tensor) -> Tensor:
        padded = F.pad(plane, (self.stride // 2,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, self.waves, stride=self.stride).square(), self.sectors)


class _Texture(nn.Module):
    """u8 [B,3,8h,8w] -> f32 [B,12 or 42,h,w]: the texture of the brightness in decibels; four orientation terms (all,
    across less along, the two diagonals' difference, both axes less both diagonals) of three band terms each. Of order
    2, then that of the colours, and the first terms of the brightness' second order."""

    terms: Tensor
    signs: Tensor
    binomial: Tensor

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        axes = torch.tensor([[1, 1, 1, 1], [1, 0, -1, 0], [0, 1, 0, -1], [1, -1, 1, -1]], dtype=torch.float64)
        axes /= axes.norm(dim=1, keepdim=True)
        n = torch.arange(len(BANDS) - 1, dtype=torch.float64)
        bands = torch.cos(math.pi / len(n) * torch.outer(n, n + 0.5))
        bands /= bands.norm(dim=1, keepdim=True)
        terms = 10 / math.log(10) * torch.kron(axes, bands)
        signs = torch.tensor([1.0, 1, -1, 1]).repeat_interleave(len(n))
        self.coarse, self.fine = _Sectors(WINDOW), _Sectors(WINDOW // 2) if order > 1 else None
        self.register_buffer("terms", terms[..., None, None].float())
        self.register_buffer("signs", torch.cat([signs, signs, signs[:SECOND_ORDER].repeat(3)]) if order > 1 else signs)
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("binomial", torch.outer(binomial, binomial)[None, None])

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.float().split(1, 1)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-T T.871, as cb and cr
        texture = F.conv2d((self.coarse(grey) + FLOOR).log(), self.terms)
        if self.fine is None:
            return texture
        cb, cr = (blue - grey) / 1.772, (red - grey) / 1.402
        colours = F.conv2d((self.coarse(cb) + self.coarse(cr) + FLOOR).log(), self.terms)
        return torch.cat([texture, colours, self._second_order(self.fine(grey) + FLOOR)], 1)

    def _second_order(self, power: Tensor) -> Tensor:
        """f32 [B,12,2h,2w] -> f32 [B,18,h,w]: the power of the envelopes' three Haar wavelets, against all of it."""
        envelope = power.sqrt()
        nw, ne = envelope[..., :-1, :-1], envelope[..., :-1, 1:]
        sw, se = envelope[..., 1:, :-1], envelope[..., 1:, 1:]
        wavelets = torch.cat([nw + ne - sw - se, nw - ne + sw - se, nw - ne - sw + se], 1) / 4  # [B,36,2h-1,2w-1]
        whole, parts = self._smoothed(F.avg_pool2d(power, 2, 1)), self._smoothed(wavelets.square())
        decibels = [(part + EVEN * whole).log() - whole.log() for part in parts.chunk(3, 1)]
        return torch.cat([F.conv2d(share, self.terms[:SECOND_ORDER]) for share in decibels], 1)

    def _smoothed(self, values: Tensor) -> Tensor:
        """f32 [B,n,2h-1,2w-1] -> f32 [B,n,h,w]"""
        weights = self.binomial.expand(values.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(values, (1,) * 4, mode="replicate"), weights, stride=2, groups=values.shape[1])


class _Graph(nn.Module):
    def __init__(self, plain: nn.Module, texture: nn.Module) -> None:
        super().__init__()
        self.plain, self.texture = plain, texture

    def forward(self, images: Tensor) -> Tensor:
        """u8 [B,3,H,W] -> f32 [B,C,H/8,W/8]"""
        return torch.cat([self.plain(images) / BLOCK, self.texture(images)], 1)


def _spectrum(size: int) -> tuple[Tensor, Tensor]:
    """Windowed cosines and sines, f64 [2F,size,size], whose squares' mean is the power at F frequencies, and for white
    noise its variance; and the weights that give the mean of each sector, f64 [12,2F], orientations slowest.

    A Hann window blurs frequencies over two, so of the larger window's every second one, like the white squares of a
    chessboard, will do.
    """
    half = size // 2
    at = torch.arange(size, dtype=torch.float64) + 0.5 - half
    hann = torch.cos(math.pi * at / size) ** 2
    window = torch.outer(hann, hann)
    window *= math.sqrt(2) / window.norm()
    waves: list[Tensor] = []
    sectors: list[int] = []
    count, edges = len(BANDS) - 1, [edge * size / WINDOW for edge in BANDS]
    for down in range(-half, half + 1):
        for along in range(half + 1):  # the other half of the plane is the same, conjugate
            radius = math.hypot(down, along)
            skipped = size == WINDOW and (down + along) % 2
            if skipped or radius < edges[0] or (along == 0 and down < 0):
                continue
            band = min(count, sum(radius >= edge for edge in edges)) - 1
            orientation = round(math.atan2(down, along) / math.pi * ORIENTATIONS) % ORIENTATIONS
            phase = 2 * math.pi / size * (down * at[:, None] + along * at)
            waves += [window * torch.cos(phase), window * torch.sin(phase)]
            sectors += [orientation * count + band] * 2
    weights = F.one_hot(torch.tensor(sectors), ORIENTATIONS * count).T.double()
    return torch.stack(waves), weights / weights.sum(1, keepdim=True)
