"""Requantizing 8-bit codes against encoding again at fewer bits: signal to noise, codes that agree, and time.

    python benchmarks/requantize.py imagenette --codec taesd --weights … --limit 500

Both are compared with the codec's float latents. Without arguments: the built-in `shapes` and the block DCT.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import latentprep
from common import record, spread
from latentprep.cli.console import progress_bar, tune_process
from latentprep.codecs import make_codec
from latentprep.sources.source import open_source


def decibels(latents: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise of [n,C,h,w] over all channels, each weighed by its own variance."""
    signal = latents.var(axis=(0, 2, 3))
    noise = ((latents - found) ** 2).mean(axis=(0, 2, 3))
    return float(-10 * np.log10((noise / signal).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="shapes")
    parser.add_argument("--data", default=None)
    parser.add_argument("--codec", default="dct")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--limit", type=int, default=300, help="images a split")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    tune_process()
    source = open_source(asked.source, data=asked.data).take(asked.limit)
    codec = make_codec(asked.codec, **({"weights": asked.weights} if asked.weights else {}))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        eight = latentprep.encode(source, codec=codec, bits=8, out=root / "8", progress=progress_bar)
        latentprep.write_latents(root / "8", source, out=root / "float", weights=asked.weights, progress=progress_bar)
        latents = np.load(root / "float" / "train.npy").astype(np.float32)
        for bits in (1, 2, 3, 4, 6):
            direct = latentprep.encode(source, codec=codec, bits=bits, out=root / f"d{bits}", progress=progress_bar)
            times = []
            for _ in range(asked.rounds):
                start = time.perf_counter()
                latentprep.requantize(root / "8", bits=bits, out=root / f"r{bits}", overwrite=True)
                times.append(direct.seconds / (time.perf_counter() - start))
            datasets = [latentprep.open(root / f"{kind}{bits}") for kind in "dr"]
            codes = [dataset.load("train").codes for dataset in datasets]
            found = [d.quantizer.dequantize(c)[:, 0] for d, c in zip(datasets, codes, strict=True)]
            rows.append(
                {
                    "bits": bits,
                    "direct_db": decibels(latents, found[0]),
                    "requantized_db": decibels(latents, found[1]),
                    "codes_that_agree": float((codes[0] == codes[1]).mean()),
                    "times_faster": spread(times),
                }
            )
    record(
        f"requantize_{asked.codec}",
        {"source": asked.source, "images": sum(eight.rows.values()), "codec": eight.codec["name"], "rows": rows},
    )


if __name__ == "__main__":
    main()
