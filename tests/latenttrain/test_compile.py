"""The training step as one pure function that torch.compile takes whole."""

import shutil

import pytest
import torch

import latenttrain
from latentprep.errors import SystemFault
from latentprep.format import Quantizer
from latenttrain.augment import Augment, augment_codes, augment_planes, draw
from latenttrain.checkpoint import read_config
from latenttrain.config import RunConfig, versions
from latenttrain.data import Split, one_hot
from latenttrain.nets import NetConfig, build_net
from latenttrain.packed import PackedSplit, pack_views
from latenttrain.recipe import make_recipe
from latenttrain.stems import STEMS
from latenttrain.train import batch_loss

CPU = torch.device("cpu")
ALL = Augment(mixup=0.2, cutmix=0.3, noise=True, mirror=True, channel_drop=0.1, tone=0.5)


def quantizer_of(bits):
    """Of 4 channels with these bits, or with those of each."""
    each = (bits,) * 4 if isinstance(bits, int) else bits
    return Quantizer(max(each), (-2.0,) * 4, (0.25,) * 4, channel_bits=each)


def net_of(bits, grid=8, **changes):
    torch.manual_seed(0)
    quantizer = {name: getattr(quantizer_of(bits), name) for name in ("bits", "lo", "step", "channel_bits")}
    return build_net(NetConfig((4, grid, grid), 10, **quantizer, width=0.25, **changes))


def split_of(bits, packed, grid=8, samples=64):
    quantizer = quantizer_of(bits)
    levels = torch.tensor(quantizer.channel_levels)[:, None, None]
    codes = (torch.rand(samples, 1, 4, grid, grid) * levels).to(torch.uint8)
    labels = torch.randint(0, 10, (samples,))
    if not packed:
        return Split(codes, labels)
    return PackedSplit(pack_views(codes, quantizer), labels, quantizer, (4, grid, grid))


@pytest.mark.parametrize("stem", STEMS)
def test_the_step_is_one_graph_without_a_break(stem):
    """Every stem; both augmentations with and without a filter; and a batch in parts."""
    place = list(STEMS).index(stem)
    filtered, augmentation = place % 2 == 1, (ALL, Augment())[place // 2 % 2]
    bits = 4 if filtered else (3, 1, 0, 2)
    torch._dynamo.reset()
    net = net_of(bits, stem=stem, depth=0.5, filter=(0.01,) * 144 if filtered else ())
    split, generator = split_of(bits, packed=not filtered), torch.Generator().manual_seed(0)
    net.cut_into((6, 5, 5) if filtered else ())
    config = RunConfig(net.config, make_recipe(), augmentation, {}, versions())
    rows, labels = next(split.training_rows(16, generator))
    random = draw(net, 16, augmentation, CPU, generator)
    whole = torch.compile(batch_loss, fullgraph=True, dynamic=False, backend="aot_eager")
    found = []
    for function in (batch_loss, whole):
        net.zero_grad()
        loss = function(net, split, rows, labels, random, config, False)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="generating code for CPUs takes a C++ compiler")
@pytest.mark.parametrize("bits", [3, 4])
def test_generated_code_gathers_unpacks_moves_and_dequantizes_the_same_planes(bits):
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    net, split, generator = net_of(bits, 28), split_of(bits, True, 28), torch.Generator().manual_seed(0)
    rows, labels = next(split.training_rows(32, generator))
    random = draw(net, 32, Augment(), CPU, generator)

    def planes(rows, labels, random):
        codes = augment_codes(net, split.codes_of(rows), Augment(), random)
        return augment_planes(net, net.planes(codes), one_hot(labels, net.config.classes), Augment(), random)

    with torch.no_grad():
        found = torch.compile(planes, fullgraph=True, dynamic=False)(rows, labels, random)
    assert metrics.generated_kernel_count <= 5  # codes are moved as they are unpacked, erased as they are dequantized
    for mine, theirs in zip(found, planes(rows, labels, random), strict=True):
        assert torch.equal(mine, theirs)


def test_a_compiled_run_says_so_and_learns_the_same(codes, small, tmp_path, monkeypatch):
    plain = latenttrain.fit(codes, **small, out=tmp_path / "plain")
    calls, resident = [], []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", resident.append)

    def compiler(function, **settings):
        calls.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = latenttrain.fit(codes, **small, out=tmp_path / "compiled", compile=True)
    assert calls == [{"fullgraph": True, "dynamic": False, "options": None}]  # once a run
    assert len(resident) == 2  # codes and labels
    assert (compiled.top1, compiled.last_top1) == (plain.top1, plain.last_top1)
    assert read_config(tmp_path / "compiled").recipe.compile
    assert not read_config(tmp_path / "plain").recipe.compile


def test_a_machine_that_cannot_compile_says_so(codes, small, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch._dynamo.exc.InvalidBackend("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    with pytest.raises(SystemFault, match="cannot be compiled") as error:
        latenttrain.fit(codes, **small, out=tmp_path / "run", compile=True)
    assert "compile" in error.value.hint
