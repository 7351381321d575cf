"""Where an encode's time goes, stage by stage, and which stage the others wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DECODE, CODEC, QUANTIZE, WRITE = "read and decode", "codec", "quantize", "compress and write"
WAIT_DECODE, WAIT_WRITE = "codec waits for decoding", "codec waits for writing"
_STAGES = DECODE, CODEC, QUANTIZE, WRITE
_HINTS = {
    DECODE: "more workers help as long as there are cores for them",
    CODEC: "a faster device or dtype, or a smaller codec, is what helps",
    QUANTIZE: "fewer channels are what helps",
    WRITE: "write to a faster disk",
}


@dataclass
class Profile:
    """Seconds that stages were busy, summed over their threads. On a GPU, timing waits for each batch."""

    decoders: int
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    wall: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time inside to a stage's; any thread may do so. The wall time ends with the last."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + end - start
                self.wall = end - self.began

    def to_json(self) -> dict:
        """wall: seconds; stages: name, threads, busy seconds, share of what its threads had; waits; bottleneck."""
        stages: list[dict[str, Any]] = []
        for name in _STAGES:
            threads, busy = self.decoders if name == DECODE else 1, self.seconds.get(name, 0.0)
            share = busy / max(1e-9, threads * self.wall)
            stages.append({"stage": name, "threads": threads, "seconds": busy, "busy": share})
        # codec and quantizer take turns in one thread, so the one that waits for nobody is the larger of the two
        slowest = max(stages, key=lambda stage: stage["busy"])
        if self.seconds.get(WAIT_DECODE, 0.0) > 0.2 * self.wall:
            slowest = stages[0]
        elif self.seconds.get(WAIT_WRITE, 0.0) > 0.2 * self.wall:
            slowest = stages[-1]
        return {
            "wall": self.wall,
            "stages": stages,
            "waits": {name: self.seconds.get(name, 0.0) for name in (WAIT_DECODE, WAIT_WRITE)},
            "bottleneck": slowest["stage"],
            "hint": _HINTS[slowest["stage"]],
        }
