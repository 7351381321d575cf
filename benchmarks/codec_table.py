"""Which codec is best to learn from: accuracy of the default network and recipe against bytes an image.

    python benchmarks/codec_table.py imagenette --weights-root WEIGHTS --out codecs [--rows 'dct*' '*-2bit'] [--seeds 0]

Each codec encodes once, at 8 bits; fewer bits are requantized from that. `--weights-root` holds a folder for each
autoencoder, named after its codec; without it they come from the hub. `--list` prints the rows. Datasets, runs and
results resume, and several processes may share the folder.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from matplotlib.lines import Line2D

import latenttrain
from common import Runs, fill, kept_codes, machine, mean_spread, write_json
from latentprep.audit.info import info
from latentprep.cli.console import progress_bar
from latentprep.codecs import make_codec
from latentprep.pictures.plots import COLOURS, INK, drawn, log_below
from latentprep.sources.source import open_source
from latentprep.storage.atomic import write_atomic


@dataclass(frozen=True)
class Row:
    """codec: its name and options; size: pixels a side."""

    codec: str
    options: tuple[tuple[str, int], ...]
    size: int
    bits: int

    @property
    def dataset(self) -> str:
        return "-".join([self.codec, *(f"{name}{value}" for name, value in self.options), f"{self.size}px"])

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.bits}bit"


CODECS = (
    *(("scatter", (), size) for size in (128, 160, 192, 224)),
    ("scatter", (("order", 2),), 224),
    ("learned", (), 224),
    ("dct", (("luma", 6), ("chroma", 1)), 224),
    ("dct", (), 224),
    ("dct", (("luma", 20), ("chroma", 6)), 224),
    ("resample", (("factor", 8),), 224),
    ("resample", (("factor", 4),), 224),
    *(("taesd", (), size) for size in (128, 160, 224, 320)),
    *((codec, (), 224) for codec in ("taesdxl", "taesd3", "taef1")),
)
ROWS = tuple(Row(*codec, bits) for bits in (4, 2, 1) for codec in CODECS)
_FILLED = {4: "full", 2: "left", 1: "none"}


class Table:
    """The rows of a folder: encodes, trains and keeps what is not there yet."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out, self.runs = asked, asked.out, Runs(asked.out / "results")
        self.source = open_source(asked.source, data=asked.data)

    def dataset(self, row: Row) -> Path:
        options: dict = dict(row.options)
        folder = self.asked.weights_root and self.asked.weights_root / row.codec
        if folder and folder.is_dir():
            options["weights"] = str(folder)
        codec = make_codec(row.codec, **options)
        return kept_codes(self.out, row.dataset, self.source, codec, row.size, row.bits)

    def add(self, row: Row, seed: int) -> None:
        """One run of a row, kept at once."""
        if self.runs.path(row.name, seed).exists():
            return
        dataset = self.dataset(row)
        result = latenttrain.fit(
            dataset, seed=seed, epochs=self.asked.epochs, holdout=self.asked.holdout,
            out=self.out / "runs" / f"{row.name}-s{seed}", resume=True, progress=progress_bar,
        )  # fmt: skip
        facts = info(dataset)
        self.runs.keep(
            row.name, seed, {"latent": facts.latent, "bytes_per_image": facts.bytes_per_image, **result.to_json()}
        )

    def show(self) -> None:
        """What there is so far: the table on stdout, JSON and a picture in the folder."""
        rows = {row: runs for row in ROWS if (runs := self.runs.of(row.name))}
        asked = self.asked
        write_json(
            self.out / "codec_table.json",
            {
                "benchmark": "codec_table", "epochs": asked.epochs, "holdout": asked.holdout, "machine": machine(),
                "rows": {row.name: {**vars(row), "runs": runs} for row, runs in rows.items()},
            },
        )  # fmt: skip
        print("| codec | pixels | bits | latents | bytes per image | top-1 | n | MFLOPs |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row, runs in rows.items():
            one, top1 = next(iter(runs.values())), [run["last_top1"] for run in runs.values()]
            channels, height, width = one["latent"]
            options = ", ".join(f"{name} {value}" for name, value in row.options)
            print(
                f"| {row.codec}{options and f' ({options})'} | {row.size} | {row.bits} | {height}×{width}×{channels} "
                f"| {one['bytes_per_image']:,.0f} | {mean_spread(top1)} | {len(runs)} | {one['flops'] / 1e6:.0f} |"
            )
        self.picture(rows)

    def picture(self, rows: dict[Row, dict[str, dict]]) -> None:
        """A line for each dataset, from 1 to 4 bits, with its options and pixels at the fewest bits."""
        codecs = list(dict.fromkeys(row.codec for row in rows))
        with drawn(1, width=6.5, height=4.5) as ((axes,), picture):
            for dataset in dict.fromkeys(row.dataset for row in rows):
                chosen = sorted((row for row in rows if row.dataset == dataset), key=lambda row: row.bits)
                colour = COLOURS[codecs.index(chosen[0].codec) % len(COLOURS)]
                x = [next(iter(rows[row].values()))["bytes_per_image"] for row in chosen]
                y = [statistics.mean(run["last_top1"] for run in rows[row].values()) for row in chosen]
                axes.plot(x, y, "-", color=colour, linewidth=0.8)
                for row, *at in zip(chosen, x, y, strict=True):
                    axes.plot(*at, "o", color=colour, fillstyle=_FILLED[row.bits])
                label = ", ".join([*(f"{name} {value}" for name, value in chosen[0].options), str(chosen[0].size)])
                axes.annotate(
                    label, (x[0], y[0]), color=INK, fontsize=7, xytext=(-5, 3), textcoords="offset points", ha="right"
                )
            axes.legend(
                [Line2D([], [], color=COLOURS[i % len(COLOURS)]) for i in range(len(codecs))], codecs, loc="lower right"
            )
            log_below(axes)
            axes.margins(0.2, 0.08)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            axes.set_xlabel("bytes per image; filled: 4 bits, half: 2 bits, open: 1 bit", color=INK)
            axes.set_title(f"top-1 after {self.asked.epochs} epochs, by codec and pixels a side", loc="left", color=INK)
        write_atomic(self.out / "codec_table.png", picture("png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--data", default=None, help="a copy of the named dataset")
    parser.add_argument("--weights-root", type=Path, default=None, help="a folder with one for each autoencoder")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows, or shell patterns")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--holdout", type=float, default=0.0, help="judge by this share of train in place of val")
    parser.add_argument("--out", type=Path, default=Path("codecs"))
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    fill(Table, ROWS, parser.parse_args())


if __name__ == "__main__":
    main()
