"""Draws `viewer.png`: rows of a Parquet store as the hub's viewer has them, read by `datasets` alone.

python docs/viewer.py FOLDER   # with thumbnails: latentprep convert --store parquet, after linear-decoder fit
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import datasets
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROWS = 6
COLUMNS = {"key": 0.0, "label": 0.4, "codes": 0.58, "valid": 0.84, "thumbnail": 0.9}  # and where they begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset(folder, split="train", cache_dir=cache)
        kinds = {name: str(kind).partition("(names")[0] for name, kind in rows.features.items()}
        names = rows.features["label"].names
        shown = [rows[int(place)] for place in np.linspace(0, len(rows) - 1, ROWS + 2)[1:-1]]
    figure = plt.figure(figsize=(11, 0.62 * (ROWS + 1)), dpi=100)
    for line, row in enumerate([None, *shown]):
        middle = 1 - (line + 0.5) / (ROWS + 1)
        for name, start in COLUMNS.items():
            if row is None:
                text = f"{name}\n{kinds[name].partition('(')[0]}"
            elif name == "thumbnail":
                axes = figure.add_axes((0.02 + 0.96 * start, middle - 0.45 / (ROWS + 1), 0.07, 0.9 / (ROWS + 1)))
                axes.imshow(row[name])
                axes.axis("off")
                continue
            else:
                cell = names[row[name]] if name == "label" else row[name]
                text = f"{row['label']} {cell}" if name == "label" else str(cell)
            style = {"weight": "bold"} if row is None else {}
            figure.text(0.02 + 0.96 * start, middle, text[:44] + "…" * (len(text) > 44), size=8, va="center", **style)
    figure.savefig(Path(__file__).with_name("viewer.png"))


if __name__ == "__main__":
    main()
