"""Training alone and beside busy processes, in this checkout and in another, in turn.

    git worktree add ../before b1f8c42
    python benchmarks/busy.py ../before

An epoch of the default run on 3,000 samples of Imagenette through the block DCT (of the built-in shapes where it is
absent), the second of two, in bfloat16 where the processor multiplies it, and in float32. Then the bits of one thread
and of two.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import latentprep
from common import assets, record, spread

ROOT = Path(__file__).parent.parent
FLOAT32 = "import latenttrain.evaluation as e, latenttrain.train as t; e.in_bfloat16 = t.in_bfloat16 = lambda *_: 0; "


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def fit(tree: Path, shards: Path, out: Path, float32: bool, threads: int | None = None) -> dict:
    """Two epochs with the code in `tree`: what `fit --json` prints."""
    code = "from latenttrain.cli import main; main()"
    arguments = ["fit", shards, "--epochs", 2, "--out", out, "--overwrite", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", FLOAT32 * float32 + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert done.returncode == 0
    return json.loads(done.stdout)


def second_epoch(run: dict) -> float:
    return json.loads((Path(run["run"]) / "metrics.jsonl").read_text().splitlines()[1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", default=ROOT, help="a checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=3000)
    options = parser.parse_args()
    folder = assets()
    source = latentprep.open_source("imagenette", data=folder / "imagenette2-224.tar") if folder else "shapes"
    with tempfile.TemporaryDirectory() as scratch:
        shards, runs = Path(scratch) / "shards", Path(scratch) / "runs"
        made = latentprep.encode(source, codec="dct", limit=options.limit, out=shards)
        results: dict[str, dict] = {}
        for float32 in (False, True):
            for processes in (0, 1, 2):
                seconds: dict[str, list[float]] = {"this": [], "other": []}
                for repeat in range(options.repeats):
                    trees = [("this", ROOT), ("other", options.other.resolve())]
                    for name, tree in trees[:: 1 if repeat % 2 else -1]:
                        with busy(processes):
                            seconds[name].append(second_epoch(fit(tree, shards, runs / name, float32)))
                name = f"{'float32' if float32 else 'default precision'}, beside {processes} busy processes"
                rates = {tree: spread([made.rows["train"] / s for s in found]) for tree, found in seconds.items()}
                faster = spread([o / t for o, t in zip(seconds["other"], seconds["this"], strict=True)])
                results[name] = {"samples_per_s": rates, "rate_of_this_over_other": faster}
                print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
        bits = []
        for threads in (1, 2):
            fit(ROOT, shards, runs / str(threads), False, threads)
            bits.append(hashlib.sha256((runs / str(threads) / "best.safetensors").read_bytes()).hexdigest())
    record(
        "busy",
        {"other": options.other.name, "samples": made.rows["train"], "latent": made.latent, **results}
        | {"one_thread_and_two_give_the_same_bits": bits[0] == bits[1]},
    )


if __name__ == "__main__":
    main()
