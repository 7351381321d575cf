"""All that is to be measured on a GPU, in one call: `make bench-gpu`. It ends within eight minutes even where a part
hangs: see `each_within`. What matters most comes first, and the record is written anew after each part.

First the codes of every codec on the card against those of the CPU, with its weights where they are at hand, else with
random ones. Then codecs at their real size with random weights (speed does not depend on them) on batches that are on
the device, against the arithmetic bound; `encode` of JPEGs from memory against the bare codec; epochs on codes of
Imagenette's and of ImageNet's size; the share of the card's measured bfloat16 rate and bandwidth. Runs on a CPU too,
with --small.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import latenttrain
from common import assets, each_within, machine, record, spread
from latentprep.cli.console import tune_process
from latentprep.codecs import Codec, codec_names, make_codec
from latentprep.codecs.autoencoder import AutoencoderCodec
from latentprep.codecs.base import codec_class, media_of
from latentprep.codecs.listing import weights_at_hand
from latentprep.device import on_device, one_thread_each, pick_device
from latentprep.encoding.encode import encode
from latentprep.encoding.pipeline import Stages
from latentprep.progress import silent
from latentprep.quantizing.scalar import fit_quantizer, quantize
from latentprep.sources.images import MAX_PIXELS
from latentprep.sources.kinds import SOUND
from latentprep.sources.source import Row, Source
from latenttrain.augment import Augment
from latenttrain.config import RunConfig, versions
from latenttrain.data import Split
from latenttrain.nets import NetConfig, count_flops
from latenttrain.recipe import make_recipe
from latenttrain.runtime import reproducible, synchronize
from latenttrain.train import make_learner, start_state, train_epoch

PART_S, ALL_S = 100, 420  # for one part, for all: with the start of processes it ends within eight minutes

KL = {  # stable-diffusion-v1-5's vae/config.json
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SMALL_KL = {**KL, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
SMALL_TINY = {
    "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4,
}  # fmt: skip


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


@cache
def random_weights(folder: Path, name: str, small: bool) -> str:
    """A folder with random weights for an autoencoder: an AutoencoderKL for a VAE, else an AutoencoderTiny."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    path = folder / f"{name}{'-small' * small}"
    torch.manual_seed(0)
    if name.endswith("-vae"):
        model = diffusers.AutoencoderKL(**(SMALL_KL if small else KL))
    else:
        model = diffusers.AutoencoderTiny(**(SMALL_TINY if small else {}))
    model.save_pretrained(path)
    return str(path)


def weights_of(name: str, folder: Path) -> tuple[str | None, str]:
    """An autoencoder's weights, and what they are: None is where the codec itself finds them."""
    own = assets()
    if own is not None and (own / name).is_dir():
        return str(own / name), "its own"
    if weights_at_hand(name) == "yes":
        return None, "its own"
    return random_weights(folder, name, True), "random, small"


def bench_codec(make: Callable[[], Codec], device: torch.device, size: int, bound: dict, images: int) -> dict:
    """Bare codec on resident batches of the shipped size, `encode` of JPEGs in memory, and codes against the CPU's."""
    codec = make()
    small = np.random.default_rng(0).integers(0, 256, (16, size // 8, size // 8, 3), np.uint8)
    jpegs = []
    for pixels in small:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    rows = [Row(f"train/{i % 2}/{i:06d}.jpg", i % 2, i) for i in range(images)]
    source = Source("random", ("0", "1"), {"train": rows}, lambda at: jpegs[at % len(jpegs)])
    batch = min(images, Stages(source, codec, None, None, MAX_PIXELS).batch_samples(1, size, size))
    resident = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        codec.encode(resident[:1])
    bare = [batch / s for s in timed(device, lambda: codec.encode(resident), 3)]
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        encode(source, codec=codec, size=size, out=out, splits=["train"])  # without profile=True, which waits
        whole = images / (time.perf_counter() - start)
    flops, rate = counter.get_total_flops(), spread(bare)
    return {
        "size": size,
        "batch": batch,
        "gflop_per_image": flops / 1e9,
        "bare_images_per_s": rate,
        "share_of_measured_flops": rate["median"] * flops / bound["flops"],
        "encode_images_per_s": whole,  # calibration included
        "encode_over_bare": whole / rate["median"],
    }


def compare_codes(
    name: str, options: dict, device: torch.device, size: int, joint: bool = False, folder: Path | None = None
) -> dict:
    """The codes of random smooth pictures on the device and on the CPU, of the same quantizer, at 4 and 8 bits.

    folder: for random weights of an autoencoder.
    """
    found: dict = {}
    if folder is not None:
        options["weights"], found["weights"] = weights_of(name, folder)
    noise = torch.rand(4, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0)) * 255
    pictures = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)
    host = make_codec(name, device="cpu", **options).encode(pictures)
    there = make_codec(name, device=device, **options).encode(pictures)
    found["latents_max_difference"] = float((host - there.cpu()).abs().max())
    for bits in (4, 8):
        quantizer = fit_quantizer(host, bits, joint)
        apart = (quantize(host, quantizer).int() - quantize(there, quantizer).cpu().int()).abs()
        found[f"{bits}_bits"] = {"share_differing": float((apart > 0).float().mean()), "max": int(apart.max())}
    return found


