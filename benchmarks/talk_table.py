"""The talk's experiment (Jacobellis 2023) at its own sizes, and this project's network beside it.

    python benchmarks/talk_table.py imagenette --out talk                  # every row and seed that is not there yet
    python benchmarks/talk_table.py imagenette --out talk --clock          # then, on a quiet machine, seconds an epoch

A row is a network, what it is trained on, and a recipe; `--list` prints them, `--rows` picks some by shell patterns.
Datasets, runs and results all resume: what is in the folder is left alone, and each result is written as it ends.
`codes28` and `codes64` are the codec's codes, of an autoencoder at 224 and 512 pixels; `resample64` is pixels kept as
8-bit codes; `jpeg224` is pixels that workers decode from JPEG files in every epoch, as is customary.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

import latentprep
import latenttrain
from common import Runs, chosen, fill, kept_codes, machine, mean_spread, spread, write_json
from latentprep.audit.info import info
from latentprep.cli.console import progress_bar, tune_process
from latentprep.codecs import Codec, make_codec
from latentprep.device import pick_device
from latentprep.errors import UsageError
from latentprep.format import Quantizer
from latentprep.pictures.plots import BLUE, GREY, INK, draw, log_below
from latentprep.progress import silent
from latentprep.sources.images import load_views
from latentprep.sources.source import Source, open_source
from latenttrain.augment import Augment
from latenttrain.checkpoint import check_run_folder, read_config
from latenttrain.config import RunConfig, versions
from latenttrain.data import Split, batches_per_epoch, load_trained, one_hot
from latenttrain.nets import NetConfig
from latenttrain.recipe import make_recipe
from latenttrain.runtime import synchronize
from latenttrain.train import run_fit, start_state, train_epoch

TALK = ((10510, 0.58, 0.398), (64 * 64 * 3, 0.39, 0.354), (64 * 64 * 2, 0.44, 0.329))  # its bytes, best and last epoch


@dataclass(frozen=True)
class Row:
    """arch, width: of the network. input: jpegN, resampleN or codesN, with a grid of N x N. batch: the recipe's."""

    arch: str
    width: float
    input: str
    recipe: str
    batch: int | None = None

    @property
    def name(self) -> str:
        width = "" if self.width == 1 else f"-{self.width:g}"
        return f"{self.arch}{width}-{self.input}-{self.recipe}" + (f"-{self.batch}" if self.batch else "")

    @property
    def kind(self) -> str:
        return self.input.rstrip("0123456789")

    @property
    def grid(self) -> int:
        return int(self.input.removeprefix(self.kind))


ROWS = (
    Row("mobilenetv2", 1, "jpeg224", "talk"),
    Row("mobilenetv2", 0.25, "resample64", "talk"),
    Row("mobilenetv2", 0.25, "codes64", "talk"),
    Row("mobilenetv2", 1, "jpeg224", "default"),
    Row("mobilenetv2", 0.25, "resample64", "default"),
    Row("mobilenetv2", 0.25, "codes64", "default"),
    *(Row("latentnet", 1, f"codes{grid}", recipe) for grid in (28, 64) for recipe in ("talk", "default")),
    *(Row("latentnet", 1, f"resample{grid}", "default") for grid in (28, 56, 64)),
    *(Row("latentnet", 1, f"jpeg{grid}", "default") for grid in (56, 64)),
    *(Row("latentnet", 1, "codes28", "default", batch) for batch in (256, 1024, 4096)),
)


