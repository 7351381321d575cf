"""Encode against its bounds in the same run: the bare codec in a loop on ready batches; reading and decoding alone.

`encode` also quantizes, compresses and writes; with everything overlapped its rate is the slower of the two.
Real TAESD and Imagenette where LATENTPREP_ASSETS has them, else the block DCT on `shapes`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import assets, record, spread
from latentprep import console
from latentprep.codecs import make_codec
from latentprep.console import silent
from latentprep.encoder import _manifest, plan
from latentprep.format import open_dataset
from latentprep.format.commit import create_dataset
from latentprep.images import MAX_PIXELS, load_views
from latentprep.pipeline import Stages, calibrate, encode_shards
from latentprep.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="taesd" if assets() else "dct")
    parser.add_argument("--images", type=int, default=256, help="images a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    console.tune_process()
    folder = assets()
    weights = str(folder / options.codec) if folder and (folder / options.codec).is_dir() else None
    data = folder / "imagenette2-224.tar" if folder else None
    source = open_source("imagenette", data=data) if data else open_source("shapes")
    source = source.take(options.images)
    size = 224 if data else 128
    codec = make_codec(options.codec, weights=weights)
    pixels = np.concatenate([load_views(source.read("train", i).data, size) for i in range(options.images)])
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(options.batch_size)
    stages = Stages(source, codec, options.batch_size, None, MAX_PIXELS)
    asked = _manifest(source, ["train"], codec, 4, False, size, codec.latent_shape(size, size), 1, 0, 1024, "zarr")

    manifest = calibrate(stages, asked, 32, silent)
    bare, decoding, whole = [], [], []
    codec.encode(batches[0])
    for _ in range(options.repeats):
        start = time.perf_counter()
        for batch in batches:
            codec.encode(batch)
        bare.append(options.images / (time.perf_counter() - start))
        start = time.perf_counter()
        with ThreadPoolExecutor(stages.threads()) as pool:
            for _ in pool.map(lambda i: load_views(source.read("train", i).data, size), range(options.images)):
                pass
        decoding.append(options.images / (time.perf_counter() - start))
        with tempfile.TemporaryDirectory() as out:
            create_dataset(Path(out), manifest)
            start = time.perf_counter()
            with silent("", 0, "") as quiet:
                for _ in encode_shards(stages, open_dataset(out), list(plan(manifest)), quiet):
                    pass
            whole.append(options.images / (time.perf_counter() - start))
    record(
        f"encode_ratio_{options.codec}",
        {
            "images": options.images,
            "size": size,
            "batch_size": options.batch_size,
            "bare_codec_images_per_s": spread(bare),
            "reading_and_decoding_images_per_s": spread(decoding),
            "encode_images_per_s": spread(whole),
            "encode_over_bare_codec": spread([w / b for w, b in zip(whole, bare, strict=True)]),
            "encode_over_slower_of_both": spread(
                [w / min(b, d) for w, b, d in zip(whole, bare, decoding, strict=True)]
            ),
            # each alone keeps every core busy, so on a CPU the two cannot both run at their own rate
            "encode_over_both_on_the_same_cores": spread(
                [w * (1 / b + 1 / d) for w, b, d in zip(whole, bare, decoding, strict=True)]
            ),
        },
    )


if __name__ == "__main__":
    main()
