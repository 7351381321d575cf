"""A batch's gradient comes to the same bits, whoever computes which of its micro-batches."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import latenttrain
from latentprep.device import one_thread_each
from latenttrain import train
from latenttrain.augment import Augment, draw, partners
from latenttrain.config import RunConfig, versions
from latenttrain.data import Split
from latenttrain.microbatch import Learner, Node, PairwiseSum, micro_batches, nodes_of
from latenttrain.nets import ARCHITECTURES, DROPOUT, BatchNorm, NetConfig, build_net
from latenttrain.ranks import ALONE, Ranks
from latenttrain.recipe import make_recipe
from latenttrain.stems import STEMS
from latenttrain.train import make_learner, start_state

CPU, GRID = torch.device("cpu"), 8
MIXED = Augment(mixup=0.2, cutmix=0.3, channel_drop=0.1)
THREE = make_recipe({"norm_batch": 8})


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """bfloat16 rounds so much that two orders of the same work can hardly be compared."""
    monkeypatch.setattr(train, "in_bfloat16", lambda *_: False)


def split_of(samples):
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (samples, 1, 3, GRID, GRID), dtype=torch.uint8, generator=draws)
    return Split(codes, torch.randint(0, 4, (samples,), generator=draws))


def config_of(augment=MIXED, recipe=THREE, **net):
    quantizer = {"bits": 2, "lo": (-2.0,) * 3, "step": (1.0,) * 3}
    return RunConfig(NetConfig((3, GRID, GRID), 4, **quantizer, width=0.25, **net), recipe, augment, {}, versions())


def prepared(config, samples):
    torch.manual_seed(0)
    state, split = start_state(config, CPU), split_of(samples)
    return state, config, split, draw(state.net, samples, config.augment, CPU, torch.Generator().manual_seed(1))


def learned(state, config, split, random, *, threads, ranks=ALONE):
    """Loss, gradients and running statistics after one batch of all samples; threads: None as on a GPU."""
    learner = make_learner(state, config, split, ThreadPoolExecutor(threads) if threads else None)
    learner.ranks = ranks
    loss = learner.learn(torch.arange(len(split)), split.labels, random)
    return [loss, *(parameter.grad for parameter in state.net.parameters()), *state.net.buffers()]


def same(first, second):
    return all(map(torch.equal, first, second))


@given(st.integers(1, 5000), st.integers(2, 300))
def test_micro_batches_are_as_few_as_can_be_and_none_is_of_one_sample(samples, norm_batch):
    sizes = micro_batches(samples, norm_batch)
    assert sum(sizes) == samples
    assert min(sizes) >= min(2, samples)
    alone = norm_batch == 2 and samples % 2  # the only sample left over comes to two others
    assert max(sizes) <= norm_batch + alone
    assert len(sizes) == max(1, -(-samples // norm_batch) - alone)


@settings(deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=7), st.integers(0, 1 << 30))
def test_a_sum_has_the_same_bits_whoever_adds_which_part(count, cuts, seed):
    values = (
        torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
        * 10 ** torch.linspace(-6, 6, count)[:, None]
    )
    alone = PairwiseSum()
    for number, value in enumerate(values):
        alone.add(Node(number, 1, value.clone()))
    edges = [0, *sorted(min(place, count) for place in cuts), count]
    together = PairwiseSum()
    for start, stop in pairwise(edges):
        own = PairwiseSum()
        for number in range(start, stop):
            own.add(Node(number, 1, values[number].clone()))
        assert [(node.start, node.size) for node in own.nodes] == nodes_of(range(start, stop))
        assert len(own.nodes) <= 2 * count.bit_length()
        for node in own.nodes:
            together.add(node)
    total = alone.total()
    assert torch.equal(together.total(), total)
    torch.testing.assert_close(total.double(), values.double().sum(0), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_threads_change_no_bit_and_one_pass_over_all_parts_is_the_same_but_for_rounding(arch, stem):
    config = config_of(arch=arch, stem=stem)
    one, three, whole = (learned(*prepared(config, 29), threads=threads) for threads in (1, 3, None))
    assert same(one, three)
    if arch == "mobilenetv2":  # BatchNorm over eight values blows rounding up in its gradients
        one, whole = one[:1], whole[:1]
    torch.testing.assert_close(whole, one, rtol=2e-3, atol=2e-5)
    other = learned(*prepared(replace(config, recipe=make_recipe({"norm_batch": 32})), 29), threads=1)
    assert not torch.allclose(other[0], one[0], rtol=1e-3, atol=0)


@dataclass(frozen=True)
class Together(Ranks):
    """Ranks that are threads of this process, which wait for each other where ranks do."""

    barrier: threading.Barrier = None
    told: dict = None

    def gathered(self, values):
        self.told[self.rank] = values
        self.barrier.wait()
        return torch.stack([self.told[rank] for rank in range(self.world)])


@pytest.mark.parametrize("threads", [1, None])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_change_no_bit_on_a_cpu_and_nothing_but_rounding_on_a_gpu(world, threads):
    config, barrier, told = config_of(), threading.Barrier(world), {}
    work = [
        partial(
            learned, *prepared(config, 30), threads=threads, ranks=Together(rank, world, barrier=barrier, told=told)
        )
        for rank in range(world)
    ]
    with ThreadPoolExecutor(world) as pool:
        results = list(pool.map(lambda one: one(), work))
    assert all(same(result, results[0]) for result in results)
    alone = learned(*prepared(config, 30), threads=2)
    torch.testing.assert_close(
        results[0], alone, **({"rtol": 0, "atol": 0} if threads else {"rtol": 2e-3, "atol": 2e-5})
    )


def test_a_part_has_the_statistics_of_batchnorm_over_it_alone():
    x = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    ours, plain = BatchNorm(5), nn.BatchNorm2d(5)
    ours.parts = (3, 2, 2)
    expected = torch.cat([plain(part) for part in x.split((3, 2, 2))])
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    means, variances = zip(*((part.mean((0, 2, 3)), part.var((0, 2, 3))) for part in x.split((3, 2, 2))), strict=True)
    weighted = [sum(n * value for n, value in zip((3, 2, 2), values, strict=True)) / 7 for values in (means, variances)]
    torch.testing.assert_close([ours.running_mean, ours.running_var], [0.1 * weighted[0], 0.9 + 0.1 * weighted[1]])
    assert torch.equal(ours.eval()(x), torch.nn.functional.batch_norm(x, ours.running_mean, ours.running_var, eps=1e-5))


def test_partners_are_of_the_same_part_and_nobody_is_left_out():
    assert partners(torch.arange(7), (3, 2, 2)).tolist() == [2, 0, 1, 4, 3, 6, 5]
    assert partners(torch.arange(4), ()).tolist() == [3, 0, 1, 2]


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    net = build_net(config_of(arch="mobilenetv2").net)
    seen = []
    net.body[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    uniforms = torch.rand(64, net.features, generator=torch.Generator().manual_seed(0))
    for dropout in (None, uniforms):
        net.eval().logits(torch.rand(64, 3, GRID, GRID), dropout)
    kept = uniforms >= DROPOUT["mobilenetv2"]
    assert abs(kept.float().mean() - 0.8) < 0.01
    torch.testing.assert_close(seen[1][~kept], torch.zeros(int((~kept).sum())))
    assert "dropout" in draw(net, 3, Augment(), CPU, None)
    assert "dropout" not in draw(build_net(config_of().net), 3, Augment(), CPU, None)


def test_a_run_has_the_same_bits_with_one_thread_and_with_three(codes, small, tmp_path):
    options, before = {**small, "recipe": {"norm_batch": 8}, "epochs": 2}, torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            latenttrain.fit(codes, out=tmp_path / str(threads), **options)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        found.append((tmp_path / str(threads) / "best.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", ["default", {"norm_batch": 2}])
def test_an_odd_sample_left_over_is_no_batch_by_itself(codes, small, tmp_path, recipe):
    """On its last grid of one cell, MobileNetV2 would have nothing to normalize by."""
    options = {**small, "recipe": recipe, "epochs": 1, "batch_size": 2, "limit": 33}
    run = latenttrain.fit(codes, out=tmp_path / "run", arch="mobilenetv2", **{**options, "depth": 1.0})
    assert run.epochs == 1


def test_threads_are_put_back_after_a_failure():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread_each(CPU) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
    with one_thread_each(torch.device("meta")) as pool:
        assert pool is None


def test_what_fails_in_a_micro_batch_is_raised_and_loses_no_replica():
    net, calls = build_net(config_of().net), []

    def loss_of(*given):
        calls.append(given)
        raise ValueError("no loss")

    with ThreadPoolExecutor(2) as pool:
        learner = Learner(net, loss_of, 8, pool)
        for _ in range(3):
            with pytest.raises(ValueError, match="no loss"):
                learner.learn(torch.arange(30), torch.zeros(30, dtype=torch.int64), {})
    assert learner.replicas.qsize() == 2
