"""Free memory of a device, within a container's limit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# limit, usage and statistics of this process's control group as a container shows them: version 2, version 1
_GROUPS = (("memory.max", "memory.current", "memory.stat"),
           ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"))  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Free bytes on the device; on a CPU, those that the machine and the container can give without swapping.

    On CUDA this counts the freed memory that torch keeps: without it, a second run in a process would find less.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_machine(), container_memory(Path("/sys/fs/cgroup")))


def container_memory(groups: Path) -> int:
    """Bytes left within the container's limit; files that the kernel caches for it count as free.

    groups: where control groups are mounted. Without a limit it returns 2**63, as the kernel does.
    """
    for limit, usage, statistics in _GROUPS:
        try:
            allowed, used = (groups / limit).read_text().strip(), int((groups / usage).read_text())
            lines = dict(line.split() for line in (groups / statistics).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if allowed.isdecimal():
            return max(0, int(allowed) - used + int(lines.get("inactive_file", 0)))
    return 1 << 63


def _machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError):  # Windows
        return 4 << 30
