"""Choosing a device, what it supports, moving tensors to it and back, and batches that fit in its memory."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.errors import SystemFault, UsageError, opt

_SAYINGS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
NOT_ON_DEVICE = f"use {opt('device', 'cpu')}"  # always works, but slowly


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU; or name one: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises `UsageError` for an unknown name, `SystemFault` for a device that this machine does not have.
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
            f"device '{name}' is not available: torch sees {have}",
            f"use {opt('device', 'auto')} or {opt('device', 'cpu')}",
        )
    return device


MAX_PROCESSES = 256  # on one machine


def parse_devices(names: str) -> list[torch.device]:
    """Several devices, one for each process: ``all`` CUDA devices, those of numbers ``0,1``, or the CPU N times, as
    ``cpu:N``.

    Raises `UsageError` for anything else, `SystemFault` for a device that this machine does not have.

    >>> parse_devices("cpu:2")
    [device(type='cpu'), device(type='cpu')]
    """
    processes = re.fullmatch(r"cpu:(\d{1,4})", names.strip())
    numbers = re.fullmatch(r"\d{1,4}(,\d{1,4})*", names.strip())
    if processes and 1 <= int(processes[1]) <= MAX_PROCESSES:
        return [torch.device("cpu")] * int(processes[1])
    if names.strip() != "all" and not numbers:
        raise UsageError(
            f"{opt('devices')} must be all, numbers such as 0,1, or cpu:N, got {names!r:.60}",
            f"N, of processes that share the cores, is 1 to {MAX_PROCESSES}",
        )
    there = torch.cuda.device_count()
    chosen = list(map(int, numbers[0].split(","))) if numbers else list(range(there))
    if twice := [number for number in chosen if chosen.count(number) > 1]:
        raise UsageError(f"{opt('devices')} names device {twice[0]} twice, got {names!r:.60}", "name each once")
    if not chosen or max(chosen) >= there:
        raise SystemFault(
            f"{opt('devices')} {names} is not available: torch sees {there} CUDA devices",
            f"use {opt('devices', 'cpu:2')} for processes on the CPU",
        )
    return [torch.device("cuda", number) for number in chosen]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware (CUDA: Ampere or newer; CPUs: AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def device_name(device: torch.device) -> str:
    """What a record says of the device that made a shard: such as "cuda: NVIDIA H100", and nothing for CPUs."""
    if device.type == "cpu":
        return ""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def queues(device: torch.device) -> bool:
    """Whether the device works asynchronously, as CUDA does: the host only queues work, and pinned copies too."""
    return device.type == "cuda"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, so that work is queued on its streams. Does nothing for other devices."""
    return torch.cuda.device(device) if queues(device) else contextlib.nullcontext()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device. Copies to CUDA start from pinned memory and do not block. All others block: an
    asynchronous copy from pageable memory (MPS) may read the tensor after it has changed."""
    if not queues(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # no copy if it is pinned already


def code_tensor(codes: np.ndarray) -> Tensor:
    """Codes as torch computes on them: u8 as they are, without a copy, u16 as `torch_dtype` says."""
    return torch.from_numpy(codes).to(torch_dtype(codes.dtype))


def torch_dtype(codes: np.dtype) -> torch.dtype:
    """The type of tensors of codes that numpy has in this type: u8 for u8, and i32 for u16, which torch neither shifts
    nor compares nor gathers."""
    return torch.uint8 if codes == np.uint8 else torch.int32


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the host, contiguous. Those on a device come in one transfer, so that the host waits once."""
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    away = {at: tensor for at, tensor in enumerate(tensors) if tensor.device.type != "cpu"}
    if away:
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in away.values()]).cpu()
        parts = flat.split([tensor.numel() * tensor.element_size() for tensor in away.values()])
        for (at, like), part in zip(away.items(), parts, strict=True):
            # cloned: a view as another type must start at a multiple of that type's size
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
_inside = 0  # how many threads are inside `full_float32`
_before: tuple[str, bool, bool, dict[str, str]]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions with all 24 bits, even where the user allows TF32 (11 bits).

    Used where results decide codes, or the planes that a network reads. A user's autocast is off inside, and cuDNN does
    not try out kernels, since it might choose others tomorrow. torch's flags, except autocast's, apply to the whole
    process: while any thread is inside, other threads compute in full float32 too. The last thread to leave restores
    the user's flags.
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
    """The current settings: for products, for cuDNN's convolutions and its trials, and in torch 2.9's newer flags.

    If a user set the newer flags differently from the older ones, torch refuses to read the older ones. Then the newer
    ones count, and each older one must be the opposite.
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
    """Older flags first: setting them changes the newer ones too, so this order leaves no contradiction."""
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


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, ran out of memory. Only torch's allocator of CUDA memory raises its own class;
    MPS, cuBLAS, cuDNN, CUDA itself and the host's allocator raise a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
    )


@contextlib.contextmanager
def enough_memory(device: torch.device, hint: str) -> Iterator[None]:
    """Turn running out of device memory into a `SystemFault` with this hint."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise SystemFault(f"{device} has too little memory", hint) from error


@dataclass
class Fitting:
    """A function of batches that is called with as many samples at once as fit in memory: [B,…] -> [B,…]

    When the device runs out of memory, the batch size is halved, for this call and all later ones, and a line is
    logged. Samples must not depend on each other. A device may use other kernels for another batch size, so results
    are the same only up to rounding.

    hint: what the user can do if not even one sample fits, which raises `SystemFault`.
    """

    work: Callable[[Tensor], Tensor]
    hint: str
    most: int = 1 << 62  # samples that fit at once, as far as we know

    def __call__(self, batch: Tensor) -> Tensor:
        results: list[Tensor] = []
        start = 0
        while start < len(batch) or not results:
            part = batch[start : start + self.most]
            try:
                results.append(self.work(part))
                start += len(part)
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
                if len(part) <= 1:
                    raise SystemFault(f"a single sample does not fit in memory: {reason}", self.hint) from error
            # Outside the except block: the exception no longer keeps the failed attempt's tensors alive.
            self.most = len(part) // 2
            logging.getLogger("latentprep").warning("out of memory; going on with batches of %d", self.most)
            free_cached()
        return results[0] if len(results) == 1 else torch.cat(results)


def free_cached() -> None:
    """Release the freed memory that torch keeps, so that its pieces can be joined."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextlib.contextmanager
def one_thread_each(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """On a CPU, as many threads as torch has, each computing by itself: what they do is not shared out further, so
    that it does not depend on how many there are. The caller computes with one thread, too. None on other devices."""
    if device.type != "cpu":
        yield None
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "micro-batch", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
