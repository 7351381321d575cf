"""Codes of codecs that give them themselves: tokens, indices into residual codebooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentprep.device import torch_dtype
from latentprep.errors import CodecError, UsageError, opt
from latentprep.format.quantizer import MOST_TOKEN_BITS, Codebook

_WHOLE = (torch.uint8, torch.int32, torch.int64)


def codebook_of(codec: Any) -> Codebook | None:
    """The codebooks of a codec that gives tokens; None for one whose latents need a quantizer.

    Raises `CodecError` for tables that codes cannot index.
    """
    if not hasattr(codec, "tokens"):
        return None
    large = max(map(len, codec.codebooks), default=0)
    if large > 1 << MOST_TOKEN_BITS:
        raise CodecError(
            f"codec '{codec.name}' has tokens of {(large - 1).bit_length()} bits; a code has at most {MOST_TOKEN_BITS}",
            f"use a codec whose codebooks have at most {1 << MOST_TOKEN_BITS:,} vectors",
        )
    return Codebook.of_tables(codec.codebooks)


def check_tokens(codec: Any, codebook: Codebook, **asked: Any) -> None:
    """Raises `UsageError` for options that a codec which gives tokens leaves no room for. asked: those, or None."""
    for name, value in asked.items():
        if value and not (name == "bits" and value == codebook.bits):
            raise UsageError(
                f"codec '{codec.name}' gives codes of {codebook.bits} bits itself: {opt(name, value)} has no effect",
                f"leave it out; latentprep requantize with {opt('stages')} makes a dataset smaller",
            )


def kept(tokens: Tensor, codebook: Codebook) -> Tensor:
    """u8, i32 or i64 [B,S,h,w] of a codec -> u8 or i32 [B,N,h,w]: those of the codebook's stages, which are the first
    of the codec's.

    Raises `CodecError` for tokens that are no indices into the codebook.
    """
    if tokens.dtype not in _WHOLE or tokens.ndim != 4 or tokens.shape[1] < len(codebook.sizes):
        raise CodecError(
            f"the codec gave tokens {tokens.dtype} {list(tokens.shape)}; they must be uint8, int32 or int64 "
            f"[B,stages,h,w] with {len(codebook.sizes)} stages"
        )
    codes = tokens[:, : len(codebook.sizes)]
    sizes = torch.tensor(codebook.sizes, device=tokens.device).view(-1, 1, 1)
    if codes.numel() and bool(((codes < 0) | (codes >= sizes)).any()):
        raise CodecError("the codec gave a token beyond its stage's codebook", "report this to the codec's author")
    return codes.to(torch_dtype(codebook.dtype)).contiguous()


def summed(codes: Tensor, codebook: Codebook) -> Tensor:
    """u8 or i32 [B,N,h,w] -> f32 [B,D,h,w]: the sum of the vectors that codes name."""
    return torch.from_numpy(codebook.dequantize(codes.cpu().numpy())).to(codes.device)
