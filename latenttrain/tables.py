"""A run for people: the curve picture and the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latentprep.pictures.plots import BLUE, GREY, INK, draw

if TYPE_CHECKING:
    from latenttrain.evaluation import EvalResult
    from latenttrain.train import FitResult


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


def fit_table(result: FitResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that ends a run: the best epoch and the last."""
    columns = ["epoch", "top-1", "top-5", "params", "FLOPs", "s/epoch", "samples/s"]
    cost = [
        f"{result.parameters:,}",
        count(result.flops),
        f"{result.seconds_per_epoch:.2f}",
        f"{result.samples_per_second:,.0f}",
    ]
    return columns, [
        [f"{result.best_epoch}, best", f"{result.top1:.2%}", f"{result.top5:.2%}", *cost],
        [f"{result.epochs}, last", f"{result.last_top1:.2%}", f"{result.last_top5:.2%}", "", "", "", ""],
    ]


def eval_table(result: EvalResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of an evaluation: all samples, then class by class, the hardest first."""
    known = {name: top1 for name, top1 in result.per_class.items() if top1 is not None}
    rows = [["all", f"{result.top1:.2%}", f"{result.top5:.2%}", f"{result.loss:.4f}"]]
    rows += [[name, f"{top1:.2%}", "", ""] for name, top1 in sorted(known.items(), key=lambda item: item[1])]
    return ["class", "top-1", "top-5", "loss"], rows


def count(number: float) -> str:
    """`43120000` -> `43.1 M`."""
    for unit in ("", " k", " M", " G"):
        if number < 1000 or unit == " G":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if number < 1000 else f"{number:,.0f}{unit}"
