"""Lyra's models, where they are: `LATENTPREP_ASSETS`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import latentprep
from latentprep.codecs import codec_from_config, make_codec
from latentprep.codecs.listing import list_codecs
from latentprep.codecs.lyra import QUANTIZER, LyraCodec, _interpreter
from latentprep.errors import CodecError, UsageError
from latentprep.format.quantizer import Codebook
from sounds import make_sounds, sound

FOLDER = Path(os.environ.get("LATENTPREP_ASSETS", "")) / "lyra"
with_models = pytest.mark.skipif(
    not os.environ.get("LATENTPREP_ASSETS") or not FOLDER.is_dir(), reason="LATENTPREP_ASSETS has no Lyra models"
)


@pytest.fixture(scope="module")
def codec() -> LyraCodec:
    pytest.importorskip("ai_edge_litert", reason="needs latentprep[audio]")
    return LyraCodec(weights=str(FOLDER))


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.from_numpy(np.stack([sound(pitch, seed) for seed, pitch in enumerate((150, 400, 900))]))


@with_models
def test_tokens_are_those_of_its_own_quantizer(codec: LyraCodec, clips: torch.Tensor) -> None:
    tokens, features = codec.tokens(clips), codec.encode(clips)
    assert tokens.shape == (3, 46, 1, 20) and tokens.dtype == torch.uint8
    quantize = _interpreter(codec._models[QUANTIZER]).get_signature_runner("encode")
    for clip in range(len(clips)):
        for frame in range(20):
            feature = np.ascontiguousarray(features[clip, :, 0, frame].numpy()[None, None])
            own = quantize(input_frames=feature, num_quantizers=np.int32(46))["output_0"].ravel()
            assert np.array_equal(own, tokens[clip, :, 0, frame].numpy())


@with_models
def test_a_clip_does_not_depend_on_those_before_it(codec: LyraCodec, clips: torch.Tensor) -> None:
    together = codec.tokens(clips)
    for place, clip in enumerate(clips):
        assert torch.equal(codec.tokens(clip[None])[0], together[place])
    latents = torch.from_numpy(Codebook.of_tables(codec.codebooks).dequantize(together.numpy()))
    heard = codec.decode(latents)
    assert heard.shape == clips.shape and torch.equal(codec.decode(latents[2:]), heard[2:])
    assert 0.02 < heard.std() / clips.std() < 50


@with_models
def test_more_stages_are_nearer(codec: LyraCodec, clips: torch.Tensor) -> None:
    features, tokens = codec.encode(clips).numpy(), codec.tokens(clips).numpy()
    book = Codebook.of_tables(codec.codebooks)
    errors = [float(np.square(features - book.first(n).dequantize(tokens[:, :n])).mean()) for n in (46, 30, 16, 4)]
    assert errors == sorted(errors)
    fewer = LyraCodec(weights=str(FOLDER), stages=16)
    assert torch.equal(fewer.tokens(clips), torch.from_numpy(tokens[:, :16]))


@with_models
def test_weights_are_bound_by_their_hash(codec: LyraCodec, tmp_path: Path) -> None:
    again = codec_from_config(codec.config(), weights=str(FOLDER))
    assert again.config() == codec.config()
    for file in FOLDER.glob("*.tflite"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "lyragan.tflite").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CodecError, match="not the ones"):
        codec_from_config(codec.config(), weights=str(tmp_path))


@with_models
def test_words_are_encoded_and_drawn(codec: LyraCodec, tmp_path: Path) -> None:
    source = make_sounds(tmp_path / "words", train=2, val=1)
    made = latentprep.encode(source, codec="lyra:stages=30", weights=str(FOLDER), out=tmp_path / "shards")
    assert (made.bits, made.latent) == (4, (30, 1, 20))
    assert latentprep.verify(tmp_path / "shards", deep=True, source=source).ok
    latentprep.preview(tmp_path / "shards", limit=1, out=tmp_path / "sheet.png")
    assert len(list((tmp_path / "sheet-sounds").glob("*.flac"))) == 4


def test_without_weights_it_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="needs the folder of its weights"):
        make_codec("lyra")
    with pytest.raises(CodecError, match="no weights of Lyra"):
        make_codec("lyra", weights=str(tmp_path))
    for stages in (0, 47):
        with pytest.raises(UsageError, match="stages"):
            make_codec("lyra", weights=str(tmp_path), stages=stages)


def test_it_is_listed() -> None:
    (row,) = [row for row in list_codecs() if row.name == "lyra"]
    assert (row.latent, row.code_bytes) == ((46, 1, 50), 1150) and row.weights
