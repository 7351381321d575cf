from __future__ import annotations

import itertools
import json
import sys
import tarfile
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentprep.codecs import (
    base,
    codec_from_config,
    codec_names,
    codec_spec,
    flip_signs,
    make_codec,
    open_codec,
    parse_codec,
    split_codecs,
)
from latentprep.codecs.listing import list_codecs
from latentprep.errors import CodecError, UsageError
from latentprep.sources.images import load_views
from pictures import picture

PLUGIN = Path(__file__).parents[2] / "plugin"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)


def batch(count: int = 3, height: int = 32, width: int = 48) -> torch.Tensor:
    """u8 [B,3,H,W]."""
    return torch.from_numpy(np.stack([picture(i, height, width) for i in range(count)])).permute(0, 3, 1, 2)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dct", {}),
        ("dct", {"luma": 1, "chroma": 0}),
        ("resample", {}),
        ("resample", {"factor": 1}),
        ("scatter", {}),
        ("scatter", {"order": 2}),
    ],
)
def test_face_of_a_codec(name: str, options: dict) -> None:
    codec = make_codec(name, **options)
    images = batch()
    latents = codec.encode(images)
    assert latents.dtype == torch.float32
    assert tuple(latents.shape[1:]) == codec.latent_shape(32, 48)
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    again = codec_from_config(json.loads(json.dumps(codec.config())))
    assert again.config() == codec.config()
    assert torch.equal(again.encode(images), latents)


def test_dct_is_exact_with_all_coefficients() -> None:
    codec = make_codec("dct", luma=64, chroma=64)
    images = batch()
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_dct_is_orthonormal_and_ordered() -> None:
    grey = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    latents = make_codec("dct", luma=64, chroma=64).encode(grey)
    assert latents[0, 0, 0, 0].item() == pytest.approx(8 * (200 - 128))  # orthonormal: 8 times the mean
    assert latents[0, 1:].abs().max().item() < 1e-3
    ramp = torch.arange(8).mul(10).to(torch.uint8).expand(1, 3, 8, 8)
    latents = make_codec("dct", luma=3, chroma=0).encode(ramp)
    assert latents[0, 1].abs().item() > 10  # zigzag's second is the first horizontal frequency
    assert latents[0, 2].abs().item() < 1e-3


@settings(max_examples=20, deadline=None)
@given(luma=st.integers(1, 64), chroma=st.integers(0, 64), seed=st.integers(0, 1000))
def test_dct_inverts_what_it_keeps(luma: int, chroma: int, seed: int) -> None:
    codec = make_codec("dct", luma=luma, chroma=chroma)
    latents = codec.encode(torch.from_numpy(picture(seed, 16, 24)).permute(2, 0, 1)[None])
    analysis, synthesis = codec._analysis.flatten(1), codec._synthesis.flatten(1)  # type: ignore[attr-defined]
    assert torch.allclose(analysis @ synthesis.T, torch.eye(len(analysis)), atol=1e-5)
    assert latents.shape[1] == luma + 2 * chroma


@pytest.mark.parametrize(
    ("name", "options"),
    [("dct", {}), ("resample", {}), ("resample", {"factor": 1}), ("scatter", {}), ("scatter", {"order": 2})],
)
def test_flip_is_the_mirror_exactly(name: str, options: dict) -> None:
    codec = make_codec(name, **options)
    images = batch()
    flipped = codec.flip(codec.encode(images))
    assert flipped is not None
    assert torch.allclose(flipped, codec.encode(images.flip(-1)), atol=2e-3)
    signs = flip_signs(codec, codec.latent_shape(32, 48))
    assert signs is not None
    mirrored = codec.encode(images).flip(-1) * torch.tensor(signs).view(-1, 1, 1)
    assert torch.equal(mirrored, flipped)


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_mirrored_autoencoder_latents_are_no_mirror(name: str, assets: Path) -> None:
    """Why their `flip` is None: mirrored latents miss the mirror's by far more than a 4-bit quantizer (19 dB) does."""
    pytest.importorskip("diffusers")
    codec = make_codec(name, weights=str(assets / name))
    with tarfile.open(assets / "imagenette2-224.tar") as tar:
        photos = [member for member in itertools.islice(tar, 40) if member.name.endswith(".JPEG")][:4]
        pixels = np.stack([load_views(tar.extractfile(member).read(), 224)[0] for member in photos])  # type: ignore
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    want, mirrored = codec.encode(images.flip(-1)), codec.encode(images).flip(-1)
    signal = (want - want.mean((0, 2, 3), keepdim=True)).pow(2).mean((0, 2, 3))
    decibels = 10 * torch.log10(signal / (want - mirrored).pow(2).mean((0, 2, 3)))
    assert decibels.max() < 10
    assert codec.flip(want) is None


