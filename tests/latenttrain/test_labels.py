"""Soft labels: what is written, what is learned from it, and what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import latenttrain
from latentprep.errors import CheckpointError, DatasetError, UsageError
from latentprep.format import open_dataset
from latenttrain.checkpoint import load_net
from latenttrain.data import load_split
from latenttrain.labels import NAME, check_labels, read_labels

SMALL = {"width": 0.25, "depth": 0.5, "epochs": 2, "batch_size": 32, "device": "cpu"}
CPU = torch.device("cpu")


@pytest.fixture
def views(make_dataset):
    """Three views of each training sample; the first two rows of train could not be read."""
    return make_dataset(views=3, invalid=2)


@pytest.fixture
def teacher(views, tmp_path):
    return latenttrain.fit(views, **SMALL, out=tmp_path / "teacher").run


def probabilities(run, dataset):
    """What a run's network of the last epoch gives for every view of train: f32 [n,V,classes]"""
    net, _, _ = load_net(run, "last")
    codes = load_split(open_dataset(dataset), "train", CPU).codes
    with torch.inference_mode():
        return net(codes.flatten(0, 1)).softmax(1).view(*codes.shape[:2], -1)


def read(path):
    return safetensors.torch.load_file(path)["probabilities"]


def rewritten(path, **changes):
    """The file with other metadata, or another tensor."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["latenttrain"])
    tensor = changes.pop("tensor", read(path))
    path.write_bytes(safetensors.torch.save({"probabilities": tensor}, {"latenttrain": json.dumps(document | changes)}))


def test_labels_are_what_the_teacher_gives_for_each_view(views, teacher):
    result = latenttrain.label(teacher, views)
    assert (result.samples, result.views, result.labels) == (198, 3, f"{teacher}/{NAME}")
    labels = read(result.labels)
    assert (labels.dtype, labels.shape) == (torch.float16, (198, 3, 4))
    assert (
        labels.float() - probabilities(teacher, views)
    ).abs().max() < 0.02  # bfloat16, where a machine multiplies it
    true = load_split(open_dataset(views), "train", CPU).labels
    assert result.top1 == pytest.approx(float((labels[:, 0].argmax(1) == true).float().mean()))
    assert result.bytes == (views.parent / "teacher" / NAME).stat().st_size


def test_the_same_teacher_gives_the_same_bytes_and_two_give_their_mean(views, teacher, tmp_path):
    other = latenttrain.fit(views, **SMALL, seed=1, out=tmp_path / "other").run
    for name, runs in (("a", [teacher]), ("again", [teacher]), ("b", [other]), ("both", [teacher, other])):
        latenttrain.label(runs, views, out=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "again").read_bytes()
    a, b, both = (read(tmp_path / name).float() for name in ("a", "b", "both"))
    assert ((a + b) / 2 - both).abs().max() < 1e-3
    assert (a - b).abs().max() > 0.01


def test_a_network_learns_what_the_labels_say(views, teacher, tmp_path):
    """Labels by which every class is the next one: the network must answer so, though val knows better."""
    path = tmp_path / "wrong.safetensors"
    latenttrain.label(teacher, views, out=path)
    true = load_split(open_dataset(views), "train", CPU).labels
    tensor = torch.nn.functional.one_hot((true + 1) % 4, 4)[:, None].expand(-1, 3, -1).half().contiguous()
    rewritten(path, tensor=tensor, sha256=hashlib.sha256(tensor.numpy()).hexdigest())
    run = latenttrain.fit(views, **SMALL | {"epochs": 8}, labels=path, out=tmp_path / "student").run
    net, _, _ = load_net(run, "last")
    val = load_split(open_dataset(views), "val", CPU)
    with torch.inference_mode():
        answers = net(val.codes[:, 0]).argmax(1)
    assert (answers == (val.labels + 1) % 4).float().mean() > 0.6


def test_a_run_resumes_with_its_labels_and_with_no_others(views, teacher, tmp_path, interrupted_after):
    latenttrain.label(teacher, views)
    whole = latenttrain.fit(views, **SMALL, labels=teacher, out=tmp_path / "whole").run
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(views, **SMALL, labels=teacher, out=tmp_path / "broken", progress=interrupted_after(5))
    with pytest.raises(CheckpointError, match="labels"):
        latenttrain.fit(views, **SMALL, out=tmp_path / "broken", resume=True)
    broken = latenttrain.fit(views, **SMALL, labels=teacher, out=tmp_path / "broken", resume=True).run
    assert Path(whole, "best.safetensors").read_bytes() == Path(broken, "best.safetensors").read_bytes()


def test_ranks_learn_the_same_from_labels(views, teacher, tmp_path):
    latenttrain.label(teacher, views)
    settings = {**SMALL, "device": "auto", "recipe": {"norm_batch": 16}, "labels": teacher, "epochs": 1}
    runs = [
        latenttrain.fit(views, **settings, devices=devices, out=tmp_path / name).run
        for name, devices in (("one", None), ("two", "cpu:2"))
    ]
    one, two = (safetensors.torch.load_file(f"{run}/best.safetensors") for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_labels_teach_networks_on_other_codes_of_the_same_images(make_dataset, tmp_path):
    wide, narrow = make_dataset(name="wide", bits=8), make_dataset(name="narrow", bits=4)
    run = latenttrain.fit(wide, **SMALL, out=tmp_path / "teacher").run
    latenttrain.label(run, wide)
    assert latenttrain.fit(narrow, **SMALL, labels=run, out=tmp_path / "student").epochs == 2


def test_a_limit_takes_the_labels_of_its_samples(views, teacher):
    dataset = open_dataset(views)
    path = views.parent / "teacher" / NAME
    latenttrain.label(teacher, views)
    rows, chosen = dataset.valid_rows("train"), dataset.valid_rows("train", 30)
    some = read_labels(path, dataset, 30)
    assert torch.equal(some, read(path)[np.isin(rows, chosen)])


def test_labels_of_other_images_or_views_are_refused(views, teacher, make_dataset):
    latenttrain.label(teacher, views)
    for other, what in (
        (make_dataset(name="one", views=1, invalid=2), "transform.views is 3, here 1"),
        (make_dataset(name="whole", views=3), "rows is"),
    ):
        with pytest.raises(DatasetError, match=what):
            latenttrain.fit(other, **SMALL, labels=teacher)


def test_a_teacher_that_saw_what_judges_is_refused(views, teacher, tmp_path):
    latenttrain.label(teacher, views)
    with pytest.raises(UsageError, match="has learned from samples that holdout=0.2 sets apart"):
        latenttrain.fit(views, **SMALL, holdout=0.2, labels=teacher)
    honest = latenttrain.fit(views, **SMALL, holdout=0.2, out=tmp_path / "honest").run
    latenttrain.label(honest, views)
    result = latenttrain.fit(views, **SMALL, holdout=0.2, labels=honest, out=tmp_path / "student")
    assert result.epochs == 2
    for changed in ({"limit": 100}, {"holdout": 0.1}):
        with pytest.raises(UsageError, match="sets apart"):
            latenttrain.fit(views, **SMALL | {"holdout": 0.2} | changed, labels=honest)


def test_files_that_hold_no_whole_labels_are_refused_in_a_line(views, teacher, tmp_path):
    dataset, path = open_dataset(views), tmp_path / "labels"
    with pytest.raises(DatasetError, match="does not exist"):
        check_labels(path, dataset, None, 0.0)
    latenttrain.label(teacher, views, out=path)
    good = path.read_bytes()
    for bad in (b"", b"not labels", good[:100], good[:8] + b"\xff" * 50 + good[58:]):
        path.write_bytes(bad)
        with pytest.raises(DatasetError, match="not a file of labels"):
            check_labels(path, dataset, None, 0.0)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DatasetError, match="its checksum differs"):
        read_labels(path, dataset, None)
    path.write_bytes(good)
    for changes in ({"format": "other"}, {"version": 2}, {"teachers": [{}]}, {"images": []}, {"sha256": 1}):
        rewritten(path, **changes)
        with pytest.raises(DatasetError, match="not a file of labels"):
            check_labels(path, dataset, None, 0.0)
        path.write_bytes(good)
    rewritten(path, tensor=read(path)[:-1])
    with pytest.raises(DatasetError, match="not a file of labels"):
        read_labels(path, dataset, None)


def test_mistakes_of_users_are_said_in_a_line(views, teacher, tmp_path):
    latenttrain.label(teacher, views)
    with pytest.raises(UsageError, match="exists"):
        latenttrain.label(teacher, views)
    assert latenttrain.label(teacher, views, overwrite=True).samples == 198
    with pytest.raises(UsageError, match="no run to label with"):
        latenttrain.label([], views)
    with pytest.raises(UsageError, match="stream cannot be combined with holdout, labels or latents"):
        latenttrain.fit(views, **SMALL, labels=teacher, stream=True)


def test_the_command_line_labels_and_learns(views, teacher, latenttrain, tmp_path):
    code, stdout, _ = latenttrain("label", teacher, views, "--json")
    assert (code, json.loads(stdout)["samples"]) == (0, 198)
    code, stdout, _ = latenttrain("label", teacher, views, "--overwrite")
    assert code == 0
    assert "198 samples, 3 views" in stdout
    code, stdout, _ = latenttrain("fit", views, "--labels", teacher, "--epochs", "1", "--out", tmp_path / "s", "--json")
    assert (code, json.loads(stdout)["epochs"]) == (0, 1)
    code, _, stderr = latenttrain("fit", views, "--labels", tmp_path / "none", "--out", tmp_path / "t")
    assert code != 0
    assert "does not exist" in stderr
