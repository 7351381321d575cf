"""Fit a linear decoder (`latentprep.codecs.linear`) to a dataset's latents and images, and judge it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.codecs.linear import (
    LinearDecoder,
    Quality,
    apply,
    from_colours,
    to_bytes,
    to_colours,
)
from latentprep.errors import DatasetError, UsageError, system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.manifest import LINEAR_DECODER, train_split
from latentprep.pictures.metrics import mean, psnr
from latentprep.pictures.samples import Originals, Picked, pick, shown_split
from latentprep.progress import Progress, ProgressFactory, silent
from latentprep.quantizing.scalar import dequantize
from latentprep.sources.source import Source, open_source
from latentprep.storage.atomic import write_atomic

SAMPLES = 1000  # to fit it to, and at most as many others to judge it by
_BATCH = 64


def fit_linear_decoder(
    dataset: str | Path | LatentDataset,
    source: str | Path | Source,
    *,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    samples: int = SAMPLES,
    progress: ProgressFactory = silent,
) -> LinearDecoder:
    """Fit a dataset's linear decoder and write it to the dataset's folder, in place of an earlier one.

    It is fitted to at most `samples` samples of train, spread over the classes, with the latents that their codes stand
    for. It is judged on as many of val, or of train if there is no val.
    Raises `SourceError` if the source is not the dataset's, `UsageError` if its latents are no grid over the image.
    """
    opened = open_dataset(dataset)
    given = open_source(source, data=data, labels=labels, image_column=image_column, label_column=label_column)
    factor, images = grid_factor(opened), Originals(opened, given)
    learned = pick(opened, train_split(opened.splits), limit=samples)
    judged = pick(opened, shown_split(opened.splits), limit=samples)
    if not len(learned) or not len(judged):
        raise DatasetError(
            f"{opened.root} has no valid sample to fit to", "encode a source with images that can be read"
        )
    with progress("fitting", len(learned) + len(judged), "images", 0) as bar:
        matrix, bias, centre = _least_squares(_pairs(opened, images, learned, factor, bar))
        qualities = _judge(opened, _pairs(opened, images, judged, factor, bar), judged, matrix, bias)
    fitted = LinearDecoder(
        factor, matrix, bias, centre, *qualities,
        fitted=f"{learned.split}: {len(learned)}", judged=f"{judged.split}: {len(judged)}",
        manifest_sha256=opened.manifest.sha256,
    )  # fmt: skip
    try:
        write_atomic(opened.root / LINEAR_DECODER, to_bytes(fitted))
    except OSError as error:
        raise system_fault(error) from error
    return fitted


def grid_factor(dataset: LatentDataset) -> int:
    """f, pixels per side for each place of the latent grid. `UsageError` if it is not a whole number."""
    if dataset.manifest.of_sound:
        raise UsageError(f"linear decoding is for images, and {dataset.root} holds sound")
    size, (_, height, width) = dataset.manifest.transform["size"], dataset.manifest.latent
    if height != width or size % height:
        raise UsageError(
            f"latents of {height}×{width} do not form a regular grid over {size}×{size} pixels",
            "linear decoding is for codecs that shrink by a whole factor",
        )
    return size // height


def _pairs(
    dataset: LatentDataset, images: Originals, picked: Picked, factor: int, bar: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of latents f32 [B,C,h,w] and the blocks of pixels at each place, f32 [B,3f²,h,w]."""
    for start in range(0, len(picked), _BATCH):
        part = picked.at(slice(start, start + _BATCH))
        blocks = F.pixel_unshuffle(to_colours(images.load(part)), factor)
        yield dequantize(torch.from_numpy(part.codes), dataset.quantizer), blocks
        bar.advance(len(part))


def _least_squares(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrix [C,D] and bias [D] with the least squared error, and the latents' mean [C], all f32.

    By the normal equations in float64, solved so that a constant channel gets 0.
    """
    gram, products = torch.zeros(()).double(), torch.zeros(()).double()
    for latents, blocks in pairs:
        z, y = (values.transpose(0, 1).flatten(1).T for values in (latents, blocks))
        z = F.pad(z, (0, 1), value=1.0).double()
        gram, products = gram + z.T @ z, products + z.T @ y.double()
    solved = np.linalg.lstsq(gram.numpy(), products.numpy(), rcond=None)[0].astype(np.float32)
    return solved[:-1], solved[-1], (gram[-1, :-1] / gram[-1, -1]).float().numpy()


def _judge(
    dataset: LatentDataset,
    pairs: Iterator[tuple[Tensor, Tensor]],
    picked: Picked,
    matrix: np.ndarray,
    bias: np.ndarray,
) -> tuple[Quality, Quality]:
    """The quality of the small map and of the full one. PSNR is that of images, clamped and rounded to 8 bits."""
    decibels: list[list[float]] = [[], []]
    sums = np.zeros((2, 3, 4))  # small and full; colours; count, values, squares, squared errors
    for latents, blocks in pairs:
        full = apply(latents, matrix, bias).unflatten(1, (3, -1))
        whole = blocks.unflatten(1, (3, -1))
        for at, (guess, truth) in enumerate(((full.mean(2, keepdim=True), whole.mean(2, keepdim=True)), (full, whole))):
            picture, pixels = from_colours(guess).double(), (truth + 1) * 127.5
            decibels[at] += psnr(picture.flatten(2, 3), pixels.flatten(2, 3)).tolist()
            terms = (torch.ones_like(truth), truth, truth.square(), (guess - truth).square())
            sums[at] += torch.stack([term.double().sum((0, 2, 3, 4)) for term in terms], 1).numpy()
    qualities = []
    for (count, total, squares, errors), values in zip(sums.transpose(0, 2, 1), decibels, strict=True):
        variance = squares - total**2 / count
        r2 = tuple((1 - errors / np.maximum(variance, 1e-12)).tolist())
        by_class = {
            name: mean(v for v, own in zip(values, picked.labels, strict=True) if own == label)
            for label, name in enumerate(dataset.classes)
        }
        qualities.append(Quality(r2, mean(values), by_class))
    return qualities[0], qualities[1]
