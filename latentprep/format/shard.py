"""A shard in memory, before and after it is encoded to files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from latentprep.format.hashes import HASH_BYTES
from latentprep.format.manifest import FileRecord, Manifest, ShardId, ShardRecord
from latentprep.format.stores import store_of


@dataclass(frozen=True)
class Codes:
    """Samples in memory.

    codes: u8 or u16 [n,V,C,h,w], as `Quantizer.dtype` says; labels: i32 [n], each an index into ``classes``, or −1 for
    an invalid row; keys: n paths in the source, or none if they were not requested; hashes: u8 [n,16], see
    `latentprep.format.hashes`, or None if they were not requested or there are none.
    """

    codes: np.ndarray
    labels: np.ndarray
    keys: list[str]
    hashes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class EncodedShard:
    """A shard that is not committed yet: path -> bytes of its files, and the record that names them.

    Any process may make one; it can be pickled. Only `latentprep.format.commit.commit_shard` writes it.
    reused: how many rows were taken over from another dataset, see `latentprep.encoding.reuse`.
    """

    files: dict[str, bytes]
    record: ShardRecord
    reused: int = 0


def joined_devices(devices: Iterable[str]) -> str:
    """What `ShardRecord.device` says of a shard whose rows were made on these, "" for a CPU."""
    names = {device or "cpu" for device in devices}
    return "" if names == {"cpu"} else ", ".join(sorted(names))


def encoded_shard(
    manifest: Manifest,
    shard: ShardId,
    rows: Codes,
    *,
    source_bytes: int,
    saturated: Sequence[int],
    invalid: Sequence[dict] = (),
    device: str = "",
    reused: int = 0,
) -> EncodedShard:
    """Encode these rows as a shard. The same arguments give the same bytes. device: see `ShardRecord`. Rows without
    hashes get unknown ones, if the manifest has a content hash."""
    hashes = None
    if manifest.content_hash is not None:
        hashes = np.zeros((len(rows), HASH_BYTES), np.uint8) if rows.hashes is None else rows.hashes
    codes = rows.codes.astype(manifest.quantizer.dtype, copy=False)
    files = store_of(manifest).encode_shard_files(
        manifest, shard.split, shard.index, codes, rows.labels, rows.keys, hashes
    )
    record = ShardRecord(
        split=shard.split,
        index=shard.index,
        rows=len(rows),
        files={path: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()},
        source_bytes=source_bytes,
        saturated=tuple(saturated),
        manifest=manifest.sha256,
        invalid=tuple(invalid),
        device=device,
    )
    return EncodedShard(files, record, reused)
