from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from latentprep.codecs import make_codec
from latentprep.codecs.scatter import BANDS, FLOOR, ORIENTATIONS, _Texture
from pictures import picture

COUNT = len(BANDS) - 1


def sectors(images: np.ndarray) -> np.ndarray:
    """u8 [B,H,W,3] -> f64 [B,orientations,bands,h,w]: the powers that the codec's texture stands for."""
    codec = make_codec("scatter")
    texture = codec.encode(torch.from_numpy(images).permute(0, 3, 1, 2))[:, 5:].double()
    terms = _Texture().terms[..., 0, 0].double()
    powers = torch.einsum("st,bthw->bshw", torch.linalg.inv(terms), texture).exp() - FLOOR
    return powers.unflatten(1, (ORIENTATIONS, COUNT)).numpy()


def wave(period: float, degrees: float, phase: float = 0.0) -> np.ndarray:
    """u8 [1,64,64,3]: grey waves of 50 grey levels across that direction."""
    y, x = np.mgrid[:64, :64]
    along = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
    grey = (128 + 50 * np.cos(2 * math.pi * along / period + phase)).round().astype(np.uint8)
    return np.repeat(grey[None, ..., None], 3, -1)


@pytest.mark.parametrize(("period", "band"), [(6.0, 0), (3.6, 1), (2.4, 2)])
@pytest.mark.parametrize("orientation", range(ORIENTATIONS))
def test_waves_are_in_the_sector_of_their_period_and_direction(period: float, band: int, orientation: int) -> None:
    inner = sectors(wave(period, 180 / ORIENTATIONS * orientation))[0, :, :, 2:-2, 2:-2]
    strongest = inner.reshape(ORIENTATIONS * COUNT, -1).argmax(0)
    assert (strongest == orientation * COUNT + band).all()


def test_texture_does_not_depend_on_phase() -> None:
    """Waves at any place have the same texture: what moves a coefficient of the DCT through its whole range."""
    images = np.concatenate([wave(3.6, 0, phase) for phase in np.linspace(0, 2 * math.pi, 7)])
    strongest = sectors(images)[:, 0, 1, 2:-2, 2:-2]
    assert strongest.max() < 1.05 * strongest.min()


def test_white_noise_has_its_variance_in_every_sector() -> None:
    grey = np.random.default_rng(0).normal(128, 20, (2, 512, 512, 1)).round().clip(0, 255).astype(np.uint8)
    powers = sectors(np.repeat(grey, 3, -1)).mean((0, 3, 4))
    np.testing.assert_allclose(powers, 400, rtol=0.1)


def test_flat_images_are_their_colour_alone() -> None:
    images = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 40)
    codec = make_codec("scatter")
    latents = codec.encode(images)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert torch.allclose(latents[:, 0], torch.tensor(luma - 128).expand(1, 4, 5), atol=1e-3)
    assert latents[:, [1, 2]].abs().max() < 1e-3
    assert latents[:, 5:].abs().max() < 0.05
    assert torch.equal(codec.decode(latents), images)


def test_what_is_exported_is_what_encodes() -> None:
    codec = make_codec("scatter")
    images = torch.from_numpy(np.stack([picture(i, 64, 48) for i in range(3)])).permute(0, 3, 1, 2)
    assert torch.allclose(codec.graph()(images), codec.encode(images), atol=1e-4)  # type: ignore[attr-defined]
