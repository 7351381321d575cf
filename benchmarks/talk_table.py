"""The talk's experiment (Jacobellis 2023), and this project's network beside it: one table, JSON and picture.

    python benchmarks/talk_table.py imagenette --codec taesd --weights … --recipe talk --epochs 20 --out talk

Rows: MobileNetV2 on 224 x 224 pixels decoded from JPEG files by workers in each epoch, as is customary; a quarter of
its width on 64 x 64 resampled pixels, and on the codec's codes; our network on the same codes. The recipe is for the
first three; ours has its own. Every part resumes: datasets, runs and rows done are left alone. Without arguments it
takes the built-in `shapes` and the block DCT, and ends in minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

import latentprep
import latenttrain
from common import machine
from latentprep.codecs import Codec, make_codec
from latentprep.console import progress_bar, tune_process
from latentprep.device import pick_device
from latentprep.encoder import default_size
from latentprep.format import Quantizer
from latentprep.images import load_views
from latentprep.info import info
from latentprep.sources import Source, open_source
from latenttrain.augment import Augment
from latenttrain.checkpoint import check_run_folder
from latenttrain.config import RunConfig, versions
from latenttrain.data import batches_per_epoch
from latenttrain.nets import NetConfig
from latenttrain.recipe import make_recipe
from latenttrain.train import run_fit

ROWS = ("pixels", "resampled", "latents", "ours")


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

    def training_batches(self, batch_size: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=generator, device=self.device).tolist()
        count = batches_per_epoch(len(self), batch_size)
        yield from self._loaded([order[i * batch_size : (i + 1) * batch_size] for i in range(count)])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = min(batch_size, 32)
        yield from self._loaded([list(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)])

    def _loaded(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader = DataLoader(
            self.images, batch_sampler=batches, num_workers=self.workers, pin_memory=self.device.type == "cuda"
        )
        for pixels, labels in loader:
            yield pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def fit_pixels(asked: argparse.Namespace, source: Source, root: Path) -> dict:
    """MobileNetV2 at its full width on pixels; its result as JSON."""
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
    config = RunConfig(net, recipe, augmentation, dataset, versions())
    check_run_folder(root, config, resume=True, overwrite=False)
    device = pick_device(asked.device)
    splits = (JpegSplit(Images(source, split, asked.size), asked.workers, device) for split in ("train", "val"))
    return run_fit(config, *splits, root, True, progress_bar).to_json()  # type: ignore[arg-type]


def fit_codes(asked: argparse.Namespace, name: str, shards: Path, root: Path) -> dict:
    """A network on codes; its result as JSON."""
    ours = name == "ours"
    settings: dict = {} if ours else {"arch": "mobilenetv2", "width": 0.25, "recipe": asked.recipe}
    result = latenttrain.fit(
        shards, **settings, epochs=asked.epochs, seed=asked.seed, device=asked.device, out=root, resume=True,
        progress=progress_bar,
    )  # fmt: skip
    return result.to_json()


def make_row(asked: argparse.Namespace, source: Source, codec: Codec, name: str) -> dict:
    """One row of the table: encode and train what of it is missing."""
    run = asked.out / f"{name}-{'default' if name == 'ours' else asked.recipe}-e{asked.epochs}-s{asked.seed}"
    if name == "pixels":
        jpeg = statistics.mean(len(source.read("train", row).data) for row in range(min(500, source.size("train"))))
        return {"row": name, "input": f"{asked.size}×{asked.size}×3 JPEG", "bytes_per_image": jpeg, "run": str(run),
                **fit_pixels(asked, source, run)}  # fmt: skip
    if name == "resampled":
        shards = asked.out / "resampled-64"
        latentprep.encode(source, codec="resample", size=64, bits=8, factor=1, out=shards,
                          progress=progress_bar)  # fmt: skip
    elif asked.shards is not None:
        shards = asked.shards
    else:
        shards = asked.out / f"{asked.codec}-{asked.bits}bit"
        latentprep.encode(source, codec=codec, size=asked.size, bits=asked.bits,
                          out=shards, progress=progress_bar)  # fmt: skip
    facts = info(shards).to_json()
    channels, height, width = facts["latent"]
    what = f"{height}×{width}×{channels} {facts['codec']['name']}, {facts['bits']} bits"
    return {
        "row": name,
        "input": what,
        "bytes_per_image": facts["bytes_per_image"],
        **fit_codes(asked, name, shards, run),
    }


def write(asked: argparse.Namespace, rows: list[dict]) -> None:
    """The table as JSON, Markdown and a picture."""
    document = {"benchmark": "talk_table", "machine": machine(), "rows": rows}
    (asked.out / "table.json").write_text(json.dumps(document, indent=1) + "\n")


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
    parser.add_argument("--rows", default=",".join(ROWS))
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
    write(asked, rows)


if __name__ == "__main__":
    main()
