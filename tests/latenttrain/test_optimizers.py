from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from latenttrain.optimizers import ADAM_SHARE, Muon, orthogonalized


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if shape[1] == shape[2]:
        matrices += 2 * torch.eye(shape[1])  # a square random matrix may be nearly singular
    found = torch.stack(orthogonalized(list(matrices * 1e-3)))
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = left @ right
    alike = torch.nn.functional.cosine_similarity(found.flatten(1), nearest.flatten(1))
    assert alike.min() > 0.95


def test_matrices_are_orthogonalized_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((8, 40), (40, 8), (6, 6), (8, 20))]
    together = orthogonalized(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalized([matrix])[0])


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)]
    return nn.Sequential(*layers)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(48, 2, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0).long() + (images[:, 0, 2, 2] > 0).long()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_learns_and_leaves_no_gradient() -> None:
    net = small_net()
    optimizer = Muon(net, lr=0.02, weight_decay=0.05)
    first = train(net, optimizer, 1)
    assert train(net, optimizer, 40) < 0.3 * first
    assert all(parameter.grad is None for parameter in net.parameters())


def test_filters_take_muon_and_the_rest_adamw() -> None:
    net = small_net()
    optimizer = Muon(net, lr=0.02, weight_decay=0.05)
    train(net, optimizer, 1)
    kinds = {name: set(optimizer.state[p]) for name, p in net.named_parameters()}
    assert kinds["0.weight"] == kinds["3.weight"] == {"step", "velocity"}
    assert all("exp_avg" in kinds[name] for name in ("0.bias", "1.weight", "5.weight", "5.bias"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all((decay[id(p)] > 0) == (p.ndim >= 2) for p in net.parameters())
    optimizer.set_lr(1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, ADAM_SHARE}


def test_the_layout_of_filters_does_not_matter() -> None:
    nets = [small_net(), small_net().to(memory_format=torch.channels_last)]
    first, other = ([layer for layer in net if isinstance(layer, nn.Conv2d)] for net in nets)
    assert first[1].weight.stride() != other[1].weight.stride()
    for net in nets:
        train(net, Muon(net, lr=0.02, weight_decay=0.05), 1)
    for one, two in zip(first, other, strict=True):
        torch.testing.assert_close(one.weight, two.weight, atol=1e-4, rtol=1e-4)


def test_its_state_resumes_exactly() -> None:
    whole, half = small_net(), small_net()
    one = Muon(whole, lr=0.02, weight_decay=0.05)
    train(whole, one, 3)
    two = Muon(half, lr=0.02, weight_decay=0.05)
    half.load_state_dict(whole.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    train(whole, one, 3)
    train(half, two, 3)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)
