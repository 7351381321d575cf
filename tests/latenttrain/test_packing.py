import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprep.device import code_tensor
from latentprep.format import Quantizer, open_dataset
from latentprep.format.packing import packed_bytes
from latentprep.format.quantizer import Codebook, code_dtype
from latenttrain.data import load_split
from latenttrain.packed import pack, unpack
from latenttrain.streaming import StreamedSplit

CPU = torch.device("cpu")


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 16), rows=st.integers(0, 3), count=st.integers(1, 40), seed=st.integers(0, 1 << 20))
def test_unpacking_undoes_packing(bits, rows, count, seed):
    values = np.random.default_rng(seed).integers(1 << bits, size=(rows, count), dtype=code_dtype(bits))
    packed = pack(code_tensor(values), bits)
    assert packed.shape == (rows, packed_bytes(count, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), code_tensor(values))


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed_codes_are_their_bits_in_a_row_lowest_first(bits):
    codes = np.random.default_rng(bits).integers(1 << bits, size=(1, 16), dtype=code_dtype(bits))
    in_a_row = np.unpackbits(codes[0, :, None].view(np.uint8), axis=1, count=bits, bitorder="little").ravel()
    expected = np.packbits(in_a_row, bitorder="little")
    assert pack(code_tensor(codes), bits)[0].tolist() == expected.tolist()
    assert len(expected) == 2 * bits


def of_three(bits):
    """A quantizer of three channels; of more than 8 bits, codes are tokens."""
    if not isinstance(bits, int):
        return Quantizer(max(bits), (0.0,) * 3, (1.0,) * 3, channel_bits=bits)
    if bits > 8:
        return Codebook.of_tables([np.zeros((600, 1), np.float32)] * 3)
    return Quantizer(bits, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(("bits", "size"), [(1, 10), (3, 30), (4, 40), (7, 70), ((4, 0, 1), 16), (10, 100)])
def test_a_packed_split_gives_the_same_batches_as_a_plain_one(make_dataset, bits, size):
    dataset = open_dataset(make_dataset(quantizer=of_three(bits), views=2, latent=(3, 5, 5)))
    plain, streamed = load_split(dataset, "train", CPU), StreamedSplit(dataset, "train", CPU)
    packed = streamed.packed()
    assert packed.codes.shape == (200, 2, size)
    for ways in (
        lambda split: split.training_batches(32, torch.Generator().manual_seed(1)),
        lambda split: split.batches(33),
    ):
        for ours, theirs in zip(ways(packed), ways(plain), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    assert packed.classes() == plain.classes()
    for ours, theirs in zip(streamed.batches(33), plain.batches(33), strict=True):
        assert torch.equal(ours[0], theirs[0])
    epochs = [list(split.training_batches(32, torch.Generator().manual_seed(1))) for split in (streamed, plain)]
    assert len({sum(int(codes.sum()) for codes, _ in epoch) for epoch in epochs}) == 1
    assert {codes.dtype for epoch in epochs for codes, _ in epoch} == {torch.int32 if bits == 10 else torch.uint8}
