"""The Free Spoken Digit Dataset: accuracy on its official split, and on each speaker when it is trained on the others.

    LATENTPREP_ASSETS=… python benchmarks/fsdd.py --out fsdd
    LATENTPREP_ASSETS=… python benchmarks/fsdd.py --out fsdd --codec lyra --folds official --stages 46,30,16,8,4,2,1
    LATENTPREP_ASSETS=… python benchmarks/fsdd.py --out fsdd --codec logmel --bits 8 --folds official

The official split tests the same six speakers, and so flatters. A result is the last epoch's. Folds that OUT has are
not run again. --stages trains on all stages of tokens, with stage drop-out and without, and tests on fewer;
--fit-stages trains on fewer, too. Sizes of other formats are of every fifth file, encoded by libsndfile at its own
rate.

logmel stands for the usual way, log-mel spectrograms computed from MP3 files in every epoch: the network learns from
those spectrograms, made once and kept in 8 bits, and what decoding and transforming all files takes is clocked by
itself, on one thread, to be added to every epoch: `source_seconds_per_epoch`.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

import latentprep
import latenttrain
from common import assets, machine, spread, write_json
from latentprep.sources.media import medium_of

OFFICIAL = "official"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codec", default="mdct")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--folds", help="some of official and the speakers, comma-separated; default: all")
    parser.add_argument("--stages", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--fit-stages", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--record", type=Path, help="JSON file to write")
    options = parser.parse_args()
    folder = assets()
    if folder is None:
        sys.exit("LATENTPREP_ASSETS does not name a folder with fsdd.tar")
    words = options.out / "files"
    if not words.is_dir():
        with tarfile.open(folder / "fsdd.tar") as archive:
            archive.extractall(words, filter="data")
    codec: str | LogMel = options.codec
    if codec == LogMel.name:
        codec, words = LogMel(), as_mp3(words, options.out / "mp3")
    files = sorted(path for path in words.rglob("*") if path.suffix in (".wav", ".mp3"))
    speakers = sorted({speaker(path) for path in files})
    folds = {OFFICIAL: words} | {name: apart(files, name, options.out / "apart" / name) for name in speakers}
    if options.folds:
        folds = {name: folds[name] for name in options.folds.split(",")}
    tokens = options.codec.partition(":")[0] == "lyra"
    settings = {"weights": str(folder / "lyra")} if tokens else {"bits": options.bits, "equal_bits": True}
    whole = options.out / "shards" / f"{options.codec.replace(':', '-')}-{options.bits}-{OFFICIAL}"
    results: dict[str, dict] = {}
    for name, source in folds.items():
        tag = f"{options.codec.replace(':', '-')}-{options.bits}-{name}"
        shards, run = options.out / "shards" / tag, options.out / "runs" / tag
        if tokens and name != OFFICIAL and whole.is_dir():  # no speaker changes what a sound's tokens are
            rate, size = (latentprep.open(whole).manifest.transform[key] for key in ("rate", "size"))
            settings |= {"reuse": whole, "seconds": size / rate}
        made = latentprep.encode(source, codec=codec, out=shards, **settings)
        fit = latenttrain.fit(shards, out=run, resume=(run / "last.safetensors").is_file())
        results[name] = {
            "last_top1": fit.last_top1, "best_top1": fit.top1, "epochs": fit.epochs, "parameters": fit.parameters,
            "seconds_per_epoch": fit.seconds_per_epoch, "bytes_per_sound": made.code_bytes / len(files),
        }  # fmt: skip
        if isinstance(codec, LogMel):
            results[name]["source_seconds_per_epoch"] = clocked(codec, shards, source)
        print(name, results[name], flush=True)
    unseen = [results[name]["last_top1"] for name in speakers if name in results]
    found: dict[str, Any] = {"folds": results, "unseen_mean": statistics.mean(unseen) if unseen else None}
    if options.codec != LogMel.name:
        found["bytes"] = sizes(files[::5])
    print(found["unseen_mean"], found.get("bytes"))
    if options.stages:
        found["stages"] = against_stages(options.out, whole.name, options.stages, len(files))
        print(found["stages"])
    if options.fit_stages:
        found["fitted_on_stages"] = fits_of_stages(options.out, whole.name, options.fit_stages)
        print(found["fitted_on_stages"])
    if options.record:
        write_json(options.record, {"machine": machine(), "codec": options.codec, "bits": options.bits, **found})


def against_stages(out: Path, tag: str, stages: list[int], count: int) -> dict[str, dict]:
    """Top-1 of the last epoch on the official split's val with fewer stages, of a run with stage drop-out and of one
    without; and bytes a sound."""
    whole, drop, none = out / "shards" / tag, out / "runs" / tag, out / "runs" / f"{tag}-nodrop"
    augment = latenttrain.Augment(stage_drop=0)
    latenttrain.fit(whole, augment=augment, out=none, resume=(none / "last.safetensors").is_file())
    found = {}
    for n in stages:
        shards = first_stages(out, tag, n)
        top1 = [latenttrain.evaluate(run, shards, checkpoint="last").top1 for run in (drop, none)]
        size = latentprep.info(shards).code_bytes / count
        found[str(n)] = {"drop_out": top1[0], "without": top1[1], "bytes_per_sound": size}
    return found


def fits_of_stages(out: Path, tag: str, stages: list[int]) -> dict[str, dict]:
    """The official split with a network of its own for each number of stages."""
    found = {}
    for n in stages:
        run = out / "runs" / f"{tag}-{n}"
        fit = latenttrain.fit(first_stages(out, tag, n), out=run, resume=(run / "last.safetensors").is_file())
        found[str(n)] = {
            "last_top1": fit.last_top1, "epochs": fit.epochs, "parameters": fit.parameters,
            "seconds_per_epoch": fit.seconds_per_epoch,
        }  # fmt: skip
        print(n, found[str(n)], flush=True)
    return found


def first_stages(out: Path, tag: str, n: int) -> Path:
    """The dataset `tag` with its first n stages."""
    whole, shards = out / "shards" / tag, out / "shards" / f"{tag}-{n}"
    if n == latentprep.open(whole).manifest.latent[0]:
        return whole
    latentprep.requantize(whole, stages=n, out=shards)
    return shards


class LogMel:
    """Logarithms of 40 bands' energy on the mel scale, at `mdct`'s rate and frames. There is no way back."""

    name = "logmel"
    media = "sound"
    light = True
    rate, hop, window, bands = 16000, 320, 512, 40

    def __init__(self) -> None:
        mel = torch.linspace(0, 2595 * math.log10(1 + self.rate / 2 / 700), self.bands + 2)
        edges = 700 * (10 ** (mel / 2595) - 1)  # in Hz: triangles rise from one to the next, and fall to the one after
        bins = torch.linspace(0, self.rate / 2, self.window // 2 + 1)[:, None]
        rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
        fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
        self.filters = torch.minimum(rise, fall).clamp(min=0)

    def config(self) -> dict:
        return {"name": self.name}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, self.bands, width // self.hop

    def encode(self, sounds: Tensor) -> Tensor:
        """f32 [B,T] -> f32 [B,1,40,T/320]: a picture, high bands above"""
        window = torch.hann_window(self.window)
        power = torch.stft(sounds, self.window, self.hop, window=window, return_complex=True).abs().square()
        mel = power[..., : sounds.shape[1] // self.hop].transpose(1, 2) @ self.filters
        return (mel + 1e-6).log().transpose(1, 2).flip(1)[:, None].contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def flip(self, latents: Tensor) -> None:
        return None


def as_mp3(words: Path, root: Path) -> Path:
    """A folder with the WAV files' twins, by libsndfile's defaults."""
    for path in words.rglob("*.wav"):
        twin = (root / path.relative_to(words)).with_suffix(".mp3")
        twin.parent.mkdir(parents=True, exist_ok=True)
        if not twin.exists():
            soundfile.write(twin, *soundfile.read(path), format="MP3")
    return root


def clocked(codec: LogMel, shards: Path, source: Path, passes: int = 3) -> dict:
    """Seconds that reading, decoding and transforming all of train takes, in batches of 32 on one thread."""
    medium = medium_of(latentprep.open(shards).manifest.transform)
    files = sorted(source.rglob("train/*/*.mp3"))
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        for first in range(0, len(files), 32):
            waves = [torch.from_numpy(medium.load(path.read_bytes())) for path in files[first : first + 32]]
            codec.encode(torch.cat(waves))
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


def speaker(path: Path) -> str:
    """``7_theo_3.wav`` -> ``theo``."""
    return path.stem.split("_")[1]


def apart(files: list[Path], name: str, root: Path) -> Path:
    """A folder of links in which this speaker is val and the others are train."""
    for path in files:
        link = root / ("val" if speaker(path) == name else "train") / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    return root


def sizes(files: list[Path]) -> dict[str, float]:
    """Mean bytes per file in other formats."""
    kinds: dict[str, dict] = {
        "flac": {"format": "FLAC", "subtype": "PCM_16"},
        "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
        "mp3, smallest": {
            "format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.99, "bitrate_mode": "CONSTANT",
        },
        "opus": {"format": "OGG", "subtype": "OPUS"},
    }  # fmt: skip
    found = {"wav": statistics.mean(path.stat().st_size for path in files)}
    for name, options in kinds.items():
        lengths = []
        for path in files:
            wave, rate = soundfile.read(path)
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, rate, **options)
            lengths.append(len(buffer.getvalue()))
        found[name] = statistics.mean(lengths)
    return found


if __name__ == "__main__":
    main()
