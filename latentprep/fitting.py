"""When a batch does not fit in the device's memory: halve it and go on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentprep.errors import SystemFault, opt

_SAYINGS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
NOT_ON_DEVICE = f"use {opt('device', 'cpu')}"  # always works, but slowly


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