def test_resample_shrinks_without_aliasing() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255  # finer than the shrunk grid can show
    inner = make_codec("resample", factor=4).encode(stripes)[..., 2:-2]
    assert (inner - 127.5).abs().max() < 8


def test_unknown_names_and_options_say_the_way_out() -> None:
    with pytest.raises(CodecError, match="did you mean taesd"):
        make_codec("taesdd")
    with pytest.raises(UsageError, match="codec 'dct' has no option factor; it takes luma and chroma"):
        make_codec("dct", factor=3)
    for options in ({"luma": 0}, {"luma": 65}, {"chroma": -1}):
        with pytest.raises(UsageError, match="must be"):
            make_codec("dct", **options)
    with pytest.raises(UsageError, match="size=24 or size=32"):
        make_codec("dct").latent_shape(30, 30)


def test_third_party_codecs_are_found(plugin: None) -> None:
    assert "grey" in codec_names()
    codec = make_codec("grey", gain=2.0)
    assert codec_from_config(codec.config()).config() == {"name": "grey", "gain": 2.0}
    assert flip_signs(codec, (1, 4, 4)) == (1,)
    with pytest.raises(CodecError, match=r"nowhere.*does not import"):
        make_codec("nowhere")
    rows = {row.name: row for row in list_codecs(64, 4)}
    assert rows["grey"].latent == (1, 16, 16)
    assert rows["grey"].code_bytes == 128
    assert "does not import" in rows["nowhere"].weights


def test_listing_loads_no_weights() -> None:
    rows = {row.name: row for row in list_codecs(224, 4)}
    assert rows["sd-vae"].latent == (4, 28, 28)
    assert rows["sd-vae"].code_bytes == 1568
    assert rows["taesd3"].latent == (16, 28, 28)
    assert rows["dct"].weights == "none needed"
    assert (rows["scatter"].latent, rows["scatter"].weights) == ((17, 28, 28), "none needed")
    assert (rows["walloc"].latent, rows["walloc"].weights) == ((12, 28, 28), rows["taesd3"].weights)
    assert (rows["learned"].latent, rows["learned"].weights) == ((12, 28, 28), "yes")
    assert "diffusers" not in sys.modules or rows["taesd"].weights in ("yes", "no")


# Autoencoders: real small ones where the assets are, random ones of the sd-vae kind everywhere.


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random AutoencoderKL: factor 4, 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


def test_autoencoder_kl_applies_its_factors(small_vae: Path) -> None:
    import diffusers

    codec = make_codec("sd-vae", weights=str(small_vae), dtype="float32")
    assert codec.latent_shape(32, 48) == (4, 8, 12)
    images = batch()
    latents = codec.encode(images)
    model = diffusers.AutoencoderKL.from_pretrained(small_vae)
    with torch.no_grad():
        expected = (model.encode(images / 127.5 - 1).latent_dist.mean - 0.25) * 0.5
        decoded = model.decode(latents / 0.5 + 0.25).sample
    assert torch.allclose(latents, expected, atol=1e-4)
    expected_pixels = ((decoded + 1) * 127.5).round().clamp(0, 255)
    assert (codec.decode(latents).float() - expected_pixels).abs().max() <= 1
    assert codec.flip(latents) is None
    assert flip_signs(codec, (4, 8, 12)) is None


