"""How a network runs on its device: in what precision, and so that a seed decides everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from latentprep.device import has_fast_bfloat16


def autocast(net: nn.Module, device: torch.device) -> Any:
    """bfloat16 where the hardware multiplies it faster than float32; elsewhere nothing changes.

    A network with strided depthwise convolutions stays in float32 on a CPU: oneDNN (torch 2.13) takes 7 to 80 times as
    long for their bfloat16 gradients.
    """
    if not has_fast_bfloat16(device) or (device.type == "cpu" and any(map(_strided_depthwise, net.modules()))):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _strided_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.stride) > 1


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """The same seed gives the same bits on the same machine inside; torch's global state is as before outside."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        torch.manual_seed(seed)
        yield


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it: before and after what is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
