"""Reading latent samples in random order into batches on the training device: ours and what else is in use.

N samples of 4 x 32 x 32 at 4 bits with their labels, written once by each, read in turn, `--rounds` times, each time
in a process of its own: the time to open, the time from there to the first batch, a first epoch (opening and, where
all is loaded at once, loading included) and a second. Files are in the page cache. Each peer is installed from its
package into its own virtual environment, which shares this one's torch, and left out with the reason where that fails.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import record, spread
from peers import BATCH, CLASSES, FEW, LATENT, PEERS, Peer, source

# What `latentprep.cli.console.tune_process` does, for all peers alike: a batch's memory is used again.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "GOMP_SPINCOUNT": "10000",
}


class Skipped(Exception):
    """Why a peer is left out."""


def environment(packages: tuple[str, ...], cache: Path) -> str:
    """The Python of a virtual environment with the packages, made unless it is there; it sees this one's packages too.

    Raises `Skipped` if they can't be installed.
    """
    if not packages:
        return sys.executable
    root = cache / "venvs" / packages[0]
    python, done = root / "bin" / "python", root / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(root)], check=True)
        (site,) = (root / "lib").glob("python*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own packages go first
        pins = root / "pins.txt"
        pins.write_text(f"torch=={torch.__version__}\n")  # no other torch, with gigabytes of CUDA
        command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins), *packages]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            raise Skipped(f"pip install {' '.join(packages)}: {(errors or ['failed'])[-1]}")
        done.touch()
    return str(python)


def call(python: str, script: str, request: dict) -> Any:
    """What `script --child REQUEST` prints as JSON on its last line. Raises `Skipped` with the error if it fails."""
    quiet = {"LITDATA_DISABLE_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, script, "--child", json.dumps(request)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | TUNED | quiet)
    if ran.returncode:
        raise Skipped((ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1])
    return json.loads(ran.stdout.strip().splitlines()[-1])


def child(request: dict) -> Any:
    """Write the jobs' samples, or read a folder's, in the peer's own environment."""
    peer = PEERS[request["peer"]]
    imported(peer.module)
    if request["do"] == "write":
        return [write(peer, **job) for job in request["jobs"]]
    name = peer.packages[0] if peer.packages else None
    measured = read(peer, Path(request["folder"]), request["workers"], torch.device(request["device"]))
    return measured | {"version": importlib.metadata.version(name) if name else None}


def imported(module: str) -> None:
    """Import it. mosaicml-streaming imports torchvision, whose published build asks for CUDA's torch: with any other
    torch it fails for want of two operators. They are declared then; nothing here uses them."""
    if module == "streaming":
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            imported.library = library  # type: ignore[attr-defined]  # what it declares goes when it does
    importlib.import_module(module)


