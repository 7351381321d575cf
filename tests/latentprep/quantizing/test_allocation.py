"""Bits for each channel by what they are worth: how they are chosen, stored and read."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import latentprep
from latentprep.errors import DatasetError, UsageError
from latentprep.format import LatentDataset, Manifest, Quantizer
from latentprep.format.packing import pack, pack_views, packed_bytes, unpack_views, view_bytes
from latentprep.quantizing.allocation import allocate, fit_allocated
from latentprep.quantizing.scalar import code_statistics, dequantize, fit_quantizer, quantize, quantize_counting
from latenttrain import packed
from pictures import make_folder

UNEQUAL = Quantizer(3, (-4.0, -1.0, 0.5, -1.0), (1.0, 0.5, 1.0, 2.0), channel_bits=(3, 2, 0, 1))


def laplace(*deviations: float, images: int = 40) -> torch.Tensor:
    """f32 [n,C,16,16] of sparse channels with these deviations, off centre."""
    random = np.random.default_rng(0)
    scales = np.array(deviations)[:, None, None] / np.sqrt(2)
    return torch.from_numpy(random.laplace(3, scales, (images, len(deviations), 16, 16))).float()


def error(latents: torch.Tensor, quantizer: Quantizer) -> float:
    return float((dequantize(quantize(latents, quantizer), quantizer) - latents).square().mean())


@pytest.mark.parametrize("bits", [0.5, 1, 1.5, 2, 3])
def test_no_other_allocation_of_as_many_bits_is_better(bits: float) -> None:
    latents = laplace(8, 3, 1, 0.3)
    found = fit_allocated(latents, bits)
    assert sum(found.channel_bits) <= 4 * bits
    others = [each for each in product(range(7), repeat=4) if sum(each) == int(4 * bits) and max(each)]
    errors = {each: [] for each in others}
    for channel in range(4):
        own = latents[:, channel : channel + 1]
        at = [float(own.var())] + [error(own, fit_quantizer(own, b)) for b in range(1, 7)]
        for each in others:
            errors[each].append(at[each[channel]])
    assert error(latents, found) <= 1.02 * min(map(sum, errors.values())) / 4
    if bits == int(bits):
        assert error(latents, found) < 0.5 * error(latents, fit_quantizer(latents, int(bits)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_channels_that_are_alike_get_the_same_bits(bits: int) -> None:
    latents = torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert fit_allocated(latents, bits) == fit_quantizer(latents, bits)


def test_at_high_rates_steps_grow_with_the_power_of_the_deviation_that_is_asked_for() -> None:
    latents = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents *= torch.tensor([16.0, 4, 1])[:, None, None]
    assert [allocate(latents, 5, exponent) for exponent in (0, 0.5, 1)] == [[7, 5, 3], [6, 5, 4], [5, 5, 5]]


def test_constant_channels_get_no_bits() -> None:
    latents = laplace(2, 1)
    latents[:, 1] = 0.75
    found = fit_allocated(latents, 2)
    assert found.channel_bits == (4, 0)
    assert (dequantize(quantize(latents, found), found)[:, 1] == 0.75).all()
    assert fit_allocated(torch.full((2, 3, 4, 4), 0.75), 2).channel_bits == (1, 0, 0)


def test_numbers_of_bits_that_cannot_be_met_are_refused() -> None:
    for bits in (0.2, 8.5, float("nan"), "2"):
        with pytest.raises(UsageError, match=r"bits must be a number from 0.25 to 8"):
            fit_allocated(laplace(1, 2), bits)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"less than one bit for 3 channels together; use bits=0.34 or more"):
        fit_allocated(laplace(1, 2, 3), 0.25)
    assert sum(fit_allocated(laplace(1, 2, 3), 0.34).channel_bits) == 1


def test_a_channel_without_bits_stands_for_its_mean() -> None:
    latents = laplace(8, 1)
    quantizer = fit_quantizer(latents, [3, 0])
    codes, saturated, finite = quantize_counting(latents, quantizer)
    assert torch.equal(codes, quantize(latents, quantizer)) and finite.all()
    assert codes[:, 0].max() == 7 and not codes[:, 1].any()
    decoded = dequantize(codes, quantizer)[:, 1]
    assert torch.allclose(decoded, latents[:, 1].mean().expand_as(decoded), atol=1e-5)
    assert np.allclose(quantizer.dequantize(codes.numpy()), dequantize(codes, quantizer).numpy())
    counted = code_statistics(codes, quantizer)
    assert counted.std[0] > 0.5 and (counted.mean[1], counted.std[1]) == (0, 0)
    lo, step = (torch.tensor(values)[:, None, None] for values in (quantizer.lo, quantizer.step))
    levels = torch.tensor(quantizer.channel_levels)[:, None, None]
    outside = (latents < lo) | (latents > lo + step * levels)
    assert saturated.tolist() == pytest.approx(outside.sum((0, 2, 3)).tolist(), abs=2)


def test_quantizers_say_their_bits_only_where_they_differ() -> None:
    equal = Quantizer(2, (0.0, 0.0), (1.0, 1.0))
    assert equal == Quantizer(2, (0.0, 0.0), (1.0, 1.0), channel_bits=(2, 2))
    assert "channel_bits" not in equal.to_json() and (equal.equal_bits, equal.mean_bits) == (True, 2)
    assert UNEQUAL.to_json()["channel_bits"] == [3, 2, 0, 1]
    assert (UNEQUAL.equal_bits, UNEQUAL.mean_bits, UNEQUAL.channel_levels) == (False, 1.5, (8, 4, 1, 2))
    for wrong in ((3, 2, 0), (3, 2, -1, 1), (2, 2, 2, 2), (4, 0, 0, 0)):
        with pytest.raises(DatasetError, match="channel_bits must be 4 numbers from 0 to 3"):
            replace(UNEQUAL, channel_bits=wrong)
    with pytest.raises(DatasetError, match="filter must have the same bits"):
        Quantizer(2, (0.0, 0.0), (1.0, 1.0), (0.0,) * 36, (2, 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 1 << 20),
)
def test_unpacking_views_undoes_packing_them(each: list[int], height: int, width: int, seed: int) -> None:
    latent = (len(each), height, width)
    quantizer = Quantizer(max(each), (0.0,) * len(each), (1.0,) * len(each), channel_bits=tuple(each))
    levels = np.array(quantizer.channel_levels)[:, None, None]
    codes = np.random.default_rng(seed).integers(0, levels, (2, 3, *latent)).astype(np.uint8)
    found = pack_views(codes, quantizer)
    assert found.shape == (2, 3, view_bytes(latent, quantizer))
    assert np.array_equal(unpack_views(found, quantizer, latent), codes)
    with_torch = packed.pack_views(torch.from_numpy(codes), quantizer)
    assert np.array_equal(with_torch.numpy(), found)
    assert np.array_equal(packed.unpack_views(with_torch, quantizer, latent).numpy(), codes)
    most = -(-sum(each) // len(each))  # never more than equal bits
    assert found.shape[-1] <= packed_bytes(codes[0, 0].size, most)
    if quantizer.equal_bits:
        assert np.array_equal(found, pack(codes.reshape(2, 3, -1), quantizer.bits))


def test_planes_of_bits_lie_as_specified() -> None:
    """Bit 0 of channels 0, 1 and 3, then bit 1 of channels 0 and 1, then bit 2 of channel 0; the first lowest."""
    codes = np.array([5, 2, 0, 1], np.uint8).reshape(1, 4, 1, 1)
    assert pack_views(codes, UNEQUAL).tolist() == [[0b1_10_101]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `images`, and `half`: its codes at 0.5 bits on average."""
    root = tmp_path_factory.mktemp("allocated")
    images = make_folder(root / "images", train=12, val=4)
    latentprep.encode(images, codec="dct", size=64, bits=0.5, equal_bits=False, shard_rows=16, out=root / "half")
    return root


