"""How a network runs on its device: precision, compilation, reproducibility, time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latentprep.device import has_fast_bfloat16, on_device, without_autocast
from latentprep.errors import SystemFault, opt


def in_bfloat16(net: nn.Module, device: torch.device) -> bool:
    """Whether a network runs in bfloat16: if the hardware multiplies it faster than float32.

    On a CPU, a network with strided depthwise convolutions stays in float32: oneDNN (torch 2.13) takes 7 to 80 times as
    long for their bfloat16 gradients.
    """
    return has_fast_bfloat16(device) and not (device.type == "cpu" and any(map(_strided_depthwise, net.modules())))


def autocast(bfloat16: bool, device: torch.device) -> Any:
    """A context that computes in bfloat16 if `bfloat16` is true; otherwise it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def _strided_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.stride) > 1


def compiled(
    function: Callable[..., Tensor], device: torch.device, resident: Iterable[Tensor] = ()
) -> Callable[..., Tensor]:
    """The function as code generated for its arguments' shapes, forward and backward, by torch.compile.

    On CUDA it runs as CUDA graphs, so that a small network does not wait for the host to launch hundreds of kernels.
    No kernel is chosen by timing it: another kernel would sum in another order.
    resident: tensors that it reads and that never move, such as all codes; a graph copies every other argument.

    A call raises `SystemFault` if no code can be generated, for example without a C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    for tensor in resident:
        torch._dynamo.mark_static_address(tensor)
    options: dict[str, Any] = {}
    if device.type == "cuda":
        known = torch._inductor.list_options()  # older versions lack the second
        options = {name: True for name in ("triton.cudagraphs", "deterministic") if name in known}
    whole = torch.compile(function, fullgraph=True, dynamic=False, options=options or None)

    def call(*arguments: Any) -> Tensor:
        try:
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            return whole(*arguments)
        except TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SystemFault(
                f"the training step cannot be compiled on this machine: {reason}",
                f"leave {opt('compile')} out; on CPUs it needs a C++ compiler",
            ) from error

    return call


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """A context in which the same seed gives the same bits on the same machine. torch's global state is restored.

    cuDNN runs deterministic kernels, chosen without trials; whether it runs at all, and in TF32, is left as it is.
    A CUDA device is made the current one, and a user's autocast is off.
    """
    cudnn, cuda = torch.backends.cudnn, [device] if device.type == "cuda" else []
    before = cudnn.deterministic, cudnn.benchmark
    mps = torch.mps.get_rng_state() if device.type == "mps" else None  # which `fork_rng` passes over
    with torch.random.fork_rng(cuda), on_device(device), without_autocast():
        try:
            # One by one: `cudnn.flags` sets all, those that it is not given to defaults, and so takes cuDNN out of use.
            cudnn.deterministic, cudnn.benchmark = True, False
            seed_generators(device, seed)
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
            if mps is not None:
                torch.mps.set_rng_state(mps)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds the host's default generator and the device's. `torch.manual_seed` seeds those of all devices, which
    nobody then puts back."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with on_device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class Stopwatch:
    """Seconds from construction to `stop`, measured by the device, so that the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: Any = self._now()
        self._end: Any = None

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> float:
        """The time in seconds. Call it after the host has waited for a result computed after `stop`."""
        if self._device.type in ("cuda", "mps"):
            return self._start.elapsed_time(self._end) / 1000
        return self._end - self._start

    def _now(self) -> Any:
        if self._device.type not in ("cuda", "mps"):
            return time.perf_counter()
        if self._device.type == "mps":
            mark = torch.mps.Event(enable_timing=True)
            mark.record()
            return mark
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work: call it before and after what is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
