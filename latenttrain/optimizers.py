"""Optimizers: AdamW, and Muon for the filters with AdamW for all else.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): an update is replaced by the
nearest matrix with orthonormal rows or columns, so that directions which gradients seldom show are learned as fast as
the others. A convolution's filters are taken as one matrix, a row an output channel. What it is worth on codes is
recorded in ``benchmarks/records/net_search.md``.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values from 0.01 to 1 land in 0.7 to 1.2
_ITERATIONS = 5
_MOMENTUM = 0.9
ADAM_SHARE = 0.2  # AdamW's learning rate as a share of Muon's: their updates differ in size by about that


class Adam(torch.optim.AdamW):
    """AdamW, without decay on BatchNorm and biases; at no decay at all it is Adam.

    A group's learning rate is ``scale`` times the optimizer's, and ``momentum`` says that it is not AdamW's but Muon's.
    """

    def __init__(self, net: nn.Module, lr: float, weight_decay: float, **adam: Any) -> None:
        super().__init__(self.groups(net, weight_decay), lr=lr, **adam)
        self.set_lr(lr)

    @staticmethod
    def groups(net: nn.Module, weight_decay: float) -> list[dict]:
        matrices = [p for p in net.parameters() if p.ndim >= 2]
        vectors = [p for p in net.parameters() if p.ndim < 2]
        return [
            {"params": matrices, "momentum": 0.0, "weight_decay": weight_decay, "scale": 1.0},
            {"params": vectors, "momentum": 0.0, "weight_decay": 0.0, "scale": 1.0},
        ]

    def set_lr(self, lr: float) -> None:
        """The optimizer's learning rate; each group's follows."""
        for group in self.param_groups:
            group["lr"] = lr * group["scale"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients, which are gone afterwards."""
        super().step()
        self.zero_grad()


class Muon(Adam):
    """Muon on parameters of two or more dimensions but the last layer's; AdamW, without decay, on all others.

    lr: Muon's; AdamW's is `ADAM_SHARE` of it. weight_decay: of Muon's parameters and the last layer, a step times lr.
    """

    @staticmethod
    def groups(net: nn.Module, weight_decay: float) -> list[dict]:
        parameters = list(net.parameters())
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
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients, which are gone afterwards."""
        for group in self.param_groups:
            if group["momentum"]:
                self._muon_step(group)
        super().step()

    def _muon_step(self, group: dict) -> None:
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW's loading of states wants it
                state["velocity"] = torch.zeros_like(parameter)
            velocity = state["velocity"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(velocity, group["momentum"]).reshape(len(parameter), -1)  # Nesterov's
            alike[update.shape[0], update.shape[1]].append((parameter, update))
            parameter.grad = None  # AdamW passes over it
        for (rows, columns), pairs in alike.items():
            updates = orthogonalized(torch.stack([update for _, update in pairs]))
            size = max(1.0, rows / columns) ** 0.5  # the same change of the output for tall matrices as for wide ones
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * size)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1: f32 [n,a,b] -> f32 [n,a,b]

    By Newton and Schulz's iteration; values below about 0.01 of the largest stay smaller. What an iteration
    multiplies by is a polynomial of the Gram matrix, so all happens on that small symmetric matrix, and the given one
    is multiplied once, at the end: 0.4 of the FLOPs for 64 filters of 576 weights.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    gram, product = x @ x.mT, None
    for _ in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x


def make_optimizer(net: nn.Module, recipe: Recipe) -> Adam:
    """The recipe's optimizer on a network that is on its device already."""
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    if recipe.optimizer == "adam":
        return Adam(net, recipe.lr, recipe.weight_decay, fused=fused)
    return Muon(net, recipe.lr, recipe.weight_decay, betas=(0.9, 0.99), fused=fused)
