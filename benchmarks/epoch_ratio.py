"""An epoch on codes against an epoch of the conventional pipeline: MobileNetV2 on 224 px JPEGs, decoded by workers.

    python benchmarks/epoch_ratio.py imagenette --shards shards

Nothing is trained to an end: each network's first steps are clocked in turn, round by round, so that the machine's mood
is the same for all. `talk_table.py` has what the networks learn. Without arguments: the built-in `shapes`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import latentprep
from common import record, spread
from latentprep.cli.console import tune_process
from latentprep.device import pick_device
from latentprep.sources.source import open_source
from latenttrain.config import RunConfig, plan_net, plan_run
from latenttrain.data import Split, load_trained
from latenttrain.nets import build_net, count_flops, count_parameters
from latenttrain.recipe import make_recipe
from talk_table import ROWS, Images, JpegSplit, clocked, pixels_config

NARROW = 0.6  # of the default width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--shards", type=Path, default=None, help="a latent dataset of it (default: dct, 4 bits)")
    parser.add_argument("--images", type=int, default=256, help="clocked a round on JPEGs; 16 times as many on codes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    tune_process()
    device, source = pick_device(asked.device), open_source(asked.source)
    with tempfile.TemporaryDirectory() as folder:
        if asked.shards is None:
            latentprep.encode(asked.source, codec="dct", out=folder)
        dataset = latentprep.open(asked.shards or folder)
        codes = load_trained(dataset, device)[0]
    images = JpegSplit(Images(source.take(asked.images), "train", ROWS[0].grid), asked.workers, device)
    some = Split(codes.codes[: 16 * asked.images], codes.labels[: 16 * asked.images])
    work: list[tuple[RunConfig, Split | JpegSplit]] = [(pixels_config(ROWS[0], source, epochs=1), images)]
    for width in (1.0, NARROW):
        work.append((plan_run(dataset, make_recipe(epochs=1), plan_net(dataset, width=width)), some))
    names = ("MobileNetV2 on JPEGs", "default", f"--width {NARROW:g}")
    clocks = clocked(work, device, asked.rounds)
    record(
        "epoch_ratio",
        {
            "device": str(device),
            "precision": "as fit chooses: MobileNetV2 in float32, ours in bfloat16 where the CPU multiplies it",
            "rows": [
                {
                    "network": name,
                    "parameters": count_parameters(build_net(config.net)),
                    "flops_a_sample": count_flops(build_net(config.net)),
                    "samples_per_s": spread([1 / s for s in seconds]),
                    "seconds_an_epoch": spread([s * source.size("train") for s in seconds]),
                    "times_as_fast": spread([a / b for a, b in zip(clocks[0], seconds, strict=True)]),
                }
                for name, (config, _), seconds in zip(names, work, clocks, strict=True)
            ],
        },
    )


if __name__ == "__main__":
    main()
