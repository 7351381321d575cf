"""Whether this checkout is as fast as another: encode with dct and TAESD and an epoch of fit, in turn, five times.

git worktree add ../before 93bc4aa
python benchmarks/against.py ../before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import assets, record, spread

ROOT = Path(__file__).parent.parent


def run(tree: Path, module: str, *arguments: object) -> dict:
    """A command of the code in `tree`; what it prints with --json."""
    command = [sys.executable, "-m", module, *map(str, arguments), "--overwrite", "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, cwd=tree, stdout=subprocess.PIPE)
    assert done.returncode == 0
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = assets()
    source = folder / "imagenette2-224.tar" if folder else "shapes"
    trees = {"other": options.other.resolve(), "this": ROOT}
    with tempfile.TemporaryDirectory() as scratch:
        measured: dict[str, list[list[object]]] = {
            "encode dct": [["encode", source, "--codec", "dct", "--limit", 3000, "--size", 224, "--out"], ["seconds"]],
        }
        if folder:
            taesd = ["encode", source, "--codec", "taesd", "--weights", folder / "taesd", "--limit", 160]
            measured["encode taesd"] = [[*taesd, "--size", 224, "--out"], ["seconds"]]
        fit = ["fit", Path(scratch) / "encode dct-this", "--epochs", 2, "--out"]
        measured["epoch of fit"] = [fit, ["seconds_per_epoch"]]
        results = {}
        for name, (arguments, (figure,)) in measured.items():
            module = "latenttrain" if name == "epoch of fit" else "latentprep"
            ratios = []
            for repeat in range(options.repeats):
                order = sorted(trees, reverse=bool(repeat % 2))
                seconds = {
                    tree: float(run(trees[tree], module, *arguments, Path(scratch) / f"{name}-{tree}")[str(figure)])
                    for tree in order
                }
                ratios.append(seconds["other"] / seconds["this"])
                print(name, seconds, file=sys.stderr, flush=True)
            results[f"{name}: rate of this over the other's"] = spread(ratios)
    record("against", {"other": options.other.name, "repeats": options.repeats, **results})


if __name__ == "__main__":
    main()
