"""Training knows no store: the same samples in any give the same numbers."""

import json

import pytest
import torch

import latentprep
import latenttrain
from latentprep.format import open_dataset
from latenttrain.streaming import StreamedSplit

OTHERS = ("wds", "parquet")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, codes):
    """The same 200 + 70 samples in each store: four shards and two, the last ones odd."""
    root = tmp_path_factory.mktemp("stores")
    made = {store: latentprep.convert(codes, out=root / store, store=store).out for store in OTHERS}
    return {"zarr": codes, **made}


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("stream", [False, True])
def test_fit_and_eval_give_the_same_numbers(stores, tmp_path, small, stream):
    found = {}
    for store, dataset in stores.items():
        latenttrain.fit(dataset, **small, stream=stream, out=tmp_path / store)
        result = latenttrain.evaluate(tmp_path / "zarr", dataset)
        weights = (tmp_path / store / "best.safetensors").read_bytes()
        found[store] = numbers(tmp_path / store), weights, result.top1, result.loss
    for store in OTHERS:
        assert found[store] == found["zarr"]


@pytest.mark.parametrize("store", OTHERS)
@pytest.mark.parametrize("threads", [1, 16])  # 16: fewer shards than workers
def test_every_sample_is_streamed_once_whatever_the_threads(make_dataset, threads, store):
    dataset = open_dataset(make_dataset(store=store, rows={"train": 129, "val": 3}, views=2))
    streamed = StreamedSplit(dataset, "train", torch.device("cpu"), threads=threads)
    codes = torch.cat([found for found, _ in streamed.batches(10)])
    assert torch.equal(codes, torch.from_numpy(dataset.load("train").codes[:, 0]))
    drawn = torch.cat([labels for _, labels in streamed.training_batches(16, torch.Generator().manual_seed(0))])
    assert len(drawn) == 129
    again = torch.cat([labels for _, labels in streamed.training_batches(16, torch.Generator().manual_seed(0))])
    assert torch.equal(drawn, again)
