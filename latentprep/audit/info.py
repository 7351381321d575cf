"""`info`: the facts about a latent dataset."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from latentprep.audit.duplicates import Duplicates, find_duplicates
from latentprep.encoding.parts import part_of
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.manifest import INVALID_LABEL, ShardRecord, train_split
from latentprep.format.stores import code_bytes, store_of
from latentprep.sources.media import medium_of

POOR = 0.3  # bits per code: a channel with less adds next to nothing


@dataclass(frozen=True)
class SplitInfo:
    """One split: planned rows, rows committed so far, how many of these are invalid, and valid samples per class."""

    rows: int
    committed: int
    invalid: int
    samples: dict[str, int]


@dataclass(frozen=True)
class PoorChannel:
    """A channel whose codes carry less than `POOR` bits each. entropy: order 0, in bits; cause: why, in words."""

    channel: int
    entropy: float
    cause: str


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset.

    bits: per value, on average; channel_bits: of each channel.
    joint: whether codes were chosen together, see `latentprep.quantizing.joint`. latent: (C, h, w).
    views: of each train sample. size: pixels per side of the images that were encoded.
    part: of the source, such as "3/8", see `encode`; "0/1": all of it.
    code_bytes: size on disk of all committed codes (of whole shards in stores but Zarr); dataset_bytes: with labels
    and keys. bits_per_value: ``8 * code_bytes`` over the number of codes. bytes_per_image: code bytes per sample.
    source_bytes: size of the image files that were read. saturation: for each channel, the share of latents outside
    the quantizer's range, 0 for a channel without bits. poor: channels that carry next to nothing, judged by the first
    committed shard of train. devices: that made the shards, and how many; empty if all are CPUs.
    duplicates: images that occur more than once; None if the dataset has no content hashes. seconds_each: the length of
    a sound, whose samples count 2 bytes as its pixels; None for images.
    """

    path: str
    codec: dict
    bits: float
    joint: bool
    size: int
    views: int
    latent: tuple[int, int, int]
    store: str
    compression: str
    source: str
    part: str
    mirror: bool
    complete: bool
    classes: int
    splits: dict[str, SplitInfo]
    code_bytes: int
    dataset_bytes: int
    source_bytes: int
    bits_per_value: float
    bytes_per_image: float
    smaller_than_source: float
    smaller_than_pixels: float
    saturation: tuple[float, ...]
    poor: tuple[PoorChannel, ...]
    devices: dict[str, int]
    duplicates: Duplicates | None
    seconds_each: float | None = None
    channel_bits: tuple[int, ...] = ()

    @property
    def equal_bits(self) -> bool:
        return len(set(self.channel_bits)) == 1

    def to_json(self) -> dict:
        return asdict(self)


def info(dataset: str | Path | LatentDataset) -> DatasetInfo:
    """Facts about a dataset, from its manifest, records, labels, content hashes and one shard's codes.

    Raises `DatasetError` if there is none or a shard is damaged.

    >>> facts = latentprep.info("shards")
    >>> facts.complete, facts.bits
    (True, 4)
    """
    dataset = open_dataset(dataset)
    manifest = dataset.manifest
    records = {split: dataset.records(split) for split in dataset.splits}
    everything = [record for shards in records.values() for record in shards]
    devices = Counter(record.device or "cpu" for record in everything)
    rows = sum(record.rows for record in everything)
    valid = rows - sum(len(record.invalid) for record in everything)
    values = sum(record.rows * int(np.prod(manifest.row_shape(record.split))) for record in everything)
    codes = sum(code_bytes(manifest, record) for record in everything)
    source_bytes = sum(record.source_bytes for record in everything)
    saturated = (
        np.sum([record.saturated for record in everything], axis=0) if everything else np.zeros(manifest.latent[0])
    )
    saturated = saturated * (np.array(manifest.quantizer.channel_bits) > 0)  # without bits there is no range
    medium = medium_of(manifest.transform)
    pixel_bytes = valid * medium.raw_bytes
    return DatasetInfo(
        path=str(dataset.root),
        codec=manifest.codec,
        bits=manifest.quantizer.mean_bits,
        channel_bits=manifest.quantizer.channel_bits,
        joint=bool(manifest.quantizer.filter),
        size=manifest.transform["size"],
        views=manifest.most_views,
        latent=manifest.latent,
        store=manifest.store,
        compression=store_of(manifest).described(manifest),
        source=manifest.source["spec"],
        part=str(part_of(manifest)),
        mirror=manifest.flip is not None,
        complete=all(len(shards) == manifest.shard_count(split) for split, shards in records.items()),
        classes=len(manifest.classes),
        splits={split: _split_info(dataset, split, shards) for split, shards in records.items()},
        code_bytes=codes,
        dataset_bytes=sum(file.bytes for record in everything for file in record.files.values()),
        source_bytes=source_bytes,
        bits_per_value=8 * codes / max(1, values),
        bytes_per_image=codes / max(1, rows),
        smaller_than_source=source_bytes / max(1, codes),
        smaller_than_pixels=pixel_bytes / max(1, codes),
        saturation=tuple((saturated * manifest.latent[0] / max(1, values)).tolist()),
        poor=_poor_channels(dataset, records),
        devices={} if set(devices) <= {"cpu"} else dict(sorted(devices.items())),
        duplicates=find_duplicates(dataset),
        seconds_each=medium.seconds,
    )


def _poor_channels(dataset: LatentDataset, records: dict[str, list[ShardRecord]]) -> tuple[PoorChannel, ...]:
    """The poor channels in the first committed shard of the training split: view 0 of its valid samples. Channels that
    were given no bits are not among them."""
    split = train_split(records)
    if not records[split]:
        return ()
    shard = dataset.read_shard(split, records[split][0].index, keys=False)
    codes = shard.codes[shard.labels != INVALID_LABEL, 0]
    if not codes.size:
        return ()
    poor = []
    for channel in np.flatnonzero(dataset.quantizer.channel_bits).tolist():
        counts = np.unique(codes[:, channel], return_counts=True)[1]
        used = counts / counts.sum()
        entropy = abs(float(used @ np.log2(used)))
        if entropy < POOR:
            few = f"a few outliers set its range; {used.max():.1%} of its codes are the same"
            poor.append(PoorChannel(channel, entropy, "it is constant" if len(used) == 1 else few))
    return tuple(poor)


def _split_info(dataset: LatentDataset, split: str, records: list[ShardRecord]) -> SplitInfo:
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(dataset.read_labels(split, record.index).tolist())
    return SplitInfo(
        rows=dataset.manifest.splits[split],
        committed=sum(record.rows for record in records),
        invalid=counts.pop(INVALID_LABEL, 0),
        samples={name: counts[label] for label, name in enumerate(dataset.classes)},
    )
