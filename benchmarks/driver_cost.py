"""What the one driver of an encode pays for each sample and each shard: memory, and time on the local disk.

    python benchmarks/driver_cost.py

The memory is that of Python's own objects, counted by tracemalloc. Times are of files in the page cache; to commit
includes flushing to the disk. Samples are 4 x 32 x 32 codes at 4 bits, as in scale.py.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import record, spread
from scale import SHARD_ROWS, synthetic


def cost(make: Callable[[], Any], count: int) -> tuple[Any, dict]:
    """What `make` returns; and for each of `count` things the microseconds that it takes, and the bytes that it keeps
    and that it needs at most. It is called twice, once for either."""
    start = time.perf_counter()
    make()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    made = make()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return made, {
        "us": seconds / count * 1e6,
        "kept_bytes": (kept - before) / count,
        "peak_bytes": (peak - before) / count,
    }


def source_cost(root: Path, files: int) -> dict:
    """An index of `files` images in 100 class folders, and of the same in a tar: cost of a sample."""
    for number in range(files):
        path = root / "images" / "train" / f"n{number % 100:08}" / f"n{number % 100:08}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff\xe0")
    with tarfile.open(root / "images.tar", "w") as archive:
        archive.add(root / "images", "images")
    return {name: index_cost(str(root / path), files) for name, path in (("folder", "images"), ("tar", "images.tar"))}


def index_cost(spec: str, files: int) -> dict:
    from latentprep.encoding.source_files import source_stats
    from latentprep.sources.source import open_source

    source, index = cost(lambda: open_source(spec), files)
    _, fingerprint = cost(source.fingerprint, files)
    _, stats = cost(lambda: source_stats(source, ["train"]), files)
    return {"index": index, "fingerprint": fingerprint, "stat": stats}


def shard_cost(root: Path, shards: int, store: str) -> dict:
    """Commit so many shards, look for their records, as resuming does, and read their keys: ms and bytes of each."""
    from latentprep.format import LatentDataset
    from latentprep.format.commit import commit_shard, create_dataset

    manifest, make = synthetic(shards * SHARD_ROWS, store)
    create_dataset(root, manifest)
    encoding, committing, sizes = [], [], []
    for index in range(shards):
        rows = make(index)
        start = time.perf_counter()
        shard = rows()
        encoding.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        commit_shard(root, shard)
        committing.append((time.perf_counter() - start) * 1e3)
        sizes.append(sum(map(len, shard.files.values())))
    _, resume = cost(lambda: LatentDataset(root).whole_records(), shards)
    dataset = LatentDataset(root)
    _, keys = cost(lambda: [dataset.read_keys("train", index) for index in range(shards)], shards * SHARD_ROWS)
    return {
        "bytes": float(np.mean(sizes)),
        "encode_ms": spread(encoding),
        "commit_ms": spread(committing),
        "resume": resume,
        "record_bytes_on_disk": float(np.mean([path.stat().st_size for path in (root / "records").iterdir()])),
        "keys": keys,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--shards", type=int, default=100)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = source_cost(root, asked.files)
        stores = {store: shard_cost(root / store, asked.shards, store) for store in ("zarr", "wds", "parquet")}
    record("driver_cost", {"files": asked.files, "shards": asked.shards, "source": sources, "store": stores})


if __name__ == "__main__":
    main()
