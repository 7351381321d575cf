"""Simulates an encode on 1 to 1,000 workers: how near it comes to the ideal, with stragglers, failures and one driver.

    python benchmarks/simulate_scale.py --plot docs/scale.png

Nothing is measured here. A worker takes a shard, works on it, hands its bytes to the driver and takes the next; the
driver commits one shard at a time. A worker that fails loses its shard, which the next free one does again, and comes
back later. With `parts`, as with `encode --shard-of`, a worker takes a part, starts, and commits the part's shards by
itself; if it fails, the rest of the part is resumed. The same seed gives the same run.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import record, spread

SHARD_ROWS, SEEDS = 1024, 3
WORKERS = (1, 3, 10, 30, 100, 300, 1000)
SIZES = {"10⁵ images": 10**5, "10⁶ images": 10**6, "10⁷ images": 10**7, "10⁸ images": 10**8}
OF_ONE_SIZE = 10**8  # images, where ways to commit are compared


@dataclass(frozen=True)
class World:
    """What is assumed; times in seconds.

    service: of a shard, on average; 1,024 images at 512 a second. sigma: of the logarithm of that time. slow, slowdown:
    so many of the workers take so many times as long. failures: of a worker, an hour; absent: until it is back.
    commit: of a shard, by the driver. parts: for each worker; 0 if shards are handed out one by one. start: of a part.
    """

    service: float = 2.0
    sigma: float = 0.5
    slow: float = 0.05
    slowdown: float = 2.0
    failures: float = 0.01
    absent: float = 300.0
    commit: float = 0.015
    parts: int = 0
    start: float = 60.0


WORLD = World()
WAYS = {
    "one driver, disk": WORLD,
    "one driver, bucket": replace(WORLD, commit=0.25 / 16),  # five requests of 50 ms, for 16 shards at once
    "--shard-of, no slow workers": replace(WORLD, parts=1, slow=0),
    "--shard-of, a part per worker": replace(WORLD, parts=1),
    "--shard-of, four per worker": replace(WORLD, parts=4),
}


@dataclass(frozen=True)
class Run:
    """seconds: until the last shard is committed. ideal: the same shards' work, spread evenly over as many workers of
    the usual speed, which never fail or wait. lost: shards that had to be done again."""

    seconds: float
    ideal: float
    lost: int

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds


def simulate(shards: int, workers: int, world: World = WORLD, seed: int = 0) -> Run:
    """Encode so many shards on so many workers."""
    draw = random.Random(f"{shards} {workers} {seed}")
    parts = min(world.parts * workers, shards) or shards
    pool = deque(shards * (i + 1) // parts - shards * i // parts for i in range(parts))  # shards of parts to be taken
    held = [0] * workers  # shards that a worker has still to make of its part
    work = [0.0] * workers  # at the usual speed, in the shard that it makes
    idle: list[int] = []
    events = [(0.0, worker, "free") for worker in range(workers)]
    committed, all_work, lost = 0.0, 0.0, 0
    while events:
        now, worker, what = heapq.heappop(events)
        if what == "done":
            held[worker] -= 1
            all_work += work[worker]
            committed = max(now, committed if not world.parts else 0) + world.commit
        elif what == "failed":
            lost += 1
            pool.appendleft(held[worker])
            held[worker] = 0
            heapq.heappush(events, (now + world.absent, worker, "free"))
            if not idle:
                continue
            worker = idle.pop()
        if not held[worker]:
            if not pool:
                idle.append(worker)
                continue
            held[worker] = pool.popleft()
            now += world.start if world.parts else 0
        work[worker] = world.service * draw.lognormvariate(-(world.sigma**2) / 2, world.sigma)
        takes = work[worker] * (world.slowdown if worker < int(world.slow * workers) else 1)
        fails = draw.expovariate(world.failures / 3600) if world.failures else math.inf
        heapq.heappush(events, (now + takes, worker, "done") if takes <= fails else (now + fails, worker, "failed"))
    return Run(committed, all_work / workers, lost)


def measured(images: int, workers: int, world: World) -> dict:
    runs = [simulate(-(-images // SHARD_ROWS), workers, world, seed) for seed in range(SEEDS)]
    return {
        "hours": spread([run.seconds / 3600 for run in runs]),
        "efficiency": spread([run.efficiency for run in runs]),
        "lost": sum(run.lost for run in runs),
    }


def plot(path: Path, sizes: dict[str, dict], ways: dict[str, dict]) -> None:
    """Efficiency by the number of workers: datasets of several sizes, and ways to commit one of them."""
    from latentprep.pictures.plots import COLOURS, GREY, draw

    with draw(path, 2) as panels:
        titles = ("One driver that writes to a disk", "10⁸ images")
        for axes, title, curves in zip(panels, titles, (sizes, ways), strict=True):
            for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
                values = [100 * points[str(workers)]["efficiency"]["median"] for workers in WORKERS]
                axes.plot(WORKERS, values, marker="o", markersize=4, color=colour, label=name)
            axes.axhline(100, color=GREY, linewidth=1, linestyle="--")
            axes.set(xscale="log", ylim=(0, 110), xlabel="workers", title=title)
            axes.set_xticks(WORKERS, [f"{workers:,}" for workers in WORKERS])
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=8, loc="lower left")
        panels[0].set_ylabel("ideal time ÷ time, %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file to draw")
    asked = parser.parse_args()

    def all_workers(images: int, world: World) -> dict[str, dict]:
        return {str(workers): measured(images, workers, world) for workers in WORKERS}

    sizes = {name: all_workers(images, WORLD) for name, images in SIZES.items()}
    ways = {name: all_workers(OF_ONE_SIZE, world) for name, world in WAYS.items()}
    without = all_workers(OF_ONE_SIZE, replace(WORLD, failures=0))
    assumed = {"shard_rows": SHARD_ROWS, "seeds": SEEDS, "ways": {name: asdict(world) for name, world in WAYS.items()}}
    record("simulate_scale", {"assumed": assumed, "sizes": sizes, "ways": ways, "without_failures": without})
    if asked.plot:
        plot(asked.plot, sizes, ways)


if __name__ == "__main__":
    main()
