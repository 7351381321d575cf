import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import latenttrain
from latentprep.errors import CheckpointError, SystemFault, UsageError
from latentprep.format import open_dataset
from latenttrain.augment import Augment
from latenttrain.checkpoint import load_tensors, read_config
from latenttrain.config import plan_run
from latenttrain.recipe import Recipe, default_lr, make_recipe, preset_settings


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_time(run):
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in metrics(run)]


def same_run(first, second):
    """Weights, state and metrics are equal to the last bit, but for how long each epoch took."""
    assert (first / "best.safetensors").read_bytes() == (second / "best.safetensors").read_bytes()
    (ours, _), (theirs, _) = (load_tensors(run / "last.safetensors") for run in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert without_time(first) == without_time(second)
    return True


@pytest.fixture(scope="module")
def whole(codes, tmp_path_factory, small):
    """An unbroken run of five epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = latenttrain.fit(codes, **{**small, "epochs": 5}, out=out)
    return out, result


def test_the_loss_falls_and_the_classes_are_learned(codes, tmp_path, small):
    latenttrain.fit(codes, **{**small, "epochs": 12, "lr": 0.01}, out=tmp_path / "run")
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["val_loss"] < 0.8 * first["val_loss"]
    assert last["top1"] > 0.8


def test_a_run_folder_holds_everything(whole, codes):
    out, _ = whole
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "curve.png"
    }  # fmt: skip
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = read_config(out)
    assert config.classes == ["apple", "birch", "cedar", "daisy"]
    assert config.dataset["codec"] == {"name": "fake", "levels": 7}
    assert config.dataset["manifest_sha256"] == open_dataset(codes).manifest.sha256
    assert [set(epoch) for epoch in metrics(out)] == [
        {"epoch", "loss", "val_loss", "top1", "top5", "lr", "seconds"}
    ] * 5  # fmt: skip


def test_the_result_says_best_and_last(whole):
    out, result = whole
    epochs = metrics(out)
    best = max(epochs, key=lambda epoch: epoch["top1"])
    assert (result.top1, result.best_epoch) == (best["top1"], best["epoch"])
    assert result.last_top1 == epochs[-1]["top1"]
    assert json.loads(json.dumps(result.to_json()))["parameters"] == result.parameters > 0
    assert result.flops > 0
    assert result.samples_per_second > 0


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(whole, codes, tmp_path, small):
    latenttrain.fit(codes, **{**small, "epochs": 5}, out=tmp_path / "again")
    assert same_run(tmp_path / "again", whole[0])
    latenttrain.fit(codes, **{**small, "epochs": 5}, seed=1, out=tmp_path / "other")
    assert (tmp_path / "other" / "best.safetensors").read_bytes() != (whole[0] / "best.safetensors").read_bytes()


def test_the_callers_random_state_is_left_alone(codes, tmp_path, small):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "run")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("batches", [0, 3, 6, 29])
def test_an_interrupted_run_resumes_to_the_same_bytes(whole, codes, tmp_path, batches, small, interrupted_after):
    settings = {**small, "epochs": 5, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(codes, **settings, progress=interrupted_after(batches))
    result = latenttrain.fit(codes, **settings, resume=True)
    assert same_run(tmp_path / "run", whole[0])
    assert result.top1 == whole[1].top1


def test_dropout_and_a_stem_that_learns_resume_to_the_same_bytes(make_dataset, tmp_path, small, interrupted_after):
    codes = make_dataset(latent=(3, 24, 24), rows={"train": 100, "val": 20})
    settings = {**small, "epochs": 2, "arch": "mobilenetv2", "stem": "embedding"}
    settings["augment"] = Augment(mixup=0.2, cutmix=1.0, cutout=0.3, channel_drop=0.1, mirror=True)
    latenttrain.fit(codes, **settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(codes, **settings, out=tmp_path / "broken", progress=interrupted_after(4))
    latenttrain.fit(codes, **settings, out=tmp_path / "broken", resume=True)
    assert same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_killed_run_resumes_to_the_same_bytes(whole, codes, tmp_path, small_options, small):
    out = tmp_path / "run"
    settings = small_options[:]
    settings[settings.index("--epochs") + 1] = "5"
    command = [sys.executable, "-c", "from latenttrain.cli import main; main()", "fit", codes, *settings, "--out", out]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    latenttrain.fit(codes, **{**small, "epochs": 5}, out=out, resume=True)
    assert same_run(out, whole[0])


def test_resuming_a_run_that_ended_changes_nothing(whole, codes, small):
    out, result = whole
    before = {path: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"}
    assert latenttrain.fit(codes, **{**small, "epochs": 5}, out=out, resume=True).top1 == result.top1
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.5}, r"lr is [\d.]+, but 0\.5 was requested"),
        ({"epochs": 6}, "epochs is 5, but 6 was requested"),
        ({"width": 0.5}, "width is 0.25, but 0.5 was requested"),
        ({"limit": 64}, "dataset.limit is null, but 64 was requested"),  # and lr, which follows from it
        ({"compile": True}, "compile is false, but true was requested"),
        ({"augment": Augment(shift=1)}, r"augment.shift is \d, but 1 was requested"),
    ],
)
def test_resuming_with_other_settings_names_the_field_and_both_values(whole, codes, change, words, small):
    with pytest.raises(CheckpointError, match=words):
        latenttrain.fit(codes, **{**small, "epochs": 5, **change}, out=whole[0], resume=True)


def test_resuming_on_another_dataset_is_refused(whole, make_dataset, small):
    other = make_dataset(rows={"train": 199, "val": 70})
    with pytest.raises(CheckpointError, match="manifest_sha256"):
        latenttrain.fit(other, **{**small, "epochs": 5}, out=whole[0], resume=True)


def test_a_run_in_the_way_is_kept_unless_asked(codes, tmp_path, small):
    out = tmp_path / "run"
    latenttrain.fit(codes, **{**small, "epochs": 2}, out=out)
    with pytest.raises(CheckpointError, match="already holds a run") as caught:
        latenttrain.fit(codes, **{**small, "epochs": 1}, out=out)
    assert "resume" in caught.value.hint
    assert len(metrics(out)) == 2
    latenttrain.fit(codes, **{**small, "epochs": 1}, out=out, overwrite=True)
    assert len(metrics(out)) == 1


def test_a_folder_of_something_else_is_never_overwritten(codes, tmp_path, small):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        latenttrain.fit(codes, **small, out=tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        latenttrain.fit(codes, **small, out=tmp_path / "thesis.tex", overwrite=True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is not a run folder"):
        latenttrain.fit(codes, **small, out=tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "config.json"}


def test_what_else_lies_in_an_overwritten_run_stays(codes, tmp_path, small):
    latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_mistake_leaves_the_run_it_would_overwrite(codes, tmp_path, make_dataset, small):
    out = tmp_path / "run"
    latenttrain.fit(codes, **{**small, "epochs": 1}, out=out)
    for bad in ({"lr": math.nan}, {"width": 1e9}, {"limit": 0}, {"device": "tpu"}):
        with pytest.raises(UsageError):
            latenttrain.fit(codes, **{**small, **bad}, out=out, overwrite=True)
    assert len(metrics(out)) == 1


def test_two_runs_cannot_share_a_folder(codes, tmp_path, small):
    from latentprep.storage.atomic import locked

    latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(CheckpointError, match="being written by another latenttrain fit"):
        latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "run", overwrite=True)
    assert len(metrics(tmp_path / "run")) == 1


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_it_had(codes, tmp_path, monkeypatch, small):
    out = tmp_path / "run"
    honest = torch.nn.functional.cross_entropy
    calls = 0

    def failing(*arguments, **options):
        nonlocal calls
        calls += 1
        return honest(*arguments, **options) * (math.nan if calls > 10 else 1)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", failing)
    words = r"became NaN or infinite in epoch 2 at lr [\d.]+; earlier epochs are kept"
    with pytest.raises(UsageError, match=words) as caught:
        latenttrain.fit(codes, **small, out=out)
    assert "lower lr" in caught.value.hint
    assert len(metrics(out)) == 1
    assert load_tensors(out / "best.safetensors")[1]["epoch"] == 1


def test_an_absurd_learning_rate_ends_in_that_error(codes, tmp_path, small):
    with pytest.raises(UsageError, match="became NaN or infinite in epoch 1 at lr 1e\\+30"):
        latenttrain.fit(codes, **{**small, "lr": 1e30}, out=tmp_path / "run")


def test_fewer_samples_than_a_batch_train(codes, tmp_path, small):
    result = latenttrain.fit(codes, **{**small, "batch_size": 512, "limit": 20}, out=tmp_path / "run")
    assert result.epochs == 3


def test_mirroring_is_on_where_the_codec_has_an_exact_mirror(codes, make_dataset, tmp_path, small):
    latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "a")
    assert not read_config(tmp_path / "a").augment.mirror
    latenttrain.fit(make_dataset(flip=(1, -1, 1)), **{**small, "epochs": 1}, out=tmp_path / "b")
    augment = read_config(tmp_path / "b").augment
    assert augment.mirror
    assert augment.mirror_signs == (1, -1, 1)


def test_a_dataset_of_several_views_trains(make_dataset, tmp_path, small):
    latenttrain.fit(make_dataset(views=3), **{**small, "epochs": 1}, out=tmp_path / "run")


def test_an_open_dataset_and_the_default_folder(codes, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    result = latenttrain.fit(open_dataset(codes), **{**small, "epochs": 1}, seed=4, stem="ordinal")
    assert result.run == os.path.join("runs", "codes-w0.25-d0.5-s4-ordinal")  # noqa: PTH118 - what the user reads
    assert (tmp_path / result.run / "best.safetensors").is_file()


def test_no_cuda_here_is_said(codes, tmp_path, small):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(SystemFault, match="device 'cuda' is not available"):
        latenttrain.fit(codes, **{**small, "device": "cuda"}, out=tmp_path / "run")


def test_the_learning_rate_rises_then_falls_to_zero():
    recipe = Recipe(epochs=10, lr=0.01, warmup=0.1)
    rates = [recipe.lr_at(step, 20) for step in range(200)]
    assert rates[0] == pytest.approx(0.01 / 20)
    assert max(rates) == rates[20] == rates[19] == 0.01
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-5


def test_a_recipe_survives_json():
    recipe = Recipe(epochs=3, lr=0.1, seed=9)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recipes_fields_may_be_given_as_such():
    recipe = make_recipe({"weight_decay": 0.1, "ema": 0.9}, epochs=3, lr=None)
    assert recipe == Recipe(weight_decay=0.1, ema=0.9, epochs=3, lr=default_lr(64, 3))
    assert make_recipe({"lr": 0.2}).lr == 0.2
    for wrong, words in (
        ({"weight_dekay": 0.1}, "did you mean weight_decay"),
        ({"epochs": 4}, "recipe sets epochs, which is also set by itself"),
        ({"weight_decay": -1}, "weight_decay must be a number of 0 or more, got -1"),
    ):
        with pytest.raises(UsageError, match=words):
            make_recipe(wrong, epochs=3)


def test_a_runs_configuration_is_whole_from_the_start_and_read_only(codes, tmp_path, small):
    latenttrain.fit(codes, **{**small, "epochs": 1}, limit=100, out=tmp_path / "run")
    config = read_config(tmp_path / "run")
    assert [config.dataset[name] for name in ("limit", "holdout", "latents", "stream")] == [100, None, None, None]
    planned = plan_run(open_dataset(codes), config.recipe, config.net, limit=100)
    assert planned == config
    for fields in (planned.dataset, planned.versions):
        with pytest.raises(TypeError):
            fields["limit"] = 3


def test_larger_batches_and_shorter_runs_get_a_higher_rate():
    assert default_lr(512, 15) == pytest.approx(2 * default_lr(128, 15), rel=1e-3)
    assert default_lr(64, 8) == pytest.approx(default_lr(64, 16) * 2**0.8, rel=1e-3)
    assert make_recipe().lr == make_recipe(epochs=15, batch_size=64).lr == default_lr(64, 15)
    assert make_recipe(epochs=40, batch_size=32).lr == default_lr(32, 40)
    assert make_recipe("talk", epochs=5).lr == 0.001


def test_few_samples_are_seen_more_often_in_smaller_batches():
    for samples, epochs, batch_size in ((10, 150, 32), (300, 84, 32), (3000, 27, 64), (9469, 15, 64), (10**6, 15, 64)):
        recipe = make_recipe(samples=samples)
        assert (recipe.epochs, recipe.batch_size) == (epochs, batch_size)
        assert recipe.lr == pytest.approx(0.045 * (batch_size / 64) ** 0.5, rel=1e-4)
        assert (
            make_recipe(samples=samples, epochs=2 * epochs).lr < recipe.lr < make_recipe(samples=samples, epochs=2).lr
        )
        assert make_recipe(samples=samples, epochs=1).lr <= 0.4
    assert make_recipe("talk", 300).epochs == 20
    assert make_recipe(samples=300, epochs=3, batch_size=64).batch_size == 64
    assert [preset_settings(name, 9469)["epochs"] for name in (None, "fast", "best")] == [None, 9, 40]
    assert [preset_settings(name, 300)["epochs"] for name in (None, "fast", "best")] == [None, 50, 224]


def test_fit_counts_the_samples_that_it_trains_on(codes, tmp_path, small):
    settings = {**small, "epochs": None, "batch_size": None}
    stopped = {"progress": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)}
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(codes, **settings, limit=100, holdout=0.2, out=tmp_path / "run", **stopped)
    recipe = read_config(tmp_path / "run").recipe
    assert (recipe.epochs, recipe.batch_size) == (make_recipe(samples=80).epochs, 32)


def test_true_crops_take_the_place_of_zoom(make_dataset, tmp_path, small):
    zooms = []
    for views in (1, 2):
        codes = make_dataset(f"views{views}", views=views, rows={"train": 40, "val": 10})
        latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / f"run{views}")
        zooms.append(read_config(tmp_path / f"run{views}").augment.zoom)
    assert zooms == [Augment().zoom, 0.0]
    assert zooms[0] > 0


def test_metrics_for_tensorboard(codes, tmp_path, small):
    """Every epoch once, also after resuming."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    latenttrain.fit(codes, out=tmp_path / "run", tensorboard=True, **small)
    (tmp_path / "run" / "tensorboard" / "notes.txt").write_text("mine")
    latenttrain.fit(codes, out=tmp_path / "run", overwrite=True, tensorboard=True, **small)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    found = [
        (event.step, value.tag, value.tensor.float_val[0])
        for event in loader.EventFileLoader(str(events)).Load()
        for value in event.summary.value
    ]
    logged = [value for _, tag, value in found if tag == "val_loss"]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx([entry["val_loss"] for entry in metrics])
    assert [step for step, tag, _ in found if tag == "top1"] == [entry["epoch"] for entry in metrics]
