"""Where a network runs, and in what precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from latentprep.errors import SystemFault, UsageError


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU; or name one: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises `UsageError` for a name that is no device, `SystemFault` for a device that this machine does not have.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device '{name}'", "use auto, cpu, cuda, cuda:0 … or mps")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts[device.type]:
        have = f"{counts['cuda']} CUDA devices" if device.type == "cuda" else "no MPS device"
        raise SystemFault(f"device '{name}' is not here: torch sees {have}", "use --device auto or --device cpu")
    return device


def autocast(device: torch.device) -> Any:
    """bfloat16 where the hardware multiplies it faster than float32; elsewhere nothing changes."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


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
