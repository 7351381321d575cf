"""Optimizers: AdamW, and Muon for the filters with AdamW for all else.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): an update is replaced by the
nearest matrix with orthonormal rows or columns, so that directions which gradients seldom show are learned as fast as
the others. A convolution's filters are one matrix, with a row per output channel. Its gain on codes is measured in
``benchmarks/records/net_search.md``.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, nn

from latenttrain.recipe import Recipe

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values from 0.01 to 1 land in 0.7 to 1.2
_ITERATIONS = 5
_MOMENTUM = 0.9
ADAM_SHARE = 0.2  # AdamW's learning rate as a share of Muon's: their updates differ in size by about that


class Adam(torch.optim.AdamW):
    """AdamW, without decay on BatchNorm and biases; with a decay of 0 it is Adam.

    A group's learning rate is ``scale`` times the optimizer's; a group with ``momentum`` is Muon's.
    """

    def __init__(self, net: nn.Module, lr: float, weight_decay: float, **adam: Any) -> None:
        super().__init__(self.groups(net, weight_decay), lr=lr, **adam)
        self.set_lr(lr)

    @staticmethod
    def groups(net: nn.Module, weight_decay: float) -> list[dict]:
        matrices = [p for p in learned(net) if p.ndim >= 2]
        vectors = [p for p in learned(net) if p.ndim < 2]
        return [
            {"params": matrices, "momentum": 0.0, "weight_decay": weight_decay, "scale": 1.0},
            {"params": vectors, "momentum": 0.0, "weight_decay": 0.0, "scale": 1.0},
        ]

    def set_lr(self, lr: float) -> None:
        """The optimizer's learning rate; each group's follows."""
        for group in self.param_groups:
            group["lr"] = lr * group["scale"]

    @torch.no_grad()
    def step(self, pool: Executor | None = None) -> None:  # type: ignore[override]
        """One step from the gradients, which are then cleared. pool: threads that may help; the result is the same."""
        super().step()
        self.zero_grad()


class Muon(Adam):
    """Muon on parameters of two or more dimensions but the last layer's; AdamW, without decay, on all others.

    lr: Muon's; AdamW's is `ADAM_SHARE` of it. weight_decay: of Muon's parameters and the last layer, a step times lr.
    """

    @staticmethod
    def groups(net: nn.Module, weight_decay: float) -> list[dict]:
        parameters = learned(net)
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
        head = {id(layer.weight) for layer in last}
        filters = [p for p in parameters if p.ndim >= 2 and id(p) not in head and p.numel() > p.shape[0]]
        muon = {id(p) for p in filters}
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in muon]
        vectors = [p for p in parameters if p.ndim < 2]
        groups = [
            {"params": filters, "momentum": _MOMENTUM, "weight_decay": weight_decay, "scale": 1.0},
            {"params": matrices, "momentum": 0.0, "weight_decay": weight_decay, "scale": ADAM_SHARE},
            {"params": vectors, "momentum": 0.0, "weight_decay": 0.0, "scale": ADAM_SHARE},
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def step(self, pool: Executor | None = None) -> None:  # type: ignore[override]
        """One step from the gradients, which are then cleared. pool: threads that may help; the result is the same."""
        for group in self.param_groups:
            if group["momentum"]:
                self._muon_step(group, pool)
        super().step()

    def _muon_step(self, group: dict, pool: Executor | None) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros(())  # AdamW's loading of states wants it
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters]
        velocities = [self.state[p]["velocity"] for p in parameters]
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, velocities, group["momentum"])  # Nesterov's
        directions = orthogonalized([_rows(update) for update in updates], pool)
        for direction in directions:  # the same change of the output for tall matrices as for wide ones
            direction.mul_(max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shaped = [_unrows(d, p.shape) for d, p in zip(directions, parameters, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=-group["lr"])
        for parameter in parameters:
            parameter.grad = None  # AdamW passes over it


def learned(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _rows(weights: Tensor) -> Tensor:
    """f32 [a,...] -> f32 [a,b], a row per output channel, columns in the order of channels-last filters in memory."""
    return (weights.permute(0, 2, 3, 1) if weights.ndim == 4 else weights).flatten(1)


def _unrows(rows: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `_rows`."""
    if len(shape) != 4:
        return rows.view(shape)
    return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def orthogonalized(matrices: list[Tensor], pool: Executor | None = None) -> list[Tensor]:
    """Each matrix with its singular values brought near 1: f32 [a,b] each -> f32 [a,b] each

    By Newton and Schulz's iteration; values below about 0.01 of the largest stay smaller. What an iteration
    multiplies by is a polynomial of the Gram matrix on the shorter side, so all happens on those small symmetric
    matrices, all of one size at once, and the given ones are multiplied once, at the end. pool: takes sizes, in turn.
    """
    alike: dict[int, list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        alike[min(matrix.shape)].append(place)

    def work(places: list[int]) -> list[Tensor]:
        chosen = [matrices[place] for place in places]
        with torch.no_grad():  # which is a thread's own matter
            grams = torch.stack([m.mT @ m if m.shape[0] > m.shape[1] else m @ m.mT for m in chosen])
            norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt() + 1e-7
            factors = _newton_schulz(grams / norms.square()[:, None, None]) / norms[:, None, None]
            return [m @ f if m.shape[0] > m.shape[1] else f @ m for m, f in zip(chosen, factors, strict=True)]

    result = list(matrices)
    groups = [alike[size] for size in sorted(alike, reverse=True)]  # the longest work first
    for places, made in zip(groups, (pool.map if pool else map)(work, groups), strict=True):
        for place, matrix in zip(places, made, strict=True):
            result[place] = matrix
    return result


def _newton_schulz(gram: Tensor) -> Tensor:
    """What a matrix of norm 1 is to be multiplied by, from its Gram matrix: f32 [n,a,a] -> f32 [n,a,a]"""
    a, b, c = _NEWTON_SCHULZ
    product = None
    for iteration in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration < _ITERATIONS - 1:
            gram = factor @ (gram @ factor)
    assert product is not None
    return product


def make_optimizer(net: nn.Module, recipe: Recipe) -> Adam:
    """The recipe's optimizer on a network that is on its device already."""
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    if recipe.optimizer == "adam":
        return Adam(net, recipe.lr, recipe.weight_decay, fused=fused)
    return Muon(net, recipe.lr, recipe.weight_decay, betas=(0.9, 0.99), fused=fused)
