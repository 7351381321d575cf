"""Train small networks on the codes of a latent dataset.

Imports latentprep's `format`, `storage` and ground modules; pyproject.toml lists the few exceptions. `__all__` holds
what the command line runs; each name is imported on first use, so that importing this package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Augment", "FitResult", "evaluate", "export", "fit", "label", "predict", "report", "scale_table", "sweep"]

if TYPE_CHECKING:
    from latenttrain.augment import Augment
    from latenttrain.evaluation import evaluate, predict
    from latenttrain.exports import export
    from latenttrain.labels import label
    from latenttrain.results import FitResult
    from latenttrain.runs import report
    from latenttrain.scaling import scale_table
    from latenttrain.sweeps import sweep
    from latenttrain.train import fit

_HOMES = {
    "Augment": "augment",
    "FitResult": "results",
    "evaluate": "evaluation",
    "export": "exports",
    "fit": "train",
    "label": "labels",
    "predict": "evaluation",
    "report": "runs",
    "scale_table": "scaling",
    "sweep": "sweeps",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latenttrain' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
