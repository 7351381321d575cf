"""Codes in memory: one split as one tensor on the device, and batches of it by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from latentprep.device import code_tensor
from latentprep.errors import DatasetError, check_number, check_whole, opt
from latentprep.format import LatentDataset
from latentprep.format.latents import read_latents

Indices = TypeVar("Indices", Tensor, np.ndarray)

_COUNTED = 256  # samples that float statistics are measured on, at most


class Samples(Protocol):
    """A split for training and evaluation: `Split` holds it in memory, `StreamedSplit` reads it from disk.

    A training batch is rows from `training_rows`, with labels i64 [B]; `codes_of` makes codes u8 [B,C,h,w] of the rows,
    i32 where codes have more than 8 bits.
    It is a pure function, so that it can be compiled together with the rest of the step.
    """

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def soft(self) -> Tensor | None: ...

    def classes(self) -> list[int]: ...

    def training_rows(
        self, batch_size: int, generator: Generator, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]: ...

    def codes_of(self, rows: Tensor) -> Tensor: ...

    def targets_of(self, rows: Tensor, labels: Tensor, classes: int) -> Tensor: ...

    def batches(self, batch_size: int, wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]: ...

    def in_order(self, sizes: Sequence[int], wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Split:
    """Samples in the device's memory. labels: i64 [n].

    codes: u8 or i32 [n,V,C,h,w], or f32 where they are latents in units of codes. soft: f16 [n,V,classes], the
    probabilities that each view is to be learned with in place of its label (`latenttrain.labels`).
    """

    codes: Tensor
    labels: Tensor
    soft: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device) -> Split:
        """The same on another device."""
        soft = self.soft if self.soft is None else self.soft.to(device)
        return replace(self, codes=self.codes.to(device), labels=self.labels.to(device), soft=soft)

    def classes(self) -> list[int]:
        """Two or more of the labels that occur, or the only one."""
        return self.labels.unique().tolist()

    def unpacked(self, codes: Tensor) -> Tensor:
        """Codes as they are held -> u8 [B,C,h,w]"""
        return codes

    def training_rows(self, batch_size: int, generator: Generator, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, of each sample one view: rows of the codes i64 [B], labels i64 [B].

        The order depends on the generator (on the split's device) alone, the views on the epoch: see `view_shown`.
        """
        samples, views = self.codes.shape[:2]
        order = torch.randperm(samples, generator=generator, device=self.device)
        view = view_shown(torch.arange(samples, device=self.device), epoch, views)
        for chosen in order.split(cut(samples, batches_per_epoch(samples, batch_size))):
            yield chosen * views + view[chosen], self.labels[chosen]

    def codes_of(self, rows: Tensor) -> Tensor:
        """i64 [B] -> u8 [B,C,h,w]. Whole rows: on a CPU torch copies them 20 times as fast as what two indices pick."""
        return self.unpacked(self.codes.flatten(0, 1).index_select(0, rows))

    def targets_of(self, rows: Tensor, labels: Tensor, classes: int) -> Tensor:
        """What rows of `training_rows` are to be learned with: i64 [B], i64 [B] -> f32 [B,classes], summing to one"""
        if self.soft is not None:
            return self.soft.flatten(0, 1).index_select(0, rows).float()
        return one_hot(labels, classes)

    def training_batches(
        self, batch_size: int, generator: Generator, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch as `training_rows` draws it: codes u8 [B,C,h,w], labels i64 [B]."""
        for rows, labels in self.training_rows(batch_size, generator, epoch):
            yield self.codes_of(rows), labels

    def batches(self, batch_size: int, wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in order, view 0: codes u8 [B,C,h,w], labels i64 [B]. wanted: only the batches of these
        numbers."""
        return self.in_order(full_batches(len(self), batch_size), wanted)

    def in_order(self, sizes: Sequence[int], wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in batches of these sizes, which add up to all samples."""
        edges = list(accumulate(sizes, initial=0))
        for number in range(len(sizes)) if wanted is None else wanted:
            part = slice(edges[number], edges[number + 1])
            yield self.unpacked(self.codes[part, 0]), self.labels[part]


def epoch_generator(seed: int, epoch: int, device: torch.device) -> Generator:
    """What an epoch draws from, its order first: the same one for the same seed and epoch."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """i64 [B] -> f32 [B,classes]"""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def view_shown(sample: Indices, epoch: int, views: int) -> Indices:
    """Which view an epoch shows of each sample, by its number in the split: whole numbers [n] -> [n]

    View 0, as which samples are judged, in every other epoch (half of the samples in each); the others take turns in
    between, so that none comes twice before all have come once. Nothing is drawn: as with a mirror image that
    alternates (K. Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024, https://arxiv.org/abs/2404.00498), what is shown
    over some epochs is then more varied than what chance would pick.
    """
    turn = sample + epoch
    return (turn % 2) * (1 + turn // 2 % max(1, views - 1)) if views > 1 else 0 * sample


def check_trainable(dataset: LatentDataset, splits: tuple[str, ...] = ("train", "val")) -> None:
    """Raises `DatasetError` if `fit` cannot use the dataset: a split absent or incomplete, or one class only."""
    for split in splits:
        if split not in dataset.splits:
            raise DatasetError(
                f"{dataset.root} has no split '{split}', only {', '.join(dataset.splits) or 'none'}",
                f"encode both: {opt('splits')} train,val, or {opt('val_fraction', 0.1)} if the source has no val",
            )
        dataset.check_complete(split)
    if len(dataset.classes) < 2:
        only = f"one class only, '{dataset.classes[0]}'" if dataset.classes else "no classes"
        raise DatasetError(f"{dataset.root} has {only}", "encode two classes or more")


def trained_samples(dataset: LatentDataset, limit: int | None = None, holdout: float = 0.0) -> int:
    """The samples that `load_trained` trains on, counted by the records alone."""
    check_limit(limit)
    check_holdout(holdout)
    valid = sum(record.rows - len(record.invalid) for record in dataset.records("train"))
    check_samples(dataset, "train", valid)
    samples = min(valid, valid if limit is None else limit)
    return samples - (held_out(samples, holdout) if holdout else 0)


def held_out(samples: int, holdout: float) -> int:
    """How many of so many samples are held out, at least one."""
    return max(1, round(holdout * samples))


def load_split(
    dataset: LatentDataset, split: str, device: torch.device, limit: int | None = None, views: bool = True
) -> Split:
    """A split on the device, with all views or view 0 only; with `limit`, at most that many samples, spread evenly.

    Raises `DatasetError` if shards are missing or damaged or no sample is valid, `UsageError` for a bad limit.
    """
    check_limit(limit)
    loaded = dataset.load(split, limit, keys=False)
    check_samples(dataset, split, len(loaded))
    codes = code_tensor(loaded.codes if views else loaded.codes[:, :1].copy())
    return Split(codes.to(device), torch.from_numpy(loaded.labels).to(device, torch.int64))


def load_trained(
    dataset: LatentDataset,
    device: torch.device,
    limit: int | None = None,
    holdout: float = 0.0,
    latents: Path | None = None,
    soft: Tensor | None = None,
) -> tuple[Split, Split]:
    """The samples to train on and to evaluate on: train with all views, and view 0 of val.

    holdout: this share of train, always the same samples, takes the place of val. latents: a folder that ``latentprep
    latents`` made of this dataset; its float latents (view 0), in units of codes, take the place of the codes.
    soft: see `Split`; of all samples within the limit.

    Raises as `load_split` does, and `UsageError` for a holdout out of range.
    """
    check_holdout(holdout)
    host = torch.device("cpu")  # where it is divided: on the device the whole and its parts would have to fit
    train = replace(load_split(dataset, "train", host, limit), soft=soft)
    if latents is not None:
        train = replace(train, codes=float_codes(dataset, "train", latents, limit))
    check_classes(dataset, train)
    if holdout:
        held = np.zeros(len(train), bool)
        held[np.random.default_rng(len(train)).permutation(len(train))[: held_out(len(train), holdout)]] = True
        judged = torch.from_numpy(held)
        val = Split(train.codes[judged, :1].contiguous(), train.labels[judged])
        train = Split(train.codes[~judged], train.labels[~judged], soft=soft if soft is None else soft[~judged])
    else:
        val = load_split(dataset, "val", host, views=False)
        if latents is not None:
            val = replace(val, codes=float_codes(dataset, "val", latents))
    return train.to(device), val.to(device)


def float_codes(dataset: LatentDataset, split: str, latents: Path, limit: int | None = None) -> Tensor:
    """The split's float latents in units of its codes, f32 [n,1,C,h,w]: dequantizing them gives the latents.

    Raises `DatasetError` if the folder does not hold this dataset's.
    """
    rows = dataset.valid_rows(split, limit)
    return torch.from_numpy(_in_codes(dataset, read_latents(latents, dataset, split)[rows]))[:, None]


def float_statistics(dataset: LatentDataset, latents: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of train's float latents, in units of codes.

    Measured on evenly spread samples, as many as `encode` calibrates on.

    Raises `DatasetError` if the folder does not hold this dataset's, or no sample is valid.
    """
    rows = dataset.valid_rows("train", _COUNTED)
    check_samples(dataset, "train", len(rows))
    values = _in_codes(dataset, read_latents(latents, dataset, "train")[rows]).astype(np.float64)
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    return tuple(mean.astype(np.float32).tolist()), tuple(std.astype(np.float32).tolist())


def _in_codes(dataset: LatentDataset, values: np.ndarray) -> np.ndarray:
    """Float latents in units of codes, f16 [n,C,h,w] -> f32 [n,C,h,w]"""
    lo, step = (np.array(v, np.float32)[:, None, None] for v in (dataset.quantizer.lo, dataset.quantizer.step))
    return (values.astype(np.float32) - lo) / step - 0.5


def check_limit(limit: int | None) -> None:
    """Raises `UsageError` for a limit that leaves nothing to learn from."""
    check_whole("limit", limit, 2, hint=f"leave {opt('limit')} out to use every sample", optional=True)


def check_holdout(holdout: float) -> None:
    """Raises `UsageError` for a share that leaves too little to learn from."""
    check_number("holdout", holdout, 0, 0.9, f"use {opt('holdout', 0.15)} to compare settings, 0 for final results")


def check_samples(dataset: LatentDataset, split: str, samples: int) -> None:
    """Raises `DatasetError` if no sample of the split is valid."""
    if not samples:
        raise DatasetError(f"{dataset.root}: split '{split}' holds no valid sample", "see errors.jsonl beside it")


def check_classes(dataset: LatentDataset, train: Samples) -> None:
    """Raises `DatasetError` if all training samples are of one class, whatever the manifest lists."""
    found = train.classes()
    if len(found) < 2:
        raise DatasetError(
            f"{dataset.root}: all {len(train)} training samples are of one class, '{dataset.classes[found[0]]}'",
            f"encode two classes or more, or raise {opt('limit')}",
        )


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Batches in an epoch, whose sizes `cut` has: see `pieces`."""
    return pieces(samples, batch_size)


def pieces(samples: int, most: int) -> int:
    """In how many pieces samples are cut: as few as there can be with at most so many in each, but none of one alone,
    of which BatchNorm can make nothing on a grid of one cell. So three samples in pieces of two at most are one."""
    return max(1, min(-(-samples // most), samples // 2))


def full_batches(samples: int, batch_size: int) -> list[int]:
    """Sizes of batches of which the last alone may be smaller."""
    return [min(batch_size, samples - start) for start in range(0, samples, batch_size)]


def cut(samples: int, pieces: int) -> tuple[int, ...]:
    """Sizes of so many pieces of `samples`: they differ by at most one, the larger ones first."""
    size, larger = divmod(samples, pieces)
    return (size + 1,) * larger + (size,) * (pieces - larger)
