"""Meta's EnCodec: sound as tokens. Its network is that of the transformers library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latentprep.codecs.autoencoder import find_weights, weights_sha256
from latentprep.codecs.base import frames, to_wave
from latentprep.device import full_float32, one_thread_each
from latentprep.errors import CodecError, SystemFault, UsageError, check_whole
from latentprep.sources.kinds import SOUND

CONFIG, WEIGHTS = FILES = ("config.json", "model.safetensors")
RATE, HOP = 24000, 320
STAGES, MOST_STAGES, BITS = 8, 32, 10
_WAY_OUT = "give the folder, or the hub's repository, of EnCodec at 24 kHz, facebook/encodec_24khz"
# What tensors' shapes do not tell of a configuration.
_SETTINGS = ("use_causal_conv", "pad_mode", "trim_right_ratio", "dilation_growth_rate")


class EncodecCodec:
    """Meta's EnCodec, 24 kHz: tokens of sound, 75 frames a second of up to 32 stages of 10 bits.

    weights: folder or hub id. stages: how many to keep, each 0.75 kbit/s; Meta's own bit rates are those of 2, 4, 8, 16
    and 32. On a CPU every clip is computed by one thread, so neither its batch nor the number of threads changes a bit.
    """

    name, default_weights, files = "encodec", "facebook/encodec_24khz", FILES
    media = SOUND
    rate, hop = RATE, HOP

    def __init__(self, *, weights: str | None = None, stages: int = STAGES, device: torch.device | str = "cpu") -> None:
        check_whole(f"{self.name}:stages", stages, 1, MOST_STAGES)
        self.weights, self.stages, self.device = weights or self.default_weights, stages, torch.device(device)
        _transformers()
        folder = find_weights(self.weights, self.name, self.files, instead="mdct")
        model = _load(folder)
        if stages > len(model.quantizer.layers):
            raise UsageError(
                f"the EnCodec in {folder} has {len(model.quantizer.layers)} stages, not {stages}", "keep fewer of them"
            )
        model.quantizer.layers = model.quantizer.layers[:stages]  # so the model's own `encode` stops there
        self.hop = model.config.hop_length
        self.codebooks = [layer.codebook.embed.numpy() for layer in model.quantizer.layers]
        self._sha256 = weights_sha256(folder, [getattr(model.config, name) for name in _SETTINGS])
        self._model = model.to(self.device)

    def config(self) -> dict:
        return {"name": self.name, "weights": self.weights, "weights_sha256": self._sha256, "stages": self.stages}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.stages, 1, frames(self.name, self.hop, height, width)

    def tokens(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> i64 [B,stages,1,T/hop]: the model's own."""
        most = self._model.config.target_bandwidths[-1]
        return self._each(lambda some: self._model.encode(some[:, None], bandwidth=most).audio_codes[0], sounds)

    def encode(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> the encoder's features, f32 [B,D,1,T/hop]."""
        return self._each(lambda some: self._model.encoder(some[:, None]), sounds)

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,D,1,F] -> f32 [B,F*hop], full scale at 1."""
        return to_wave(self._each(lambda some: self._model.decoder(some[:, :, 0]), latents)[:, 0, 0])

    def flip(self, latents: Tensor) -> None:
        """None: sound has no mirror."""
        return

    def _each(self, work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """What `work` makes of the batch, [B,n,m] -> [B,n,1,m]; on a CPU clip by clip, a thread each."""

        def done(part: Tensor) -> Tensor:
            with torch.inference_mode(), full_float32():
                return work(part)[:, :, None]

        batch = batch.to(self.device, torch.float32)
        with one_thread_each(self.device) as pool:
            return done(batch) if pool is None else torch.cat(list(pool.map(done, batch.split(1))))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SystemFault(
            f"codec '{EncodecCodec.name}' needs the transformers package", "pip install 'latentprep[audio]'"
        ) from error
    return transformers


def _load(folder: Path) -> Any:
    """The model in `folder`, in float32 on the CPU. Safetensors only, and every tensor must be there."""
    library = _transformers()
    try:
        document = json.loads((folder / CONFIG).read_bytes())
        if document.get("model_type") != "encodec":
            raise ValueError(f"a model of type {document.get('model_type')!r:.60}")
        config = library.EncodecConfig.from_dict(document)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CodecError(f"{folder} has no readable {CONFIG} of EnCodec ({error})", _WAY_OUT) from error
    if config.sampling_rate != RATE or config.audio_channels != 1 or config.normalize or config.chunk_length_s:
        raise CodecError(
            f"{folder} holds an EnCodec of {config.sampling_rate / 1000:g} kHz and {config.audio_channels} channels; "
            f"codec '{EncodecCodec.name}' is that of {RATE / 1000:g} kHz and one channel, in one piece",
            _WAY_OUT,
        )
    try:
        with torch.random.fork_rng([]):  # the weights that it starts with are drawn
            model = library.EncodecModel(config)
        missing, _ = model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS), strict=False)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CodecError(f"the EnCodec in {folder} does not load: {str(error).splitlines()[0]}", _WAY_OUT) from error
    if missing:
        raise CodecError(f"{folder / WEIGHTS} lacks {len(missing)} tensors, {missing[0]} the first", _WAY_OUT)
    return model.eval().requires_grad_(False)
