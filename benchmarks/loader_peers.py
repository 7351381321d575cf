"""Reading latent samples in random order into batches on the training device: ours and what else is in use.

N samples of 4 x 32 x 32 at 4 bits with their labels, written once by each, read in turn, `--rounds` times, each time
in a process of its own: the time to open, the time from there to the first batch, a first epoch (opening and, where
all is loaded at once, loading included) and a second. Files are in the page cache. Each peer is installed from its
package into its own virtual environment, which shares this one's torch, and left out with the reason where that fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common import record, spread

LATENT = (4, 32, 32)
CLASSES = 1000
BATCH = 256
FEW = 10_000  # samples of the peer that has a file a sample, at most

# What `latentprep.console.tune_process` does, for all peers alike: a batch's memory is used again.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "GOMP_SPINCOUNT": "10000",
}

Batches = Iterator[tuple[Tensor, Tensor]]  # codes u8 [B,C,h,w], labels i64 [B], on the device
Epoch = Callable[[int], Batches]


@dataclass(frozen=True)
class Peer:
    """One way to keep samples on disk and read them in random order.

    write: (codes u8 [n,...], labels i64 [n], folder, compress); opened: (folder, workers, device) -> epochs by number.
    module: what to import before the clock starts. packages: what to install, the first of them the peer; none for what
    this environment has. few: with `FEW` samples only. shuffled: as all but a bound are.
    """

    settings: str
    write: Callable[[np.ndarray, np.ndarray, Path, bool], None]
    opened: Callable[[Path, int, torch.device], Epoch]
    module: str = "torch"
    packages: tuple[str, ...] = ()
    workers: tuple[int, ...] = (0,)
    few: bool = False
    shuffled: bool = True


class Skipped(Exception):
    """Why a peer is left out."""


# --- ours ------------------------------------------------------------------------------------------------------------


def write_ours(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool) -> None:
    from latentprep.encoder import CALIBRATION, SHARD_ROWS
    from latentprep.format import Manifest, Quantizer, ShardRecord, open_dataset
    from latentprep.format.commit import commit_shard, create_dataset
    from latentprep.format.zarr_store import choose_compression, chunk_rows, encode_shard_files

    rows, channels = codes.shape[:2]
    manifest = Manifest(
        codec={"name": "synthetic"},
        quantizer=Quantizer(4, (-3.0,) * channels, (0.375,) * channels),
        transform={"size": 256, "views": 1, "seed": 0, "resize": "bicubic"},
        source={"spec": "loader_peers", "sha256": "0" * 64},
        classes=tuple(f"class{i:04}" for i in range(CLASSES)),
        latent=codes.shape[1:],
        flip=None,
        shard_rows=SHARD_ROWS,
        chunk_rows=chunk_rows(SHARD_ROWS, codes[0].size),
        compression=choose_compression(np.asarray(codes[:CALIBRATION, None])),
        splits={"train": rows},
    )
    create_dataset(folder, manifest)
    sha256 = open_dataset(folder).manifest_sha256
    for index in range(manifest.shard_count("train")):
        part = slice(index * SHARD_ROWS, index * SHARD_ROWS + manifest.rows_in_shard("train", index))
        keys = [f"train/class{label:04}/{row}.jpg" for row, label in enumerate(labels[part], part.start)]
        files = encode_shard_files(manifest, "train", index, codes[part, None], labels[part].astype(np.int32), keys)
        commit_shard(folder, ShardRecord("train", index, len(keys), {}, 1, (0,) * channels, sha256), files)


def open_resident(folder: Path, workers: int, device: torch.device) -> Epoch:
    from latentprep.format import open_dataset
    from latenttrain.data import load_split

    dataset = open_dataset(folder)
    split = functools.cache(lambda: load_split(dataset, "train", device))
    generator = torch.Generator(device)
    return lambda number: split().training_batches(BATCH, generator.manual_seed(number))


def open_streamed(folder: Path, workers: int, device: torch.device) -> Epoch:
    from latentprep.format import open_dataset
    from latenttrain.streaming import StreamedSplit

    split = StreamedSplit(open_dataset(folder), "train", device)
    generator = torch.Generator(device)
    return lambda number: split.training_batches(BATCH, generator.manual_seed(number))


def open_zarr(folder: Path, workers: int, device: torch.device, together: int = 4) -> Epoch:
    """Whole chunks in random order, a few of them mixed at a time: single rows would decompress a chunk each."""
    import zarr

    group = zarr.open_group(str(folder), mode="r")["train"]
    codes, labels = group["codes"], group["labels"]
    rows, chunk = codes.shape[0], codes.chunks[0]

    def epoch(number: int) -> Batches:
        every, mixer = labels[:].astype(np.int64), np.random.default_rng(number)
        starts = mixer.permutation(range(0, rows, chunk))
        for i in range(0, len(starts), together):
            parts = [slice(start, min(start + chunk, rows)) for start in starts[i : i + together]]
            mixed_codes, mixed_labels = (np.concatenate([of[part] for part in parts]) for of in (codes, every))
            order = mixer.permutation(len(mixed_labels))
            for j in range(0, len(order) - BATCH + 1, BATCH):
                chosen = order[j : j + BATCH]
                yield on(device, torch.from_numpy(mixed_codes[chosen, 0]), torch.from_numpy(mixed_labels[chosen]))

    return epoch


# --- numpy, and a file a sample --------------------------------------------------------------------------------------


def write_numpy(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool) -> None:
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)


def open_memmap(folder: Path, workers: int, device: torch.device, how: str = "rows") -> Epoch:
    """rows: a fresh batch of random rows; copy: the same rows into one batch made before; in order: no shuffling."""
    codes, labels = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in ("codes.npy", "labels.npy"))
    batch = np.empty((BATCH, *codes.shape[1:]), np.uint8)

    def epoch(number: int) -> Batches:
        order = np.random.default_rng(number).permutation(len(labels))
        for i in range(0, len(labels) - BATCH + 1, BATCH):
            chosen = order[i : i + BATCH]
            if how == "rows":
                found = codes[chosen]
            elif how == "copy":
                found = np.take(codes, chosen, axis=0, out=batch, mode="clip")  # any other mode copies twice
            else:
                chosen, found = slice(i, i + BATCH), batch
                batch[:] = codes[chosen]
            yield on(device, torch.from_numpy(found), torch.from_numpy(labels[chosen].copy()))

    return epoch


def write_files(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool) -> None:
    np.save(folder / "labels.npy", labels)
    for row, sample in enumerate(codes):
        np.save(folder / f"{row:07}.npy", sample)


class Files(Dataset):
    """A sample a file; labels in memory, as from a listing of folders."""

    def __init__(self, folder: Path) -> None:
        self.labels = np.load(folder / "labels.npy").tolist()
        self.paths = [str(folder / f"{row:07}.npy") for row in range(len(self.labels))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.load(self.paths[row])), self.labels[row]


def open_files(folder: Path, workers: int, device: torch.device) -> Epoch:
    return from_loader(DataLoader, Files(folder), workers, device, shuffle=True)


# --- the loaders -----------------------------------------------------------------------------------------------------


def write_webdataset(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool) -> None:
    import webdataset

    pattern = str(folder / ("%06d.tar.gz" if compress else "%06d.tar"))
    with webdataset.ShardWriter(pattern, maxcount=1000, verbose=0) as writer:
        for row, sample in enumerate(codes):
            writer.write({"__key__": f"{row:07}", "bin": sample.tobytes(), "cls": str(labels[row]).encode()})


def open_webdataset(folder: Path, workers: int, device: torch.device) -> Epoch:
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000, rng=random.Random(0))
        .map(lambda sample: (sample["bin"], int(sample["cls"])))
        .batched(BATCH, collation_fn=joined, partial=False)
    )
    return from_loader(webdataset.WebLoader, dataset, workers, device, batch_size=None, drop_last=False)


@functools.cache
def source(folder: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(Path(folder) / name, mmap_mode="r") for name in ("codes.npy", "labels.npy"))  # type: ignore[return-value]


def litdata_sample(folder: str, as_bytes: bool, row: int) -> dict:
    codes, labels = source(folder)
    return {"codes": codes[row].tobytes() if as_bytes else np.array(codes[row]), "label": int(labels[row])}


def write_litdata(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool, as_bytes: bool = True) -> None:
    import litdata

    with tempfile.TemporaryDirectory() as plain:  # its workers are processes, which read the arrays from files
        write_numpy(codes, labels, Path(plain), False)
        litdata.optimize(
            functools.partial(litdata_sample, plain, as_bytes),
            list(range(len(labels))),
            str(folder),
            chunk_bytes="64MB",
            compression="zstd" if compress else None,
            num_workers=1,
            verbose=False,
        )


def open_litdata(folder: Path, workers: int, device: torch.device, as_bytes: bool = True) -> Epoch:
    import litdata

    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True)
    options = {"collate_fn": joined_dicts if as_bytes else tuple_of_dicts}
    return from_loader(litdata.StreamingDataLoader, dataset, workers, device, **options)


def write_mosaicml(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool) -> None:
    import streaming

    columns = {"codes": f"ndarray:uint8:{','.join(map(str, codes.shape[1:]))}", "label": "int"}
    compression = "zstd" if compress else None
    with streaming.MDSWriter(out=str(folder), columns=columns, compression=compression) as writer:
        for row, sample in enumerate(codes):
            writer.write({"codes": np.asarray(sample), "label": int(labels[row])})


def open_mosaicml(folder: Path, workers: int, device: torch.device) -> Epoch:
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return from_loader(
        streaming.StreamingDataLoader, dataset, workers, device,
        collate_fn=lambda rows: (
            torch.from_numpy(np.stack([row["codes"] for row in rows])),
            torch.tensor([row["label"] for row in rows]),
        ),
    )  # fmt: skip


def joined(rows: list) -> tuple[Tensor, Tensor]:
    """The raw bytes and labels of samples -> a batch. Sooner done than stacking an array a sample."""
    codes = torch.frombuffer(bytearray(b"".join([code for code, _ in rows])), dtype=torch.uint8)
    return codes.view(len(rows), *LATENT), torch.tensor([label for _, label in rows])


def joined_dicts(rows: list[dict]) -> tuple[Tensor, Tensor]:
    return joined([(row["codes"], row["label"]) for row in rows])


def tuple_of_dicts(rows: list[dict]) -> tuple[Tensor, Tensor]:
    batch = default_collate(rows)
    return batch["codes"], batch["label"]


def from_loader(kind: Callable, dataset: Any, workers: int, device: torch.device, **options: Any) -> Epoch:
    """Epochs of a `DataLoader` or one of its kin; its workers live on between them."""
    settings = {"batch_size": BATCH, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    loader = kind(dataset, **(settings | {"pin_memory": device.type == "cuda"} | options))

    def epoch(number: int) -> Batches:
        for codes, labels in loader:
            yield on(device, codes, labels)

    return epoch


def on(device: torch.device, codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return codes.to(device, non_blocking=True), labels.to(device, non_blocking=True)


# --- all of them -----------------------------------------------------------------------------------------------------

NUMPY = "arrays in .npy, one code a byte; "
PEERS: dict[str, Peer] = {
    "ours_resident": Peer(
        "verified, decompressed into memory once, then gathered", write_ours, open_resident, "latenttrain.data"
    ),
    "ours_streamed": Peer("StreamedSplit as it comes", write_ours, open_streamed, "latenttrain.streaming"),
    "webdataset": Peer(
        "tars of 1000, one code a byte as raw bytes; all shards shuffled, buffer of 1000; batches made in the worker "
        "from the joined bytes, partial=False; no second mixing between workers",
        write_webdataset, open_webdataset, "webdataset", ("webdataset",), (0, 2),
    ),
    "litdata": Peer(
        "optimize(chunk_bytes=64MB), samples of a uint8 array and a label; shuffle=True; StreamingDataLoader",
        functools.partial(write_litdata, as_bytes=False), functools.partial(open_litdata, as_bytes=False),
        "litdata", ("litdata", "zstd"), (0, 2),
    ),
    "litdata_bytes": Peer(
        "the same, samples of raw bytes and a label; batches from the joined bytes",
        write_litdata, open_litdata, "litdata", ("litdata", "zstd"), (0, 2),
    ),
    "mosaicml-streaming": Peer(
        "MDSWriter, ndarray:uint8 of a fixed shape; shuffle=True (py1e), batch_size given; StreamingDataLoader, "
        "np.stack",
        write_mosaicml, open_mosaicml, "streaming", ("mosaicml-streaming",), (0, 2),
    ),
    "zarr": Peer(
        "our store by zarr-python: chunks in random order, four mixed at a time", write_ours, open_zarr, "zarr"
    ),
    "memmap_rows": Peer(NUMPY + "codes[random rows]", write_numpy, open_memmap),
    "memmap_copy": Peer(
        NUMPY + "the same rows into one batch made before", write_numpy, functools.partial(open_memmap, how="copy")
    ),
    "memmap_in_order": Peer(
        NUMPY + "rows in order into one batch made before: what shuffling costs",
        write_numpy, functools.partial(open_memmap, how="in order"), shuffled=False,
    ),
    "npy_files": Peer(
        f"a .npy file each, {FEW:,} at most; DataLoader(shuffle=True)",
        write_files, open_files, workers=(0, 2), few=True,
    ),
}  # fmt: skip


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
