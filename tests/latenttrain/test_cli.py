import json
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

MODULES = "import sys; from latenttrain import cli; print(*sys.modules)"


@pytest.fixture(scope="module")
def run(codes, tmp_path_factory):
    import latenttrain

    out = tmp_path_factory.mktemp("runs") / "run"
    latenttrain.fit(codes, width=0.25, depth=0.5, epochs=2, batch_size=32, device="cpu", out=out)
    return out


def test_fit_prints_one_table_and_where_things_are(latenttrain, codes, tmp_path, small_options):
    code, out, err = latenttrain("fit", codes, *small_options, "--out", tmp_path / "run")
    assert code == 0
    for word in (
        "top-1",
        "top-5",
        "params",
        "FLOPs",
        "s/epoch",
        "samples/s",
        ", best",
        "3, last",
    ):
        assert word in out
    assert str(tmp_path / "run" / "curve.png") in out
    assert "epoch 3/3: loss" in err


def test_json_is_all_there_is_on_stdout(latenttrain, codes, run, tmp_path, monkeypatch, small_options):
    code, out, _ = latenttrain("fit", codes, *small_options, "--out", tmp_path / "run", "--json")
    assert (code, json.loads(out)["epochs"]) == (0, 3)
    code, out, _ = latenttrain("eval", run, codes, "--json")
    assert (code, json.loads(out)["samples"]) == (0, 70)


def test_eval_prints_every_class(latenttrain, codes, run):
    code, out, _ = latenttrain("eval", run, codes, "--checkpoint", "last", "--split", "train")
    assert code == 0
    assert "200 samples" in out
    assert all(name in out for name in ("all", "apple", "birch", "cedar", "daisy"))


def test_predict_names_what_it_cannot_read_and_ends_with_3(latenttrain, run, tmp_path, monkeypatch):
    class Codec:
        def encode(self, images):
            return torch.nn.functional.avg_pool2d(images.float(), 8) / 64 - 2

    monkeypatch.setattr("latentprep.codecs.codec_from_config", lambda config, **options: Codec())
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    Image.new("RGB", (90, 70), "teal").save(good)
    bad.write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    code, out, err = latenttrain("predict", run, good, "--top", "2")
    assert code == 0
    assert out.count("%") == 2
    code, out, err = latenttrain("predict", run, bad, good)
    assert code == 3
    assert "good.png" in out
    assert "bad.jpg: not an image that can be read" in err
    code, _, err = latenttrain("predict", run, tmp_path, "https://example.org/x.jpg")
    assert code == 3
    assert f"{tmp_path}: a folder; give the image files in it" in err
    assert "https://example.org/x.jpg: a URL; download it, and give the path" in err
    code, out, _ = latenttrain("predict", run, bad, good, "--json")
    first, second = json.loads(out)["predictions"]
    assert (code, "error" in first, len(second["classes"])) == (3, True, 4)


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(latenttrain, codes, tmp_path, monkeypatch, small_options):
    monkeypatch.setattr("latenttrain.train.train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = latenttrain("fit", codes, *small_options, "--out", tmp_path / "run")
    assert code == 130
    assert "--resume" in err


BAD_FIT = [
    (["--lr", "nan"], 2, "--lr must be a number above 0, got nan"),
    (["--lr", "-0.1"], 2, "got -0.1"),
    (["--lr", "0"], 2, "got 0"),
    (["--lr", "inf"], 2, "got inf"),
    (["--lr", "quick"], 2, "--lr"),
    (["--width", "0"], 2, "width must be"),
    (["--width", "nan"], 2, "width must be"),
    (["--depth", "1000"], 2, "depth must be"),
    (["--epochs", "0"], 2, "--epochs must be a whole number from 1"),
    (["--batch-size", "1"], 2, "--batch-size must be a whole number from 2"),
    (["--batch-size", "0"], 2, "--batch-size must be"),
    (["--seed", "-1"], 2, "seed must be"),
    (["--limit", "1"], 2, "--limit must be a whole number of 2 or more"),
    (["--device", "abacus"], 2, "unknown device 'abacus'"),
    (["--device", "meta"], 2, "unknown device 'meta'"),
    (["--device", "cuda:99"], 8, "device 'cuda:99' is not available"),
    (["--recipe", "tolk"], 2, "did you mean talk"),
    (["--resume", "--overwrite"], 2, "--resume and --overwrite cannot be combined"),
]


@pytest.mark.parametrize(("options", "code", "words"), BAD_FIT, ids=lambda value: str(value)[:40])
def test_bad_options_of_fit_are_one_line_and_touch_nothing(
    latenttrain, codes, tmp_path, options, code, words, small_options
):
    found, out, err = latenttrain("fit", codes, *small_options, "--out", tmp_path / "run", *options)
    assert found == code
    assert words in err
    assert "Traceback" not in err
    assert not out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": {"train": 64}}, "no split 'val'"),
        ({"classes": ["apple"]}, "one class only"),
        ({"skip": ("train", 0)}, "are missing"),
    ],
)
def test_bad_datasets_end_with_6(latenttrain, make_dataset, tmp_path, changes, words):
    code, _, err = latenttrain("fit", make_dataset(**changes), "--out", tmp_path / "run")
    assert (code, words in err, "hint:" in err) == (6, True, True)


