"""Codes that another dataset has of the same images, so that only new and changed ones go through the codec."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from latentprep.errors import DatasetError, opt
from latentprep.format.dataset import LatentDataset
from latentprep.format.hashes import known
from latentprep.format.manifest import INVALID_LABEL, Plan, ShardId
from latentprep.format.shard import Codes


class Found(NamedTuple):
    """Where the other dataset has an image's codes."""

    shard: ShardId
    place: int


class Taken(NamedTuple):
    """Codes of some images, u8 [n,V,C,h,w]; their share of the saturated latents, i64 [C]; what made them."""

    codes: np.ndarray
    saturated: np.ndarray
    devices: set[str]


class Reuse:
    """The codes of `dataset` for `plan`, found by the content hashes of the images they were made of.

    Their settings must be the plan's, see `driver.with_quantizer_of`. Then codes of view 0 follow from an image's bytes
    alone. Those of further views are drawn by seed and key as well, so they are found only where both are the same.

    Raises `DatasetError` if `dataset` has no content hashes.
    """

    def __init__(self, dataset: LatentDataset, plan: Plan) -> None:
        there = dataset.manifest
        if there.content_hash is None:
            raise DatasetError(
                f"{dataset.root} has no content hashes to know unchanged images by: an earlier version made it",
                f"use {opt('quantizer', str(dataset.root))}, which encodes all images with its quantizer",
            )
        self.dataset, self._plan = dataset, plan
        self._read = lru_cache(2)(self._read_shard)  # a shard that two new ones need is read once
        self._found: dict[bytes, Found] = {}
        same_views = _drawn(there.transform) == _drawn(plan.transform)
        for split in dataset.splits:
            views = same_views and there.views(split) >= plan.most_views > 1
            for record in dataset.records(split):
                hashes = dataset.read_hashes(split, record.index)
                assert hashes is not None
                keys = dataset.read_keys(split, record.index) if views else [""] * record.rows
                for place in np.flatnonzero(known(hashes)).tolist():
                    found = Found(record.shard, place)
                    for key in {"", keys[place]}:
                        self._found.setdefault(_name(hashes[place].tobytes(), key), found)

    def find(self, split: str, key: str, content: bytes) -> Found | None:
        """Where the codes are of a sample of this split, key and content hash; None if there are none."""
        return self._found.get(_name(content, key if self._plan.views(split) > 1 else ""))

    def take(self, split: str, found: Sequence[Found]) -> Taken:
        """The codes of samples of a split. Raises `DatasetError` if their shards are damaged."""
        row = self._plan.row_shape(split)
        codes = np.empty((len(found), *row), self.dataset.quantizer.dtype)
        saturated, devices = np.zeros(row[1], np.int64), set()
        for shard in sorted({one.shard for one in found}):
            here = [i for i, one in enumerate(found) if one.shard == shard]
            there, record = self._read(shard), self.dataset.committed(shard.split, shard.index)
            codes[here] = there.codes[[found[i].place for i in here], : row[0]]
            shares = there.codes.shape[1] * max(1, int((there.labels != INVALID_LABEL).sum()))
            saturated += np.array(record.saturated) * (len(here) * row[0]) // shares
            devices.add(record.device)
        return Taken(codes, saturated, devices)

    def _read_shard(self, shard: ShardId) -> Codes:
        return self.dataset.read_shard(shard.split, shard.index, keys=False)


def _name(content: bytes, key: str) -> bytes:
    return content + key.encode(errors="surrogateescape")


def _drawn(transform: dict) -> dict:
    """The settings that further views are drawn by."""
    return {
        name: value for name, value in transform.items() if name in ("seed", "shift", "gain") or name.startswith("crop")
    }
