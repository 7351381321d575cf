import pytest
from torch import nn

from latentprep.errors import UsageError
from latenttrain.nets import NetConfig, build_net, count_flops, count_parameters, round_depth, round_width
from latenttrain.scaling import compound


def net(width=1.0, depth=1.0, grid=28):
    return build_net(NetConfig((4, grid, grid), 10, 4, (-2.0,) * 4, (0.25,) * 4, width=width, depth=depth))


@pytest.mark.parametrize(
    ("channels", "width", "rounded"),
    [(32, 1, 32), (32, 1.1, 32), (32, 1.2, 40), (16, 0.25, 8), (24, 0.25, 8), (64, 2, 128)],
)
def test_round_width_as_efficientnet_does(channels, width, rounded):
    assert round_width(channels, width) == rounded


def test_round_width_never_loses_more_than_a_tenth():
    for channels in range(8, 200, 4):
        for width in (0.25, 0.5, 0.75, 1.0, 1.1, 1.4, 2.0):
            rounded = round_width(channels, width)
            assert rounded % 8 == 0
            assert rounded >= 0.9 * channels * width


@pytest.mark.parametrize(("blocks", "depth", "rounded"), [(2, 1, 2), (2, 1.2, 3), (5, 1.2, 6), (3, 0.1, 1), (3, 2, 6)])
def test_round_depth_rounds_up(blocks, depth, rounded):
    assert round_depth(blocks, depth) == rounded


def test_compound_is_the_papers():
    assert compound(0) == (1, 1, 1)
    assert compound(2) == pytest.approx((1.21, 1.44, 1.3225))
    with pytest.raises(UsageError, match="phi"):
        compound(float("nan"))


def test_flops_count_a_multiply_add_as_two():
    class OneConvolution(nn.Conv2d):
        config = NetConfig((4, 8, 8), 2, 4, (0.0,) * 4, (1.0,) * 4)

        def forward(self, codes):
            return super().forward(codes.float())

    assert count_flops(OneConvolution(4, 6, 3, padding=1)) == 2 * 8 * 8 * 4 * 6 * 9


def test_flops_grow_with_resolution_squared():
    assert count_flops(net(grid=56)) / count_flops(net()) == pytest.approx(4, rel=0.01)


def test_flops_grow_with_width_squared():
    """All but the first convolution, whose inputs are the latent's channels."""
    assert count_flops(net(width=2)) / count_flops(net()) == pytest.approx(4, rel=0.1)


def test_flops_grow_with_depth():
    """Whole blocks: twice the depth doubles every stage's blocks, of which the first costs a little less or more."""
    assert count_flops(net(depth=2)) / count_flops(net()) == pytest.approx(2, rel=0.2)


def test_flops_grow_as_compound_scaling_says():
    """phi where channels and blocks round well: width 2, depth 4, grid doubled."""
    grown = count_flops(net(width=2, depth=4, grid=56)) / count_flops(net())
    assert grown == pytest.approx(4 * 4 * 4, rel=0.3)


def test_counting_leaves_the_network_as_it_was():
    one = net(grid=8).train()
    statistics = [buffer.clone() for buffer in one.buffers()]
    count_flops(one)
    assert one.training
    assert all((old == new).all() for old, new in zip(statistics, one.buffers(), strict=True))


def test_frozen_parameters_count_too():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 8
