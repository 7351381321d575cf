"""How networks grow: EfficientNet's compound scaling (https://arxiv.org/abs/1905.11946)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latentprep.errors import check_number, opt
from latentprep.format import LatentDataset, open_dataset
from latenttrain.nets import NetConfig, build_net, count_flops, count_parameters

DEPTH_BASE, WIDTH_BASE, RESOLUTION_BASE = 1.2, 1.1, 1.15  # alpha, beta and gamma of the paper


class Compound(NamedTuple):
    """The three factors of one compound coefficient; FLOPs grow as ``depth * width**2 * resolution**2``."""

    width: float
    depth: float
    resolution: float


def compound(phi: float) -> Compound:
    """The factors at compound coefficient ``phi``: 1 at 0. Raises `UsageError` outside of -10 to 10."""
    check_number("phi", phi, -10, 10, f"use {opt('phi', 0)} for the network as it is")
    return Compound(WIDTH_BASE**phi, DEPTH_BASE**phi, RESOLUTION_BASE**phi)


def scale_table(
    dataset: str | Path | LatentDataset | None = None,
    phi: Sequence[float] = (0, 1, 2, 3),
    arch: str = "latentnet",
) -> list[dict]:
    """The network at each compound coefficient, for a dataset's latents or else for latents of 28 x 28 x 4.

    ``fit`` and ``encode`` take an entry's factors as ``width``, ``depth`` and ``phi``.
    Each entry: phi, width, depth, resolution, latent, parameters, flops; growth: FLOPs relative to phi 0; expected:
    ``depth * width**2 * resolution**2``, which differs because blocks, channels and cells are whole.

    Raises `UsageError` for a coefficient out of range.
    """
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
