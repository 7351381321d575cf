"""`train_codec`: what it writes, that a killed run goes on to the same weights, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentprep
from inprocess import command
from latentprep.codecs.learned import CONFIG, WEIGHTS, read_config
from latentprep.device import one_thread_each
from latentprep.errors import CodecError, Interrupted, SourceError, UsageError
from latentprep.learning import start, train, trainer
from latentprep.learning.crops import Crops, crop_side, load_images
from latentprep.pictures.rd import Point
from latentprep.progress import silent
from pictures import make_folder, picture

SMALL: dict[str, Any] = {"steps": 4, "size": 32, "channels": 4, "device": "cpu"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks, and no report, which has a test of its own."""
    for name, value in (("ENCODER", (8, 16, 16)), ("DECODER", (8, 16, 16)), ("DECODER_BLOCKS", (1, 1, 1))):
        monkeypatch.setattr(start, name, value)
    monkeypatch.setattr(train, "_BATCH", 8)
    monkeypatch.setattr(train, "_FIRST", 1)
    monkeypatch.setattr(train, "_report", lambda *_: (None, None, None))


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """The run's next attempt at this step ends it, after a state was saved at each step before."""
    real = trainer.Trainer.advance

    def advance(self: trainer.Trainer, *args: Any) -> tuple[float, float]:
        if self.step == step:
            raise error
        return real(self, *args)

    monkeypatch.setattr(train, "_SAVED", -1.0)
    monkeypatch.setattr(trainer.Trainer, "advance", advance)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemError])
