"""`preview`: a contact sheet of a dataset, and one that shows linear decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentprep.codecs.linear import LinearDecoder, load_linear_decoder, shrink
from latentprep.derived.requantize import recoder, requantized_manifest
from latentprep.device import NOT_ON_DEVICE, Fitting
from latentprep.errors import SourceError, UsageError, opt, system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.quantizer import Codebook, check_mean_bits
from latentprep.pictures.decode import open_decoder
from latentprep.pictures.samples import Decoder, Picked, decode_all, load_originals, pick
from latentprep.pictures.sheet import Column, channel_pictures, colour_pictures, draw_sheet, png
from latentprep.pictures.spectrogram import pixels
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.source import Source, open_own_source
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of
from latentprep.text import plural

LIMIT = 20
FEWER = (4, 2, 1)  # bits to show beside the stored ones, if fewer


@dataclass(frozen=True)
class PreviewResult:
    """A contact sheet: its file, how many samples of which split, its columns, and the folder of sounds, if any."""

    out: str
    split: str
    samples: int
    columns: tuple[str, ...]
    sounds: str | None = None

    def to_json(self) -> dict:
        return asdict(self)


def preview(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path = "preview.png",
    split: str | None = None,
    index: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    limit: int = LIMIT,
    bits: Sequence[float] | None = None,
    decoder: str = "codec",
    source: str | Path | Source | None = None,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    progress: ProgressFactory = silent,
) -> PreviewResult:
    """Draw a contact sheet of samples of a dataset as a PNG at `out`.

    For each sample: the original, if `source` is given or the dataset's own source is on this machine; decoded at the
    stored bits and at fewer (`bits`; by default 4, 2 and 1); its latent channels in false colours; three of them as
    red, green and blue. decoder: ``codec``, or ``linear``, which needs no neural network. Sounds are drawn as
    spectrograms, and written to a folder beside `out`, such as ``preview-sounds/000007-4-bits.flac``.
    """
    opened = open_dataset(dataset)
    picked = _picked(opened, split, index, classes, limit)
    maker = open_decoder(opened, decoder, weights, device)
    given = open_own_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column
    )  # fmt: skip
    columns = sample_columns(opened, picked, maker, bits=bits, source=given, progress=progress)
    return _drawn(opened, picked, columns, out)


def linear_preview(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path = "linear-decoder.png",
    split: str | None = None,
    index: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    limit: int = LIMIT,
    source: str | Path | Source | None = None,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weights: str | None = None,
    device: str = "auto",
) -> PreviewResult:
    """Draw a contact sheet of linear decoding, as a PNG at `out`.

    For each sample: the original; decoded by the network; the original shrunk to the latent grid; the latents decoded
    to that grid by the C×3 matrix; decoded to all pixels by the C×3·f² matrix; and the shrunk image turned into latents
    by the pseudo-inverse and decoded by the network.
    """
    opened = open_dataset(dataset)
    linear = load_linear_decoder(opened)
    picked = _picked(opened, split, index, classes, limit)
    given = open_own_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column
    )  # fmt: skip
    originals = load_originals(opened, given, picked)
    if originals is None:
        raise SourceError("the images are needed for the pseudo-inverse", f"say where they are with {opt('source')}")
    codec = open_decoder(opened, "codec", weights, device)
    latents = torch.from_numpy(opened.quantizer.dequantize(picked.codes))
    decode = Fitting(codec.decode, NOT_ON_DEVICE)
    back = torch.cat([decode(linear.latents_of(part)).cpu() for part in originals.split(32)])
    shrunk = ((shrink(originals, linear.factor) + 1) * 127.5).round().to(torch.uint8)
    columns = [
        Column("original", pixels(originals)),
        Column("decoder", pixels(decode_all(codec, picked.codes, opened.quantizer))),
        Column("shrunk", pixels(shrunk)),
        Column("D_L", pixels(linear.decode_small(latents))),
        Column("D_L, all pixels", pixels(linear.decode(latents))),
        Column("D_L†, decoder", pixels(back)),
    ]
    return _drawn(opened, picked, columns, out)


def sample_columns(
    dataset: LatentDataset,
    picked: Picked,
    decoder: Decoder,
    *,
    bits: Sequence[float] | None = None,
    source: Source | None = None,
    progress: ProgressFactory = silent,
) -> list[Column]:
    """The columns of a dataset's contact sheet; see `preview`."""
    if isinstance(dataset.quantizer, Codebook):
        return _staged_columns(dataset, dataset.quantizer, picked, decoder, bits, source, progress)
    stored = dataset.quantizer.mean_bits
    for b in bits or ():
        if check_mean_bits(b) > stored:
            raise UsageError(
                f"{dataset.root} has only {stored:.3g} bits per code", f"use {opt('bits')} up to {stored:.3g}"
            )
    shown = sorted(set(bits or [stored, *(b for b in FEWER if b < stored)]), reverse=True)
    originals, rate = load_originals(dataset, source, picked), dataset.manifest.transform.get("rate", 0)
    columns = [] if originals is None else [_column("original", originals, rate)]
    with progress("decoding", len(shown), "columns", 0) as bar:
        for b in shown:
            quantizer = dataset.quantizer if b == stored else requantized_manifest(dataset, b).quantizer
            codes = picked.codes
            if b != stored:
                codes = recoder(dataset.quantizer, quantizer)(codes[:, None])[0][:, 0]
            columns.append(_column(plural(b, "bit"), decode_all(decoder, codes, quantizer), rate))
            bar.advance(1)
    if isinstance(decoder, LinearDecoder):
        latents = torch.from_numpy(dataset.quantizer.dequantize(picked.codes))
        columns.append(Column("C×3 matrix", pixels(decoder.decode_small(latents))))
    return columns + _code_columns(picked)


