"""Draws `overview.jpg`, the README's picture: images of `shapes`, what 4-bit and 2-bit codes keep, and the codes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import latentprep
from latentprep.codecs import codec_from_config
from latentprep.quantizing.scalar import dequantize
from latentprep.sources.images import load_views
from latentprep.sources.source import open_source

COUNT, SIZE = 8, 128


def main() -> None:
    source = open_source("shapes")
    rows: list[tuple[str, list[np.ndarray]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (4, 2):
            out = Path(scratch) / str(bits)
            result = latentprep.encode(source, codec="dct", bits=bits, size=SIZE, limit=1000, splits=["val"], out=out)
            dataset = latentprep.open(out)
            codes = dataset.load("val")
            shown = [codes.labels.tolist().index(label) + 7 for label in range(COUNT)]
            if not rows:
                samples = [source.take(1000).read("val", i) for i in shown]
                files = sum(len(sample.data) for sample in samples) / COUNT
                rows.append((f"JPEG files\n{files:.0f} bytes", [load_views(s.data, SIZE)[0] for s in samples]))
            decoder = codec_from_config(dataset.manifest.codec)
            chosen = torch.from_numpy(codes.codes[shown, 0])
            decoded = decoder.decode(dequantize(chosen, dataset.quantizer)).permute(0, 2, 3, 1).numpy()
            per_image = result.code_bytes / len(codes)
            rows.append((f"decoded from\n{bits}-bit codes\n{per_image:.0f} bytes", list(decoded)))
            if bits == 4:
                # Y's mean, and its first horizontal and vertical frequencies, as red, green and blue
                pictures = chosen[:, [1, 0, 2]].permute(0, 2, 3, 1).numpy()
                rows.append(
                    (f"the codes\n{SIZE // 8}×{SIZE // 8}×{chosen.shape[1]}\n3 channels shown", list(pictures * 17))
                )
    rows = [rows[0], rows[2], rows[1], rows[3]]
    figure, axes = plt.subplots(len(rows), COUNT, figsize=(10.5, 5.0), dpi=110)
    for line, (title, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    figure.subplots_adjust(left=0.14, right=0.995, top=0.99, bottom=0.01, wspace=0.04, hspace=0.04)
    figure.savefig(Path(__file__).with_name("overview.jpg"), facecolor="white", pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
