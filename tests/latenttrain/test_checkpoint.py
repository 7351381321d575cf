import dataclasses
import json
import pickle
import shutil

import pytest
import torch

import latenttrain
from latentprep.errors import CheckpointError, UsageError
from latentprep.format import Quantizer, open_dataset
from latentprep.format.quantizer import Statistics
from latenttrain.checkpoint import load_net, load_tensors, read_config, save_tensors
from latenttrain.config import RunConfig, check_dataset


@pytest.fixture(scope="module")
def trained(codes, tmp_path_factory, small):
    out = tmp_path_factory.mktemp("runs") / "run"
    latenttrain.fit(codes, **small, out=out)
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def test_tensors_and_notes_survive_with_equal_bytes(tmp_path):
    tensors = {
        "b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "a": torch.tensor(7),
        "c": torch.arange(3, dtype=torch.uint8),
    }
    save_tensors(tmp_path / "1", tensors, {"epoch": 3, "more": [1.5]})
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"epoch": 3, "more": [1.5]})
    loaded, notes = load_tensors(tmp_path / "1")
    assert notes == {"epoch": 3, "more": [1.5]}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_configuration_survives_json(trained):
    config = read_config(trained)
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_run_from_before_activations_were_recorded_has_relu(trained):
    document = json.loads(json.dumps(read_config(trained).to_json()))
    assert document["net"].pop("activation") == "hardswish"
    assert RunConfig.from_json(document).net.activation == "relu"


def test_a_run_from_before_codes_were_counted_keeps_the_rule_for_normal_distributions(
    run, make_dataset, tmp_path, small
):
    counted = Statistics((7.0, 8.0, 6.5), (2.0, 3.0, 4.0))
    latenttrain.fit(make_dataset(statistics=counted), **{**small, "epochs": 1}, out=tmp_path / "counted")
    net, config, _ = load_net(tmp_path / "counted")
    assert (config.net.mean, config.net.std) == (counted.mean, counted.std)
    codes = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    mean, std = (torch.tensor(v)[:, None, None] for v in (counted.mean, counted.std))
    assert torch.allclose(net.planes(codes), (codes - mean) / std)
    for folder in (run, tmp_path / "counted"):
        document = json.loads((folder / "config.json").read_text())
        del document["net"]["mean"], document["net"]["std"]
        (folder / "config.json").write_text(json.dumps(document))
        net, config, _ = load_net(folder)
        assert config.net.mean == config.net.std == ()
        assert torch.equal(net.planes(codes), (codes.float() - 7.5) * (2 * (1.25 + 0.34 * 4) / 16))


def test_best_and_last_are_the_epochs_they_say(trained):
    epochs = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    net, config, notes = load_net(trained)
    assert notes["top1"] == max(epoch["top1"] for epoch in epochs)
    assert not net.training
    assert net.config == config.net
    assert load_net(trained, "last")[2] == epochs[-1]
    with pytest.raises(UsageError, match="checkpoint must be best or last, got middle"):
        load_net(trained, "middle")


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
@pytest.mark.parametrize(
    "damage", ["empty", "cut short", "noise", "pickle", "of another network", "foreign", "missing"]
)
def test_damaged_weights_are_refused_and_never_unpickled(run, name, damage):
    path = run / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of another network":
        tensors, notes = load_tensors(path)
        save_tensors(path, {key: torch.zeros(1, *tensor.shape) for key, tensor in tensors.items()}, notes)
    elif damage == "foreign":
        import safetensors.torch

        safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    else:
        kinds = {
            "empty": b"",
            "cut short": data[:-100],
            "noise": bytes(range(256)) * 40,
            "pickle": pickle.dumps(Bomb()),
        }
        path.write_bytes(kinds[damage])
    with pytest.raises(CheckpointError, match=name) as caught:
        load_net(run, name.split(".")[0])
    assert caught.value.hint


@pytest.mark.parametrize(("name", "notes"), [("best", {}), ("last", {"metrics": []}), ("last", {"metrics": 3})])
def test_weights_that_do_not_say_their_epoch_are_refused(run, name, notes):
    path = run / f"{name}.safetensors"
    save_tensors(path, load_tensors(path)[0], notes)
    with pytest.raises(CheckpointError, match="does not say which epoch"):
        load_net(run, name)


