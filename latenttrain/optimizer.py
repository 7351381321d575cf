"""Muon for the filters of the body, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .nets import Net
    from .recipe import Recipe

ADAMW_SHARE = 0.2  # AdamW's learning rate, as a fraction of Muon's
MOMENTS = {"Muon": ("momentum",), "AdamW": ("exp_avg", "exp_avg_sq")}  # state a parameter, of its shape


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose every step is made orthogonal, so that no direction of a layer's filters dominates.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Filters f32 [O,I,k,k] are a matrix [O, I k k];
    torch.optim.Muon takes matrices only.
    """

    def __init__(self, filters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.9) -> None:
        super().__init__(filters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                ahead = parameter.grad.add(momentum, alpha=group["momentum"])
                alike[parameter.shape].append((parameter, ahead.flatten(1)))
            for shape, members in alike.items():  # one batched product instead of many small ones
                steps = orthogonal(torch.stack([ahead for _, ahead in members]))
                steps *= max(1.0, steps.shape[1] / steps.shape[2]) ** 0.5
                for (parameter, _), step in zip(members, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(step.view(shape), alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values moved to about 1, by five Newton-Schulz steps: f32 [n,r,c] -> f32 [n,r,c]

    The quintic's coefficients are Jordan's: fast near zero, and not exact, from about 0.7 to 1.2, at the end.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def make_optimizers(net: Net, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for filters, AdamW for the rest: the stem, the first and the last layer, depthwise filters, scales, biases.

    Decay keeps weights from growing without bound under BatchNorm; scales and biases have no such freedom, and none.
    """
    parameters = list(net.parameters())
    filters = [p for p in parameters if p.ndim == 4]
    banks = {id(p) for p in filters[1:] if p.shape[1] > 1}
    others = [p for p in parameters if id(p) not in banks]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )
    return [Muon([p for p in filters if id(p) in banks], recipe.lr, recipe.weight_decay), adamw]


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """The learning rate of the next step: Muon's, of which AdamW takes its share."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr if isinstance(optimizer, Muon) else lr * ADAMW_SHARE
