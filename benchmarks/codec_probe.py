"""What latents tell without a network: a ridge regression on pooled channels, in a minute.

    python benchmarks/codec_probe.py shards other-shards shards:0-16,29-46

For choosing among latents to learn from, before a network is trained on each. Every channel of an image becomes seven
numbers: its mean, deviation and root mean square, and the means of the grid's four quarters. A regression on these and
on random ReLU features of them is fitted to train but for a tenth, which it is judged by; val stays unseen.
``:0-16,29-46`` after a dataset takes those channels only. Without arguments: the built-in `shapes`, with `dct` and
`scatter`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import latentprep
from common import mean_spread, record

BATCH = 256
HIDDEN = 1500
RIDGE = 300.0
SPLITS = 3  # of train into a part to fit and one to judge


def train_features(path: str) -> tuple[Tensor, Tensor]:
    """Of view 0 of a dataset's train split: f32 [n,C,7], i64 [n]"""
    dataset = latentprep.open(path)
    split = dataset.load("train")
    batches = [split.codes[start : start + BATCH, 0] for start in range(0, len(split.codes), BATCH)]
    features = [pooled(torch.from_numpy(dataset.quantizer.dequantize(batch))) for batch in batches]
    return torch.cat(features), torch.from_numpy(split.labels).long()


def pooled(latents: Tensor) -> Tensor:
    """f32 [n,C,h,w] -> f32 [n,C,7]"""
    cells = latents.flatten(2)
    quarters = F.adaptive_avg_pool2d(latents, 2).flatten(2)
    return torch.cat([torch.stack([cells.mean(2), cells.std(2), cells.square().mean(2).sqrt()], 2), quarters], 2)


def accuracies(features: Tensor, labels: Tensor) -> list[float]:
    """Top-1 on a tenth that was left out, of several splits: f32 [n,C,7], i64 [n]"""
    scaled = ((features - features.mean(0)) / (features.std(0) + 1e-6)).flatten(1)
    seeded = torch.Generator().manual_seed(0)
    directions = torch.randn(scaled.shape[1], HIDDEN, generator=seeded) * 0.7 / scaled.shape[1] ** 0.5
    inputs, targets = torch.cat([scaled, torch.relu(scaled @ directions)], 1), F.one_hot(labels).float()
    results = []
    for _ in range(SPLITS):
        judge, fit = torch.randperm(len(labels), generator=seeded).tensor_split([len(labels) // 10])
        mean, offset = inputs[fit].mean(0), targets[fit].mean(0)
        centred = inputs[fit] - mean
        gram = centred.T @ centred + RIDGE * torch.eye(centred.shape[1])
        weights = torch.linalg.solve(gram, centred.T @ (targets[fit] - offset))
        right = ((inputs[judge] - mean) @ weights + offset).argmax(1) == labels[judge]
        results.append(right.float().mean().item())
    return results


def channels_of(text: str) -> list[int]:
    """``0-2,7`` -> [0, 1, 2, 7]"""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise SystemExit(f"channels are written as 0-2,7, got {text}")
    spans = [part.split("-") for part in text.split(",")]
    return [channel for span in spans for channel in range(int(span[0]), int(span[-1]) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", help="latent datasets, each with channels after a colon, or with all")
    asked = parser.parse_args()
    rows: dict[str, dict] = {}
    features: dict[str, tuple[Tensor, Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for codec in () if asked.datasets else ("dct", "scatter"):
            latentprep.encode("shapes", codec=codec, out=Path(folder, codec), splits=["train"])
            asked.datasets.append(str(Path(folder, codec)))
        for text in asked.datasets:
            path, _, channels = text.partition(":")
            if path not in features:
                features[path] = train_features(path)
            pools, labels = features[path]
            chosen = channels_of(channels) if channels else list(range(pools.shape[1]))
            if not chosen or max(chosen) >= pools.shape[1]:
                parser.error(f"{path} has the channels 0 to {pools.shape[1] - 1}, asked for {channels}")
            top1 = accuracies(pools[:, chosen], labels)
            name = Path(path).name + (f":{channels}" if channels else "")
            rows[name] = {"channels": len(chosen), "samples": len(labels), "top1": top1}
            print(f"| {name} | {len(chosen)} | {mean_spread(top1)} |", flush=True)
    record("codec_probe", {"rows": rows})


if __name__ == "__main__":
    main()
