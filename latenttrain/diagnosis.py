"""The mistakes of a run on a split: which classes it confuses, and the samples that it is most wrong about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from latentprep.device import pick_device
from latentprep.format import LatentDataset, open_dataset
from latenttrain.checkpoint import load_net
from latenttrain.config import check_dataset
from latenttrain.evaluation import split_logits
from latenttrain.streaming import judged_split

if TYPE_CHECKING:
    from latentprep.pictures.samples import Decoder

_CLASSES = 20  # in a confusion matrix for people, at most


class Mistake(NamedTuple):
    """A sample taken for another class. row: in the split; label, predicted: indices of classes; note: for people."""

    row: int
    label: int
    predicted: int
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """A run on a split of n samples.

    confusion: i64 [K,K], true class by predicted one; rows, labels, predicted: i64 [n]; probability: f32 [n], of the
    predicted class; loss: f32 [n], in nats.
    """

    split: str
    classes: tuple[str, ...]
    confusion: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    loss: np.ndarray

    @property
    def top1(self) -> float:
        return float((self.labels == self.predicted).mean())

    def most_confused(self, limit: int = 8) -> list[Mistake]:
        """The surest mistake of each of the most frequent (true, predicted) pairs of classes."""
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        found = []
        for pair in np.argsort(-wrong, axis=None, kind="stable")[:limit].tolist():
            label, predicted = divmod(pair, len(self.classes))
            if times := int(wrong[label, predicted]):
                own = np.flatnonzero((self.labels == label) & (self.predicted == predicted))
                row = self.rows[own[self.probability[own].argmax()]]
                found.append(Mistake(int(row), label, predicted, f"{times} of {self.confusion[label].sum()}"))
        return found

    def most_wrong(self, limit: int = 16) -> list[Mistake]:
        """The mistakes of the highest loss, worst first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        worst = wrong[np.argsort(-self.loss[wrong], kind="stable")][:limit].tolist()
        return [
            Mistake(int(self.rows[i]), int(self.labels[i]), int(self.predicted[i]), f"{self.probability[i]:.0%} sure")
            for i in worst
        ]

    def summary(self) -> list[str]:
        """Top-1 and the confusion matrix in HTML; of many classes, those with the most mistakes."""
        from latentprep.pictures import page

        wrong = self.confusion - np.diag(np.diag(self.confusion))
        involved = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:_CLASSES]
        shown = np.sort(involved)
        names = [self.classes[i] for i in shown]
        part = self.confusion[np.ix_(shown, shown)]
        share = np.sqrt(part / np.maximum(1, self.confusion[shown].sum(1, keepdims=True)))
        of = (
            f", the {len(shown)} of {len(self.classes)} classes with the most mistakes"
            if len(shown) < len(wrong)
            else ""
        )
        rows = [[name, *map(str, row)] for name, row in zip(names, part.tolist(), strict=True)]
        return [
            page.paragraph(f"Top-1 {self.top1:.2%} on {len(self.labels):,} samples of {self.split}."),
            page.table(
                f"Confusion matrix{of}: true class by row, predicted by column", ["", *names], rows, share.tolist()
            ),
        ]


def diagnose(
    run: str | Path,
    dataset: str | Path | LatentDataset,
    *,
    split: str = "val",
    checkpoint: str = "best",
    device: str = "auto",
) -> Diagnosis:
    """The mistakes of a run's network on a split of a dataset that was encoded like its own.

    Raises as `evaluate` does.
    """
    target = pick_device(device)
    net, config, _ = load_net(run, checkpoint)
    dataset = open_dataset(dataset)
    check_dataset(config, dataset)
    data = judged_split(dataset, split, target)
    logits = split_logits(net.to(target), data).float()
    probability, predicted = logits.softmax(1).max(1)
    loss = torch.nn.functional.cross_entropy(logits, data.labels, reduction="none")
    count = len(config.classes)
    cells = torch.bincount(data.labels * count + predicted, minlength=count * count)
    return Diagnosis(
        split=split,
        classes=tuple(config.classes),
        confusion=cells.view(count, count).cpu().numpy(),
        rows=dataset.valid_rows(split),
        labels=data.labels.cpu().numpy(),
        predicted=predicted.cpu().numpy(),
        probability=probability.cpu().numpy(),
        loss=loss.cpu().numpy(),
    )


def mistakes(found: Diagnosis, dataset: LatentDataset, decoder: Decoder) -> list[str]:
    """The most confused pairs of classes and the worst mistakes as decoded pictures, in HTML."""
    from latentprep.pictures import page
    from latentprep.pictures.report import picture_tile
    from latentprep.pictures.samples import decode_all, pick
    from latentprep.pictures.spectrogram import pixels

    parts = []
    for title, chosen in (("Most confused", found.most_confused()), ("Most wrong", found.most_wrong())):
        if not chosen:
            continue
        picked = pick(dataset, found.split, index=[mistake.row for mistake in chosen])
        pictures = pixels(decode_all(decoder, picked.codes, dataset.quantizer))
        place = {row: at for at, row in enumerate(picked.rows.tolist())}
        tiles = []
        for mistake in chosen:
            text = f"{found.classes[mistake.label]}, taken for {found.classes[mistake.predicted]} ({mistake.note})"
            tiles.append(picture_tile(pictures[place[mistake.row]], f"row {mistake.row}: {text}", text))
        parts.append(page.card(title, tiles))
    return parts
