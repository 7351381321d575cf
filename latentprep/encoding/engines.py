"""An engine makes shards of jobs, in any order; the driver commits them. `PoolEngine` has other processes make them.

Engines differ in speed alone: a shard is a pure function of manifest, source, codec and its name.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from latentprep.errors import SystemFault, opt
from latentprep.format.manifest import ShardId
from latentprep.format.shard import EncodedShard
from latentprep.progress import Progress

if TYPE_CHECKING:
    from latentprep.encoding.profile import Profile
    from latentprep.encoding.worker import Made

DEATHS = 3  # of workers, at one shard, before it is given up
_TICK = 0.25  # seconds between looks at how far the workers are


class Engine(Protocol):
    def run(self, jobs: Iterable[ShardId]) -> Generator[EncodedShard, None, None]:
        """The shards, in any order. After an error, those that are finished come before it. Close the generator."""
        ...


class Worker(Protocol):
    """Another process, as the driver sees it. It makes one shard at a time.

    where: for messages. rows: of the shard at hand that it has encoded; 0 if that is not known.
    """

    where: str

    @property
    def rows(self) -> int: ...

    def start(self) -> Future[Any]:
        """Start the process, again if it has died: a future that is done when it can make shards."""
        ...

    def make(self, shard: ShardId) -> Future[Made]: ...

    def cause(self, error: BaseException) -> BaseException | None:
        """What was raised in the worker, given its future's error. None if the worker has died."""
        ...

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        ...


@dataclass(frozen=True)
class PoolEngine:
    """Hands jobs to workers, one at a time each. If a worker dies, it is started again, and its shard comes next."""

    workers: Sequence[Worker]
    progress: Progress
    profile: Profile | None = None

    def run(self, jobs: Iterable[ShardId]) -> Generator[EncodedShard, None, None]:
        """Raises what a worker raised, and `SystemFault` if workers die `DEATHS` times at a shard, or as they start."""
        todo = deque(jobs)
        workers = self.workers[: len(todo)]
        busy: dict[Future[Any], tuple[Worker, ShardId | None]] = {}  # no shard: it is starting
        idle: list[Worker] = []
        made: list[Made] = []
        deaths: Counter[Worker | ShardId] = Counter()
        bar = _Bar(self.progress, len(workers))
        failure: BaseException | None = None
        try:
            for worker in workers:
                busy[worker.start()] = worker, None
            while todo or any(shard is not None for _, shard in busy.values()):
                for future in wait(busy, _TICK, FIRST_COMPLETED).done:
                    worker, shard = busy.pop(future)
                    if (error := future.exception()) is None:
                        idle.append(worker)
                        deaths.pop(worker, None)
                        if shard is not None:
                            made.append(future.result())
                        continue
                    if (cause := worker.cause(error)) is not None:
                        raise cause
                    deaths[shard or worker] += 1
                    if deaths[shard or worker] == DEATHS:
                        raise _given_up(worker, shard, error)
                    if shard is not None:
                        todo.appendleft(shard)
                    busy[worker.start()] = worker, None
                while todo and idle:
                    worker, shard = idle.pop(), todo.popleft()
                    busy[worker.make(shard)] = worker, shard
                bar.show(list(busy.values()), made)
                while made:
                    yield self._counted(made.pop(0))
        except GeneratorExit:
            raise
        except BaseException as error:  # also Ctrl-C: finished shards are worth keeping
            failure = error
        finally:
            for worker in workers:
                worker.stop()
        finished = [future for future, (_, shard) in busy.items() if shard and future.done() and not future.cancelled()]
        made += [future.result() for future in finished if future.exception() is None]
        yield from map(self._counted, made)
        if failure is not None:
            raise failure

    def _counted(self, made: Made) -> EncodedShard:
        if self.profile is not None:
            self.profile.add(made.seconds)
        return made.shard


class _Bar:
    """One bar over all workers. It never goes back: what a dead worker had done is waited for."""

    def __init__(self, progress: Progress, workers: int) -> None:
        self.progress, self.workers = progress, workers
        self.finished = self.shown = 0
        self.size: dict[str, str] = {}

    def show(self, busy: list[tuple[Worker, ShardId | None]], made: list[Made]) -> None:
        for one in made:
            self.finished += one.shard.record.rows
            size = sum(file.bytes for file in one.shard.record.files.values())
            self.size = {"bytes_per_image": f"{size / one.shard.record.rows:.0f}"}
        starting = sum(shard is None for _, shard in busy)
        rows = self.finished + sum(worker.rows for worker, shard in busy if shard)
        alive = f"{self.workers - starting} of {self.workers}"
        facts = {"workers": alive, "shards_in_flight": str(len(busy) - starting), **self.size}
        self.progress.advance(max(0, rows - self.shown), **facts)
        self.shown = max(rows, self.shown)


def _given_up(worker: Worker, shard: ShardId | None, error: BaseException) -> SystemFault:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if shard is None:
        return SystemFault(
            f"a worker ({worker.where}) died {DEATHS} times as it started: {lines[-1]}",
            "see what it printed; a Python script must call encode under if __name__ == '__main__'",
        )
    return SystemFault(
        f"shard {shard} cannot be made: {DEATHS} workers died of it, the last on {worker.where}",
        f"they may have run out of memory: use fewer workers, or smaller images ({opt('size')}) or shards "
        f"({opt('shard_rows')}); what else is finished is committed",
    )
