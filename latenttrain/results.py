"""What `fit`, `evaluate` and `predict` return, their tables for people, and a run's curve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from latentprep.pictures.plots import BLUE, GREY, INK, draw

FLOAT = 32  # "bits" of float latents


@dataclass(frozen=True)
class FitResult:
    """The result of a run. Accuracies are fractions of the val split, measured with the averaged weights.

    top1, top5: of ``best_epoch``, chosen by val top-1, so slightly optimistic; last_top1, last_top5: of the last epoch.
    parameters: trainable ones. flops: of one sample's forward pass; a multiply-add is 2.
    seconds_per_epoch: median over the epochs, training only; samples_per_second: the same as a rate, of all ranks.
    ranks: processes that trained together.
    """

    run: str
    curve: str
    device: str
    epochs: int
    best_epoch: int
    top1: float
    top5: float
    last_top1: float
    last_top5: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    samples_per_second: float
    ranks: int = 1

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people: the best epoch and the last."""
        columns = ["epoch", "top-1", "top-5", "params", "FLOPs", "s/epoch", "samples/s"]
        cost = [
            f"{self.parameters:,}",
            count(self.flops),
            f"{self.seconds_per_epoch:.2f}",
            f"{self.samples_per_second:,.0f}",
        ]
        return columns, [
            [f"{self.best_epoch}, best", f"{self.top1:.2%}", f"{self.top5:.2%}", *cost],
            [f"{self.epochs}, last", f"{self.last_top1:.2%}", f"{self.last_top5:.2%}", "", "", "", ""],
        ]


@dataclass(frozen=True)
class EvalResult:
    """Accuracies are fractions; ``top5`` counts the five (or all, if fewer) likeliest classes.

    loss: mean cross-entropy in nats. epoch: the one that the weights are from. per_class: top-1 of each class, None
    for a class without samples in the split.
    """

    run: str
    dataset: str
    split: str
    samples: int
    epoch: int
    top1: float
    top5: float
    loss: float
    per_class: dict[str, float | None]

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people: all samples, then each class, the hardest first."""
        known = {name: top1 for name, top1 in self.per_class.items() if top1 is not None}
        rows = [["all", f"{self.top1:.2%}", f"{self.top5:.2%}", f"{self.loss:.4f}"]]
        rows += [[name, f"{top1:.2%}", "", ""] for name, top1 in sorted(known.items(), key=lambda item: item[1])]
        return ["class", "top-1", "top-5", "loss"], rows


@dataclass(frozen=True)
class Prediction:
    """An image's likeliest classes with their probabilities, likeliest first; or why it could not be read."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""

    def to_json(self) -> dict:
        if self.error:
            return {"image": self.image, "error": self.error}
        return {"image": self.image, "classes": [{"name": n, "probability": p} for n, p in self.classes]}


def draw_curve(metrics: list[dict], path: Path) -> None:
    """Loss and val accuracy over the epochs, as a PNG. metrics: entries of ``metrics.jsonl``, at least one."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [entry["epoch"] for entry in metrics]
    best = max(metrics, key=lambda entry: entry["top1"])
    with draw(path, 2) as (left, right):
        left.plot(epochs, [entry["loss"] for entry in metrics], color=GREY, label="train: augmented, smoothed labels")
        left.plot(epochs, [entry["val_loss"] for entry in metrics], color=BLUE, label="val")
        left.set_title("loss (nats)", loc="left", color=INK)
        left.legend(frameon=False, labelcolor=INK)

        right.plot(epochs, [entry["top5"] for entry in metrics], color=GREY, label="val top-5")
        right.plot(epochs, [entry["top1"] for entry in metrics], color=BLUE, label="val top-1")
        right.plot(best["epoch"], best["top1"], "o", color=BLUE, markersize=5)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.set_title(f"accuracy, best {best['top1']:.1%} at epoch {best['epoch']}", loc="left", color=INK)
        right.legend(frameon=False, labelcolor=INK, loc="lower right")

        for axes in (left, right):
            axes.set_xlabel("epoch", color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(x=0.02)


def count(number: float) -> str:
    """`43120000` -> `43.1 M`."""
    for unit in ("", " k", " M", " G"):
        if number < 1000 or unit == " G":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if number < 1000 else f"{number:,.0f}{unit}"
