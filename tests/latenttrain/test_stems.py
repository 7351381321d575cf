import dataclasses

import numpy as np
import pytest
import torch

from latentprep.errors import UsageError
from latentprep.format import Quantizer
from latentprep.quantizing.scalar import code_statistics, dequantize, fit_quantizer, quantize
from latenttrain.nets import NetConfig, build_net
from latenttrain.stems import STEMS


def all_codes(channels, bits):
    """Every level in each channel, in an order of its own: u8 [1,C,16,16]"""
    generator = torch.Generator().manual_seed(0)
    levels = (torch.arange(256) % 2**bits).to(torch.uint8)
    return torch.stack([levels[torch.randperm(256, generator=generator)] for _ in range(channels)]).view(1, -1, 16, 16)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_affine_planes_are_normalized_latents(bits):
    """Whatever the quantizer's range: (lo + (codes + 0.5) * step - mean) / std."""
    torch.manual_seed(0)
    latents = torch.randn(3, 100_000) * torch.tensor([0.5, 1, 7])[:, None] + torch.tensor([-3.0, 0, 40])[:, None]
    mean, std = latents.mean(1), latents.std(1)
    reach = {1: 1.596, 2: 1.991, 4: 2.681, 8: 3.94}[bits] * std  # Max 1960: the best range for a normal distribution
    lo, step = mean - reach, 2 * reach / 2**bits
    net = build_net(NetConfig((3, 16, 16), 10, bits, tuple(lo.tolist()), tuple(step.tolist())))
    codes = all_codes(3, bits)
    expected = (lo[:, None, None] + (codes + 0.5) * step[:, None, None] - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(net.planes(codes), expected, rtol=0.04, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_affine_planes_of_joint_codes_are_normalized_latents(bits):
    torch.manual_seed(0)
    lo, step, weights = (-1.0, 3.0), (0.5, 2.0), torch.randn(36).tolist()
    quantizer = Quantizer(bits, lo, step, tuple(weights))
    net = build_net(NetConfig((2, 16, 16), 10, bits, lo, step, filter=quantizer.filter))
    codes, steps = all_codes(2, bits), torch.tensor(step)[:, None, None]
    middle = torch.tensor(lo)[:, None, None] + 2**bits / 2 * steps
    expected = (dequantize(codes, quantizer) - middle) / steps * net.stem.scale
    assert torch.allclose(net.planes(codes), expected, atol=1e-4)
    assert "kernel" not in " ".join(net.state_dict())  # it is configuration, not weights
    with pytest.raises(UsageError, match="filter must be 36 finite numbers"):
        NetConfig((2, 16, 16), 10, bits, lo, step, filter=(1.0,))


@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("name", STEMS)
def test_stems_keep_all_information(name, bits):
    """As many different plane vectors as there are codes, and of about unit scale."""
    torch.manual_seed(0)
    planes = STEMS[name](1, bits)(torch.arange(2**bits, dtype=torch.uint8).view(1, 1, 1, -1))
    assert planes.dtype == torch.float32
    assert len(planes[0, :, 0].T.unique(dim=0)) == 2**bits
    assert 0.1 < planes.abs().mean() < 4


@pytest.mark.parametrize("name", STEMS)
def test_stems_treat_cells_apart(name):
    stem, codes = STEMS[name](2, 3), all_codes(2, 3)
    assert torch.equal(stem(codes).flip(-1), stem(codes.flip(-1)))
    assert stem(codes).shape == (1, stem.planes, 16, 16)


def test_bitplanes_spell_the_code():
    planes = STEMS["bitplane"](1, 3)(torch.tensor([6], dtype=torch.uint8).view(1, 1, 1, 1))
    assert planes.flatten().tolist() == [1, 1, -1]


def test_ordinal_is_a_thermometer():
    planes = STEMS["ordinal"](1, 2)(torch.tensor([0, 1, 2, 3], dtype=torch.uint8).view(4, 1, 1, 1))
    assert planes.flatten(1).tolist() == [[-1, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1]]


def test_ordinal_of_many_levels_is_a_piecewise_linear_thermometer():
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    planes = STEMS["ordinal"](1, 8)(codes)
    assert planes.shape[1] == 15
    assert torch.allclose((planes.flatten(1).sum(1) + 15) / 30 * 255, codes.flatten().float(), atol=1e-3)


@pytest.mark.parametrize("name", STEMS)
def test_noise_within_a_step_stays_near_its_code(name):
    torch.manual_seed(0)
    stem, codes = STEMS[name](2, 4), all_codes(2, 4)
    noisy = stem(codes + torch.rand(codes.shape) - 0.5)
    if name in ("embedding", "bitplane"):
        assert torch.equal(noisy, stem(codes))
    else:
        assert 0 < (noisy - stem(codes)).abs().mean() < 0.2


def distributed(name, n=100_000):
    """f32 [1,1,n/100,100] of a distribution of unit scale, off centre."""
    random = np.random.default_rng(0)
    draws = {
        "normal": random.normal(size=n),
        "laplace": random.laplace(size=n),
        "student t3": random.standard_t(3, size=n),
        "uniform": random.uniform(-1, 1, size=n),
        "1% outliers": random.normal(size=n) * np.where(random.random(n) < 0.01, 30, 1),
    }
    return torch.from_numpy(draws[name] * 3 + 5).float().view(1, 1, -1, 100)


DISTRIBUTIONS = ["normal", "laplace", "student t3", "uniform", "1% outliers"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", STEMS)
def test_planes_are_of_unit_scale_whatever_the_distribution(name, bits):
    """Of an own distribution in each channel: the planes' deviation, or, of -1 and 1, their root mean square. At 1 and
    2 bits outliers leave a channel nothing that could be enlarged."""
    torch.manual_seed(0)
    latents = torch.cat([distributed(kind) for kind in DISTRIBUTIONS[: 5 if bits > 2 else 4]], 1)
    quantizer = fit_quantizer(latents, bits)
    codes = quantize(latents, quantizer)
    counted = code_statistics(codes, quantizer)
    planes = STEMS[name](len(counted.std), bits, counted.mean, counted.std)(codes).transpose(0, 1).flatten(1)
    scale = planes.square().mean(1).sqrt() if name in ("bitplane", "ordinal") else planes.std(1)
    scale = scale if name == "embedding" else scale.view(len(counted.std), -1).mean(1)
    assert scale.min() > 0.8 and scale.max() < 1.25, scale


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_affine_planes_of_joint_codes_have_unit_scale_too(bits):
    torch.manual_seed(0)
    latents = torch.randn(60, 2, 12, 12).cumsum(-1) * torch.tensor([1.0, 9])[:, None, None]
    quantizer = fit_quantizer(latents, bits, joint=True)
    codes = quantize(latents, quantizer)
    counted = code_statistics(codes, quantizer)
    config = NetConfig((2, 12, 12), 10, bits, quantizer.lo, quantizer.step, filter=quantizer.filter)
    planes = build_net(dataclasses.replace(config, mean=counted.mean, std=counted.std)).planes(codes)
    assert torch.allclose(planes.mean((0, 2, 3)), torch.zeros(2), atol=1e-3)
    assert torch.allclose(planes.std((0, 2, 3)), torch.ones(2), atol=1e-3)
    steps, lo = (torch.tensor(v)[:, None, None] for v in (quantizer.step, quantizer.lo))
    mean, std = (torch.tensor(v)[:, None, None] for v in (counted.mean, counted.std))
    expected = ((dequantize(codes, quantizer) - lo) / steps - 0.5 - mean) / std
    assert torch.allclose(planes, expected, atol=1e-3)


def test_a_channel_that_hardly_varies_is_not_enlarged():
    planes = STEMS["affine"](2, 4, (8.0, 8.0), (0.0, 2.0))(torch.tensor([[[[9]], [[9]]]], dtype=torch.uint8))
    assert planes.flatten().tolist() == pytest.approx([2 * (1.25 + 0.34 * 4) / 16, 0.5])


def test_statistics_that_do_not_fit_are_refused():
    config = NetConfig((2, 8, 8), 10, 4, (0.0,) * 2, (1.0,) * 2)
    for wrong in ({"mean": (1.0,), "std": (1.0,)}, {"mean": (1.0, 1.0)}, {"mean": (1.0, 1.0), "std": (1.0, -1.0)}):
        with pytest.raises(UsageError, match="mean|std"):
            dataclasses.replace(config, **wrong)


def allocated_codes(each, size=16):
    """u8 [1,C,size,size] of every level in each channel, where channels have these bits."""
    generator = torch.Generator().manual_seed(0)
    channels = [(torch.arange(size**2) % 2**b)[torch.randperm(size**2, generator=generator)] for b in each]
    return torch.stack(channels).to(torch.uint8).view(1, -1, size, size)


@pytest.mark.parametrize("name", STEMS)
def test_channels_may_differ_in_bits(name):
    """All information is kept, as with equal bits, and a channel without bits costs no plane but the affine one's."""
    torch.manual_seed(0)
    each = (5, 2, 0, 1)
    stem, codes = STEMS[name](4, each), allocated_codes(each)
    planes = stem(codes)
    assert planes.shape[1] == stem.planes == {"affine": 4, "embedding": 16, "bitplane": 8, "ordinal": 15 + 3 + 1}[name]
    for channel, bits in enumerate(each):
        changed = codes.clone()
        changed[:, channel] = torch.arange(256).view(1, 16, 16) % 2**bits
        different = (stem(changed) != planes).any(1)
        assert torch.equal(different, (changed != codes).any(1)), (name, channel)
    assert torch.isfinite(planes).all()
    loud = stem(codes.float() + 100)  # of one channel never read as those of another
    assert torch.equal(loud[:, :, 0, 0], loud[:, :, 1, 1]) or name in ("affine", "ordinal")


@pytest.mark.parametrize("name", STEMS)
def test_the_same_bits_for_each_channel_are_equal_bits(name):
    torch.manual_seed(0)
    one = STEMS[name](3, 3)
    torch.manual_seed(0)
    other = STEMS[name](3, (3, 3, 3))
    codes = all_codes(3, 3)
    assert torch.equal(one(codes), other(codes))


def test_a_networks_configuration_says_bits_a_channel_only_where_they_differ():
    equal = NetConfig((2, 8, 8), 10, 4, (0.0,) * 2, (1.0,) * 2)
    assert "channel_bits" not in equal.to_json()  # as earlier versions read it
    assert NetConfig.from_json(equal.to_json()) == equal
    unequal = dataclasses.replace(equal, channel_bits=(4, 0))
    assert unequal.to_json()["channel_bits"] == [4, 0]
    assert NetConfig.from_json(unequal.to_json()) == unequal
    for wrong in ((4,), (5, 4), (3, 3), (4, -1)):
        with pytest.raises(UsageError, match="channel_bits must be 2 numbers from 0 to 4"):
            dataclasses.replace(equal, channel_bits=wrong)
