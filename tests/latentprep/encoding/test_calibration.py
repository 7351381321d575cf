"""What calibration makes of a source: the quantizer, its statistics, and what it says where they are doubtful."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from told import Told

import latentprep
from latentprep.audit.info import info
from latentprep.codecs import make_codec
from latentprep.errors import DatasetError
from latentprep.format import Quantizer
from latentprep.format.manifest import Manifest
from latentprep.format.quantizer import Statistics
from latentprep.quantizing.scalar import code_statistics, dequantize, fit_quantizer, quantize
from pictures import jpeg, make_folder, picture

GOLDEN = Path(__file__).parents[2] / "golden"


def autoencoder(kind: str, folder: Path) -> Path:
    """A small random AutoencoderKL or AutoencoderTiny of factor 4, saved."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = (8, 8, 8)
    if kind == "AutoencoderKL":
        model = diffusers.AutoencoderKL(
            block_out_channels=sizes, down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=4,
        )  # fmt: skip
    else:
        model = diffusers.AutoencoderTiny(
            encoder_block_out_channels=sizes, decoder_block_out_channels=sizes,
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def dct(folder: Path) -> dict:
    return {"codec": "dct"}


def joint(folder: Path) -> dict:
    return {"codec": "dct:luma=2,chroma=0", "joint": True}


def sd_vae(folder: Path) -> dict:
    return {"codec": "sd-vae:dtype=float32", "weights": str(autoencoder("AutoencoderKL", folder))}


def taesd(folder: Path) -> dict:
    return {"codec": "taesd:dtype=float32", "weights": str(autoencoder("AutoencoderTiny", folder))}


@pytest.mark.parametrize("codec", [dct, joint, sd_vae, taesd])
def test_the_manifest_depends_on_neither_batch_size_nor_workers(codec: Callable, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", train=18, val=1, side=32)
    options = codec(tmp_path / "weights")
    manifests = set()
    for batch_size, workers in ((1, 1), (7, 3), (32, 1), (32, 3)):
        out = tmp_path / f"{batch_size}-{workers}"
        latentprep.encode(images, **options, size=32, bits=6, batch_size=batch_size, workers=workers, out=out)
        manifests.add((out / "manifest.json").read_bytes())
    assert len(manifests) == 1


def test_the_codec_sees_one_image_at_a_time_in_calibration(images: Path, tmp_path: Path, monkeypatch) -> None:
    """Of any codec then, whatever its kernels do with a batch."""
    codec, sizes = make_codec("dct"), []
    honest = codec.encode
    monkeypatch.setattr(codec, "encode", lambda batch: sizes.append(len(batch)) or honest(batch))
    latentprep.encode(images, codec=codec, size=32, out=tmp_path / "out")
    assert sizes[:12] == [1] * 12
    assert max(sizes[12:]) > 1


def test_statistics_are_those_of_the_calibration_samples_codes(images: Path, tmp_path: Path) -> None:
    latentprep.encode(images, codec="dct", size=32, out=tmp_path / "out")  # all of train: fewer than are drawn
    dataset = latentprep.open(tmp_path / "out")
    codes = dataset.load("train").codes[:, 0].astype(float)
    counted = dataset.manifest.statistics
    assert counted is not None
    assert np.allclose(counted.mean, codes.mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(counted.std, codes.std((0, 2, 3)), rtol=1e-6)
    assert Manifest.from_bytes(dataset.manifest.to_bytes()) == dataset.manifest


def test_statistics_of_joint_codes_are_those_of_what_the_filter_restores() -> None:
    latents = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    quantizer = fit_quantizer(latents, 2, joint=True)
    codes = quantize(latents, quantizer)
    counted = code_statistics(codes, quantizer)
    values = (dequantize(codes, quantizer).transpose(0, 1).flatten(1) - torch.tensor(quantizer.lo)[:, None]) / (
        torch.tensor(quantizer.step)[:, None]
    ) - 0.5
    assert np.allclose(counted.mean, values.mean(1), atol=1e-4)
    assert np.allclose(counted.std, values.std(1, correction=0), rtol=1e-4)


def test_statistics_go_where_the_quantizer_goes(images: Path, tmp_path: Path) -> None:
    first = latentprep.encode(images, codec="dct", size=32, bits=8, splits=["train"], out=tmp_path / "a").out
    latentprep.encode(images, codec="dct", size=32, bits=8, splits=["val"], quantizer=first, out=tmp_path / "b")
    latentprep.merge([first, tmp_path / "b"], out=tmp_path / "both")
    latentprep.convert(first, out=tmp_path / "tars", store="wds")
    latentprep.subset(first, fraction=0.5, out=tmp_path / "half")
    counted = latentprep.open(first).manifest.statistics
    assert counted is not None
    for name in ("b", "both", "tars", "half"):
        assert latentprep.open(tmp_path / name).manifest.statistics == counted
    latentprep.requantize(first, bits=3, out=tmp_path / "few")
    few = latentprep.open(tmp_path / "few")
    codes = few.load("train").codes[:, 0].astype(float)
    assert few.manifest.statistics is not None
    assert np.allclose(few.manifest.statistics.std, codes.std((0, 2, 3)), rtol=1e-6)


def test_a_dataset_without_statistics_keeps_its_manifest() -> None:
    data = (GOLDEN / "v1" / "manifest.json").read_bytes()
    manifest = Manifest.from_bytes(data)
    assert manifest.statistics is None
    assert manifest.to_bytes() == data


@pytest.mark.parametrize(
    ("mean", "std"), [([1.0], [1.0, 2.0]), ([1.0] * 2, [1.0] * 2), ([1.0] * 3, [1.0, -1.0, 1.0]), ([], [])]
)
def test_statistics_that_cannot_be_are_refused(mean: list, std: list) -> None:
    document = json.loads((GOLDEN / "v1" / "manifest.json").read_bytes())
    document["statistics"] = {"mean": mean, "std": std}
    with pytest.raises(DatasetError, match="statistics"):
        Manifest.from_bytes(json.dumps(document).encode())
    with pytest.raises(DatasetError, match="not finite"):
        Manifest.from_bytes(
            json.dumps({**document, "statistics": {"mean": [1e400] * 3, "std": [1.0] * 3}})
            .replace("Infinity", "9" * 400)
            .encode()
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_on_both_sides_of_a_constant_are_told_apart(bits: int) -> None:
    latents = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[:, 1] = 0.7
    latents[:, 2] = 1e-8 * latents[:, 2]  # rounding, as in the chroma of grey images
    quantizer = fit_quantizer(latents, bits)
    usual = quantizer.step[0]
    for channel, value in ((1, 0.7), (2, 0.0)):
        step = quantizer.step[channel]
        assert usual / 1.5 < step < usual * 1.5
        seen = torch.tensor([value - step, value, value + step]).view(3, 1, 1, 1).expand(3, 3, 1, 1)
        codes = quantize(seen, quantizer)[:, channel].flatten().tolist()
        assert codes == [2 ** (bits - 1) - 1, 2 ** (bits - 1), 2 ** (bits - 1) + 1]
        back = dequantize(quantize(seen, quantizer), quantizer)[1, channel].item()
        assert back == pytest.approx(value, abs=1e-6)


def train_folder(root: Path, pictures: list[np.ndarray]) -> Path:
    """The pictures as the train split of two classes; val has one picture of each."""
    make_folder(root, train=0, val=1, side=32)
    for place, pixels in enumerate(pictures):
        (root / "train" / f"class_{place % 2}" / f"{place}.jpg").write_bytes(jpeg(pixels))
    return root


def test_grey_calibration_images_leave_room_for_colours(tmp_path: Path) -> None:
    grey = train_folder(tmp_path / "images", [picture(seed).mean(2).astype(np.uint8) for seed in range(4)])
    asked, said = {"codec": "dct", "size": 64, "splits": ["train"]}, Told()
    latentprep.encode(grey, bits=2, equal_bits=False, out=tmp_path / "few", progress=said, **asked)
    assert "6 of 16 channels are constant on these images and get no bits; equal bits leave" in said.notes[-1]
    latentprep.encode(grey, equal_bits=True, out=tmp_path / "out", **asked)
    quantizer = latentprep.open(tmp_path / "out").quantizer
    colours = torch.from_numpy(np.stack([picture(seed) for seed in (7, 8)])).permute(0, 3, 1, 2)
    latents = make_codec("dct").encode(colours)
    codes = quantize(latents, quantizer)[:, 10:]
    assert len(codes[:, 0].unique()) > 3  # blue against yellow, as many of each as there is room for
    assert (codes < 8).any() and (codes > 8).any()


def test_calibration_looks_at_every_column_of_a_large_grid() -> None:
    """A 64 x 64 grid, of which every fourth column is wide and the others are narrow."""
    latents = torch.randn(256, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    latents[..., ::4] *= 20
    quantizer = fit_quantizer(latents, 4)
    latents = latents.roll(1, -1)
    again = fit_quantizer(latents, 4)
    assert again.step[0] == pytest.approx(quantizer.step[0], rel=0.05)


@pytest.mark.parametrize(
    ("seeds", "warning"),
    [
        ([0, 1, 2, 3, 4], "calibrated on only 5 samples, fewer than 32"),
        ([0] * 40, "all 40 calibration samples are alike"),
        (list(range(40)), None),
    ],
)
def test_few_or_equal_calibration_images_are_warned_of(tmp_path: Path, seeds: list[int], warning: str | None) -> None:
    images, said = train_folder(tmp_path / "images", [picture(seed, 32, 32) for seed in seeds]), Told()
    latentprep.encode(images, codec="dct", size=32, splits=["train"], out=tmp_path / "out", progress=said)
    assert said.notes == ([f"warning: {warning}; the ranges may not fit other images"] if warning else [])


def test_info_names_channels_that_carry_nothing_and_why(tmp_path: Path, make_codes_dataset: Callable) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (50, 1, 3, 8, 8))
    codes[:, :, 1] = 8
    codes[:, :, 2] = np.where(random.random((50, 1, 8, 8)) < 0.01, codes[:, :, 2], 8)
    dataset = make_codes_dataset(tmp_path, codes.astype(np.uint8))
    constant, outliers = info(dataset).poor
    assert (constant.channel, constant.entropy) == (1, 0)
    assert "constant" in constant.cause
    assert outliers.channel == 2
    assert 0.05 < outliers.entropy < 0.3
    assert "outliers" in outliers.cause


@pytest.fixture
def make_codes_dataset(images: Path) -> Callable:
    """A dataset whose first shard of train has these codes, u8 [n,1,3,8,8], 4 bits."""

    def make(out: Path, codes: np.ndarray) -> latentprep.LatentDataset:
        from latentprep.format import Codes, ShardId
        from latentprep.format.commit import commit_shard, create_dataset
        from latentprep.format.shard import encoded_shard

        base = Manifest.from_bytes((GOLDEN / "v1" / "manifest.json").read_bytes())
        manifest = replace(
            base,
            quantizer=Quantizer(4, (0.0,) * 3, (1.0,) * 3),
            transform={**base.transform, "views": 1},
            latent=(3, 8, 8),
            shard_rows=64,
            chunk_rows=64,
            splits={"train": len(codes)},
            statistics=Statistics((8.0,) * 3, (1.0,) * 3),
        )
        create_dataset(out, manifest)
        labels, keys = np.zeros(len(codes), np.int32), [f"{row}.jpg" for row in range(len(codes))]
        rows, facts = Codes(codes, labels, keys), {"source_bytes": 1, "saturated": (0,) * 3}
        commit_shard(out, encoded_shard(manifest, ShardId("train", 0), rows, **facts))
        return latentprep.open(out)

    return make
