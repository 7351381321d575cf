"""Soft labels: the probabilities that trained networks give each view of a train split, in one file.

    label(teachers, dataset) -> FILE -> fit(dataset, labels=FILE)

A small network learns more from them than from classes, and since they are computed once, an epoch costs what it did:
Z. Shen and E. Xing, "A Fast Knowledge Distillation Framework for Visual Recognition" (2022), after L. Beyer et al.,
"Knowledge distillation: A good teacher is patient and consistent" (2022).

The file is safetensors: ``probabilities``, f16 [n,V,classes], a row for each valid sample in the order of the split;
its metadata is JSON with what the labels belong to. That is the images and their views, not codec and quantizer, so a
network on 8-bit codes can teach one on 1-bit codes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from latentprep.device import enough_memory, on_device, pick_device, to_host
from latentprep.errors import DatasetError, UsageError, opt
from latentprep.format import LatentDataset, open_dataset
from latentprep.format.fields import differences
from latentprep.progress import ProgressFactory, silent
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of, several
from latenttrain.checkpoint import LAST, load_net
from latenttrain.config import RunConfig, check_dataset, short
from latenttrain.data import Split, check_trainable, load_split
from latenttrain.evaluation import split_logits
from latenttrain.networks import name_network

FORMAT, VERSION, NAME = "latenttrain labels", 1, "labels.safetensors"
_NOTES, _TENSOR = "latenttrain", "probabilities"
_ROWS = 1 << 13  # between two moves of the progress bar


@dataclass(frozen=True)
class LabelResult:
    """What `label` wrote. top1: the share of samples whose class is the likeliest one, in view 0."""

    labels: str
    dataset: str
    teachers: tuple[str, ...]
    samples: int
    views: int
    bytes: int
    top1: float

    def to_json(self) -> dict:
        return {**asdict(self), "teachers": list(self.teachers)}


def label(
    runs: Sequence[str | Path],
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path | None = None,
    arch: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> LabelResult:
    """Label each view of a dataset's train split with the mean of the probabilities that the runs' networks give.

    They are the networks of the last epoch: the best epoch was picked by val, which is to judge who learns from them.

    runs: folders that `fit` made from this dataset, or from one that was encoded like it. out: the file to write, by
    default ``labels.safetensors`` in the first run's folder. arch: as for `evaluate`. overwrite: replace it.

    Raises `UsageError` for no run or a file that exists, `CheckpointError` for a damaged run or one of other codes,
    `DatasetError` for a dataset that is incomplete or damaged.
    """
    teachers = [path_of(run) for run in several(runs)]
    if not teachers:
        raise UsageError("there is no run to label with", "name folders that latenttrain fit made")
    path = path_of(out) if out is not None else teachers[0] / NAME
    if path.exists() and not overwrite:
        raise UsageError(
            f"{path} exists", f"replace it with {opt('overwrite', True)}, or name another file as {opt('out')}"
        )
    target, dataset = pick_device(device), open_dataset(dataset)
    name_network(arch or "")
    loaded = [load_net(teacher, "last") for teacher in teachers]
    for teacher, (_, config, _) in zip(teachers, loaded, strict=True):
        check_dataset(config, dataset)
        if config.dataset.get("latents"):
            raise UsageError(f"{teacher} was trained on float latents, not on codes", "label with a run on codes")
    check_trainable(dataset, ("train",))
    split = load_split(dataset, "train", torch.device("cpu"))
    (samples, views), classes = split.codes.shape[:2], len(dataset.classes)
    shown = Split(split.codes.flatten(0, 1)[:, None], split.labels.repeat_interleave(views))  # each view as a sample
    total = torch.zeros(len(shown), classes)
    with progress("label", len(shown) * len(loaded), "views", 0) as bar, on_device(target):
        for net, _, _ in loaded:
            net = net.to(target)
            for start in range(0, len(shown), _ROWS):
                part = slice(start, start + _ROWS)
                some = Split(shown.codes[part], shown.labels[part])
                with enough_memory(target, "label on another device"):
                    total[part] += to_host([split_logits(net, some.to(target)).softmax(1)])[0]
                bar.advance(len(some))
    probabilities = (total / len(loaded)).half().view(samples, views, classes)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "images": described(dataset),
        "teachers": [_teacher(teacher, config) for teacher, (_, config, _) in zip(teachers, loaded, strict=True)],
        "sha256": _sha256(probabilities),
    }
    write_atomic(path, safetensors.torch.save({_TENSOR: probabilities}, {_NOTES: json.dumps(document)}))
    right = (probabilities[:, 0].argmax(1) == split.labels).float().mean()
    return LabelResult(
        str(path), str(dataset.root), tuple(map(str, teachers)), samples, views, path.stat().st_size, float(right)
    )


def described(dataset: LatentDataset) -> dict[str, Any]:
    """What decides which image, and which crop of it, is in which row and view, whatever codec and quantizer."""
    manifest = dataset.manifest
    rows = hashlib.sha256()
    for shard in range(manifest.shard_count("train")):
        rows.update(np.ascontiguousarray(dataset.read_labels("train", shard), "<i4").tobytes())  # -1: not valid
    return {
        "source": {name: value for name, value in manifest.source.items() if name != "spec"},
        "transform": {name: value for name, value in manifest.transform.items() if name != "size"},
        "classes": list(manifest.classes),
        "train": manifest.splits["train"],
        "rows": rows.hexdigest(),
    }


def labels_file(given: str | Path) -> Path:
    """The file itself, or that in the folder."""
    path = path_of(given)
    return path / NAME if path.is_dir() else path


def check_labels(path: Path, dataset: LatentDataset, limit: int | None, holdout: float) -> str:
    """The hash of the labels in a file, once it is clear that they are of this dataset's images.

    With `holdout`, the teachers must have been trained without the same samples: else these would judge a network
    that has learned from someone who saw them. Raises `DatasetError` or `UsageError`.
    """
    document = _document(path)
    for name, there, here in differences(document["images"], described(dataset)):
        raise DatasetError(
            f"{path} labels other images than those of {dataset.root}: {name} is {short(there)}, here {short(here)}",
            f"make labels for these: latenttrain label RUN {dataset.root}",
        )
    mine = {"source": dataset.manifest.source["sha256"], "limit": limit, "holdout": holdout}
    for teacher in document["teachers"]:
        if holdout and any(teacher[name] != value for name, value in mine.items()):
            raise UsageError(
                f"the teacher {teacher['run']} has learned from samples that {opt('holdout', holdout)} sets apart",
                f"train it with the same {opt('holdout')} and {opt('limit')}, too, and label again",
            )
    return str(document["sha256"])


def read_labels(path: Path, dataset: LatentDataset, limit: int | None) -> Tensor:
    """The labels of the samples that `load_split` loads: f16 [n,V,classes]. Raises `DatasetError` if damaged."""
    document = _document(path)
    try:
        probabilities = safetensors.torch.load_file(path)[_TENSOR]
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    rows, views = dataset.valid_rows("train"), dataset.manifest.views("train")
    if probabilities.shape != (len(rows), views, len(dataset.classes)) or probabilities.dtype != torch.float16:
        raise _damaged(path, f"{probabilities.dtype} {tuple(probabilities.shape)}")
    if _sha256(probabilities) != document["sha256"]:
        raise _damaged(path, "its checksum differs")
    if limit is None:
        return probabilities
    return probabilities[torch.from_numpy(np.searchsorted(rows, dataset.valid_rows("train", limit)))]


def _teacher(run: Path, config: RunConfig) -> dict[str, Any]:
    used = config.dataset
    return {
        "run": run.resolve().name,
        "weights_sha256": hashlib.sha256((run / LAST).read_bytes()).hexdigest(),
        "source": used["source"]["sha256"],
        "limit": used.get("limit"),
        "holdout": used.get("holdout") or 0.0,
    }


def _document(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            document = json.loads(file.metadata()[_NOTES])
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{document['format']} version {document['version']}")
        for teacher in document["teachers"]:
            assert {"run", "source", "limit", "holdout"} <= teacher.keys()
        assert isinstance(document["images"], dict)
        assert isinstance(document["sha256"], str)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist", "make labels: latenttrain label RUN DIR") from None
    except Exception as error:  # the header is anybody's
        raise _damaged(path, str(error) or "its metadata is incomplete") from error
    return document


def _damaged(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"{path} is not a file of labels, or damaged ({reason})", "run latenttrain label again")


def _sha256(probabilities: Tensor) -> str:
    return hashlib.sha256(probabilities.numpy().tobytes()).hexdigest()
