"""The learned codec: its mirror, its cost, its files, and what it does in the commands that take codecs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

import latentprep
from latentprep.codecs import codec_from_config, flip_signs, make_codec, open_codec
from latentprep.codecs.learned import (
    CONFIG,
    IN_PACKAGE,
    WEIGHTS,
    Architecture,
    LearnedCodec,
    MirrorConv,
    Networks,
    load,
    plain,
    read_config,
    save,
)
from latentprep.errors import CodecError, LatentError, UsageError
from latentprep.learning.start import architecture, started
from latentprep.pictures.metrics import psnr
from latentprep.sources.shapes import render
from pictures import picture

GIGA = 1e9


def pictures(count: int = 4, side: int = 64) -> np.ndarray:
    """u8 [n,3,S,S]."""
    return np.stack([picture(i, side, side) for i in range(count)]).transpose(0, 3, 1, 2)


def networks(factor: int = 8, channels: int = 6) -> tuple[Networks, Architecture]:
    """The networks that training starts from, with last layers that are not zero."""
    made, of, _ = started(pictures(), channels, factor, 1.0, 0)
    for part in (made.encoder, made.decoder):
        torch.nn.init.normal_(part.network[-1].weight, 0, 0.05)
    for layer in made.modules():
        if isinstance(layer, MirrorConv):
            layer.bias.data.add_(torch.randn(layer.bias.shape) * 0.02)
    return made, of


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a codec of eight pixels per side and six channels."""
    torch.manual_seed(0)
    return written(tmp_path_factory.mktemp("learned"), *networks())


