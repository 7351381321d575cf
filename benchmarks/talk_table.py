"""The talk's experiment (Jacobellis 2023), and this project's network beside it: one table, JSON and picture.

    python benchmarks/talk_table.py imagenette --codec taesd --weights … --recipe talk --epochs 20 --out talk

Rows: MobileNetV2 on 224 x 224 pixels decoded from JPEG files by workers in each epoch, as is customary; a quarter of
its width on 64 x 64 resampled pixels, and on the codec's codes; our network on the same codes, and a narrower one. The
recipe is for the first three; ours has its own. Every part resumes: datasets, runs and rows done are left alone.
Without arguments it takes the built-in `shapes` and the block DCT, and ends in minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

import latentprep
import latenttrain
from common import machine, spread
from latentprep.audit.info import info
from latentprep.cli.console import progress_bar, tune_process
from latentprep.codecs import Codec, make_codec
from latentprep.device import pick_device
from latentprep.encoding.encode import default_size
from latentprep.format import Quantizer
from latentprep.pictures.plots import BLUE, GREY, INK, draw
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

NARROW = 0.6  # of the default width
NETS = {
    "pixels": "MobileNetV2 ×1.0",
    "resampled": "MobileNetV2 ×0.25",
    "latents": "MobileNetV2 ×0.25",
    "ours": "latentnet",
    "narrow": f"latentnet ×{NARROW:g}",
}


class Images(Dataset):
    """One split of a source as pixels: u8 [3,S,S] and the label, decoded when asked for."""

    def __init__(self, source: Source, split: str, size: int) -> None:
        self.source, self.split, self.size = source, split, size

    def __len__(self) -> int:
        return self.source.size(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        sample = self.source.read(self.split, row)
        return torch.from_numpy(load_views(sample.data, self.size)[0]).permute(2, 0, 1), sample.label


@dataclasses.dataclass
class JpegSplit:
    """What `latenttrain.data.Split` is to codes: batches of pixels from image files, by a `DataLoader` with workers."""

    images: Images
    workers: int
    device: torch.device

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

    soft = None

    def targets_of(self, rows: Tensor, labels: Tensor, classes: int) -> Tensor:
        return one_hot(labels, classes)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = min(batch_size, 32)
        yield from self._loaded([list(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)])

    def _loaded(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader = DataLoader(
            self.images, batch_sampler=batches, num_workers=self.workers, pin_memory=self.device.type == "cuda"
        )
        for pixels, labels in loader:
            yield pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def pixels_config(asked: argparse.Namespace, source: Source) -> RunConfig:
    """MobileNetV2 at its full width on pixels, as a run."""
    quantizer = Quantizer(8, (-0.5,) * 3, (1.0,) * 3)
    net = NetConfig(
        latent=(3, asked.size, asked.size), classes=len(source.classes), bits=8, lo=quantizer.lo, step=quantizer.step,
        arch="mobilenetv2",
    )  # fmt: skip
    dataset = {
        "path": asked.source, "source": {"spec": asked.source, "sha256": source.fingerprint()},
        "codec": {"name": "pixels"}, "quantizer": quantizer.to_json(), "transform": {"size": asked.size},
        "classes": list(source.classes), "limit": asked.limit, "manifest_sha256": "",
    }  # fmt: skip
    recipe = make_recipe(asked.recipe, epochs=asked.epochs, seed=asked.seed)
    augmentation = Augment.none() if asked.recipe == "talk" else Augment(shift=24, noise=False, mirror=True)
    return RunConfig(net, recipe, augmentation, dataset, versions())


def fit_pixels(asked: argparse.Namespace, source: Source, root: Path) -> dict:
    """The first row's run; its result as JSON."""
    config = pixels_config(asked, source)
    check_run_folder(root, config, resume=True, overwrite=False)
    device = pick_device(asked.device)
    train, val = (JpegSplit(Images(source, split, asked.size), asked.workers, device) for split in ("train", "val"))
    return run_fit(config, train, val, root, True, progress_bar).to_json()  # type: ignore[arg-type]


def make_shards(asked: argparse.Namespace, source: Source, codec: Codec, name: str) -> Path:
    """The row's latent dataset, encoded unless it is there."""
    if name == "resampled":
        shards = asked.out / "resampled-64"
        latentprep.encode(source, codec="resample:factor=1", size=64, bits=8, out=shards, progress=progress_bar)
    elif asked.shards is not None:
        shards = asked.shards
    else:
        shards = asked.out / f"{asked.codec}-{asked.bits}bit"
        latentprep.encode(source, codec=codec, size=asked.size, bits=asked.bits, out=shards, progress=progress_bar)
    return shards


