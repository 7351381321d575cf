"""Linear decoding: pictures of latents by one matrix, without the codec's decoder, and its pseudo-inverse back.

The latents of autoencoders are nearly images: one matrix from a place's C latents to its colour shows what is there
(the D_L of D. Jacobellis' talk). Least squares gives each of the f×f pixels that a place stands for its own three
columns: the full map, C -> 3·f². Their mean over the block is the least-squares map to the image shrunk by averaging
such blocks: the small map, C -> 3. Colours are −1…1, as diffusion models have them.

A fitted decoder is a file beside the manifest, bound to it by the manifest's SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.codecs.base import to_pixels
from latentprep.errors import DatasetError, UsageError, system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.manifest import LINEAR_DECODER, train_split
from latentprep.pictures.metrics import mean, psnr
from latentprep.pictures.samples import Originals, Picked, pick, shown_split
from latentprep.progress import Progress, ProgressFactory, silent
from latentprep.quantizing.scalar import dequantize
from latentprep.sources.source import Source, open_source
from latentprep.storage.atomic import write_atomic

SAMPLES = 1000  # that it is fitted to, and at most as many others that it is judged by
_BATCH = 64
_NOTES = "latentprep"  # the one metadata key: safetensors does not keep the order of several


@dataclass(frozen=True)
class Quality:
    """How well a map does. r2: share of the variance of each colour that it explains; psnr: mean over samples, in
    decibels, of all and of each class (None where there is no sample)."""

    r2: tuple[float, ...]
    psnr: float | None
    per_class: dict[str, float | None]


@dataclass(frozen=True)
class LinearDecoder:
    """``colours = latents @ matrix + bias`` at each place of the latent grid.

    matrix: f32 [C,3·f²], columns ordered (colour, row, column) of the block; bias: f32 [3·f²]; mean: f32 [C], of the
    latents; factor: f. small, full: `Quality` of the two maps. fitted, judged: which samples, as "split: how many".
    """

    factor: int
    matrix: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    small: Quality
    full: Quality
    fitted: str
    judged: str
    manifest_sha256: str

    @property
    def small_matrix(self) -> np.ndarray:
        """f32 [C,3]."""
        return self.matrix.reshape(len(self.matrix), 3, -1).mean(2)

    @property
    def small_bias(self) -> np.ndarray:
        """f32 [3]."""
        return self.bias.reshape(3, -1).mean(1)

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,fh,fw] by the full map."""
        return _pixels(F.pixel_shuffle(_apply(latents, self.matrix, self.bias), self.factor))

    def decode_small(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,h,w] by the small map."""
        return _pixels(_apply(latents, self.small_matrix, self.small_bias))

    def latents_of(self, images: Tensor) -> Tensor:
        """u8 [B,3,fh,fw] -> f32 [B,C,h,w]: the mean latent, and by the small map's Moore–Penrose pseudo-inverse what
        the shrunk image differs from its colour. Where C is 3 or more, the small map brings the shrunk image back."""
        inverse = np.linalg.pinv(self.small_matrix.astype(np.float64))
        colour = self.mean @ self.small_matrix + self.small_bias
        bias = self.mean - colour @ inverse
        return _apply(shrink(images, self.factor), inverse.astype(np.float32), bias.astype(np.float32))

    def to_json(self) -> dict:
        """What there is to say of it; the full map itself is in the file only."""
        return {
            "factor": self.factor,
            "matrix": self.small_matrix.tolist(),
            "bias": self.small_bias.tolist(),
            "small": asdict(self.small),
            "full": asdict(self.full),
            "fitted": self.fitted,
            "judged": self.judged,
        }


def fit_linear_decoder(
    dataset: str | Path | LatentDataset,
    source: str | Path | Source,
    *,
    data: str | Path | None = None,
    samples: int = SAMPLES,
    progress: ProgressFactory = silent,
) -> LinearDecoder:
    """Fit a dataset's linear decoder and write it to its folder, in place of an earlier one.

    It is fitted to at most `samples` samples of train, spread over the classes, with the latents that their codes stand
    for, and judged by as many of val, or of train where there is no val.
    Raises `SourceError` if the source is not the dataset's, `UsageError` where latents are no grid over the image.
    """
    opened = open_dataset(dataset)
    factor, images = grid_factor(opened), Originals(opened, open_source(source, data=data))
    learned = pick(opened, train_split(opened.splits), limit=samples)
    judged = pick(opened, shown_split(opened.splits), limit=samples)
    if not len(learned) or not len(judged):
        raise DatasetError(f"{opened.root} has no valid sample to fit to", "encode a source that can be read")
    with progress("fitting", len(learned) + len(judged), "images", 0) as bar:
        matrix, bias, centre = _least_squares(_pairs(opened, images, learned, factor, bar))
        qualities = _judge(opened, _pairs(opened, images, judged, factor, bar), judged, matrix, bias)
    made = LinearDecoder(
        factor, matrix, bias, centre, *qualities,
        fitted=f"{learned.split}: {len(learned)}", judged=f"{judged.split}: {len(judged)}",
        manifest_sha256=opened.manifest.sha256,
    )  # fmt: skip
    try:
        write_atomic(opened.root / LINEAR_DECODER, _to_bytes(made))
    except OSError as error:
        raise system_fault(error) from error
    return made


def load_linear_decoder(dataset: LatentDataset) -> LinearDecoder:
    """The dataset's linear decoder. Raises `DatasetError` if none was fitted, or it is damaged or another dataset's."""
    path = dataset.root / LINEAR_DECODER
    again = f"run latentprep linear-decoder fit {dataset.root} --source …"
    if not path.is_file():
        raise DatasetError(f"{dataset.root} has no linear decoder yet", again)
    try:
        made = _from_bytes(path.read_bytes())
    except Exception as error:  # safetensors and JSON raise many kinds for damaged bytes
        raise DatasetError(f"{path} is damaged ({type(error).__name__})", again) from error
    if made.manifest_sha256 != dataset.manifest.sha256:
        raise DatasetError(f"{path} was fitted to another dataset than this", again)
    channels, height, _ = dataset.manifest.latent
    size = dataset.manifest.transform["size"]
    if made.factor * height != size or made.matrix.shape != (channels, 3 * made.factor**2):
        raise DatasetError(f"{path} is damaged (it is not of this dataset's latents)", again)
    return made


def shrink(images: Tensor, factor: int) -> Tensor:
    """u8 [B,3,fh,fw] -> f32 [B,3,h,w] in −1…1: the mean of each block of f×f pixels."""
    return F.avg_pool2d(_colours(images), factor)


def grid_factor(dataset: LatentDataset) -> int:
    """f, pixels a side for each place of the latent grid. `UsageError` where it is no whole number."""
    size, (_, height, width) = dataset.manifest.transform["size"], dataset.manifest.latent
    if height != width or size % height:
        raise UsageError(
            f"latents of {height}×{width} are no regular grid over {size}×{size} pixels",
            "linear decoding is for codecs that shrink by a whole factor",
        )
    return size // height


def _pairs(
    dataset: LatentDataset, images: Originals, picked: Picked, factor: int, bar: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of latents f32 [B,C,h,w] and the blocks of pixels at each place, f32 [B,3f²,h,w]."""
    for start in range(0, len(picked), _BATCH):
        part = picked.at(slice(start, start + _BATCH))
        blocks = F.pixel_unshuffle(_colours(images.load(part)), factor)
        yield dequantize(torch.from_numpy(part.codes), dataset.quantizer), blocks
        bar.advance(len(part))


