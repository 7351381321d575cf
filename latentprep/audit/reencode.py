"""Encode some of a dataset's images again, with its own codec, and compare the codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from latentprep.errors import SourceError, opt
from latentprep.format.dataset import LatentDataset
from latentprep.format.manifest import INVALID_LABEL, ShardId
from latentprep.progress import ProgressFactory

if TYPE_CHECKING:
    from latentprep.encoding.pipeline import Stages
    from latentprep.sources.source import Source

SAMPLES = 64  # images that are encoded again by default
TOLERANCE = 0.02  # how far an image's stored codes may lie from its new ones, see `Comparison.farthest`
JOINT_TOLERANCE = 0.08  # the same where codes were chosen jointly


@dataclass(frozen=True)
class Comparison:
    """Images that were encoded again: how many codes differ, and which image differs most.

    differing: share of all compared codes. farthest: the mean distance of that image's codes, as a share of the range.
    unreadable: drawn images that cannot be read now, with the reason.

    Measured with TAESD on 24 photographs, two AMD EPYC cores. Batches of 32 and of 1 gave the same codes. float32 in
    place of bfloat16, a larger change than between devices, changed 2.0% of the codes at 4 bits and moved an image by
    at most 0.17% of the range; at 8 bits, 17.7% and 0.10%. Two different photographs are 9% to 32% apart. So codes
    farther off than `TOLERANCE`, 2%, are of another image or another codec. Where codes are chosen jointly, one changed
    code changes others: latents that differed by 1% of their deviation, as with float32, changed 5.7% of the codes at
    1 bit, and moved an image by at most 4.3% of the range; hence `JOINT_TOLERANCE`.
    """

    images: int
    differing: float
    farthest: float
    farthest_key: str
    unreadable: tuple[str, ...] = ()


def own_rows(dataset: LatentDataset, source: Source) -> Source:
    """The rows of `source` that the dataset has: all, or its part. Raises `SourceError` if it is not its source."""
    from latentprep.encoding.parts import rows_of_plan

    if source.fingerprint() != dataset.manifest.source["sha256"]:
        raise SourceError(
            f"{source.spec} is not the source that {dataset.root} was made from: its files or labels differ",
            f"use the source, {opt('limit')}, {opt('val_fraction')} and {opt('seed')} that it was encoded with",
        )
    return rows_of_plan(source, dataset.manifest)


def own_stages(
    dataset: LatentDataset,
    source: Source,
    weights: str | None,
    device: str,
    batch_size: int | None,
    workers: int | None,
) -> Stages:
    """Stages that encode with the dataset's own codec, and the rows of `source` that it has, see `own_rows`.

    Raises `SourceError` if it is not the dataset's source, `CodecError` if the codec or the same weights are missing.
    """
    from latentprep.codecs import codec_from_config
    from latentprep.device import pick_device
    from latentprep.encoding.pipeline import Stages
    from latentprep.sources.images import MAX_PIXELS

    rows = own_rows(dataset, source)
    codec = codec_from_config(dataset.manifest.codec, device=pick_device(device), weights=weights)
    return Stages(rows, codec, batch_size, workers, MAX_PIXELS)


def compare(
    dataset: LatentDataset,
    stages: Stages,
    shards: Iterable[ShardId],
    samples: int,
    seed: int,
    progress: ProgressFactory,
) -> tuple[Comparison, dict[ShardId, str]]:
    """Encode `samples` valid rows of the shards again, drawn by `seed`. Also returns the shards that are too far off,
    with the reason."""
    from latentprep.encoding.pipeline import code_rows

    manifest = dataset.manifest
    levels = np.array(manifest.quantizer.channel_levels)[:, None, None]
    tolerance = JOINT_TOLERANCE if manifest.quantizer.filter else TOLERANCE
    drawn = _draw(dataset, shards, samples, seed)
    images = values = differing = 0
    farthest, farthest_key, unreadable = 0.0, "", []
    wrong: dict[ShardId, str] = {}
    with progress("comparing", sum(map(len, drawn.values())), "images", 0) as bar:
        for at, rows in drawn.items():
            shard, start = dataset.read_shard(at.split, at.index), at.index * manifest.shard_rows
            for some, encoded, invalid in code_rows(stages, manifest, at.split, rows):
                bar.advance(len(some))
                for row, codes in zip(some, encoded, strict=True):
                    key = shard.keys[row - start]
                    if row in invalid:
                        unreadable.append(f"{key}: {invalid[row]}")
                        continue
                    apart = np.abs(codes.astype(np.int32) - shard.codes[row - start])
                    distance = float((apart / levels).mean())
                    images, values = images + 1, values + apart.size
                    differing += int(np.count_nonzero(apart))
                    if distance >= farthest:
                        farthest, farthest_key = distance, key
                    if distance > tolerance:
                        what = f"{key} (row {row}) encodes to other codes now, {distance:.1%} of the range apart"
                        wrong.setdefault(at, what)
    return Comparison(images, differing / max(1, values), farthest, farthest_key, tuple(unreadable)), wrong


def _draw(dataset: LatentDataset, shards: Iterable[ShardId], samples: int, seed: int) -> dict[ShardId, list[int]]:
    """`samples` valid rows, by shard, in order."""
    rows = [
        (shard, shard.index * dataset.manifest.shard_rows + int(place))
        for shard in shards
        for place in np.flatnonzero(dataset.read_labels(shard.split, shard.index) != INVALID_LABEL)
    ]
    order = np.random.default_rng(seed).permutation(len(rows))[:samples].tolist()
    drawn: dict[ShardId, list[int]] = {}
    for shard, row in (rows[i] for i in sorted(order)):
        drawn.setdefault(shard, []).append(row)
    return drawn