def make_row(asked: argparse.Namespace, source: Source, codec: Codec, name: str) -> dict:
    """One row of the table: encode and train what of it is missing."""
    own = name in ("ours", "narrow")
    recipe = "default" if own else asked.recipe
    run = asked.out / f"{name}-{recipe}-e{asked.epochs}-s{asked.seed}"
    row = {"row": name, "recipe": recipe, "net": NETS[name]}
    if name == "pixels":
        rows = range(0, source.size("train"), -(-source.size("train") // 500))  # some of each class
        row["input"] = f"{asked.size}×{asked.size}×3 pixels (JPEG)"
        row["bytes_per_image"] = statistics.mean(len(source.read("train", i).data) for i in rows)
        row |= fit_pixels(asked, source, run)
    else:
        shards = make_shards(asked, source, codec, name)
        facts = info(shards)
        channels, height, width = facts.latent
        row["input"] = f"{height}×{width}×{channels} {facts.codec['name']}, {facts.bits} bits"
        row["bytes_per_image"] = facts.bytes_per_image
        settings: dict = {"width": NARROW} if name == "narrow" else {}
        if not own:
            settings = {"arch": "mobilenetv2", "width": 0.25, "recipe": asked.recipe}
        result = latenttrain.fit(
            shards, **settings, epochs=asked.epochs, seed=asked.seed, device=asked.device, out=run, resume=True,
            progress=progress_bar,
        )  # fmt: skip
        row |= result.to_json()
    # 3 forward passes a training step: torch's own count of the backward pass overlooks groups
    return row | {"training_flops_per_epoch": 3 * row["flops"] * source.size("train")}


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
                batch = min(config.recipe.batch_size, len(split))
                synchronize(device)
                start = time.perf_counter()
                train_epoch(state, config, split, 0, bar)
                synchronize(device)
                if turn:
                    own.append((time.perf_counter() - start) / batches_per_epoch(len(split), batch) / batch)
    return seconds


def clock(asked: argparse.Namespace, source: Source, rows: list[dict], rounds: int = 5, images: int = 256) -> None:
    """Adds to each row the seconds an epoch takes with nothing else running: all rows in turn, `rounds` times."""
    device = pick_device(asked.device)
    few = source.take(images)
    work: list[tuple[RunConfig, Split | JpegSplit]] = []
    for row in rows:
        config = read_config(Path(row["run"]))
        if row["row"] == "pixels":
            work.append((config, JpegSplit(Images(few, "train", asked.size), asked.workers, device)))
        else:
            whole = load_trained(latentprep.open(config.dataset["path"]), device)[0]
            work.append((config, Split(whole.codes[: 8 * images], whole.labels[: 8 * images])))
    for row, seconds in zip(rows, clocked(work, device, rounds), strict=True):
        row["clocked"] = spread([s * source.size("train") for s in seconds])
    slowest = rows[0]["clocked"]["median"]
    for row in rows:
        row["times_faster"] = slowest / row["clocked"]["median"]


def write(asked: argparse.Namespace, rows: list[dict]) -> None:
    """The table as JSON, Markdown and a picture."""
    document = {"benchmark": "talk_table", "epochs": asked.epochs, "seed": asked.seed, "machine": machine()}
    (asked.out / f"table-e{asked.epochs}.json").write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")
    lines = [
        "| network | input | recipe | last val top-1 | parameters | TFLOPs/epoch | bytes/image | s/epoch | faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        flops, seconds = row["training_flops_per_epoch"] / 1e12, row["clocked"]["median"]
        lines.append(
            f"| {row['net']} | {row['input']} | {row['recipe']} | {row['last_top1']:.1%} | {row['parameters']:,} "
            f"| {flops:.2f} | {row['bytes_per_image']:,.0f} | {seconds:.1f} | {row['times_faster']:.1f}× |"
        )
    text = "\n".join(lines) + "\n"
    (asked.out / f"table-e{asked.epochs}.md").write_text(text)
    print(text)
    with draw(asked.out / f"table-e{asked.epochs}.png", 2) as (left, right):
        for axes, of, label in ((left, "clocked", "seconds an epoch"), (right, "bytes_per_image", "bytes an image")):
            for row in rows:
                x = row[of]["median"] if of == "clocked" else row[of]
                axes.plot(x, row["last_top1"], "o", color=BLUE if row["row"] in ("ours", "narrow") else GREY)
                below = row["row"] == "narrow"  # it lies close under ours
                where = {"xytext": (0, -15 if below else 6), "textcoords": "offset points", "ha": "center"}
                axes.annotate(row["row"], (x, row["last_top1"]), color=INK, **where)
            axes.set_xscale("log")
            axes.margins(0.25)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            axes.set_xlabel(label, color=INK)
        left.set_title(f"val top-1 after {asked.epochs} epochs", loc="left", color=INK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--data", default=None, help="a copy of the named dataset")
    parser.add_argument("--codec", default="dct")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--size", type=int, default=None, help="pixels a side (default: what encode chooses)")
    parser.add_argument("--shards", type=Path, default=None, help="a latent dataset that is there already")
    parser.add_argument("--recipe", default="talk", help="of the MobileNetV2 rows: talk or default")
    parser.add_argument("--epochs", type=int, default=None, help="of every row (default: 20)")
    parser.add_argument("--rows", default=",".join(NETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=None, help="images a split")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("talk"))
    asked = parser.parse_args()
    asked.epochs = asked.epochs or 20
    tune_process()
    asked.out.mkdir(parents=True, exist_ok=True)
    source = open_source(asked.source, data=asked.data)
    source = source.take(asked.limit) if asked.limit else source
    codec = make_codec(asked.codec, **({"weights": asked.weights} if asked.weights else {}))
    asked.size = asked.size or default_size(source, codec)
    rows = [make_row(asked, source, codec, name) for name in asked.rows.split(",")]
    clock(asked, source, rows)
    write(asked, rows)


if __name__ == "__main__":
    main()
