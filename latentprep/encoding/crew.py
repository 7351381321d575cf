"""Who makes the shards of an encode: this process, several of this machine, or those of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from latentprep.encoding.engines import Engine, PoolEngine
from latentprep.errors import UsageError, check_whole, check_word, opt
from latentprep.format.manifest import Manifest
from latentprep.progress import Progress

if TYPE_CHECKING:
    import torch

    from latentprep.encoding.pipeline import Stages

ENGINES = ("local", "ray")


class Crew(contextlib.AbstractContextManager["Crew"], Protocol):
    """Who makes the shards of an encode, as asked for. Inside of it, an engine can be had.

    name: "local", "processes" or "ray". device: of the driver, which calibrates.
    workers: how many there are; for a cluster, known inside only.
    """

    name: str
    device: torch.device
    workers: int

    def engine(self, manifest: Manifest, stages: Stages, progress: Progress) -> Engine: ...


def crew_of(
    engine: str, devices: str | Sequence[int] | None, device: str, address: str | None, workers_per_device: int
) -> Crew:
    """The crew for these parameters of `encode`. Raises `UsageError` or `SystemFault` for what cannot be had."""
    from latentprep.device import parse_devices, pick_device

    check_word("engine", engine, ENGINES)
    check_whole("workers_per_device", workers_per_device, 1, 64)
    if devices is not None and device != "auto":
        raise UsageError(f"{opt('device')} and {opt('devices')} both say where to encode", "give one of them")
    if not isinstance(devices, str | None):
        devices = ",".join(map(str, devices))
    if engine == "ray":
        from latentprep.encoding.cluster import RayCrew

        return RayCrew(devices, device, address, workers_per_device)
    if address is not None:
        raise UsageError(f"{opt('address')} is for {opt('engine', 'ray')} only", "leave it out, or give both")
    chosen = [pick_device(device)] if devices is None else parse_devices(devices)
    return LocalCrew(chosen * workers_per_device)


class LocalCrew(contextlib.nullcontext[Any]):
    """One process for each of the devices; this one alone if there is but one."""

    def __init__(self, devices: list[torch.device]) -> None:
        super().__init__(self)
        self.devices, self.device, self.workers = devices, devices[0], len(devices)
        self.name = "local" if self.workers == 1 else "processes"

    def engine(self, manifest: Manifest, stages: Stages, progress: Progress) -> Engine:
        from latentprep.device import free_cached
        from latentprep.encoding.pipeline import LocalEngine, cores
        from latentprep.encoding.processes import ProcessWorker
        from latentprep.encoding.worker import work_of

        if self.workers == 1:
            return LocalEngine(manifest, stages, progress)
        free_cached()  # of calibration, on a device that a worker is to have
        threads = max(1, cores() // self.workers)
        works = {device: work_of(manifest, stages, device, threads) for device in self.devices}
        workers = [ProcessWorker(works[device]) for device in self.devices]
        return PoolEngine(workers, progress, stages.profile)
