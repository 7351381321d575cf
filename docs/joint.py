"""Draws `joint.jpg`: images of `shapes` from 1-bit codes of TAESD, rounded one by one and chosen jointly.

python docs/joint.py --weights FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import latentprep
from latentprep.codecs import codec_from_config
from latentprep.quantizing.scalar import dequantize
from latentprep.sources.images import load_views
from latentprep.sources.source import open_source

COUNT, SIZE = 8, 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="of taesd")
    asked = parser.parse_args()
    source = open_source("shapes").take(160)
    with tempfile.TemporaryDirectory() as scratch:
        eight = Path(scratch, "8")
        latentprep.encode(source, codec="taesd", weights=asked.weights, bits=8, size=SIZE, splits=["val"], out=eight)
        labels = latentprep.open(eight).load("val").labels.tolist()
        shown = [labels.index(label) + 1 for label in range(COUNT)]
        rows = [("images", [load_views(source.read("val", i).data, SIZE)[0] for i in shown])]
        for joint, title in ((False, "1 bit,\nrounded"), (True, "1 bit,\nchosen jointly")):
            made = latentprep.requantize(eight, bits=1, joint=joint, out=Path(scratch, title))
            dataset = latentprep.open(made.out)
            decoder = codec_from_config(dataset.manifest.codec, weights=asked.weights)
            chosen = torch.from_numpy(dataset.load("val").codes[shown, 0])
            pictures = decoder.decode(dequantize(chosen, dataset.quantizer)).permute(0, 2, 3, 1).numpy()
            rows.append((f"{title}\n{made.code_bytes / len(labels):.0f} bytes", list(pictures)))
    figure, axes = plt.subplots(len(rows), COUNT, figsize=(10.5, 3.8), dpi=110)
    for line, (title, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
        where = {"transform": line[0].transAxes, "ha": "right", "va": "center", "fontsize": 10}
        line[0].text(-0.08, 0.5, title, **where)
    figure.subplots_adjust(left=0.12, right=0.995, top=0.99, bottom=0.01, wspace=0.04, hspace=0.04)
    figure.savefig(Path(__file__).with_name("joint.jpg"), facecolor="white", pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