class Images(Dataset):
    """One split of a source as pixels: u8 [3,S,S] and the label, decoded when asked for."""

    def __init__(self, source: Source, split: str, size: int) -> None:
        self.source, self.split, self.size = source, split, size

    def __len__(self) -> int:
        return self.source.size(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        sample = self.source.read(self.split, row)
        return torch.from_numpy(load_views(sample.data, self.size)[0]).permute(2, 0, 1), sample.label


@dataclass
class JpegSplit:
    """What `latenttrain.data.Split` is to codes: batches of pixels from image files, by a `DataLoader` with workers."""

    images: Images
    workers: int
    device: torch.device
    soft = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        return torch.tensor(self.images.source.labels(self.images.split), device=self.device)

    def training_rows(self, batch_size: int, generator: Generator, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=generator, device=self.device).tolist()
        count = batches_per_epoch(len(self), batch_size)
        yield from self._loaded([order[i * batch_size : (i + 1) * batch_size] for i in range(count)])

    def codes_of(self, rows: Tensor) -> Tensor:
        return rows

    def targets_of(self, rows: Tensor, labels: Tensor, classes: int) -> Tensor:
        return one_hot(labels, classes)

    def batches(self, batch_size: int, wanted: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        every = [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]
        yield from self._loaded(every if wanted is None else every[wanted.start : wanted.stop])

    def _loaded(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader = DataLoader(
            self.images, batch_sampler=batches, num_workers=self.workers, pin_memory=self.device.type == "cuda"
        )
        for pixels, labels in loader:
            yield pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def pixels_config(row: Row, source: Source, epochs: int | None, seed: int = 0) -> RunConfig:
    """A row on JPEG files, as a run."""
    quantizer = Quantizer(8, (-0.5,) * 3, (1.0,) * 3)
    net = NetConfig(
        latent=(3, row.grid, row.grid), classes=len(source.classes), bits=8, lo=quantizer.lo, step=quantizer.step,
        arch=row.arch, width=row.width,
    )  # fmt: skip
    dataset = {
        "path": source.spec, "source": {"spec": source.spec, "sha256": source.fingerprint()},
        "codec": {"name": "pixels"}, "quantizer": quantizer.to_json(), "transform": {"size": row.grid},
        "classes": list(source.classes), "limit": None, "manifest_sha256": "",
    }  # fmt: skip
    recipe = make_recipe(row.recipe, source.size("train"), epochs=epochs, batch_size=row.batch, seed=seed)
    shift = 3 * max(1, row.grid // 75)  # as far as three cells of codes are on the picture, if it is a large one
    return RunConfig(
        net, recipe, Augment.none() if row.recipe == "talk" else Augment(shift, mirror=True), dataset, versions()
    )


class Table:
    """The rows of a folder: encodes, trains and keeps what is not there yet. Several processes may share a folder."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out, self.runs = asked, asked.out, Runs(asked.out / "results")
        self.source = open_source(asked.source, data=asked.data)
        if asked.limit:
            self.source = self.source.take(asked.limit)
        self.codec: Codec = make_codec(asked.codec, **({"weights": asked.weights} if asked.weights else {}))
        self.device = pick_device(asked.device)

    def dataset(self, row: Row) -> Path:
        """The row's latent dataset, encoded unless it is there."""
        if row.kind == "resample":
            codec = make_codec("resample", factor=1)
            return kept_codes(self.out, f"resample-{row.grid}px", self.source, codec, row.grid, 8)
        size = 512 // self.codec.latent_shape(512, 512)[1] * row.grid
        return kept_codes(self.out, f"{self.codec.name}-{size}px", self.source, self.codec, size, self.asked.bits)

    def splits(self, row: Row, source: Source | None = None) -> tuple[JpegSplit, JpegSplit]:
        source, workers = source or self.source, self.asked.workers
        train, val = (JpegSplit(Images(source, split, row.grid), workers, self.device) for split in ("train", "val"))
        return train, val

    def train(self, row: Row, seed: int) -> dict:
        """One run of a row: its result."""
        asked, run = self.asked, self.out / "runs" / f"{row.name}-s{seed}"
        if row.kind == "jpeg":
            config = pixels_config(row, self.source, asked.epochs, seed)
            check_run_folder(run, config, resume=True, overwrite=False)
            found = run_fit(config, *self.splits(row), run, True, progress_bar)  # type: ignore[arg-type]
        else:
            found = latenttrain.fit(
                self.dataset(row), arch=row.arch, width=row.width, recipe=row.recipe, epochs=asked.epochs,
                batch_size=row.batch, seed=seed, device=asked.device, out=run, resume=True, progress=progress_bar,
            )  # fmt: skip
        return found.to_json()

    def add(self, row: Row, seed: int) -> None:
        """One run of a row, kept at once. A loss that is no number is a result, too: the row breaks."""
        if self.runs.path(row.name, seed).exists():
            return
        try:
            found = self.train(row, seed)
        except UsageError as error:
            if "NaN" not in str(error):
                raise
            found = {"breaks": str(error)}
        self.runs.keep(row.name, seed, found)

    def bytes_per_image(self, row: Row) -> float:
        """What an image takes on disk."""
        if row.kind == "jpeg":
            rows = range(0, self.source.size("train"), -(-self.source.size("train") // 500))  # some of each class
            return statistics.mean(len(self.source.read("train", i).data) for i in rows)
        return info(self.dataset(row)).bytes_per_image

    def clock(self, rows: list[Row], rounds: int = 5, images: int = 256) -> None:
        """Keeps the seconds of an epoch of each row that is trained: all in turn, so many times."""
        few = self.source.take(images)
        work: dict[str, tuple[RunConfig, Split | JpegSplit]] = {}
        for row in rows:
            runs = sorted((self.out / "runs").glob(f"{row.name}-s*"))
            if not runs:
                continue
            config = read_config(runs[0])
            if row.kind == "jpeg":
                work[row.name] = config, self.splits(row, few)[0]
            else:
                whole = load_trained(latentprep.open(self.dataset(row)), self.device)[0]
                some = max(8 * images, config.recipe.batch_size)
                work[row.name] = config, Split(whole.codes[:some], whole.labels[:some])
        seconds = clocked(list(work.values()), self.device, rounds)
        found = {
            name: spread([s * self.source.size("train") for s in own]) for name, own in zip(work, seconds, strict=True)
        }
        write_json(self.out / "results" / "clock.json", {"machine": machine(), "seconds_per_epoch": found})

    def gathered(self) -> dict[str, dict]:
        """All results so far, by row, in the order of `ROWS`."""
        clock = self.out / "results" / "clock.json"
        clocked = json.loads(clock.read_text())["seconds_per_epoch"] if clock.exists() else {}
        rows = {}
        for row in ROWS:
            if runs := self.runs.of(row.name):
                rows[row.name] = {
                    **vars(row), "bytes_per_image": self.bytes_per_image(row),
                    "clocked_seconds_per_epoch": clocked.get(row.name), "runs": runs,
                }  # fmt: skip
        document = {
            "benchmark": "talk_table", "epochs": self.asked.epochs, "codec": self.asked.codec, "bits": self.asked.bits,
            "images": self.source.size("train"), "machine": machine(), "rows": rows,
        }  # fmt: skip
        write_json(self.out / "talk_table.json", document)
        return rows

    def show(self) -> None:
        """The table on stdout, and the picture."""
        rows = self.gathered()
        print("| row | best epoch | last epoch | n | parameters | TFLOPs per epoch | bytes per image | s per epoch |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, row in rows.items():
            runs = [run for run in row["runs"].values() if "breaks" not in run]
            if not runs:
                print(f"| {name} | breaks | breaks | {len(row['runs'])} | | | | |")
                continue
            best, last = (mean_spread([run[of] for run in runs]) for of in ("top1", "last_top1"))
            flops = 3 * runs[0]["flops"] * self.source.size("train") / 1e12  # a step is three forward passes
            clocked = row["clocked_seconds_per_epoch"]
            seconds = f"{clocked['median']:.1f}" if clocked else ""
            print(
                f"| {name} | {best} | {last} | {len(row['runs'])} | {runs[0]['parameters']:,} | {flops:.2f} "
                f"| {row['bytes_per_image']:,.0f} | {seconds} |"
            )
        self.picture([row for row in rows.values() if not row["batch"]])

    def picture(self, rows: list[dict]) -> None:
        """Best epochs against bytes, and against seconds where rows are clocked, with the talk's points open."""
        points = []
        for row in rows:
            if top1 := [run["top1"] for run in row["runs"].values() if "breaks" not in run]:
                points.append((row, statistics.mean(top1)))
        axes_of: dict[str, Callable[[dict], float | None]] = {"bytes an image": lambda row: row["bytes_per_image"]}
        if any(row["clocked_seconds_per_epoch"] for row, _ in points):
            axes_of["seconds an epoch"] = lambda row: (row["clocked_seconds_per_epoch"] or {}).get("median")
        with draw(self.out / "talk_table.png", len(axes_of)) as panels:
            for axes, (label, value) in zip(panels, axes_of.items(), strict=True):
                for row, top1 in points:
                    if (x := value(row)) is None:
                        continue
                    axes.plot(x, top1, "o", color=BLUE if row["arch"] == "latentnet" else GREY)
                    axes.annotate(
                        f"{row['input']} {row['recipe']}", (x, top1), color=INK, fontsize=7,
                        xytext=(4, 3), textcoords="offset points",
                    )  # fmt: skip
                log_below(axes)
                axes.margins(0.25, 0.1)
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
                axes.set_xlabel(label, color=INK)
            for bytes_per_image, best, _ in TALK:
                panels[0].plot(bytes_per_image, best, "o", color=GREY, fillstyle="none")
            panels[0].set_title(f"best val top-1 of {self.asked.epochs} epochs", loc="left", color=INK)
            panels[0].annotate(
                "blue: latentnet; grey: MobileNetV2; open: the talk's", (0.02, 0.02), color=INK, fontsize=6,
                xycoords="axes fraction",
            )  # fmt: skip


def clocked(work: list[tuple[RunConfig, Split | JpegSplit]], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds a sample of training each network on its split, in turn, so many times after one to warm up."""
    states = []
    for config, _ in work:
        torch.manual_seed(0)
        states.append(start_state(config, device))
    seconds: list[list[float]] = [[] for _ in work]
    with silent("", 0, "") as bar:
        for turn in range(rounds + 1):
            for (config, split), state, own in zip(work, states, seconds, strict=True):
                synchronize(device)
                start = time.perf_counter()
                train_epoch(state, config, split, 0, bar)  # type: ignore[arg-type]
                synchronize(device)
                if turn:
                    own.append((time.perf_counter() - start) / len(split))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--data", default=None, help="a copy of the named dataset")
    parser.add_argument("--codec", default="taesd")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows, or shell patterns")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20, help="of every row")
    parser.add_argument("--limit", type=int, default=None, help="images a split")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("talk"))
    parser.add_argument("--clock", action="store_true", help="clock the rows that are there, and train nothing")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    asked = parser.parse_args()
    if asked.list or not asked.clock:
        fill(Table, ROWS, asked)
        return
    names = chosen([row.name for row in ROWS], asked.rows)
    tune_process()
    asked.out.mkdir(parents=True, exist_ok=True)
    table = Table(asked)
    table.clock([row for row in ROWS if row.name in names])
    table.show()


if __name__ == "__main__":
    main()
