"""What is decided once, from a few samples, before the first shard: the quantizer and the compression."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentprep.codecs.base import Codec
from latentprep.encoding.pipeline import Stages, check_finite, decoded, latents_of
from latentprep.errors import SourceError
from latentprep.format.hashes import HASH_BYTES
from latentprep.format.manifest import Manifest, Plan, ShardId, train_split
from latentprep.format.quantizer import Quantizer
from latentprep.format.stores import store_of
from latentprep.format.zarr_store import choose_compression
from latentprep.progress import ProgressFactory
from latentprep.quantizing.allocation import fit_allocated
from latentprep.quantizing.rate import fit_rate
from latentprep.quantizing.scalar import channel_values, code_statistics, fit_quantizer, quantize
from latentprep.quantizing.tokens import codebook_of
from latentprep.sources.media import medium_of

CALIBRATION = 256  # images, spread evenly over the train split
RATE_CALIBRATION = 1024  # where bytes are to be met: those of images differ more than their ranges …
LIGHT_CALIBRATION = 4096  # … and those of codecs that compute little most
FEW_SAMPLES = 32  # of calibration: with fewer, the ranges are guesses
_DECODED = 16  # of them, to see what an error in each channel does


def calibrate(stages: Stages, asked: Plan, progress: ProgressFactory, count: int | None = None) -> Manifest:
    """Fit the quantizer and choose the compression on up to `count` samples, spread evenly over the train split.

    count: by default as many as what was asked for needs.

    The plan's seed decides which sample is drawn from each stretch of the split. The codec gets one image at a time:
    the last bits of its latents may depend on how many images are in the batch. So the same source gives the same
    manifest, whatever the batch size. A codec that gives tokens brings its codebooks; nothing is fitted.

    Raises `SourceError` if no sample can be decoded, `CodecError` for latents that are not finite.
    """
    if count is None:
        light = LIGHT_CALIBRATION if getattr(stages.codec, "light", False) else RATE_CALIBRATION
        count = CALIBRATION if asked.rate is None else light
    split = train_split(asked.splits)
    rows = calibration_rows(asked.splits[split], count, asked.transform["seed"])
    first = replace(asked, transform={**asked.transform, "views": 1})
    latents, reasons = [], []
    per_batch = stages.batch_samples(1, *medium_of(asked.transform).extent)
    specs = [(ShardId(split, 0), rows[i : i + per_batch]) for i in range(0, len(rows), per_batch)]
    with ThreadPoolExecutor(stages.threads()) as pool, progress("calibrating", len(rows), "images", 0) as bar:
        for batch in decoded(stages, first, specs, pool):
            for place, row in enumerate(batch.rows):
                if row not in batch.invalid:
                    one = replace(batch, rows=[row], images=batch.images[place : place + 1])
                    z = latents_of(stages, one)
                    check_finite(one, torch.isfinite(z).all(dim=(1, 2, 3)).cpu(), stages.source.keys(split))
                    latents.append(z.cpu())
            reasons += [f"{stages.source.keys(split)[row]}: {why}" for row, why in batch.invalid.items()]
            bar.advance(len(batch.rows))
        if not latents:
            raise SourceError(
                f"none of {len(rows)} images drawn from split '{split}' can be decoded; the first is {reasons[0]}",
                "check that the source holds images",
            )
        everything = torch.cat(latents)
        if not hasattr(stages.codec, "tokens") and (doubt := doubtful(everything)) is not None:
            bar.note(f"warning: {doubt}; the ranges may not fit other images")
        if asked.mean_bits is not None and (same := channel_values(everything)[1].count(True)):
            bar.note(
                f"warning: {same} of {len(everything[0])} channels are constant on these images and get no bits; equal "
                "bits leave them room, if other images differ there, as coloured ones do from grey ones"
            )
    quantizer: Quantizer
    if (codebook := codebook_of(stages.codec)) is not None:
        tokens = quantize(everything, codebook).numpy().astype(codebook.dtype, copy=False)
        quantizer, compression = codebook, choose_compression(tokens[:, None])
    elif asked.rate is None:
        quantizer = fit_to_bits(everything, asked)
        compression = choose_compression(quantize(everything, quantizer).numpy()[:, None])
    else:
        quantizer, compression = fit_to_rate(stages.codec, everything, asked, asked.rate)
    codes = quantize(everything, quantizer)
    return asked.manifest(quantizer, code_statistics(codes, quantizer), compression)


def fit_to_bits(latents: Tensor, asked: Plan) -> Quantizer:
    """The quantizer of the bits that a plan has, fitted to the latents, f32 [B,C,h,w]."""
    if asked.mean_bits is not None:
        return fit_allocated(latents, asked.mean_bits)
    return fit_quantizer(latents, asked.bits, asked.joint)


def fit_to_rate(codec: Codec, latents: Tensor, asked: Plan, rate: float) -> tuple[Quantizer, list[dict]]:
    """A quantizer whose codes take so many bits per code on disk, and the compression that they then have.

    latents: f32 [B,C,h,w], the calibration draw. Which compression is best is decided on some of it, by a rough fit.
    """
    split = train_split(asked.splits)
    weights = decoded_error(codec, latents[:: -(-len(latents) // _DECODED)])

    def on_disk(compression: list[dict], codes: Tensor) -> float:
        bits = max(1, int(codes.max()).bit_length())
        manifest = asked.manifest(Quantizer(bits, (0.0,) * codes.shape[1], (1.0,) * codes.shape[1]), None, compression)
        manifest = replace(manifest, transform={**manifest.transform, "views": 1})
        size, random = 0, np.random.default_rng(0)
        for part in codes[:, None].split(asked.shard_rows):
            labels, keys = np.zeros(len(part), np.int32), list(map(str, range(len(part))))
            hashes = None if asked.content_hash is None else random.integers(0, 256, (len(part), HASH_BYTES), np.uint8)
            files = store_of(manifest).encode_shard_files(manifest, split, 0, part.numpy(), labels, keys, hashes)
            size += len(files[store_of(manifest).shard_files(manifest, split, 0)["codes"]])
        return 8 * size / codes.numel()

    some = latents[:: -(-len(latents) // CALIBRATION)]
    usual = choose_compression(quantize(some, fit_quantizer(some, 4)).numpy()[:, None])
    rough = fit_rate(some, rate, weights, partial(on_disk, usual))
    compression = choose_compression(quantize(some, rough).numpy()[:, None])
    return fit_rate(latents, rate, weights, partial(on_disk, compression)), compression


def decoded_error(codec: Codec, latents: Tensor) -> Tensor:
    """The squared error in decoded pixels for a unit of squared error in each channel: f32 [B,C,h,w] -> f32 [C]

    The codec's own ``error_weights``, if it has them. Else by normal noise of 0.3 of the latents' deviation, in one
    channel at a time: enough to stand out of decoded pixels' rounding.
    """
    if (weights := getattr(codec, "error_weights", None)) is not None:
        return torch.tensor(weights)
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * latents.std((0, 2, 3)).square().mean().sqrt().clamp(min=1e-6)
    drawn = noise * torch.randn(latents.shape, generator=generator)
    plain = codec.decode(latents).float()
    errors = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += drawn[:, channel]
        errors.append((codec.decode(moved).float() - plain).square().mean() / drawn[:, channel].square().mean())
    return torch.stack(errors).cpu()


def doubtful(latents: Tensor) -> str | None:
    """Why ranges fitted to these latents, f32 [B,C,h,w], may not fit others; None if there is no reason to think so."""
    if (latents == latents[:1]).all():
        return f"all {len(latents)} calibration samples are alike" if len(latents) > 1 else "calibrated on 1 sample"
    if len(latents) < FEW_SAMPLES:
        return f"calibrated on only {len(latents)} samples, fewer than {FEW_SAMPLES}"
    return None


def calibration_rows(rows: int, count: int, seed: int) -> list[int]:
    """`count` of `rows` rows, or all if there are not more: one drawn from each of `count` equal stretches."""
    if rows <= count:
        return list(range(rows))
    edges = np.arange(count + 1) * rows // count
    return np.random.default_rng([seed, rows]).integers(edges[:-1], edges[1:]).tolist()
