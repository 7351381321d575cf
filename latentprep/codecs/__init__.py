"""Codecs: lossy transforms of images to latents and back, behind one protocol."""

from latentprep.codecs.base import Codec, codec_class, codec_from_config, codec_names, flip_signs, make_codec

__all__ = ["Codec", "codec_class", "codec_from_config", "codec_names", "flip_signs", "make_codec"]
