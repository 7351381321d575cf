"""A latent dataset for PyTorch's `DataLoader`, and so for what is built on it: Lightning, Accelerate and the like.

    LatentSamples   map-style: the split in memory, a sample by its number
    LatentStream    iterable: shards read in random order, each worker of each rank its own part
    webdataset      a pipeline of the `webdataset` package, for those who train from tars

All give (codes u8 [C,h,w], label), or latents f32 in place of codes, on the CPU. `latenttrain.batches` needs no workers
and gives batches on the device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from latentprep.device import code_tensor
from latentprep.errors import DatasetError, SystemFault, UsageError, check_whole, opt
from latentprep.format import INVALID_LABEL, LatentDataset, Quantizer, open_dataset
from latentprep.format.packing import unpack_views, view_bytes
from latentprep.storage.places import RemotePath

_SHARDS = 100  # that webdataset shuffles at a time
_LABEL = re.compile(rb"[0-9]{1,9}")


class _Opened:
    """A latent dataset that each process opens for itself: pickled, it is its address."""

    def __init__(self, dataset: str | Path | LatentDataset) -> None:
        self._dataset: LatentDataset | None = open_dataset(dataset)
        self._process = os.getpid()
        cache = self._dataset.cache
        self._arguments: dict[str, Any] = {
            "path": str(self._dataset.root), "verify": self._dataset.verify,
            **({"cache_bytes": 0} if cache is None else {"cache_dir": cache.folder, "cache_bytes": cache.limit}),
        }  # fmt: skip
        self._remote = isinstance(self._dataset.root, RemotePath)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_dataset": None, "_process": None}

    def __call__(self) -> LatentDataset:
        if self._dataset is None:
            self._dataset, self._process = open_dataset(**self._arguments), os.getpid()
        if self._remote and self._process != os.getpid():
            raise SystemFault(
                "a forked DataLoader worker cannot use the connections of its parent",
                'give the DataLoader multiprocessing_context="spawn"',
            )
        return self._dataset


class LatentSamples(Dataset[tuple[Tensor, int]]):
    """A split in memory: ``samples[i]`` is (codes u8 [C,h,w], label), for a `DataLoader` that shuffles and divides.

    dataset: a folder, a URL, or what `latentprep.open` returned. Samples that could not be read are left out.
    views: give all views, [V,C,h,w], in place of view 0. latents: give the latents that the codes stand for, f32.

    Forked workers share the codes with their parent; a spawned one reads them again. Raises `UsageError` for an unknown
    split, `DatasetError` for one that is incomplete or damaged.
    """

    def __init__(
        self, dataset: str | Path | LatentDataset, split: str = "train", *, views: bool = False, latents: bool = False
    ) -> None:
        self._opened, self._split, self._views = _Opened(dataset), split, views
        self.classes = self._opened().classes
        self._quantizer = self._opened().quantizer if latents else None
        self._rows: tuple[np.ndarray, np.ndarray] | None = None
        self._loaded()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}

    def _loaded(self) -> tuple[np.ndarray, np.ndarray]:
        if self._rows is None:
            found = self._opened().load(self._split, keys=False)
            self._rows = found.codes if self._views else found.codes[:, 0].copy(), found.labels
        return self._rows

    @property
    def labels(self) -> np.ndarray:
        """i32 [n]"""
        return self._loaded()[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        codes, labels = self._loaded()
        return _tensor(codes[index], self._quantizer), int(labels[index])


class LatentStream(IterableDataset[tuple[Tensor, int]]):
    """A split read from disk, shard by shard, each sample once an epoch: (codes u8 [C,h,w], label).

    Shards come in random order, and the samples of so many at a time are mixed. Every worker of every rank gets a part
    of its own; parts differ by one sample at most. So let the DataLoader not shuffle, with the same number of workers
    on each rank, and call `set_epoch` before each epoch, as with DistributedSampler: it reaches workers that stay, too.

    dataset, views, latents: as for `LatentSamples`. shuffle: False keeps the dataset's order within a part. buffer:
    shards mixed at a time. rank, world_size: leave them out where something else divides the samples among ranks.

    Raises as `LatentSamples` does; a damaged shard when it is read.
    """

    def __init__(
        self,
        dataset: str | Path | LatentDataset,
        split: str = "train",
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer: int = 8,
        rank: int = 0,
        world_size: int = 1,
        views: bool = False,
        latents: bool = False,
    ) -> None:
        check_whole("seed", seed, 0, (1 << 63) - 1)
        check_whole("buffer", buffer, 1)
        check_whole("world_size", world_size, 1)
        check_whole("rank", rank, 0, world_size - 1, f"{opt('world_size')} is {world_size}; ranks count from 0")
        self._opened, self._split, self._views = _Opened(dataset), split, views
        self._shuffle, self._seed, self._buffer = shuffle, seed, buffer
        self._rank, self._world = rank, world_size
        opened = self._opened()
        opened.check_complete(split)
        self.classes = opened.classes
        self._quantizer = opened.quantizer if latents else None
        self._valid = np.array([record.rows - len(record.invalid) for record in opened.records(split)], np.int64)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def samples(self) -> int:
        """In the whole split, of all ranks. There is no ``len``: the number of batches depends on the workers."""
        return int(self._valid.sum())

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration has."""
        check_whole("epoch", epoch, 0)
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        parts, part = workers * self._world, self._rank * workers + number
        first, last = self.samples * part // parts, self.samples * (part + 1) // parts
        epoch, order = int(self._epoch), np.arange(len(self._valid))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        starts = np.concatenate([[0], np.cumsum(self._valid[order])])  # of each shard, in this order
        own = iter([place for place in range(len(order)) if starts[place] < last and starts[place + 1] > first])
        random = np.random.default_rng([self._seed, epoch, part])
        while some := list(islice(own, self._buffer)):
            read = [self._read(order[i], max(0, first - starts[i]), last - starts[i]) for i in some]
            codes, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
            for row in random.permutation(len(labels)) if self._shuffle else range(len(labels)):
                yield _tensor(codes[row], self._quantizer), int(labels[row])

    def _read(self, shard: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a shard's valid samples, those of these numbers: codes u8 [n,C,h,w] or [n,V,C,h,w], labels i32 [n]."""
        found = self._opened().read_shard(self._split, int(shard), keys=False)
        rows = np.flatnonzero(found.labels != INVALID_LABEL)
        if len(rows) != self._valid[shard]:
            raise DatasetError(
                f"{self._opened().root}: shard {self._split} {shard} has {len(rows)} valid samples, its record counts "
                f"{self._valid[shard]}",
                "restore the dataset, or encode it again",
            )
        rows = rows[first:last]
        return found.codes[rows] if self._views else found.codes[rows, 0], found.labels[rows]


def webdataset(
    urls: str | Sequence[str],
    *,
    dataset: str | Path | LatentDataset | None = None,
    shuffle: int = 1000,
    views: bool = False,
    latents: bool = False,
    **options: Any,
) -> Any:
    """A pipeline of the `webdataset` package over tars that latentprep wrote: (codes u8 [C,h,w], label).

    urls: of tars, as `webdataset.WebDataset` takes them: a list, or with braces. dataset: the latent dataset that they
    are of, by default the folder of the first one; its manifest says what the bytes mean.
    shuffle: samples that are mixed at a time; 0 keeps the order. views, latents: as for `LatentSamples`.
    options: others of `webdataset.WebDataset`, such as ``resampled``, ``shardshuffle`` or ``handler``. Shards are
    divided among ranks and workers by the package's own ``split_by_node`` and ``split_by_worker``.

    What is returned is a `webdataset.WebDataset`: go on with ``.batched(64)``, ``.repeat()`` and the rest.

    Raises `SystemFault` without the package, `DatasetError` if there is no manifest, and for a sample of another shape
    when it is read.
    """
    try:
        import webdataset as package
    except ImportError:
        raise SystemFault("this needs the webdataset package", "pip install 'latentprep[wds]'") from None
    check_whole("shuffle", shuffle, 0)
    found = package.shardlists.expand_urls(urls) if isinstance(urls, str) else [str(url) for url in urls]
    if not found:
        raise UsageError(f"{opt('urls')} names no tar", "give one or more")
    if dataset is None and found[0].startswith("pipe:"):
        raise UsageError("a pipe does not say of which dataset its tar is", f"name it as {opt('dataset')}")
    opened = open_dataset(found[0].rpartition("/")[0] or "." if dataset is None else dataset)
    manifest = opened.manifest
    decoder = _Decoder(manifest.quantizer, manifest.latent, len(manifest.classes), views, latents)
    usual = {"shardshuffle": _SHARDS if shuffle and not options.get("resampled") else False}
    usual |= {"nodesplitter": package.split_by_node}
    pipeline = package.WebDataset(found, **{**usual, **options}).shuffle(shuffle)
    return pipeline.map(decoder, **{name: value for name, value in options.items() if name == "handler"})


@dataclass(frozen=True)
class _Decoder:
    """Makes of a sample of webdataset what `webdataset` gives."""

    quantizer: Quantizer
    latent: tuple[int, int, int]
    classes: int
    views: bool
    latents: bool

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        names = ["codes"]
        while self.views and f"{len(names)}.codes" in sample:
            names.append(f"{len(names)}.codes")
        packed, label = [sample.get(name, b"") for name in names], sample.get("cls", b"")
        size = view_bytes(self.latent, self.quantizer)
        if any(len(view) != size for view in packed) or not _LABEL.fullmatch(label) or int(label) >= self.classes:
            raise DatasetError(
                f"{sample.get('__url__')}: sample {sample.get('__key__')!r:.100} has no codes of {size} bytes, or no "
                f"label below {self.classes}",
                f"name the dataset that it is of as {opt('dataset')}",
            )
        codes = np.frombuffer(b"".join(packed), np.uint8).reshape(len(packed), size)
        codes = unpack_views(codes, self.quantizer, self.latent)
        return _tensor(codes if self.views else codes[0], self.quantizer if self.latents else None), int(label)


def _tensor(codes: np.ndarray, quantizer: Quantizer | None) -> Tensor:
    """Codes u8 or i32 [...,C,h,w], or the latents that they stand for, f32 [...,C,h,w]."""
    return code_tensor(codes) if quantizer is None else torch.from_numpy(quantizer.dequantize(codes))
