"""What `latentprep codecs` shows: every installed codec, what it makes of an image, and whether it can run here."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import asdict, dataclass

from latentprep.codecs.autoencoder import AutoencoderCodec, find_weights
from latentprep.codecs.base import check_multiple, codec_class, codec_names, make_codec
from latentprep.errors import LatentError

# Latent channels and factor of our autoencoders, so that listing them loads nothing (their model cards say so).
_LATENTS = {
    "sd-vae": (4, 8),
    "sdxl-vae": (4, 8),
    "taesd": (4, 8),
    "taesdxl": (4, 8),
    "taesd3": (16, 8),
    "taef1": (16, 8),
}


@dataclass(frozen=True)
class CodecRow:
    """One codec: its latent shape and bytes of codes for a square image, and where its weights are.

    latent: (C, h, w), or None where the codec cannot be built or cannot take that size.
    weights: ``none needed``, ``yes`` (at hand), ``no`` (would be downloaded), or what is missing.
    """

    name: str
    about: str
    latent: tuple[int, int, int] | None
    code_bytes: int | None
    weights: str

    def to_json(self) -> dict:
        return asdict(self)


def list_codecs(size: int = 224, bits: int = 4) -> list[CodecRow]:
    """A row for every installed codec; `code_bytes` before compression, for `size`×`size` pixels at `bits` bits."""
    return [_row(name, size, bits) for name in codec_names()]


def _row(name: str, size: int, bits: int) -> CodecRow:
    try:
        kind = codec_class(name)
    except LatentError as error:  # a plug-in that does not import must not hide the others
        return CodecRow(name, "", None, None, error.message)
    about = (inspect.getdoc(kind) or "").split("\n")[0].rstrip(".")
    try:
        if name in _LATENTS:
            channels, factor = _LATENTS[name]
            latent = (channels, *check_multiple(name, factor, size, size))
        else:
            latent = make_codec(name).latent_shape(size, size)
    except LatentError:
        return CodecRow(name, about, None, None, weights_at_hand(name))
    return CodecRow(name, about, latent, latent[0] * latent[1] * latent[2] * bits // 8, weights_at_hand(name))


def weights_at_hand(name: str) -> str:
    """``none needed``, ``yes``, ``no``, or ``needs pip install …``, without loading or downloading anything."""
    kind = codec_class(name)
    if not issubclass(kind, AutoencoderCodec):
        return "none needed"
    if importlib.util.find_spec("diffusers") is None:
        return "needs pip install 'latentprep[vae]'"
    try:
        find_weights(kind.default_weights, name, download=False)
    except LatentError:
        return "no"
    return "yes"
