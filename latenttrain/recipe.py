"""How a run trains, as plain numbers. Imports no torch, so that the command line can show the defaults quickly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentprep.errors import UsageError, check_number, check_whole, check_word, nearest, opt

BASE_LR, BASE_BATCH, BASE_EPOCHS = 0.045, 64, 15  # a peak learning rate, and the run that it was chosen on …
BASE_SAMPLES = 9469  # … Imagenette's
FEW_SAMPLES, FEW_BATCH = 1000, 32  # a smaller batch, so that few samples make more steps
MOST_EPOCHS = 150
MOST_LR = 0.4  # of Imagenette's single epoch
LR_BY_EPOCHS = 0.8  # it falls with the number of epochs to this power: docs/results.md


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run; the defaults train well as they are.

    Muon and AdamW; the learning rate rises linearly and then falls to zero along a cosine; weights are averaged.
    `RECIPES` has others by name.

    Raises `UsageError` naming a value that is out of range.
    """

    epochs: int = BASE_EPOCHS
    batch_size: int = BASE_BATCH
    lr: float = BASE_LR  # the peak of Muon's; AdamW's is a fifth of it
    weight_decay: float = 0.05  # of convolutions and matrices, not of BatchNorm and biases
    label_smoothing: float = 0.1
    warmup: float = 0.05  # fraction of all steps in which the learning rate rises
    ema: float = 0.99  # highest decay per step of the averaged weights, which are evaluated and kept
    seed: int = 0
    optimizer: str = "muon"  # or adam
    schedule: str = "cosine"  # or constant, after the warm-up
    norm_batch: int = 32  # samples at most in a micro-batch: `latenttrain.microbatch`
    compile: bool = False  # the training step; it rounds differently, so a run cannot change it when it resumes
    freeze: str | None = None  # what stays as the weights that a run starts from: `Net.freeze`

    def __post_init__(self) -> None:
        check_word("optimizer", self.optimizer, ("muon", "adam"))
        check_word("schedule", self.schedule, ("cosine", "constant"))
        check_whole("epochs", self.epochs, 1, 1 << 20, _hint("epochs"))
        check_whole("batch_size", self.batch_size, 2, 1 << 20, _hint("batch_size"))
        check_whole("norm_batch", self.norm_batch, 2, 1 << 20, _hint("norm_batch"))
        check_whole("seed", self.seed, 0, (1 << 63) - 1, _hint("seed"))
        check_number(
            "lr", self.lr, 0, above=True,
            hint=f"leave {opt('lr')} out for {BASE_LR:g}, scaled by epochs and batch size",
        )  # fmt: skip
        check_number("weight_decay", self.weight_decay, 0, hint=_hint("weight_decay"))
        for name in ("label_smoothing", "warmup", "ema"):
            check_number(name, getattr(self, name), 0, 1, _hint(name), below=True)
        for name in ("lr", "weight_decay", "label_smoothing", "warmup", "ema"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.freeze is not None:
            check_word("freeze", self.freeze, ("stem", "body"), f"leave {opt('freeze')} out to train all")
        if not isinstance(self.compile, bool):
            raise UsageError(f"{opt('compile')} must be true or false, got {self.compile!r}", "false is the default")

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


# What each recipe changes of `Recipe`. Where it sets no learning rate, that follows from batch size and epochs.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "talk": {  # Jacobellis 2023; `fit` then augments nothing by default
        "epochs": 20, "batch_size": 32, "norm_batch": 16, "lr": 0.001, "optimizer": "adam", "schedule": "constant",
        "weight_decay": 0.0, "label_smoothing": 0.0, "warmup": 0.0, "ema": 0.0,
    },
}  # fmt: skip


# What `fit --preset` sets; explicit options override it. docs/results.md has the results. longer: than by default.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"longer": 9 / BASE_EPOCHS},
    "best": {"longer": 40 / BASE_EPOCHS, "full_grid": 2, "batch_size": FEW_BATCH},
}


def preset_settings(name: str | None, samples: int = BASE_SAMPLES) -> dict[str, Any]:
    """full_grid, epochs and batch_size of a preset for so many training samples; None is the recipe's own.

    Raises `UsageError` for an unknown name.
    """
    if name is not None and name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}", nearest(name, list(PRESETS)))
    settings = {"full_grid": 1, "epochs": None, "batch_size": None} | PRESETS.get(name or "", {})
    if longer := settings.pop("longer", None):
        settings["epochs"] = round(longer * default_epochs(samples))
    return settings


def make_recipe(recipe: str | Mapping[str, Any] = "default", samples: int = BASE_SAMPLES, **given: Any) -> Recipe:
    """A recipe by its name in `RECIPES`, or from fields of `Recipe`. Values given and not None override a named one's.

    samples: that will be trained on; epochs, batch size and learning rate follow it where they are not given.
    Raises `UsageError` for an unknown name or field, one that is set twice, or a number out of range.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UsageError(f"unknown recipe {recipe!r}", nearest(recipe, list(RECIPES)))
        settings = RECIPES[recipe]
    else:
        settings = dict(recipe)
        if twice := settings.keys() & given.keys():
            raise UsageError(f"{opt('recipe')} sets {min(twice)}, which is also set by itself", "set it once")
    usual = {"epochs": default_epochs(samples), "batch_size": default_batch_size(samples)}
    made = Recipe.from_json(usual | settings | given)
    if "lr" in settings or "lr" in given:
        return made
    return dataclasses.replace(made, lr=default_lr(made.batch_size, made.epochs, samples))


def default_epochs(samples: int) -> int:
    """The fewer samples, the more epochs: by the root of their number, so that there are fewer steps all the same."""
    return min(MOST_EPOCHS, max(BASE_EPOCHS, round(BASE_EPOCHS * math.sqrt(BASE_SAMPLES / max(1, samples)))))


def default_batch_size(samples: int) -> int:
    """Samples in a batch by default."""
    return FEW_BATCH if samples < FEW_SAMPLES else BASE_BATCH


def default_lr(batch_size: int, epochs: int, samples: int = BASE_SAMPLES) -> float:
    """The default peak learning rate: it falls with the number of epochs, beside the default one for the samples."""
    batches = math.sqrt(max(1, batch_size) / BASE_BATCH)
    rate = BASE_LR * batches * (default_epochs(samples) / max(1, epochs)) ** LR_BY_EPOCHS
    return round(min(rate, MOST_LR), 6)


def _hint(name: str) -> str:
    return f"the default is {getattr(Recipe, name)}"
