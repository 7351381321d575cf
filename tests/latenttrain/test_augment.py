import dataclasses
import json

import pytest
import torch

from latentprep.errors import UsageError
from latentprep.format import Quantizer
from latentprep.quantizing.scalar import dequantize
from latenttrain.augment import Augment, augment_codes, augment_planes, draw, moved, rectangle, symmetric_beta, tones
from latenttrain.data import one_hot
from latenttrain.nets import NetConfig, build_net
from latenttrain.stems import STEMS

NONE = Augment.none()
ALL = Augment(shift=2, zoom=0.2, mixup=0.4, cutmix=1.0, cutout=0.3, noise=True, channel_drop=0.1, tone=0.5, mirror=True)


def make_net(stem="affine", lo=(-2.0, -1.0), step=(0.25, 0.125)):
    torch.manual_seed(0)
    return build_net(NetConfig((2, 12, 9), 5, 4, lo, step, stem=stem))


OF_OTHERS = ("mirror_signs", "stage_drop")  # a part of mirror; only for tokens: test_tokens.py


def augment(net, codes, labels, config, generator):
    """A batch as the training step augments it: planes and targets."""
    random = draw(net, len(codes), config, codes.device, generator)
    planes = net.planes(augment_codes(net, codes, config, random))
    return augment_planes(net, planes, one_hot(labels, net.config.classes), config, random)


def make_batch(batch=64):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (batch, 2, 12, 9), dtype=torch.uint8, generator=generator)
    return codes, torch.arange(batch) % 5


def run(config, stem="affine", seed=2, **quantizer):
    net, (codes, labels) = make_net(stem, **quantizer), make_batch()
    planes, targets = augment(net, codes, labels, config, torch.Generator().manual_seed(seed))
    return net.planes(codes), planes, targets


def test_none_changes_nothing():
    plain, planes, targets = run(NONE)
    assert torch.equal(planes, plain)
    assert torch.equal(targets.argmax(1), make_batch()[1])


@pytest.mark.parametrize("stem", STEMS)
def test_all_together_give_planes_and_targets_that_sum_to_one(stem):
    plain, planes, targets = run(ALL, stem)
    assert planes.shape == plain.shape
    assert planes.isfinite().all()
    assert targets.shape == (64, 5)
    assert torch.allclose(targets.sum(1), torch.ones(64))
    assert (targets >= 0).all()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ALL) if field.name not in OF_OTHERS])
def test_each_alone_acts_and_follows_its_generator(name):
    config = dataclasses.replace(NONE, **{name: getattr(ALL, name)})
    plain, planes, _ = run(config)
    assert not torch.equal(planes, plain)
    assert torch.equal(planes, run(config)[1])
    assert not torch.equal(planes, run(config, seed=3)[1])


def test_tone_raises_and_tilts_all_planes_of_a_sample_alike():
    plain, planes, _ = run(dataclasses.replace(NONE, tone=2.0))
    added = planes - plain
    assert torch.allclose(added, added[:, :1, :, :1].expand_as(added), atol=1e-5)
    rows = added[:, 0, :, 0]
    assert torch.allclose(rows.diff(dim=1), rows.diff(dim=1)[:, :1].expand(-1, 11), atol=1e-5)  # a straight line
    assert 3 < rows.abs().max() <= 4  # 2 for the level and 2 for the slope
    assert torch.equal(tones(torch.tensor([[1.0, 1.0]]), 1), torch.tensor([[[1.0]]]))  # one row has no slope


def test_global_randomness_is_not_touched():
    net, batch = make_net(), make_batch()
    state = torch.get_rng_state()
    augment(net, *batch, ALL, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_shift_moves_whole_cells_and_mirrors_the_border():
    plain, planes, _ = run(dataclasses.replace(NONE, shift=2))
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), mode="reflect")
    moves = set()
    for sample in range(64):
        found = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(planes[sample], padded[sample, :, down : down + 12, right : right + 9])
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 15  # of 25, for 64 samples


def test_joint_codes_are_filtered_before_they_are_moved():
    """Each cell still shows what some cell showed before; with codes moved first they would have other neighbours."""
    torch.manual_seed(0)
    quantizer = {"lo": (-2.0, -1.0), "step": (0.25, 0.125)}
    net = build_net(NetConfig((2, 12, 9), 5, 4, **quantizer, filter=tuple(torch.randn(36).tolist())))
    codes, labels = make_batch(8)
    still = net.planes(codes).flatten(2).transpose(1, 2)
    planes, _ = augment(
        net, codes, labels, dataclasses.replace(NONE, shift=2, zoom=0.2), torch.Generator().manual_seed(2)
    )
    assert not torch.equal(planes, net.planes(codes))
    shown = planes.flatten(2).transpose(1, 2)
    nearest = torch.cdist(shown.double(), still.double()).min(2).values
    assert nearest.max() < 1e-6


