import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentprep.errors import DatasetError, UsageError
from latentprep.format import open_dataset
from latenttrain.data import (
    Split,
    batches_per_epoch,
    check_classes,
    check_trainable,
    cut,
    load_split,
    view_shown,
)

CPU = torch.device("cpu")


def numbered(samples, views=1):
    """A split in which code [i,v] is i everywhere and label is v's sample."""
    codes = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1, 1).repeat(1, views, 2, 3, 3)
    codes[:, :, 1] = torch.arange(views, dtype=torch.uint8).view(1, -1, 1, 1)
    return Split(codes, torch.arange(samples))


def epoch(split, batch_size, seed=0):
    return list(split.training_batches(batch_size, torch.Generator().manual_seed(seed)))


def test_a_split_is_one_tensor_of_codes_as_they_were_written(codes):
    split = load_split(open_dataset(codes), "train", CPU)
    assert split.codes.shape == (200, 1, 3, 8, 8)
    assert (split.codes.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(split.codes, torch.from_numpy(open_dataset(codes).load("train").codes))


def test_rows_that_could_not_be_read_are_left_out(make_dataset):
    split = load_split(open_dataset(make_dataset(invalid=9)), "train", CPU)
    assert len(split) == 191
    assert split.labels.min() == 0


def test_view_0_alone_takes_the_place_of_one_view(make_dataset):
    dataset = open_dataset(make_dataset(views=3))
    whole = load_split(dataset, "val", CPU)
    first = load_split(dataset, "val", CPU, views=False)
    assert whole.codes.shape[1] == 3
    assert torch.equal(first.codes, whole.codes[:, :1])
    assert first.codes.untyped_storage().nbytes() == first.codes.numel()


def test_a_limit_keeps_so_many_of_every_class(codes):
    split = load_split(open_dataset(codes), "train", CPU, limit=50)
    assert len(split) == 50
    assert split.labels.bincount().min() >= 8


def test_an_epoch_shows_every_sample_once_whatever_the_batch():
    for batch_size in (2, 5, 10):
        labels = torch.cat([labels for _, labels in epoch(numbered(20), batch_size)])
        assert labels.sort().values.tolist() == list(range(20))


def test_labels_stay_with_their_codes():
    for codes, labels in epoch(numbered(20), 5):
        assert codes.shape == (5, 2, 3, 3)
        assert torch.equal(codes[:, 0, 0, 0], labels.to(torch.uint8))


@pytest.mark.parametrize("size", [2, 5, 8, 21, 22, 128])
def test_every_sample_comes_once_an_epoch_in_batches_of_nearly_equal_size(size):
    batches = epoch(numbered(22), size)
    assert [len(labels) for _, labels in batches] == list(cut(22, -(-22 // size)))
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(22))


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_pieces_differ_by_one_at_most_and_the_larger_ones_come_first(samples, pieces):
    sizes = cut(samples, pieces)
    assert (len(sizes), sum(sizes)) == (pieces, samples)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_fewer_samples_than_a_batch_make_one_batch():
    (batch,) = epoch(numbered(3), 128)
    assert sorted(batch[1].tolist()) == [0, 1, 2]
    assert batches_per_epoch(3, 128) == 1


def test_the_generator_alone_decides_the_order():
    first, again, other = (torch.cat([labels for _, labels in epoch(numbered(64), 8, seed)]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 40))
def test_every_other_epoch_shows_view_0_and_no_view_comes_twice_before_all_came(views, first, samples):
    numbers = torch.arange(samples)
    others = max(1, views - 1)
    shown = torch.stack([view_shown(numbers, epoch, views) for epoch in range(first, first + 2 * others)])
    assert np.array_equal(
        shown.numpy(), np.stack([view_shown(numbers.numpy(), e, views) for e in range(first, first + 2 * others)])
    )
    for sample in shown.T:
        assert sample.bincount(minlength=views).tolist() == ([others] + [1] * others if views > 1 else [2])
    for epoch in shown:
        assert abs(int((epoch == 0).sum()) - int((epoch > 0).sum())) <= 1 or views == 1


def test_the_view_that_an_epoch_shows_comes_with_its_sample():
    split = numbered(21, views=4)
    for number in range(3):
        for codes, labels in split.training_batches(5, torch.Generator().manual_seed(number), number):
            assert codes[:, 1, 0, 0].tolist() == view_shown(labels, number, 4).tolist()


def test_evaluation_sees_view_0_of_every_sample_in_order():
    batches = list(numbered(7, views=3).batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    assert all(codes[:, 1].max() == 0 for codes, _ in batches)


def test_an_open_dataset_is_taken_as_it_is(codes):
    dataset = open_dataset(codes)
    assert open_dataset(dataset) is dataset
    assert open_dataset(str(codes)).root == codes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": {"train": 60}}, "no split 'val'"),
        ({"classes": ["apple"]}, "one class only, 'apple'"),
        ({"skip": ("val", 1)}, "shards of split 'val' are missing"),
    ],
)
def test_datasets_that_cannot_be_trained_on_are_refused(make_dataset, changes, words):
    with pytest.raises(DatasetError, match=words) as caught:
        check_trainable(open_dataset(make_dataset(**changes)))
    assert caught.value.hint


def test_samples_of_one_class_under_a_list_of_four_are_refused(codes):
    dataset = open_dataset(codes)
    check_classes(dataset, load_split(dataset, "train", CPU, limit=3))
    with pytest.raises(DatasetError, match="all 5 training samples are of one class, 'cedar'"):
        check_classes(dataset, Split(torch.zeros(5, 1, 3, 8, 8, dtype=torch.uint8), torch.full((5,), 2)))


def test_a_split_without_a_valid_sample_is_refused(make_dataset):
    dataset = open_dataset(make_dataset(rows={"train": 40, "val": 40}, invalid=40))
    with pytest.raises(DatasetError, match="no valid sample"):
        load_split(dataset, "train", CPU)


@pytest.mark.parametrize("limit", [1, 0, -5])
def test_a_limit_below_2_is_refused(codes, limit):
    with pytest.raises(UsageError, match=f"limit must be a whole number of 2 or more, got {limit}"):
        load_split(open_dataset(codes), "train", CPU, limit=limit)
