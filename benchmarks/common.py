"""What every benchmark needs: where it ran, medians with their spread, and a record of both."""

from __future__ import annotations

import argparse
import fnmatch
import glob
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that a shell pattern matches; ends the program if there are none."""
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        sys.exit("\n".join(["no row is named " + " or ".join(patterns) + "; there are", *names]))
    return found


def fill(table: type, rows: Sequence[Any], asked: argparse.Namespace) -> None:
    """Make the rows that `asked.rows` names, for each of `asked.seeds`, and show them: ``table(asked)`` has `add` and
    `show`. With `asked.list`, print the rows' names."""
    from latentprep.tuning import tune_process

    names = chosen([row.name for row in rows], asked.rows)
    if asked.list:
        print("\n".join(names))
        return
    tune_process()
    asked.out.mkdir(parents=True, exist_ok=True)
    made = table(asked)
    for seed in map(int, asked.seeds.split(",")):
        for row in rows:
            if row.name in names:
                made.add(row, seed)
    made.show()


def assets() -> Path | None:
    """The folder of real images and weights, where this machine has one."""
    folder = os.environ.get("LATENTPREP_ASSETS")
    return Path(folder) if folder and Path(folder).is_dir() else None


def machine() -> dict:
    """Processor, cores and the versions that matter."""
    import torch

    packages = {}
    for name in ("latentprep", "torch", "diffusers", "zarr", "numcodecs", "numpy", "simplejpeg"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "packages": packages,
    }


def spread(values: list[float]) -> dict:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def kept_codes(folder: Path, name: str, source: Any, codec: Any, size: int, bits: int) -> Path:
    """A latent dataset `name` in the folder, requantized from one of 8 bits, which is encoded once.

    source: of `open_source`; codec: of `make_codec`. Both parts resume; what is there is left alone.
    """
    import latentprep
    from latentprep.cli.console import progress_bar

    whole = folder / f"{name}-8bit"
    latentprep.encode(source, codec=codec, size=size, bits=8, out=whole, progress=progress_bar)
    if bits == 8:
        return whole
    latentprep.requantize(whole, bits=bits, out=folder / f"{name}-{bits}bit", progress=progress_bar)
    return folder / f"{name}-{bits}bit"


class Runs:
    """Results of named rows by seed, a file each: several processes may share the folder, and what is there stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-s{seed}.json"

    def keep(self, name: str, seed: int, result: dict) -> None:
        """Without the paths that a result of `fit` has: the folder may end as a record."""
        write_json(self.path(name, seed), {key: value for key, value in result.items() if key not in ("run", "curve")})

    def of(self, name: str) -> dict[str, dict]:
        """By seed."""
        return {
            path.stem.rpartition("-s")[2]: json.loads(path.read_text())
            for path in sorted(self.folder.glob(f"{glob.escape(name)}-s*.json"))
        }


def write_json(path: Path, document: dict) -> None:
    """Whole or not at all."""
    from latentprep.storage.atomic import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def mean_spread(values: list[float]) -> str:
    """Shares as ``87.9% ± 0.4``: mean and standard deviation, in points."""
    text = f"{statistics.mean(values):.1%}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def each_within(
    seconds: float, in_all: float, measure: Callable[[str], dict], parts: Iterable[str]
) -> Iterator[tuple[str, dict]]:
    """What each part comes to, in order; ``failed`` or ``left_out`` says why not.

    They run in a process of their own, which is killed where a part takes too long or fails, as a GPU's errors stay
    with a process; the others go on in another. None goes on after so many seconds in all. Processes are forked: what
    calls this must not have used a GPU.
    """
    end, context = time.monotonic() + in_all, multiprocessing.get_context("fork")
    worker: Any = None
    for part in parts:
        limit = min(seconds, end - time.monotonic())
        if limit <= 0:
            yield part, {"left_out": f"{in_all:.0f} s are over"}
            continue
        if worker is None:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, measure), daemon=True)
            worker.start()
            theirs.close()
        ours.send(part)
        try:
            found = ours.recv() if ours.poll(limit) else {"failed": f"not done after {limit:.0f} s"}
        except EOFError:
            worker.join()
            found = {"failed": f"its process ended, exit code {worker.exitcode}"}
        if "failed" in found:
            worker.kill()
            worker = None
        yield part, found
    if worker is not None:
        worker.kill()


def _serve(pipe: Any, measure: Callable[[str], dict]) -> None:
    while True:
        part = pipe.recv()
        try:
            pipe.send(measure(part))
        except Exception as error:
            pipe.send({"failed": f"{type(error).__name__}: {error}"})


def record(name: str, result: dict, quiet: bool = False, where: dict | None = None) -> None:
    """Print the result, unless quiet, and keep it, with the machine (this one), in `records/NAME.json`."""
    document = {"benchmark": name, "machine": where or machine(), **result}
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1)
    (RECORDS / f"{name}.json").write_text(text + "\n")
    if not quiet:
        print(text)
