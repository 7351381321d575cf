"""A windowed MDCT of sound in bark bands: no weights, and an exact inverse on what it keeps."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from latentprep.codecs.base import check_revision, frames, to_wave
from latentprep.device import full_float32
from latentprep.errors import UsageError, check_whole
from latentprep.sources.kinds import SOUND

FRAMES = 50  # per second, as most neural codecs of speech have
REVISION = 2
_FLOOR = 2.0**-13  # of full scale: what is softer in a band is silence. -78 dB, about the noise of 13 bits


class MdctCodec:
    """Windowed MDCT of 20 ms: levels of bark bands, and the lowest coefficients; needs no weights.

    bands: how many bands, of equal width on the bark scale, from zero to half the rate. shapes: of how many of them,
    the lowest, the coefficients are kept; the others are decoded as noise of their level. rate: samples per second.
    Latents are a picture of one channel, as spectrograms are drawn: log2 of each band's root mean square, time to the
    right, high bands above. A voice that is higher, or faster, is the same picture moved or stretched, which is what
    networks and augmentation for pictures are made for.
    With shapes, latents have channels in place of rows: the levels by rising frequency, then the kept coefficients,
    divided by their band's. That is invertible, where signed coefficients beside levels would not be.
    revision: 2; 1 has channels in place of rows without shapes, too.
    """

    name = "mdct"
    media = SOUND
    light = True

    def __init__(
        self, *, bands: int = 24, shapes: int = 0, rate: int = 16000, revision: int = REVISION,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        check_whole(f"{self.name}:rate", rate, 2000, 192000)
        if rate % (2 * FRAMES):
            raise UsageError(f"{self.name}:rate must be a multiple of {2 * FRAMES}, got {rate}", "use 16000")
        check_whole(f"{self.name}:bands", bands, 1, 64)
        check_whole(f"{self.name}:shapes", shapes, 0, bands)
        self.revision, self.pictured = check_revision(self.name, revision, REVISION), revision > 1 and not shapes
        self.bands, self.shapes, self.rate, self.device = bands, shapes, rate, torch.device(device)
        self.hop = rate // FRAMES
        edges = bark_edges(bands, self.hop, rate)
        self.kept = edges[shapes]
        n = torch.arange(self.hop, dtype=torch.float64) + 0.5
        dct4 = torch.cos(torch.outer(n, n) * (math.pi / self.hop)) * math.sqrt(2 / self.hop)  # its own inverse
        # A frame reaches half a hop into its neighbours: sine window, folded where two frames meet.
        angle = n[: self.hop // 2] * (math.pi / 2 / self.hop) + math.pi / 4
        widths = torch.tensor([high - low for low, high in pairwise(edges)])
        self._band = torch.repeat_interleave(torch.arange(bands), widths).to(self.device)
        self._widths = widths.float().to(self.device)
        self._dct4 = dct4.float().to(self.device)
        self._sin, self._cos = angle.sin().float().to(self.device), angle.cos().float().to(self.device)

    def config(self) -> dict:
        config = {"name": self.name, "bands": self.bands, "shapes": self.shapes, "rate": self.rate}
        return config | ({"revision": self.revision} if self.pictured else {})

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        count = frames(self.name, self.hop, height, width)
        return (1, self.bands, count) if self.pictured else (self.bands + self.kept, 1, count)

    @torch.inference_mode()
    @full_float32()
    def encode(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> f32 [B,1,bands,T/hop], or with shapes [B,C,1,T/hop], on the codec's device."""
        coefficients = self.coefficients(sounds.to(self.device))
        squares = torch.zeros(*coefficients.shape[:2], self.bands, device=self.device)
        squares.index_add_(2, self._band, coefficients.square())
        scale = (squares / self._widths).sqrt() + _FLOOR  # [B,F,bands]
        shapes = coefficients[..., : self.kept] / scale[..., self._band[: self.kept]]
        values = torch.cat([scale.log2(), shapes], 2).transpose(1, 2)  # [B,C,F]
        return (values.flip(1)[:, None] if self.pictured else values[:, :, None]).contiguous()

    @torch.inference_mode()
    @full_float32()
    def decode(self, latents: Tensor) -> Tensor:
        """What `encode` gives, on any device -> f32 [B,F*hop], on the codec's device, full scale at 1."""
        latents = latents.to(self.device)
        values = (latents[:, 0].flip(1) if self.pictured else latents[:, :, 0]).transpose(1, 2)  # [B,F,C]
        scale = values[..., : self.bands].exp2()
        kept = values[..., self.bands :] * scale[..., self._band[: self.kept]]
        level = (scale - _FLOOR).clamp(min=0)[..., self._band[self.kept :]]
        noise = level * self._signs(values.shape[1])[:, self.kept :]
        return to_wave(self.waves(torch.cat([kept, noise], 2)))

    def flip(self, latents: Tensor) -> None:
        return None

    def coefficients(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> f32 [B,F,hop]: an orthogonal map, so that levels of coefficients are levels of sound."""
        frames = sounds.unflatten(1, (-1, self.hop)).clone()
        self._fold(frames, 1)
        return frames @ self._dct4

    def waves(self, coefficients: Tensor) -> Tensor:
        """f32 [B,F,hop] -> f32 [B,T]. Inverse of `coefficients`."""
        frames = coefficients @ self._dct4
        self._fold(frames, -1)
        return frames.flatten(1)

    def _fold(self, frames: Tensor, direction: int) -> None:
        """Rotate each pair of samples that are mirrored where two frames meet: the window and its aliasing (TDAC,
        Princen and Bradley 1986) as Malvar's lapped transform does it. direction: 1, or -1 for the inverse."""
        half = self.hop // 2
        before, after = frames[:, :-1, half:].flip(2), frames[:, 1:, :half]
        cos = direction * self._cos
        left, right = self._sin * before - cos * after, self._sin * after + cos * before
        frames[:, :-1, half:], frames[:, 1:, :half] = left.flip(2), right

    def _signs(self, count: int) -> Tensor:
        """Of the coefficients that decoding makes up: f32 [count,hop], -1 or 1, always the same."""
        drawn = torch.randint(0, 2, (count, self.hop), generator=torch.Generator().manual_seed(0))
        return (2 * drawn - 1).float().to(self.device)


def bark_edges(bands: int, bins: int, rate: int) -> list[int]:
    """The bins where bands of equal width on the bark scale (Traunmüller 1990) begin, and the end: bands + 1 numbers.
    Each band has at least one bin."""
    top = 26.81 / (1 + 1960 / (rate / 2))
    edges = [0]
    for band in range(1, bands):
        bark = top * band / bands
        hertz = 1960 * bark / (26.81 - bark)
        edges.append(max(edges[-1] + 1, round(hertz * bins / (rate / 2))))
    if edges[-1] >= bins:
        raise UsageError(f"{bins} coefficients are too few for mdct:bands={bands}", "use fewer bands, or a higher rate")
    return [*edges, bins]
