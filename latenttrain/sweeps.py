"""`sweep`: the accuracy that fewer bits and other stems cost, over seeds, compared with float latents."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from latentprep.errors import UsageError, check_whole, nearest, opt
from latentprep.format import LatentDataset, open_dataset
from latentprep.format.quantizer import Codebook
from latentprep.pictures.plots import COLOURS, GREY, GRID, INK, draw
from latentprep.progress import ProgressFactory, silent
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of
from latenttrain.results import FLOAT
from latenttrain.stems import STEMS
from latenttrain.train import fit


class Point(NamedTuple):
    """One run. bits: 32 for float latents. Accuracies are of the last epoch; bytes_per_image: its codes on disk."""

    bits: int
    stem: str
    seed: int
    top1: float
    bytes_per_image: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    run: str


class Group(NamedTuple):
    """Runs that differ in their seed only: mean and standard deviation (0 for a single run) of their accuracies."""

    bits: int
    stem: str
    mean: float
    deviation: float
    n: int
    bytes_per_image: float


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep. recommended: the bits that `advice` names, None if none is near enough."""

    points: list[Point]
    groups: list[Group]
    recommended: int | None
    advice: str
    csv: str
    picture: str

    def to_json(self) -> dict:
        named = {"points": [p._asdict() for p in self.points], "groups": [g._asdict() for g in self.groups]}
        return asdict(self) | named

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people."""
        rows = [
            [name(g.bits), g.stem, f"{g.mean:.2%}", f"{g.deviation * 100:.2f}" if g.n > 1 else "-", str(g.n),
             f"{g.bytes_per_image:,.0f}"]
            for g in self.groups
        ]  # fmt: skip
        return ["bits", "stem", "top-1", "± points", "n", "bytes per image"], rows


def sweep(
    dataset: str | Path | LatentDataset,
    *,
    bits: Sequence[float] = range(1, 9),
    stems: Sequence[str] = ("affine",),
    seeds: int = 3,
    epochs: int | None = None,
    latents: str | Path | None = None,
    margin: float = 0.5,
    holdout: float = 0.0,
    limit: int | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    progress: ProgressFactory = silent,
) -> SweepResult:
    """Train at each number of bits with each stem and seed, and compare. If it is run again, it continues.

    Datasets of fewer bits are made from `dataset` by `latentprep.requantize`. latents: a folder written by
    ``latentprep latents``, the reference; without it, the reference is the most bits. margin: points of accuracy that
    the recommended bits may lose. holdout: evaluate on this share of train in place of val. Accuracies are those of
    each run's last epoch.

    Raises as `fit` and `requantize` do, and `UsageError` for more bits than the dataset has, or for latents of a
    dataset with several views.
    """
    from latentprep.audit.info import info
    from latentprep.derived.requantize import requantize

    source = open_dataset(dataset)
    if isinstance(source.quantizer, Codebook):
        raise UsageError(
            f"the codes of {source.root} are tokens: they have stages in place of bits",
            "make datasets of fewer with latentprep requantize --stages, and compare runs on them",
        )
    most = source.quantizer.mean_bits
    wrong = [b for b in bits if b not in range(1, int(most) + 1)]
    if wrong or not bits:
        raise UsageError(
            f"{opt('bits')} must be 1 to {int(most)}, the bits of {source.root}, got "
            f"{f'{wrong[0]:g}' if wrong else 'none'}",
            f"use {opt('bits')} 1..{max(1, int(most))}, or encode with {opt('bits', 8)}",
        )
    for stem in stems:
        if stem not in STEMS:
            raise UsageError(f"unknown stem {stem!r}", nearest(stem, list(STEMS)))
    if latents is not None and source.manifest.views("train") > 1:
        raise UsageError(
            f"{source.root} has {source.manifest.views('train')} views, but float latents have view 0 only",
            f"use a dataset with one view, or leave {opt('latents')} out",
        )
    check_whole("seeds", seeds, 1, 1000, f"use {opt('seeds', 3)}")
    root = path_of(out) if out is not None else Path("sweeps", source.root.resolve().name)
    sizes: dict[int, float] = {}
    points = []
    grid = [(b, stem) for b in sorted(set(map(int, bits)), reverse=True) for stem in stems]
    if latents is not None:
        grid.insert(0, (FLOAT, "affine"))
    for seed in range(seeds):  # seed by seed, so that an interrupted sweep has runs of every kind
        for b, stem in grid:
            codes = str(source.root if b in (most, FLOAT) else root / f"{b}bit")
            if b not in sizes:
                if codes != str(source.root):
                    requantize(source, bits=b, out=codes, progress=progress)
                float_bytes = 2.0 * source.manifest.latent[0] * source.manifest.latent[1] * source.manifest.latent[2]
                sizes[b] = float_bytes if b == FLOAT else info(codes).bytes_per_image
            run = fit(
                codes, stem=stem, seed=seed, epochs=epochs, limit=limit, holdout=holdout, device=device,
                latents=latents if b == FLOAT else None, out=root / "runs" / f"{name(b)}-{stem}-s{seed}",
                resume=True, progress=progress,
            )  # fmt: skip
            points.append(
                Point(b, stem, seed, run.last_top1, sizes[b], run.parameters, run.flops, run.seconds_per_epoch, run.run)
            )
            write_csv(root / "sweep.csv", points)
    groups = grouped(points)
    best, advice = recommended(groups, margin)
    draw_sweep(groups, root / "sweep.png", "held-out part of train" if holdout else "val")
    return SweepResult(points, groups, best, advice, str(root / "sweep.csv"), str(root / "sweep.png"))


def name(bits: int) -> str:
    return "float" if bits == FLOAT else str(bits)


def write_csv(path: Path, points: list[Point]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows([point._replace(bits=name(point.bits)) for point in points])  # type: ignore[arg-type]
    write_atomic(path, text.getvalue().encode())


def grouped(points: list[Point]) -> list[Group]:
    """Runs of the same bits and stem together, the most bits first."""
    groups = []
    for bits, stem in dict.fromkeys((p.bits, p.stem) for p in sorted(points, key=lambda p: -p.bits)):
        alike = [p for p in points if (p.bits, p.stem) == (bits, stem)]
        found = [p.top1 for p in alike]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        groups.append(Group(bits, stem, statistics.mean(found), deviation, len(found), alike[0].bytes_per_image))
    return groups


def recommended(groups: list[Group], margin: float) -> tuple[int | None, str]:
    """The fewest bits whose best stem's mean is within `margin` points of the reference, and that as a sentence.

    Of stems whose means differ by less than `noise`, the first is named. The sentence says what is within the noise.
    """
    reference = max((g for g in groups if g.bits == groups[0].bits), key=lambda g: g.mean)
    near = [g for g in groups if g.bits != FLOAT and g.mean >= reference.mean - margin / 100]
    if not near:
        return (
            None,
            f"none: every number of bits loses more than {margin:g} points compared with {name(reference.bits)}",
        )
    best = min(near, key=lambda g: (g.bits, -g.mean))
    chosen = next(g for g in near if g.bits == best.bits and best.mean - g.mean <= noise(g, best))
    bits = f"{chosen.bits} bit{'s' if chosen.bits > 1 else ''}"
    lost, doubt = (reference.mean - chosen.mean) * 100, noise(reference, chosen) * 100
    if min(reference.n, chosen.n) < 2:
        known = "one seed, so the noise is unknown"
    else:
        known = f"{'within the' if abs(lost) <= doubt else 'beyond the'} noise of {doubt:.2f}"
    return chosen.bits, (
        f"{bits} with stem {chosen.stem}: {abs(lost):.2f} points {'below' if lost > 0 else 'above'} "
        f"{'float latents' if reference.bits == FLOAT else f'{reference.bits} bits'} ({known}), "
        f"{chosen.bytes_per_image:,.0f} bytes per image"
    )


def noise(one: Group, other: Group) -> float:
    """Two standard errors of the difference of two means over seeds; 0 where a single seed tells nothing of it."""
    if min(one.n, other.n) < 2:
        return 0.0
    return 2 * math.sqrt(one.deviation**2 / one.n + other.deviation**2 / other.n)


def draw_sweep(groups: list[Group], path: Path, judged_by: str) -> None:
    """Accuracy against bits and bytes per image, as a PNG: one line per stem, bars of one standard deviation."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    stems = list(dict.fromkeys(g.stem for g in groups))
    reference = next((g for g in groups if g.bits == FLOAT), None)
    with draw(path, 2) as (left, right):
        for axes, of in ((left, lambda g: g.bits), (right, lambda g: g.bytes_per_image)):
            for stem, color in zip(stems, COLOURS, strict=False):
                line = sorted((g for g in groups if g.stem == stem and g.bits != FLOAT), key=of)
                axes.errorbar(
                    [of(g) for g in line], [g.mean for g in line], [g.deviation for g in line],
                    color=color, marker="o", markersize=4, capsize=3, label=stem,
                )  # fmt: skip
            if reference is not None:
                axes.axhline(reference.mean, color=GREY, linestyle="--", label="float latents")
                low, high = reference.mean - reference.deviation, reference.mean + reference.deviation
                axes.axhspan(low, high, color=GRID, zorder=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.legend(frameon=False, labelcolor=INK, loc="lower right")
        left.set_title(f"top-1 on {judged_by}, against bits per code", loc="left", color=INK)
        left.set_xlabel("bits", color=INK)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_title("against bytes per image", loc="left", color=INK)
        right.set_xlabel("bytes per image on disk", color=INK)
