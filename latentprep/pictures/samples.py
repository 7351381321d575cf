"""Samples of a latent dataset as images, or sounds: pick them, decode their codes, and load their originals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentprep.device import NOT_ON_DEVICE, Fitting, code_tensor, on_device
from latentprep.errors import LatentError, SourceError, UsageError, check_whole, nearest
from latentprep.format.dataset import LatentDataset
from latentprep.format.manifest import INVALID_LABEL
from latentprep.format.quantizer import Quantizer
from latentprep.quantizing.scalar import dequantize
from latentprep.sources.kinds import BadSample
from latentprep.sources.media import medium_of
from latentprep.sources.source import Source, open_source
from latentprep.storage.places import several

_BATCH = 32  # images per batch of a decoder, at most
_CELLS = (
    32 * 32**2
)  # latent cells per batch, at most: some kernels do not take 2^31 values, and SD-VAE's layers are large
_READERS = 4


@dataclass(frozen=True)
class Picked:
    """Valid samples of one split, view 0. rows: i64 [n] in the split; codes: u8 [n,C,h,w]; labels: i32 [n]; keys: n."""

    split: str
    rows: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    keys: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: slice | np.ndarray) -> Picked:
        """The samples at these places."""
        keys = np.array(self.keys, dtype=object)[places].tolist()
        return Picked(self.split, self.rows[places], self.codes[places], self.labels[places], keys)


class Decoder(Protocol):
    """Turns latents into images: a codec, or a `LinearDecoder`."""

    def decode(self, latents: Tensor) -> Tensor:
        """f32 [B,C,h,w] -> u8 [B,3,H,W], or sounds f32 [B,T]."""
        ...


def shown_split(splits: Sequence[str]) -> str:
    """The default split to show: val, or the first if there is no val."""
    return "val" if "val" in splits else splits[0]


def pick(
    dataset: LatentDataset,
    split: str | None = None,
    *,
    index: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
) -> Picked:
    """Samples of a split, in order, without invalid rows. Only shards that hold a picked row are read.

    index: only these rows. classes: only these classes, by name. limit: at most this many, spread evenly over classes.
    Raises `UsageError` for a split, class or row that does not exist or is invalid, `DatasetError` if damaged.
    """
    split = split or shown_split(dataset.splits)
    dataset.check_complete(split)
    manifest, labels = dataset.manifest, dataset.labels(split)
    rows = np.flatnonzero(labels != INVALID_LABEL)
    if index is not None:
        for row in index:
            if not 0 <= row < len(labels):
                raise UsageError(f"{dataset.root} has no row {row} in {split}", f"rows are 0 to {len(labels) - 1}")
            if labels[row] == INVALID_LABEL:
                raise UsageError(f"row {row} of {split} could not be read when it was encoded", "choose another row")
        rows = np.unique(np.array(index, np.int64))
    if classes is not None:
        wanted = [_class_index(dataset, name) for name in several(classes)]
        rows = rows[np.isin(labels[rows], wanted)]
    if limit is not None:
        rows = _spread(rows, labels[rows], limit)
    codes = np.empty((len(rows), *manifest.latent), manifest.quantizer.dtype)
    keys = [""] * len(rows)

    def place(shard: int) -> None:
        here = np.flatnonzero(rows // manifest.shard_rows == shard)
        read = dataset.read_shard(split, shard)
        inside = rows[here] - shard * manifest.shard_rows
        codes[here] = read.codes[inside, 0]
        for at, row in zip(here.tolist(), inside.tolist(), strict=True):
            keys[at] = read.keys[row]

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(place, np.unique(rows // manifest.shard_rows).tolist()):
            pass
    return Picked(split, rows, codes, labels[rows], keys)


def decoded(decoder: Decoder, codes: np.ndarray, quantizer: Quantizer) -> Iterator[tuple[slice, Tensor]]:
    """u8 [n,C,h,w] -> batches of places and what was decoded, on the host: u8 [b,3,H,W], or sounds f32 [b,T]."""
    decode = Fitting(decoder.decode, NOT_ON_DEVICE)
    device = torch.device(getattr(decoder, "device", "cpu"))
    batch_size = max(1, min(_BATCH, _CELLS // math.prod(codes.shape[2:])))
    for start in range(0, len(codes), batch_size):
        places = slice(start, min(start + batch_size, len(codes)))
        latents = dequantize(code_tensor(codes[places]), quantizer)
        with on_device(device):
            pictures = decode(latents).cpu()
        yield places, pictures


def decode_all(decoder: Decoder, codes: np.ndarray, quantizer: Quantizer) -> Tensor:
    """u8 [n,C,h,w] -> u8 [n,3,H,W] on the host, or sounds f32 [n,T]."""
    pictures = [batch for _, batch in decoded(decoder, codes, quantizer)]
    return torch.cat(pictures) if pictures else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


class Originals:
    """The images or sounds that a dataset was made from, found in a source by their keys.

    A sample is looked up in its own split first, then in the others. So the parameters that split and limited the
    source need not be given again. Raises `SourceError` if the source does not have it, or has it in another class.
    """

    def __init__(self, dataset: LatentDataset, source: Source) -> None:
        self.source, self.classes, self.transform = source, dataset.classes, dataset.manifest.transform
        self._places: dict[str, dict[str, int]] = {}
        self._labels = {split: source.labels(split) for split in source.splits}

    def load(self, picked: Picked) -> Tensor:
        """The canonical views of the picked samples, u8 [n,3,S,S] or f32 [n,T]."""
        medium = medium_of(self.transform)
        images = np.empty((len(picked), *medium.shape), medium.dtype)

        def place(at: int) -> None:
            split, row = self._find(picked.split, picked.keys[at], self.classes[picked.labels[at]])
            sample = self.source.read(split, row)
            try:
                images[at] = medium.load(sample.data)[0]
            except BadSample as error:
                raise SourceError(f"{sample.key}: {error}", "it has changed since it was encoded") from error

        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(place, range(len(picked))):
                pass
        return medium.for_codec(torch.from_numpy(images))

    def _find(self, split: str, key: str, name: str) -> tuple[str, int]:
        for other in sorted(self.source.splits, key=lambda other: other != split):
            if other not in self._places:
                self._places[other] = {k: row for row, k in enumerate(self.source.keys(other))}
            row = self._places[other].get(key)
            if row is not None and self.source.classes[self._labels[other][row]] == name:
                return other, row
        raise SourceError(
            f"{self.source.spec} is not the dataset's source: it has no {key} of class {name}",
            "use the source that it was encoded from",
        )


def load_originals(dataset: LatentDataset, source: Source | None, picked: Picked) -> Tensor | None:
    """The picked samples' images, u8 [n,3,S,S], from `source` or, if it is None, from the dataset's own source if that
    needs no download and no archive. None if there is no source."""
    if source is not None:
        return Originals(dataset, source).load(picked)
    spec = dataset.manifest.source["spec"]
    if spec != "shapes" and not Path(spec).is_dir():
        return None
    try:
        return Originals(dataset, open_source(spec)).load(picked)
    except LatentError:  # the folder has changed
        return None


def _class_index(dataset: LatentDataset, name: str) -> int:
    if name not in dataset.classes:
        raise UsageError(f"{dataset.root} has no class '{name}'", nearest(name, list(dataset.classes)))
    return dataset.classes.index(name)


def _spread(rows: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` rows, equally many of each class if possible, evenly spaced: i64 [N], i32 [N] -> i64 [n]."""
    check_whole("limit", limit, 1, hint="leave it out for all samples")
    if limit >= len(rows):
        return rows
    counts = np.bincount(labels)
    # Fill the classes evenly: each gets the same number, unless it has fewer.
    share, left = np.zeros_like(counts), limit
    while left:
        open_ = np.flatnonzero(share < counts)
        add = max(1, left // len(open_))
        for label in open_[:left] if add == 1 else open_:
            more = min(add, counts[label] - share[label])
            share[label] += more
            left -= more
    chosen = []
    for label in np.flatnonzero(share):
        own = rows[labels == label]
        chosen.append(own[(2 * np.arange(share[label]) + 1) * len(own) // (2 * share[label])])
    return np.sort(np.concatenate(chosen))
