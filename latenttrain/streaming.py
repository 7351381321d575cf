"""Datasets larger than memory: shards are read ahead in random order and mixed in a buffer.

The memory needed is that of the buffer and of the shards read ahead, whatever the size of the dataset. This module also
decides whether a split is held in memory, held packed, or streamed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from latentprep.device import code_tensor, sent, torch_dtype
from latentprep.errors import DatasetError, UsageError, check_whole, opt
from latentprep.format import INVALID_LABEL, LatentDataset, Manifest
from latentprep.format.packing import view_bytes
from latenttrain.data import (
    Samples,
    Split,
    batches_per_epoch,
    check_classes,
    check_limit,
    check_samples,
    cut,
    full_batches,
    load_split,
    one_hot,
    view_shown,
)
from latenttrain.memory import free_memory
from latenttrain.packed import PackedSplit, pack_views

BUFFER_BYTES = 256 << 20  # of codes in the buffer by default: 64 shards of 1,024 x 4 x 32 x 32
THREADS = min(4, os.cpu_count() or 1)  # to read, verify and decompress, mostly without the interpreter lock
THREAD_NAME = "read-shard"


class StreamedSplit:
    """A split that stays on disk. Reads whole shards ahead in threads; batches come to the device.

    Each of several ranks reads and decompresses the whole split, and takes its part of each batch: what it costs is
    processor time, since local files come from the page cache, and shards at a URL from a cache that ranks share.

    held: shards that the buffer holds. limit: at most this many samples, the same ones as `load_split` takes. views:
    whether batches for training show them, or view 0 only.
    The samples and their order do not depend on the threads.

    Opening reads the records alone. Raises `DatasetError` if shards are missing or no sample is valid, `UsageError` for
    a limit or a buffer out of range; while it is read, `DatasetError` naming a shard that is damaged.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        split: str,
        device: torch.device,
        held: int | None = None,
        limit: int | None = None,
        threads: int = THREADS,
        views: bool = True,
    ) -> None:
        check_limit(limit)
        self.views = dataset.manifest.views(split) if views else 1
        self.dataset, self.split, self.device, self.threads = dataset, split, device, threads
        check_whole("buffer", held, 1, hint=f"leave {opt('buffer')} out for the default", optional=True)
        self.held = default_buffer(dataset.manifest, split) if held is None else held
        records = [dataset.committed(split, shard) for shard in range(dataset.manifest.shard_count(split))]
        valid = np.array([record.rows - len(record.invalid) for record in records], np.int64)
        self._valid, self._samples = valid, int(valid.sum())
        self._first = np.concatenate([[0], np.cumsum(valid)])  # of each shard, among the valid samples
        check_samples(dataset, split, self._samples)
        self._limit = limit if limit is not None and limit < self._samples else None

    def __len__(self) -> int:
        return self._limit or self._samples

    @cached_property
    def labels(self) -> Tensor:
        """i64 [n] on the device, in order. Reads every shard's labels, a millisecond each, and nothing else."""

        def kept(shard: int) -> np.ndarray:
            labels = self.dataset.read_labels(self.split, shard)
            return labels[self._kept(shard, labels)]

        with ThreadPoolExecutor(self.threads, THREAD_NAME) as pool:
            labels = np.concatenate(list(pool.map(kept, range(len(self._valid)))))
        return torch.from_numpy(labels).to(self.device, torch.int64)

    def classes(self) -> list[int]:
        """Two or more of the labels that occur, or the only one. Reads as few shards as possible."""
        last, found = len(self._valid) - 1, set[int]()
        for shard in dict.fromkeys((0, last, *range(last))):  # sources are in class order as a rule: the ends differ
            labels = self.dataset.read_labels(self.split, shard)
            found.update(labels[self._kept(shard, labels)].tolist())
            if len(found) > 1:
                break
        return sorted(found)

    def training_batches(
        self, batch_size: int, generator: torch.Generator, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, of each sample the view that `Split` shows: codes u8 [B,C,h,w], labels i64 [B].

        Shards come in random order into a buffer, each batch is drawn uniformly from what the buffer holds, and the
        next shard comes in as soon as there is room. The order depends on the generator, `held` and the batch size; of
        one that is not on the CPU, on its seed alone.
        """
        # On the host: a draw on the device would wait for all that is queued, and MPS draws 32 bits only.
        host = generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())
        seed = int(torch.randint(1 << 62, (), generator=host))
        random = np.random.default_rng(seed)
        order = random.permutation(len(self._valid)).tolist()
        sizes = cut(len(self), batches_per_epoch(len(self), batch_size))
        rows, most_wanted = self.dataset.manifest.shard_rows, max(sizes)

        def one_view(shard: int, codes: np.ndarray) -> np.ndarray:
            rows = np.arange(len(codes))
            return codes[rows, view_shown(self._kept_before(shard) + rows, epoch, self.views)]

        most = min(len(self), max(self.held * rows, most_wanted + rows))
        held = torch_dtype(self.dataset.quantizer.dtype)
        codes = torch.empty((most, *self.dataset.manifest.latent), dtype=held).numpy()
        labels = np.empty(most, np.int64)
        slots = np.arange(most)  # of the buffer: the first `filled` hold a sample, the others are free
        filled = drawn = 0
        with closing(self._read(order, one_view)) as shards:
            coming = next(shards, None)
            for size in sizes:
                # The first batch waits for a quarter of the buffer only; four samples then come for each that leaves.
                room = min(most, max(most // 4 + 3 * drawn, most_wanted + rows))
                while coming is not None and filled + len(coming[1]) <= room:
                    free = slots[filled : filled + len(coming[1])]
                    codes[free], labels[free] = coming
                    filled, coming = filled + len(free), next(shards, None)
                chosen = random.choice(filled, size, replace=False)
                taken = slots[chosen]
                yield self._moved(codes, taken), self._moved(labels, taken)
                drawn, filled = drawn + size, filled - size
                stays = np.ones(size, bool)  # which of the last slots were not drawn: they move to where others were
                stays[chosen[chosen >= filled] - filled] = False
                slots[chosen[chosen < filled]] = slots[filled : filled + size][stays]
                slots[filled : filled + size] = taken

    training_rows = training_batches  # what comes are codes already
    soft = None

    def codes_of(self, rows: Tensor) -> Tensor:
        """u8 [B,C,h,w] as it is."""
        return rows

    def targets_of(self, rows: Tensor, labels: Tensor, classes: int) -> Tensor:
        return one_hot(labels, classes)

    def batches(self, batch_size: int, wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in order, view 0: codes u8 [B,C,h,w], labels i64 [B]. wanted: only the batches of these
        numbers, though all are read."""
        return self.in_order(full_batches(len(self), batch_size), wanted)

    def in_order(self, sizes: Sequence[int], wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in batches of these sizes, which add up to all samples."""
        codes, labels = np.empty((0, *self.dataset.manifest.latent), np.uint8), np.empty(0, np.int64)
        left = deque(enumerate(sizes))
        with closing(self._read(range(len(self._valid)), lambda _, codes: codes[:, 0])) as shards:
            for coming in shards:
                codes, labels = np.concatenate([codes, coming[0]]), np.concatenate([labels, coming[1]])
                while left and len(labels) >= left[0][1]:
                    number, size = left.popleft()
                    part = np.arange(size)
                    if wanted is None or number in wanted:
                        yield self._moved(codes, part), self._moved(labels, part)
                    codes, labels = codes[size:], labels[size:]

    def packed(self) -> PackedSplit:
        """The whole split on the device, packed shard by shard, so that it is never unpacked as a whole."""
        manifest, quantizer = self.dataset.manifest, self.dataset.quantizer
        size = view_bytes(manifest.latent, quantizer)
        codes = torch.empty((len(self), self.views, size), dtype=torch.uint8, device=self.device)
        labels = torch.empty(len(self), dtype=torch.int64, device=self.device)
        start = 0
        with closing(self._read(range(len(self._valid)), lambda _, codes: codes[:, : self.views])) as shards:
            for shard, found in shards:
                part = slice(start, start + len(found))
                codes[part] = pack_views(torch.from_numpy(shard).to(self.device), quantizer)
                labels[part] = torch.from_numpy(found).to(self.device)
                start = part.stop
        return PackedSplit(codes, labels, quantizer, manifest.latent)

    def _read(
        self, order: Iterable[int], pick: Callable[[int, np.ndarray], np.ndarray]
    ) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """The kept samples of these shards, in this order: `pick` of codes u8 or i32 [n,V,C,h,w], labels i64 [n].

        Threads read at most two shards each ahead of whoever asks. None runs on when the iterator is closed.
        """

        def read(shard: int) -> tuple[np.ndarray, np.ndarray]:
            found = self.dataset.read_shard(self.split, shard, keys=False)
            rows = self._kept(shard, found.labels)
            codes = found.codes if len(rows) == len(found) else found.codes[rows]
            return code_tensor(pick(shard, codes)).numpy(), found.labels[rows].astype(np.int64)

        left, reading = iter(order), deque[Future[tuple[np.ndarray, np.ndarray]]]()
        with ThreadPoolExecutor(self.threads, THREAD_NAME) as pool:
            try:
                while True:
                    reading.extend(pool.submit(read, shard) for shard in islice(left, 2 * self.threads - len(reading)))
                    if not reading:
                        return
                    yield reading.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _kept(self, shard: int, labels: np.ndarray) -> np.ndarray:
        """Of one shard's rows, labels i32 [n], those that are valid and within the limit: i64 [k]"""
        rows = np.flatnonzero(labels != INVALID_LABEL)
        if len(rows) != self._valid[shard]:
            record = self.dataset.committed(self.split, shard)
            raise DatasetError(
                f"{self.dataset.root}: shard {self.split} {shard} has {len(rows)} valid samples, "
                f"its record {record.path} counts {self._valid[shard]}",
                f"delete {record.path} and run the same latentprep encode again: it makes only that shard",
            )
        if self._limit is None:
            return rows
        first, last = self._kept_before(shard), self._kept_before(shard + 1)
        return rows[np.arange(first, last) * self._samples // self._limit - self._first[shard]]

    def _kept_before(self, shard: int) -> int:
        """The samples of all earlier shards that are valid and within the limit."""
        valid = int(self._first[shard])
        return valid if self._limit is None else -(-valid * self._limit // self._samples)

    def _moved(self, values: np.ndarray, index: np.ndarray) -> Tensor:
        """``values[index]`` on the device. From pinned memory a copy to CUDA waits for nothing."""
        given = torch.from_numpy(values)
        out = torch.empty((len(index), *given.shape[1:]), dtype=given.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(given, 0, torch.from_numpy(index), out=out)
        return sent(out, self.device)


def default_buffer(manifest: Manifest, split: str) -> int:
    """Shards that the buffer holds by default: `BUFFER_BYTES` of codes, and at least 4."""
    return max(4, BUFFER_BYTES // (manifest.shard_rows * _bytes(manifest)))


def _bytes(manifest: Manifest) -> int:
    """That the codes of one view take as torch computes on them."""
    return int(np.prod(manifest.latent)) * torch_dtype(manifest.quantizer.dtype).itemsize


def shards_mixed(rows: np.ndarray, shard_rows: int) -> float:
    """From how many shards neighbours in an epoch are drawn: rows in the split i64 [n], in order of appearance.

    It is one over the share of neighbours from the same shard: 1 for no shuffling, the number of shards for a true
    permutation, and about twice the buffer for one much smaller than the split, since its shards are partly drawn.
    """
    shards = rows // shard_rows
    return len(rows) / max(1, int((shards[1:] == shards[:-1]).sum()))


def shards_to_hold(
    dataset: LatentDataset,
    device: torch.device,
    stream: bool | None,
    buffer: int | None,
    resident_only: bool = False,
    split: str = "train",
) -> int | None:
    """The shards that the buffer holds if the split is streamed; None if it is not.

    stream: None streams only if the codes, even packed, take more than half of the free memory. resident_only: another
    setting needs all codes in memory. Raises `UsageError` if the two exclude each other.
    """
    if stream and resident_only:
        raise UsageError(
            f"{opt('stream')} cannot be combined with {opt('holdout')}, {opt('labels')} or {opt('latents')}",
            "they need all codes in memory; leave one of them out",
        )
    check_whole("buffer", buffer, 1, hint=f"leave {opt('buffer')} out for the default", optional=True)
    if buffer is not None and (stream is False or resident_only):
        raise UsageError(f"{opt('buffer')} needs {opt('stream')}, and this run is not streamed", "leave it out")
    if stream is None:
        stream = not (resident_only or fits(dataset, split, device) or fits(dataset, split, device, packed=True))
    if not stream:
        return None
    return default_buffer(dataset.manifest, split) if buffer is None else buffer


def training_data(
    dataset: LatentDataset,
    device: torch.device,
    held: int | None,
    limit: int | None = None,
    soft: Tensor | None = None,
) -> tuple[Samples, Samples]:
    """The samples to train on, train with all views, and to evaluate on, view 0 of val. soft: see `Split`.

    held: from `shards_to_hold`. Val is streamed if it does not fit. Raises as `load_split` does.
    """
    train = shown_samples(dataset, "train", device, held, limit)
    if isinstance(train, Split):
        train = replace(train, soft=soft if soft is None else soft.to(device))
    check_classes(dataset, train)
    return train, judged_split(dataset, "val", device)


def shown_samples(
    dataset: LatentDataset,
    split: str,
    device: torch.device,
    held: int | None,
    limit: int | None = None,
    views: bool = True,
) -> Samples:
    """A split to be shown in random order, with all views or view 0 only.

    held: from `shards_to_hold`. In memory codes are as torch computes on them if all fit that way, else packed.
    """
    if held is not None:
        return StreamedSplit(dataset, split, device, held, limit, views=views)
    if fits(dataset, split, device):
        return load_split(dataset, split, device, limit, views)
    return StreamedSplit(dataset, split, device, limit=limit, views=views).packed()


def judged_split(dataset: LatentDataset, split: str, device: torch.device) -> Samples:
    """View 0 of every sample of a split, to evaluate on: in memory if it fits, else packed, else read in order."""
    dataset.check_complete(split)
    if fits(dataset, split, device):
        return load_split(dataset, split, device, views=False)
    streamed = StreamedSplit(dataset, split, device)
    return streamed.packed() if fits(dataset, split, device, packed=True) else streamed


def fits(dataset: LatentDataset, split: str, device: torch.device, packed: bool = False) -> bool:
    """Whether a split's codes take less than half of the free memory, as torch computes on them or packed."""
    manifest = dataset.manifest
    view = view_bytes(manifest.latent, dataset.quantizer) if packed else _bytes(manifest)
    row = manifest.views(split) * view
    free = free_memory(device)
    if not packed:  # on their way to the device they are in the host's memory, all at once
        free = min(free, free_memory(torch.device("cpu")))
    return dataset.manifest.splits[split] * row < free / 2
