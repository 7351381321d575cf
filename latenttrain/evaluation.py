"""`evaluate`: a trained network on a split of a dataset; `predict`: on image files."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.device import (
    NOT_ON_DEVICE,
    Fitting,
    enough_memory,
    full_float32,
    on_device,
    one_thread_each,
    pick_device,
    to_host,
)
from latentprep.errors import UsageError, check_whole, opt
from latentprep.format import LatentDataset, open_dataset
from latentprep.storage.places import path_of, several
from latenttrain.checkpoint import load_net
from latenttrain.config import check_dataset
from latenttrain.data import Samples
from latenttrain.nets import Net
from latenttrain.networks import name_network
from latenttrain.ranks import ALONE, Ranks
from latenttrain.results import EvalResult, Prediction
from latenttrain.runtime import autocast, in_bfloat16
from latenttrain.streaming import judged_split

_CELLS = 1 << 18  # of the latent grid, in a batch for evaluation: 334 samples of 28 x 28
_IMAGES = 16  # in a batch for the codec


def evaluate(
    run: str | Path,
    dataset: str | Path | LatentDataset,
    *,
    split: str = "val",
    checkpoint: str = "best",
    arch: str | None = None,
    device: str = "auto",
) -> EvalResult:
    """Evaluate a run's network on a split of a dataset that was encoded like its own.

    run: the folder that `fit` made. checkpoint: ``best`` (highest val top-1) or ``last``.
    arch: the run's network, if it is one of your own, ``package.module:function``, not named in this process yet.
    Raises `CheckpointError` for a damaged run or a dataset that was encoded differently, `DatasetError` for a
    damaged dataset, `UsageError` for an unknown split or checkpoint.

    >>> latenttrain.evaluate("runs/first", "shards").samples
    60
    """
    target = pick_device(device)
    name_network(arch or "")
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
    """f32 [n,classes] of view 0 of every sample: the network in evaluation mode, at the precision of training."""
    with one_thread_each(split.device) as pool:
        return torch.cat(_each_batch(net, split, range(_batches(net, split)), pool, lambda logits, _: logits))


def split_counts(net: Net, split: Samples, pool: ThreadPoolExecutor | None, ranks: Ranks = ALONE) -> Tensor:
    """The input of `read_scores` for a whole split, on the device: f32 [batches,3], the same on every rank.

    pool: of `one_thread_each`. Each rank evaluates its share of the batches, which do not depend on the ranks.
    """
    batches = _batches(net, split)
    counts = _each_batch(net, split, ranks.share(batches), pool, counted)
    nothing = torch.empty((0, 3), device=split.device)
    return ranks.every(torch.stack(counts) if counts else nothing, batches)


def _batch_size(net: Net) -> int:
    return max(1, _CELLS // math.prod(net.config.latent[1:]))


def _batches(net: Net, split: Samples) -> int:
    return -(-len(split) // _batch_size(net))


def _each_batch(
    net: Net, split: Samples, wanted: range, pool: ThreadPoolExecutor | None, work: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """What `work` makes of the logits, f32 [B,classes], and labels, i64 [B], of each batch that is wanted, in order."""
    net.eval()
    bfloat16 = in_bfloat16(net, split.device)

    def logits_of(codes: Tensor) -> Tensor:
        with full_float32():  # as in training
            planes = net.planes(codes)
            with autocast(bfloat16, split.device):
                return net.logits(planes)

    fitting = Fitting(logits_of, NOT_ON_DEVICE)

    def worked(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.inference_mode():
            return work(fitting(batch[0]), batch[1])

    batches = split.batches(_batch_size(net), wanted)
    if pool is None:
        return [worked(batch) for batch in batches]
    ready, waiting = [], deque[Future[Tensor]]()
    for batch in batches:  # which may be read from disk: only as many as the threads need are in memory
        waiting.append(pool.submit(worked, batch))
        if len(waiting) > 2 * pool._max_workers:
            ready.append(waiting.popleft().result())
    return [*ready, *(one.result() for one in waiting)]


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """f32 [n,classes], i64 [n] -> ``top1``, ``top5`` (fractions) and ``loss`` (mean cross-entropy in nats)."""
    return read_scores(to_host([counted(logits, labels)[None]])[0], len(labels))


def counted(logits: Tensor, labels: Tensor) -> Tensor:
    """The input of `read_scores` for one batch, on the device: samples right at rank 1 and within 5, and the sum of
    their cross-entropies, f32 [3]"""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return torch.stack([ranked[:, 0].sum().float(), ranked.any(1).sum().float(), loss])


def read_scores(found: Tensor, samples: int) -> dict[str, float]:
    """`scores` from what was `counted` of batches, f32 [batches,3], with this many samples, on the host."""
    first, among_five, loss = (found.double().sum(0) / samples).tolist()
    return {"top1": first, "top5": among_five, "loss": loss}


def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    weights: str | Path | None = None,
    checkpoint: str = "best",
    arch: str | None = None,
    device: str = "auto",
) -> list[Prediction]:
    """Classify image or sound files with a run's network, through the codec and quantizer that it was trained with.

    run: its folder, or an ``.onnx`` file that `export` wrote, which onnxruntime runs on the CPU.
    top: classes to list for each image. weights: the folder of the codec's weights, if it has moved. An image that
    cannot be read gives a `Prediction` with an ``error``; the others are classified. arch: as for `evaluate`.

    Raises `CheckpointError` for a damaged run or file, `CodecError` if the codec is missing, `UsageError` for `top`
    below 1 or a ``.pt2`` file.
    """
    check_whole("top", top, 1, hint=f"use {opt('top', 5)}")
    target = pick_device(device)
    name_network(arch or "")
    probabilities_of: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    if path_of(run).suffix == ".pt2":
        raise UsageError(
            "predict takes no .pt2 file, since torch.export.load may unpickle", f"export to {opt('to', 'model.onnx')}"
        )
    if path_of(run).suffix == ".onnx":
        from latenttrain.exports import OnnxModel

        model = OnnxModel(path_of(run), weights)
        probabilities_of, transform, classes = model, model.transform, model.classes
    else:
        probabilities_of, transform, classes = _classifier(run, weights, checkpoint, target)
    fitting = Fitting(probabilities_of, NOT_ON_DEVICE)
    images = several(images)
    predictions: list[Prediction] = []
    for start in range(0, len(images), _IMAGES):
        views = [(str(path), _read(path, transform)) for path in images[start : start + _IMAGES]]
        pixels = [view for _, view in views if isinstance(view, Tensor)]
        answers: Iterator[tuple[list[int], list[float]]] = iter(())
        if pixels:
            with torch.inference_mode(), on_device(target):
                likeliest = fitting(torch.stack(pixels)).topk(min(top, len(classes)))
                indices, values = to_host([likeliest.indices, likeliest.values])
            answers = zip(indices.tolist(), values.tolist(), strict=True)
        for path, view in views:
            if isinstance(view, str):
                predictions.append(Prediction(path, error=view))
            else:
                likely, probabilities = next(answers)
                names = [classes[index] for index in likely]
                predictions.append(Prediction(path, tuple(zip(names, probabilities, strict=True))))
    return predictions


def _classifier(
    run: str | Path, weights: str | Path | None, checkpoint: str, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], Sequence[str]]:
    """A run's u8 [B,3,S,S], or sounds f32 [B,T] -> probabilities f32 [B,classes], its transform, and its classes."""
    from latentprep.codecs import codec_from_config, encoder_of
    from latentprep.quantizing.scalar import quantize

    net, config, _ = load_net(run, checkpoint)
    net = net.to(device)
    codec = codec_from_config(config.dataset["codec"], device=device, weights=str(weights) if weights else None)

    def probabilities_of(pixels: Tensor) -> Tensor:
        codes = quantize(encoder_of(codec)(pixels), config.quantizer).to(device)
        with full_float32():
            return net(codes).softmax(1)

    return probabilities_of, config.dataset["transform"], config.classes


def _read(path: str | Path, transform: dict[str, Any]) -> Tensor | str:
    """The canonical view of a file, made as the dataset's were, for its codec; or the reason why there is none."""
    from latentprep.sources.kinds import BadSample
    from latentprep.sources.media import canonical_view

    if "://" in str(path):
        return "a URL; download it, and give the path"
    try:
        return torch.from_numpy(canonical_view(path_of(path).read_bytes(), transform))
    except UsageError as error:
        return str(error)
    except IsADirectoryError:
        return "a folder; give the image files in it"
    except BadSample as error:
        return f"cannot be read ({error})" if transform.get("media") else f"not an image that can be read ({error})"
    except OSError as error:
        return (error.strerror or str(error)).lower()
