"""What is decided once, from a few samples, before the first shard: the quantizer and the compression."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from latentprep.encoding.pipeline import Stages, check_finite, decoded, latents_of
from latentprep.errors import SourceError
from latentprep.format.manifest import Manifest, Plan, ShardId, train_split
from latentprep.format.zarr_store import choose_compression
from latentprep.progress import ProgressFactory
from latentprep.quantizing.scalar import code_statistics, fit_quantizer, quantize

FEW_IMAGES = 32  # calibration images: with fewer, the ranges are guesses


def calibrate(stages: Stages, asked: Plan, count: int, progress: ProgressFactory) -> Manifest:
    """Fit the quantizer and choose the compression on up to `count` samples, spread evenly over the train split.

    The plan's seed decides which sample is drawn from each stretch of the split. The codec gets one image at a time:
    the last bits of its latents may depend on how many images are in the batch. So the same source gives the same
    manifest, whatever the batch size.

    Raises `SourceError` if no sample can be decoded, `CodecError` for latents that are not finite.
    """
    split = train_split(asked.splits)
    rows = calibration_rows(asked.splits[split], count, asked.transform["seed"])
    first = replace(asked, transform={**asked.transform, "views": 1})
    latents, reasons = [], []
    per_batch = stages.batch_samples(1, asked.transform["size"])
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
        if (doubt := doubtful(everything)) is not None:
            bar.note(f"warning: {doubt}; the ranges may not fit other images")
    quantizer = fit_quantizer(everything, asked.bits, asked.joint)
    codes = quantize(everything, quantizer)
    return asked.manifest(quantizer, code_statistics(codes, quantizer), choose_compression(codes.numpy()[:, None]))


def doubtful(latents: Tensor) -> str | None:
    """Why ranges fitted to these latents, f32 [B,C,h,w], may not fit others; None if there is no reason to think so."""
    if (latents == latents[:1]).all():
        return f"all {len(latents)} calibration images are alike" if len(latents) > 1 else "calibrated on 1 image"
    if len(latents) < FEW_IMAGES:
        return f"calibrated on only {len(latents)} images, fewer than {FEW_IMAGES}"
    return None


def calibration_rows(rows: int, count: int, seed: int) -> list[int]:
    """`count` of `rows` rows, or all if there are not more: one drawn from each of `count` equal stretches."""
    if rows <= count:
        return list(range(rows))
    edges = np.arange(count + 1) * rows // count
    return np.random.default_rng([seed, rows]).integers(edges[:-1], edges[1:]).tolist()
