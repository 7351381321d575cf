"""Encode against its bounds in the same run: the bare codec in a loop on ready batches; reading and decoding alone.

`encode` also quantizes, compresses and writes; with everything overlapped its rate is the slower of the two.
Real TAESD and Imagenette where LATENTPREP_ASSETS has them, else the block DCT on `shapes`. ``--enlarge 2`` makes the
JPEGs as large as photographs of ImageNet are (some 500 pixels a side; Imagenette's 224 are resized already).
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import assets, record, spread
from latentprep.cli import console
from latentprep.codecs import make_codec
from latentprep.codecs.transform import transform_for
from latentprep.encoding.calibration import calibrate
from latentprep.encoding.driver import commit_shards, start
from latentprep.encoding.encode import make_plan
from latentprep.encoding.pipeline import LocalEngine, Stages
from latentprep.progress import silent
from latentprep.sources.images import MAX_PIXELS, centre_box, load_views
from latentprep.sources.source import Row, Source, open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="taesd" if assets() else "dct")
    parser.add_argument("--images", type=int, help="images a measurement (default 256, or 4096 of a light codec)")
    parser.add_argument("--enlarge", type=float, default=1.0, help="make the JPEGs that much larger a side first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="default: what encode takes")
    options = parser.parse_args()
    console.tune_process()
    folder = assets()
    weights = str(folder / options.codec) if folder and (folder / options.codec).is_dir() else None
    data = folder / "imagenette2-224.tar" if folder else None
    source = open_source("imagenette", data=data) if data else open_source("shapes")
    codec = make_codec(options.codec, weights=weights)
    options.images = options.images or (4096 if getattr(codec, "light", False) else 256)
    source = source.take(options.images)
    if options.enlarge != 1:
        source = enlarged(source, options.enlarge)
    size = 224 if data else 128
    pixels = np.concatenate([load_views(source.read("train", i).data, size) for i in range(options.images)])
    stages = Stages(source, codec, options.batch_size, None, MAX_PIXELS)
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(stages.batch_samples(1, size, size))
    transform = transform_for(source, codec, size=size)
    asked = make_plan(source, ["train"], codec, 4, True, False, transform, codec.latent_shape(size, size), 1024, "zarr")

    manifest = calibrate(stages, asked, silent, 32)
    bare, decoding, pillow, whole = [], [], [], []
    codec.encode(batches[0])
    for _ in range(options.repeats):
        began = time.perf_counter()
        for batch in batches:
            codec.encode(batch)
        bare.append(options.images / (time.perf_counter() - began))
        for rates, load in ((decoding, load_views), (pillow, by_pillow)):
            began = time.perf_counter()
            with ThreadPoolExecutor(stages.threads()) as pool:
                for _ in pool.map(lambda i: load(source.read("train", i).data, size), range(options.images)):  # noqa: B023
                    pass
            rates.append(options.images / (time.perf_counter() - began))
        with tempfile.TemporaryDirectory() as out:
            dataset = start(Path(out), manifest)
            began = time.perf_counter()
            with silent("", 0, "") as quiet:
                shards = LocalEngine(manifest, stages, quiet).run(manifest.shards())
                commit_shards(dataset, shards, lambda record: None)
            whole.append(options.images / (time.perf_counter() - began))
    record(
        f"encode_ratio_{options.codec}" + (f"_{options.enlarge:g}x" if options.enlarge != 1 else ""),
        {
            "images": options.images,
            "enlarged": options.enlarge,
            "size": size,
            "batch_size": stages.batch_samples(1, size, size),
            "bare_codec_images_per_s": spread(bare),
            "reading_and_decoding_images_per_s": spread(decoding),
            "reading_and_decoding_by_pillow_images_per_s": spread(pillow),
            "encode_images_per_s": spread(whole),
            "encode_over_bare_codec": spread([w / b for w, b in zip(whole, bare, strict=True)]),
            "encode_over_slower_of_both": spread(
                [w / min(b, d) for w, b, d in zip(whole, bare, decoding, strict=True)]
            ),
            "encode_over_slower_of_codec_and_pillow": spread(
                [w / min(b, d) for w, b, d in zip(whole, bare, pillow, strict=True)]
            ),
            # each alone keeps every core busy, so on a CPU the two cannot both run at their own rate
            "encode_over_both_on_the_same_cores": spread(
                [w * (1 / b + 1 / d) for w, b, d in zip(whole, bare, decoding, strict=True)]
            ),
        },
    )


def by_pillow(data: bytes, size: int) -> np.ndarray:
    """What a usual loader does: u8 [size,size,3] by Pillow alone, shorter side resized, centre crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, centre_box(*image.size))
    return np.asarray(image)


def enlarged(source: Source, factor: float) -> Source:
    """The train split's images larger, as JPEGs of quality 90 in memory."""
    rows, files = [], []
    for i, (key, label) in enumerate(zip(source.keys("train"), source.labels("train"), strict=True)):
        image = Image.open(io.BytesIO(source.read("train", i).data)).convert("RGB")
        buffer = io.BytesIO()
        side = [round(factor * length) for length in image.size]
        image.resize(side, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
        rows.append(Row(key, label, i))
    return Source(source.spec, source.classes, {"train": rows}, files.__getitem__)


if __name__ == "__main__":
    main()
