"""Small latent datasets whose classes can be told apart, and the command line run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from told import Interrupting

from latentprep.format import Codes, Manifest, Quantizer, ShardId
from latentprep.format.commit import commit_shard, create_dataset
from latentprep.format.shard import encoded_shard
from latentprep.format.zarr_store import CANDIDATES, chunk_rows

CLASSES = ("apple", "birch", "cedar", "daisy")
SHARD_ROWS = 64


def make_manifest(
    classes=CLASSES, rows=None, latent=(3, 8, 8), views=1, bits=4, flip=None, codec=None, size=64, store="zarr",
    statistics=None, quantizer=None,
):  # fmt: skip
    return Manifest(
        codec=codec or {"name": "fake", "levels": 7},
        quantizer=quantizer or Quantizer(bits, (-2.0,) * latent[0], (0.25,) * latent[0]),
        transform={"size": size, "views": views, "seed": 0, "resize": "bicubic"},
        source={"spec": "made up", "sha256": "0" * 64},
        classes=tuple(classes),
        latent=latent,
        flip=flip,
        shard_rows=SHARD_ROWS,
        chunk_rows=chunk_rows(SHARD_ROWS, views * int(np.prod(latent))),
        compression=CANDIDATES[0],
        splits=rows or {"train": 200, "val": 70},
        store=store,
        written_by="a test",
        statistics=statistics,
    )


def make_codes(manifest: Manifest, split: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """codes u8 or u16 [n,V,C,h,w], labels i32 [n]: each class has its own mean a channel, under much noise."""
    random = np.random.default_rng(len(split))
    labels = (np.arange(rows) % len(manifest.classes)).astype(np.int32)
    means = np.random.default_rng(7).uniform(5, 10, (len(manifest.classes), 1, manifest.latent[0], 1, 1))
    codes = random.normal(means[labels], 4, (rows, *manifest.row_shape("train")))
    tops = np.array(manifest.quantizer.channel_levels)[:, None, None] - 1
    return codes.round().clip(0, tops).astype(manifest.quantizer.dtype), labels


def write_dataset(root: Path, manifest: Manifest, invalid: int = 0, skip: tuple[str, int] | None = None) -> Path:
    """Write it as latentprep would; the first `invalid` rows of train could not be read, shard `skip` is not done."""
    create_dataset(root, manifest)
    for split, rows in manifest.splits.items():
        codes, labels = make_codes(manifest, split, rows)
        if split == "train":
            labels[:invalid] = -1
        for index in range(manifest.shard_count(split)):
            part = slice(index * SHARD_ROWS, index * SHARD_ROWS + manifest.rows_in_shard(split, index))
            keys = [f"{split}/{row}.jpg" for row in range(rows)[part]]
            codes[part][labels[part] < 0] = 0
            rows_here = Codes(codes[part], labels[part], keys)
            saturated = (0,) * manifest.latent[0]
            if (split, index) != skip:
                shard = ShardId(split, index)
                commit_shard(root, encoded_shard(manifest, shard, rows_here, source_bytes=1, saturated=saturated))
    return root


@pytest.fixture
def make_dataset(tmp_path) -> Callable[..., Path]:
    """``make_dataset(name, invalid=…, skip=…, **manifest changes)`` -> the dataset's folder."""

    def make(name="codes", invalid=0, skip=None, **changes) -> Path:
        return write_dataset(tmp_path / name, make_manifest(**changes), invalid, skip)

    return make


@pytest.fixture(scope="session")
def write_codes() -> Callable[..., Path]:
    """``write_codes(folder, **manifest changes)`` -> the folder, for fixtures that outlive a test."""
    return lambda folder, **changes: write_dataset(folder, make_manifest(**changes))


@pytest.fixture(scope="session")
def codes(tmp_path_factory) -> Path:
    """A dataset that no test changes: 200 + 70 samples, 4 classes, 3 x 8 x 8 codes of 4 bits."""
    return write_dataset(tmp_path_factory.mktemp("data") / "codes", make_manifest())


@pytest.fixture(scope="session")
def odd(tmp_path_factory) -> Path:
    """The same with 203 + 71 samples: batches of 51 and 50, which ranks cannot share evenly."""
    return write_dataset(tmp_path_factory.mktemp("data") / "odd", make_manifest(rows={"train": 203, "val": 71}))


@pytest.fixture(scope="session")
def small() -> dict:
    """Keyword arguments of a `fit` that takes a tenth of a second an epoch."""
    return {"width": 0.25, "depth": 0.5, "epochs": 3, "batch_size": 32, "device": "cpu"}


@pytest.fixture(scope="session")
def small_options(small) -> list[str]:
    """The same as options of the command line."""
    return [part for name, value in small.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="session")
def interrupted_after() -> type:
    """``interrupted_after(batches)`` -> a progress bar at which someone then presses Ctrl-C."""

    return Interrupting


@pytest.fixture
def latenttrain(monkeypatch, capfd):
    """``latenttrain("fit", …)`` -> (exit code, stdout, stderr), as the console script would."""
    from latenttrain.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latenttrain", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Nets this small gain nothing from a second thread, and wait long for it on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
