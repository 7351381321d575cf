"""Fewer bits from a dataset's own codes: no image is read and no codec runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import __version__
from .console import ProgressFactory, silent
from .encoder import CALIBRATION, EncodeResult, encode_result, plan
from .errors import DatasetError, UsageError, system_fault
from .format.commit import commit_shard, create_dataset, locked, make_folder, write_errors
from .format.dataset import LatentDataset, open_dataset
from .format.manifest import INVALID_LABEL, Manifest, ShardRecord, train_split
from .format.quantizer import Quantizer, check_bits
from .format.zarr_store import choose_compression, encode_shard_files
from .pipeline import calibration_rows
from .quantize import fit_quantizer
from .resume import check_same, stored_manifest


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
    source = dataset if isinstance(dataset, LatentDataset) else open_dataset(dataset)
    if bits >= source.quantizer.bits:
        raise UsageError(
            f"{source.root} has {source.quantizer.bits} bits a code; requantizing to {bits} would gain nothing",
            f"use --bits 1 to {source.quantizer.bits - 1}" if source.quantizer.bits > 1 else "encode with more bits",
        )
    for split in source.splits:
        source.check_complete(split)
    root = Path(out)
    if root.resolve() == source.root.resolve():
        raise UsageError(f"--out is the dataset itself, {root}", "name another folder")
    manifest = requantized_manifest(source, bits)
    start = time.monotonic()
    try:
        make_folder(root)
        with locked(root):
            stored = stored_manifest(root, overwrite)
            if stored is not None:
                check_same(root, stored, manifest)
                if stored.quantizer != manifest.quantizer:
                    raise DatasetError(f"{root} was not made from {source.root}", "choose another --out")
                manifest = stored
            create_dataset(root, manifest)
            target = open_dataset(root)
            jobs = [job for job in plan(manifest) if not ((r := target.record(*job)) and target.is_whole(r))]
            encoded = 0
            with progress("requantizing", sum(manifest.splits.values()), "samples", 0) as bar:
                for split, index in jobs:
                    encoded += _requantize_shard(source, target, split, index).rows
                    bar.advance(manifest.rows_in_shard(split, index))
            records = [record for split in manifest.splits for record in target.records(split)]
            write_errors(root, records)
    except OSError as error:
        raise system_fault(error) from error
    return encode_result(root, manifest, records, encoded=encoded, seconds=time.monotonic() - start)


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


def _requantize_shard(source: LatentDataset, target: LatentDataset, split: str, index: int) -> ShardRecord:
    record, shard = source.committed(split, index), source.read_shard(split, index)
    table, outside = code_table(source.quantizer, target.quantizer)
    codes = np.empty_like(shard.codes)
    saturated = []
    for channel, (new, out) in enumerate(zip(table, outside, strict=True)):
        plane = shard.codes[:, :, channel]
        codes[:, :, channel] = new[plane]
        counts = np.bincount(plane[shard.labels != INVALID_LABEL].ravel(), minlength=len(out))
        saturated.append(int(counts[out].sum()))
    codes[shard.labels == INVALID_LABEL] = 0
    made = replace(record, files={}, saturated=tuple(saturated), manifest=target.manifest_sha256)
    return commit_shard(
        target.root, made, encode_shard_files(target.manifest, split, index, codes, shard.labels, shard.keys)
    )


def code_table(source: Quantizer, target: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """For each channel and source code, the target's code, u8 [C,L], and whether its latent saturates, bool [C,L]."""
    channels = len(source.lo)
    every = np.broadcast_to(np.arange(source.levels, dtype=np.uint8), (channels, 1, source.levels))
    latents = source.dequantize(every)
    lo, step = (np.array(v, np.float32)[:, None, None] for v in (target.lo, target.step))
    outside = (latents < lo) | (latents > lo + step * target.levels)
    return target.quantize(latents)[:, 0], outside[:, 0]