def written(folder: Path, made: Networks, of: Architecture) -> Path:
    for name, data in save(made, of, {"origin": "a test", "licence": "none"}).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_a_mirrored_image_has_the_mirrored_latents(factor: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    codec = LearnedCodec(weights=str(written(tmp_path, *networks(factor))))
    images = torch.from_numpy(pictures())
    latents, mirrored = codec.encode(images), codec.encode(images.flip(-1))
    assert tuple(latents.shape[1:]) == codec.latent_shape(64, 64) == (6, 64 // factor, 64 // factor)
    assert torch.allclose(codec.flip(latents), mirrored, atol=1e-4)
    assert (codec.flip(latents).round() != mirrored.round()).float().mean() <= 0.001
    signs = flip_signs(codec, codec.latent_shape(64, 64))
    assert signs is not None
    assert 0 < signs.count(-1) < 6
    difference = codec.decode(codec.flip(latents)).int() - codec.decode(latents).flip(-1).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.001


def test_plain_layers_compute_the_same() -> None:
    torch.manual_seed(2)
    made, _ = networks(16)
    pixels = torch.randn(2, 3, 32, 32)
    latents = made.encoder(pixels)
    decoded = made.decoder(latents)
    assert torch.allclose(plain(made.encoder)(pixels), latents, atol=1e-4)
    assert torch.allclose(plain(made.decoder)(latents), decoded, atol=1e-4)
    assert not any(isinstance(layer, MirrorConv) for layer in made.modules())


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_encoder_and_decoder_are_small(factor: int) -> None:
    of = architecture(factor, 32, 10, 1.0)
    with torch.device("meta"):
        made = Networks(of)
        pixels = torch.empty(1, 3, 224, 224)
    for network, given, most in ((made.encoder, pixels, 1), (made.decoder, made.encoder(pixels), 4)):
        with FlopCounterMode(display=False) as counter:
            network(given)
        assert counter.get_total_flops() <= most * GIGA
    if factor == 8:  # what could be in the package
        assert sum(map(len, save(Networks(of), of, {}).values())) < 2 << 20


def test_training_starts_from_the_best_linear_codec() -> None:
    """With all channels it is exact; with some it is better than the DCT with as many."""
    images = torch.from_numpy(pictures(8))
    made, of, scales = started(images.numpy(), 12, 8, 4.0, 0)
    assert scales.shape == (12,)
    pixels = (images.float() - 128) / of.step
    error = float((made.decoder(made.encoder(pixels)) - pixels).detach().square().mean()) * of.step**2
    dct = make_codec("dct", luma=6, chroma=3)
    assert error < float((dct.decode(dct.encode(images)).float() - images.float()).square().mean())
    exact, of, _ = started(images.numpy(), 48, 4, 4.0, 0)
    pixels = (images.float() - 128) / of.step
    assert torch.allclose(exact.decoder(exact.encoder(pixels)), pixels, atol=1e-3)


def test_a_codec_is_its_files(weights: Path, tmp_path: Path) -> None:
    codec = open_codec(f"learned:weights={weights}")
    images = torch.from_numpy(pictures())
    latents = codec.encode(images)
    assert latents.dtype == torch.float32
    assert codec.decode(latents).dtype == torch.uint8
    again = codec_from_config(json.loads(json.dumps(codec.config())))
    assert torch.equal(again.encode(images), latents)
    alone = torch.cat([codec.encode(image[None]) for image in images])
    assert torch.allclose(alone, latents, atol=1e-4)
    assert torch.allclose(codec.graph()(images), latents, atol=1e-4)
    other = written(tmp_path, *networks())
    with pytest.raises(CodecError, match="not the ones this dataset was made with"):
        codec_from_config(codec.config(), weights=str(other))
    with pytest.raises(UsageError, match="multiples of 8"):
        codec.latent_shape(64, 60)


def test_the_weights_of_the_package_serve_by_default(tmp_path: Path) -> None:
    codec = make_codec("learned")
    assert codec.config() == {"name": "learned", "weights_sha256": load(IN_PACKAGE)[2]}
    assert sum(path.stat().st_size for path in IN_PACKAGE.iterdir()) < 2 << 20
    config = read_config(IN_PACKAGE)
    assert "imagenette, split train" in config["origin"] and config["licence"].startswith("Apache-2.0")
    rng = np.random.default_rng(0)
    drawn = np.stack([render(name, rng) for name in ("star", "ring", "cross", "arrow")])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2)  # nothing like the photographs that it was trained on
    means = make_codec("resample", factor=8)
    ours = psnr(codec.decode(codec.encode(images).round()), images).mean()
    assert ours > psnr(means.decode(means.encode(images)), images).mean() + 2
    other = written(tmp_path, *networks())
    with pytest.raises(CodecError, match="the weights in this latentprep are not the ones this dataset was made with"):
        codec_from_config(make_codec("learned", weights=str(other)).config() | {"weights": None})


def test_without_weights_in_a_folder_the_way_out_is_said() -> None:
    with pytest.raises(CodecError, match="no learned codec in"):
        make_codec("learned", weights="/nowhere")


HOSTILE: list[tuple[str, Any]] = [
    ("factor", 5), ("factor", True), ("factor", "8"), ("channels", 0), ("channels", 10**9), ("channels", 7),
    ("odd", -1),
    ("odd", 7), ("step", 0), ("step", math.inf), ("step", "1"), ("step", None), ("encoder", [32]),
    ("encoder", [32, 95]), ("encoder", [10**6, 10**6]), ("encoder", 7), ("encoder", [[1], {}]),
    ("encoder_blocks", [1, 10**6]), ("decoder", []), ("decoder_blocks", [0, -1]), ("more", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_hostile_numbers_are_refused(weights: Path, tmp_path: Path, name: str, value: object) -> None:
    document = json.loads((weights / CONFIG).read_text())
    document["architecture"][name] = value
    (tmp_path / CONFIG).write_text(json.dumps(document))
    (tmp_path / WEIGHTS).write_bytes((weights / WEIGHTS).read_bytes())
    refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        "[" * 100000,
        "{}",
        '{"a": 1' + "0" * 5000 + "}",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_hostile_configs_are_refused(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path)


def test_versions_formats_and_lost_fields_are_checked(weights: Path, tmp_path: Path) -> None:
    document = json.loads((weights / CONFIG).read_text())
    for change in ({"version": 2}, {"version": "1"}, {"format": "x"}, {"architecture": None}, {"architecture": {}}):
        (tmp_path / CONFIG).write_text(json.dumps({**document, **change}))
        refused(tmp_path)


def test_hostile_tensors_are_refused(weights: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((weights / CONFIG).read_bytes())
    refused(tmp_path)
    good = (weights / WEIGHTS).read_bytes()
    tensors = safetensors.torch.load(good)
    name = sorted(tensors)[3]
    damaged = [
        b"", b"\xff" * 64, good[:-1], good[:100], (1 << 62).to_bytes(8, "little") + good[8:], b"\0" * (64 << 20),
        *(
            safetensors.torch.save(changed)
            for changed in (
                {k: v for k, v in tensors.items() if k != name},
                {**tensors, "more": torch.zeros(1)},
                {**tensors, name: tensors[name].flatten()[:-1].clone()},
                {**tensors, name: tensors[name].flatten().clone()},
                {**tensors, name: torch.full_like(tensors[name], math.nan)},
                {**tensors, name: torch.full_like(tensors[name], math.inf)},
                {**tensors, name: tensors[name].to(torch.int32)},
            )
        ),
    ]  # fmt: skip
    for data in damaged:
        (tmp_path / WEIGHTS).write_bytes(data)
        refused(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(good)
    make_codec("learned", weights=str(tmp_path))


def refused(folder: Path) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec("learned", weights=str(folder))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 400 + len(str(folder))


def test_a_dataset_round_trip(weights: Path, images: Path, tmp_path: Path) -> None:
    made = latentprep.encode(
        images, codec=f"learned:weights={weights}", bits=4, size=64, out=tmp_path / "codes", device="cpu"
    )
    assert made.latent == (6, 8, 8)
    found = latentprep.verify(made.out, source=images, samples=4)
    assert found.ok
    assert found.compared is not None
    assert found.compared.differing < 0.001
    assert latentprep.info(made.out).mirror
    assert latentprep.decode(made.out, out=tmp_path / "pictures", source=images, limit=3).all.images == 3
    moved = tmp_path / "moved"
    weights.rename(moved)
    try:
        with pytest.raises(LatentError, match="no learned codec in"):
            latentprep.decode(made.out, out=tmp_path / "other", limit=1)
        assert latentprep.decode(made.out, out=tmp_path / "other", limit=1, weights=str(moved)).all.images == 1
    finally:
        moved.rename(weights)
