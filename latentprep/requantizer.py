"""Fewer bits from a dataset's own codes: no image is read and no codec runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import __version__
from .console import ProgressFactory, silent
from .derived import derive, every_row, opened
from .encoder import CALIBRATION, EncodeResult
from .errors import UsageError
from .format.dataset import Codes, LatentDataset
from .format.manifest import INVALID_LABEL, Manifest, train_split
from .format.quantizer import Quantizer, check_bits
from .format.zarr_store import choose_compression
from .pipeline import calibration_rows
from .quantize import fit_quantizer


def requantize(
    dataset: str | Path | LatentDataset,
    *,
    bits: int,
    out: str | Path,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Make `out`, the dataset with `bits` bits a code, from the codes of `dataset`. Run again, it resumes.

    The range is fitted anew, on the samples that `encode` calibrates on, so that the outcome is that of encoding at
    `bits` directly but for the first quantizer's error.

    Raises `UsageError` if the dataset has no more than `bits` bits, `DatasetError` if it is damaged or not complete.
    """
    check_bits(bits)
    source = opened(dataset)
    if bits >= source.quantizer.bits:
        raise UsageError(
            f"{source.root} has {source.quantizer.bits} bits a code; requantizing to {bits} would gain nothing",
            f"use --bits 1 to {source.quantizer.bits - 1}" if source.quantizer.bits > 1 else "encode with more bits",
        )
    manifest = requantized_manifest(source, bits)
    table, outside = code_table(source.quantizer, manifest.quantizer)

    def fewer_bits(shard: Codes, saturated: tuple[int, ...]) -> tuple[Codes, tuple[int, ...]]:
        codes, counts = np.empty_like(shard.codes), []
        for channel, (new, out) in enumerate(zip(table, outside, strict=True)):
            plane = shard.codes[:, :, channel]
            codes[:, :, channel] = new[plane]
            found = np.bincount(plane[shard.labels != INVALID_LABEL].ravel(), minlength=len(out))
            counts.append(int(found[out].sum()))
        codes[shard.labels == INVALID_LABEL] = 0
        return replace(shard, codes=codes), tuple(counts)

    return derive(
        out, manifest, [source], every_row([source]), fewer_bits,
        title="requantizing", overwrite=overwrite, progress=progress,
    )  # fmt: skip


def requantized_manifest(source: LatentDataset, bits: int) -> Manifest:
    """The source's manifest with a quantizer of `bits` bits fitted to its calibration samples' latents."""
    manifest = source.manifest
    split = train_split(manifest.splits)
    rows = calibration_rows(manifest.splits[split], CALIBRATION, manifest.transform["seed"])
    drawn = []
    for index in sorted({row // manifest.shard_rows for row in rows}):
        shard = source.read_shard(split, index)
        here = [row - index * manifest.shard_rows for row in rows if row // manifest.shard_rows == index]
        drawn.append(shard.codes[[place for place in here if shard.labels[place] != INVALID_LABEL], 0])
    latents = manifest.quantizer.dequantize(np.concatenate(drawn))
    quantizer = fit_quantizer(torch.from_numpy(latents), bits)
    codes = quantizer.quantize(latents)[:, None]
    compression = choose_compression(codes)
    return replace(manifest, quantizer=quantizer, compression=compression, written_by=f"latentprep {__version__}")


def code_table(source: Quantizer, target: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """For each channel and source code, the target's code, u8 [C,L], and whether its latent saturates, bool [C,L]."""
    channels = len(source.lo)
    every = np.broadcast_to(np.arange(source.levels, dtype=np.uint8), (channels, 1, source.levels))
    latents = source.dequantize(every)
    lo, step = (np.array(v, np.float32)[:, None, None] for v in (target.lo, target.step))
    outside = (latents < lo) | (latents > lo + step * target.levels)
    return target.quantize(latents)[:, 0], outside[:, 0]
