"""What to do where a batch does not fit in the device's memory: halve it and go on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentprep.errors import SystemFault, opt

_SAYINGS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
NOT_ON_DEVICE = f"use {opt('device', 'cpu')}"  # what always helps, slowly


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had too little memory. Only torch's allocator of CUDA memory says so by a class of
    its own; MPS, cuBLAS, cuDNN, CUDA itself and the host's allocator do by a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
    )


@contextlib.contextmanager
def enough_memory(device: torch.device, hint: str) -> Iterator[None]:
    """Raises `SystemFault` with the way out where the device's memory does not suffice inside."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise SystemFault(f"{device} has too little memory", hint) from error


@dataclass
class Fitting:
    """A function of batches, called with as much of each as fits in memory: [B,…] -> [B,…]

    Where the device runs out of memory the batch is halved, for this call and all later ones, and a line is logged.
    Samples must not depend on each other. A device may choose other kernels for other batches, which may round
    otherwise: results are then the same up to rounding.

    Raises `SystemFault` where not even one sample fits; hint: what the user can do then.
    """

    work: Callable[[Tensor], Tensor]
    hint: str
    most: int = 1 << 62  # samples that fit at once, as far as is known

    def __call__(self, batch: Tensor) -> Tensor:
        found: list[Tensor] = []
        start = 0
        while start < len(batch) or not found:
            part = batch[start : start + self.most]
            try:
                found.append(self.work(part))
                start += len(part)
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
                if len(part) <= 1:
                    raise SystemFault(f"a single sample does not fit in memory: {reason}", self.hint) from error
            # Only here, where the exception has let go of what the attempt had allocated.
            self.most = len(part) // 2
            logging.getLogger("latentprep").warning("out of memory; going on by batches of %d", self.most)
            free_cached()
        return found[0] if len(found) == 1 else torch.cat(found)


def free_cached() -> None:
    """Give back what torch keeps of freed memory, so that pieces of it can be joined."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
