"""How networks grow: EfficientNet's compound scaling (https://arxiv.org/abs/1905.11946), parameters and FLOPs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from latentprep.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from latenttrain.nets import Net

DEPTH_BASE, WIDTH_BASE, RESOLUTION_BASE = 1.2, 1.1, 1.15  # alpha, beta and gamma of the paper


class Compound(NamedTuple):
    """The three factors of one compound coefficient; FLOPs grow as ``depth * width**2 * resolution**2``."""

    width: float
    depth: float
    resolution: float


def compound(phi: float) -> Compound:
    """The factors at compound coefficient ``phi``; ``phi=0`` is the network as it stands."""
    if not (math.isfinite(phi) and -10 <= phi <= 10):
        raise UsageError(f"phi must be a number from -10 to 10, got {phi}", "use --phi 0 for the network as it stands")
    return Compound(WIDTH_BASE**phi, DEPTH_BASE**phi, RESOLUTION_BASE**phi)


def round_width(channels: int, width: float, divisor: int = 8) -> int:
    """``channels * width`` to the nearest multiple of ``divisor``, never below 90% of it (EfficientNet's rule)."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_depth(blocks: int, depth: float) -> int:
    """``blocks * depth``, rounded up (EfficientNet's rule), so that no stage ever loses its last block."""
    return math.ceil(round(blocks * depth, 6))  # 6 digits: 5 * 1.2 is 6 blocks, whatever binary fractions say


def count_parameters(net: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def count_flops(net: Net) -> int:
    """Forward FLOPs of one sample as torch counts them: convolutions and matrix products only.

    A multiply-add is 2 FLOPs. A training step costs about three times as many (forward, and both gradients); torch
    2.13's own count of it overlooks groups, and comes to twenty times as many for depthwise convolutions.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(net.parameters()).device
    codes = torch.zeros(1, *net.config.latent, dtype=torch.uint8, device=device)
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(codes)
    finally:
        net.train(training)
    return counter.get_total_flops()
