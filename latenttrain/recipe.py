"""How a run trains, as plain numbers. No torch here, so that the command line can show the defaults quickly."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from latentprep.errors import UsageError, nearest, opt

BASE_LR, BASE_BATCH, BASE_EPOCHS = 0.045, 64, 15  # a peak learning rate, and the run that it was chosen for
LR_BY_EPOCHS = 0.8  # it falls with the number of epochs to this power: docs/results.md


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run; the defaults train well untouched.

    Muon and AdamW, the learning rate rising linearly and then falling to zero as a cosine, averaged weights.
    `RECIPES` has others by name.

    Raises `UsageError` for a number out of range, naming it and the option that sets it.
    """

    epochs: int = BASE_EPOCHS
    batch_size: int = BASE_BATCH
    lr: float = BASE_LR  # the peak of Muon's; AdamW's is a fifth of it
    weight_decay: float = 0.05  # of convolutions and matrices; BatchNorm and biases have none
    label_smoothing: float = 0.1
    warmup: float = 0.05  # fraction of all steps in which the learning rate rises
    ema: float = 0.99  # highest decay a step of the averaged weights, which are those evaluated and kept
    seed: int = 0
    optimizer: str = "muon"  # or adam
    schedule: str = "cosine"  # or constant, after the warm-up
    compile: bool = False  # the training step; it rounds differently, so a run goes on as it began

    def __post_init__(self) -> None:
        for name, words in (("optimizer", ("muon", "adam")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in words:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}", nearest(str(getattr(self, name)), words))
        whole = {"epochs": (1, 1 << 20), "batch_size": (2, 1 << 20), "seed": (0, (1 << 63) - 1)}
        for name, (low, high) in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise out_of_range(name, value, f"a whole number from {low} to {high}")
        for name in ("lr", "weight_decay", "label_smoothing", "warmup", "ema"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise out_of_range(name, value, "a number")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.compile, bool):
            raise out_of_range("compile", self.compile, "true or false")
        if not 0 < self.lr < math.inf:
            raise out_of_range("lr", self.lr, "a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise out_of_range("weight_decay", self.weight_decay, "0 or more")
        for name in ("label_smoothing", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise out_of_range(name, getattr(self, name), "from 0 to below 1")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> Recipe:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UsageError(f"unknown training setting {name!r}", nearest(name, known))
        return cls(**fields)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step 0, 1, … of the whole run."""
        steps = self.epochs * steps_per_epoch
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# What each recipe sets other than `Recipe` does. Only the default's learning rate follows batch size and epochs.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "talk": {  # Jacobellis 2023; with no augmentation, which `fit` sees to
        "epochs": 20, "batch_size": 32, "lr": 0.001, "optimizer": "adam", "schedule": "constant",
        "weight_decay": 0.0, "label_smoothing": 0.0, "warmup": 0.0, "ema": 0.0,
    },
}  # fmt: skip


# What `fit --preset` sets, unless it is given itself; docs/results.md has what each comes to.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"epochs": 9},
    "best": {"full_grid": 2, "epochs": 40, "batch_size": 32},
}


def preset_settings(name: str | None) -> dict[str, Any]:
    """Convolutions on the full grid, epochs and batch size; None is the recipe's own.

    Raises `UsageError` for a name that is not there.
    """
    if name is not None and name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}", nearest(name, list(PRESETS)))
    settings = {"full_grid": 1, "epochs": None, "batch_size": None}
    return settings | PRESETS.get(name or "", {})


def make_recipe(name: str = "default", **given: Any) -> Recipe:
    """A recipe by its name in `RECIPES`, changed by what is given and not None.

    Raises `UsageError` for a name that is not there or a number out of range.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}", nearest(name, list(RECIPES)))
    settings = RECIPES[name] | {key: value for key, value in given.items() if value is not None}
    batch_size, epochs = settings.get("batch_size", BASE_BATCH), settings.get("epochs", BASE_EPOCHS)
    settings.setdefault("lr", default_lr(batch_size, epochs))
    return Recipe(**settings)


def default_lr(batch_size: int, epochs: int) -> float:
    """The peak learning rate for a batch of so many samples and so many epochs."""
    batches = math.sqrt(max(1, batch_size) / BASE_BATCH)
    return round(BASE_LR * batches * (BASE_EPOCHS / max(1, epochs)) ** LR_BY_EPOCHS, 6)


def out_of_range(name: str, value: object, allowed: str) -> UsageError:
    hints = {
        "lr": f"leave {opt('lr')} out: {BASE_LR:g} at {BASE_BATCH} samples a batch, {BASE_EPOCHS} epochs, else scaled"
    }
    hints["compile"] = f"leave {opt('compile')} out for false"
    default = getattr(Recipe, name, None)
    return UsageError(f"{opt(name)} must be {allowed}, got {value}", hints.get(name, f"use {opt(name, default)}"))
