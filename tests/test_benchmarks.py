"""What is run on machines that CI has not: that it runs at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_benchmark_for_gpus_runs_small_on_a_cpu():
    pytest.importorskip("diffusers")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if " s: " in line]
    found = {row: json.loads(value) for row, value in (line.split(" ", 1) for line in lines)}
    assert {"codes_dct", "codes_resample", "codes_taesd_float32", "codes_dct_joint", "taesd_64"} <= set(found)
    assert not [row for row, value in found.items() if "failed" in value], found
    assert found["codes_dct"]["4_bits"] == {"share_differing": 0.0, "max": 0}  # the CPU against itself
    assert found["train_imagenette_64"]["samples_per_s"] > 0
