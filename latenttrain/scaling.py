"""How networks grow: EfficientNet's compound scaling (https://arxiv.org/abs/1905.11946), parameters and FLOPs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from latentprep.errors import UsageError, opt

if TYPE_CHECKING:
    from torch import nn

    from latentprep.format import LatentDataset
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
        raise UsageError(
            f"phi must be a number from -10 to 10, got {phi}", f"use {opt('phi', 0)} for the network as it stands"
        )
    return Compound(WIDTH_BASE**phi, DEPTH_BASE**phi, RESOLUTION_BASE**phi)


def numbers(option: str, text: str) -> list[float]:
    """``0..3`` or ``1-8`` (whole steps), or ``0,1,2.5`` -> the numbers. `UsageError` naming the option for all else."""
    try:
        if found := re.fullmatch(r"(\d+)(?:\.\.|-)(\d+)", text.strip()):
            first, last = map(int, found.groups())
            if not first <= last <= first + 1000:
                raise ValueError
            return [float(number) for number in range(first, last + 1)]
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} must be like 0..3 or 0,1,3, got {text!r}", f"use {option} 1..3") from None


def scale_table(
    dataset: str | Path | LatentDataset | None = None,
    phi: Sequence[float] = (0, 1, 2, 3),
    arch: str = "latentnet",
) -> list[dict]:
    """What the network becomes at each compound coefficient, for a dataset's latents or else 28 x 28 x 4 ones.

    Each entry: phi, width, depth, resolution, latent, parameters, flops; growth: of the FLOPs since phi 0, and
    expected: what ``depth * width**2 * resolution**2`` says, which whole blocks, channels and cells only come near.
    """
    from latentprep.format import open_dataset
    from latenttrain.nets import NetConfig, build_net

    latent, classes = (4, 28, 28), 10
    if dataset is not None:
        manifest = open_dataset(dataset).manifest
        latent, classes = manifest.latent, max(2, len(manifest.classes))

    def row(phi: float) -> dict:
        factors = compound(phi)
        height, width = (max(8, round(side * factors.resolution)) for side in latent[1:])
        grown = latent[0], height, width
        plain = (0.0,) * latent[0], (1.0,) * latent[0]
        net = build_net(NetConfig(grown, classes, 4, *plain, arch, width=factors.width, depth=factors.depth))
        expected = factors.depth * factors.width**2 * factors.resolution**2
        return {
            "phi": phi, **factors._asdict(), "latent": grown, "parameters": count_parameters(net),
            "flops": count_flops(net), "expected": expected,
        }  # fmt: skip

    base = row(0)["flops"]
    return [{**entry, "growth": entry["flops"] / base} for entry in map(row, phi)]


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
