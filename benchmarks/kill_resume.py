"""SIGKILL `latentprep encode` at random moments, run it again each time, compare with an unbroken run, byte by byte."""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import assets, record


def digest(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default="dct", help="dct, or an autoencoder whose weights LATENTPREP_ASSETS has")
    parser.add_argument("--limit", type=int, default=1500, help="samples a split")
    options = parser.parse_args()
    folder = assets()
    source = ["imagenette", "--data", str(folder / "imagenette2-224.tar")] if folder else ["shapes"]
    command = [sys.executable, "-m", "latentprep.cli", "encode", *source, "--codec", options.codec]
    command += ["--limit", str(options.limit), "--shard-rows", "64" if options.codec == "dct" else "8"]
    if folder and (folder / options.codec).is_dir():
        command += ["--weights", str(folder / options.codec)]
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, parts = Path(scratch) / "whole", Path(scratch) / "parts"
        start = time.monotonic()
        subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
        seconds = time.monotonic() - start
        killed, finished, left = 0, 0, []
        while killed < options.kills:
            process = subprocess.Popen(
                [*command, "--out", str(parts)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                left.append(len(list((parts / "records").glob("*.json"))) if parts.exists() else 0)
                continue
            assert process.returncode == 0, f"exit code {process.returncode} on resume"
            assert digest(parts) == digest(whole), "a resumed run differs"
            finished += 1
            subprocess.run(["rm", "-rf", str(parts)], check=True)
        subprocess.run([*command, "--out", str(parts)], check=True, capture_output=True)
        same = digest(parts) == digest(whole)
        record(
            f"kill_resume_{options.codec}",
            {
                "kills": killed,
                "seconds_unbroken": seconds,
                "runs_finished_between_kills": finished,
                "shards_committed_at_each_kill": left,
                "files": len(digest(whole)),
                "byte_identical": same,
            },
        )
        assert same


if __name__ == "__main__":
    main()
