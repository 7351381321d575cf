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


def test_the_simulation_keeps_to_its_limits(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from dataclasses import replace

    from simulate_scale import WORLD, simulate

    calm = replace(WORLD, sigma=0, slow=0, failures=0)
    for shards, workers in [(1000, 1), (1000, 8), (999, 10), (7, 100)]:
        run = simulate(shards, workers, calm)
        assert run.ideal == pytest.approx(shards * 2 / workers)
        in_turns = -(-shards // workers) * 2  # whole shards: none is cut
        assert in_turns <= run.seconds <= in_turns + workers * calm.commit + 1e-6
        assert run.lost == 0
    alone = simulate(500, 1, replace(WORLD, failures=0))
    assert alone.seconds == pytest.approx(alone.ideal + WORLD.commit)  # the sum of all shards, and the last commit
    few = [simulate(10, workers, calm).efficiency for workers in (10, 20, 100)]
    assert few == pytest.approx([few[0], few[0] / 2, few[0] / 10])
    slow_driver = simulate(1000, 100, replace(calm, commit=0.2))
    assert slow_driver.seconds == pytest.approx(2 + 1000 * 0.2)  # it never waits for a worker but for the first
    parts = simulate(1000, 100, replace(calm, parts=1))
    assert parts.seconds == pytest.approx(60 + 10 * 2 + calm.commit)
    often = [simulate(2000, 10, replace(WORLD, failures=rate)) for rate in (0, 5, 50)]
    assert often[0].lost == 0 < often[1].lost < often[2].lost
    assert often[0].efficiency > often[1].efficiency > often[2].efficiency
    assert simulate(300, 30, WORLD, seed=1) == simulate(300, 30, WORLD, seed=1) != simulate(300, 30, WORLD, seed=2)


def test_the_page_about_scale_has_the_simulations_figures():
    recorded = json.loads((ROOT / "benchmarks" / "records" / "simulate_scale.json").read_text())
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.split("| of the ideal |")[1].split("\n\n")[0].splitlines()[2:]
    points = [*recorded["sizes"].values(), *list(recorded["ways"].values())[1:]]
    assert len(table) == len(points) == 8
    for row, values in zip(table, points, strict=True):
        found = [values[workers]["efficiency"]["median"] for workers in ("10", "30", "100", "300", "1000")]
        assert row.split(" | ")[1:] == [*(f"{100 * one:.0f}%" for one in found[:-1]), f"{100 * found[-1]:.0f}% |"], row
    with_failures, without = recorded["sizes"]["10⁸ images"], recorded["without_failures"]
    for workers, value in without.items():
        assert abs(value["efficiency"]["median"] - with_failures[workers]["efficiency"]["median"]) < 0.003


def test_what_a_driver_carries_is_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from driver_cost import shard_cost, source_cost

    found = source_cost(tmp_path, 2000)
    for layout in ("folder", "tar"):
        assert 100 < found[layout]["index"]["kept_bytes"] < 500
        assert found[layout]["stat"]["peak_bytes"] < 600  # a task of a thread pool for each file would take 1,500
    monkeypatch.setattr("scale.SHARD_ROWS", 16)
    monkeypatch.setattr("driver_cost.SHARD_ROWS", 16)
    shards = shard_cost(tmp_path / "shards", 3, "wds")
    assert shards["commit_ms"]["n"] == 3
    assert shards["resume"]["kept_bytes"] > 500
