"""Codes in memory: one split as one tensor on the device, and batches of it by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from latentprep.errors import DatasetError, UsageError
from latentprep.format import LatentDataset, open_dataset


@dataclass(frozen=True)
class Split:
    """Samples on one device. codes: u8 [n,V,C,h,w], or f16 where they are latents in units of codes; labels: i64 [n].

    Training and evaluation use its methods, `labels` and `device` only: what has the same can take its place.
    """

    codes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def training_batches(self, batch_size: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, of each sample one view drawn at random: codes u8 [B,C,h,w], labels i64 [B].

        The order depends on the generator (on the split's device) alone.
        """
        samples, views = self.codes.shape[:2]
        order = torch.randperm(samples, generator=generator, device=self.device)
        view = torch.randint(views, (samples,), generator=generator, device=self.device)
        for index in range(batches_per_epoch(samples, batch_size)):
            chosen = order[index * batch_size : (index + 1) * batch_size]
            yield self.codes[chosen, view[chosen]], self.labels[chosen]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in order, view 0: codes u8 [B,C,h,w], labels i64 [B]."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.codes[part, 0], self.labels[part]


def opened(dataset: str | Path | LatentDataset) -> LatentDataset:
    """The dataset itself, or the one in that folder. Raises `DatasetError` if there is none."""
    return dataset if isinstance(dataset, LatentDataset) else open_dataset(dataset)


def check_trainable(dataset: LatentDataset, splits: tuple[str, ...] = ("train", "val")) -> None:
    """Raises `DatasetError` if `fit` has no use for the dataset: a split absent or incomplete, or one class only."""
    for split in splits:
        if split not in dataset.splits:
            raise DatasetError(
                f"{dataset.root} has no split '{split}'; it has {', '.join(dataset.splits) or 'none'}",
                "encode it with both splits: --splits train,val, or --val-fraction 0.1 where the source has none",
            )
        dataset.check_complete(split)
    if len(dataset.classes) < 2:
        only = f"one class only, '{dataset.classes[0]}'" if dataset.classes else "no classes"
        raise DatasetError(f"{dataset.root} has {only}", "there is nothing to tell apart; encode two classes or more")


def load_split(
    dataset: LatentDataset, split: str, device: torch.device, limit: int | None = None, views: bool = True
) -> Split:
    """A split on the device, with all views or view 0 alone; with `limit`, at most so many samples, spread evenly.

    Raises `DatasetError` if shards are missing or damaged or no sample is valid, `UsageError` for a bad limit.
    """
    if limit is not None and limit < 2:
        raise UsageError(f"limit must be 2 or more, got {limit}", "leave --limit out to use every sample")
    loaded = dataset.load(split, limit)
    if not len(loaded):
        raise DatasetError(f"{dataset.root}: split '{split}' holds no valid sample", "see errors.jsonl beside it")
    codes = torch.from_numpy(loaded.codes if views else loaded.codes[:, :1].copy())
    return Split(codes.to(device), torch.from_numpy(loaded.labels).to(device, torch.int64))


def check_classes(dataset: LatentDataset, train: Split) -> None:
    """Raises `DatasetError` if all training samples are of one class, whatever the manifest lists."""
    found = train.labels.unique().tolist()
    if len(found) < 2:
        raise DatasetError(
            f"{dataset.root}: all {len(train)} training samples are of one class, '{dataset.classes[found[0]]}'",
            "there is nothing to tell apart; encode two classes or more, or raise --limit",
        )


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """The last, smaller batch is left out, other samples each epoch; fewer samples than a batch make one batch."""
    return max(1, samples // batch_size)
