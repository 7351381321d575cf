"""Datasets for torch's DataLoader: each sample once, whatever workers and ranks there are, and the same values."""

from __future__ import annotations

import functools
import pickle
import sys
from collections import Counter
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

import latentprep
from latentprep.errors import DatasetError, SystemFault, UsageError
from latentprep.torch import LatentSamples, LatentStream
from loopback import Loopback
from pictures import make_folder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
VIEWS = 2
VALID = 27  # of 28: one is no picture


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    images = make_folder(folder / "images", train=14, val=4)
    (images / "train" / "class_0" / "005.jpg").write_bytes(b"no picture")
    latentprep.encode(images, codec="dct", size=32, shard_rows=4, views=VIEWS, out=folder / "codes")
    return folder / "codes"


@pytest.fixture(scope="module")
def tars(codes: Path) -> Path:
    latentprep.convert(codes, out=codes.with_name("tars"), store="wds")
    return codes.with_name("tars")


def expected(codes: Path, split: str = "train") -> Counter[tuple[bytes, int]]:
    loaded = latentprep.open(codes).load(split)
    return Counter((one.tobytes(), int(label)) for one, label in zip(loaded.codes[:, 0], loaded.labels, strict=True))


def shown(batches: Any) -> list[tuple[bytes, int]]:
    """The samples of (codes [B,…], labels [B]), in order."""
    return [
        (one.numpy().tobytes(), int(label)) for some, labels in batches for one, label in zip(some, labels, strict=True)
    ]


def both(codes: Path) -> list[LatentSamples | LatentStream]:
    return [LatentSamples(codes), LatentStream(codes, buffer=2)]


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_dataloader_sees_each_sample_once_with_any_workers(codes: Path, workers: int) -> None:
    for dataset in both(codes):
        loader = DataLoader(dataset, 4, shuffle=isinstance(dataset, LatentSamples) or None, num_workers=workers)
        for epoch in range(2):
            if isinstance(dataset, LatentStream):
                dataset.set_epoch(epoch)
            found = shown(loader)
            assert len(found) == VALID
            assert Counter(found) == expected(codes)


def test_spawned_workers_open_what_they_need_themselves(codes: Path) -> None:
    for dataset in both(codes):
        loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
        orders = []
        for epoch in range(2):
            if isinstance(dataset, LatentStream):
                dataset.set_epoch(epoch)
            orders.append(shown(loader))
            assert Counter(orders[-1]) == expected(codes)
        assert (orders[0] != orders[1]) == isinstance(dataset, LatentStream)  # workers that stay heard of the epoch


def test_pickled_they_hold_no_codes(codes: Path) -> None:
    for dataset in both(codes):
        data = pickle.dumps(dataset)
        assert len(data) < 3000
        again = pickle.loads(data)
        assert Counter(shown(DataLoader(again, 4))) == expected(codes)


def test_every_worker_of_every_rank_has_a_part_of_its_own(codes: Path) -> None:
    for world, workers in ((1, 3), (2, 0), (3, 2), (40, 0)):
        parts = []
        for rank in range(world):
            stream = LatentStream(codes, buffer=1, seed=3, rank=rank, world_size=world)
            parts.append(shown(DataLoader(stream, 1, num_workers=workers)))
        assert sum(map(Counter, parts), Counter()) == expected(codes)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= max(1, workers)
    assert LatentStream(codes, rank=1, world_size=2).samples == VALID


def test_the_order_depends_on_seed_and_epoch(codes: Path) -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[tuple[bytes, int]]:
        stream = LatentStream(codes, seed=seed, buffer=2, **options)
        stream.set_epoch(epoch)
        return shown(DataLoader(stream, 8))

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*one)) for one in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert order(0, 0, shuffle=False) == order(5, 7, shuffle=False) == shown(DataLoader(LatentSamples(codes), 8))
    labels = [label for _, label in order(0, 0)]
    assert labels != sorted(labels)


