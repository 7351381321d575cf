"""All that is to be measured on a GPU, in one call: `make bench-gpu`, a few minutes on a large card.

Codecs at their real size with random weights (speed does not depend on them) on batches that are on the device, against
the arithmetic bound; `encode` of JPEGs from memory against the bare codec; epochs on codes of Imagenette's and of
ImageNet's size; the share of the card's measured bfloat16 rate and bandwidth. Runs on a CPU too, with --small.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import latenttrain
from common import machine, record, spread
from latentprep.codecs import Codec, make_codec
from latentprep.console import silent, tune_process
from latentprep.device import pick_device
from latentprep.encoder import encode
from latentprep.sources import Row, Source
from latenttrain.augment import Augment
from latenttrain.config import RunConfig, versions
from latenttrain.data import Split
from latenttrain.device import synchronize
from latenttrain.nets import NetConfig
from latenttrain.recipe import make_recipe
from latenttrain.scaling import count_flops
from latenttrain.train import start_state, train_epoch

KL = {  # stable-diffusion-v1-5's vae/config.json
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def timed(device: torch.device, work: Callable[[], object], rounds: int = 5) -> list[float]:
    """Seconds of each round, after one to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def ceiling(device: torch.device, side: int) -> dict:
    """What the card does on one large bfloat16 product (FLOP/s), and on one large copy (bytes/s)."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product = min(timed(device, lambda: a @ a))
    b = torch.empty(side * side * 4, dtype=torch.uint8, device=device)
    copy = min(timed(device, b.clone))
    return {"flops": 2 * side**3 / product, "bytes_per_s": 2 * b.numel() / copy}


def codec_of(name: str, folder: Path, device: torch.device) -> Codec:
    """The codec at its real size with random weights."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**KL) if name == "sd-vae" else diffusers.AutoencoderTiny()
    model.save_pretrained(folder / name)
    return make_codec(name, weights=str(folder / name), device=device)


def bench_codec(codec: Codec, device: torch.device, size: int, batch: int, bound: dict, images: int) -> dict:
    """Bare codec on resident batches, and `encode` of JPEGs in memory, in one run."""
    resident = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        codec.encode(resident[:1])
    bare = [batch / s for s in timed(device, lambda: codec.encode(resident))]
    small = np.random.default_rng(0).integers(0, 256, (16, size // 8, size // 8, 3), np.uint8)
    jpegs = []
    for pixels in small:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    rows = [Row(f"train/{i % 2}/{i:06d}.jpg", i % 2, i) for i in range(images)]
    source = Source("random", ("0", "1"), {"train": rows}, lambda at: jpegs[at % len(jpegs)])
    with tempfile.TemporaryDirectory() as out:
        found = encode(source, codec=codec, size=size, batch_size=batch, out=out, splits=["train"], profile=True)
    assert found.profile is not None
    whole = images / found.profile["wall"]
    flops = counter.get_total_flops()
    rate = spread(bare)
    return {
        "size": size,
        "batch": batch,
        "gflop_per_image": flops / 1e9,
        "bare_images_per_s": rate,
        "share_of_measured_flops": rate["median"] * flops / bound["flops"],
        "encode_images_per_s": whole,
        "encode_over_bare": whole / rate["median"],
        "bottleneck": found.profile["bottleneck"],
        "stages": found.profile["stages"],
    }


def bench_training(device: torch.device, samples: int, batch: int, bound: dict, epochs: int, compile: bool) -> dict:
    """Epochs on random 4-bit codes of 4 x 32 x 32 that are on the device, and batches alone without the network."""
    codes = torch.randint(0, 16, (samples, 1, 4, 32, 32), dtype=torch.uint8, device=device)
    split = Split(codes, torch.randint(0, 1000, (samples,), device=device))
    net = NetConfig((4, 32, 32), 1000, 4, (-2.0,) * 4, (0.25,) * 4)
    recipe = make_recipe(epochs=epochs, batch_size=batch, compile=compile)
    config = RunConfig(net, recipe, Augment(), {}, versions())
    state = start_state(config, device)
    with silent("", 0, "") as bar:
        seconds = timed(device, lambda: train_epoch(state, config, split, 0, bar), epochs)
    generator = torch.Generator(device).manual_seed(0)
    loading = timed(device, lambda: [codes.sum() for codes, _ in split.training_batches(batch, generator)], epochs)
    rate = samples / min(seconds)
    return {
        "samples": samples,
        "batch": batch,
        "compiled": compile,
        "epoch_s": spread(seconds),
        "samples_per_s": rate,
        "share_of_measured_flops": 3 * count_flops(state.net) * rate / bound["flops"],
        "batches_alone_samples_per_s": samples / min(loading),
        "batches_alone_share_of_bandwidth": 2 * 4096 * samples / min(loading) / bound["bytes_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="a trial of the script, at sizes for a CPU")
    asked = parser.parse_args()
    tune_process()
    device = pick_device(asked.device)
    if device.type != "cuda" and not asked.small:
        print("no CUDA device here; --small tries the script on a CPU")
        return
    small = asked.small
    bound = ceiling(device, 512 if small else 8192)
    result: dict = {"device": str(device), "latenttrain": latenttrain.__version__, "measured_ceiling": bound}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("taesd",) if small else ("taesd", "sd-vae"):
            codec = codec_of(name, Path(folder), device)
            for size in (64,) if small else (256, 512):
                batch = 4 if small else (128 if name == "taesd" else 32) * 256 // size
                images = 16 if small else 8192 * 256 // size if name == "taesd" else 1024
                result[f"{name}_{size}"] = bench_codec(codec, device, size, batch, bound, images)
                print(name, size, json.dumps(result[f"{name}_{size}"]), flush=True)
    for name, samples in (("imagenette", 9_469), ("imagenet", 1_281_167)):
        for batch, compile in ((64, False),) if small else itertools.product((64, 256, 1024), (False, True)):
            count, row = min(samples, 256) if small else samples, f"train_{name}_{batch}" + "_compiled" * compile
            result[row] = bench_training(device, count, batch, bound, 1 if count > 1e5 else 3, compile)
            print(row, json.dumps(result[row]), flush=True)
    if small:
        print(json.dumps(machine() | result, indent=1))
    else:
        record("gpu", result)


if __name__ == "__main__":
    main()
