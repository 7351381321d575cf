"""Networks that others wrote: found by name, and made fit for training in micro-batches.

A network is a function ``(planes, config) -> nn.Module`` of the number of planes that the stem makes and of the
`NetConfig`; the module takes planes, float [B,P,h,w], and gives logits, [B,classes]. It is named in either of two ways:

    small                      an entry point in the group `latenttrain.networks`
    package.module:function    the function itself

A run's configuration records the name. An entry point is loaded whenever a run names it, since whoever installed its
package has asked for it. The other kind could name any module of this machine, so it is imported only in a process that
the user gave the name to: a run folder from elsewhere runs no code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from latentprep.errors import UsageError, nearest, opt

GROUP = "latenttrain.networks"
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_named: dict[str, Callable[..., nn.Module]] = {}  # those that the user gave as package.module:function


def is_function(arch: str) -> bool:
    """Whether it is written as ``package.module:function``."""
    return ":" in arch


def name_network(arch: str) -> None:
    """The user's word that this network may be imported, and the import. Names without a colon need none.

    Raises `UsageError` if there is no such function.
    """
    if not is_function(arch):
        return
    if not _FUNCTION.fullmatch(arch):
        raise UsageError(f"{opt('arch')} must be like package.module:function, got {arch!r:.60}")
    module, _, name = arch.partition(":")
    try:
        function = attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the network {arch} does not import: {error}", "install its package, or run in the folder of its module"
        ) from error
    if not callable(function):
        raise UsageError(f"the network {arch} is not a function", "name one of (planes, config) -> nn.Module")
    _named[arch] = function


def find_network(arch: str, ours: Iterable[str] = ()) -> Callable[..., nn.Module]:
    """The function of a network that is not one of `ours`.

    Raises `UsageError` if it is not installed, or is a function that nobody has named.
    """
    if arch in _named:
        return _named[arch]
    if is_function(arch):
        raise UsageError(
            f"the network {arch} is not imported unless you name it, as it comes with no installed entry point",
            f"if you trust that module, give {opt('arch', arch)}",
        )
    points = entry_points(group=GROUP)
    if arch not in points.names:
        raise UsageError(f"unknown network {arch!r:.60}", nearest(str(arch), [*ours, *sorted(points.names)]))
    try:
        return points[arch].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the network {arch} ({points[arch].value}) does not import: {error}", "reinstall its package"
        ) from error


def adopt(body: nn.Module, arch: str, shape: tuple[int, ...], classes: int, norm: type[nn.BatchNorm2d]) -> None:
    """Make a network fit for micro-batches: its BatchNorm layers become `norm`, a subclass that adds no state.

    shape: of a sample's planes, (P, h, w). Raises `UsageError` for layers whose result or state would depend on how a
    batch is divided, and unless it makes logits of the planes with all of its weights.
    """
    if not isinstance(body, nn.Module):
        raise UsageError(f"the network {arch} is {type(body).__name__}, not an nn.Module", "return one")
    for module in body.modules():
        kind = type(module).__name__
        if type(module) is nn.BatchNorm2d:
            if (module.momentum, module.affine, module.track_running_stats) != (0.1, True, True):
                raise UsageError(
                    f"the network {arch} has a BatchNorm2d with settings of its own",
                    "leave momentum, affine and track_running_stats at torch's defaults",
                )
            module.__class__ = norm
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            if not isinstance(module, norm):
                raise UsageError(
                    f"the network {arch} has a {kind}, whose statistics micro-batches cannot share",
                    "use BatchNorm2d, GroupNorm or LayerNorm",
                )
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UsageError(
                f"the network {arch} has a {kind}: what it draws would depend on the number of threads",
                "set its p to 0; the recipe's augmentation and label smoothing do its work",
            )
    _check_logits(body, arch, shape, classes)


def _check_logits(body: nn.Module, arch: str, shape: tuple[int, ...], classes: int) -> None:
    def fault(what: Any) -> UsageError:
        return UsageError(
            f"the network {arch} must make logits [2,{classes}] of planes [2,{','.join(map(str, shape))}]: {what}"
        )

    training, parameters = body.training, {n: p for n, p in body.named_parameters() if p.requires_grad}
    body.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = body(torch.zeros(2, *shape))
            if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
                found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
                raise fault(f"it gives {found}")
            if not parameters:
                raise fault("it has nothing to learn")
            gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise fault(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    finally:
        body.train(training)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise fault(f"its {name} takes no part")