def test_what_is_no_dataset_ends_with_6(latenttrain, run, codes, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    for path in (tmp_path / "nowhere", run, tmp_path, codes / "manifest.json"):
        code, _, err = latenttrain("fit", path, "--out", tmp_path / "run")
        assert (code, err.startswith("error: ")) == (6, True)


def test_checkpoints_that_do_not_fit_end_with_7(latenttrain, run, codes, make_dataset):
    assert latenttrain("eval", codes, codes)[0] == 7
    code, _, err = latenttrain("eval", run, make_dataset(bits=3))
    assert (code, "quantizer.bits is 3, but the network was trained with 4" in err) == (7, True)
    assert latenttrain("predict", codes, "x.jpg")[0] == 7
    assert latenttrain("fit", codes, "--out", run)[0] == 7


def test_a_full_disk_is_one_line_and_ends_with_8(latenttrain, codes, tmp_path, monkeypatch, small_options):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("latenttrain.checkpoint.write_atomic", full)
    code, _, err = latenttrain("fit", codes, *small_options, "--out", tmp_path / "run")
    assert (code, "no space left on device" in err) == (8, True)


def test_every_option_has_help(latenttrain):
    import typer.main

    from latenttrain.cli import app

    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for option in command.params:
            assert getattr(option, "help", None), f"{name} {option.name}"


@pytest.mark.parametrize("command", ["fit", "sweep", "report"])
def test_help_fits_on_a_screen_and_options_are_few(latenttrain, monkeypatch, command):
    import typer.main

    from latenttrain.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = latenttrain(command, "--help")
    assert (code, len(out.rstrip().splitlines()) <= 50) == (0, True)
    options = [p for p in typer.main.get_command(app).commands[command].params if p.param_type_name == "option"]
    assert len(options) <= 23
    for option in options:
        assert f"--{option.name.removeprefix('as_').replace('_', '-')}" in out


def test_help_needs_no_torch_and_under_a_second(latenttrain):
    start = time.perf_counter()
    command = [sys.executable, "-c", "from latenttrain.cli import main; main()", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 2  # twice the goal: tests run beside others
    assert all(name in shown for name in ("fit", "eval", "predict"))
    loaded = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "zarr", "numpy", "matplotlib", "diffusers"} & set(loaded)


def test_training_needs_no_codec_and_no_diffusers():
    script = "import sys, latenttrain; latenttrain.fit, latenttrain.evaluate, latenttrain.predict; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "diffusers" not in loaded
    ours = {name for name in loaded if name.startswith("latentprep.")}
    assert {name.split(".")[1] for name in ours} == {
        "format", "storage", "errors", "progress", "device", "text", "pictures",
    }  # fmt: skip
    assert {name for name in ours if "pictures." in name} == {"latentprep.pictures.plots"}


def test_version(latenttrain):
    assert latenttrain("--version")[1].startswith("latenttrain 0.")
