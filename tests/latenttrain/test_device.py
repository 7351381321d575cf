"""What a run does on a device that is not here."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from devices import meta
from torch.utils._python_dispatch import TorchDispatchMode

import latenttrain
from latentprep.errors import SystemFault
from latenttrain import evaluation, memory, ranks, train
from latenttrain.augment import Augment, draw
from latenttrain.config import RunConfig, versions
from latenttrain.data import Split, load_trained
from latenttrain.nets import ARCHITECTURES, NetConfig, build_net
from latenttrain.optimizers import make_optimizer
from latenttrain.recipe import make_recipe
from latenttrain.runtime import compiled, in_bfloat16, reproducible, seed_generators
from latenttrain.stems import STEMS

CPU = torch.device("cpu")
QUANTIZER = {"bits": 2, "lo": (-2.0,) * 3, "step": (1.0,) * 3, "filter": tuple(0.1 + 0.01 * i for i in range(81))}


@pytest.mark.parametrize("options", [{}, {"stream": True, "buffer": 2}, {"stem": "embedding"}, {"recipe": "talk"}])
def test_the_host_waits_for_the_device_once_an_epoch(codes, small, tmp_path, monkeypatch, options):
    monkeypatch.setattr(ranks, "pick_device", lambda _: torch.device("meta"))
    waits = {}
    few = small | {"batch_size": 64}
    for epochs in (1, 3):
        with meta() as watched:
            latenttrain.fit(codes, out=tmp_path / str(epochs), **{**few, **options, "epochs": epochs})
        waits[epochs] = len(watched.waits)
    batches = -(-200 // few["batch_size"])
    copies = 2 * batches if options.get("stream") else 0  # of codes and labels; to CUDA from pinned memory, in passing
    assert waits[3] - waits[1] == 2 * (1 + copies)


def test_a_split_is_divided_before_it_is_on_the_device(codes):
    """There the whole would have to fit beside its parts, and the host would wait for their sizes."""
    from latentprep.format import open_dataset

    with meta() as watched:
        train, judged = load_trained(open_dataset(codes), torch.device("meta"), holdout=0.25)
    assert (len(train), len(judged), train.device.type, judged.device.type) == (150, 50, "meta", "meta")
    assert len(watched.waits) == 4  # copies of codes and labels


def test_cudnn_is_on_and_deterministic_in_a_run_and_as_before_after_it(codes, small, tmp_path, monkeypatch):
    cudnn, seen = torch.backends.cudnn, set()
    real = F.conv2d

    def convolution(*arguments, **options):
        seen.add((cudnn.enabled, cudnn.deterministic, cudnn.benchmark))
        return real(*arguments, **options)

    monkeypatch.setattr(F, "conv2d", convolution)
    monkeypatch.setattr(cudnn, "benchmark", True)
    with reproducible(CPU, 0):
        build_net(NetConfig((3, 8, 8), 4, **QUANTIZER, width=0.25))(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert seen == {(True, True, False)}
    assert (cudnn.enabled, cudnn.deterministic, cudnn.benchmark) == (True, False, True)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_keeps_the_users_tf32(allowed):
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, allowed
    try:
        with reproducible(CPU, 0):
            assert cudnn.allow_tf32 == allowed
        assert cudnn.allow_tf32 == allowed
    finally:
        cudnn.allow_tf32 = before


def test_the_random_state_of_mps_is_as_before(monkeypatch):
    states = [torch.tensor([7])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with reproducible(torch.device("mps"), 0):
        states.append(torch.tensor([8]))
    assert int(states[-1]) == 7


def test_a_run_leaves_the_generators_of_other_devices_alone(codes, small, tmp_path, monkeypatch):
    seeded = []
    for device in (torch.cuda, torch.mps):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, lambda seed, name=name: seeded.append(name), raising=False)
    before = torch.get_rng_state()
    latenttrain.fit(codes, out=tmp_path / "run", **{**small, "epochs": 1})
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    seed_generators(torch.device("cuda:1"), 5)
    assert seeded == ["manual_seed"]
    torch.set_rng_state(before)


def test_what_torch_keeps_of_freed_memory_is_free(monkeypatch):
    seen = {"mem_get_info": (10, 80), "memory_reserved": 30, "memory_allocated": 5}
    for name, value in seen.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda:1")) == 10 + 30 - 5


# What torch's documentation of `use_deterministic_algorithms` names, as far as a network of ours could come to use it.
SHAKY = re.compile(
    r"aten::(index_add|index_copy|index_reduce|scatter|put|bincount|histc|cumsum|cumprod|median|kthvalue|nll_loss2d"
    r"|(reflection|replication)_pad\w*_backward|upsample\w*_backward|grid_sampler\w*_backward|_?adaptive\w*_backward"
    r"|(avg|max)_pool3d\w*_backward|fractional\w*_backward|max_unpool)"
)


class Named(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        accumulates = "index_put" in func.name() and (kwargs.get("accumulate") or True in args)
        self.names.add("aten::index_add" if accumulates else func.name())
        return func(*args, **kwargs)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_of_a_run_sums_in_any_order(arch, stem, filtered):
    """On CUDA such a kernel gives other bits each time, and `fit` promises the same: whoever brings one in, read
    `torch.use_deterministic_algorithms`."""
    quantizer = QUANTIZER if filtered else {**QUANTIZER, "filter": ()}
    net = build_net(NetConfig((3, 8, 8), 4, **quantizer, arch=arch, stem=stem, width=0.25))
    split = Split(torch.randint(0, 4, (8, 2, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 4)
    augment = Augment(mixup=0.2, cutmix=0.3, noise=True, mirror=True, channel_drop=0.1)
    recipe = make_recipe()
    config, optimizer = RunConfig(net.config, recipe, augment, {}, versions()), make_optimizer(net, recipe)
    with Named() as ran:
        rows, labels = next(split.training_rows(8, torch.Generator().manual_seed(0)))
        random = draw(net, 8, augment, CPU, None)
        train.batch_loss(net, split, rows, labels, random, config, False).backward()
        optimizer.step()
        evaluation.counted(evaluation.split_logits(net, split), split.labels)
    assert "aten::convolution_backward" in ran.names
    assert sorted(filter(SHAKY.match, ran.names)) == []


@pytest.mark.parametrize("capable", [True, False])
def test_code_for_cuda_is_chosen_without_timing(monkeypatch, capable):
    calls, known = [], ["triton.cudagraphs", *(["deterministic"] if capable else [])]
    monkeypatch.setattr(torch, "compile", lambda function, **settings: calls.append(settings))
    monkeypatch.setattr(torch._inductor, "list_options", lambda: known)
    compiled(torch.relu, torch.device("cuda"))
    compiled(torch.relu, CPU)
    assert [call["options"] for call in calls] == [dict.fromkeys(known, True), None]


def test_a_users_autocast_changes_nothing(codes, small, tmp_path):
    bits = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            latenttrain.fit(codes, out=tmp_path / str(enabled), **{**small, "epochs": 1})
            found = latenttrain.evaluate(tmp_path / str(enabled), codes, device="cpu")
        bits.append(((tmp_path / str(enabled) / "best.safetensors").read_bytes(), found.loss))
    assert bits[0] == bits[1]


def test_bfloat16_is_asked_of_the_device_that_is_used(monkeypatch):
    capability = {"cuda:0": (9, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    net = torch.nn.Linear(2, 2)
    assert in_bfloat16(net, torch.device("cuda:0"))
    assert not in_bfloat16(net, torch.device("cuda:1"))


@pytest.mark.parametrize("bfloat16", [True, False])
def test_planes_are_float32_where_a_network_is_judged_as_where_it_learns(monkeypatch, bfloat16):
    monkeypatch.setattr(evaluation, "in_bfloat16", lambda *_: bfloat16)
    net = build_net(NetConfig((3, 8, 8), 4, **QUANTIZER, width=0.25))
    codes = torch.randint(0, 4, (6, 1, 3, 8, 8), dtype=torch.uint8)
    planes, before = [], torch.get_float32_matmul_precision()
    tf32 = []
    net.stem.register_forward_hook(lambda _, __, made: (planes.append(made), tf32.append(tf32_allowed()))[0])
    torch.set_float32_matmul_precision("high")
    try:
        evaluation.split_logits(net, Split(codes, torch.zeros(6, dtype=torch.int64)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert tf32 == [False]
    assert planes[0].dtype == torch.float32
    assert torch.equal(planes[0], net.planes(codes[:, 0]))


def test_a_run_makes_planes_in_full_float32_whatever_the_users_flags(codes, small, tmp_path, monkeypatch):
    real, seen, before = latenttrain.nets.Net.planes, [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(
        latenttrain.nets.Net,
        "planes",
        lambda net, codes: seen.append((net.training, tf32_allowed())) or real(net, codes),
    )
    torch.set_float32_matmul_precision("high")
    try:
        latenttrain.fit(codes, out=tmp_path / "run", **{**small, "epochs": 1})
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert {(True, False), (False, False)} <= set(seen)
    assert not any(allowed for training, allowed in seen if training)


def tf32_allowed():
    return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32


def test_evaluation_halves_batches_that_do_not_fit(codes, small, tmp_path, monkeypatch):
    latenttrain.fit(codes, out=tmp_path / "run", **{**small, "epochs": 1})
    whole = latenttrain.evaluate(tmp_path / "run", codes, device="cpu")
    monkeypatch.setattr(latenttrain.nets.Net, "logits", at_most(9, latenttrain.nets.Net.logits))
    found = latenttrain.evaluate(tmp_path / "run", codes, device="cpu")
    assert (found.top1, found.samples) == (whole.top1, whole.samples)
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    monkeypatch.setattr(latenttrain.nets.Net, "logits", at_most(0, latenttrain.nets.Net.logits))
    with pytest.raises(SystemFault, match=r"a single sample does not fit.*device='cpu'"):
        latenttrain.evaluate(tmp_path / "run", codes, device="cpu")


def at_most(samples, work):
    """The method, on a device whose memory holds so many samples."""

    def fitting(net, planes):
        if len(planes) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return work(net, planes)

    return fitting


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")]
)
def test_a_device_too_small_for_training_names_the_way_out(codes, small, tmp_path, monkeypatch, error):
    def too_small(*_):
        raise error

    monkeypatch.setattr(train, "train_epoch", too_small)
    with pytest.raises(SystemFault, match=r"cpu has too little memory; lower batch_size"):
        latenttrain.fit(codes, out=tmp_path / "run", **small)


def test_a_generator_elsewhere_stands_for_its_seed(codes):
    """The order of shards is drawn on the host: MPS draws 32 bits, and CUDA would make the host wait."""
    from latentprep.format import open_dataset
    from latenttrain.streaming import StreamedSplit

    def order(generator):
        split = StreamedSplit(open_dataset(codes), "train", CPU, held=1)
        return torch.cat([labels for _, labels in split.training_batches(10, generator)])

    elsewhere = SimpleNamespace(device=torch.device("mps"), initial_seed=lambda: 5)
    assert torch.equal(order(elsewhere), order(torch.Generator().manual_seed(5)))
