"""Batches for a loop of one's own: those of `fit`, each sample once, resumed to the batch."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

import latentprep
import latenttrain
from latentprep.errors import DatasetError, UsageError
from latenttrain import data, streaming
from latenttrain.loading import Batches

WAYS = {"memory": {}, "packed": {}, "streamed": {"stream": True, "buffer": 2}}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> dict:
    """Options with which codes are held in memory, packed, or streamed."""
    if request.param == "packed":
        monkeypatch.setattr(streaming, "fits", lambda *_, packed=False: packed)
    return WAYS[request.param]


def made(dataset, batch_size=33, **options) -> Batches:
    return latenttrain.batches(dataset, "train", batch_size, device="cpu", **options)


def known(batches) -> list[tuple[bytes, int]]:
    """Each sample, in order, as something that can be compared."""
    return [
        (bytes(one.numpy().tobytes()), int(label))
        for codes, labels in batches
        for one, label in zip(codes, labels, strict=True)
    ]


def test_an_epoch_shows_each_sample_once_with_its_label(codes, way):
    batches = made(codes, **way)
    loaded = latentprep.open(codes).load("train")
    expected = Counter(
        (one.tobytes(), int(label)) for one, label in zip(loaded.codes[:, 0], loaded.labels, strict=True)
    )
    orders = [known(batches) for _ in range(3)]
    assert all(Counter(order) == expected for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert batches.epoch == 3
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [29, 29, 29, 29, 28, 28, 28]
    assert len(batches) == len(sizes)


def test_they_are_those_that_fit_trains_on(make_dataset, tmp_path, monkeypatch):
    dataset = make_dataset(views=3)
    seen: list[list[torch.Tensor]] = []
    real = data.Split.training_rows

    def noted(split, batch_size, generator, epoch=0):
        for rows, labels in real(split, batch_size, generator, epoch):
            seen.append([split.codes_of(rows), labels])
            yield rows, labels

    with monkeypatch.context() as patch:
        patch.setattr(data.Split, "training_rows", noted)
        settings = {"width": 0.25, "depth": 0.5, "epochs": 2, "batch_size": 33}
        latenttrain.fit(dataset, **settings, seed=5, device="cpu", out=tmp_path / "run")
    batches = made(dataset, seed=5)
    own = [batch for _ in range(2) for batch in batches]
    assert len(own) == len(seen)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(own, seen, strict=True))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loop_goes_on_exactly_where_its_state_was_taken(odd, way, shuffle):
    whole = made(odd, **way, shuffle=shuffle, seed=1)
    expected = [known([batch]) for _ in range(3) for batch in whole]
    for done in (0, 1, 6, 7, 8, 13):
        first = made(odd, **way, shuffle=shuffle, seed=1)
        endless = itertools.chain.from_iterable(first for _ in range(3))
        begun = [known([batch]) for batch in itertools.islice(endless, done)]
        state = json.loads(json.dumps(first.state_dict()))
        second = made(odd, **way, shuffle=shuffle, seed=1)
        second.load_state_dict(state)
        assert second.state_dict() == state
        second.set_epoch(second.epoch)  # as a loop over epochs does
        rest = [known([batch]) for _ in range(3 - second.epoch) for batch in second]
        assert begun + rest == expected


def test_an_iteration_that_was_left_begins_anew(codes):
    batches = made(codes)
    first = known(itertools.islice(batches, 1))
    assert known(itertools.islice(batches, 1)) == first
    batches.set_epoch(4)
    other = known(batches)
    assert other[: len(first)] != first
    assert batches.epoch == 5
    batches.set_epoch(4)
    assert known(itertools.islice(batches, len(batches))) == other  # and no batch asked for after the last
    assert batches.epoch == 5
    assert known(batches) != other


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_get_disjoint_parts_of_each_batch(odd, way, shuffle):
    alone = made(odd, **way, shuffle=shuffle)
    ranks = [made(odd, **way, shuffle=shuffle, rank=rank, world_size=3) for rank in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        sizes = [len(labels) for _, labels in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([codes for codes, _ in parts]), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in parts]), whole[1])
    assert {len(batches) for batches in ranks} == {len(alone)}
    state = ranks[1].state_dict()
    alone.load_state_dict(state)  # with another number of ranks


def test_latents_are_what_the_codes_stand_for(codes):
    dataset = latentprep.open(codes)
    for (latents, _), (plain, _) in zip(made(codes, latents=True), made(codes), strict=True):
        assert latents.dtype == torch.float32
        assert np.allclose(latents.numpy(), dataset.quantizer.dequantize(plain.numpy()), atol=1e-6)


def test_without_views_view_0_alone_is_shown(make_dataset, way):
    dataset = make_dataset(views=3)
    loaded = latentprep.open(dataset).load("train").codes
    view_0 = {one.tobytes() for one in loaded[:, 0]}
    others = {one.tobytes() for one in loaded[:, 1:].reshape(-1, *loaded.shape[2:])}
    for _ in range(2):
        shown = [codes for codes, _ in known(made(dataset, **way))]
        assert len(view_0 & set(shown)) == len(others & set(shown)) == 100
    for options in ({"views": False}, {"shuffle": False}):
        assert {codes for codes, _ in known(made(dataset, **way, **options))} == view_0


def test_in_order_is_the_order_of_the_dataset(codes, way):
    loaded = latentprep.open(codes).load("val")
    batches = latenttrain.batches(codes, "val", 33, device="cpu", shuffle=False, **way)
    shown = list(batches)
    assert np.array_equal(torch.cat([one for one, _ in shown]).numpy(), loaded.codes[:, 0])
    assert np.array_equal(torch.cat([labels for _, labels in shown]).numpy(), loaded.labels)


def test_bad_values_are_named(codes, make_dataset):
    with pytest.raises(UsageError, match="has no split 'test'"):
        latenttrain.batches(codes, "test", device="cpu")
    with pytest.raises(UsageError, match="rank must be a whole number from 0 to 1, got 2"):
        made(codes, rank=2, world_size=2)
    with pytest.raises(UsageError, match="50 ranks cannot share a batch of 28 samples"):
        made(codes, rank=2, world_size=50)
    with pytest.raises(UsageError, match="batch_size must be"):
        made(codes, batch_size=1)
    with pytest.raises(UsageError, match="buffer needs stream"):
        made(codes, stream=False, buffer=2)
    with pytest.raises(DatasetError, match="missing"):
        made(make_dataset("partly", skip=("train", 1)))
    state = made(codes).state_dict()
    for change, words in (
        ({"seed": 3}, "seed was 3, and is 0"), ({"batch_size": 7}, "batch_size was 7"), ({"buffer": 4}, "buffer was 4"),
        ({"batch": 7}, "names batch 7 of epoch 0, and there is none"), ({"epoch": None}, "of epoch None"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            made(codes).load_state_dict({**state, **change})
    with pytest.raises(UsageError, match="of other batches"):
        made(codes).load_state_dict({})