def _staged_columns(
    dataset: LatentDataset,
    codebook: Codebook,
    picked: Picked,
    decoder: Decoder,
    bits: Sequence[float] | None,
    source: Source | None,
    progress: ProgressFactory,
) -> list[Column]:
    """The same for tokens: decoded from all stages, from a third of them, and from a ninth."""
    if bits:
        raise UsageError(f"the codes of {dataset.root} are tokens: they have stages", f"leave {opt('bits')} out")
    most = len(codebook.sizes)
    shown = sorted({most, max(1, most // 3), max(1, most // 9)}, reverse=True)
    originals, rate = load_originals(dataset, source, picked), dataset.manifest.transform.get("rate", 0)
    columns = [] if originals is None else [_column("original", originals, rate)]
    with progress("decoding", len(shown), "columns", 0) as bar:
        for stages in shown:
            decoded = decode_all(decoder, picked.codes[:, :stages], codebook.first(stages))
            columns.append(_column(plural(stages, "stage"), decoded, rate))
            bar.advance(1)
    return columns + _code_columns(picked)


def _code_columns(picked: Picked) -> list[Column]:
    unit = unit_latents(picked.codes)
    columns = [Column("channels", channel_pictures(unit))]
    return [*columns, Column("as RGB", colour_pictures(unit))] if min(unit.shape[1:3]) > 1 else columns


def _column(title: str, samples: Tensor, rate: int) -> Column:
    """Images, u8 [n,3,H,W], or sounds, f32 [n,T], as a column."""
    return Column(title, pixels(samples), sounds=samples.numpy() if samples.ndim == 2 else None, rate=rate)


def unit_latents(codes: np.ndarray) -> np.ndarray:
    """u8 [n,C,h,w] -> f32 [n,C,h,w] in 0…1: each channel from the 1st to the 99th percentile of these samples."""
    low, high = (np.percentile(codes, share, (0, 2, 3), keepdims=True)[0] for share in (1, 99))
    return ((codes - low) / np.maximum(high - low, 1)).clip(0, 1).astype(np.float32)


def _picked(
    dataset: LatentDataset,
    split: str | None,
    index: Sequence[int] | None,
    classes: Sequence[str] | None,
    limit: int,
) -> Picked:
    picked = pick(dataset, split, index=index, classes=classes, limit=limit)
    if not len(picked):
        raise UsageError(f"no valid sample of {picked.split} in {dataset.root} matches", "choose other classes or rows")
    order = np.argsort(picked.labels, kind="stable")
    return picked.at(order)


def _drawn(dataset: LatentDataset, picked: Picked, columns: list[Column], out: str | Path) -> PreviewResult:
    names = [f"{dataset.classes[label]} · {row}" for label, row in zip(picked.labels, picked.rows, strict=True)]
    codec, path = dataset.manifest.codec["name"], path_of(out)
    bits = plural(dataset.quantizer.mean_bits, "bit")
    title = f"{dataset.root.resolve().name} {picked.split}: {codec}, {bits} stored"
    try:
        write_atomic(path, png(draw_sheet(columns, names, title)))
        folder = _write_sounds(picked, columns, path.with_name(f"{path.stem}-sounds"))
    except OSError as error:
        raise system_fault(error) from error
    titles = tuple(column.title for column in columns)
    return PreviewResult(str(path), picked.split, len(picked), titles, None if folder is None else str(folder))


def _write_sounds(picked: Picked, columns: list[Column], folder: Path) -> Path | None:
    """Write the columns' sounds, a FLAC file each; returns the folder, or None if there are none."""
    heard = [column for column in columns if column.sounds is not None]
    for column in heard:
        for at, row in enumerate(picked.rows):
            write_atomic(folder / f"{row:06d}-{column.title.replace(' ', '-')}.flac", column.flac(at))
    return folder if heard else None
