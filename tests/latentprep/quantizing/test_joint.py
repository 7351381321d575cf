"""Codes that are chosen together, and the filter that goes with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import latentprep
from latentprep.audit.info import info
from latentprep.cli.commands import app
from latentprep.errors import DatasetError, UsageError
from latentprep.format import Quantizer
from latentprep.quantizing.joint import search
from latentprep.quantizing.scalar import dequantize, fit_quantizer, quantize, quantize_counting
from latentprep.sources.source import open_source
from pictures import make_folder


def smooth(count: int, channels: int = 3, side: int = 17, seed: int = 0) -> torch.Tensor:
    """Latents whose neighbours are alike, as those of pictures are, f32 [B,C,h,w]; channels differ in scale."""
    noise = torch.randn(count, channels, side + 4, side + 4, generator=torch.Generator().manual_seed(seed))
    wide = F.avg_pool2d(noise, 5, 1) * 4 + 0.3 * noise[..., 2:-2, 2:-2]
    scales = torch.arange(1.0, channels + 1).view(-1, 1, 1)
    return wide * scales + 2 * scales


def error(latents: torch.Tensor, quantizer: Quantizer) -> float:
    scale = torch.tensor(quantizer.step).view(-1, 1, 1)
    return float((((latents - dequantize(quantize(latents, quantizer), quantizer)) / scale) ** 2).mean())


@pytest.mark.parametrize(("bits", "gain"), [(1, 2.0), (2, 1.5), (4, 0.6)])
def test_comes_nearer_to_latents_it_was_not_fitted_to(bits: int, gain: float) -> None:
    learned, unseen = smooth(64), smooth(32, seed=1)
    plain, joint = fit_quantizer(learned, bits), fit_quantizer(learned, bits, joint=True)
    assert 10 * np.log10(error(unseen, plain) / error(unseen, joint)) > gain


@settings(max_examples=10, deadline=None)
@given(bits=st.integers(1, 5), channels=st.integers(1, 4), side=st.integers(8, 13), seed=st.integers(0, 99))
def test_no_single_code_could_be_better(bits: int, channels: int, side: int, seed: int) -> None:
    """The search ends where, but for the border and few last moves, each code is the best while the others stay."""
    latents = smooth(4, channels, side, seed)
    quantizer = fit_quantizer(latents, bits, joint=True)
    codes = quantize(latents, quantizer)
    weights = 1 / torch.tensor(quantizer.step).view(-1, 1, 1)

    def squared(some: torch.Tensor) -> torch.Tensor:
        return (((latents - dequantize(some, quantizer)) * weights) ** 2).sum((1, 2, 3))

    found, better, tried = squared(codes), 0, 0
    draw = np.random.default_rng(seed)
    for _ in range(60):
        channel, row, column = draw.integers(channels), *draw.integers(1, side - 1, 2)
        for move in (-1, 1):
            other = codes.long()
            other[:, channel, row, column] += move
            allowed = (other >= 0).all() & (other < quantizer.levels).all()
            if allowed:
                tried += len(codes)
                better += int((squared(other.to(torch.uint8)) < found - 1e-4).sum())
    assert better <= 0.03 * max(tried, 34)


def test_a_filter_that_does_nothing_is_plain_rounding() -> None:
    latents = smooth(8)
    plain = fit_quantizer(latents, 3)
    kernel = torch.zeros(3, 3, 3, 3)
    kernel[range(3), range(3), 1, 1] = 1
    neutral = Quantizer(plain.bits, plain.lo, plain.step, tuple(kernel.flatten().tolist()))
    codes = quantize(latents, plain)
    assert (search(latents, neutral) == codes).float().mean() > 0.9999  # a tie may fall to either side
    assert torch.allclose(dequantize(codes, neutral), dequantize(codes, plain), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 2, 5), (1, 3, 3), (2, 4, 2)])
def test_small_grids_and_constant_channels(shape: tuple[int, int, int]) -> None:
    latents = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    latents[:, 0] = 5.0
    quantizer = fit_quantizer(latents, 2, joint=True)
    assert all(map(np.isfinite, quantizer.filter))
    codes = quantize(latents, quantizer)
    assert codes.max() < 4
    assert (dequantize(codes, quantizer)[:, 0] - 5).abs().max() < 0.1


def test_samples_do_not_depend_on_each_other_and_bad_ones_harm_no_others() -> None:
    latents = smooth(8)
    quantizer = fit_quantizer(latents, 2, joint=True)
    codes = quantize(latents, quantizer)
    assert torch.equal(torch.cat([quantize(one, quantizer) for one in latents.split(3)]), codes)
    latents[3, 1, 4, 4] = torch.nan
    found, _, finite = quantize_counting(latents, quantizer)
    assert finite.tolist() == [True] * 3 + [False] + [True] * 4
    assert torch.equal(found[finite], codes[finite])


def test_numpy_restores_what_torch_restores() -> None:
    latents = smooth(4)
    quantizer = fit_quantizer(latents, 2, joint=True)
    codes = quantize(latents, quantizer)
    ours = quantizer.dequantize(codes.numpy())
    assert np.allclose(ours, dequantize(codes, quantizer).numpy(), atol=1e-5)
    assert np.array_equal(quantizer.dequantize(codes.numpy()[:, None])[:, 0], ours)  # any leading axes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("joint") / "images", train=12, val=4)


def encode(images: Path, out: Path, **options) -> latentprep.LatentDataset:
    latentprep.encode(images, out=out, **{"codec": "resample", "size": 64, "bits": 2, "shard_rows": 8, **options})
    return latentprep.open(out)


def test_encode_resume_and_refusals(images: Path, tmp_path: Path) -> None:
    plain, joint = encode(images, tmp_path / "plain", joint=False), encode(images, tmp_path / "joint")
    assert plain.manifest.flip == joint.manifest.flip == (1, 1, 1)  # of latents, whatever codes stand for them
    assert not plain.quantizer.filter and len(joint.quantizer.filter) == 81
    whole = {path: path.read_bytes() for path in (tmp_path / "joint").rglob("*") if path.is_file()}
    (tmp_path / "joint" / "records" / "train-000001.json").unlink()
    encode(images, tmp_path / "joint")
    assert {path: path.read_bytes() for path in (tmp_path / "joint").rglob("*") if path.is_file()} == whole
    with pytest.raises(DatasetError, match="joint is True, but False was requested") as refused:
        encode(images, tmp_path / "joint", joint=False)
    assert "joint=True" in (refused.value.hint or "")
    taken = encode(images, tmp_path / "taken", quantizer=tmp_path / "joint")
    assert taken.quantizer == joint.quantizer
    assert np.array_equal(taken.load("val").codes, joint.load("val").codes)
    with pytest.raises(UsageError, match="takes up to 32 channels"):
        encode(images, tmp_path / "wide", codec="dct:luma=40", joint=True)
    assert latentprep.verify(tmp_path / "joint", source=open_source(images)).ok
    first, other = (images / "train" / name / "000.jpg" for name in ("class_0", "class_1"))
    kept = first.read_bytes()
    first.write_bytes(other.read_bytes())
    found = latentprep.verify(tmp_path / "joint", source=open_source(images))
    first.write_bytes(kept)
    assert [(problem.split, problem.index) for problem in found.problems] == [("train", 0)]


@pytest.mark.parametrize(
    ("codec", "bits", "joint"),
    [("scatter", 1, True), ("scatter", 2, True), ("scatter", 3, False), ("scatter", 1.5, False), ("dct", 1, False)],
)
def test_by_default_where_the_codec_says_so(images: Path, tmp_path: Path, codec: str, bits: float, joint: bool) -> None:
    eight = {"codec": codec, "bits": 8, "equal_bits": True, "limit": 8}
    direct = encode(images, tmp_path / "direct", **{**eight, "bits": bits, "equal_bits": None})
    encode(images, tmp_path / "eight", **eight)
    fewer = latentprep.requantize(tmp_path / "eight", bits=bits, out=tmp_path / "fewer")
    assert direct.manifest.joint == fewer.joint == bool(direct.quantizer.filter) == joint
    assert direct.manifest.flip is not None


def test_requantize_chooses_jointly_and_restores_joint_codes(images: Path, tmp_path: Path) -> None:
    eight = encode(images, tmp_path / "eight", bits=8)
    latents = eight.quantizer.dequantize(eight.load("train").codes)

    def snr(folder: str, joint: bool, source: str = "eight", bits: int = 1) -> float:
        latentprep.requantize(tmp_path / source, bits=bits, joint=joint, out=tmp_path / folder)
        made = latentprep.open(tmp_path / folder)
        assert bool(made.quantizer.filter) == joint
        found = made.quantizer.dequantize(made.load("train").codes)
        return float(10 * np.log10(latents.var() / ((found - latents) ** 2).mean()))

    assert snr("joint", True) > snr("plain", False) + 1
    four = snr("four", True, bits=4)
    assert four > snr("plain-four", False, bits=4)
    assert snr("two", False, source="four", bits=2) > snr("plain-two", False, bits=2) - 0.5
    direct = encode(images, tmp_path / "direct", bits=1, joint=True)
    found = direct.quantizer.dequantize(direct.load("train").codes)
    assert snr("again", True) == pytest.approx(10 * np.log10(latents.var() / ((found - latents) ** 2).mean()), abs=0.3)


def test_command_line(images: Path, tmp_path: Path) -> None:
    words = f"encode {images} --codec resample --size 64 --bits 1 --joint --out {tmp_path}"
    run = CliRunner().invoke(app, words.split())
    assert run.exit_code == 0, run.output
    assert "1 bit (joint)" in run.output
    assert info(tmp_path).joint
    shown = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert "1 bit, chosen jointly" in shown.output


@pytest.mark.parametrize("weights", [[0.0] * 80, [float("nan")] * 81, "x", [[1.0]]])
def test_a_damaged_filter_is_refused(images: Path, tmp_path: Path, weights) -> None:
    encode(images, tmp_path / "joint", joint=True)
    manifest = json.loads((tmp_path / "joint" / "manifest.json").read_text())
    manifest["quantizer"]["filter"] = weights
    (tmp_path / "joint" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError):
        latentprep.open(tmp_path / "joint")
