import gc
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import latenttrain
from latentprep.errors import CheckpointError, DatasetError, UsageError
from latentprep.format import Codes, LatentDataset, Manifest, Quantizer, ShardRecord, open_dataset
from latenttrain import streaming
from latenttrain.checkpoint import load_tensors, read_config
from latenttrain.data import cut, load_split
from latenttrain.memory import container_memory, free_memory
from latenttrain.streaming import (
    THREAD_NAME,
    StreamedSplit,
    shards_mixed,
    shards_to_hold,
    training_data,
)

CPU = torch.device("cpu")


class Numbered(LatentDataset):
    """Shards in which a sample's codes spell its row, channel 2 its view, labels in order. Not on disk."""

    def __init__(self, rows, views=1, invalid=(), shard_rows=8):
        self.root = Path("numbered")
        self.manifest = Manifest(
            codec={"name": "none"}, quantizer=Quantizer(8, (0.0,) * 3, (1.0,) * 3), transform={"views": views},
            source={}, classes=("a", "b", "c", "d"), latent=(3, 2, 2), flip=None, shard_rows=shard_rows,
            chunk_rows=shard_rows, compression=[], splits={"train": rows},
        )  # fmt: skip
        self.invalid, self.labels_read, self._records = set(invalid), [], {}

    def record(self, split, index):
        bad = tuple({"row": row} for row in self._rows(index) if row in self.invalid)
        return ShardRecord(split, index, len(self._rows(index)), {}, 1, (), "0" * 64, bad)

    def read_labels(self, split, index):
        self.labels_read.append(index)
        rows = self._rows(index)
        classes = np.array(rows) * 4 // self.manifest.splits["train"]
        return np.where([row in self.invalid for row in rows], -1, classes).astype(np.int32)

    def read_shard(self, split, index, keys):
        number = np.array(self._rows(index))
        codes = np.zeros((len(number), *self.manifest.row_shape("train")), np.uint8)
        codes[:, :, 0] = (number % 256)[:, None, None, None]
        codes[:, :, 1] = (number // 256)[:, None, None, None]
        codes[:, :, 2] = np.arange(codes.shape[1])[:, None, None]
        return Codes(codes, self.read_labels(split, index), [""] * len(number) if keys else [])

    def _rows(self, index):
        start = index * self.manifest.shard_rows
        return range(start, start + self.manifest.rows_in_shard("train", index))


def rows_of(codes):
    return (codes[:, 0, 0, 0].long() + 256 * codes[:, 1, 0, 0].long()).tolist()


def epoch(split, batch_size=10, seed=0):
    return list(split.training_batches(batch_size, torch.Generator().manual_seed(seed)))


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("held", [1, 4, 1000])
def test_every_valid_sample_comes_exactly_once_with_its_label(held):
    invalid = (0, 3, 17, *range(24, 32))
    split = StreamedSplit(Numbered(199, invalid=invalid), "train", CPU, held)
    batches = epoch(split, batch_size=4)
    assert len(split) == 199 - 11 == 4 * len(batches)
    rows = [row for codes, _ in batches for row in rows_of(codes)]
    assert sorted(rows) == sorted(set(range(199)) - set(invalid))
    assert torch.cat([labels for _, labels in batches]).tolist() == [row * 4 // 199 for row in rows]
    assert all(codes.dtype == torch.uint8 and labels.dtype == torch.int64 for codes, labels in batches)


def test_the_order_depends_on_the_generator_and_not_on_the_threads(monkeypatch):
    dataset = Numbered(300, views=3)
    read = Numbered.read_shard

    def late(self, split, index, keys):
        time.sleep(0.01 * (index % 3 == 0))
        return read(self, split, index, keys)

    one = epoch(StreamedSplit(dataset, "train", CPU, 5, threads=1))
    monkeypatch.setattr(Numbered, "read_shard", late)
    many = epoch(StreamedSplit(dataset, "train", CPU, 5, threads=8))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, many, strict=True))
    other = epoch(StreamedSplit(dataset, "train", CPU, 5), seed=1)
    assert [rows_of(codes) for codes, _ in other] != [rows_of(codes) for codes, _ in one]


