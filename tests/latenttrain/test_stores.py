"""Training knows no store: the same samples in either give the same numbers."""

import json

import pytest
import torch

import latentprep
import latenttrain
from latentprep.format import open_dataset
from latenttrain.streaming import StreamedSplit


@pytest.fixture(scope="module")
def both(tmp_path_factory, codes):
    """The same 200 + 70 samples in both stores: four shards and two, the last ones odd."""
    root = tmp_path_factory.mktemp("stores")
    latentprep.convert(codes, out=root / "wds", store="wds")
    return codes, root / "wds"


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("stream", [False, True])
def test_fit_and_eval_give_the_same_numbers(both, tmp_path, small, stream):
    for dataset, run in zip(both, ("zarr", "wds"), strict=True):
        latenttrain.fit(dataset, **small, stream=stream, out=tmp_path / run)
    assert numbers(tmp_path / "zarr") == numbers(tmp_path / "wds")
    weights = [(tmp_path / run / "best.safetensors").read_bytes() for run in ("zarr", "wds")]
    assert weights[0] == weights[1]
    results = [latenttrain.evaluate(tmp_path / "zarr", dataset) for dataset in both]
    assert results[0].top1 == results[1].top1
    assert results[0].loss == results[1].loss


@pytest.mark.parametrize("threads", [1, 16])  # 16: fewer shards than workers
def test_tars_stream_every_sample_once_whatever_the_threads(make_dataset, threads):
    dataset = open_dataset(make_dataset(store="wds", rows={"train": 129, "val": 3}, views=2))
    streamed = StreamedSplit(dataset, "train", torch.device("cpu"), threads=threads)
    codes = torch.cat([found for found, _ in streamed.batches(10)])
    assert torch.equal(codes, torch.from_numpy(dataset.load("train").codes[:, 0]))
    drawn = torch.cat([labels for _, labels in streamed.training_batches(16, torch.Generator().manual_seed(0))])
    assert len(drawn) == 129
    again = torch.cat([labels for _, labels in streamed.training_batches(16, torch.Generator().manual_seed(0))])
    assert torch.equal(drawn, again)
