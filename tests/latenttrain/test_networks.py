"""Networks that others wrote: found by entry point or by the user's word, trained like ours."""

import json
import sys
from pathlib import Path

import pytest
import torch

import latenttrain
from latentprep.errors import CheckpointError, UsageError
from latentprep.format import open_dataset
from latentprep.progress import silent
from latenttrain import networks, train
from latenttrain.checkpoint import load_net
from latenttrain.config import plan_net
from latenttrain.nets import BatchNorm, build_net
from latenttrain.ranks import ALONE

PLUGIN = Path(__file__).parents[1] / "plugin"
OWN = "latenttrain_small:small"


@pytest.fixture
def plugin(monkeypatch):
    """The package is installed, and nobody has named a function of it."""
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.setattr(networks, "_named", {})
    yield
    sys.modules.pop("latenttrain_small", None)


@pytest.fixture
def settings() -> dict:
    return {"epochs": 2, "batch_size": 64, "device": "cpu"}


def test_an_installed_network_is_trained_and_found_again(plugin, codes, settings, tmp_path):
    run = latenttrain.fit(codes, arch="small", **settings, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["net"]["arch"] == "small"
    net, *_ = load_net(tmp_path / "run")
    assert run.parameters == sum(p.numel() for p in net.parameters())
    norm = net.body.first[1]
    assert type(norm) is BatchNorm
    assert norm.running_mean.abs().max() > 0.01  # they followed the micro-batches
    assert latenttrain.evaluate(tmp_path / "run", codes).top1 == run.top1
    again = latenttrain.fit(codes, arch="small", **settings, out=tmp_path / "again")
    assert again.top1 == run.top1
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == (
        tmp_path / "run" / "best.safetensors"
    ).read_bytes()
    (summary,) = latenttrain.report(tmp_path / "run", out=tmp_path / "runs.html")
    assert summary.arch == "small"
    assert latenttrain.scale_table(codes, [0], "small")[0]["parameters"] == run.parameters


def test_its_weights_do_not_depend_on_the_number_of_threads(plugin, codes, settings, tmp_path):
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        latenttrain.fit(codes, arch="small", **settings, out=tmp_path / str(threads))
        runs.append((tmp_path / str(threads) / "best.safetensors").read_bytes())
    torch.set_num_threads(1)
    assert runs[0] == runs[1]


def test_a_function_is_imported_only_where_it_was_named(plugin, codes, settings, tmp_path):
    run = tmp_path / "run"
    trained = latenttrain.fit(codes, arch=OWN, **settings, out=run)
    assert latenttrain.evaluate(run, codes).top1 == trained.top1  # it was named to `fit`, in this process
    for arch in (OWN, "os:getcwd"):
        networks._named.clear()
        sys.modules.pop("latenttrain_small", None)
        config = json.loads((run / "config.json").read_text())
        config["net"]["arch"] = arch
        (run / "config.json").write_text(json.dumps(config))
        for use in (
            lambda: latenttrain.evaluate(run, codes), lambda: latenttrain.report(run, out=tmp_path / "runs.html"),
            lambda: latenttrain.label(run, codes), lambda: latenttrain.fit(codes, init=run, **settings),
            lambda: latenttrain.predict(run, "photo.jpg"),
        ):  # fmt: skip
            with pytest.raises(CheckpointError, match=f"{arch} is not imported unless you name it.*arch='{arch}'"):
                use()
        assert "latenttrain_small" not in sys.modules
    config["net"]["arch"] = OWN
    (run / "config.json").write_text(json.dumps(config))
    assert latenttrain.evaluate(run, codes, arch=OWN).top1 == trained.top1


def test_an_absent_network_is_named(plugin, codes, settings, tmp_path):
    latenttrain.fit(codes, arch="small", **settings, out=tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    text = config.read_text()
    for arch, words in (("smal", "unknown network 'smal'; did you mean small"), ("absent", "does not import")):
        config.write_text(text.replace('"small"', f'"{arch}"'))
        with pytest.raises(CheckpointError, match=words):
            latenttrain.evaluate(tmp_path / "run", codes)
        with pytest.raises(UsageError, match=words):
            latenttrain.fit(codes, arch=arch, **settings, out=tmp_path / "other")
    config.write_text(text.replace('"small"', "3"))
    with pytest.raises(CheckpointError, match="arch must be a name"):
        latenttrain.evaluate(tmp_path / "run", codes)
    for arch, words in (
        ("nowhere:net", "does not import: No module named 'nowhere'"), ("os:nothing", "does not import"),
        ("os:sep", "is not a function"), ("os:", "must be like"), ("a b:c", "must be like"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            latenttrain.fit(codes, arch=arch, **settings, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("dropout", "has a Dropout: what it draws"), ("norm", "has a SyncBatchNorm, whose statistics"),
        ("momentum", "BatchNorm2d with settings of its own"),
        ("classes", r"must make logits \[2,4\] .* it gives \[2, 3\]"),
        ("planes", r"of planes \[2,3,8,8\]: .*99"), ("unused", "its more.weight takes no part"),
        ("nothing", "is NoneType, not an nn.Module"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_trained_says_why(plugin, codes, settings, tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        latenttrain.fit(codes, arch=f"latenttrain_small:{change}", **settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_without_a_linear_head_is_trained_but_not_carried_over(plugin, codes, settings, tmp_path):
    latenttrain.fit(codes, arch="latenttrain_small:headless", **settings, out=tmp_path / "run")
    with pytest.raises(UsageError, match="has no head to tell from the rest"):
        latenttrain.fit(codes, init=tmp_path / "run", **settings, out=tmp_path / "other")


def test_what_a_network_freezes_itself_stays_frozen(plugin, codes, settings, tmp_path):
    arch = "latenttrain_small:half_frozen"
    latenttrain.fit(codes, arch=arch, **settings, out=tmp_path / "run")
    first = load_net(tmp_path / "run")[0].body.first
    assert first[0].weight.eq(1 / 27).all()
    assert not first[1].running_var.eq(1).any()  # statistics follow the data, as usual in torch


def test_ranks_import_the_network_that_the_caller_named(plugin, codes, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train, "launch", lambda planned, *_: given.append(planned))
    latenttrain.fit(codes, arch=OWN, epochs=1, batch_size=128, devices="cpu:2", out=tmp_path / "run")
    networks._named.clear()  # in the process of a rank
    planned = train.PlannedRun.from_json(json.loads(json.dumps(given[0])))
    assert train.carry_out(planned, codes, lambda: torch.device("cpu"), ALONE, silent).epochs == 1


def test_the_command_finds_a_module_in_the_current_folder(codes, tmp_path, monkeypatch, latenttrain):
    (tmp_path / "my_nets.py").write_text((PLUGIN / "latenttrain_small.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "_named", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ("--epochs", 1, "--device", "cpu")
    code, _, err = latenttrain("fit", codes, "--arch", "my_nets:small", *arguments, "--out", "run")
    assert code == 0, err
    networks._named.clear()
    code, _, err = latenttrain("eval", "run", codes, "--device", "cpu")
    assert code == 7
    assert "--arch my_nets:small" in " ".join(err.split())
    assert latenttrain("eval", "run", codes, "--device", "cpu", "--arch", "my_nets:small")[0] == 0
    sys.modules.pop("my_nets")


def test_a_network_is_built_from_planes_and_config(plugin, codes):
    config = plan_net(open_dataset(codes), arch="small", stem="bitplane")
    net = build_net(config)
    assert net.body.first[0].in_channels == 3 * 4  # channels times bits
    assert net.head[0] == "body.head"
