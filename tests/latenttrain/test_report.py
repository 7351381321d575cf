"""`report`: runs compared on one HTML page, and their mistakes on a dataset."""

import json
import re

import pytest

import latentprep
import latenttrain
from latentprep.errors import CheckpointError, UsageError
from latenttrain.diagnosis import diagnose
from latenttrain.runs import BRIEF, runs_table
from pages import check_page
from pictures import make_folder

SMALL = {"width": 0.25, "depth": 0.5, "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("dct")
    images = make_folder(root / "images", train=20, val=6)
    latentprep.encode(images, codec="dct", bits=4, size=64, out=root / "a <dataset> & more")
    return root / "a <dataset> & more"


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """Two runs on the dataset at 4 bits, one on it at 2."""
    root = tmp_path_factory.mktemp("runs")
    latentprep.requantize(dataset, bits=2, out=root / "two")
    folders = []
    for name, data, epochs in (("first", dataset, 2), ("<second>", dataset, 1), ("two-bits", root / "two", 2)):
        latenttrain.fit(data, epochs=epochs, out=root / name, **SMALL)
        folders.append(root / name)
    return folders


def test_diagnosis_agrees_with_evaluation(dataset, runs):
    found = diagnose(runs[0], dataset)
    measured = latenttrain.evaluate(runs[0], dataset)
    assert found.top1 == pytest.approx(measured.top1)
    assert found.loss.mean() == pytest.approx(measured.loss, rel=1e-4)
    assert found.confusion.sum() == len(found.rows) == measured.samples == 12
    assert found.confusion.trace() == (found.labels == found.predicted).sum()
    wrong = found.most_wrong()
    assert wrong
    assert all(mistake.label != mistake.predicted for mistake in wrong + found.most_confused())
    labels = latentprep.open(dataset).load("val").labels
    assert (found.labels == labels).all()
    losses = [float(found.loss[found.rows.tolist().index(mistake.row)]) for mistake in wrong]
    assert losses == sorted(losses, reverse=True)


def test_runs_are_compared(runs, tmp_path):
    found = latenttrain.report(runs, out=tmp_path / "runs.html")
    assert [run.bits for run in found] == [4, 4, 2]
    assert [run.epochs for run in found] == [2, 1, 2]
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert found[0].top1 == max(line["top1"] for line in lines)
    assert found[0].last_top1 == lines[-1]["top1"]
    columns, rows = runs_table(found)
    assert all(len(row) == len(columns) for row in rows)
    assert set(BRIEF) <= set(columns)
    text = (tmp_path / "runs.html").read_text()
    check_page(text)
    assert text.count("<svg") == 3  # loss, accuracy, accuracy against bits
    assert "Confusion matrix" not in text
    assert "<second>" not in text


def test_with_a_dataset_their_mistakes_are_shown(dataset, runs, tmp_path):
    latenttrain.report(runs, dataset=dataset, out=tmp_path / "runs.html", device="cpu")
    text = (tmp_path / "runs.html").read_text()
    wrong = [len(diagnose(run, dataset).most_wrong()) + len(diagnose(run, dataset).most_confused()) for run in runs[:2]]
    assert len(check_page(text).pictures) == sum(wrong)
    assert text.count("<figcaption>Confusion matrix") == 2
    assert "Not evaluated: " in text  # the run on 2 bits
    assert re.search(r"quantizer\.bits is \d, but the network was trained with \d", text)
    latenttrain.report(runs, dataset=latentprep.open(dataset), out=tmp_path / "again.html", device="cpu")
    assert (tmp_path / "again.html").read_text() == text


def test_a_report_that_cannot_be_made_writes_nothing(dataset, runs, tmp_path):
    out = tmp_path / "none.html"
    with pytest.raises(UsageError, match="no run to report on"):
        latenttrain.report([], out=out)
    with pytest.raises(CheckpointError, match="not a run folder"):
        latenttrain.report([tmp_path], out=out)
    with pytest.raises(UsageError, match="decoder and weights are for pictures of a dataset"):
        latenttrain.report(runs, decoder="linear", out=out)
    with pytest.raises(UsageError, match="decoder must be codec or linear"):
        latenttrain.report(runs, dataset=dataset, decoder="liner", out=out)
    (tmp_path / "config.json").write_bytes((runs[0] / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="empty"):
        latenttrain.report([tmp_path], out=out)
    assert not out.exists()


def test_the_report_on_the_command_line(latenttrain, dataset, runs, tmp_path):
    code, out, _ = latenttrain("report", *runs[:2], "--dataset", dataset, "--out", tmp_path / "r.html", "--json")
    assert (code, len(json.loads(out)["runs"])) == (0, 2)
    assert "Most wrong" in (tmp_path / "r.html").read_text()
    code, out, _ = latenttrain("report", runs[0], "--out", tmp_path / "r.html")
    assert (code, "accuracies on val" in out) == (0, True)