def test_a_dataset_of_half_a_bit(made: Path) -> None:
    dataset = latentprep.open(made / "half")
    manifest, quantizer = dataset.manifest, dataset.quantizer
    assert sum(quantizer.channel_bits) <= 8 and 0 in quantizer.channel_bits
    assert json.loads((made / "half" / "manifest.json").read_bytes())["mean_bits"] == 0.5
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.plan().manifest(quantizer, manifest.statistics, manifest.compression) == manifest
    codes = dataset.load("train").codes
    assert (codes.max((0, 1, 3, 4)) < quantizer.channel_levels).all()
    facts = latentprep.info(made / "half")
    assert all(bits or not share for bits, share in zip(facts.channel_bits, facts.saturation, strict=True))
    assert any(facts.saturation)
    assert (facts.bits, facts.channel_bits) == (quantizer.mean_bits, quantizer.channel_bits)
    assert not {poor.channel for poor in facts.poor} & set(np.flatnonzero(np.array(quantizer.channel_bits) == 0))
    assert latentprep.verify(made / "half", deep=True, source=made / "images").ok


@pytest.mark.parametrize("store", ["wds", "parquet"])
def test_every_store_holds_it(made: Path, tmp_path: Path, store: str) -> None:
    if store == "parquet":
        pytest.importorskip("pyarrow")
    latentprep.convert(made / "half", out=tmp_path / store, store=store)
    there, here = (latentprep.open(path).load("train") for path in (made / "half", tmp_path / store))
    assert np.array_equal(there.codes, here.codes)
    latentprep.convert(tmp_path / store, out=tmp_path / "back", store="zarr")
    name = "train/codes/c/0/0/0/0/0"
    assert (tmp_path / "back" / name).read_bytes() == (made / "half" / name).read_bytes()


