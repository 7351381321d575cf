"""Workers that are actors of a Ray cluster. Ray places them, carries jobs and shards, and says which have died.

If an actor dies, `PoolEngine` asks for another. Ray's own restarts would keep a lost node's shard waiting until another
node is free, though other actors could make it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from latentprep.encoding.engines import Engine, PoolEngine
from latentprep.errors import LatentError, SystemFault, UsageError, opt
from latentprep.format.manifest import Manifest, ShardId
from latentprep.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

    from latentprep.encoding.pipeline import Stages
    from latentprep.encoding.worker import Made, Work

_ANSWER = 5.0  # seconds within which a cluster's address must answer; Ray itself would try for minutes


class RayCrew:
    """Actors in the cluster at an address, else in the one that RAY_ADDRESS names, else in one on this machine alone.

    A worker for each GPU of the cluster, or for each core if it has none. devices: ``cpu:N`` for N workers on cores.
    device: of the driver; ``cpu`` for workers on cores, too.
    """

    name = "ray"

    def __init__(
        self, devices: str | Sequence[int | str] | None, device: str, address: str | None, workers_per_device: int
    ) -> None:
        from latentprep.device import pick_device, pick_devices

        if importlib.util.find_spec("ray") is None:
            raise SystemFault(f"{opt('engine', 'ray')} needs the ray package", "pip install 'latentprep[ray]'")
        chosen = [] if devices in (None, "all") else pick_devices(devices or "")
        if chosen and chosen[0].type != "cpu":
            raise UsageError(
                f"Ray chooses the GPUs itself, {opt('devices')} was {devices!r:.60}",
                f"use {opt('devices', 'all')} or {opt('devices', 'cpu:8')}",
            )
        self.device: torch.device = chosen[0] if chosen else pick_device(device)
        self.asked, self.cpu = len(chosen), bool(chosen) or device == "cpu"
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.workers_per_device, self.workers, self.cores = workers_per_device, 0, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RayCrew:
        import ray

        with contextlib.ExitStack() as stack:
            if not ray.is_initialized():
                stack.enter_context(_nothing_printed())
                stack.callback(ray.shutdown)
                _connect(self.address)
            resources = ray.cluster_resources()
            gpus, self.cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
            self.cpu = self.cpu or not gpus
            self.workers = (self.asked or (self.cores if self.cpu else gpus)) * self.workers_per_device
            if not self.workers:
                raise SystemFault("the Ray cluster has neither GPUs nor cores", "add nodes to it")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def engine(self, manifest: Manifest, stages: Stages, progress: Progress) -> Engine:
        import ray
        import torch

        from latentprep.encoding.worker import work_of

        device = torch.device("cpu" if self.cpu else "cuda")
        threads = 1 if self.cpu else max(1, self.cores // self.workers)
        work = ray.put(work_of(manifest, stages, device, threads))
        gpus = 0 if self.cpu else 1 / self.workers_per_device
        cores = 1 / self.workers_per_device if self.cpu else 0
        workers = [RayWorker(work, num_gpus=gpus, num_cpus=cores) for _ in range(self.workers)]
        return PoolEngine(workers, progress, stages.profile)


def _connect(address: str) -> None:
    """Connect to a cluster, or start one for ``local``, without Ray's own words, and leave signals as they are."""
    import ray

    host, colon, port = address.rpartition("://")[2].rpartition(":")
    where = "is running on this machine" if address == "auto" else f"answers at {address}"
    nobody = SystemFault(
        f"no Ray cluster {where}",
        f"start one with ray start, or leave out {opt('address')} to use this machine alone",
    )
    if address not in ("auto", "local"):
        if not colon or not port.isdecimal():
            raise UsageError(f"{opt('address')} must be auto or HOST:PORT, got {address!r:.60}")
        try:
            socket.create_connection((host, int(port)), _ANSWER).close()
        except (OSError, OverflowError):
            raise nobody from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    dashboard = False if address == "local" else None
    with _signal_handlers_kept():
        try:
            ray.init(address, configure_logging=False, log_to_driver=False, include_dashboard=dashboard)
        except ConnectionError:
            raise nobody from None


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """Ray prints what befalls its processes to stdout, which is for results, and has no switch for it."""
    from ray._private import worker

    printed = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


class RayWorker:
    """A `Worker` that is an actor. It makes known no rows before its shard is done."""

    where, rows = "a node of the Ray cluster", 0

    def __init__(self, work: Any, **resources: float) -> None:
        self.work, self.resources = work, resources
        self._actor: Any = None

    def start(self) -> Future[None]:
        import ray

        self.stop()
        self._actor = ray.remote(_Actor).options(max_restarts=0, **self.resources).remote()
        return self._actor.open.remote(self.work).future()

    def make(self, shard: ShardId) -> Future[Made]:
        return self._actor.make.remote(shard).future()

    def cause(self, error: BaseException) -> BaseException | None:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            return getattr(error, "cause", None) or error
        return None if isinstance(error, RayError) else error

    def stop(self) -> None:
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None


class _Actor:
    """What runs on a node. Errors name the node."""

    def __init__(self) -> None:
        from latentprep.tuning import tune_process

        tune_process()

    def open(self, work: Work) -> None:
        with _node_named():
            self._make = work.open(Silent())

    def make(self, shard: ShardId) -> Made:
        return self._make(shard)


@contextlib.contextmanager
def _node_named() -> Iterator[None]:
    try:
        yield
    except LatentError as error:
        import ray

        node = f"node {ray.util.get_node_ip_address()} ({socket.gethostname()})"
        raise type(error)(f"{node}: {error.texts[0]}", error.texts[1]) from None
