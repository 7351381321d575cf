"""How much time each stage of an encode takes, and which stage the others wait for."""

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
    DECODE: "use more workers, up to the number of cores",
    CODEC: "use a faster device or dtype, or a smaller codec",
    QUANTIZE: "use a codec with fewer channels",
    WRITE: "write to a faster disk",
}


@dataclass
class Profile:
    """Busy seconds of each stage, summed over its threads, and over workers. On a GPU, timing waits for each batch.

    decoders: decoding threads of each worker.
    """

    decoders: int
    workers: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    wall: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage, from any thread. The wall time ends with the last call."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + end - start
                self.wall = end - self.began

    def take(self) -> dict[str, float]:
        """The seconds so far, which are then counted anew: for the profile of another process to `add`."""
        with self._lock:
            seconds, self.seconds = self.seconds, {}
        return seconds

    def add(self, seconds: dict[str, float]) -> None:
        with self._lock:
            for stage, more in seconds.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + more
            self.wall = time.monotonic() - self.began

    def to_json(self) -> dict:
        """wall: seconds. stages: name, threads, busy seconds, busy share of the threads' time. waits, bottleneck."""
        stages: list[dict[str, Any]] = []
        for name in _STAGES:
            threads, busy = self.workers * (self.decoders if name == DECODE else 1), self.seconds.get(name, 0.0)
            share = busy / max(1e-9, threads * self.wall)
            stages.append({"stage": name, "threads": threads, "seconds": busy, "busy": share})
        # codec and quantizer share one thread, so the busier of the two is the bottleneck if nothing waits
        slowest = max(stages, key=lambda stage: stage["busy"])
        if self.seconds.get(WAIT_DECODE, 0.0) > 0.2 * self.wall * self.workers:
            slowest = stages[0]
        elif self.seconds.get(WAIT_WRITE, 0.0) > 0.2 * self.wall * self.workers:
            slowest = stages[-1]
        return {
            "wall": self.wall,
            "stages": stages,
            "waits": {name: self.seconds.get(name, 0.0) for name in (WAIT_DECODE, WAIT_WRITE)},
            "bottleneck": slowest["stage"],
            "hint": _HINTS[slowest["stage"]],
        }
