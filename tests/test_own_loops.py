"""The examples of training loops of one's own, run on a few `shapes`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import latentprep

EXAMPLES = Path(__file__).parent.parent / "examples"
Example = Callable[..., str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops")
    latentprep.encode("shapes", codec="dct:luma=6,chroma=3", size=64, bits=8, limit=60, out=folder / "shards")
    return folder / "shards"


@pytest.fixture
def example(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Example:
    """``example(name, *options)`` -> the last line that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(shards), *map(str, options)])
        capfd.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out.strip().splitlines()[-1]

    return run


def test_a_plain_loop_goes_on_where_it_was_interrupted(example: Example) -> None:
    weights = []
    for path, stops in (("whole.pt", (3,)), ("parts.pt", (1, 3))):
        for epochs in stops:
            torch.manual_seed(0)
            last = example("plain_loop.py", "--epochs", epochs, "--checkpoint", path)
        assert last.startswith("epoch 3: val top-1 ")
        weights.append(torch.load(path, weights_only=True)["net"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_on_batches(example: Example) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    assert example("lightning_loop.py", "--epochs", 2).startswith("val top-1 ")


@pytest.mark.filterwarnings("ignore")
def test_a_diffusion_model_is_sampled_through_the_codec(example: Example) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    small = ("--steps", 3, "--channels", 8, "--denoising", 2, "--samples", 2)
    assert example("diffusion.py", *small) == "wrote samples.png, 2 pictures"
    with Image.open("samples.png") as picture:
        assert picture.size == (128, 64)