@pytest.mark.parametrize("size", [2, 5, 8, 21, 22, 128])
def test_every_sample_comes_once_an_epoch_in_batches_of_nearly_equal_size(size):
    split = StreamedSplit(Numbered(22), "train", CPU, 1)
    for seed in range(3):
        batches = epoch(split, size, seed)
        assert [len(labels) for _, labels in batches] == list(cut(22, -(-22 // size)))
        assert sorted(row for codes, _ in batches for row in rows_of(codes)) == list(range(22))


@pytest.mark.parametrize("limit", [None, 37])
def test_streamed_or_in_memory_an_epoch_shows_the_same_views(limit):
    dataset = Numbered(100, views=4, invalid=(9, 40))
    shown = []
    for split in (StreamedSplit(dataset, "train", CPU, 4, limit), load_split(dataset, "train", CPU, limit)):
        for number in range(3):
            batches = split.training_batches(10, torch.Generator(), number)
            shown.append(
                {row: int(one[2, 0, 0]) for codes, _ in batches for row, one in zip(rows_of(codes), codes, strict=True)}
            )
    assert shown[:3] == shown[3:]
    assert [sorted(set(views.values())) for views in shown[:3]] == [[0, 1, 2, 3]] * 3
    assert all(shown[0][row] == 0 or shown[1][row] == 0 for row in shown[0])


def test_evaluation_sees_view_0_of_every_sample_in_order():
    split = StreamedSplit(Numbered(45, views=3, invalid=(9,)), "train", CPU, 2)
    for size in (3, 20, 100):
        batches = list(split.batches(size))
        assert [len(labels) for _, labels in batches] == [size] * (44 // size) + [44 % size] * bool(44 % size)
        assert [row for codes, _ in batches for row in rows_of(codes)] == [row for row in range(45) if row != 9]
        assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
        assert all(codes[:, 2].max() == 0 for codes, _ in batches)


def test_some_batches_are_those_of_all():
    dataset = Numbered(45, views=3)
    for split in (StreamedSplit(dataset, "train", CPU, 2), load_split(dataset, "train", CPU)):
        whole = list(split.batches(10))
        for wanted in (range(5), range(2, 4), range(1, 1), range(4, 5)):
            found = list(split.batches(10, wanted))
            assert len(found) == len(wanted)
            for number, (codes, labels) in zip(wanted, found, strict=True):
                assert torch.equal(codes, whole[number][0])
                assert torch.equal(labels, whole[number][1])


@pytest.mark.parametrize("limit", [2, 7, 50, 500])
def test_a_limit_takes_the_samples_that_a_split_in_memory_takes(limit):
    dataset = Numbered(99, invalid=(0, 50, 51))
    streamed, resident = StreamedSplit(dataset, "train", CPU, limit=limit), load_split(dataset, "train", CPU, limit)
    assert len(streamed) == len(resident)
    assert torch.equal(streamed.labels, resident.labels)
    assert torch.equal(torch.cat([c for c, _ in streamed.batches(8)]), resident.codes[:, 0])
    assert len({row for codes, _ in epoch(streamed, 2) for row in rows_of(codes)}) == len(resident)
    assert torch.equal(streamed.packed().labels, resident.labels)


def test_an_epoch_is_mixed_as_well_as_the_buffer_allows():
    """A shard drains while others come, so neighbours are of about twice as many shards as are held."""
    dataset, rows = Numbered(25_600, shard_rows=64), np.arange(25_600)

    def order(held):
        split = StreamedSplit(dataset, "train", CPU, held)
        return np.array([row for codes, _ in epoch(split, 64) for row in rows_of(codes)])

    part, whole = order(25), order(400)
    assert shards_mixed(rows, 64) < 1.1
    assert 40 < shards_mixed(part, 64) < 60
    assert 300 < shards_mixed(whole, 64) < 550
    for found in (part, whole):  # where a sample lies says nothing about when it comes: 400 shards, so ± 0.05
        assert abs(np.corrcoef(found, rows)[0, 1]) < 0.2


def test_memory_is_the_buffer_and_the_shards_read_ahead(monkeypatch):
    alive, most = set(), 0
    read = Numbered.read_shard

    def counted(self, split, index, keys):
        nonlocal most
        found = read(self, split, index, keys)
        alive.add(index)
        weakref.finalize(found.codes, alive.discard, index)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(Numbered, "read_shard", counted)
    split = StreamedSplit(Numbered(800), "train", CPU, 6, threads=2)
    assert len(epoch(split)) == 80
    gc.collect()
    assert most <= 2 * 2 + 2  # of 100: those read ahead, the next one, and one on its way into the buffer
    assert not alive


def test_a_damaged_shard_is_named_and_no_thread_stays(make_dataset):
    root = make_dataset()
    path = root / "train/codes/c/2/0/0/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DatasetError, match="shard train 2.*altered"):
        epoch(StreamedSplit(open_dataset(root), "train", CPU, 2))
    assert not readers()


def test_labels_that_contradict_the_record_are_an_error(make_dataset):
    with pytest.raises(DatasetError, match="shard train 0 has 55 valid samples, its record .* counts 64"):
        epoch(StreamedSplit(open_dataset(make_dataset(invalid=9)), "train", CPU))


@pytest.mark.parametrize("ways", ["close", "drop", "interrupt"])
def test_leaving_early_leaves_no_thread(ways):
    batches = StreamedSplit(Numbered(800), "train", CPU, 2).training_batches(10, torch.Generator())
    next(batches)
    assert readers()
    if ways == "close":
        batches.close()
    elif ways == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    else:
        del batches
    assert not readers()


def test_classes_are_found_without_reading_every_shard():
    dataset = Numbered(800)
    assert StreamedSplit(dataset, "train", CPU).classes() == [0, 3]
    assert dataset.labels_read == [0, 99]


def test_what_cannot_be_streamed_is_said(make_dataset):
    dataset = Numbered(10)
    with pytest.raises(UsageError, match="buffer must be a whole number of 1 or more, got 0"):
        StreamedSplit(dataset, "train", CPU, 0)
    with pytest.raises(UsageError, match="limit must be a whole number of 2 or more"):
        StreamedSplit(dataset, "train", CPU, limit=1)
    with pytest.raises(DatasetError, match="shard train 1 is not committed"):
        StreamedSplit(open_dataset(make_dataset(skip=("train", 1))), "train", CPU)


# What follows is `fit`.


def test_a_streamed_run_learns_and_resumes_to_the_same_bytes(codes, tmp_path, small, interrupted_after):
    settings = {**small, "epochs": 4, "stream": True, "buffer": 2}
    whole = latenttrain.fit(codes, **settings, out=tmp_path / "whole")
    assert whole.last_top1 > 0.5
    assert read_config(tmp_path / "whole").dataset["stream"] == 2
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(codes, **settings, out=tmp_path / "broken", progress=interrupted_after(9))
    assert not readers()
    latenttrain.fit(codes, **{**small, "epochs": 4}, out=tmp_path / "broken", resume=True)  # goes on streaming
    assert (tmp_path / "broken/best.safetensors").read_bytes() == (tmp_path / "whole/best.safetensors").read_bytes()
    ours, theirs = (load_tensors(tmp_path / run / "last.safetensors")[0] for run in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(CheckpointError, match="stream is 2, but 3 was requested"):
        latenttrain.fit(codes, **{**settings, "buffer": 3}, out=tmp_path / "whole", resume=True)


@pytest.mark.parametrize(
    ("free", "train", "val"),
    [
        (1 << 40, "Split", "Split"),
        (60_000, "PackedSplit", "Split"),  # train: 38,400 bytes, 19,200 packed; val: 13,440, packed 6,720
        (20_000, "StreamedSplit", "PackedSplit"),
        (8_000, "StreamedSplit", "StreamedSplit"),
    ],
)
def test_free_memory_decides_the_form(codes, monkeypatch, free, train, val):
    monkeypatch.setattr(streaming, "free_memory", lambda device: free)
    dataset = open_dataset(codes)
    found = training_data(dataset, CPU, shards_to_hold(dataset, CPU, None, None, False))
    assert [type(split).__name__ for split in found] == [train, val]
    assert [len(split) for split in found] == [200, 70]


def test_what_is_packed_trains_to_the_same_bytes_and_val_may_be_streamed(codes, tmp_path, monkeypatch, small):
    for name, free in {"plain": 1 << 40, "packed": 60_000}.items():
        monkeypatch.setattr(streaming, "free_memory", lambda device, free=free: free)
        latenttrain.fit(codes, **small, out=tmp_path / name)
    ours, theirs = ((tmp_path / name / "best.safetensors").read_bytes() for name in ("plain", "packed"))
    assert ours == theirs
    monkeypatch.setattr(streaming, "free_memory", lambda device: 8_000)
    result = latenttrain.fit(codes, **{**small, "epochs": 1}, out=tmp_path / "streamed")
    assert 0 <= result.top1 <= result.top5 <= 1


def test_this_machine_has_free_memory():
    assert 1 << 20 < free_memory(CPU) < 1 << 60


@pytest.mark.parametrize("prefix", ["memory.", "memory/memory."])
def test_a_containers_limit_counts(tmp_path, prefix):
    limit, usage = ("max", "current") if prefix == "memory." else ("limit_in_bytes", "usage_in_bytes")
    assert container_memory(tmp_path) == 1 << 63
    (tmp_path / "memory").mkdir()
    for name, text in ((limit, "3000"), (usage, "2500"), ("stat", "anon 700\ninactive_file 400\n")):
        (tmp_path / f"{prefix}{name}").write_text(text)
    assert container_memory(tmp_path) == 900
    (tmp_path / f"{prefix}{limit}").write_text("max")
    assert container_memory(tmp_path) == 1 << 63


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stream": True, "holdout": 0.2}, "stream cannot be combined with holdout, labels or latents"),
        ({"stream": True, "buffer": 0}, "buffer must be a whole number of 1 or more, got 0"),
        ({"stream": False, "buffer": 3}, "buffer needs stream"),
    ],
)
def test_settings_that_exclude_each_other_touch_nothing(codes, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        latenttrain.fit(codes, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_command_line_streams(latenttrain, codes, tmp_path, small_options):
    code, _, err = latenttrain("fit", codes, *small_options, "--stream", "--out", tmp_path / "run")
    assert code == 0, err
    assert read_config(tmp_path / "run").dataset["stream"] > 4
