"""A training loop of your own, in plain PyTorch, that goes on where it was interrupted.

latentprep encode shapes --codec dct --out shards
python examples/plain_loop.py shards
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import latenttrain

parser = argparse.ArgumentParser()
parser.add_argument("dataset")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--checkpoint", type=Path, default=Path("loop.pt"))
asked = parser.parse_args()

train = latenttrain.batches(asked.dataset, "train", batch_size=64)
val = latenttrain.batches(asked.dataset, "val", batch_size=256, shuffle=False)
manifest, device = train.dataset.manifest, train.samples.device
channels = manifest.latent[0]
net = nn.Sequential(
    nn.BatchNorm2d(channels), nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.ReLU(),
    nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(manifest.classes)),
).to(device)  # fmt: skip
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)

if asked.checkpoint.exists():
    saved = torch.load(asked.checkpoint, weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    train.load_state_dict(saved["batches"])

while train.epoch < asked.epochs:
    net.train()
    for codes, labels in train:  # one epoch; u8 [B,C,h,w] and i64 [B], on the device
        loss = nn.functional.cross_entropy(net(codes.float()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.inference_mode():
        right = sum(int((net(codes.float()).argmax(1) == labels).sum()) for codes, labels in val)
    print(f"epoch {train.epoch}: val top-1 {right / len(val.samples):.1%}")
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "batches": train.state_dict()}
    torch.save(saved, asked.checkpoint)  # may be done after any batch
