"""Training with 1, 2 and 4 ranks: the same losses and bits, how long an epoch takes, and what is left of a killed run.

    python benchmarks/ranks.py --kills 20

Three epochs on 3,000 samples of Imagenette through the block DCT (of the built-in shapes where it is absent), in
micro-batches of 16. Then runs in which a process is killed at a random moment, one of the ranks or the one that started
them, and which another number of ranks resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import latentprep
import latenttrain
from common import assets, record
from latentprep.device import has_fast_bfloat16, pick_device
from latentprep.errors import LatentError

NO_BFLOAT16 = "import torch; torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False\n"
PROGRAM = "import json, sys, latenttrain; latenttrain.fit(**json.loads(sys.argv[1]))"


def settings(shards: Path, out: Path, ranks: int, epochs: int) -> dict:
    where = {"device": "cpu"} if ranks == 1 else {"devices": f"cpu:{ranks}"}
    return {"dataset": str(shards), "out": str(out), "epochs": epochs, "recipe": {"norm_batch": 16}, **where}


def epochs_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ranks_of(parent: int) -> list[int]:
    """Process numbers of the ranks that a process started."""
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return [int(number) for task in tasks for number in (task / "children").read_text().split()]


def killed(asked: dict, seconds: float) -> str:
    """Run `fit` in a process and kill it or one of its ranks so long after its first epoch: which one."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(asked)], stderr=subprocess.DEVNULL)
    while not (Path(asked["out"]) / "last.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    victim = random.choice([process.pid, *ranks_of(process.pid)]) if process.poll() is None else 0
    if victim:
        os.kill(victim, signal.SIGKILL)
    process.wait()  # with a rank killed, the run goes on to its end by itself
    return "none: it had ended" if not victim else "the caller" if victim == process.pid else "a rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="also where the processor multiplies bfloat16")
    options = parser.parse_args()
    random.seed(options.seed)
    folder = assets()
    source = latentprep.open_source("imagenette", data=folder / "imagenette2-224.tar") if folder else "shapes"
    with tempfile.TemporaryDirectory() as scratch:
        shards, runs = Path(scratch) / "shards", Path(scratch) / "runs"
        if options.float32:
            exec(NO_BFLOAT16)
            (Path(scratch) / "sitecustomize.py").write_text(NO_BFLOAT16)
            os.environ["PYTHONPATH"] = os.pathsep.join([scratch, os.environ.get("PYTHONPATH", "")])
        made = latentprep.encode(source, codec="dct", limit=options.limit, out=shards)
        found = {}
        for ranks in (1, 2, 4):
            latenttrain.fit(**settings(shards, runs / str(ranks), ranks, 3))
            epochs = epochs_of(runs / str(ranks))
            found[f"{ranks} ranks"] = {
                name: [epoch[name] for epoch in epochs] for name in ("loss", "val_loss", "seconds")
            }
        alone = found["1 ranks"]
        furthest = max(
            abs(mine / theirs - 1)
            for other in found.values()
            for name in ("loss", "val_loss")
            for mine, theirs in zip(other[name], alone[name], strict=True)
        )
        bits = {(runs / str(ranks) / "best.safetensors").read_bytes() for ranks in (1, 2, 4)}
        kills: dict[str, int] = {}
        for number in range(options.kills):
            first, second = random.sample((2, 3, 4), 2)
            out = runs / f"killed-{number}"
            who = killed(settings(shards, out, first, 3), random.uniform(0, 2 * max(alone["seconds"])))
            latenttrain.fit(**settings(shards, out, second, 3), resume=True)
            if (out / "best.safetensors").read_bytes() not in bits:
                raise LatentError(f"other bits after {who} was killed in run {number} of {first}, then {second} ranks")
            kills[who] = kills.get(who, 0) + 1
    record(
        "ranks_float32" if options.float32 else "ranks",
        {
            "samples": made.rows["train"], "latent": made.latent,
            "precision": "bfloat16" if has_fast_bfloat16(pick_device("cpu")) else "float32",
            **found, "largest_relative_difference_of_losses": furthest, "same_bits": len(bits) == 1,
            "killed_and_resumed_to_the_same_bits": kills,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
