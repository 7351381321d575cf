"""Lightning trains on codes, on one device or several ranks.

latentprep encode shapes --codec dct --out shards
python examples/lightning_loop.py shards --ranks 2
"""

import argparse

import lightning
import torch
from torch import nn

import latentprep
import latenttrain


class Classifier(lightning.LightningModule):
    def __init__(self, dataset: str) -> None:
        super().__init__()
        self.path = dataset
        manifest = latentprep.open(dataset).manifest
        channels = manifest.latent[0]
        self.net = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(manifest.classes)),
        )  # fmt: skip

    def batches(self, split: str, batch_size: int, shuffle: bool) -> latenttrain.Batches:
        """This rank's part of each batch, on its device. Lightning takes it in place of a DataLoader."""
        return latenttrain.batches(
            self.path, split, batch_size, device=self.device, shuffle=shuffle,
            rank=self.trainer.global_rank, world_size=self.trainer.world_size,
        )  # fmt: skip

    def train_dataloader(self) -> latenttrain.Batches:
        return self.batches("train", 64, shuffle=True)

    def val_dataloader(self) -> latenttrain.Batches:
        return self.batches("val", 256, shuffle=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.net(codes.float())

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        codes, labels = batch
        return nn.functional.cross_entropy(self(codes), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        codes, labels = batch
        right = (self(codes).argmax(1) == labels).float().mean()
        self.log("val_top1", right, prog_bar=True, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    asked = parser.parse_args()
    trainer = lightning.Trainer(max_epochs=asked.epochs, devices=asked.ranks, logger=False)
    trainer.fit(Classifier(asked.dataset))
    if trainer.is_global_zero:
        print(f"val top-1 {float(trainer.callback_metrics['val_top1']):.1%}")
