from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprep.codecs import codec_from_config, flip_signs, make_codec, media_of
from latentprep.codecs.mdct import bark_edges
from latentprep.errors import CodecError, UsageError


def noise(seed: int, count: int = 3, samples: int = 3200) -> torch.Tensor:
    """f32 [B,T]"""
    return 0.1 * torch.randn(count, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shapes", "shape"), [(0, (1, 24, 10)), (6, (44, 1, 10))])
def test_face_of_the_codec(shapes: int, shape: tuple[int, int, int]) -> None:
    codec = make_codec("mdct", shapes=shapes)
    assert media_of(codec) == "sound" and media_of(make_codec("dct")) == "images"
    latents = codec.encode(noise(1))
    assert latents.dtype == torch.float32
    assert tuple(latents.shape[1:]) == codec.latent_shape(1, 3200) == shape
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.float32 and decoded.shape == (3, 3200)
    again = codec_from_config(codec.config())
    assert again.config() == codec.config()
    assert torch.equal(again.encode(noise(1)), latents)
    assert flip_signs(codec, codec.latent_shape(1, 3200)) is None


def test_a_dataset_of_before_is_read_as_it_was() -> None:
    codec = codec_from_config({"name": "mdct", "bands": 24, "shapes": 0, "rate": 16000})
    old, new = codec.encode(noise(1)), make_codec("mdct").encode(noise(1))
    assert codec.latent_shape(1, 3200) == (24, 1, 10)
    assert torch.equal(old[:, :, 0], new[:, 0].flip(1))
    assert torch.equal(codec.decode(old), make_codec("mdct").decode(new))
    with pytest.raises(CodecError, match="has revision 3, this version knows 1 to 2; upgrade"):
        codec_from_config({"name": "mdct", "revision": 3})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_the_transform_is_orthogonal_and_has_its_inverse(seed: int, frames: int) -> None:
    codec, sounds = make_codec("mdct"), noise(seed, 2, 320 * frames)
    coefficients = codec.coefficients(sounds)
    assert torch.allclose(coefficients.square().sum(), sounds.square().sum(), rtol=1e-4)
    assert torch.allclose(codec.waves(coefficients), sounds, atol=1e-5)
    assert torch.allclose(codec.coefficients(codec.waves(coefficients)), coefficients, atol=1e-5)


def test_with_all_shapes_decoding_is_the_inverse_of_encoding() -> None:
    codec, sounds = make_codec("mdct", shapes=24), noise(2)
    assert torch.allclose(codec.decode(codec.encode(sounds)), sounds, atol=1e-5)


@pytest.mark.parametrize("shapes", [0, 5, 24])
def test_encoding_is_the_inverse_of_decoding_on_what_is_kept(shapes: int) -> None:
    codec = make_codec("mdct", shapes=shapes)
    latents = codec.encode(noise(3))
    assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-3)


def test_a_tone_is_loud_in_its_band_alone() -> None:
    codec = make_codec("mdct")
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)[None]
    levels = codec.encode(tone)[0, 0].flip(0).mean(1)  # high bands are above
    edges = torch.tensor(bark_edges(24, 320, 16000)) * 25.0  # Hz
    band = int(levels.argmax())
    assert edges[band] <= 1000 <= edges[band + 1]
    assert levels[band] - levels[[i for i in range(24) if abs(i - band) > 3]].max() > 4  # 24 dB


def test_silence_is_finite_and_other_sounds_of_a_batch_change_nothing() -> None:
    codec, sounds = make_codec("mdct", shapes=4), noise(4)
    sounds[1] = 0
    latents = codec.encode(sounds)
    assert torch.isfinite(latents).all()
    assert not codec.decode(latents)[1].any()
    assert torch.allclose(codec.encode(sounds[2:]), latents[2:], atol=1e-5)


def test_sizes_and_options_that_do_not_fit_are_refused() -> None:
    codec = make_codec("mdct")
    for height, width in ((1, 300), (1, 321), (224, 224)):
        with pytest.raises(UsageError, match="whole frames of 320"):
            codec.latent_shape(height, width)
    for options in ({"bands": 0}, {"shapes": 25}, {"rate": 16001}, {"bands": 64, "rate": 2000}):
        with pytest.raises(UsageError):
            make_codec("mdct", **options)


def test_bands_widen_with_frequency() -> None:
    edges = bark_edges(24, 320, 16000)
    widths = [high - low for low, high in pairwise(edges)]
    assert edges[0] == 0 and edges[-1] == 320 and min(widths) >= 1
    assert widths[-1] > 5 * widths[0]
