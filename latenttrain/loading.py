"""`batches`: what `fit` trains on, for a loop of your own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprep.device import enough_memory, pick_device
from latentprep.errors import UsageError, check_whole, opt
from latentprep.format import LatentDataset, open_dataset
from latentprep.format.fields import differences
from latenttrain.data import Samples, batches_per_epoch, cut, epoch_generator
from latenttrain.ranks import Ranks
from latenttrain.streaming import shards_to_hold, shown_samples


class Batches:
    """Batches of a split on its device; each iteration is one whole epoch. `batches` makes it.

    dataset: the `LatentDataset`, whose ``classes`` name the labels. samples: the split, its ``len`` counts its samples.
    epoch: the one that the next iteration shows; the last batch of an epoch counts it up, `set_epoch` sets it.
    """

    def __init__(self, dataset: LatentDataset, samples: Samples, settings: dict[str, Any], latents: bool, ranks: Ranks):
        self.dataset, self.samples, self.epoch = dataset, samples, 0
        self._settings, self._latents, self._ranks = settings, latents, ranks
        self._sizes = cut(len(samples), batches_per_epoch(len(samples), settings["batch_size"]))
        self._given = 0  # batches of the epoch that were given so far …
        self._first = 0  # … and those that the next iteration leaves out
        if ranks.world > min(self._sizes):
            raise UsageError(
                f"{ranks.world} ranks cannot share a batch of {min(self._sizes)} samples",
                f"use a larger {opt('batch_size')}, or fewer ranks",
            )

    def __len__(self) -> int:
        """Batches in an epoch: the same number on every rank."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._given, self._first = self._first, 0
        epoch = self.epoch
        for number, (rows, labels) in enumerate(self._left(), 1 + self._given):
            if self._ranks.world > 1:
                part = self._ranks.share(len(labels))
                rows, labels = rows[part.start : part.stop], labels[part.start : part.stop]
            codes = self.samples.codes_of(rows) if self._settings["shuffle"] else rows
            # At the last batch already: who knows how many there are does not ask for another one.
            more, self._given = divmod(number, len(self))
            self.epoch = epoch + more
            yield self._dequantized(codes) if self._latents else codes, labels

    def _left(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches, from the first that is to be given, of all ranks."""
        if not self._settings["shuffle"]:
            return self.samples.in_order(self._sizes, range(self._given, len(self)))
        generator = epoch_generator(self._settings["seed"], self.epoch, self.samples.device)
        rows = self.samples.training_rows(self._settings["batch_size"], generator, self.epoch)
        return islice(rows, self._given, None)

    def _dequantized(self, codes: Tensor) -> Tensor:
        from latentprep.quantizing.scalar import dequantize

        return dequantize(codes, self.dataset.quantizer)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration shows, as with torch's DistributedSampler. The present one goes on where
        `load_state_dict` has left it."""
        check_whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._given, self._first = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """How far the loop has come, in JSON: it counts the batch that was given last as done."""
        return {"epoch": self.epoch, "batch": self._given, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was given last when the state was taken, with the same batches as without a break.
        The number of ranks may differ, and so may codes and latents.

        Raises `UsageError` if the state is of other batches.
        """
        place = {"epoch": 0, "batch": 0}
        for name, there, here in differences({**state, **place}, {**self.state_dict(), **place}):
            raise UsageError(f"the state is of other batches: {name} was {there!r}, and is {here!r}", "make them alike")
        epoch, batch = state.get("epoch"), state.get("batch")
        if not isinstance(epoch, int) or not isinstance(batch, int) or epoch < 0 or batch not in range(len(self)):
            raise UsageError(f"the state names batch {batch!r:.60} of epoch {epoch!r:.60}, and there is none")
        self.epoch, self._given, self._first = epoch, batch, batch


def batches(
    dataset: str | Path | LatentDataset,
    split: str = "train",
    batch_size: int = 64,
    *,
    device: str | torch.device = "auto",
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    views: bool = True,
    latents: bool = False,
    stream: bool | None = None,
    buffer: int | None = None,
) -> Batches:
    """Batches of a split for a training loop of your own: those that `fit` trains on, in the same order.

    Each iteration is an epoch that shows every sample once: (codes u8 [B,C,h,w], labels i64 [B]), both on the device.
    The codes lie in the device's memory, packed if need be, or are streamed, as `fit` chooses.

    dataset: a folder, a URL, or what `latentprep.open` returned.
    batch_size: samples of a batch at most, of all ranks together; batches differ by one sample at most.
    shuffle: each epoch in another order, which seed and epoch decide; else in the order of the dataset, view 0 only.
    rank, world_size: give only this rank's part of each batch; the parts differ by one sample at most.
    views: show another view of a sample in every other epoch, as `fit` does; False shows view 0 only.
    latents: give the latents that the codes stand for, f32 [B,C,h,w], which the codec's decoder takes, in their place.
    stream: read the split from disk in each epoch; by default only if its codes need more than half of the free memory.
    buffer: shards mixed at a time when streaming.

    `Batches.state_dict` and `Batches.load_state_dict` go on within an epoch, exact to the batch; streamed shards are
    read from the epoch's start for it.

    >>> loader = latenttrain.batches("shards", batch_size=20, device="cpu")
    >>> [(tuple(codes.shape), tuple(labels.shape)) for codes, labels in loader]
    [((20, 16, 16, 16), (20,)), ((20, 16, 16, 16), (20,)), ((20, 16, 16, 16), (20,))]

    Raises `UsageError` for an unknown split or a value out of range, `DatasetError` for a split that is incomplete,
    damaged or empty, `SystemFault` for a device that is not available or too small.
    """
    check_whole("batch_size", batch_size, 2, 1 << 20, f"{opt('batch_size', 64)} is the default")
    check_whole("seed", seed, 0, (1 << 63) - 1)
    check_whole("world_size", world_size, 1)
    check_whole("rank", rank, 0, world_size - 1, f"{opt('world_size')} is {world_size}; ranks count from 0")
    target, dataset = pick_device(device), open_dataset(dataset)
    dataset.check_complete(split)
    held = shards_to_hold(dataset, target, stream, buffer, split=split)
    with enough_memory(target, f"use {opt('stream', True)}"):
        samples = shown_samples(dataset, split, target, held, views=views and shuffle)
    settings = {
        "manifest_sha256": dataset.manifest.sha256, "split": split, "batch_size": batch_size, "shuffle": shuffle,
        "seed": seed, "views": views, "buffer": held, "device": target.type,
    }  # fmt: skip
    return Batches(dataset, samples, settings, latents, Ranks(rank, world_size))