def test_views_and_latents(codes: Path) -> None:
    opened = latentprep.open(codes)
    loaded = opened.load("train")
    for make in (LatentSamples, functools.partial(LatentStream, shuffle=False)):
        all_views = next(iter(DataLoader(make(codes, views=True), 100)))[0]
        assert np.array_equal(all_views.numpy(), loaded.codes)
        latents = next(iter(DataLoader(make(opened, latents=True), 100)))[0]
        assert latents.dtype == torch.float32
        assert np.array_equal(latents.numpy(), opened.quantizer.dequantize(loaded.codes[:, 0]))
        assert make(codes).classes == ("class_0", "class_1")
    one, label = LatentSamples(codes, "val")[-1]
    assert (one.dtype, tuple(one.shape), label) == (torch.uint8, opened.manifest.latent, 1)
    assert LatentSamples(codes).labels.tolist() == [0] * 13 + [1] * 14


def test_forked_workers_of_a_remote_dataset_are_told_to_be_spawned(
    codes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    monkeypatch.setenv("LATENTPREP_CACHE", str(codes.with_name("cache")))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with Loopback(functools.partial(Quiet, directory=codes.parent)) as web:
        stream = LatentStream(f"{web.url}/codes")
        assert Counter(shown(DataLoader(stream, 8))) == expected(codes)
        with pytest.raises(SystemFault, match="spawn"):
            list(DataLoader(stream, 8, num_workers=1, multiprocessing_context="fork"))
        again = pickle.loads(pickle.dumps(stream))  # as a spawned worker gets it
        assert Counter(shown(DataLoader(again, 8))) == expected(codes)
    assert get_worker_info() is None


def test_bad_values_are_named(codes: Path, tmp_path: Path) -> None:
    for make in (LatentSamples, LatentStream):
        with pytest.raises(UsageError, match="has no split 'test'"):
            make(codes, "test")
        with pytest.raises(DatasetError, match="no such folder"):
            make(tmp_path / "nothing")
    with pytest.raises(UsageError, match="rank must be a whole number from 0 to 1, got 2"):
        LatentStream(codes, rank=2, world_size=2)
    with pytest.raises(UsageError, match="buffer must be"):
        LatentStream(codes, buffer=0)


def test_webdataset_shows_each_sample_once(codes: Path, tars: Path) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    shards = len(list(tars.glob("train-*.tar")))
    urls = f"{tars}/train-{{000000..{shards - 1:06d}}}.tar"
    for given, workers in ((urls, 0), (urls, 2), ([str(path) for path in tars.glob("train-*.tar")], 0)):
        pipeline = latentprep.webdataset(given)
        assert Counter(shown(DataLoader(pipeline.batched(4), None, num_workers=workers))) == expected(codes)
    in_order = latentprep.webdataset(urls, shuffle=0, dataset=codes, views=True, latents=True, shardshuffle=False)
    ((latents, labels),) = in_order.batched(100)
    opened = latentprep.open(codes)
    loaded = opened.load("train")
    assert np.array_equal(latents, opened.quantizer.dequantize(loaded.codes))
    assert np.array_equal(labels, loaded.labels)
    assert len(list(latentprep.webdataset(urls, resampled=True).slice(100))) == 100
    val = latentprep.webdataset(f"{tars}/val-000000.tar", shuffle=0, views=True)
    assert all(tuple(one.shape) == (1, *opened.manifest.latent) for one, _ in val)


def test_tars_of_other_codes_are_refused(codes: Path, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    latentprep.requantize(codes, bits=2, out=codes.with_name("two"))
    url = f"{tars}/train-000000.tar"
    with pytest.raises(DatasetError, match=r"sample .* has no codes of \d+ bytes.*dataset"):
        list(latentprep.webdataset(url, dataset=codes.with_name("two")))
    with pytest.raises(DatasetError, match="no such folder"):
        latentprep.webdataset("nowhere/train-000000.tar")
    with pytest.raises(UsageError, match="name it as dataset"):
        latentprep.webdataset("pipe:cat x.tar")
    with pytest.raises(UsageError, match="urls names no tar"):
        latentprep.webdataset([])
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(SystemFault, match=r"pip install 'latentprep\[wds\]'"):
        latentprep.webdataset(url)
