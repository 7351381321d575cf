"""What is run on machines that CI has not: that it runs at all."""

import json
import os
import subprocess
import sys
import time
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
    codecs = {"codes_dct", "codes_resample", "codes_taesd_float32", "codes_sd-vae_bfloat16", "codes_dct_joint"}
    assert codecs | {"machine", "measured_ceiling", "taesd_64"} <= set(found)
    assert not [row for row, value in found.items() if {"failed", "left_out"} & set(value)], found
    assert found["codes_dct"]["4_bits"] == {"share_differing": 0.0, "max": 0}  # the CPU against itself
    assert found["train_imagenette_32"]["samples_per_s"] > 0


def test_parts_that_hang_fail_or_die_do_not_keep_the_others_from_being_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from common import each_within

    known = {"count": 0}

    def measure(part):
        known["count"] += 1
        if part == "hangs":
            time.sleep(60)
        if part == "fails":
            raise ValueError("no")
        if part == "dies":
            os._exit(3)
        return {"count": known["count"]}

    start = time.monotonic()
    found = dict(each_within(0.5, 60, measure, ["a", "b", "hangs", "c", "fails", "d", "dies", "e", "f"]))
    assert time.monotonic() - start < 30
    assert found == {
        "a": {"count": 1}, "b": {"count": 2},  # in one process
        "hangs": {"failed": "not done after 0 s"}, "c": {"count": 1},
        "fails": {"failed": "ValueError: no"}, "d": {"count": 1},
        "dies": {"failed": "its process ended, exit code 3"}, "e": {"count": 1}, "f": {"count": 2},
    }  # fmt: skip
    assert known["count"] == 0  # none of it here
    late = dict(each_within(60, 0.3, measure, ["hangs", "a"]))
    assert list(late.values()) == [{"failed": "not done after 0 s"}, {"left_out": "0 s are over"}]
