"""What the stem's scaling by counted statistics is worth, against the rule for normal distributions.

    python benchmarks/stem_statistics.py shards-dct shards-taesd --epochs 15 --seeds 3 --out stem_statistics

Each dataset is learned from twice, with the same codes: as it is, and as a copy whose manifest has no statistics, which
is read with the earlier rule. Judged by a held-out part of train; val is not looked at, and need not be there. Run
again, it skips the runs that are finished.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import latentprep
import latenttrain.config
from common import record
from latentprep.cli.console import progress_bar, tune_process
from latentprep.derived.derive import derive, every_row
from latentprep.format import LatentDataset
from latenttrain.checkpoint import METRICS, read_config

HOLDOUT = 0.15


def without_statistics(dataset: LatentDataset, out: Path) -> LatentDataset:
    """A copy of the dataset as it was made before codes were counted."""
    manifest = replace(dataset.manifest, statistics=None)
    derive(out, manifest, [dataset], every_row([dataset]), title="copying", overwrite=False, progress=progress_bar)
    return latentprep.open(out)


def last_top1(run: Path, dataset: LatentDataset, epochs: int, seed: int) -> float:
    """Held-out top-1 after the last epoch."""
    return latenttrain.fit(
        dataset, epochs=epochs, seed=seed, holdout=HOLDOUT, out=run, resume=True, progress=progress_bar
    ).last_top1


def finished(run: Path, epochs: int) -> bool:
    metrics = run / METRICS
    return metrics.is_file() and len(metrics.read_text().splitlines()) == epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("stem_statistics"))
    parser.add_argument("--finished", action="store_true", help="start no run; record those that are finished")
    options = parser.parse_args()
    tune_process()
    rows = []
    for path in options.datasets:
        counted = latentprep.open(path)
        rules = {"counted": counted, "normal": without_statistics(counted, options.out / f"{path.name}-normal")}
        runs = {
            (rule, seed): options.out / f"{path.name}-{rule}-s{seed}" for seed in range(options.seeds) for rule in rules
        }
        if options.finished:
            runs = {key: run for key, run in runs.items() if finished(run, options.epochs)}
        accuracy: dict[str, list[float]] = {rule: [] for rule in rules}
        for (rule, seed), run in runs.items():
            accuracy[rule].append(last_top1(run, rules[rule], options.epochs, seed))
        for rule, found in accuracy.items():
            if not found:
                continue
            config = read_config(next(run for (of, _), run in runs.items() if of == rule))
            rows.append(
                {
                    "codec": counted.manifest.codec["name"],
                    "bits": counted.quantizer.bits,
                    "latent": list(counted.manifest.latent),
                    "classes": len(counted.classes),
                    "samples": counted.manifest.splits["train"],
                    "scaled_by": rule,
                    "std": list(config.net.std),
                    "top1": found,
                    "mean": statistics.mean(found),
                    "deviation": statistics.stdev(found) if len(found) > 1 else None,
                    "n": len(found),
                }
            )
    record(
        "stem_statistics",
        {"epochs": options.epochs, "holdout": HOLDOUT, "versions": latenttrain.config.versions(), "rows": rows},
    )


if __name__ == "__main__":
    main()
