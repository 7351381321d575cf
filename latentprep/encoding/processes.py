"""Workers that are processes of this machine: an executor of one process for each, so that one's death breaks no other.

A worker imports this module first, so nothing here imports torch before `tune_process` has been called.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from ctypes import c_longlong
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from latentprep.format.manifest import ShardId
from latentprep.tuning import tune_process

if TYPE_CHECKING:
    from latentprep.encoding.worker import Made, Work

_SPAWN = get_context("spawn")  # a fork of a process with threads, or with CUDA, may hang


class ProcessWorker:
    """A `Worker` in a process of its own. It ends when the driver does, however that ends."""

    def __init__(self, work: Work) -> None:
        self.work, self.where = work, work.device
        self._rows = _SPAWN.RawValue(c_longlong, 0)  # without a lock: a worker that is killed could hold it for ever
        self._pool: ProcessPoolExecutor | None = None
        self._leash: Connection | None = None

    @property
    def rows(self) -> int:
        return self._rows.value

    def start(self) -> Future[None]:
        self.stop()
        end, self._leash = _SPAWN.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, _SPAWN, _begin, (end, self._rows))
        with _signals_blocked():
            return self._pool.submit(_open, self.work)

    def make(self, shard: ShardId) -> Future[Made]:
        assert self._pool is not None, "start it first"
        self._rows.value = 0
        try:
            return self._pool.submit(_make, shard)
        except BrokenExecutor as error:  # it died while it was idle
            broken: Future[Made] = Future()
            broken.set_exception(error)
            return broken

    def cause(self, error: BaseException) -> BaseException | None:
        return None if isinstance(error, BrokenExecutor) else error

    def stop(self) -> None:
        if self._pool is not None and self._leash is not None:
            self._leash.close()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside never see the signals that a terminal or a scheduler sends to all of a program: the
    driver gets them too, and ends its workers."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the worker

_rows: Any
_maker: Callable[[ShardId], Made]


def _begin(leash: Connection, rows: Any) -> None:
    global _rows
    tune_process()
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    _rows = rows


def _end_with(leash: Connection) -> None:
    """End this process as soon as the driver closes its end, or is gone."""
    with contextlib.suppress(EOFError, OSError):
        leash.recv()
    os._exit(1)


def _open(work: Work) -> None:
    global _maker
    _maker = work.open(_Rows())


def _make(shard: ShardId) -> Made:
    return _maker(shard)


class _Rows:
    """The `Progress` of a worker: a number that the driver can see."""

    def advance(self, n: int, **facts: str) -> None:
        _rows.value += n

    def note(self, text: str) -> None:
        pass
