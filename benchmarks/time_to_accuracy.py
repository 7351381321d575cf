"""Wall time from codes on disk to a trained network, everything counted: start, imports, loading, evaluation, writing.

    python benchmarks/time_to_accuracy.py shards --epochs 12 --seeds 3

Each run is the `latenttrain fit` command in a process of its own. The accuracy is that of the last epoch on val, the
epochs are given beforehand: nothing is chosen by it. Without arguments: the built-in `shapes` and the block DCT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import latentprep
from common import record, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path, default=None)
    parser.add_argument("--epochs", type=int, default=None, help="default: the preset's, or 12")
    parser.add_argument("--preset", default=None, help="of fit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="time_to_accuracy", help="of the record")
    asked = parser.parse_args()
    settings = ["--preset", asked.preset] if asked.preset else []
    if asked.epochs or not asked.preset:
        settings += ["--epochs", str(asked.epochs or 12)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        shards = asked.shards or Path(folder, "shapes")
        if asked.shards is None:
            latentprep.encode("shapes", codec="dct", out=shards)
        for seed in range(asked.seeds):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "latenttrain.cli", "fit", shards, *settings, "--seed", str(seed),
                 "--out", Path(folder, f"s{seed}"), "--json"],
                check=True, stdout=subprocess.PIPE,
            )  # fmt: skip
            found = json.loads(done.stdout)
            wanted = ("last_top1", "top1", "parameters", "epochs", "seconds_per_epoch")
            runs.append({"seconds": time.perf_counter() - start, **{name: found[name] for name in wanted}})
    facts = {"dataset": shards.name, "preset": asked.preset, "runs": runs}
    figures = {name: spread([run[name] for run in runs]) for name in ("seconds", "last_top1")}
    record(asked.name, facts | figures)


if __name__ == "__main__":
    main()
