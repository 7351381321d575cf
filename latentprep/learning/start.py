"""What training starts from: the Karhunen–Loève transform of the images' blocks, which is the best linear codec.

The eigenvectors of the blocks' covariance are even or odd under the mirror, as those of a symmetric map are. Those of
the largest eigenvalues become the linear part of encoder and decoder; the networks' last layers start at zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from latentprep.codecs.learned import MIDDLE, Architecture, MirrorConv, Networks, grids

ENCODER, ENCODER_BLOCKS = (32, 96, 128), (1, 1, 1)  # the networks' widths and blocks, from the finest grid on
DECODER, DECODER_BLOCKS = (48, 128, 160), (2, 2, 1)


def started(
    images: np.ndarray, channels: int, factor: int, bits: float, seed: int
) -> tuple[Networks, Architecture, Tensor]:
    """u8 [n,3,S,S] -> networks that compute the transform, their architecture, and the scale of each latent channel's
    logistic distribution, f32 [C].

    The step is such that its codes have `bits` bits per value.
    """
    blocks, mean = _blocks(images, factor)
    vectors, odd = _eigenvectors(blocks, channels, factor)
    latents = blocks @ vectors.T
    step = _step(latents, bits)
    of = architecture(factor, channels, odd, step)
    networks = Networks(of)
    _draw(networks, seed)
    # The kernels of the linear layers reach half a cell beyond it on each side, with zeros there at first.
    margin = factor // 2
    kernels = torch.from_numpy(vectors.reshape(channels, 3, factor, factor)).float()
    kernels = nn.functional.pad(kernels, (margin,) * 4)
    shift = torch.from_numpy(mean / step).float()
    linear = networks.encoder.linear, networks.decoder.linear
    for layer, weight in zip(linear, (kernels, kernels.transpose(0, 1)), strict=True):
        layer.weight.data.copy_(weight)
    linear[0].bias.data.copy_(-torch.einsum("ckhw,k->c", kernels, shift))
    linear[1].bias.data.copy_(shift)
    return networks, of, torch.from_numpy(_scales(latents / step)).float()


def architecture(factor: int, channels: int, odd: int, step: float) -> Architecture:
    """With networks of the usual sizes."""
    sizes = (values[: grids(factor)] for values in (ENCODER, ENCODER_BLOCKS, DECODER, DECODER_BLOCKS))
    return Architecture(factor, channels, odd, step, *sizes)


def _blocks(images: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """u8 [n,3,S,S] -> f64 [cells,3ff], less the mean colour, and that colour less the middle, f64 [3]."""
    n, _, height, width = images.shape
    cells = images.reshape(n, 3, height // factor, factor, width // factor, factor).transpose(0, 2, 4, 1, 3, 5)
    values = cells.reshape(-1, 3, factor * factor).astype(np.float64) - MIDDLE
    mean = values.mean((0, 2))
    return (values - mean[:, None]).reshape(len(values), -1), mean


def _eigenvectors(blocks: np.ndarray, channels: int, factor: int) -> tuple[np.ndarray, int]:
    """f64 [C,3ff], the even ones first, each kind by falling eigenvalue; and how many are odd."""
    covariance = blocks.T @ blocks / len(blocks)
    places = np.arange(3 * factor * factor).reshape(3, factor, factor)[:, :, ::-1].ravel()  # of the mirrored block
    found = []
    for sign in (1, -1):
        project = (np.eye(len(places)) + sign * np.eye(len(places))[places]) / 2
        values, vectors = np.linalg.eigh(project @ covariance @ project)
        kept = np.abs(np.sum(vectors * (project @ vectors), 0) - 1) < 1e-6  # not of the other kind
        found += [(value, sign, vector) for value, vector in zip(values[kept], vectors.T[kept], strict=True)]
    best = sorted(found, key=lambda one: -one[0])[:channels]
    ordered = [one for sign in (1, -1) for one in best if one[1] == sign]
    return np.stack([vector for _, _, vector in ordered]), sum(sign < 0 for _, sign, _ in best)


def _scales(latents: np.ndarray) -> np.ndarray:
    """f64 [cells,C] -> the logistic distributions' scales, f64 [C]: their mean absolute value is 2 ln 2 of it."""
    return np.maximum(np.abs(latents).mean(0) / (2 * math.log(2)), 1e-3)


def _step(latents: np.ndarray, bits: float) -> float:
    """The step, in grey levels, with which quantized latents, f64 [cells,C], take so many bits per value."""
    low, high = 1e-3, 1e5
    some = torch.from_numpy(latents[:: max(1, len(latents) // 4096)]).float()
    for _ in range(40):
        middle = math.sqrt(low * high)
        scales = torch.from_numpy(_scales(latents / middle)).float()
        spent = rate(some / middle, torch.zeros_like(scales), scales).mean()
        low, high = (middle, high) if spent > bits else (low, middle)
    return round(middle, 4)


def rate(latents: Tensor, places: Tensor, scales: Tensor) -> Tensor:
    """Bits that each latent, rounded to a step of 1, takes under its channel's logistic distribution.

    f32 [..., C] and f32 [C] twice -> f32 [..., C].
    """
    away = (latents - places).abs()
    share = torch.sigmoid((0.5 - away) / scales) - torch.sigmoid((-0.5 - away) / scales)
    return -torch.log2(share.clamp(min=1e-9))


def _draw(networks: Networks, seed: int) -> None:
    """Draw the hidden layers' weights (He et al. 2015); the second layers of blocks are small, the last layers zero."""
    generator = torch.Generator().manual_seed(seed & 0xFFFFFFFF)
    for name, layer in networks.named_modules():
        if isinstance(layer, MirrorConv):
            spread = layer.stride**2 if layer.up else 1  # how many outputs share what an input gives
            fan = layer.given.count * layer.weight.shape[-1] ** 2 / spread
            deviation = math.sqrt(2 / fan) * (0.3 if name.endswith("second") else 1)
            layer.weight.data.normal_(0, deviation, generator=generator)
    for part in (networks.encoder, networks.decoder):
        part.network[-1].weight.data.zero_()  # type: ignore[operator]
