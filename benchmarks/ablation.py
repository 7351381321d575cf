"""What each augmentation is worth on codes: alone, all of the recipe's, and the recipe without it.

    python benchmarks/ablation.py shards --views shards-of-5-views --epochs 10 --out ablation

Judged by a held-out part of train; val is not looked at. Every run resumes. Without arguments it encodes the built-in
`shapes` and ends in minutes. What a row costs: bytes of codes a training image, and the time that augmenting a batch
of 64 takes, as a share of the whole step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import latentprep
import latenttrain
from common import record
from latentprep.cli.console import progress_bar, tune_process
from latentprep.format.stores import code_bytes
from latentprep.progress import silent
from latenttrain.augment import Augment, augment_codes, augment_planes, draw
from latenttrain.checkpoint import load_net, read_config
from latenttrain.data import Split, load_trained, one_hot
from latenttrain.train import start_state, train_epoch

OFF = Augment.none()
ALONE = {
    "none": OFF,
    "shift 3": replace(OFF, shift=3),
    "cut-out 0.4": replace(OFF, cutout=0.4),
    "noise": replace(OFF, noise=True),
    "zoom 0.2": replace(OFF, zoom=0.2),
    "mixup 0.2": replace(OFF, mixup=0.2),
    "cutmix 1": replace(OFF, cutmix=1.0),
    "channel drop 0.1": replace(OFF, channel_drop=0.1),
}
TOGETHER = {
    "recipe: shift + zoom + cut-out": Augment(),
    "recipe without zoom": Augment(zoom=0),
    "recipe + noise": Augment(noise=True),
    "recipe + mixup 0.2": Augment(mixup=0.2),
    "recipe + cutmix 1": Augment(cutmix=1.0),
    "recipe + all": Augment(noise=True, mixup=0.2, cutmix=1.0, channel_drop=0.1),
}
VIEWS = {"views": OFF, "views, shift + cut-out": Augment(zoom=0)}


def cost(run: Path, shards: Path, setting: Augment, rounds: int = 7) -> float:
    """Augmenting a batch as a share of a training step's time."""
    config, device = read_config(run), torch.device("cpu")
    whole = load_trained(latentprep.open(shards), device)[0]
    few = Split(whole.codes[:320], whole.labels[:320])
    state, generator = start_state(config, device), torch.Generator().manual_seed(0)
    steps, augmented = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with silent("", 0, "") as bar:
            train_epoch(state, replace(config, augment=OFF), few, 0, bar)
        steps.append((time.perf_counter() - start) / 5)
        start = time.perf_counter()
        for codes, labels in few.training_batches(64, generator):
            random = draw(state.net, len(labels), setting, device, generator)
            planes = state.net.planes(augment_codes(state.net, codes, setting, random))
            augment_planes(state.net, planes, one_hot(labels, state.net.config.classes), setting, random)
        augmented.append((time.perf_counter() - start) / 5)
    spent = statistics.median(augmented)
    return spent / (spent + statistics.median(steps))


def train_bytes(shards: Path) -> float:
    """Bytes of codes on disk a sample of train, all its views."""
    dataset = latentprep.open(shards)
    records = dataset.records("train")
    return sum(code_bytes(dataset.manifest, record) for record in records) / sum(record.rows for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path, default=None)
    parser.add_argument("--views", type=Path, default=None, help="the same images encoded with --views")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--holdout", type=float, default=0.15)
    parser.add_argument("--rows", default=None, help="some of the rows, with ; between them")
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    parser.add_argument("--name", default="ablation", help="of the record")
    asked = parser.parse_args()
    tune_process()
    shards = asked.shards or asked.out / "shapes"
    if asked.shards is None:
        latentprep.encode("shapes", codec="resample:factor=4", out=shards, progress=progress_bar)
    settings = [(label, setting, shards) for label, setting in (ALONE | TOGETHER).items()]
    if asked.views:
        settings += [(label, setting, asked.views) for label, setting in VIEWS.items()]
    rows = []
    for label, setting, dataset in settings:
        if asked.rows and label not in asked.rows.split(";"):
            continue
        runs = [
            latenttrain.fit(
                dataset, augment=setting, holdout=asked.holdout, epochs=asked.epochs, seed=seed, resume=True,
                out=asked.out / f"{label.replace(' ', '-')}-s{seed}", progress=progress_bar,
            )
            for seed in range(asked.seeds)
        ]  # fmt: skip
        found = [run.last_top1 for run in runs]
        losses = [load_net(run.run, "last")[2]["val_loss"] for run in runs]
        rows.append(
            {
                "augmentation": label,
                "top1": statistics.mean(found),
                "deviation": statistics.stdev(found) if len(found) > 1 else None,
                "loss": statistics.mean(losses),
                "bytes_a_training_image": train_bytes(dataset),
                "share_of_step": cost(Path(runs[0].run), dataset, setting),
            }
        )
    facts = {"dataset": shards.name, "epochs": asked.epochs, "holdout": asked.holdout, "seeds": asked.seeds}
    record(asked.name, facts | {"rows": rows})


if __name__ == "__main__":
    main()
