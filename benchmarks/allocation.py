"""Equal bits beside bits that channels get by what they are worth, at 0.5, 1, 2 and 4 on average.

    python benchmarks/allocation.py imagenette --codec dct --out allocation [--rows 'equal*' '*-2bit'] [--seeds 0]

For each row: packed bytes and bytes on disk of an image, signal-to-noise ratio of latents and PSNR on images of val,
and top-1 of the default network and recipe. The codec encodes once, at 8 bits; rows are requantized from that.
`worth-E` weighs errors by the power -E of a channel's variance: 0 is least squared error, 1 nearly equal bits.
`float` is the bound: the same recipe on float latents. `--list` prints the rows. Datasets, runs and results resume, and
several processes may share the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import latentprep
import latenttrain
from common import Runs, fill, machine, mean_spread, write_json
from latentprep.audit.info import info
from latentprep.cli.console import progress_bar
from latentprep.codecs import codec_from_config
from latentprep.derived.requantize import requantize
from latentprep.format.packing import view_bytes
from latentprep.pictures.metrics import mean, psnr
from latentprep.pictures.plots import COLOURS, INK, draw
from latentprep.pictures.samples import Originals, decode_all, pick
from latentprep.quantizing.allocation import fit_allocated
from latentprep.quantizing.scalar import dequantize
from latentprep.sources.source import open_source

EXPONENTS = (0.0, 0.25, 0.5)
_BATCH = 32


@dataclass(frozen=True)
class Row:
    """bits: on average; exponent: see `latentprep.quantizing.allocation`, None for equal bits."""

    bits: float
    exponent: float | None

    @property
    def kind(self) -> str:
        return "equal" if self.exponent is None else f"worth-{self.exponent:g}"

    @property
    def name(self) -> str:
        return "float" if self.bits == math.inf else f"{self.kind}-{self.bits:g}bit"


FLOAT = Row(math.inf, None)
ROWS = (
    *(Row(0.5, exponent) for exponent in EXPONENTS),  # no equal bits are half a bit
    *(Row(bits, exponent) for bits in (1, 2, 4) for exponent in (None, *EXPONENTS)),
    FLOAT,
)


class Table:
    """The rows of a folder: encodes, measures, trains and keeps what is not there yet."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out, self.runs = asked, asked.out, Runs(asked.out / "results")
        self.source = open_source(asked.source, data=asked.data)
        self.whole = asked.out / "8bit"
        latentprep.encode(
            self.source, codec=asked.codec, weights=asked.weights, size=asked.size, bits=8, equal_bits=True,
            out=self.whole, progress=progress_bar,
        )  # fmt: skip

    def dataset(self, row: Row) -> Path:
        """The row's codes; those of 8 bits for float latents, which belong to them."""
        if row == FLOAT:
            return self.whole
        out = self.out / row.name
        with patch("latentprep.derived.requantize.fit_allocated", partial(fit_allocated, exponent=row.exponent or 0.0)):
            requantize(
                self.whole, bits=row.bits, equal_bits=row.exponent is None, joint=False, out=out, progress=progress_bar
            )
        return out

    def floats(self) -> Path:
        out = self.out / "latents"
        latentprep.write_latents(self.whole, self.source, out=out, progress=progress_bar)
        return out

    def measured(self, row: Row) -> dict:
        """Sizes and errors, kept at once."""
        path = self.out / "measured" / f"{row.name}.json"
        if path.exists():
            return json.loads(path.read_text())
        dataset = latentprep.open(self.dataset(row))
        quantizer, facts = dataset.quantizer, info(dataset)
        picked = pick(dataset, limit=self.asked.images)
        originals = Originals(dataset, self.source).load(picked)
        codec = codec_from_config(dataset.manifest.codec, device=torch.device("cpu"), weights=self.asked.weights)
        latents = torch.cat([codec.encode(part) for part in originals.split(_BATCH)])
        noise = (dequantize(torch.from_numpy(picked.codes), quantizer) - latents).double().square().mean((0, 2, 3))
        power = latents.double().var((0, 2, 3))
        pictures = decode_all(codec, picked.codes, quantizer)
        found = {
            "channel_bits": quantizer.channel_bits,
            "packed_bytes": view_bytes(dataset.manifest.latent, quantizer),
            "bytes_per_image": facts.bytes_per_image,
            "images": len(picked),
            "snr": 10 * math.log10(float(power.mean() / noise.mean())),
            "psnr": mean(psnr(pictures, originals).tolist()),
        }
        write_json(path, found)
        return found

    def add(self, row: Row, seed: int) -> None:
        """One run of a row, kept at once."""
        if self.runs.path(row.name, seed).exists():
            return
        result = latenttrain.fit(
            self.dataset(row), seed=seed, epochs=self.asked.epochs, holdout=self.asked.holdout, limit=self.asked.limit,
            latents=self.floats() if row == FLOAT else None, out=self.out / "runs" / f"{row.name}-s{seed}", resume=True,
            progress=progress_bar,
        )  # fmt: skip
        self.runs.keep(row.name, seed, result.to_json())

    def show(self) -> None:
        """What there is so far: the table on stdout and as a file, JSON and a picture in the folder."""
        asked = self.asked
        rows = {row: runs for row in ROWS if (runs := self.runs.of(row.name))}
        found = {row: {} if row == FLOAT else self.measured(row) for row in rows}
        write_json(
            self.out / "allocation.json",
            {
                "benchmark": "allocation", "codec": asked.codec, "source": self.source.spec, "epochs": asked.epochs,
                "holdout": asked.holdout, "limit": asked.limit, "machine": machine(),
                "rows": {row.name: {**found[row], "runs": runs} for row, runs in rows.items()},
            },
        )  # fmt: skip
        lines = ["| bits | channels | packed | on disk | latents | PSNR | top-1 | n |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row, runs in rows.items():
            top1, facts = mean_spread([run["last_top1"] for run in runs.values()]), found[row]
            cells = ["float", "", "", "", "", ""]
            if facts:
                bits = facts["channel_bits"]
                channels = "equal" if len(set(bits)) == 1 else f"{row.kind}: {' '.join(map(str, bits))}"
                cells = [f"{row.bits:g}", channels, f"{facts['packed_bytes']:,}", f"{facts['bytes_per_image']:,.0f}",
                         f"{facts['snr']:.1f} dB", f"{facts['psnr']:.1f} dB"]  # fmt: skip
            lines.append(f"| {' | '.join([*cells, top1, str(len(runs))])} |")
        (self.out / "allocation.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        self.picture(rows, found)

    def picture(self, rows: dict[Row, dict[str, dict]], found: dict[Row, dict]) -> None:
        kinds = list(dict.fromkeys(row.kind for row in rows if row != FLOAT))
        with draw(self.out / "allocation.png", 2) as (left, right):
            for axes, size, title in ((left, "packed_bytes", "packed"), (right, "bytes_per_image", "on disk")):
                for kind, colour in zip(kinds, COLOURS, strict=False):
                    line = [row for row in rows if row.kind == kind and row != FLOAT]
                    places = [found[row][size] for row in line]
                    tops = [[run["last_top1"] for run in rows[row].values()] for row in line]
                    spreads = [statistics.stdev(top) if len(top) > 1 else 0.0 for top in tops]
                    axes.errorbar(places, list(map(statistics.mean, tops)), spreads, color=colour, marker="o",
                                  markersize=4, capsize=3, label=kind)  # fmt: skip
                if FLOAT in rows:
                    axes.axhline(statistics.mean(run["last_top1"] for run in rows[FLOAT].values()), color=INK, ls="--")
                axes.set_xscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
                axes.set_title(f"top-1 against bytes an image, {title}", loc="left", color=INK)
            right.legend(frameon=False, labelcolor=INK, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--data", default=None, help="a copy of the named dataset")
    parser.add_argument("--codec", default="dct")
    parser.add_argument("--weights", default=None, help="folder of an autoencoder's weights")
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows, or shell patterns")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--holdout", type=float, default=0.0, help="judge by this share of train in place of val")
    parser.add_argument("--limit", type=int, default=None, help="train on at most so many samples")
    parser.add_argument("--images", type=int, default=400, help="of val, to measure errors on")
    parser.add_argument("--out", type=Path, default=Path("allocation"))
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    fill(Table, ROWS, parser.parse_args())


if __name__ == "__main__":
    main()
