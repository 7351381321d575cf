from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import latentprep
from latentprep.derived.requantize import code_table
from latentprep.errors import DatasetError, UsageError
from latentprep.format import Quantizer
from latentprep.quantizing.scalar import quantize
from pictures import make_folder


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 8 bits with two views and one invalid sample."""
    root = tmp_path_factory.mktemp("eight")
    images = make_folder(root / "images", train=20, val=4)
    (images / "train" / "class_1" / "003.jpg").write_bytes(b"junk")
    latentprep.encode(images, codec="dct", size=32, bits=8, views=2, shard_rows=16, out=root / "data")
    return root


def snr(codes: np.ndarray, quantizer: Quantizer, reference: np.ndarray) -> float:
    return float(10 * np.log10(reference.var() / np.mean((quantizer.dequantize(codes) - reference) ** 2)))


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_as_good_as_encoding_at_fewer_bits(eight: Path, tmp_path: Path, bits: int) -> None:
    result = latentprep.requantize(eight / "data", bits=bits, out=tmp_path / "few")
    latentprep.encode(
        eight / "images", codec="dct", size=32, bits=bits, views=2, shard_rows=16, out=tmp_path / "direct"
    )
    source, few, direct = (latentprep.open(p) for p in (eight / "data", tmp_path / "few", tmp_path / "direct"))
    assert result.bits == few.quantizer.mean_bits == pytest.approx(bits, abs=1 / 16)
    ours, theirs, original = (d.load("train") for d in (few, direct, source))
    assert ours.keys == theirs.keys == original.keys
    assert np.array_equal(ours.labels, theirs.labels)
    latents = source.quantizer.dequantize(original.codes)
    assert snr(ours.codes, few.quantizer, latents) > snr(theirs.codes, direct.quantizer, latents) - 0.2
    assert few.records("train")[1].invalid == direct.records("train")[1].invalid
    assert (tmp_path / "few" / "errors.jsonl").read_bytes() == (tmp_path / "direct" / "errors.jsonl").read_bytes()
    if bits <= 4:
        ours_saturated, direct_saturated = (np.sum([r.saturated for r in d.records("train")]) for d in (few, direct))
        assert ours_saturated == pytest.approx(direct_saturated, rel=0.25)


def test_a_code_table_is_dequantizing_then_quantizing() -> None:
    source, target = Quantizer(6, (-1.0, 3.0), (0.1, 0.5)), Quantizer(2, (-0.5, 4.0), (1.0, 6.0))
    table, outside = code_table(source, target)
    codes = np.random.default_rng(0).integers(0, 64, (5, 2, 3, 3), dtype=np.uint8)
    expected = quantize(torch.from_numpy(source.dequantize(codes)), target).numpy()
    for channel in range(2):
        assert np.array_equal(table[channel][codes[:, channel]], expected[:, channel])
    assert outside[0].sum() == 5 + 19  # -0.95 … -0.55 lie below -0.5, 3.55 … 5.35 above 3.5


def test_resume_and_refusals(eight: Path, tmp_path: Path) -> None:
    out = tmp_path / "few"
    first = latentprep.requantize(eight / "data", bits=3, out=out)
    assert first.encoded == 48
    (out / "records" / "train-000001.json").unlink()
    assert latentprep.requantize(eight / "data", bits=3, out=out).encoded == 16
    (out / "val" / "codes" / "c" / "0" / "0" / "0" / "0" / "0").unlink()
    assert latentprep.requantize(eight / "data", bits=3, out=out).encoded == 8
    assert latentprep.verify(out, deep=True).ok
    with pytest.raises(DatasetError, match="bits is 3, but 2 was requested"):
        latentprep.requantize(eight / "data", bits=2, out=out)
    with pytest.raises(UsageError, match="would gain nothing"):
        latentprep.requantize(eight / "data", bits=8, out=tmp_path / "x")
    with pytest.raises(UsageError, match="is the dataset itself"):
        latentprep.requantize(eight / "data", bits=2, out=eight / "data")
    with pytest.raises(UsageError, match="bits must be a number from 0.25 to 8"):
        latentprep.requantize(eight / "data", bits=0, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
