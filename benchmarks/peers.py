"""Ways to keep latent samples on disk and read them in random order into batches: ours and what else is in use.

Each writes the same codes and labels, and opens them as epochs of batches. `loader_peers.py` measures how fast,
`disk_peers.py` how small.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

LATENT = (4, 32, 32)
CLASSES = 1000
BATCH = 256
FEW = 10_000  # samples of the peer that has a file a sample, at most

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


# --- ours ------------------------------------------------------------------------------------------------------------


def write_ours(codes: np.ndarray, labels: np.ndarray, folder: Path, compress: bool) -> None:
    from latentprep.encoding.calibration import CALIBRATION
    from latentprep.encoding.encode import SHARD_ROWS
    from latentprep.format import Codes, Manifest, Quantizer, ShardId
    from latentprep.format.commit import commit_shard, create_dataset
    from latentprep.format.shard import encoded_shard
    from latentprep.format.zarr_store import choose_compression, chunk_rows

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
    for index in range(manifest.shard_count("train")):
        part = slice(index * SHARD_ROWS, index * SHARD_ROWS + manifest.rows_in_shard("train", index))
        keys = [f"train/class{label:04}/{row}.jpg" for row, label in enumerate(labels[part], part.start)]
        found = Codes(codes[part, None], labels[part].astype(np.int32), keys)
        shard = encoded_shard(manifest, ShardId("train", index), found, source_bytes=1, saturated=(0,) * channels)
        commit_shard(folder, shard)


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
