from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from latentprep.codecs import make_codec
from latentprep.codecs.scatter import BANDS, FLOOR, ORIENTATIONS, _Texture
from latentprep.errors import UsageError
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


def test_the_second_order_adds_channels_and_changes_none() -> None:
    images = torch.from_numpy(np.stack([picture(i, 64, 48) for i in range(3)])).permute(0, 3, 1, 2)
    first, second = make_codec("scatter"), make_codec("scatter", order=2)
    assert (first.config(), second.config()) == ({"name": "scatter"}, {"name": "scatter", "order": 2})
    latents = second.encode(images)
    assert torch.equal(latents[:, :17], first.encode(images))
    assert torch.equal(second.decode(latents), first.decode(latents[:, :17]))
    assert (
        latents.shape[1:] == second.latent_shape(*images.shape[2:]) == (47, *first.latent_shape(*images.shape[2:])[1:])
    )


def second_order(grey: np.ndarray) -> torch.Tensor:
    """f64 [64,64] -> f32 [3]: how unevenly power is spread down, along, and both, in the inner cells."""
    image = torch.from_numpy(grey.round().astype(np.uint8)).expand(1, 3, -1, -1)
    latents = make_codec("scatter", order=2).encode(image)[0, 29::6, 2:-2, 2:-2]
    return latents.mean((1, 2))


def test_the_second_order_tells_how_power_is_spread_and_along_which_way() -> None:
    """Waves that never end have an even envelope; waves in bursts have one with waves of its own."""
    endless = wave(3.0, 0)[0, ..., 0] - 128.0
    bursts = 0.5 + 0.5 * np.cos(2 * math.pi / 16 * np.arange(64))
    even, along, down = (second_order(128 + waves) for waves in (endless, endless * bursts, endless * bursts[:, None]))
    assert along[1] > even[1] + 10
    assert down[0] > even[0] + 10
    assert along[1] > along[0] + 10
    assert down[0] > down[1] + 10


def test_the_second_order_does_not_depend_on_contrast() -> None:
    noise = np.random.default_rng(0).normal(0, 1, (64, 64))
    soft, strong = (second_order((128 + contrast * noise).clip(0, 255)) for contrast in (12, 30))
    assert torch.allclose(soft, strong, atol=3)  # a decibel in each of 12 sectors


def test_the_texture_of_colours_is_of_order_two() -> None:
    """Red and green stripes of equal brightness have none at order 1, and one in the colours'."""
    stripes = torch.arange(64) // 2 % 2 == 0
    image = torch.where(stripes, torch.tensor([150, 50, 90])[:, None], torch.tensor([15, 119, 90])[:, None])
    latents = make_codec("scatter", order=2).encode(image.to(torch.uint8)[None, :, None].expand(1, -1, 64, -1))[0]
    brightness, colours = latents[[5, 17], 2:-2, 2:-2].mean((1, 2))
    assert colours > brightness + 20


@pytest.mark.parametrize("order", [0, 3])
def test_other_orders_are_refused(order: int) -> None:
    with pytest.raises(UsageError, match="scatter:order must be"):
        make_codec("scatter", order=order)


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_exported_is_what_encodes(order: int) -> None:
    codec = make_codec("scatter", order=order)
    images = torch.from_numpy(np.stack([picture(i, 64, 48) for i in range(3)])).permute(0, 3, 1, 2)
    assert torch.allclose(codec.graph()(images), codec.encode(images), atol=1e-4)  # type: ignore[attr-defined]