SMALL_3D = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, False],
    "latents_mean": [0.5, -1, 0, 2], "latents_std": [1, 2, 0.5, 4],
}  # fmt: skip
FAMILIES: dict[str, tuple[dict, int, int]] = {  # arguments of a small one, channels and factor of its latents
    "AutoencoderDC": ({
        "latent_channels": 8, "attention_head_dim": 4, "encoder_block_out_channels": (8, 16, 16),
        "decoder_block_out_channels": (8, 16, 16), "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)), "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "scaling_factor": 0.4,
    }, 8, 4),
    "AutoencoderKLFlux2": ({
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "latent_channels": 6, "layers_per_block": 1,
    }, 6, 2),
    "AutoencoderKLHunyuanImage": ({
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 32),
        "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 64, "scaling_factor": 0.75,
    }, 8, 4),
    "AutoencoderKLQwenImage": (SMALL_3D, 4, 4),
    "AutoencoderKLWan": (SMALL_3D, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_newer_families_of_diffusers_serve(family: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    given, channels, factor = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(diffusers, family)(**given).eval()
    model.save_pretrained(tmp_path)
    codec = make_codec("sd-vae", weights=str(tmp_path), dtype="float32")
    assert codec.latent_shape(32, 48) == (channels, 32 // factor, 48 // factor)
    images = batch()
    latents = codec.encode(images)
    assert latents.shape[1:] == codec.latent_shape(*images.shape[2:])
    frames = images[:, :, None] if given is SMALL_3D else images
    with torch.no_grad():
        output = model.encode(frames / 127.5 - 1)
        raw = output.latent_dist.mean if hasattr(output, "latent_dist") else output.latent
        decoded = model.decode(raw).sample
    if given is SMALL_3D:
        mean, std = (torch.tensor(SMALL_3D[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
        expected, decoded = ((raw - mean) / std)[:, :, 0], decoded[:, :, 0]
    else:
        expected = raw * given.get("scaling_factor", 1)
    assert torch.allclose(latents, expected, atol=1e-4)
    assert torch.allclose(codec.graph()(images), expected, atol=1e-4)
    assert (codec.decode(latents).float() - ((decoded + 1) * 127.5).clamp(0, 255)).abs().max() <= 1


def test_an_autoencoder_of_one_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers' AutoencoderRAE, which resizes every image to the size of its encoder, a vision transformer."""

    class OneSize(torch.nn.Module):
        config = MappingProxyType[str, object]({})

        def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent=torch.nn.functional.adaptive_avg_pool2d(pixels, 2))

    monkeypatch.setattr("latentprep.codecs.autoencoder._load", lambda folder, name: OneSize())
    with pytest.raises(CodecError, match="latents grow with the image: 64×64 pixels give 2×2 cells, 128×128 give 2×2"):
        make_codec("sd-vae", weights=str(tmp_path))


def test_posterior_samples_depend_on_seed_and_image_only(small_vae: Path) -> None:
    def codec(seed: int):
        return make_codec("sd-vae", weights=str(small_vae), dtype="float32", posterior="sample", seed=seed)

    images = batch(4)
    together = codec(1).encode(images)
    alone = codec(1).encode(images[2:3])
    assert torch.allclose(together[2:3], alone, atol=1e-4)
    assert not torch.allclose(together, codec(2).encode(images), atol=1e-2)
    mean = make_codec("sd-vae", weights=str(small_vae), dtype="float32").encode(images)
    assert not torch.allclose(together, mean, atol=1e-2)


def test_encode_hands_its_seed_to_a_sampling_codec(small_vae: Path, images: Path, tmp_path: Path) -> None:
    import latentprep

    options = {"codec": "sd-vae:posterior=sample,dtype=float32", "weights": str(small_vae), "size": 32}
    for seed in (0, 1):
        latentprep.encode(images, out=tmp_path / str(seed), seed=seed, **options)
    zero, one = (latentprep.open(tmp_path / str(seed)) for seed in (0, 1))
    assert (zero.manifest.codec["seed"], one.manifest.codec["seed"]) == (0, 1)
    assert not np.array_equal(zero.load("val").codes, one.load("val").codes)


def test_weights_are_checked_by_hash(small_vae: Path, tmp_path: Path) -> None:
    import shutil

    config = make_codec("sd-vae", weights=str(small_vae), dtype="float32").config()
    moved = shutil.copytree(small_vae, tmp_path / "moved")
    assert codec_from_config(config, weights=str(moved)).config()["weights_sha256"] == config["weights_sha256"]
    data = bytearray((moved / "diffusion_pytorch_model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(CodecError, match="not the ones this dataset was made with"):
        codec_from_config(config, weights=str(moved))


def test_bad_weights_are_one_clear_error(small_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="no model folder at"):
        make_codec("taesd", weights=str(tmp_path / "absent"))
    with pytest.raises(CodecError, match=r"no readable config\.json"):
        make_codec("taesd", weights=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CodecError, match="holds a UNet2DModel, not an image autoencoder"):
        make_codec("taesd", weights=str(tmp_path))
    (tmp_path / "config.json").write_text((small_vae / "config.json").read_text())
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CodecError, match="does not load"):
        make_codec("taesd", weights=str(tmp_path))
    with pytest.raises(UsageError, match="dtype must be bfloat16 or float32, got float16"):
        make_codec("sdxl-vae", weights=str(small_vae), dtype="float16")


def test_a_model_without_a_posterior_cannot_be_sampled(assets: Path) -> None:
    with pytest.raises(UsageError, match="has no posterior to sample from"):
        make_codec("taesd", weights=str(assets / "taesd"), posterior="sample")


@pytest.mark.parametrize(("name", "channels", "least"), [("taesd", 4, 20.0), ("taesd3", 16, 24.0)])
def test_real_tiny_autoencoders(assets: Path, name: str, channels: int, least: float) -> None:
    codec = make_codec(name, weights=str(assets / name))
    photograph = (assets / "jpeg-cases" / "orientation" / "Landscape_1.jpg").read_bytes()
    images = torch.from_numpy(load_views(photograph, 224)).permute(0, 3, 1, 2)
    latents = codec.encode(images)
    assert latents.shape == (1, channels, 28, 28)
    assert psnr(codec.decode(latents), images) > least
    exact = make_codec(name, weights=str(assets / name), dtype="float32").encode(images)
    assert (latents - exact).abs().mean() < 0.05 * exact.std()


VALUES = st.text(st.characters(blacklist_characters=",", blacklist_categories=["Cs"]), min_size=1)


class Typed:
    """A codec with an option of each type."""

    def __init__(
        self,
        *,
        number: float = 1.0,
        count: int | None = None,
        flag: bool = False,
        word: str = "a",
        either: int | str = 1,
        plain=2,  # no annotation: as its default is
        device: str = "cpu",
    ) -> None:
        self.options = {"number": number, "count": count, "flag": flag, "word": word, "either": either, "plain": plain}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "codec_class", lambda name: Typed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "number": st.floats(allow_nan=False),
            "count": st.integers(),
            "flag": st.booleans(),
            "word": VALUES,
            "plain": st.integers(),
        },
    ),
    data=st.data(),
)
def test_a_codecs_spec_is_parsed_to_what_it_was_made_of(typed: None, options: dict, data: st.DataObject) -> None:
    order = data.draw(st.permutations(list(options)))
    options = {name: options[name] for name in order}
    spec = codec_spec("typed", options)
    name, again = parse_codec(spec)
    assert name == "typed"
    assert list(again.items()) == list(options.items())
    assert [type(value) for value in again.values()] == [type(value) for value in options.values()]
    assert split_codecs(f"dct,{spec},taesd:weights=a") == ["dct", spec, "taesd:weights=a"]


def test_values_become_what_annotations_say(typed: None) -> None:
    text = "typed:number=2,count=3,flag=true,word=4,either=5,plain=6"
    assert parse_codec(text)[1] == {"number": 2.0, "count": 3, "flag": True, "word": "4", "either": 5, "plain": 6}
    assert parse_codec("typed:either=x")[1] == {"either": "x"}
    for wrong, message in (
        ("number=x", "typed:number must be a number, got 'x'"),
        ("count=1.5", "typed:count must be a whole number, got '1.5'"),
        ("flag=1", "typed:flag must be true or false, got '1'"),
        ("other=1", "codec 'typed' has no option other"),
        ("device=cuda", "codec 'typed' has no option device"),
        ("word=a,word=b", "sets word twice"),
        ("word=", "has 'word=' where option=value is needed"),
        ("word", "has 'word' where option=value is needed"),
        ("", "has nothing where option=value is needed"),
        ("word=a,", "has nothing where option=value is needed"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_codec(f"typed:{wrong}")
        assert message in caught.value.message


def test_open_codec_takes_a_spec_or_a_codec(small_vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)
    codec = open_codec("dct:luma=20,chroma=5")
    assert codec.config() == {"name": "dct", "luma": 20, "chroma": 5}
    assert open_codec(codec) is codec
    assert open_codec("grey:gain=2").config() == {"name": "grey", "gain": 2.0}
    vae = open_codec("sd-vae:posterior=sample,dtype=float32", weights=str(small_vae), seed=3)
    assert vae.config() == make_codec(
        "sd-vae", weights=str(small_vae), posterior="sample", dtype="float32", seed=3
    ).config()  # fmt: skip
    inside = open_codec(f"sd-vae:posterior=sample,seed=4,dtype=float32,weights={small_vae}", seed=3)
    assert inside.config()["seed"] == 4
    with pytest.raises(CodecError, match="unknown codec 'dtc'; did you mean dct"):
        open_codec("dtc:luma=1")
    with pytest.raises(UsageError, match="dct:luma must be a whole number from 1 to 64, got 65"):
        open_codec("dct:luma=65")
    with pytest.raises(UsageError, match="weights is for a codec given by name"):
        open_codec(codec, weights="x")
    with pytest.raises(UsageError, match="names weights too"):
        open_codec("taesd:weights=a", weights="b")
    with pytest.raises(UsageError, match="cannot hold weights 'a,b'"):
        codec_spec("taesd", {"weights": "a,b"})
