"""What `latentprep codecs` shows: every installed codec, what it makes of an image, and whether it can run here."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import asdict, dataclass
from typing import Any

from latentprep.codecs import encodec, lyra
from latentprep.codecs.autoencoder import AutoencoderCodec, find_weights
from latentprep.codecs.base import (
    MAX_SIZE,
    check_multiple,
    codec_class,
    codec_names,
    codec_options,
    make_codec,
    media_of,
)
from latentprep.codecs.learned import LearnedCodec
from latentprep.codecs.walloc import WallocCodec
from latentprep.errors import LatentError, check_whole
from latentprep.format.quantizer import check_mean_bits
from latentprep.sources.kinds import SOUND

# Latent channels and factor of our autoencoders, so that listing them loads nothing (their model cards say so).
_LATENTS = {
    "sd-vae": (4, 8),
    "sdxl-vae": (4, 8),
    "taesd": (4, 8),
    "taesdxl": (4, 8),
    "taesd3": (16, 8),
    "taef1": (16, 8),
    "walloc": (12, 8),
}
# Stages, frames a second and bits of codecs that give tokens of sound.
_TOKENS = {
    "lyra": (lyra.STAGES, lyra.RATE // lyra.HOP, (lyra.LEVELS - 1).bit_length()),
    "encodec": (encodec.STAGES, encodec.RATE // encodec.HOP, encodec.BITS),
}


@dataclass(frozen=True)
class CodecRow:
    """One codec: its latents and bytes of codes for a square image, or a second of sound, and where its weights are.

    options: what may follow the name, with defaults; None is one that depends on the machine.
    latent: (C, h, w), or None where the codec cannot be built or cannot take that size.
    weights: ``none needed``, ``yes`` (on this machine), ``no`` (would be downloaded), or what is missing or makes them.
    """

    name: str
    about: str
    options: dict[str, Any]
    latent: tuple[int, int, int] | None
    code_bytes: int | None
    weights: str

    def to_json(self) -> dict:
        return asdict(self)


def list_codecs(size: int = 224, bits: float = 4) -> list[CodecRow]:
    """A row for every installed codec; `code_bytes` before compression, for `size`×`size` pixels at `bits` bits.

    Raises `UsageError` for a size or bits out of range.
    """
    check_mean_bits(bits)
    check_whole("size", size, 1, MAX_SIZE)
    return [_row(name, size, bits) for name in codec_names()]


def _row(name: str, size: int, bits: float) -> CodecRow:
    try:
        kind = codec_class(name)
    except LatentError as error:  # a plug-in that does not import must not hide the others
        return CodecRow(name, "", {}, None, None, error.message)
    about = (inspect.getdoc(kind) or "").split("\n")[0].rstrip(".")
    options = {key: v if isinstance(v, int | float | str | None) else str(v) for key, v in codec_options(name).items()}
    try:
        if name in _LATENTS:
            channels, factor = _LATENTS[name]
            latent = (channels, *check_multiple(name, factor, size, size))
        elif name in _TOKENS:
            stages, frames, bits = _TOKENS[name]
            latent = (stages, 1, frames)
        else:
            codec: Any = make_codec(name)
            second = (1, codec.rate // codec.hop * codec.hop) if media_of(codec) == SOUND else None
            latent = codec.latent_shape(*(second or (size, size)))
            if hasattr(codec, "tokens"):
                bits = (max(map(len, codec.codebooks)) - 1).bit_length()
    except LatentError:
        return CodecRow(name, about, options, None, None, weights_at_hand(name))
    code_bytes = int(latent[0] * latent[1] * latent[2] * bits // 8)
    return CodecRow(name, about, options, latent, code_bytes, weights_at_hand(name))


def weights_at_hand(name: str) -> str:
    """``none needed``, ``yes``, ``no``, or what makes them, without loading or downloading anything."""
    kind = codec_class(name)
    if issubclass(kind, LearnedCodec):
        return "yes"
    if issubclass(kind, lyra.LyraCodec):
        missing = importlib.util.find_spec("ai_edge_litert") is None
        return "needs pip install 'latentprep[audio]'" if missing else "in google/lyra"
    if not issubclass(kind, AutoencoderCodec | WallocCodec | encodec.EncodecCodec):
        return "none needed"
    package, extra = ("transformers", "audio") if name in _TOKENS else ("diffusers", "vae")
    if importlib.util.find_spec(package) is None:
        return f"needs pip install 'latentprep[{extra}]'"
    try:
        find_weights(kind.default_weights, name, kind.files, download=False)
    except LatentError:
        return "no"
    return "yes"
