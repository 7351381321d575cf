"""Networks as others would write them, which the tests install: one that is trained, and some that cannot be."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Not an `nn.Sequential`: two convolutions beside each other, and torch's own BatchNorm."""

    def __init__(self, planes: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(planes, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(16, classes)

    def forward(self, planes: Tensor) -> Tensor:
        features = self.first(planes)
        features = torch.relu(self.wide(features) + self.narrow(features))
        return self.head(self.drop(features.mean((2, 3))))


def small(planes: int, config: Any) -> nn.Module:
    return Small(planes, config.classes)


def faulty(planes: int, config: Any, *, change: str) -> nn.Module:
    net: Any = Small(planes, config.classes)
    if change == "dropout":
        net.drop.p = 0.5
    elif change == "norm":
        net.first[1] = nn.SyncBatchNorm(16)
    elif change == "momentum":
        net.first[1].momentum = 0.01
    elif change == "classes":
        net.head = nn.Linear(16, 3)
    elif change == "planes":
        net.first[0] = nn.Conv2d(99, 16, 3)
    elif change == "unused":
        net.more = nn.Linear(2, 2)
    elif change == "nothing":
        return None  # type: ignore[return-value]
    return net


CHANGES = ("dropout", "norm", "momentum", "classes", "planes", "unused", "nothing")
for change in CHANGES:
    globals()[change] = partial(faulty, change=change)


def headless(planes: int, config: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(planes, config.classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def half_frozen(planes: int, config: Any) -> nn.Module:
    net: Any = Small(planes, config.classes)
    nn.init.constant_(net.first[0].weight, 1 / 27)
    net.first.requires_grad_(False)
    return net
