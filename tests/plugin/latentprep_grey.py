"""A third-party codec as its author would write it: one grey plane, the mean of each 4×4 block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

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


class SlowCodec(GreyCodec):
    """Takes its time with every image but no processor, and waits for a file; for the tests. Calibration, which has one
    image at a time, waits for nothing."""

    name = "slow"

    def __init__(self, *, delay: float = 0.05, gate: str = "", device: torch.device | str = "cpu") -> None:
        super().__init__(device=device)
        self.delay, self.gate = delay, gate

    def config(self) -> dict:
        return {"name": self.name, "delay": self.delay, "gate": self.gate}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        while self.gate and len(images) > 1 and not Path(self.gate).exists():
            time.sleep(0.01)
        time.sleep(self.delay * len(images) if len(images) > 1 else 0)
        return super().encode(images)


class DeadlyCodec(GreyCodec):
    """Kills the worker that gives it a dark image, until there are so many bytes in a file; for the tests."""

    name = "deadly"

    def __init__(self, *, count: str = "", times: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__(device=device)
        self.count, self.times = count, times

    def config(self) -> dict:
        return {"name": self.name, "count": self.count, "times": self.times}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        dark = bool((images.float().mean((1, 2, 3)) < 10).any())
        if dark and multiprocessing.parent_process() and Path(self.count).stat().st_size < self.times:
            with Path(self.count).open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(images)


class WeighedCodec(GreyCodec):
    """Has other weights where another environment variable is set; a plug-in that the tests install."""

    name = "weighed"

    def config(self) -> dict:
        return {"name": self.name, "weights_sha256": os.environ.get("GREY_WEIGHTS", "none")}


class Local:
    """Reads files in one process only, as from a disk that no other machine has."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, path: str) -> bytes:
        if os.getpid() != self.process:
            raise FileNotFoundError(2, "No such file or directory", path)
        return Path(path).read_bytes()
