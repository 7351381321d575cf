"""How cost grows with the number of samples: 10^4, 10^5 and, with --large, 10^6 and ImageNet's 1,281,167.

    python benchmarks/scale.py --large

Samples are 4 x 32 x 32 codes at 4 bits. Each size is written once and then streamed, `--epochs` times, by a process
of its own, so that its peak memory is the streaming's. Codes are a rounded Gaussian, of about the entropy of an
autoencoder's. The first six of a sample spell its row: from them one more epoch, not timed, counts the samples and
measures how well they were mixed. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import record, spread

if TYPE_CHECKING:
    from latentprep.format import EncodedShard, Manifest

LATENT, BITS, SHARD_ROWS, BATCH = (4, 32, 32), 4, 1024, 256
SIZES = (10_000, 100_000, 1_000_000, 1_281_167)
SPELLED = 16 ** np.arange(6)  # worth of the first six codes of a sample in its row's number


def synthetic(rows: int, store: str = "zarr") -> tuple[Manifest, Callable[[int], Callable[[], EncodedShard]]]:
    """A manifest for so many rows; and a function of a shard's number that draws its codes, and returns one that
    encodes them."""
    from latentprep.format import Codes, Manifest, Quantizer, ShardId
    from latentprep.format.shard import encoded_shard
    from latentprep.format.zarr_store import CANDIDATES, chunk_rows

    manifest = Manifest(
        codec={"name": "synthetic"},
        quantizer=Quantizer(BITS, (-3.0,) * LATENT[0], (0.375,) * LATENT[0]),
        transform={"size": 256, "views": 1, "seed": 0, "resize": "bicubic"},
        source={"spec": "rounded Gaussian", "sha256": "0" * 64},
        classes=tuple(f"class{number:03}" for number in range(1000)),
        latent=LATENT,
        flip=None,
        shard_rows=SHARD_ROWS,
        chunk_rows=chunk_rows(SHARD_ROWS, int(np.prod(LATENT))),
        compression=CANDIDATES[0],
        splits={"train": rows},
        store=store,
    )
    random = np.random.default_rng(0)

    def make(index: int) -> Callable[[], EncodedShard]:
        part = np.arange(manifest.rows_in_shard("train", index)) + index * SHARD_ROWS
        values = random.standard_normal((len(part), 1, *LATENT), np.float32) * 2.7 + 8
        codes = values.clip(0, 2**BITS - 1).astype(np.uint8)
        codes[:, 0, 0, 0, : len(SPELLED)] = part[:, None] // SPELLED % 16
        labels, keys = (part * 1000 // rows).astype(np.int32), [f"train/{row:07}.jpg" for row in part]
        facts = {"source_bytes": 1, "saturated": (0,) * LATENT[0]}
        return lambda: encoded_shard(manifest, ShardId("train", index), Codes(codes, labels, keys), **facts)

    return manifest, make


def write(root: Path, rows: int) -> dict:
    """Make the dataset: seconds in the store, without those that draw the codes, bytes and files."""
    from latentprep.format.commit import commit_shard, create_dataset

    manifest, make = synthetic(rows)
    create_dataset(root, manifest)
    seconds = 0.0
    for index in range(manifest.shard_count("train")):
        encode = make(index)
        start = time.perf_counter()
        commit_shard(root, encode())
        seconds += time.perf_counter() - start
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return {
        "write_s": seconds,
        "write_samples_per_s": rows / seconds,
        "files": len(sizes),
        "bytes_per_sample": sum(sizes) / rows,
    }


def read(root: Path, epochs: int) -> dict:
    """Stream it, as `latenttrain fit --stream` does: seconds, rates, and this process's peak memory in MiB."""
    from latentprep.cli.console import tune_process

    tune_process()

    import torch

    from latentprep.format import open_dataset
    from latenttrain.data import batches_per_epoch
    from latenttrain.streaming import StreamedSplit, shards_mixed

    before = peak_memory()
    start = time.perf_counter()
    split = StreamedSplit(open_dataset(root), "train", torch.device("cpu"))
    opened = time.perf_counter() - start
    first, rates = 0.0, []
    for seed in range(epochs):
        samples, begun = 0, time.perf_counter()
        for _, labels in split.training_batches(BATCH, torch.Generator().manual_seed(seed)):
            first = first or time.perf_counter() - start
            samples += len(labels)
        rates.append(samples / (time.perf_counter() - begun))
    peak = peak_memory()
    rows = [
        codes[:, 0, 0, : len(SPELLED)].numpy() @ SPELLED
        for codes, _ in split.training_batches(BATCH, torch.Generator().manual_seed(epochs))
    ]
    seen = np.concatenate(rows)
    assert len(np.unique(seen)) == len(seen) == batches_per_epoch(len(split), BATCH) * BATCH
    return {
        "open_s": opened,
        "first_batch_s": first,  # from the start of opening
        "stream_samples_per_s": spread(rates),
        "memory_mib": {"imports": before, "peak": peak, "of_it_buffer": split.held * SHARD_ROWS * 4096 / 2**20},
        "mixing": {
            "shards": -(-len(split) // SHARD_ROWS),
            "held": split.held,
            "shards_mixed": shards_mixed(seen, SHARD_ROWS),
            "same_for_a_permutation": shards_mixed(np.random.default_rng(0).permutation(len(split)), SHARD_ROWS),
            "correlation_of_row_and_place": float(np.corrcoef(seen, np.arange(len(seen)))[0, 1]),
        },
    }


def peak_memory() -> float:
    """Most MiB that this process ever held. Not getrusage: that remembers the process it was forked from."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="10^6 samples and more: 3 GB of disk, some minutes")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(read(asked.read, asked.epochs)))
        return
    sizes: dict[str, dict] = {}
    for rows in SIZES if asked.large else SIZES[:2]:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            written = write(Path(folder), rows)
            command = [sys.executable, __file__, "--read", folder, "--epochs", str(asked.epochs)]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            sizes[str(rows)] = written | json.loads(ran.stdout)
            print(rows, json.dumps(sizes[str(rows)]), file=sys.stderr)
    result: dict = {"latent": LATENT, "bits": BITS, "shard_rows": SHARD_ROWS, "batch": BATCH, "samples": sizes}
    if asked.large:
        peaks = [sizes[rows]["memory_mib"]["peak"] for rows in ("1000000", "100000")]
        result["memory_of_a_million_over_a_tenth"] = peaks[0] / peaks[1]
    record("scale", result)


if __name__ == "__main__":
    main()