@pytest.mark.parametrize("kind", ["velocity", "step", "exp_avg", "net.body.0.0.weight"])
@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_resuming_from_a_state_that_is_not_the_runs_is_refused(run, codes, small, kind, damage):
    path = run / "last.safetensors"
    tensors, notes = load_tensors(path)
    key = next(name for name in tensors if name.endswith(kind))
    tensors[key] = torch.zeros(2, 5, 3)
    if damage == "missing":
        del tensors[key]
    save_tensors(path, tensors, notes)
    with pytest.raises(CheckpointError, match=r"last\.safetensors belongs to another"):
        latenttrain.fit(codes, **small, out=run, resume=True)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def damaged_configs():
    yield "empty", lambda _: b""
    yield "no JSON", lambda _: b"{"
    yield "another kind of file", lambda _: b'{"model": 1}'
    yield "a list", lambda _: b"[]"
    yield "deep", lambda _: b"[" * 100_000
    for field in ("net", "recipe", "augment", "dataset"):
        yield f"{field} is null", lambda document, field=field: {**document, field: None}
        yield f"no {field}", lambda document, field=field: {k: v for k, v in document.items() if k != field}
    yield "width", lambda document: {**document, "net": {**document["net"], "width": 1e9}}
    yield "rate", lambda document: {**document, "recipe": {**document["recipe"], "lr": "fast"}}
    yield "unknown", lambda document: {**document, "recipe": {**document["recipe"], "momentum": 0.9}}
    yield "classes", lambda document: {**document, "dataset": {**document["dataset"], "classes": ["a", "b"]}}
    yield "quantizer", lambda document: {**document, "dataset": {**document["dataset"], "quantizer": {"bits": 4}}}


@pytest.mark.parametrize(("name", "damage"), list(damaged_configs()))
def test_damaged_configurations_are_refused(run, name, damage):
    path = run / "config.json"
    changed = damage(json.loads(path.read_text()))
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    with pytest.raises(CheckpointError, match=r"config\.json is damaged") as caught:
        read_config(run)
    assert "\n" not in str(caught.value)


def test_a_run_of_a_later_version_is_refused(run):
    document = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(CheckpointError, match="has version 2; this latenttrain reads up to 1"):
        read_config(run)


def test_what_is_no_run_folder_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"codec": {"name": "other"}}, "codec.name"),
        ({"codec": {"name": "fake", "levels": 8}}, "codec.levels"),
        ({"codec": {"name": "fake", "levels": 7, "extra": 1}}, "codec.extra"),
        ({"classes": ["apple", "birch", "cedar", "dill"]}, "classes"),
        ({"bits": 5}, "quantizer.bits"),
        ({"size": 72}, "transform.size"),
        ({"latent": (3, 8, 9)}, "latents"),
    ],
)
def test_a_dataset_whose_codes_mean_something_else_is_refused_by_name(trained, changes, field, make_dataset):
    other = open_dataset(make_dataset("other", **changes))
    with pytest.raises(CheckpointError, match=field):
        check_dataset(read_config(trained), other)


def test_other_images_other_views_and_moved_weights_are_fine(trained, make_dataset):
    config = read_config(trained)
    check_dataset(config, open_dataset(make_dataset("other", rows={"val": 30}, views=2)))
    here = {"name": "vae", "weights": "/here", "weights_sha256": "1"}
    config = dataclasses.replace(config, dataset={**config.dataset, "codec": here})
    moved = {"name": "vae", "weights": "/there", "weights_sha256": "1"}
    check_dataset(config, open_dataset(make_dataset("moved", codec=moved)))
    retrained = {**moved, "weights_sha256": "2"}
    with pytest.raises(CheckpointError, match="weights_sha256"):
        check_dataset(config, open_dataset(make_dataset("new", codec=retrained)))


def test_the_quantizer_is_the_datasets(codes, trained):
    assert read_config(trained).quantizer == open_dataset(codes).quantizer == Quantizer(4, (-2.0,) * 3, (0.25,) * 3)
