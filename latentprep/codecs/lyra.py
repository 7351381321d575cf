"""Google's SoundStream, of Lyra v2: speech as tokens. Its models are LiteRT files, which ai-edge-litert reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.codecs.base import frames, to_wave
from latentprep.errors import CodecError, SystemFault, check_whole, opt
from latentprep.sources.kinds import SOUND
from latentprep.storage.places import path_of

ENCODER, QUANTIZER, DECODER = FILES = ("soundstream_encoder.tflite", "quantizer.tflite", "lyragan.tflite")
STAGES, LEVELS, FEATURES = 46, 16, 64
RATE, HOP = 16000, 320


class LyraCodec:
    """Google's SoundStream (Lyra v2): tokens of speech, 50 frames a second of up to 46 stages of 4 bits.

    weights: the folder with soundstream_encoder.tflite, quantizer.tflite and lyragan.tflite, of google/lyra. stages:
    how many to keep; Lyra's own bit rates are those of 16, 30 and 46. It runs on the CPU.
    """

    name = "lyra"
    media = SOUND
    rate, hop = RATE, HOP

    def __init__(self, *, weights: str | None = None, stages: int = STAGES, device: torch.device | str = "cpu") -> None:
        check_whole(f"{self.name}:stages", stages, 1, STAGES)
        if weights is None:
            raise CodecError(
                f"codec '{self.name}' needs the folder of its weights",
                f"use {opt('weights', 'FOLDER')}, with {', '.join(FILES)} of google/lyra in it",
            )
        self.weights, self.stages, self.device = weights, stages, torch.device("cpu")
        self._models = _read(path_of(weights))
        self.codebooks = _codebooks(self._models[QUANTIZER])[:stages]

    def config(self) -> dict:
        digest = hashlib.sha256(b"".join(hashlib.sha256(self._models[name]).digest() for name in FILES))
        return {
            "name": self.name, "weights": self.weights, "weights_sha256": digest.hexdigest(), "stages": self.stages
        }  # fmt: skip

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.stages, 1, frames(self.name, HOP, height, width)

    def tokens(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> u8 [B,stages,1,T/hop]: the nearest vector of each stage to what those before have left over."""
        rest = self.encode(sounds).squeeze(2).transpose(1, 2).numpy().copy()  # [B,F,D]
        codes = np.empty((len(rest), self.stages, 1, rest.shape[1]), np.uint8)
        for stage, table in enumerate(self.codebooks):
            nearest = np.square(rest[..., None, :] - table).sum(-1).argmin(-1)
            codes[:, stage, 0] = nearest
            rest -= table[nearest]
        return torch.from_numpy(codes)

    def encode(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> the encoder's features, f32 [B,64,1,T/hop]."""
        pieces = sounds.cpu().float().unflatten(1, (-1, 1, HOP)).numpy()
        return torch.from_numpy(self._run(ENCODER, pieces)).transpose(1, 2)[:, :, None].contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,64,1,F] -> f32 [B,F*hop], full scale at 1."""
        pieces = latents.cpu().float()[:, :, 0].transpose(1, 2)[:, :, None, None].contiguous().numpy()
        return to_wave(torch.from_numpy(self._run(DECODER, pieces)))

    def flip(self, latents: Tensor) -> None:
        """None: sound has no mirror."""
        return

    def _run(self, name: str, clips: np.ndarray) -> np.ndarray:
        """f32 [B,F,…], a frame at a time through the model -> [B,F,n], or [B,F*hop] of sound."""

        def one(clip: np.ndarray) -> np.ndarray:
            # A fresh interpreter: its state outlives a clip, whatever is reset.
            model = _interpreter(self._models[name])
            taken, given = (model.get_input_details()[0]["index"], model.get_output_details()[0]["index"])
            outputs = []
            for frame in clip:
                model.set_tensor(taken, frame)
                model.invoke()
                outputs.append(model.get_tensor(given)[0])
            return np.concatenate(outputs)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return np.stack(list(pool.map(one, clips)))


def _read(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in FILES}
    except OSError as error:
        raise CodecError(
            f"no weights of Lyra at {folder} ({error.strerror or error})",
            f"give a folder with {', '.join(FILES)} of google/lyra as {opt('weights')}",
        ) from error


def _codebooks(model: bytes) -> list[np.ndarray]:
    """The quantizer's tables, f32 [16,64] each, from coarse to fine."""
    interpreter = _interpreter(model)
    places = {detail["name"]: detail["index"] for detail in interpreter.get_tensor_details()}
    try:
        tables = [interpreter.get_tensor(places[f"transpose_{s}" if s else "transpose"]).copy() for s in range(STAGES)]
    except (KeyError, ValueError) as error:
        raise CodecError(f"{QUANTIZER} is not that of Lyra v2 ({error})", "download it again") from error
    if any(table.shape != (LEVELS, FEATURES) or table.dtype != np.float32 for table in tables):
        raise CodecError(f"{QUANTIZER} is not that of Lyra v2: its codebooks differ", "download it again")
    return tables


def _interpreter(model: bytes) -> Any:
    try:
        interpreter = _litert()(model_content=model, num_threads=1)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise CodecError(f"a model of Lyra cannot be read ({error})", "download it again") from error
    return interpreter


def _litert() -> Callable[..., Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except (ImportError, OSError) as error:
        raise SystemFault(
            "codec 'lyra' needs ai-edge-litert, which is not installed", "pip install 'latentprep[audio]'"
        ) from error
    return Interpreter