def bench_training(device: torch.device, samples: int, batch: int, bound: dict, compile: bool) -> dict:
    """Two epochs, the first to warm up, as `fit` runs them, on random 4-bit codes of 4 x 32 x 32 that are on the
    device; and batches alone without the network."""
    codes = torch.randint(0, 16, (samples, 1, 4, 32, 32), dtype=torch.uint8, device=device)
    split = Split(codes, torch.randint(0, 1000, (samples,), device=device))
    net = NetConfig((4, 32, 32), 1000, 4, (-2.0,) * 4, (0.25,) * 4)
    recipe = make_recipe(epochs=2, batch_size=batch, compile=compile)
    config = RunConfig(net, recipe, Augment(), {}, versions())
    with reproducible(device, 0), silent("", 0, "") as bar, one_thread_each(device) as pool:
        state = start_state(config, device)
        learner = make_learner(state, config, split, pool)
        seconds = timed(device, lambda: train_epoch(state, config, split, 0, bar, learner), 1)
    generator = torch.Generator(device).manual_seed(0)
    loading = timed(device, lambda: [codes.sum() for codes, _ in split.training_batches(batch, generator)], 1)
    rate = samples / min(seconds)
    return {
        "samples": samples,
        "batch": batch,
        "compiled": compile,
        "epoch_s": min(seconds),
        "samples_per_s": rate,
        "share_of_measured_flops": 3 * count_flops(state.net) * rate / bound["flops"],
        "batches_alone_samples_per_s": samples / min(loading),
        "batches_alone_share_of_bandwidth": 2 * 4096 * samples / min(loading) / bound["bytes_per_s"],
    }


def parts(device: torch.device, small: bool, folder: Path, bound: dict) -> dict[str, Callable[[], dict]]:
    """What is measured, by name, what matters most first. bound: `ceiling`'s, by the time that a part runs."""
    made: dict[str, Callable[[], dict]] = {"measured_ceiling": partial(ceiling, device, 64 if small else 8192)}
    size = 64 if small else 128
    for name in codec_names():
        kind = codec_class(name)
        if not issubclass(kind, AutoencoderCodec):
            if media_of(kind) == SOUND or weights_at_hand(name) not in ("yes", "none needed"):
                continue
            made[f"codes_{name}"] = partial(compare_codes, name, {}, device, size)
        elif not small or name in ("sd-vae", "taesd"):
            for dtype in ("float32", "bfloat16"):
                made[f"codes_{name}_{dtype}"] = partial(
                    compare_codes, name, {"dtype": dtype}, device, size, folder=folder
                )
    made["codes_dct_joint"] = partial(compare_codes, "dct", {"luma": 4, "chroma": 0}, device, 64, joint=True)
    for name in ("taesd",) if small else ("taesd", "sd-vae"):

        @cache
        def codec(name: str = name) -> Codec:
            return make_codec(name, weights=random_weights(folder, name, small), device=device)

        for size in (64,) if small else (256, 512):
            images = 16 if small else (8192 if name == "taesd" else 1024) * 256 // size
            made[f"{name}_{size}"] = partial(bench_codec, codec, device, size, bound, images)
    sizes = (("imagenette", 64),) if small else (("imagenette", 9_469), ("imagenet", 400_000))
    for name, samples in sizes:
        batches = (32,) if small else (32, 64, 1024) if name == "imagenette" else (1024,)  # 32 and 64: as shipped
        for batch, compile in itertools.product(batches, (False,) if small else (False, True)):
            row = f"train_{name}_{batch}" + "_compiled" * compile
            made[row] = partial(bench_training, device, samples, batch, bound, compile)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="a trial of the script, at sizes for a CPU")
    asked = parser.parse_args()
    began = time.monotonic()
    bound: dict = {}
    result: dict = {"latenttrain": latenttrain.__version__}

    with tempfile.TemporaryDirectory() as folder:

        @cache
        def measures() -> dict[str, Callable[[], dict]]:
            tune_process()
            logging.getLogger("diffusers").setLevel(logging.ERROR)
            return parts(pick_device(asked.device), asked.small, Path(folder), bound)

        def measure(row: str) -> dict:
            """In the process that uses the GPU."""
            device = pick_device(asked.device)
            if row == "machine":
                return machine() | {"device": str(device)}
            with on_device(device):
                found = measures()[row]()
            if row == "measured_ceiling":
                bound.update(found)
            return found

        rows = ["machine", *parts(torch.device("cpu"), asked.small, Path(folder), bound)]
        for row, found in each_within(PART_S, ALL_S, measure, rows):
            if row == "machine" and not asked.small and not found.get("device", "").startswith("cuda"):
                print("no CUDA device here; --small tries the script on a CPU", found.get("failed", ""))
                return
            result[row] = found
            if row == "measured_ceiling":
                bound.update(found)  # for another process, where the first ends
            print(f"{time.monotonic() - began:.0f} s: {row}", json.dumps(found), flush=True)
            if not asked.small:
                others = {name: value for name, value in result.items() if name != "machine"}
                record("gpu", others, quiet=True, where=result["machine"])  # what was measured stays, however it ends


if __name__ == "__main__":
    main()
