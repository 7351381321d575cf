"""`report`: runs side by side, as a table and as one HTML page; with a dataset, the mistakes of each."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentprep.errors import CheckpointError, UsageError, opt, system_fault
from latentprep.format import LatentDataset, open_dataset
from latentprep.pictures.plots import COLOURS, INK, drawn
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of, several
from latenttrain.checkpoint import METRICS, config_net, read_config
from latenttrain.diagnosis import diagnose, mistakes
from latenttrain.nets import count_flops, count_parameters
from latenttrain.networks import name_network
from latenttrain.results import FLOAT, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BRIEF = ("run", "codec", "bits", "epochs", "best top-1", "last top-1", "params", "s/epoch")  # what 80 columns hold
_MARKS = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class RunSummary:
    """A run's settings and results. top1: of the best epoch; last_top1, last_top5: of the last; fractions of val.

    bits: per code, on average, 32 for float latents. planned: epochs asked for. seconds_per_epoch: median. metrics: one
    entry per epoch, as in ``metrics.jsonl``.
    """

    run: str
    name: str
    codec: str
    bits: float
    arch: str
    stem: str
    width: float
    depth: float
    seed: int
    parameters: int
    flops: int
    epochs: int
    planned: int
    best_epoch: int
    top1: float
    last_top1: float
    last_top5: float
    seconds_per_epoch: float
    metrics: list[dict]

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def read_run(run: str | Path) -> RunSummary:
    """The summary of a run folder. Raises `CheckpointError` if it is not a run or no epoch has ended."""
    root = path_of(run)
    config = read_config(root)
    path = root / METRICS
    try:
        metrics = [json.loads(line) for line in path.read_text().splitlines()]
        best = max(metrics, key=lambda entry: entry["top1"])
        seconds = statistics.median(float(entry["seconds"]) for entry in metrics)
        last = metrics[-1]
        numbers = [float(entry[name]) for entry in metrics for name in ("loss", "val_loss", "top1", "top5")]
        assert numbers
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{path} is missing, damaged or empty", "train until an epoch has ended") from error
    net = config_net(config, root)
    return RunSummary(
        run=str(root),
        name=root.resolve().name,
        codec=config.dataset["codec"]["name"],
        bits=FLOAT if config.dataset.get("latents") else config.quantizer.mean_bits,
        arch=config.net.arch,
        stem=config.net.stem,
        width=config.net.width,
        depth=config.net.depth,
        seed=config.recipe.seed,
        parameters=count_parameters(net),
        flops=count_flops(net),
        epochs=len(metrics),
        planned=config.recipe.epochs,
        best_epoch=best["epoch"],
        top1=best["top1"],
        last_top1=last["top1"],
        last_top5=last["top5"],
        seconds_per_epoch=seconds,
        metrics=metrics,
    )


def report(
    runs: Sequence[str | Path],
    *,
    dataset: str | Path | LatentDataset | None = None,
    out: str | Path = "runs.html",
    decoder: str = "codec",
    weights: str | None = None,
    arch: str | None = None,
    device: str = "auto",
) -> list[RunSummary]:
    """Write one HTML page that compares runs, and return their summaries.

    dataset: show each run's mistakes on its val split, too: the confusion matrix, and the worst ones as pictures. A run
    on other codes is compared, but not evaluated. decoder: ``codec``, or ``linear`` for the matrix that
    ``latentprep linear-decoder fit`` made. weights: the folder of the codec's weights, if it has moved.
    arch: as for `evaluate`.

    Raises `UsageError` for no run, `CheckpointError` for a folder that is not a run, and as `latentprep.preview` does.
    """
    from latentprep.pictures import page

    if not runs:
        raise UsageError("there is no run to report on", "name folders that latenttrain fit made")
    if dataset is None and (decoder != "codec" or weights is not None):
        raise UsageError(
            f"{opt('decoder')} and {opt('weights')} are for pictures of a dataset", f"name it with {opt('dataset')}"
        )
    name_network(arch or "")
    summaries = [read_run(run) for run in several(runs)]
    sections = [page.section("Runs", *comparison(summaries))]
    if dataset is not None:
        sections += _diagnoses(summaries, open_dataset(dataset), decoder, weights, device)
    lead = f"{len(summaries)} run {'folder' if len(summaries) == 1 else 'folders'} of latenttrain fit."
    document = page.page("Runs compared", lead, sections)
    try:
        write_atomic(path_of(out), document)
    except OSError as error:
        raise system_fault(error) from error
    return summaries


def _diagnoses(
    runs: Sequence[RunSummary], dataset: LatentDataset, decoder: str, weights: str | None, device: str
) -> list[str]:
    """A section for each run: its mistakes on the val split of a dataset, in HTML."""
    from latentprep.pictures import page
    from latentprep.pictures.decode import open_decoder

    opened = open_decoder(dataset, decoder, weights, device)
    sections = []
    for number, run in enumerate(runs, 1):
        try:
            found = diagnose(run.run, dataset, device=device)
        except CheckpointError as error:
            parts = [page.paragraph(f"Not evaluated: {error.message}.")]
        else:
            parts = [*found.summary(), *mistakes(found, dataset, opened)]
        sections.append(page.section(f"Run {number}: {run.name}", *parts))
    return sections


def runs_table(runs: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people; a run's number is its place."""
    columns = ["run", "codec", "bits", "net", "seed", "epochs", "best top-1", "last top-1", "last top-5", "params",
               "FLOPs", "s/epoch"]  # fmt: skip
    return columns, [
        [
            f"{number} {run.name}",
            run.codec,
            "float" if run.bits == FLOAT else f"{run.bits:.3g}",
            f"{run.arch} w{run.width:g} d{run.depth:g} {run.stem}",
            str(run.seed),
            f"{run.epochs}" if run.epochs == run.planned else f"{run.epochs} of {run.planned}",
            f"{run.top1:.2%}",
            f"{run.last_top1:.2%}",
            f"{run.last_top5:.2%}",
            f"{run.parameters:,}",
            count(run.flops),
            f"{run.seconds_per_epoch:.1f}",
        ]
        for number, run in enumerate(runs, 1)
    ]


