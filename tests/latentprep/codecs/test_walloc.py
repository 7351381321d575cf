"""WaLLoC: its wavelets, its checkpoints' files, and what it does in the commands that take codecs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import latentprep
from latentprep.codecs import codec_from_config, make_codec
from latentprep.codecs.walloc import Architecture, Networks, analysis, synthesis
from latentprep.errors import CodecError, LatentError, UsageError
from pictures import picture

NUMBERS = {"channels": 3, "J": 3, "Ne": 0, "Nd": 32, "latent_dim": 6, "latent_bits": 6, "lightweight_encode": True}


@pytest.fixture(scope="module")
def networks() -> Networks:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return Networks(Architecture(**NUMBERS)).eval()


@pytest.fixture(scope="module")
def weights(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the published ones are, but for safetensors: the wavelet's filters are among the tensors."""
    folder = tmp_path_factory.mktemp("walloc")
    (folder / "RGB_16x.json").write_text(json.dumps(NUMBERS | {"batch_size": 8}))
    state = {**networks.state_dict(), "wt.h0_col": torch.zeros(1, 1, 10, 1)}
    safetensors.torch.save_file(state, folder / "RGB_16x.safetensors")
    return folder


def images(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.stack([torch.from_numpy(picture(i, side, side)) for i in range(count)]).permute(0, 3, 1, 2)


def test_a_level_is_that_of_pywavelets() -> None:
    """What pywt.dwt(x, "bior4.4", "periodization") 1.9 gives, along either side of an image."""
    row = torch.arange(8, dtype=torch.float64).square()
    low, high = [14.844795, 6.373621, 20.857427, 56.919106], [-0.112152, 0.0, 4.130488, -23.817326]
    for at, along in ((2, row.expand(8, 8)), (1, row[:, None].expand(8, 8))):
        bands = analysis(along[None, None].contiguous())[0]
        line = bands[:, 0] if at == 2 else bands[:, :, 0]
        root = 2**0.5  # the other side's low filter, of what is constant along it
        torch.testing.assert_close(line[0] / root, torch.tensor(low, dtype=torch.float64), atol=1e-5, rtol=0)
        torch.testing.assert_close(line[at] / root, torch.tensor(high, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (1, 12, 16, 6)])
def test_synthesis_is_the_inverse_of_analysis(shape: tuple[int, ...]) -> None:
    planes = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(synthesis(analysis(planes)), planes)
    bands = torch.randn(1, 8, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(analysis(synthesis(bands)), bands)


def test_latents_and_pixels_are_those_of_the_paper(weights: Path, networks: Networks) -> None:
    codec = make_codec("walloc", weights=str(weights))
    assert codec.latent_shape(64, 32) == (6, 8, 4)
    bands = images().float() / 255 - 0.5
    for _ in range(3):
        bands = analysis(bands)
    normal, most = torch.distributions.Normal(0, 1), 31.499
    latents = codec.encode(images())
    with torch.no_grad():
        expected = 2 * most * (normal.cdf(networks.encoder(bands) / (31 / 1.85)) - 0.5)
        back = networks.decoder[1](normal.icdf((expected / (2 * most) + 0.5).clamp(1e-4, 1 - 1e-4)) * (31 / 1.85))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.graph()(images()), latents, atol=1e-4, rtol=0)
    for _ in range(3):
        back = synthesis(back)
    decoded = codec.decode(latents)
    assert (decoded.float() - ((back + 0.5) * 255).clamp(0, 255)).abs().max() <= 1
    assert codec.flip(latents) is None
    alone = codec.encode(images()[1:2])
    torch.testing.assert_close(alone, latents[1:2], atol=1e-4, rtol=0)


def test_a_published_file_is_read_as_tensors_alone(weights: Path, networks: Networks, tmp_path: Path) -> None:
    codec = make_codec("walloc", weights=str(weights))
    (tmp_path / "RGB_16x.json").write_text(json.dumps(NUMBERS))
    path = tmp_path / "RGB_16x.pth"
    torch.save({"model_state_dict": networks.state_dict(), "config": SimpleNamespace(J=3)}, path)
    other = make_codec("walloc", weights=str(tmp_path))
    torch.testing.assert_close(other.encode(images()), codec.encode(images()))
    with pytest.raises(CodecError, match="not the ones this dataset was made with"):
        codec_from_config(codec.config(), weights=str(tmp_path))

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model_state_dict": networks.state_dict(), "config": Hostile()}, path)
    with pytest.raises(CodecError, match=r"RGB_16x\.pth is damaged, or holds more than tensors"):
        make_codec("walloc", weights=str(tmp_path))
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CodecError, match="is damaged"):
        make_codec("walloc", weights=str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"J": 9}, {"channels": 2}, {"latent_dim": True}, {"latent_bits": "8"}, {"Nd": 33}, {"Nd": 64}, {"J": None}],
)
def test_numbers_that_make_no_codec_are_refused(change: dict, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "RGB_16x.json").write_text(json.dumps(NUMBERS | change))
    (tmp_path / "RGB_16x.safetensors").write_bytes((weights / "RGB_16x.safetensors").read_bytes())
    with pytest.raises(CodecError):
        make_codec("walloc", weights=str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100000, '"J"'])
def test_files_that_describe_no_codec_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "RGB_16x.json").write_text(text)
    with pytest.raises(CodecError, match="is no description of a WaLLoC checkpoint"):
        make_codec("walloc", weights=str(tmp_path))
    with pytest.raises(UsageError, match="the name of a model"):
        make_codec("walloc", weights=str(tmp_path), checkpoint="../a")
    with pytest.raises(LatentError, match="cannot be read"):
        make_codec("walloc", weights=str(tmp_path), checkpoint="absent")


def test_a_heavy_encoder_is_a_network(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    numbers = NUMBERS | {"J": 2, "Ne": 32, "lightweight_encode": False}
    (tmp_path / "heavy.json").write_text(json.dumps(numbers))
    safetensors.torch.save_file(Networks(Architecture(**numbers)).state_dict(), tmp_path / "heavy.safetensors")
    codec = make_codec("walloc", weights=str(tmp_path), checkpoint="heavy")
    assert codec.encode(images()).shape == (3, 6, 8, 8)


def test_encode_and_decode_take_it(weights: Path, tmp_path: Path) -> None:
    made = latentprep.encode("shapes", codec="walloc", weights=weights, limit=4, size=64, out=tmp_path / "codes")
    assert made.latent == (6, 8, 8)
    result = latentprep.decode(tmp_path / "codes", out=tmp_path / "decoded", limit=2)
    assert result.all.images == 2
