"""Which device to compute on, and what it is good at."""

from __future__ import annotations

import torch

from .errors import SystemFault, UsageError, opt


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
        raise SystemFault(
            f"device '{name}' is not here: torch sees {have}", f"use {opt('device', 'auto')} or {opt('device', 'cpu')}"
        )
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (on CPUs: AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
