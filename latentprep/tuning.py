"""What a process that is ours, a program or a worker, sets for itself before torch is imported."""

from __future__ import annotations

import os
import sys
import warnings


def tune_process() -> None:
    """Make this process good at CPU networks. Call it before torch is imported; programs do, libraries must not.

    Idle OpenMP threads that spin for long take the cores from those that decode, and from everybody else: on two shared
    cores, training ran 20 times slower. Those that sleep at once wake late: 1.4 times slower on two cores of its own.
    So they spin for some tens of microseconds. And glibc gives large blocks back to the system whenever they are freed,
    only to get them again as pages to be zeroed: keeping them makes TAESD's encoder 1.4 times as fast.
    """
    import ctypes

    warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which we report ourselves
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes
