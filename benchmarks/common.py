"""What every benchmark needs: where it ran, medians with their spread, and a record of both."""

from __future__ import annotations

import json
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORDS = Path(__file__).parent / "records"


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


def record(name: str, result: dict, quiet: bool = False) -> None:
    """Print the result, unless quiet, and keep it, with the machine, in `records/NAME.json`."""
    document = {"benchmark": name, "machine": machine(), **result}
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1)
    (RECORDS / f"{name}.json").write_text(text + "\n")
    if not quiet:
        print(text)
