"""`encode --rate` and `--bytes`: what is asked for is met on disk, by one step for all channels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import latentprep
from latentprep.audit.info import info
from latentprep.codecs import make_codec
from latentprep.encoding.calibration import decoded_error
from latentprep.errors import DatasetError, UsageError
from latentprep.quantizing.rate import fit_rate
from latentprep.quantizing.scalar import dequantize, fit_quantizer, quantize


def entropy(codes: torch.Tensor) -> float:
    """Bits per code of an ideal coder that knows each channel's frequencies."""
    bits = 0.0
    for channel in codes.transpose(0, 1):
        share = channel.flatten().bincount().double() / channel.numel()
        bits -= float((share[share > 0] * share[share > 0].log2()).sum())
    return bits / codes.shape[1]


def latents(*deviations: float) -> torch.Tensor:
    """Channels of Laplacian values, f32 [64,C,16,16]"""
    generator = np.random.default_rng(0)
    return torch.tensor(np.stack([generator.laplace(0, d, (64, 16, 16)) for d in deviations], 1), dtype=torch.float32)


def error(z: torch.Tensor, quantizer: latentprep.format.Quantizer) -> float:
    return float((dequantize(quantize(z, quantizer), quantizer) - z).square().mean())


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.5])
def test_the_rate_is_met_with_less_error_than_equal_bits_have(rate: float) -> None:
    z = latents(64, 8, 1, 1)
    quantizer = fit_rate(z, rate, torch.ones(4), entropy)
    assert entropy(quantize(z, quantizer)) == pytest.approx(rate, rel=0.01)
    equal = [fit_quantizer(z, bits) for bits in range(1, 5)]
    cheaper = [error(z, q) for q in equal if entropy(quantize(z, q)) <= rate]
    assert all(error(z, quantizer) < other / 3 for other in cheaper)
    assert quantizer.bits == max(1, int(np.ceil(np.log2(float(quantize(z, quantizer).max()) + 1))))


def test_steps_follow_what_is_decoded() -> None:
    z = latents(1, 1)
    quantizer = fit_rate(z, 2.0, torch.tensor([4.0, 1.0]), entropy)
    assert quantizer.step[1] / quantizer.step[0] == pytest.approx(2, rel=1e-4)
    for channel, lo, step in zip(z.unbind(1), quantizer.lo, quantizer.step, strict=True):
        assert (float(channel.median()) - lo) / step % 1 == pytest.approx(0.5, abs=0.01)  # the middle of a cell


def test_the_error_of_each_channel_in_decoded_pixels() -> None:
    codec = make_codec("dct")
    z = codec.encode(torch.randint(64, 192, (4, 3, 64, 64), dtype=torch.uint8))
    weights = decoded_error(codec, z)
    assert weights.shape == (16,)
    assert float(weights[:10].max() / weights[:10].min()) < 1.1  # orthonormal, all of luminance
    assert decoded_error(make_codec("scatter"), z).tolist() == [1.0] * 17  # texture counts, though it is not decoded


def test_what_is_out_of_reach_says_so() -> None:
    with pytest.raises(UsageError, match="out of reach: these latents take .* at the most"):
        fit_rate(latents(1, 1000), 7.9, torch.ones(2), entropy)
    with pytest.raises(UsageError, match="out of reach: these latents take .* at the least"):
        fit_rate(latents(1), 1e-6, torch.ones(1), lambda codes: 0.01 + entropy(codes))


@pytest.mark.parametrize(
    ("codec", "store", "asked"),
    [("dct", "zarr", {"rate": 0.8}), ("resample", "zarr", {"bytes": 320}), ("resample", "parquet", {"bytes": 400})],
)
def test_a_dataset_has_the_bytes_that_were_asked_for(tmp_path: Path, codec: str, store: str, asked: dict) -> None:
    same = {"codec": codec, "store": store, "size": 64, "limit": 256, "shard_rows": 128, "out": tmp_path / "d"}
    made = latentprep.encode("shapes", **same, **asked)
    values = int(np.prod(made.latent))
    rate = asked.get("rate", asked.get("bytes", 0) * 8 / values)
    assert info(tmp_path / "d").bytes_per_image == pytest.approx(rate * values / 8, rel=0.02)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_bytes())
    assert manifest["rate"] == rate
    assert manifest["quantizer"]["bits"] == made.bits == latentprep.open(tmp_path / "d").quantizer.bits <= 8

    assert latentprep.encode("shapes", **same, **asked).encoded == 0
    with pytest.raises(DatasetError, match=r"rate is .* but 0\.5 was requested"):
        latentprep.encode("shapes", **same, rate=0.5)
    fewer = latentprep.requantize(tmp_path / "d", bits=1, out=tmp_path / "one")
    assert (fewer.bits, latentprep.open(tmp_path / "one").manifest.rate) == (1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1, "bits": 4}, "cannot be combined"),
        ({"rate": 1, "bytes": 400}, "cannot be combined"),
        ({"rate": 0}, "rate must be a number above 0 to 8"),
        ({"bytes": 0}, "bytes must be a whole number"),
        ({"rate": 1, "joint": True}, "cannot be combined with joint"),
        ({"bytes": 400, "store": "wds"}, "not entropy-coded"),
    ],
)
def test_bad_rates_touch_nothing(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        latentprep.encode("shapes", codec="dct", out=tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()
