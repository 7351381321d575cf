"""A third-party codec as its author would write it: one grey plane, the mean of each 4×4 block."""

from __future__ import annotations

import torch


class GreyCodec:
    """Mean brightness of 4×4 blocks, times a gain; a plug-in that the tests install."""

    name = "grey"

    def __init__(self, *, gain: float = 1.0, device: torch.device | str = "cpu") -> None:
        self.gain, self.device = float(gain), torch.device(device)

    def config(self) -> dict:
        return {"name": self.name, "gain": self.gain}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, height // 4, width // 4

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        grey = images.to(self.device).float().mean(1, keepdim=True)
        return torch.nn.functional.avg_pool2d(grey, 4) * self.gain

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        grey = latents.repeat_interleave(4, -1).repeat_interleave(4, -2) / self.gain
        return grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    def flip(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flip(-1)


class BrokenCodec(GreyCodec):
    """Gives NaN for dark images; a plug-in that the tests install."""

    name = "broken"

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        latents = super().encode(images)
        latents[images.float().mean((1, 2, 3)) < 10] = torch.nan
        return latents
