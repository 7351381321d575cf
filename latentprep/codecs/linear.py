"""Linear decoding: turn latents into images with one matrix, without the codec's decoder, and back again.

The latents of autoencoders are nearly images: one matrix from the C latents at a place to a colour shows what is there
(the D_L of D. Jacobellis' talk). A place stands for f×f pixels, and least squares gives each of them three columns of
its own: the full map, C -> 3·f². Their mean is the least-squares map to the image shrunk by averaging such blocks: the
small map, C -> 3. The small map's pseudo-inverse leads back to latents. Colours are −1…1, as in diffusion models.

A fitted decoder is a file beside the manifest, which it names by SHA-256. `latentprep.pictures.linear_decoder` fits it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.codecs.base import to_pixels
from latentprep.errors import DatasetError
from latentprep.format.dataset import LatentDataset
from latentprep.format.manifest import LINEAR_DECODER

_NOTES = "latentprep"  # the one metadata key: safetensors does not keep the order of several


@dataclass(frozen=True)
class Quality:
    """How good a map is. r2: the share of each colour's variance that it explains; psnr: the mean over samples, in
    decibels, of all and of each class (None if there is no sample)."""

    r2: tuple[float, ...]
    psnr: float | None
    per_class: dict[str, float | None]


@dataclass(frozen=True)
class LinearDecoder:
    """``colours = latents @ matrix + bias`` at each place of the latent grid.

    matrix: f32 [C,3·f²], columns ordered (colour, row, column) of the block; bias: f32 [3·f²]; mean: f32 [C], of the
    latents; factor: f. small, full: `Quality` of the two maps. fitted, judged: on which samples, as "split: how many".
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
        return from_colours(F.pixel_shuffle(apply(latents, self.matrix, self.bias), self.factor))

    def decode_small(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,h,w] by the small map."""
        return from_colours(apply(latents, self.small_matrix, self.small_bias))

    def latents_of(self, images: Tensor) -> Tensor:
        """u8 [B,3,fh,fw] -> f32 [B,C,h,w]: the mean latent, plus the shrunk image's difference from the mean colour, by
        the small map's Moore–Penrose pseudo-inverse. If C is 3 or more, the small map restores the shrunk image."""
        inverse = np.linalg.pinv(self.small_matrix.astype(np.float64))
        colour = self.mean @ self.small_matrix + self.small_bias
        bias = self.mean - colour @ inverse
        return apply(shrink(images, self.factor), inverse.astype(np.float32), bias.astype(np.float32))

    def to_json(self) -> dict:
        """Everything except the full map, which is only in the file."""
        return {
            "factor": self.factor,
            "matrix": self.small_matrix.tolist(),
            "bias": self.small_bias.tolist(),
            "small": asdict(self.small),
            "full": asdict(self.full),
            "fitted": self.fitted,
            "judged": self.judged,
        }


def load_linear_decoder(dataset: LatentDataset) -> LinearDecoder:
    """The dataset's linear decoder. `DatasetError` if none was fitted, or it is damaged or another dataset's."""
    path = dataset.root / LINEAR_DECODER
    again = f"run latentprep linear-decoder fit {dataset.root} --source …"
    if not path.is_file():
        raise DatasetError(f"{dataset.root} has no linear decoder yet", again)
    try:
        linear = _from_bytes(path.read_bytes())
    except Exception as error:  # safetensors and JSON raise many kinds for damaged bytes
        raise DatasetError(f"{path} is damaged ({type(error).__name__})", again) from error
    if linear.manifest_sha256 != dataset.manifest.sha256:
        raise DatasetError(f"{path} was fitted to another dataset", again)
    channels, height, _ = dataset.manifest.latent
    size = dataset.manifest.transform["size"]
    if linear.factor * height != size or linear.matrix.shape != (channels, 3 * linear.factor**2):
        raise DatasetError(f"{path} is damaged (it does not fit this dataset's latents)", again)
    return linear


def shrink(images: Tensor, factor: int) -> Tensor:
    """u8 [B,3,fh,fw] -> f32 [B,3,h,w] in −1…1: the mean of each block of f×f pixels."""
    return F.avg_pool2d(to_colours(images), factor)


def apply(values: Tensor, matrix: np.ndarray, bias: np.ndarray) -> Tensor:
    """f32 [B,C,h,w] by [C,D] -> f32 [B,D,h,w], on the host."""
    weight = torch.from_numpy(np.ascontiguousarray(matrix.T))[:, :, None, None]
    return F.conv2d(values.cpu().float(), weight, torch.from_numpy(bias))


def to_colours(images: Tensor) -> Tensor:
    """u8 in 0…255 -> f32 in −1…1. Inverse of `from_colours`."""
    return images.cpu().float() / 127.5 - 1


def from_colours(colours: Tensor) -> Tensor:
    """f32 in −1…1 -> u8 in 0…255, clamped."""
    return to_pixels((colours + 1) * 127.5)


def to_bytes(linear: LinearDecoder) -> bytes:
    import safetensors.numpy

    tensors = {name: np.ascontiguousarray(getattr(linear, name)) for name in ("matrix", "bias", "mean")}
    notes = {k: v for k, v in asdict(linear).items() if k not in tensors}
    return safetensors.numpy.save(tensors, {_NOTES: json.dumps(notes, allow_nan=False)})


def _from_bytes(data: bytes) -> LinearDecoder:
    """Inverse of `to_bytes`. Raises an exception of some kind for any other bytes."""
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
