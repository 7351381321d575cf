"""Third-party codecs that give tokens, of images and of sound, for the tests: small residual codebooks."""

from __future__ import annotations

import numpy as np
import torch


def residual_tokens(latents: torch.Tensor, codebooks: list[np.ndarray]) -> torch.Tensor:
    """f32 [B,D,h,w] -> i64 [B,stages,h,w]: greedy, each stage the nearest vector to what is left over."""
    rest, stages = latents.permute(0, 2, 3, 1).numpy().copy(), []
    for table in codebooks:
        nearest = np.square(rest[..., None, :] - table).sum(-1).argmin(-1)
        stages.append(torch.from_numpy(nearest))
        rest -= table[nearest]
    return torch.stack(stages, 1)


class PatchTokens:
    """A vector-quantized image: means of 4×4 blocks, in three stages of random vectors, the last with fewer."""

    name = "patches"

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        random = np.random.default_rng(0)
        scales = ((16, 60.0), (16, 25.0), (5, 10.0))
        self.codebooks = [random.normal(0, scale, (n, 3)).astype(np.float32) for n, scale in scales]

    def config(self) -> dict:
        return {"name": self.name}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return len(self.codebooks), height // 4, width // 4

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float() - 128, 4)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        return residual_tokens(self.encode(images), self.codebooks)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = latents.repeat_interleave(4, -1).repeat_interleave(4, -2) + 128
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def flip(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flip(-1)


class LoudnessTokens:
    """Sound as four spectral levels a frame, in two stages of random vectors, 4 and 10 bits."""

    name = "loudness"
    media = "sound"
    rate, hop = 16000, 320

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        random = np.random.default_rng(0)
        scales = ((16, 3.0), (600, 1.0))
        self.codebooks = [random.normal(0, scale, (n, 4)).astype(np.float32) for n, scale in scales]

    def config(self) -> dict:
        return {"name": self.name}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return len(self.codebooks), 1, width // self.hop

    def encode(self, sounds: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(sounds.unflatten(1, (-1, self.hop))).abs()[..., :160]
        levels = spectrum.unflatten(2, (4, 40)).mean(3).add(1e-3).log2()
        return levels.transpose(1, 2)[:, :, None]

    def tokens(self, sounds: torch.Tensor) -> torch.Tensor:
        return residual_tokens(self.encode(sounds), self.codebooks)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        level = latents[:, :, 0].mean(1).exp2() / self.hop
        return level.repeat_interleave(self.hop, -1).clamp(-1, 1)

    def flip(self, latents: torch.Tensor) -> None:
        return None
