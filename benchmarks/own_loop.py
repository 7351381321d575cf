"""`latenttrain.batches` in a loop of one's own, against the batches of `fit`, and a `DataLoader` on the same codes.

An epoch of each is clocked in turn, round by round, so that the machine's mood is the same for all. Codes are drawn:
4 x 32 x 32 of 4 bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import latentprep
import latenttrain
from common import record, spread
from latentprep.cli.console import tune_process
from latentprep.device import pick_device
from latentprep.torch import LatentSamples, LatentStream
from latenttrain.data import Samples, epoch_generator
from latenttrain.runtime import synchronize
from latenttrain.streaming import shown_samples
from scale import write

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="*", default=[0])
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    tune_process()
    torch.set_num_threads(1)  # as in `fit`
    device = pick_device(asked.device)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), asked.samples)
        dataset = latentprep.open(folder)
        ways: dict[str, Callable[[int], Iterable]] = {}
        for name, held in (("in memory", None), ("streamed", 8)):
            samples = shown_samples(dataset, "train", device, held)
            own = latenttrain.batches(dataset, batch_size=BATCH, device=device, stream=held is not None, buffer=held)
            ways[f"fit, {name}"] = lambda epoch, samples=samples: of_fit(samples, epoch)
            ways[f"batches, {name}"] = lambda epoch, own=own: own
        for workers in asked.workers:
            for kind in (LatentSamples, LatentStream):
                shuffle = True if kind is LatentSamples else None
                loader: DataLoader = DataLoader(kind(dataset), BATCH, shuffle, num_workers=workers)
                ways[f"DataLoader, {kind.__name__}, {workers} workers"] = lambda epoch, loader=loader: loader
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(asked.rounds + 1):
            for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
                synchronize(device)
                start, seen = time.perf_counter(), 0
                for _, labels in way(turn):
                    seen += len(labels)
                synchronize(device)
                assert seen == asked.samples
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    record(
        "own_loop",
        {
            "device": str(device),
            "samples": asked.samples,
            "batch": BATCH,
            "samples_per_s": {name: spread([asked.samples / s for s in own]) for name, own in seconds.items()},
            "rate_of_batches_over_fit": {
                name: spread([a / b for a, b in zip(seconds[f"fit, {name}"], seconds[f"batches, {name}"], strict=True)])
                for name in ("in memory", "streamed")
            },
        },
    )


def of_fit(samples: Samples, epoch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """What `train_epoch` goes through, and the codes that its loss makes of it."""
    for rows, labels in samples.training_rows(BATCH, epoch_generator(0, epoch, samples.device), epoch):
        yield samples.codes_of(rows), labels


if __name__ == "__main__":
    main()
