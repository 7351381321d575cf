"""What the weights of another run are worth: from few images a class, against from scratch.

    python benchmarks/transfer.py imagenette --data imagenette2-224.tar --codec taesd --weights taesd --out transfer

Two pairs: SOURCE to `shapes`, and half of SOURCE's classes to the other half. A run on all images of the first is what
the others start from. Every run is kept as it ends, so the same command goes on where it was interrupted. All seeds see
the same images; the accuracy is that of the last epoch on the whole val split, so no epoch is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import latentprep
import latenttrain
from common import kept_codes, machine, mean_spread
from latentprep.cli.console import progress_bar, tune_process
from latentprep.codecs import make_codec
from latentprep.pictures.plots import COLOURS, GREY, INK, draw
from latentprep.sources.source import open_source
from latentprep.storage.atomic import write_atomic

ARMS: dict[str, dict | None] = {  # what each adds to `fit(init=…)`; from scratch there is no init
    "from scratch": None,
    "all weights": {},
    "all but the first layer": {"freeze": "stem"},
    "head alone": {"freeze": "body"},
}


class Transfer:
    """The datasets and runs of a folder."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out = asked, asked.out
        codec = make_codec(asked.codec, **({"weights": asked.weights} if asked.weights else {}))

        def encoded(name: str, data: str | None = None) -> Path:
            source = open_source(name, data=data)
            source = source if asked.limit is None else source.take(asked.limit)
            return kept_codes(self.out, Path(name).stem, source, codec, asked.size, asked.bits)

        whole = encoded(asked.source, asked.data)
        classes = latentprep.open(whole).classes
        halves = classes[: len(classes) // 2], classes[len(classes) // 2 :]
        first, second = (
            latentprep.subset(whole, classes=half, out=self.out / f"half-{number}").out
            for number, half in enumerate(halves)
        )
        self.pairs = {
            f"{Path(asked.source).stem} to shapes": (whole, encoded("shapes")),
            f"{len(halves[0])} classes to the other {len(halves[1])}": (Path(first), Path(second)),
        }

    def fit(self, dataset: Path, name: str, **options: object) -> float:
        """The last top-1 of a run, made unless it is there."""
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            settings = {"device": self.asked.device, "epochs": self.asked.epochs, "resume": True, **options}
            run = latenttrain.fit(dataset, **settings, out=self.out / "runs" / name, progress=progress_bar)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(run.to_json(), indent=1).encode())
        return json.loads(path.read_text())["last_top1"]

    def measured(self) -> dict:
        """pair -> images a class -> arm -> top-1 of each seed."""
        found: dict[str, dict[str, dict[str, list[float]]]] = {}
        for number, (pair, (first, second)) in enumerate(self.pairs.items()):
            self.fit(first, f"{number}-first")
            classes = len(latentprep.open(second).classes)
            found[pair] = {str(images): {arm: [] for arm in ARMS} for images in self.asked.images}
            for seed in range(self.asked.seeds):
                for images in self.asked.images:
                    for arm, more in ARMS.items():
                        start = {} if more is None else {"init": self.out / "runs" / f"{number}-first", **more}
                        name = f"{number}-{images}-{arm.replace(' ', '-')}-s{seed}"
                        top1 = self.fit(second, name, limit=images * classes, seed=seed, **start)
                        found[pair][str(images)][arm].append(top1)
        return found

    def show(self, found: dict) -> None:
        """The table on stdout, the picture and the record in the folder."""
        print(f"| images a class | {' | '.join(ARMS)} | n |\n|{' --- |' * (len(ARMS) + 2)}")
        for pair, rows in found.items():
            print(f"| **{pair}** |{' |' * (len(ARMS) + 1)}")
            for images, arms in rows.items():
                print(f"| {images} | {' | '.join(mean_spread(arms[arm]) for arm in ARMS)} | {self.asked.seeds} |")
        with draw(self.out / "transfer.png", len(found)) as panels:
            for axes, (pair, rows) in zip(panels, found.items(), strict=True):
                for arm, colour in zip(ARMS, (GREY, *COLOURS), strict=False):
                    values = [arms[arm] for arms in rows.values()]
                    errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
                    axes.errorbar(
                        [int(images) for images in rows], [statistics.mean(v) for v in values], errors,
                        color=colour, marker="o", capsize=3, label=arm,
                    )  # fmt: skip
                axes.set_xscale("log")
                axes.set_xticks([int(images) for images in rows], list(rows))
                axes.minorticks_off()
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
                axes.set_xlabel("images a class", color=INK)
                axes.set_title(f"{pair}: val top-1", loc="left", color=INK, fontsize=9)
            panels[0].legend(frameon=False, labelcolor=INK)
        document = {
            "benchmark": "transfer", "codec": self.asked.codec, "bits": self.asked.bits, "size": self.asked.size,
            "machine": machine(), "pairs": found,
        }  # fmt: skip
        write_atomic(self.out / "transfer.json", (json.dumps(document, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--data", default=None, help="a copy of the named dataset")
    parser.add_argument("--codec", default="dct")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200], help="a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None, help="of every run (default: as fit chooses)")
    parser.add_argument("--limit", type=int, default=None, help="images a split of each source")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("transfer"))
    asked = parser.parse_args()
    tune_process()
    asked.out.mkdir(parents=True, exist_ok=True)
    transfer = Transfer(asked)
    transfer.show(transfer.measured())


if __name__ == "__main__":
    main()
