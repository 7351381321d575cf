"""`requantize`: fewer bits per code, or fewer stages, from a dataset's own codes. No codec runs, no image is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from latentprep import __version__
from latentprep.derived.derive import derive, every_row, opened
from latentprep.encoding.calibration import CALIBRATION, calibration_rows
from latentprep.encoding.encode import EncodeResult, check_joint, joint_by_default
from latentprep.errors import UsageError, check_whole, opt
from latentprep.format.dataset import Codes, LatentDataset
from latentprep.format.manifest import INVALID_LABEL, Manifest, train_split
from latentprep.format.quantizer import LEAST_MEAN, MAX_STAGES, Codebook, Quantizer, Statistics, check_mean_bits
from latentprep.format.zarr_store import choose_compression
from latentprep.progress import ProgressFactory, silent
from latentprep.quantizing.allocation import fit_allocated
from latentprep.quantizing.scalar import code_statistics, dequantize, fit_quantizer, quantize, quantize_counting

Recoder = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_SEARCHED = 64  # samples in one joint search


def requantize(
    dataset: str | Path | LatentDataset,
    *,
    bits: float | None = None,
    stages: int | None = None,
    out: str | Path,
    equal_bits: bool | None = None,
    joint: bool | None = None,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Make a dataset of `bits` bits per value in the folder `out`, from the codes of `dataset`. Run again, it resumes.

    bits: on average, channels get them by what they are worth, or in every channel, with `equal_bits` or `joint`. They
    and the ranges are fitted again, on the samples that `encode` calibrates on. So the result is that of encoding at
    `bits` directly, except for the first quantizer's error. joint: choose the codes of a sample together; the default
    is that of `encode`. stages: in place of bits, how many to keep of tokens, the first ones; they are a coarser whole.

    Raises `UsageError` unless the dataset has more than `bits` bits or `stages` stages, `DatasetError` if it is damaged
    or incomplete.

    >>> latentprep.requantize("shards", bits=2, out="shards-2bit").bits
    2
    """
    source = opened(dataset)
    if isinstance(source.quantizer, Codebook):
        return _with_fewer_stages(source, bits, stages, joint, out, overwrite, progress)
    if stages is not None or bits is None:
        raise UsageError(
            f"the codes of {source.root} have no stages" if stages is not None else "requantize needs a number of bits",
            f"use {opt('bits', 2)}",
        )
    bits = check_mean_bits(bits, equal_bits, joint, source.manifest.latent[0])
    most = source.quantizer.mean_bits
    if bits >= most:
        raise UsageError(
            f"{source.root} has {most:g} bits per value; requantizing to {bits:g} would gain nothing",
            f"use {opt('bits')} below {most:g}" if most > LEAST_MEAN else "encode with more bits",
        )
    manifest = requantized_manifest(source, bits, equal_bits, joint)
    recode = recoder(source.quantizer, manifest.quantizer)

    def fewer_bits(shard: Codes, saturated: tuple[int, ...]) -> tuple[Codes, tuple[int, ...]]:
        codes, valid = np.zeros_like(shard.codes), shard.labels != INVALID_LABEL
        codes[valid], counts = recode(shard.codes[valid])
        return replace(shard, codes=codes), tuple(counts.tolist())

    return derive(
        out, manifest, [source], every_row([source]), fewer_bits,
        title="requantizing", overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _with_fewer_stages(
    source: LatentDataset,
    bits: float | None,
    stages: int | None,
    joint: bool | None,
    out: str | Path,
    overwrite: bool,
    progress: ProgressFactory,
) -> EncodeResult:
    codebook = source.quantizer
    assert isinstance(codebook, Codebook)
    most, given = len(codebook.sizes), [opt(n, v) for n, v in (("bits", bits), ("joint", joint)) if v]
    if given or stages is None:
        raise UsageError(
            f"the codes of {source.root} are tokens"
            + (f", so {given[0]} has no meaning" if given else "; requantize needs a number of stages to keep"),
            f"use {opt('stages', max(1, most // 2))}",
        )
    check_whole("stages", stages, 1, MAX_STAGES)
    if stages >= most:
        raise UsageError(
            f"{source.root} has {most} stages; to keep {stages} would gain nothing",
            f"use {opt('stages')} 1 to {most - 1}" if most > 1 else "encode with more stages",
        )

    def first(shard: Codes, saturated: tuple[int, ...]) -> tuple[Codes, tuple[int, ...]]:
        return replace(shard, codes=np.ascontiguousarray(shard.codes[:, :, :stages])), saturated[:stages]

    return derive(
        out, staged_manifest(source, stages), [source], every_row([source]), first,
        title="requantizing", overwrite=overwrite, progress=progress,
    )  # fmt: skip


def staged_manifest(source: LatentDataset, stages: int) -> Manifest:
    """The source's manifest with the first `stages` stages of its codebook, whose file stays as it is."""
    manifest, codebook = source.manifest, source.quantizer
    assert isinstance(codebook, Codebook)
    counted, kept = manifest.statistics, codebook.first(stages)
    codes = _calibration_codes(source)[:, None, :stages].astype(kept.dtype, copy=False)
    return replace(
        manifest,
        quantizer=kept,
        latent=(stages, *manifest.latent[1:]),
        statistics=counted and Statistics(counted.mean[:stages], counted.std[:stages]),
        compression=choose_compression(codes),
        written_by=f"latentprep {__version__}",
    )


def requantized_manifest(
    source: LatentDataset, bits: float, equal_bits: bool | None = None, joint: bool | None = None
) -> Manifest:
    """The source's manifest with a new quantizer of `bits` bits, fitted to the latents of its calibration samples."""
    manifest = source.manifest
    if joint is None:
        joint = joint_by_default(bits, manifest.latent[0], manifest.codec["name"])
    equal_bits = bool(equal_bits or joint)
    check_joint(joint, manifest.latent[0])
    latents = dequantize(torch.from_numpy(_calibration_codes(source)), manifest.quantizer)
    quantizer = fit_quantizer(latents, int(bits), joint) if equal_bits else fit_allocated(latents, bits)
    codes = quantize(latents, quantizer)
    compression = choose_compression(codes.numpy()[:, None])
    return replace(
        manifest,
        quantizer=quantizer,
        rate=None,
        mean_bits=None if equal_bits else float(bits),
        statistics=code_statistics(codes, quantizer),
        compression=compression,
        written_by=f"latentprep {__version__}",
    )


def _calibration_codes(source: LatentDataset) -> np.ndarray:
    """View 0 of the samples that `encode` calibrates on, u8 or u16 [n,C,h,w]."""
    manifest = source.manifest
    split = train_split(manifest.splits)
    rows = calibration_rows(manifest.splits[split], CALIBRATION, manifest.transform["seed"])
    drawn = []
    for index in sorted({row // manifest.shard_rows for row in rows}):
        shard = source.read_shard(split, index, keys=False)
        here = [row - index * manifest.shard_rows for row in rows if row // manifest.shard_rows == index]
        drawn.append(shard.codes[[place for place in here if shard.labels[place] != INVALID_LABEL], 0])
    return np.concatenate(drawn)


def recoder(source: Quantizer, target: Quantizer) -> Recoder:
    """A function that turns codes of `source`, u8 [n,V,C,h,w], into codes of `target`.

    It also counts each channel's latents outside the target's range, i64 [C]. It looks codes up in a table, unless they
    depend on their neighbours too.
    """
    if not source.filter and not target.filter:
        table, outside = code_table(source, target)

        def looked_up(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            recoded, counts = np.empty_like(codes), np.zeros(len(table), np.int64)
            for channel, (new, out) in enumerate(zip(table, outside, strict=True)):
                plane = codes[:, :, channel]
                recoded[:, :, channel] = new[plane]
                counts[channel] = np.bincount(plane.ravel(), minlength=len(out))[out].sum()
            return recoded, counts

        return looked_up

    def searched(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        recoded, counts = np.empty_like(codes), np.zeros(len(source.lo), np.int64)
        for first in range(0, len(codes), _SEARCHED):
            some = torch.from_numpy(codes[first : first + _SEARCHED])
            new, outside, _ = quantize_counting(dequantize(some.flatten(0, 1), source), target)
            recoded[first : first + _SEARCHED] = new.unflatten(0, some.shape[:2]).numpy()
            counts += outside.numpy()
        return recoded, counts

    return searched


def code_table(source: Quantizer, target: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """For each channel and source code, the target's code, u8 [C,L], and whether its latent saturates, bool [C,L].

    L is the largest number of levels in the source. Where a channel has fewer, the other entries mean nothing.
    """
    every = torch.arange(source.levels, dtype=torch.uint8).expand(len(source.lo), 1, -1)
    latents = dequantize(every, source)
    lo, step = (torch.tensor(v)[:, None, None] for v in (target.lo, target.step))
    levels = torch.tensor(target.channel_levels)[:, None, None]
    outside = (latents < lo) | (latents > lo + step * levels)
    return quantize(latents, target)[:, 0].numpy(), outside[:, 0].numpy()