def test_a_killed_run_goes_on_to_the_same_weights(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    latentprep.train_codec(images, out=tmp_path / "whole", **SMALL)
    with monkeypatch.context() as patch:
        killed_at(3, patch, error)
        with pytest.raises((Interrupted, SystemError)):
            latentprep.train_codec(images, out=tmp_path / "killed", **SMALL)
    assert not (tmp_path / "killed" / CONFIG).exists()
    with pytest.raises(CodecError, match="holds a codec with seed=0"):
        latentprep.train_codec(images, out=tmp_path / "killed", seed=1, **SMALL)
    latentprep.train_codec(images, out=tmp_path / "killed", **SMALL)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not (tmp_path / "killed" / train.STATE).exists()


def test_weights_do_not_depend_on_the_number_of_threads(images: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            latentprep.train_codec(images, out=tmp_path / str(threads), **SMALL)
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_a_damaged_state_is_refused_in_a_line(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_at(2, patch, KeyboardInterrupt)
        with pytest.raises(Interrupted, match="after 2 of 4 steps"):
            latentprep.train_codec(images, out=tmp_path / "run", **SMALL)
    state = tmp_path / "run" / train.STATE
    good = state.read_bytes()
    for data in (
        b"",
        good[:-1],
        good[:50],
        good.replace(b"mean.", b"maan."),
        good.replace(b"log_weight", b"log_height"),
    ):
        state.write_bytes(data)
        with pytest.raises(CodecError, match="is damaged"):
            latentprep.train_codec(images, out=tmp_path / "run", **SMALL)
    state.write_bytes(good)
    assert latentprep.train_codec(images, out=tmp_path / "run", **SMALL).steps == 4


def test_a_complete_codec_is_kept_and_another_refused(images: Path, tmp_path: Path) -> None:
    first = latentprep.train_codec(images, out=tmp_path / "run", **SMALL)
    assert first.codec == f"learned:weights={tmp_path / 'run'}"
    before = files(tmp_path / "run")
    assert latentprep.train_codec(images, out=tmp_path / "run", **SMALL).images == first.images
    with pytest.raises(CodecError, match=r"holds a codec with bits=1\.0.*overwrite=True"):
        latentprep.train_codec(images, out=tmp_path / "run", bits=2.0, **SMALL)
    latentprep.train_codec(images, out=tmp_path / "run", bits=2.0, overwrite=True, **SMALL)
    assert files(tmp_path / "run") != before
    document = read_config(tmp_path / "run")
    assert document["bits"] == 2.0
    assert document["licence"]
    assert document["origin"].endswith("for 4 steps")


def test_training_that_diverges_ends_in_a_line(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Trainer, "advance", lambda *_: (math.nan, 1.0))
    with pytest.raises(CodecError, match="training diverged"):
        latentprep.train_codec(images, out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run" / CONFIG).exists()


def test_minutes_become_a_number_of_steps_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**SMALL, "steps": None, "minutes": 1e-4}
    monkeypatch.setattr(train, "_steps_in", lambda *_: 3)
    with monkeypatch.context() as patch:
        killed_at(2, patch, KeyboardInterrupt)
        with pytest.raises(Interrupted, match="after 2 of 3 steps"):
            latentprep.train_codec(images, out=tmp_path / "run", **asked)
    monkeypatch.setattr(train, "_steps_in", lambda *_: 1 / 0)
    assert latentprep.train_codec(images, out=tmp_path / "run", **asked).steps == 3


def test_steps_are_clocked_on_a_copy(images: Path) -> None:
    pixels = np.stack([picture(i, 32, 32) for i in range(4)])
    crops = Crops(pixels, 32, 4)
    networks, of, scales = start.started(crops.draw(0, 0)[0], 4, 8, 1.0, 0)
    zeros = torch.nn.Parameter(torch.zeros(4))
    run_ = trainer.Trainer(of, networks, zeros, torch.nn.Parameter(scales.log()), crops, 1.0, 0, torch.device("cpu"))
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    with one_thread_each(torch.device("cpu")) as pool:
        assert train._steps_in(run_, 60, pool) > 60
    assert run_.step == 0
    assert all(torch.equal(value, before[name]) for name, value in networks.state_dict().items())


def test_the_rate_that_was_asked_for_is_met_and_the_loss_falls(images: Path) -> None:
    pixels = np.stack([picture(i, 64, 64) for i in range(8)])
    crops = Crops(pixels, 32, 4)
    networks, of, scales = start.started(crops.draw(0, 0)[0], 6, 8, 1.5, 0)
    zeros = torch.nn.Parameter(torch.zeros(6))
    run_ = trainer.Trainer(of, networks, zeros, torch.nn.Parameter(scales.log()), crops, 1.5, 0, torch.device("cpu"))
    with one_thread_each(torch.device("cpu")) as pool:
        found = [run_.advance(40, pool) for _ in range(40)]
    assert np.mean([bits for _, bits in found[-10:]]) == pytest.approx(1.5, rel=0.2)
    assert np.mean([error for error, _ in found[-10:]]) < np.mean([error for error, _ in found[:10]])


def test_rate_and_entropy_are_bits() -> None:
    values = torch.arange(-40, 41, dtype=torch.float32)[:, None]
    bits = start.rate(values, torch.zeros(1), torch.tensor([2.0]))
    assert float((2**-bits).sum()) == pytest.approx(1, abs=1e-3)
    assert trainer.entropy(np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx(2)
    assert trainer.entropy(np.zeros(5)) == 0


def test_crops_are_of_the_seed_and_step_alone() -> None:
    crops = Crops(np.stack([picture(i, 64, 64) for i in range(3)]), 32, 16)
    one, other = crops.draw(1, 5)[0], crops.draw(1, 5)[0]
    assert np.array_equal(one, other)
    assert not np.array_equal(one, crops.draw(1, 6)[0])
    assert not np.array_equal(one, crops.draw(2, 5)[0])
    assert one.shape == (16, 3, 32, 32)
    assert [crop_side(size, 8) for size in (224, 64, 32, 72, 8)] == [112, 64, 32, 64, 8]
    assert crop_side(224, 16) == 112


def test_unreadable_images_are_left_out_or_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", train=10)
    first = sorted((folder / "train").rglob("*.jpg"))
    first[0].write_bytes(b"\xff\xd8\xff no image")
    source = latentprep.open_source(folder)
    assert load_images(source, "train", 32, silent).shape == (19, 32, 32, 3)
    for path in first:
        path.write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(SourceError, match="20 of 20 images of split 'train' cannot be read"):
        load_images(source, "train", 32, silent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 5}, "factor must be 4, 8 or 16"),
        ({"channels": 0}, "channels must be a whole number from 1 to 64"),
        ({"factor": 4, "channels": 49}, "from 1 to 48"),
        ({"bits": 0}, "bits must be a number above 0"),
        ({"bits": math.nan}, "bits must be a number"),
        ({"minutes": 1, "steps": 1}, "minutes and steps cannot be combined"),
        ({"minutes": -1}, "minutes must be a number above 0"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"size": 100}, "multiples of 8, got 100"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"device": "abacus"}, "unknown device"),
    ],
)
def test_options_are_checked(images: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        latentprep.train_codec(images, out=tmp_path / "run", **options)


def test_psnr_at_the_same_bytes_is_between_points() -> None:
    points = [Point("dct", bits, size, 0, psnr, None) for bits, size, psnr in ((1, 100, 20.0), (2, 400, 24.0))]
    assert train.at_bytes(points, 200) == pytest.approx(22)
    assert train.at_bytes(points, 50) is None
    assert train.at_bytes(points[:1], 100) is None


def test_the_command_writes_a_codec_and_its_report(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for name, value in (("ENCODER", (8, 16, 16)), ("DECODER", (8, 16, 16)), ("DECODER_BLOCKS", (1, 1, 1))):
        monkeypatch.setattr(start, name, value)
    monkeypatch.setattr(train, "_SCALES", (1.0,))
    out = tmp_path / "my-codec"
    # As many latent values as dct's, so that the report needs one rate.
    words = f"train-codec {images} --out {out} --steps 2 --size 64 --channels 16 --bits 2 --device cpu".split()
    made = json.loads(command("latentprep", *words, "--json").stdout)
    assert (made["steps"], made["images"], made["channels"]) == (2, 12, 16)
    assert made["psnr"] > 10
    for name in ("rd.png", "side-by-side.png", "rd.json"):
        assert (out / "report" / name).is_file()
    shown = command(
        "latentprep", "encode", images, "--codec", made["codec"], "--rate", 1, "--size", 64, "--out", tmp_path / "codes"
    )
    assert "learned" in shown.stdout
