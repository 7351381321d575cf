"""Train small networks on the codes of a latent dataset.

`__all__` holds what the command line runs; all of it is imported on first use, so that importing this package stays
cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Augment", "FitResult", "evaluate", "fit", "predict", "report", "scale_table", "sweep"]

if TYPE_CHECKING:
    from latenttrain.augment import Augment
    from latenttrain.comparison import report
    from latenttrain.evaluation import evaluate, predict
    from latenttrain.scaling import scale_table
    from latenttrain.sweeping import sweep
    from latenttrain.train import FitResult, fit

_HOMES = {
    "Augment": "augment",
    "FitResult": "train",
    "evaluate": "evaluation",
    "fit": "train",
    "predict": "evaluation",
    "report": "comparison",
    "scale_table": "scaling",
    "sweep": "sweeping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latenttrain' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
