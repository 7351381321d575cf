from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprep.errors import CodecError, UsageError
from latentprep.format import Quantizer
from latentprep.quantizing.scalar import dequantize, fit_quantizer, quantize, quantize_counting

finite = st.floats(-100, 100, width=32)


def latents(seed: int, channels: int = 3, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(8, channels, 12, 12, generator=torch.Generator().manual_seed(seed)) * scale


def error(x: torch.Tensor, quantizer: Quantizer) -> float:
    return float((dequantize(quantize(x, quantizer), quantizer) - x).square().mean())


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), lo=finite, step=st.floats(2**-10, 10, width=32), seed=st.integers(0, 99))
def test_codes_are_below_two_to_the_bits_and_survive_a_round_trip(bits: int, lo: float, step: float, seed: int) -> None:
    quantizer = Quantizer(bits, (lo,), (step,))
    codes = torch.randint(0, 2**bits, (2, 1, 5, 7), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(quantize(dequantize(codes, quantizer), quantizer), codes)
    wild = quantize(latents(seed, 1, 1e4), quantizer)
    assert int(wild.max()) < 2**bits


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), seed=st.integers(0, 999))
def test_error_inside_the_range_is_at_most_half_a_step(bits: int, seed: int) -> None:
    x = latents(seed)
    quantizer = fit_quantizer(x, bits)
    inside = (x >= torch.tensor(quantizer.lo).view(-1, 1, 1)) & (
        x <= torch.tensor(quantizer.lo).view(-1, 1, 1) + torch.tensor(quantizer.step).view(-1, 1, 1) * 2**bits
    )
    gap = (dequantize(quantize(x, quantizer), quantizer) - x).abs() / torch.tensor(quantizer.step).view(-1, 1, 1)
    assert float(gap[inside].max()) <= 0.5 + 1e-3
    codes, saturated, finite = quantize_counting(x, quantizer)
    assert torch.equal(codes, quantize(x, quantizer))
    assert finite.all()
    assert (saturated - (~inside).sum((0, 2, 3))).abs().max() <= 1  # a value on the border may fall to either side


def test_images_that_are_not_finite_are_found() -> None:
    x = latents(0)
    quantizer = fit_quantizer(x, 4)
    x[2, 1, 3, 4], x[5, 0, 0, 0], x[6, 2, 11, 11] = torch.nan, torch.inf, -torch.inf
    _, _, finite = quantize_counting(x, quantizer)
    assert finite.tolist() == [True, True, False, True, True, False, False, True]


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), seed=st.integers(0, 999))
def test_numpy_and_torch_agree_to_the_bit(bits: int, seed: int) -> None:
    x = latents(seed)
    quantizer = fit_quantizer(x, bits)
    codes = quantize(x, quantizer)
    lo, step = (np.array(values, np.float32)[:, None, None] for values in (quantizer.lo, quantizer.step))
    assert np.array_equal(np.clip(np.floor((x.numpy() - lo) / step), 0, quantizer.levels - 1), codes.numpy())
    assert np.array_equal(quantizer.dequantize(codes.numpy()), dequantize(codes, quantizer).numpy())


@pytest.mark.parametrize("bits", range(1, 9))
def test_fit_is_near_the_optimum_for_gaussians(bits: int) -> None:
    # Minimum mean squared error of a uniform quantizer with 2^bits levels on a unit Gaussian:
    # Max, IRE Trans. Inf. Theory 6 (1960), table 2 (to 5 bits); Hui and Neuhoff (2001) beyond.
    optimum = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 7: 0.000304, 8: 0.0000877}[bits]
    x = torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert error(x, fit_quantizer(x, bits)) == pytest.approx(optimum, rel=0.03)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_fit_beats_every_scaled_full_range(bits: int) -> None:
    x = latents(1, 1) ** 3  # heavy tails
    best = error(x, fit_quantizer(x, bits))
    low, high = float(x.min()), float(x.max())
    for share in np.linspace(0.05, 1, 40):
        lo, width = low * share, (high - low) * share
        assert best <= error(x, Quantizer(bits, (lo,), (width / 2**bits,))) * 1.0201


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_fit_takes_the_widest_step_of_nearly_the_least_error(bits: int) -> None:
    x = torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    found = fit_quantizer(x, bits)
    middle = found.lo[0] + found.step[0] * found.levels / 2

    def scaled(factor: float) -> float:
        step = found.step[0] * factor
        return error(x, Quantizer(bits, (middle - step * found.levels / 2,), (step,)))

    least = min(scaled(factor) for factor in np.linspace(0.9, 1.05, 31))
    assert 1.012 * least <= scaled(1) <= 1.0201 * least
    assert scaled(1.01) > 1.02 * least


def test_constant_channels_come_back_exactly() -> None:
    x = torch.full((2, 2, 3, 3), 0.75)
    x[:, 1] = -4
    quantizer = fit_quantizer(x, 3)
    assert torch.equal(dequantize(quantize(x, quantizer), quantizer), x)


def test_quantizing_what_was_dequantized_is_the_identity() -> None:
    x = latents(3)
    quantizer = fit_quantizer(x, 5)
    codes = quantize(x, quantizer)
    assert torch.equal(quantize(dequantize(codes, quantizer), quantizer), codes)
    coarse = fit_quantizer(dequantize(codes, quantizer), 2)
    assert int(quantize(dequantize(codes, quantizer), coarse).max()) < 4


def test_bad_input() -> None:
    for bits in (0, 9, -1, True):
        with pytest.raises(UsageError, match="bits must be a whole number from 1 to 8"):
            fit_quantizer(latents(0), bits)
    with pytest.raises(CodecError, match="NaN"):
        fit_quantizer(torch.full((1, 1, 2, 2), float("nan")), 4)
