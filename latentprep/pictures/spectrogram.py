"""Samples as pictures: images as they are, sounds as spectrograms."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 112  # pixels
_WINDOW = 512  # samples
_RANGE = 70.0  # decibels from black to white, down from the loudest place of a sound


def pixels(samples: Tensor) -> np.ndarray:
    """Images, u8 [n,3,H,W], or sounds, f32 [n,T] -> u8 [n,H,W,3]."""
    return samples.permute(0, 2, 3, 1).numpy() if samples.ndim == 4 else spectrograms(samples)


def spectrograms(sounds: Tensor) -> np.ndarray:
    """f32 [n,T] -> u8 [n,112,112,3]: power in decibels, time to the right, frequency upwards to half the rate."""
    from matplotlib import colormaps

    window = torch.hann_window(_WINDOW)
    padded = F.pad(sounds.float(), (_WINDOW // 2, _WINDOW // 2))
    hop = max(1, sounds.shape[1] // (2 * SIDE))
    power = torch.stft(padded, _WINDOW, hop, window=window, center=False, return_complex=True).abs().square()
    power = F.adaptive_avg_pool2d(power[:, None], SIDE)[:, 0].flip(1)
    decibels = 10 * torch.log10(power / power.amax((1, 2), keepdim=True).clamp(min=1e-12) + 1e-12)
    unit = (decibels / _RANGE + 1).clamp(0, 1)
    return colormaps["magma"](unit.numpy(), bytes=True)[..., :3]
