"""Train small networks on the codes of a latent dataset.

`fit`, `evaluate` and `predict` are what the command line runs; all are imported on first use, so that importing
this package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Augment", "FitResult", "evaluate", "fit", "predict"]

if TYPE_CHECKING:
    from .augment import Augment
    from .evaluation import evaluate, predict
    from .train import FitResult, fit

_HOMES = {
    "Augment": "augment",
    "FitResult": "train",
    "evaluate": "evaluation",
    "fit": "train",
    "predict": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latenttrain' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
