"""EnCodec with small random networks: the published weights could not be reached."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import latentprep
from latentprep.codecs import codec_from_config
from latentprep.codecs.encodec import EncodecCodec
from latentprep.codecs.listing import list_codecs
from latentprep.device import one_thread_each
from latentprep.errors import CodecError, SystemFault, UsageError
from latentprep.format.quantizer import Codebook
from latentprep.quantizing.tokens import codebook_of
from sounds import make_sounds, sound

BANDWIDTHS = {2: 1.5, 8: 6.0, 32: 24.0}


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs latentprep[audio]")
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig(num_filters=2, hidden_size=8, num_lstm_layers=1))
    for stage, layer in enumerate(model.quantizer.layers):
        layer.codebook.embed.normal_(std=0.8**stage)
    return model.eval()


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encodec")
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.from_numpy(np.stack([sound(pitch, seed, rate=24000) for seed, pitch in enumerate((150, 400, 900))]))


@pytest.mark.parametrize("stages", BANDWIDTHS)
def test_tokens_and_sound_are_the_models_own(model: Any, weights: Path, clips: torch.Tensor, stages: int) -> None:
    codec = EncodecCodec(weights=str(weights), stages=stages)
    tokens = codec.tokens(clips)
    assert codec.latent_shape(1, clips.shape[1]) == (stages, 1, 30) == tuple(tokens.shape[1:])
    with torch.inference_mode(), one_thread_each(torch.device("cpu")):
        own = [model.encode(clip[None, None], bandwidth=BANDWIDTHS[stages]).audio_codes for clip in clips]
        heard = torch.cat([model.decode(codes, [None]).audio_values[:, 0] for codes in own])
    assert torch.equal(tokens[:, :, 0], torch.cat(own, 1)[0])
    book = codebook_of(codec)
    assert book is not None and (book.bits, len(book.sizes), book.dtype) == (10, stages, np.uint16)
    latents = torch.from_numpy(book.dequantize(tokens.numpy()))
    assert torch.equal(codec.decode(latents), heard.clamp(-1, 1))


def test_stages_nest_and_come_nearer(weights: Path, clips: torch.Tensor) -> None:
    codec = EncodecCodec(weights=str(weights))
    tokens, features = codec.tokens(clips), codec.encode(clips).numpy()
    assert torch.equal(EncodecCodec(weights=str(weights), stages=3).tokens(clips), tokens[:, :3])
    book = Codebook.of_tables(codec.codebooks)
    errors = [np.square(features - book.first(n).dequantize(tokens[:, :n].numpy())).mean() for n in (8, 3, 1)]
    assert errors == sorted(errors)


def test_neither_threads_nor_the_batch_change_a_bit(weights: Path, clips: torch.Tensor) -> None:
    codec, before = EncodecCodec(weights=str(weights)), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found += [codec.encode(clips), torch.cat([codec.encode(clip[None]) for clip in clips])]
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], features) for features in found)


def test_weights_are_bound_by_their_hash(weights: Path, tmp_path: Path) -> None:
    config = EncodecCodec(weights=str(weights), stages=4).config()
    moved = shutil.copytree(weights, tmp_path / "moved")
    document = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**document, "transformers_version": "5.0.0"}))
    assert EncodecCodec(weights=str(moved), stages=4).config() == {**config, "weights": str(moved)}
    (moved / "config.json").write_text(json.dumps({**document, "pad_mode": "constant"}))
    assert EncodecCodec(weights=str(moved), stages=4).config()["weights_sha256"] != config["weights_sha256"]


def test_what_is_not_encodec_at_24_khz_is_refused(weights: Path, tmp_path: Path) -> None:
    document = json.loads((weights / "config.json").read_text())
    tensors = safetensors.torch.load_file(weights / "model.safetensors")
    for changes, what in (
        ({"sampling_rate": 48000, "audio_channels": 2}, "an EnCodec of 48 kHz and 2 channels"),
        ({"normalize": True}, "in one piece"),
        ({"model_type": "dac"}, "no readable config.json of EnCodec"),
        ({"hidden_size": 16}, "does not load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**document, **changes}))
        shutil.copy(weights / "model.safetensors", tmp_path)
        with pytest.raises(CodecError, match=what):
            EncodecCodec(weights=str(tmp_path))
    shutil.copy(weights / "config.json", tmp_path)
    name = next(iter(tensors))
    safetensors.torch.save_file({key: t for key, t in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CodecError, match=f"lacks 1 tensors, {name} the first"):
        EncodecCodec(weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CodecError, match="does not load"):
        EncodecCodec(weights=str(tmp_path))
    with pytest.raises(CodecError, match="no model folder at .*codec='mdct'"):
        EncodecCodec(weights=str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="whole frames of 320 samples"):
        EncodecCodec(weights=str(weights)).latent_shape(1, 500)


def test_fewer_stages_than_asked_for_are_refused(model: Any, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "target_bandwidths": [1.5, 3.0]}))
    shutil.copy(weights / "model.safetensors", tmp_path)
    assert EncodecCodec(weights=str(tmp_path), stages=4).stages == 4
    with pytest.raises(UsageError, match="has 4 stages, not 8"):
        EncodecCodec(weights=str(tmp_path))
    for stages in (0, 33):
        with pytest.raises(UsageError, match="stages"):
            EncodecCodec(weights=str(weights), stages=stages)


def test_words_are_encoded_and_heard(weights: Path, tmp_path: Path) -> None:
    source, shards = make_sounds(tmp_path / "words", train=2, val=1), tmp_path / "shards"
    codec = EncodecCodec(weights=str(weights))
    made = latentprep.encode(source, codec=codec, out=shards)
    assert (made.bits, made.latent) == (10, (8, 1, 30))
    rebuilt = codec_from_config(codec.config(), weights=str(weights))
    assert isinstance(rebuilt, EncodecCodec) and rebuilt.config() == codec.config()
    assert latentprep.verify(shards, deep=True, source=source).ok
    latentprep.preview(shards, limit=1, out=tmp_path / "sheet.png")
    assert len(list((tmp_path / "sheet-sounds").glob("*.flac"))) == 4


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemFault, match=r"transformers.*latentprep\[audio\]"):
        EncodecCodec()


def test_it_is_listed() -> None:
    (row,) = [row for row in list_codecs() if row.name == "encodec"]
    assert (row.latent, row.code_bytes) == ((8, 1, 75), 750) and row.weights
