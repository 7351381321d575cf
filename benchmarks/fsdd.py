"""The Free Spoken Digit Dataset: accuracy on its official split, and on each speaker when it is trained on the others.

    LATENTPREP_ASSETS=… python benchmarks/fsdd.py --out fsdd
    LATENTPREP_ASSETS=… python benchmarks/fsdd.py --out fsdd --codec lyra --folds official --stages 46,30,16,8,4,2,1

The official split tests the same six speakers, and so flatters. A result is the last epoch's. Folds that OUT has are
not run again. --stages trains on all stages of tokens, with stage drop-out and without, and tests on fewer. Sizes of
other formats are of every fifth file, encoded by libsndfile at its own rate.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
from pathlib import Path

import soundfile

import latentprep
import latenttrain
from common import assets, machine, write_json

OFFICIAL = "official"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codec", default="mdct")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--folds", help="some of official and the speakers, comma-separated; default: all")
    parser.add_argument("--stages", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--record", type=Path, help="JSON file to write")
    options = parser.parse_args()
    folder = assets()
    if folder is None:
        sys.exit("LATENTPREP_ASSETS does not name a folder with fsdd.tar")
    words = options.out / "files"
    if not words.is_dir():
        with tarfile.open(folder / "fsdd.tar") as archive:
            archive.extractall(words, filter="data")
    files = sorted(words.rglob("*.wav"))
    speakers = sorted({speaker(path) for path in files})
    folds = {OFFICIAL: words} | {name: apart(files, name, options.out / "apart" / name) for name in speakers}
    if options.folds:
        folds = {name: folds[name] for name in options.folds.split(",")}
    tokens = options.codec.partition(":")[0] == "lyra"
    settings = {"weights": str(folder / "lyra")} if tokens else {"bits": options.bits}
    results = {}
    for name, source in folds.items():
        tag = f"{options.codec.replace(':', '-')}-{options.bits}-{name}"
        shards, run = options.out / "shards" / tag, options.out / "runs" / tag
        made = latentprep.encode(source, codec=options.codec, out=shards, **settings)
        fit = latenttrain.fit(shards, out=run, resume=(run / "last.safetensors").is_file())
        results[name] = {
            "last_top1": fit.last_top1, "best_top1": fit.top1, "epochs": fit.epochs, "parameters": fit.parameters,
            "seconds_per_epoch": fit.seconds_per_epoch, "bytes_per_sound": made.code_bytes / len(files),
        }  # fmt: skip
        print(name, results[name], flush=True)
    unseen = [results[name]["last_top1"] for name in speakers if name in results]
    found = {"folds": results, "unseen_mean": statistics.mean(unseen) if unseen else None, "bytes": sizes(files[::5])}
    print(found["unseen_mean"], found["bytes"])
    if options.stages:
        tag = f"{options.codec.replace(':', '-')}-{options.bits}-{OFFICIAL}"
        found["stages"] = against_stages(options.out, tag, options.stages, len(files))
        print(found["stages"])
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
        shards = whole
        if n < latentprep.open(whole).manifest.latent[0]:
            shards = out / "shards" / f"{tag}-{n}"
            latentprep.requantize(whole, stages=n, out=shards)
        top1 = [latenttrain.evaluate(run, shards, checkpoint="last").top1 for run in (drop, none)]
        size = latentprep.info(shards).code_bytes / count
        found[str(n)] = {"drop_out": top1[0], "without": top1[1], "bytes_per_sound": size}
    return found


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
