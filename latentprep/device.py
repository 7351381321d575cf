"""Which device to compute on, what it is good at, and how tensors come there and back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from latentprep.errors import SystemFault, UsageError, opt


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
    """Whether this very device multiplies bfloat16 in hardware (CUDA: from Ampere on; CPUs: AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def queues(device: torch.device) -> bool:
    """Whether the host only queues work there, copies from and to pinned memory included: CUDA."""
    return device.type == "cuda"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one inside, on whose streams all is queued; elsewhere nothing changes."""
    return torch.cuda.device(device) if queues(device) else contextlib.nullcontext()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device. To CUDA from pinned memory, where nothing waits for the copy; all else waits: what
    is copied in passing from pageable memory may have changed before it is read (MPS)."""
    if not queues(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already, it is itself


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host, contiguous; those of a device by one transfer, so that the host waits once."""
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    away = {at: tensor for at, tensor in enumerate(tensors) if tensor.device.type != "cpu"}
    if away:
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in away.values()]).cpu()
        parts = flat.split([tensor.numel() * tensor.element_size() for tensor in away.values()])
        for (at, like), part in zip(away.items(), parts, strict=True):
            # cloned, since a view of another type must begin at a multiple of its size
            tensors[at] = part.clone().view(like.dtype).view(like.shape)
    return tensors


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """A user's autocast is off inside, which would compute in fewer bits what we ask in more."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


_full = threading.Lock()
_inside = 0  # of `full_float32`, in all threads
_before: tuple[str, bool, bool, dict[str, str]]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 products and convolutions in all 24 bits inside, whatever the user allows outside (TF32 has 11).

    For what decides codes, or the planes that a network reads. A user's autocast is off inside, and cuDNN tries no
    kernels out, which would take one today and another tomorrow. torch's flags are the process's, but for autocast's:
    while any thread is inside, other threads compute in full float32 too; the last that leaves puts the user's back.
    """
    global _inside, _before
    with _full:
        if not _inside:
            _before = _precision()
            _set_precision("highest", False, False, {})
        _inside += 1
    try:
        with without_autocast():
            yield
    finally:
        with _full:
            _inside -= 1
            if not _inside:
                _set_precision(*_before)


def _precision() -> tuple[str, bool, bool, dict[str, str]]:
    """What is allowed now: in products, in cuDNN's convolutions, trials of these; and as torch 2.9's newer flags say.

    Where a user set the newer flags otherwise than the older ones, torch refuses to read those; then the newer ones
    count, and the older ones must be what they are not.
    """
    backends = torch.backends
    newer = {name: holder.fp32_precision for name, holder in _newer_flags().items()}
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = "highest" if newer["matmul"] == "tf32" else "high"
    try:
        convolutions = bool(backends.cudnn.allow_tf32)
    except RuntimeError:
        convolutions = newer["conv"] != "tf32"
    return products, convolutions, backends.cudnn.benchmark, newer


def _set_precision(products: str, convolutions: bool, trials: bool, newer: dict[str, str]) -> None:
    """The older flags first, since setting them sets the newer ones too, and so leaves no contradiction."""
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cudnn.benchmark = trials
    for name, value in newer.items():
        _newer_flags()[name].fp32_precision = value


def _newer_flags() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before torch 2.9
        return {}
    return {"matmul": torch.backends.cuda.matmul, "conv": cudnn.conv, "rnn": cudnn.rnn}