def comparison(runs: Sequence[RunSummary]) -> list[str]:
    """The table, the curves, and accuracy against bits, in HTML."""
    from latentprep.pictures import page

    figures = [_curves(runs, "val_loss", "val loss (nats)"), _curves(runs, "top1", "val top-1")]
    if len({run.bits for run in runs}) > 1:
        figures.append(_against_bits(runs))
    return [page.table("Runs; accuracies are on val", *runs_table(runs)), page.charts(figures)]


def _curves(runs: Sequence[RunSummary], what: str, title: str) -> str:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from latentprep.pictures import page

    with drawn(1, 4.5, 3.2) as ((axes,), picture):
        for number, run in enumerate(runs):
            axes.plot(
                [entry["epoch"] for entry in run.metrics], [entry[what] for entry in run.metrics],
                color=COLOURS[number % len(COLOURS)], linestyle=_MARKS[number // len(COLOURS) % len(_MARKS)],
                label=f"run {number + 1}", marker="o" if len(run.metrics) == 1 else None,
            )  # fmt: skip
        if what == "top1":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch", color=INK)
        axes.set_title(title, loc="left", color=INK)
        _legend(axes, len(runs))
    ends = "; ".join(f"run {n} ends at {run.metrics[-1][what]:.3f}" for n, run in enumerate(runs, 1))
    return page.chart(picture, f"{title} over the epochs: {ends}")


def _against_bits(runs: Sequence[RunSummary]) -> str:
    from matplotlib.ticker import PercentFormatter

    from latentprep.pictures import page

    places = sorted({run.bits for run in runs})
    with drawn(1, 4.5, 3.2) as ((axes,), picture):
        for number, run in enumerate(runs):
            axes.plot(places.index(run.bits), run.last_top1, "o", color=COLOURS[number % len(COLOURS)],
                      label=f"run {number + 1}")  # fmt: skip
        axes.set_xticks(range(len(places)), ["float" if bits == FLOAT else f"{bits:.3g}" for bits in places])
        axes.margins(x=0.1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("bits per code", color=INK)
        axes.set_title("last val top-1 against bits", loc="left", color=INK)
        _legend(axes, len(runs))
    values = "; ".join(f"run {n}: {run.bits:.3g} bits, {run.last_top1:.1%}" for n, run in enumerate(runs, 1))
    return page.chart(picture, f"Last val top-1 against bits: {values}")


def _legend(axes: Axes, runs: int) -> None:
    if 1 < runs <= 12:
        axes.legend(frameon=False, labelcolor=INK, ncols=1 + (runs - 1) // 6, loc="best")