def write(peer: Peer, arrays: str, folder: str, rows: int | None = None, compress: bool = False) -> dict:
    """The samples in the folder `arrays`, or the first `rows` of them, in the peer's format: what they take on disk."""
    done = Path(folder + ".done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(parents=True)
        codes, labels = (array[:rows] for array in source(arrays))
        peer.write(codes, labels, Path(folder), compress)
        found = [path.stat() for path in Path(folder).rglob("*") if path.is_file()]
        size = {
            "bytes_a_sample": sum(stat.st_size for stat in found) / len(labels),
            "allocated_a_sample": sum(stat.st_blocks * 512 for stat in found) / len(labels),
            "files": len(found),
        }
        done.write_text(json.dumps(size))
    return json.loads(done.read_text())


def read(peer: Peer, folder: Path, workers: int, device: torch.device) -> dict:
    """Open it and read two epochs: seconds and samples a second. Raises `ValueError` if they are not the samples."""
    torch.zeros(1, device=device)  # what a device takes to start is nobody's
    start = time.perf_counter()
    epoch = peer.opened(folder, workers, device)
    opened = time.perf_counter()
    times, seen = [], []
    for number in range(2):
        begin, labels = time.perf_counter() if number else start, []
        for codes, found in epoch(number):
            if not times:
                synchronize(device)
                times.append(time.perf_counter())
                sample = codes[0].cpu().numpy().copy(), int(found[0])
            labels.append(found)
        synchronize(device)
        count = sum(map(len, labels))
        times.append(count / (time.perf_counter() - begin))
        seen.append(torch.cat(labels).cpu().numpy())
    status = Path("/proc/self/status")
    peak = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
    check(sample, seen, folder.parent / "arrays", max(1, workers), peer.shuffled)
    return {
        "open_s": opened - start,
        "first_batch_s": times[0] - opened,
        "first_epoch": times[1],
        "next_epoch": times[2],
        "memory_mib": int(peak[0]) / 1024 if peak else None,
    }


def check(sample: tuple[np.ndarray, int], epochs: list[np.ndarray], arrays: Path, workers: int, shuffled: bool) -> None:
    """`ValueError` unless the epochs' labels are the samples', each once, in two orders, and the sample is one of them.

    A worker may leave out its last batch.
    """
    codes, labels = source(str(arrays))
    total = np.bincount(labels, minlength=CLASSES)
    for seen in epochs:
        if len(seen) % BATCH or not 0 <= len(labels) - len(seen) < BATCH * workers:
            raise ValueError(f"{len(seen)} samples of {len(labels)} in an epoch")
        if (np.bincount(seen, minlength=CLASSES) > total).any():
            raise ValueError("a sample came twice")
    if shuffled == np.array_equal(*epochs):
        raise ValueError("two epochs came in the same order")
    if not (codes[labels == sample[1]] == sample[0]).all((1, 2, 3)).any():
        raise ValueError("a sample was altered")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_samples(folder: Path, rows: int) -> None:
    """codes u8 [n,4,32,32], normal within the 16 levels (3.6 bits of entropy, as real latents have), and labels."""
    if not (folder / "labels.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        mixer = np.random.default_rng(0)
        codes = np.lib.format.open_memmap(folder / "codes.npy", "w+", np.uint8, (rows, *LATENT))
        for start in range(0, rows, 4096):
            part = codes[start : start + 4096]
            part[:] = (7.5 + 3 * mixer.standard_normal(part.shape, np.float32)).round().clip(0, 15)
        codes.flush()
        np.save(folder / "labels.npy", mixer.permutation(np.arange(rows) % CLASSES))


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Install and write: by peer, its Python, folder and bytes on disk, or why it is skipped."""
    make_samples(folder / "arrays", options.samples)
    rows = {}
    for name in options.peers.split(","):
        peer = PEERS[name]
        few = min(FEW, options.samples) if peer.few else None
        # One folder for all that write the same. Those with fewer samples have a home of their own, to be checked by.
        home = folder / name if peer.few else folder
        if peer.few:
            make_samples(home / "arrays", few)
        written = next(other for other in PEERS if PEERS[other].write is peer.write)
        job = {"arrays": str(home / "arrays"), "folder": str(home / written)}
        try:
            python = environment(peer.packages, options.cache)
            size = call(python, __file__, {"do": "write", "peer": name, "jobs": [job]})[0]
            rows[name] = {"settings": peer.settings, "samples": few or options.samples, **size}
            rows[name] |= {"python": python, "folder": job["folder"], "runs": {w: [] for w in peer.workers}}
        except Skipped as reason:
            rows[name] = {"settings": peer.settings, "skipped": str(reason)}
    return rows


def measure(options: argparse.Namespace, rows: dict[str, dict]) -> None:
    """All peers in turn, so many rounds. One that fails is skipped from then on."""
    for number in range(options.rounds):
        for name, row in rows.items():
            for workers, runs in row.get("runs", {}).items():
                request = {"do": "read", "peer": name, "folder": row["folder"], "workers": workers}
                try:
                    if "skipped" not in row:
                        runs.append(call(row["python"], __file__, request | {"device": options.device}))
                        print(number + 1, name, workers, runs[-1], file=sys.stderr, flush=True)
                except Skipped as reason:
                    row["skipped"] = str(reason)
                    print(number + 1, name, workers, "skipped:", reason, file=sys.stderr, flush=True)


def summed_up(rows: dict[str, dict]) -> None:
    """Each peer's figures with the number of workers that is best in its second epochs, and ratios to ours by round."""
    for row in rows.values():
        runs = row.pop("runs", {})
        row.pop("python", None), row.pop("folder", None)
        if "skipped" in row or not all(runs.values()):
            continue
        figures = {
            workers: {key: spread([run[key] for run in of]) for key in of[0] if key != "version"}
            for workers, of in runs.items()
        }
        best = max(figures, key=lambda workers: figures[workers]["next_epoch"]["median"])
        row |= {"version": runs[best][0]["version"], "workers": best, **figures[best]}
        row["other_workers"] = {workers: of for workers, of in figures.items() if workers != best}
        row["rounds"] = runs[best]
    for name in ("ours_resident", "ours_streamed"):
        ours = rows.get(name, {}).get("rounds")
        for row in rows.values():
            for epoch in ("first_epoch", "next_epoch") if ours and "rounds" in row else ():
                ratios = [mine[epoch] / its[epoch] for mine, its in zip(ours, row["rounds"], strict=True)]
                row.setdefault(f"{name}_over_it", {})[epoch] = spread(ratios)
    for row in rows.values():
        row.pop("rounds", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, help="keep environments and written samples here (default: nowhere)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.cache = (options.cache or Path(temporary)).absolute()
        rows = prepare(options, options.cache / f"samples-{options.samples}")
        measure(options, rows)
    summed_up(rows)
    record("loader_peers", {"samples": options.samples, "batch": BATCH, "device": options.device, "peers": rows})


if __name__ == "__main__":
    main()
