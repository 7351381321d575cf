"""`fit --init RUN`: what is taken over, what stays as it is, and which runs do not fit."""

import dataclasses
import json

import pytest
import torch

import latenttrain
from latentprep.errors import CheckpointError, UsageError
from latentprep.format import open_dataset
from latentprep.format.quantizer import Quantizer, Statistics
from latenttrain.checkpoint import BEST, init_tensors, load_init, load_net, load_tensors, read_config
from latenttrain.config import plan_net, plan_run
from latenttrain.nets import build_net
from latenttrain.recipe import Recipe
from latenttrain.train import start_state

CPU = torch.device("cpu")
CLASSES, OTHERS = ("apple", "birch", "cedar", "daisy"), ("elder", "fern", "gorse")
SHIFTED = Quantizer(4, (-1.0, -2.5, 0.0), (0.5, 0.25, 0.125))


@pytest.fixture(scope="module")
def run(codes, tmp_path_factory):
    """A run on `codes` with settings that are not the default ones."""
    out = tmp_path_factory.mktemp("runs") / "first"
    settings = {"width": 0.25, "depth": 0.5, "full_grid": 2, "epochs": 1, "batch_size": 32, "device": "cpu"}
    latenttrain.fit(codes, **settings, out=out)
    return out


@pytest.fixture(scope="module")
def others(write_codes, tmp_path_factory):
    """Other classes, by another quantizer."""
    return write_codes(tmp_path_factory.mktemp("others") / "others", classes=OTHERS, quantizer=SHIFTED)


@pytest.fixture(scope="module")
def short():
    return {"epochs": 2, "batch_size": 64, "device": "cpu"}


def best(run):
    return load_tensors(run / BEST)[0]


def started(config, run):
    return start_state(config, CPU, init_tensors(run, config))


def planned(dataset, run, freeze=None):
    opened = open_dataset(dataset)
    net = plan_net(opened, init=read_config(run).net)
    return plan_run(opened, Recipe(freeze=freeze), net, init=load_init(run)[2])


def test_a_network_starts_with_all_weights_of_the_run_but_a_head_of_other_classes(run, others, codes):
    there = best(run)
    for dataset, fresh in ((codes, False), (others, True)):
        state = started(planned(dataset, run), run)
        head = state.net.head[0]
        for net in (state.net, state.average):
            differing = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, there[name])}
            assert differing == ({f"{head}.weight", f"{head}.bias"} if fresh else set())


def test_the_same_number_of_other_classes_gets_a_fresh_head_too(run, write_codes, tmp_path):
    for classes, same in ((CLASSES, True), (CLASSES[::-1], False), (("a", "b", "c", "d"), False)):
        dataset = write_codes(tmp_path / "-".join(classes), classes=classes)
        net = started(planned(dataset, run), run).net
        assert torch.equal(net.head[1].weight, best(run)[net.head[0] + ".weight"]) == same


