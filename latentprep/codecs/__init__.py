"""Codecs: lossy transforms of images or sounds to latents and back, behind one protocol."""

from latentprep.codecs.base import (
    Codec,
    codec_class,
    codec_from_config,
    codec_names,
    codec_spec,
    encoder_of,
    flip_signs,
    joint_bits,
    make_codec,
    media_of,
    open_codec,
    parse_codec,
    split_codecs,
)

__all__ = [
    "Codec",
    "codec_class",
    "codec_from_config",
    "codec_names",
    "codec_spec",
    "encoder_of",
    "flip_signs",
    "joint_bits",
    "make_codec",
    "media_of",
    "open_codec",
    "parse_codec",
    "split_codecs",
]
