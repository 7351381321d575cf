"""Devices that are not here: what a run would copy between host and device, and what the host would wait for.

`Watched` counts it while `fit` or `encode` runs on ``meta``, whose tensors have no values. What is on the host is
computed as ever; what comes from the device is ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import latentprep.device
import latentprep.encoding.pipeline

aten = torch.ops.aten


class Watched(TorchDispatchMode):
    """waits: operations for which the host waits until the device has done all that is queued, in order of time:
    copies to the host, copies there that do not ask for it in passing, values read one by one, shapes that depend on
    values.
    passing: copies that nothing waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.passing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if tensor.device.type == "meta"]
        target = kwargs.get("device")
        target = torch.device(target).type if target is not None else None
        if not there and target != "meta":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._wait(func) or torch.ones((), dtype=args[0].dtype).item()
        if func is aten._unique2.default:
            self._wait(func)
            return tuple(args[0].new_empty(2, dtype=torch.int64) for _ in range(3))
        if func in (aten.nonzero.default, aten.masked_select.default):
            raise AssertionError(f"{func} waits for the device")
        copy = func is aten._to_copy.default or func.overloadpacket is aten.to  # the latter in inference mode
        if copy and there and target == "cpu":
            self._wait(func)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if copy and not there:
            self._sent(func, kwargs.get("non_blocking", False))
        if func is aten.copy_.default and len({tensor.device.type for tensor in tensors}) > 1:
            self._sent(func, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            if args[0].device.type == "cpu":
                return args[0].fill_(1)
        return func(*args, **kwargs)

    def _wait(self, func: Any) -> None:
        self.waits.append(str(func))

    def _sent(self, func: Any, non_blocking: bool) -> None:
        if non_blocking:
            self.passing += 1
        else:
            self._wait(func)


class HostGenerator(torch.Generator):
    """A host's, whatever the device: none draws on ``meta``."""

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def meta() -> Iterator[Watched]:
    """Tensors on ``meta`` inside, with a generator for it."""
    tensor = torch.tensor

    def made(*values: Any, **options: Any) -> Tensor:
        """It copies from pageable memory where no mode sees it."""
        if torch.device(options.get("device") or "cpu").type == "meta":
            watched.waits.append("torch.tensor")
        return tensor(*values, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", HostGenerator)
        patch.setattr(torch, "tensor", made)
        with Watched() as watched:
            yield watched


@dataclass
class Streams:
    """What a run did with the streams of a device that it took for CUDA. recorded: events, as the stream that each was
    recorded on and the device that was current then."""

    recorded: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def queued() -> Iterator[tuple[Watched, Streams]]:
    """As `meta`, and code takes the branches that it takes on CUDA: pinned memory, events, device guards."""
    current, streams = ["another"], Streams()

    @contextlib.contextmanager
    def device(wanted: Any) -> Iterator[None]:
        current.append(str(wanted))
        try:
            yield
        finally:
            current.pop()

    class Event:
        def record(self, stream: Any = None) -> None:
            streams.recorded.append((stream, current[-1]))

        def synchronize(self) -> None:
            pass

    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        for module in (latentprep.device, latentprep.encoding.pipeline):
            patch.setattr(module, "queues", lambda device: device.type == "meta")
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "device", device)
        patch.setattr(torch.cuda, "current_stream", lambda wanted=None: str(wanted or current[-1]))
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor)
        patch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
        with meta() as watched:
            yield watched, streams