def test_joint_codes_are_mirrored_as_the_latents_that_they_restore():
    torch.manual_seed(0)
    quantizer = Quantizer(4, (-2.0, -1.03), (0.25, 0.125), tuple(torch.randn(36).tolist()))
    statistics = {"mean": (7.0, 8.5), "std": (3.0, 2.0)}
    net = build_net(NetConfig((2, 12, 9), 5, 4, quantizer.lo, quantizer.step, filter=quantizer.filter, **statistics))
    codes, labels = make_batch()
    config = dataclasses.replace(NONE, mirror=True, mirror_signs=(1, -1))
    planes, _ = augment(net, codes, labels, config, torch.Generator().manual_seed(2))
    lo, step, mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (quantizer.lo, quantizer.step, *statistics.values())
    )  # fmt: skip
    latents = dequantize(codes, quantizer)
    mirror = latents.flip(-1) * torch.tensor([1.0, -1.0])[:, None, None]
    plain, wanted = ((((some - lo) / step - 0.5) - mean) / std for some in (latents, mirror))
    flipped = [torch.allclose(planes[i], wanted[i], atol=1e-4) for i in range(64)]
    kept = [torch.allclose(planes[i], plain[i], atol=1e-4) for i in range(64)]
    assert all(one != other for one, other in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48


def test_shift_beyond_the_grid_still_works():
    plain, planes, _ = run(dataclasses.replace(NONE, shift=40))
    assert planes.shape == plain.shape


def test_mirror_flips_half_and_negates_as_told():
    """Exactly so on latents, though the code at which an uneven range changes sign is not whole."""
    plain, planes, _ = run(dataclasses.replace(NONE, mirror=True, mirror_signs=(1, -1)), lo=(-2.0, -1.03))
    wanted = plain.flip(-1)
    scale = make_net().stem.scale[1] / 0.125  # planes a unit of latent; the centre of the range is at plane 0
    centre = -1.03 + 8 * 0.125
    wanted[:, 1] = -wanted[:, 1] - 2 * centre * scale
    flipped = [torch.allclose(planes[i], wanted[i], atol=1e-5) for i in range(64)]
    kept = [torch.equal(planes[i], plain[i]) for i in range(64)]
    assert all(one != other for one, other in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48


def test_noise_stays_within_the_step():
    plain, planes, _ = run(dataclasses.replace(NONE, noise=True))
    moved = (planes - plain).abs() / make_net().stem.scale
    assert 0.45 < moved.max() <= 0.5 + 1e-4
    assert moved.mean() == pytest.approx(0.25, abs=0.02)


def test_mixup_mixes_planes_as_it_mixes_targets():
    plain, planes, targets = run(dataclasses.replace(NONE, mixup=1.0))
    own = targets[torch.arange(64), make_batch()[1]][:, None, None, None]
    assert torch.allclose(planes, own * plain + (1 - own) * plain.roll(1, 0), atol=1e-5)
    assert 0.3 < own.mean() < 0.7


def test_cutmix_weighs_targets_by_the_area_kept():
    plain, planes, targets = run(dataclasses.replace(NONE, cutmix=1.0))
    own = targets[torch.arange(64), make_batch()[1]]
    foreign = (planes != plain).any(1)
    assert torch.equal(torch.where(foreign[:, None], plain.roll(1, 0), plain), planes)
    # cells that are alike in both samples do not count as foreign: one in 256
    assert torch.allclose(1 - foreign.float().mean((1, 2)), own, atol=0.05)


def test_cutout_erases_a_rectangle():
    plain, planes, _ = run(dataclasses.replace(NONE, cutout=0.5))
    erased = (planes == 0).all(1)
    assert torch.equal(planes[~erased[:, None].expand_as(planes)], plain[~erased[:, None].expand_as(plain)])
    assert (erased.sum((1, 2)) <= 7 * 5).all()
    assert (erased.sum((1, 2)) >= 2 * 2).all()


def test_channel_drop_zeroes_whole_planes():
    _, planes, _ = run(dataclasses.replace(NONE, channel_drop=0.25))
    dropped = (planes == 0).all(-1).all(-1)
    assert 0.1 < dropped.float().mean() < 0.4
    assert not (planes[~dropped] == 0).any()


def test_gradients_reach_a_stem_that_learns():
    net = make_net("embedding")
    augment(net, *make_batch(), ALL, torch.Generator().manual_seed(0))[0].sum().backward()
    assert net.stem.vectors.grad.abs().sum() > 0


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_symmetric_beta_has_the_right_moments(alpha):
    drawn = symmetric_beta(torch.rand(2, 200_000, generator=torch.Generator().manual_seed(0)), alpha).double()
    exact = torch.distributions.Beta(alpha, alpha).sample((200_000,)).double()
    for power in (1, 2, 4):
        assert drawn.pow(power).mean() == pytest.approx(exact.pow(power).mean().item(), abs=0.005)


def test_config_survives_json():
    config = dataclasses.replace(ALL, mirror_signs=(1, -1))
    assert Augment.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert Augment.from_json({}) == Augment()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shift": -1}, "shift must be a number from 0 to 64"),
        ({"mixup": float("nan")}, "mixup must be a number of 0 or more"),
        ({"cutout": 2}, "cutout must be a number from 0 to 1"),
        ({"mirror_signs": [2, 1]}, "mirror_signs must be 1 or -1"),
        ({"mixupp": 1}, "mixup"),
    ],
)
def test_bad_settings_are_named(fields, words):
    with pytest.raises(UsageError, match=words):
        Augment.from_json(fields)


def test_signs_must_fit_the_channels():
    with pytest.raises(UsageError, match="3 entries for 2 channels"):
        run(dataclasses.replace(NONE, mirror=True, mirror_signs=(1, -1, 1)))


def test_on_a_line_a_stretch_of_time_is_erased_and_moved() -> None:
    planes = torch.ones(64, 3, 1, 40)
    inside = rectangle(planes, torch.rand(2, 64), torch.full((64,), 0.4))
    assert inside.shape == (64, 1, 40)
    assert (inside.sum((1, 2)) >= 8).all() and (inside.sum((1, 2)) <= 17).all()
    codes = torch.arange(40).repeat(2, 1)[:, None, None]
    there = moved(codes, torch.tensor([[3, -2], [3, 0]]), torch.ones(2, 2))
    assert there[0, 0, 0, 3:].tolist() == list(range(37)) and torch.equal(there[1], codes[1])
