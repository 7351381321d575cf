"""Training by several processes, ranks, that torchrun starts: who they are, and what they tell each other.

Ranks work through the same batches in the same order, each its own share, and add up the shares in the same order. So
every rank makes the same step on the same bits, and only sums are sent.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from latentprep.device import out_of_memory, pick_device
from latentprep.errors import LatentError, SystemFault, UsageError, opt

Result = TypeVar("Result")
_joined = count()  # how often this process has joined
_GRACE = 1.0  # seconds for the rank that has something to say: torchrun ends all of them as soon as one has ended


class LostRanks(SystemFault):
    """The connection to another rank broke: it died, or it ended with an error of its own."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. rank: 0 writes and speaks; local_rank: among those of this machine.

    job: the same text for all ranks of a job and after each of its restarts, and for no other job. restarts: how often
    torchrun has restarted the ranks.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    job: str = ""
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shares(self, pieces: int) -> list[range]:
        """Each rank's part of so many pieces: consecutive ones; shares differ by one at most."""
        edges = [pieces * rank // self.world for rank in range(self.world + 1)]
        return [range(first, last) for first, last in pairwise(edges)]

    def share(self, pieces: int) -> range:
        """This rank's part."""
        return self.shares(pieces)[self.rank]

    def gathered(self, values: Tensor) -> Tensor:
        """f32 [k,n], k the same on every rank, -> f32 [world,k,n], the same on every rank."""
        if self.world == 1:
            return values[None]
        found = values.new_empty((self.world, *values.shape))
        with self._connected():
            torch.distributed.all_gather(list(found), values.contiguous())
        return found

    def every(self, values: Tensor, pieces: int) -> Tensor:
        """What all ranks found, of each piece once: f32 [k,n] of this rank's `share` -> f32 [pieces,n] in order."""
        most = -(-pieces // self.world)
        padded = torch.cat([values, values.new_zeros((most - len(values), *values.shape[1:]))])
        gathered = zip(self.gathered(padded), self.shares(pieces), strict=True)
        return torch.cat([found[: len(share)] for found, share in gathered])

    def told(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on rank 0, the only one to do it. If it raises a `LatentError`, every rank raises it."""
        if self.world == 1:
            return work()
        answer: list[Any] = [None, None]
        try:
            if self.is_main:
                answer[0] = work()
        except LatentError as error:
            answer[1] = error
        with self._connected():
            torch.distributed.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise self.known(answer[1])
        return answer[0]

    def agreed(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here, once it is done on every rank. A `LatentError` of one is raised on all, once."""
        if self.world == 1:
            return work()
        try:
            result, error = work(), None
        except LatentError as failed:
            error = failed
        errors: list[LatentError | None] = [None] * self.world
        with self._connected():
            torch.distributed.all_gather_object(errors, error)
        for rank, found in enumerate(errors):
            if found is not None:
                raise self.known(replace(self, rank=rank).own(found))
        return result

    def known(self, error: LatentError) -> LatentError:
        """The error, which every rank raises: rank 0 says it."""
        if not self.is_main:
            error.said = True
            time.sleep(_GRACE)
        return error

    def own(self, error: LatentError) -> LatentError:
        """The error, which names the rank if it met this rank alone."""
        if self.is_main or error.said or isinstance(error, LostRanks):
            return error
        message, hint = error.texts
        return type(error)(f"rank {self.rank}: {message}", hint)

    def device(self, name: str) -> torch.device:
        """The device of this rank. ``auto`` and ``cuda``: of several ranks, each takes the GPU of its local rank.

        Raises `UsageError` for one that ranks cannot share, and as `pick_device` does.
        """
        if self.world == 1:
            return pick_device(name)
        if name in ("auto", "cuda") and (name == "cuda" or torch.cuda.is_available()):
            return pick_device(f"cuda:{self.local_rank}")
        if name not in ("auto", "cpu"):
            raise UsageError(
                f"{self.world} ranks cannot share {opt('device')} {name!r}", f"leave {opt('device')} out, or use cpu"
            )
        return torch.device("cpu")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's alike
            if out_of_memory(error):
                raise
            time.sleep(_GRACE)
            raise self.known(
                LostRanks(
                    "the connection to another rank broke", f"see why it ended, and go on with {opt('resume', True)}"
                )
            ) from error


ALONE = Ranks()


def this_rank() -> Ranks:
    """What torchrun says in this process's environment, not connected to the others; without torchrun, `ALONE`."""
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    rank, world, local_rank, restarts = (int(os.environ[name]) for name in names)
    job = os.environ["TORCHELASTIC_RUN_ID"]
    if job == "none":  # as of every job that was given no name
        job = f"{platform.node()}-{os.getppid()}"
    return Ranks(rank, world, local_rank, job, restarts)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, connected (gloo on CPUs, NCCL on CUDA) until the end; otherwise `ALONE`.

    A process group that is there already is used as it is. An error of a rank other than 0 names the rank.
    """
    ranks = this_rank()
    if ranks is ALONE:
        yield ALONE
        return
    ours = not torch.distributed.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # Under a name of its own: restarted ranks find the same store, with the addresses of those that died in it.
        store = next(torch.distributed.rendezvous("env://"))[0]
        store = torch.distributed.PrefixStore(f"latenttrain-{ranks.restarts}-{next(_joined)}", store)
        torch.distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world)
    try:
        yield ranks
    except LatentError as error:
        raise ranks.own(error) from error.__cause__
    finally:
        if ours:
            torch.distributed.destroy_process_group()
