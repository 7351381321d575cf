"""PSNR and SSIM against scikit-image's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentprep.errors import UsageError
from latentprep.pictures.metrics import mean, psnr, ssim
from pictures import picture


def pairs(noise: float, side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """u8 [4,H,W,3] twice: pictures, two of them nearly flat, and the same with noise."""
    clean = np.stack([picture(seed, side, side + 9) for seed in range(4)])
    clean[2] = 3
    clean[3] = 200 + clean[3] // 32
    random = np.random.default_rng(0)
    return clean, (clean + random.normal(0, noise, clean.shape)).round().clip(0, 255).astype(np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("noise", [0.6, 8, 60])
def test_they_agree_with_scikit_image(noise: float) -> None:
    clean, noisy = pairs(noise)
    kinds = {"uniform": {}, "gaussian": {"gaussian_weights": True, "use_sample_covariance": False}}
    found = psnr(tensor(clean), tensor(noisy))
    for i in range(len(clean)):
        assert found[i].item() == pytest.approx(peak_signal_noise_ratio(clean[i], noisy[i], data_range=255), abs=1e-4)
    for window, options in kinds.items():
        found = ssim(tensor(clean), tensor(noisy), window=window)
        for i in range(len(clean)):
            theirs = structural_similarity(clean[i], noisy[i], channel_axis=2, data_range=255, **options)
            assert found[i].item() == pytest.approx(theirs, abs=1e-4)


def test_floats_have_their_own_range() -> None:
    clean, noisy = pairs(12)
    ones = [tensor(images).double() / 255 for images in (clean, noisy)]
    assert torch.allclose(psnr(*ones, data_range=1.0), psnr(tensor(clean), tensor(noisy)))
    assert torch.allclose(ssim(*ones, data_range=1.0), ssim(tensor(clean), tensor(noisy)), atol=1e-5)


def test_equal_images() -> None:
    clean, _ = pairs(1)
    assert psnr(tensor(clean), tensor(clean)).isinf().all()
    assert torch.allclose(ssim(tensor(clean), tensor(clean)), torch.ones(4, dtype=torch.float64))


def test_images_smaller_than_the_window_have_no_ssim() -> None:
    small = torch.zeros(2, 3, 8, 40, dtype=torch.uint8)
    assert ssim(small, small).isnan().all()
    assert not ssim(small, small, window="uniform").isnan().any()


def test_what_cannot_be_compared_is_refused() -> None:
    one = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UsageError, match="must have the same shape"):
        psnr(one, one[..., :8])
    with pytest.raises(UsageError, match="use gaussian or uniform"):
        ssim(one, one, window="box")


def test_means_are_numbers_or_nothing() -> None:
    assert mean([1.0, 2.0]) == 1.5
    assert mean([]) is None
    assert mean([1.0, math.inf]) is None