@pytest.mark.parametrize("statistics", [None, Statistics((7.0, 8.0, 6.5), (2.0, 3.0, 0.05))])
@pytest.mark.parametrize("filtered", [False, True])
def test_the_stem_reads_latents_as_the_run_did(tmp_path, write_codes, statistics, filtered):
    weights = torch.randn(81, generator=torch.Generator().manual_seed(0)).mul(0.1).tolist() if filtered else ()
    first, second = (
        dataclasses.replace(one, filter=tuple(weights)) for one in (Quantizer(4, (-2.0,) * 3, (0.25,) * 3), SHIFTED)
    )
    old = write_codes(tmp_path / "old", statistics=statistics, quantizer=first)
    new = write_codes(tmp_path / "new", classes=OTHERS, quantizer=second)
    config = plan_net(open_dataset(old), width=0.25)
    carried = plan_net(open_dataset(new), init=config)
    assert (carried.width, carried.classes, carried.step) == (0.25, 3, SHIFTED.step)
    lines = []  # the planes of each channel are a line over its latents
    for net, dataset in ((config, old), (carried, new)):
        some = torch.randint(16, (5, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        latents = torch.from_numpy(open_dataset(dataset).quantizer.dequantize(some.numpy())).transpose(0, 1).flatten(1)
        planes = build_net(net).planes(some).transpose(0, 1).flatten(1)
        pairs = torch.stack([latents, torch.ones_like(latents)], 2)
        found = torch.linalg.lstsq(pairs, planes[..., None])
        assert torch.allclose(pairs @ found.solution, planes[..., None], atol=1e-4)
        lines.append(found.solution)
    assert torch.allclose(*lines, atol=1e-4)
    assert plan_net(open_dataset(old), init=config) == config


def test_training_goes_on_from_the_run_and_says_so(run, others, short, tmp_path, interrupted_after):
    latenttrain.fit(others, init=run, **short, out=tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert len(config["init"]) == 64
    assert (config["net"]["width"], config["net"]["full_grid"]) == (0.25, 2)
    assert "init" not in json.loads((run / "config.json").read_text())
    interrupted = {**short, "out": tmp_path / "b", "init": run}
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(others, **interrupted, progress=interrupted_after(4))
    latenttrain.fit(others, **interrupted, resume=True)
    assert (tmp_path / "a" / BEST).read_bytes() == (tmp_path / "b" / BEST).read_bytes()
    with pytest.raises(CheckpointError, match="init is .*, but null was requested"):
        latenttrain.fit(
            others, **{**interrupted, "init": None, "width": 0.25, "depth": 0.5, "full_grid": 2}, resume=True
        )
    with pytest.raises(CheckpointError, match='freeze is null, but "body" was requested'):
        latenttrain.fit(others, **interrupted, freeze="body", resume=True)


@pytest.mark.parametrize("freeze", ["body", "stem"])
def test_what_is_frozen_stays_to_the_last_bit(run, others, short, tmp_path, freeze):
    result = latenttrain.fit(others, init=run, freeze=freeze, **short, out=tmp_path / "run")
    net, config, _ = load_net(tmp_path / "run", "last")
    assert config.recipe.freeze == freeze
    assert result.parameters == sum(parameter.numel() for parameter in net.parameters())
    before, head = best(run), net.head[0] + "."
    changed = {
        name for name, tensor in net.state_dict().items()
        if not name.startswith(head) and not torch.equal(tensor, before[name])
    }  # fmt: skip
    if freeze == "body":
        assert not changed
    else:
        first = {name for name in before if name.startswith("body.0.")}
        assert {name for name in before if not name.startswith(head)} - changed - first <= {
            name for name in before if name.endswith("num_batches_tracked")
        }
        assert not changed & first
    resumed = {**short, "epochs": 2, "out": tmp_path / "run", "init": run}
    latenttrain.fit(others, freeze=freeze, **resumed, resume=True)  # its optimizer holds what learns only


def test_runs_that_do_not_fit_are_refused(run, codes, others, short, tmp_path, make_dataset):
    def refused(kind, words, dataset=codes, **options):
        with pytest.raises(kind, match=words):
            latenttrain.fit(dataset, **{"init": run, **short, "out": tmp_path / "run", **options})
        assert not (tmp_path / "run").exists()

    refused(CheckpointError, "its bits is 2, but the run was trained with 4", make_dataset("bits", bits=2))
    refused(CheckpointError, r"its latent\S* is .*10.*the same codec, size", make_dataset("large", latent=(3, 10, 8)))
    refused(CheckpointError, "its codec.levels is 9", make_dataset("codec", codec={"name": "fake", "levels": 9}))
    refused(UsageError, "width is 1.0, but the run to start from has 0.25; leave width out", width=1.0)
    refused(UsageError, "arch is 'mobilenetv2', but", arch="mobilenetv2")
    refused(CheckpointError, "no such folder", init=tmp_path / "nothing")
    refused(UsageError, "freeze must be stem or body, got head", freeze="head")
    refused(UsageError, "there are none yet; give init", init=None, freeze="body")
    embedded = tmp_path / "embedded"
    latenttrain.fit(codes, stem="embedding", width=0.25, depth=0.5, epochs=1, batch_size=64, device="cpu", out=embedded)
    refused(UsageError, "reads codes by the stem 'embedding'.*quantizer", others, init=embedded)
    latenttrain.fit(codes, init=embedded, **short, out=tmp_path / "same")  # the same quantizer


def test_a_run_that_changed_meanwhile_is_refused(run, others):
    with pytest.raises(CheckpointError, match="has changed since"):
        init_tensors(run, dataclasses.replace(planned(others, run), init="0" * 64))


def test_the_command(run, others, tmp_path, latenttrain):
    arguments = ("--epochs", 1, "--batch-size", 64, "--device", "cpu", "--out", tmp_path / "run")
    code, _, err = latenttrain("fit", others, "--init", run, "--freeze", "body", *arguments)
    assert code == 0, err
    code, _, err = latenttrain("fit", others, "--freeze", "body", *arguments)
    assert (code, "give --init, a run" in " ".join(err.split())) == (2, True)
