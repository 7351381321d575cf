"""Images that a dataset has more than once, within a split or between splits, by the content hashes of their files."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from latentprep.format.dataset import LatentDataset
from latentprep.format.hashes import HASH_BYTES, known
from latentprep.text import plural


@dataclass(frozen=True)
class Leak:
    """How many rows of `split` hold an image that `other`, an earlier split, holds too."""

    split: str
    other: str
    rows: int


@dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once.

    within: for each split, the rows that repeat the image of another row of it. between: the leaks, where there are
    any. images: all of these images, each as the keys that it has in each split. unknown: valid rows without a hash,
    which were not compared.
    """

    within: dict[str, int]
    between: tuple[Leak, ...]
    images: tuple[dict[str, list[str]], ...]
    unknown: int

    def text(self) -> str:
        """All counts, in words."""
        parts = [f"{split} repeats {plural(rows, 'image')}" for split, rows in self.within.items() if rows]
        parts += [f"{leak.rows} of {leak.split} {_are(leak.rows)} in {leak.other} too" for leak in self.between]
        parts += [f"{plural(self.unknown, 'row')} without a content hash not compared"] if self.unknown else []
        return "; ".join(parts) or "none"

    def lines(self, most: int) -> list[list[str]]:
        """The first images, at most so many: for each, how often it occurs, and its keys by split."""
        return [
            [str(sum(map(len, image.values()))), "; ".join(f"{split}: {', '.join(image[split])}" for split in image)]
            for image in self.images[:most]
        ]


def find_duplicates(dataset: LatentDataset) -> Duplicates | None:
    """The duplicates among a dataset's committed rows. None if it has no content hashes.

    Raises `DatasetError` if a shard is damaged. Codes are not read.
    """
    if dataset.manifest.content_hash is None:
        return None
    records = [record for split in dataset.splits for record in dataset.records(split)]
    read = [dataset.read_hashes(record.split, record.index) for record in records]
    hashes = np.concatenate([np.empty((0, HASH_BYTES), np.uint8), *(some for some in read if some is not None)])
    first = np.cumsum([0, *(record.rows for record in records)])  # of each shard, among the rows of all
    rows = np.flatnonzero(known(hashes))
    invalid = sum(len(record.invalid) for record in records)
    _, image, counts = np.unique(hashes[rows].view(f"S{HASH_BYTES}"), return_inverse=True, return_counts=True)
    twice = counts[image.ravel()] > 1
    named: dict[int, list[str]] = {}  # a shard's keys
    images: dict[int, dict[str, list[str]]] = {}
    for row, number in zip(rows[twice].tolist(), image.ravel()[twice].tolist(), strict=True):
        shard = int(np.searchsorted(first, row, "right")) - 1
        split = records[shard].split
        if shard not in named:
            named = {shard: dataset.read_keys(split, records[shard].index)}  # rows come in order: one at a time
        key = named[shard][row - int(first[shard])]
        images.setdefault(number, {}).setdefault(split, []).append(key)
    leaks = [
        Leak(later, earlier, sum(len(image[later]) for image in images.values() if {earlier, later} <= image.keys()))
        for earlier, later in combinations(dataset.splits, 2)
    ]
    return Duplicates(
        within={split: sum(len(image.get(split, "-")) - 1 for image in images.values()) for split in dataset.splits},
        between=tuple(leak for leak in leaks if leak.rows),
        images=tuple(images.values()),
        unknown=len(hashes) - len(rows) - invalid,
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
