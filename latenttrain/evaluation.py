"""What a trained network is worth on a split, and what it says of an image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.device import full_float32, on_device, pick_device, to_host
from latentprep.errors import UsageError, opt
from latentprep.fitting import NOT_ON_DEVICE, Fitting, enough_memory
from latentprep.format import LatentDataset, open_dataset
from latentprep.storage.places import path_of
from latenttrain.checkpoint import load_net
from latenttrain.config import check_dataset
from latenttrain.data import Samples
from latenttrain.nets import Net
from latenttrain.runtime import autocast, in_bfloat16
from latenttrain.streaming import judged_split

_CELLS = 1 << 18  # of the latent grid, in a batch for evaluation: 334 samples of 28 x 28
_IMAGES = 16  # in a batch for the codec


@dataclass(frozen=True)
class EvalResult:
    """Accuracies are fractions; ``top5`` counts the five (or all, if fewer) likeliest classes.

    loss: mean cross-entropy in nats. epoch: which one the weights are from. per_class: top-1 of each class, None where
    the split has no sample of it.
    """

    run: str
    dataset: str
    split: str
    samples: int
    epoch: int
    top1: float
    top5: float
    loss: float
    per_class: dict[str, float | None]

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Prediction:
    """An image's likeliest classes with their probabilities, likeliest first; or why it could not be read."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""

    def to_json(self) -> dict:
        if self.error:
            return {"image": self.image, "error": self.error}
        return {"image": self.image, "classes": [{"name": n, "probability": p} for n, p in self.classes]}


def evaluate(
    run: str | Path,
    dataset: str | Path | LatentDataset,
    *,
    split: str = "val",
    checkpoint: str = "best",
    device: str = "auto",
) -> EvalResult:
    """How well a run's network does on a split of a dataset encoded like the one it was trained on.

    run: the folder that `fit` made. checkpoint: ``best`` (highest val top-1) or ``last``.
    Raises `CheckpointError` for a damaged run or a dataset whose codes mean something else, `DatasetError` for a
    damaged dataset, `UsageError` for an unknown split or checkpoint.

    >>> latenttrain.evaluate("runs/first", "shards").samples
    60
    """
    target = pick_device(device)
    net, config, epoch = load_net(run, checkpoint)
    dataset = open_dataset(dataset)
    check_dataset(config, dataset)
    with enough_memory(target, NOT_ON_DEVICE):
        data = judged_split(dataset, split, target)
    with on_device(target):
        logits = split_logits(net.to(target), data)
        right_ones = logits.argmax(1) == data.labels
        labels, hits = (tensor.numpy() for tensor in to_host([data.labels, right_ones]))
    total = np.bincount(labels, minlength=len(config.classes)).tolist()
    right = np.bincount(labels, weights=hits, minlength=len(config.classes)).tolist()
    return EvalResult(
        run=str(run),
        dataset=str(dataset.root),
        split=split,
        samples=len(data),
        epoch=epoch["epoch"],
        **scores(logits, data.labels),
        per_class={name: r / n if n else None for name, r, n in zip(config.classes, right, total, strict=True)},
    )


def split_logits(net: Net, split: Samples) -> Tensor:
    """f32 [n,classes] of view 0 of every sample, the network in evaluation mode and at the precision it trains in."""
    net.eval()
    size = max(1, _CELLS // math.prod(net.config.latent[1:]))
    bfloat16 = in_bfloat16(net, split.device)

    def logits_of(codes: Tensor) -> Tensor:
        with full_float32():
            planes = net.planes(codes)  # as in training: in float32, whatever the network computes in
        with autocast(bfloat16, split.device):
            return net.logits(planes)

    fitting = Fitting(logits_of, NOT_ON_DEVICE)
    with torch.inference_mode():
        return torch.cat([fitting(codes) for codes, _ in split.batches(size)])


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """f32 [n,classes], i64 [n] -> ``top1``, ``top5`` (fractions) and ``loss`` (mean cross-entropy in nats)."""
    return read_scores(to_host(counted(logits, labels)), len(labels))


def counted(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """What `read_scores` reads, still on the device: samples right at once and among five, i64 [], and the mean
    cross-entropy, f32 []."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return [ranked[:, 0].sum(), ranked.any(1).sum(), torch.nn.functional.cross_entropy(logits.float(), labels)]


def read_scores(found: Sequence[Tensor], samples: int) -> dict[str, float]:
    """`scores` from what `counted` found of so many samples, on the host."""
    first, among_five, loss = found
    return {"top1": int(first) / samples, "top5": int(among_five) / samples, "loss": float(loss)}


def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    weights: str | Path | None = None,
    checkpoint: str = "best",
    device: str = "auto",
) -> list[Prediction]:
    """What a run's network sees in image files: pixels through the codec and quantizer that it was trained with.

    weights: the codec's weights, where they are not where they were at encoding. An image that cannot be read gives a
    `Prediction` with its ``error``, and the others go on.
    Raises `CheckpointError` for a damaged run, `CodecError` if the codec cannot be had, `UsageError` for a bad `top`.
    """
    if top < 1:
        raise UsageError(f"top must be 1 or more, got {top}", f"use {opt('top', 5)}")
    target = pick_device(device)
    net, config, _ = load_net(run, checkpoint)
    net = net.to(target)

    from latentprep.codecs import codec_from_config
    from latentprep.quantizing.scalar import quantize

    codec = codec_from_config(config.dataset["codec"], device=target, weights=str(weights) if weights else None)
    transform = config.dataset["transform"]

    def probabilities_of(pixels: Tensor) -> Tensor:
        codes = quantize(codec.encode(pixels), config.quantizer).to(target)
        with full_float32():
            planes = net.planes(codes)
        return net.logits(planes).softmax(1)

    fitting = Fitting(probabilities_of, NOT_ON_DEVICE)
    predictions: list[Prediction] = []
    for start in range(0, len(images), _IMAGES):
        views = [(str(path), _read(path, transform)) for path in images[start : start + _IMAGES]]
        pixels = [view for _, view in views if isinstance(view, Tensor)]
        answers: Iterator[tuple[list[int], list[float]]] = iter(())
        if pixels:
            with torch.inference_mode(), on_device(target):
                likeliest = fitting(torch.stack(pixels)).topk(min(top, config.net.classes))
                indices, values = to_host([likeliest.indices, likeliest.values])
            answers = zip(indices.tolist(), values.tolist(), strict=True)
        for path, view in views:
            if isinstance(view, str):
                predictions.append(Prediction(path, error=view))
            else:
                likely, probabilities = next(answers)
                names = [config.classes[index] for index in likely]
                predictions.append(Prediction(path, tuple(zip(names, probabilities, strict=True))))
    return predictions


def _read(path: str | Path, transform: dict[str, Any]) -> Tensor | str:
    """The canonical view of an image file as the dataset's were made, u8 [3,S,S]; or the reason why there is none."""
    from latentprep.sources.images import BadImage, canonical_view

    try:
        return torch.from_numpy(canonical_view(path_of(path).read_bytes(), transform)).permute(2, 0, 1)
    except UsageError as error:
        return error.message
    except BadImage as error:
        return f"not an image that can be read ({error})"
    except OSError as error:
        return (error.strerror or str(error)).lower()