def test_codes_too_large_for_their_channel_are_damage(made: Path) -> None:
    dataset = LatentDataset(latentprep.open(made / "half").root)
    quantizer = dataset.quantizer
    codes, labels = np.zeros((1, 1, *dataset.manifest.latent), np.uint8), np.zeros(1, np.int32)
    for channel, (bits, levels) in enumerate(zip(quantizer.channel_bits, quantizer.channel_levels, strict=True)):
        codes[0, 0, channel, 0, 0] = levels - 1
        dataset._check_values(codes, labels, "shard train 0")
        codes[0, 0, channel, 0, 0] = levels
        with pytest.raises(DatasetError, match=f"holds the code {levels}, too large for {bits} bits"):
            dataset._check_values(codes, labels, "shard train 0")
        codes[0, 0, channel, 0, 0] = 0


def test_resuming_reusing_and_refusals(made: Path, tmp_path: Path) -> None:
    images = made / "images"
    asked = {"codec": "dct", "size": 64, "shard_rows": 16}
    again = latentprep.encode(images, bits=0.5, equal_bits=False, out=made / "half", **asked)
    assert (again.encoded, again.bits) == (0, latentprep.open(made / "half").quantizer.mean_bits)
    taken = latentprep.encode(images, bits=0.5, reuse=made / "half", out=tmp_path / "taken", **asked)
    assert taken.reused == 32
    with pytest.raises(DatasetError, match="bits is 0.5, but 1 was requested"):
        latentprep.encode(images, bits=1, equal_bits=False, out=made / "half", **asked)
    latentprep.encode(images, bits=1, equal_bits=True, out=tmp_path / "equal", **asked)
    with pytest.raises(DatasetError, match="equal_bits is True, but False was requested; use equal_bits=True"):
        latentprep.encode(images, bits=1, equal_bits=False, out=tmp_path / "equal", **asked)
    old = latentprep.encode(images, bits=1, reuse=tmp_path / "equal", out=tmp_path / "more", **asked)
    assert old.reused == 32 and latentprep.open(tmp_path / "more").quantizer.equal_bits
    for name in ("equal_bits", "joint"):
        with pytest.raises(UsageError, match=rf"{name}=True gives every channel the same whole number of bits"):
            latentprep.encode(images, bits=1.5, out=tmp_path / "x", **asked, **{name: True})
    with pytest.raises(UsageError, match="rate=1 cannot be combined with equal_bits=True"):
        latentprep.encode(images, rate=1, equal_bits=True, out=tmp_path / "x", **asked)
    assert not (tmp_path / "x").exists()


def test_requantizing_allocates_from_codes(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "eight"
    latentprep.encode(made / "images", codec="dct", size=64, bits=8, shard_rows=16, out=source)
    latentprep.requantize(source, bits=0.5, equal_bits=False, out=tmp_path / "half")
    few, direct = (latentprep.open(path) for path in (tmp_path / "half", made / "half"))
    assert few.quantizer.channel_bits == direct.quantizer.channel_bits
    assert few.manifest.mean_bits == 0.5
    assert np.mean(few.load("train").codes != direct.load("train").codes) < 0.01
    fewer = latentprep.requantize(few, bits=0.25, equal_bits=False, out=tmp_path / "quarter")
    assert fewer.bits <= 0.25
    assert latentprep.verify(tmp_path / "quarter", deep=True).ok
    with pytest.raises(UsageError, match="has 0.5 bits per value; requantizing to 1 would gain nothing"):
        latentprep.requantize(few, bits=1, out=tmp_path / "x")
    with pytest.raises(UsageError, match="equal_bits=True gives every channel the same whole"):
        latentprep.requantize(source, bits=1.5, equal_bits=True, out=tmp_path / "x")