def _least_squares(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrix [C,D] and bias [D] with the least squared error, and the latents' mean [C], all f32.

    By the normal equations, in float64 and solved so that a channel that never changes gets 0.
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
    """Of the small map and of the full one. PSNR is that of pictures: clamped and rounded to 8 bits."""
    found: list[list[float]] = [[], []]
    sums = np.zeros((2, 3, 4))  # small and full; colours; count, values, squares, squared errors
    for latents, blocks in pairs:
        full = _apply(latents, matrix, bias).unflatten(1, (3, -1))
        whole = blocks.unflatten(1, (3, -1))
        for at, (guess, truth) in enumerate(((full.mean(2, keepdim=True), whole.mean(2, keepdim=True)), (full, whole))):
            picture, pixels = _pixels(guess).double(), (truth + 1) * 127.5
            found[at] += psnr(picture.flatten(2, 3), pixels.flatten(2, 3)).tolist()
            terms = (torch.ones_like(truth), truth, truth.square(), (guess - truth).square())
            sums[at] += torch.stack([term.double().sum((0, 2, 3, 4)) for term in terms], 1).numpy()
    qualities = []
    for (count, total, squares, errors), values in zip(sums.transpose(0, 2, 1), found, strict=True):
        variance = squares - total**2 / count
        r2 = tuple((1 - errors / np.maximum(variance, 1e-12)).tolist())
        by_class = {
            name: mean(v for v, own in zip(values, picked.labels, strict=True) if own == label)
            for label, name in enumerate(dataset.classes)
        }
        qualities.append(Quality(r2, mean(values), by_class))
    return qualities[0], qualities[1]


def _apply(values: Tensor, matrix: np.ndarray, bias: np.ndarray) -> Tensor:
    """f32 [B,C,h,w] by [C,D] -> f32 [B,D,h,w], on the host."""
    weight = torch.from_numpy(np.ascontiguousarray(matrix.T))[:, :, None, None]
    return F.conv2d(values.cpu().float(), weight, torch.from_numpy(bias))


def _colours(images: Tensor) -> Tensor:
    """u8 in 0…255 -> f32 in −1…1. Inverse of `_pixels`."""
    return images.cpu().float() / 127.5 - 1


def _pixels(colours: Tensor) -> Tensor:
    """f32 in −1…1 -> u8 in 0…255, clamped."""
    return to_pixels((colours + 1) * 127.5)


def _to_bytes(made: LinearDecoder) -> bytes:
    import safetensors.numpy

    tensors = {name: np.ascontiguousarray(getattr(made, name)) for name in ("matrix", "bias", "mean")}
    notes = {k: v for k, v in asdict(made).items() if k not in tensors}
    return safetensors.numpy.save(tensors, {_NOTES: json.dumps(notes, allow_nan=False)})


def _from_bytes(data: bytes) -> LinearDecoder:
    """Inverse of `_to_bytes`. Raises one of many for anything else."""
    import safetensors.numpy

    notes = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][_NOTES])
    tensors = safetensors.numpy.load(data)
    if any(t.dtype != np.float32 or not np.isfinite(t).all() for t in tensors.values()):
        raise ValueError("not finite float32")
    small, full = (
        Quality(tuple(map(float, q["r2"])), q["psnr"], dict(q["per_class"])) for q in (notes["small"], notes["full"])
    )
    return LinearDecoder(
        int(notes["factor"]), tensors["matrix"], tensors["bias"], tensors["mean"], small, full,
        str(notes["fitted"]), str(notes["judged"]), str(notes["manifest_sha256"]),
    )  # fmt: skip
