"""The training itself: one step, the steered rate, and the state that makes a resumed run the same run."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latentprep.codecs.learned import Architecture, Networks, centred
from latentprep.device import has_fast_bfloat16, to_host
from latentprep.errors import CodecError
from latentprep.learning.crops import Crops
from latentprep.learning.start import rate
from latentprep.storage.atomic import write_atomic

PEAK = 2e-3  # learning rate
WARM_UP = 50  # steps
EDGES = 0.1  # weight of the squared error of differences between neighbouring pixels
STEERING = 0.05  # how fast the weight of the rate follows: the exponent per step for a rate of twice what was asked
BETAS, CLIPPED = (0.9, 0.98), 1.0  # Adam's, and the largest norm of a gradient
ROUNDED = 0.2  # the last part of the steps, in which the decoder sees rounded latents in place of noisy ones
PART = 8  # crops that a thread computes at a time
_NOTES = "latentprep"


@dataclass
class Trainer:
    """A run: networks, the latents' distributions, Adam's moments, and the weight of a bit against squared error.

    Step k is a function of the state after step k - 1, (seed, k) and `steps` alone.
    """

    of: Architecture
    networks: Networks
    places: nn.Parameter  # f32 [C], centres of the distributions; those of odd channels stay 0
    log_scales: nn.Parameter  # f32 [C]
    crops: Crops
    bits: float
    seed: int
    device: torch.device
    log_weight: float = math.log(2 * math.log(2) / 12)  # of a bit: what it is worth at a step of 1 and high rates
    step: int = 0

    def __post_init__(self) -> None:
        self.networks.to(self.device)
        for parameter in (self.places, self.log_scales):
            parameter.data = parameter.data.to(self.device)
        self.even = torch.tensor([sign > 0 for sign in self.of.signs], device=self.device)
        self.bfloat16 = has_fast_bfloat16(self.device)
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters().values()] for _ in range(2))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**dict(self.networks.named_parameters()), "places": self.places, "log_scales": self.log_scales}

    def advance(self, steps: int, pool: ThreadPoolExecutor | None) -> tuple[float, float]:
        """One step of a run of so many: mean squared error in grey levels, and bits per latent value after rounding.

        pool: of `one_thread_each`; its threads compute parts of the batch, so that their number changes nothing.
        """
        crops, random = self.crops.draw(self.seed, self.step)
        pixels = centred(torch.from_numpy(crops).to(self.device), self.of.step)
        cells = (len(crops), self.of.channels, *(side // self.of.factor for side in crops.shape[2:]))
        noise = torch.from_numpy(random.random(cells, dtype=np.float32) - 0.5).to(self.device)
        late = self.step >= (1 - ROUNDED) * steps
        parts = list(zip(*(values.split(PART if pool else len(crops)) for values in (pixels, noise)), strict=True))
        made = (pool.map if pool else map)(lambda part: self._learn(part[0], part[1], late), parts)
        gradients, errors, codes = zip(*made, strict=True)
        self._adam([sum(own) / len(parts) for own in zip(*gradients, strict=True)], PEAK * schedule(self.step, steps))
        spent = float(np.mean([entropy(channel) for channel in torch.cat(codes).transpose(0, 1).flatten(1).numpy()]))
        self.log_weight += STEERING * max(-1.0, min(1.0, spent / self.bits - 1))
        self.step += 1
        return sum(errors) / len(errors) * self.of.step**2, spent

    def _learn(self, pixels: Tensor, noise: Tensor, late: bool) -> tuple[tuple[Tensor, ...], float, Tensor]:
        """Gradients of the loss of some crops, squared error in steps, and the rounded latents on the host."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents = self._apply(self.networks.encoder, pixels)
        places = torch.where(self.even, self.places, 0)
        noisy = latents + noise
        spent = rate(noisy.permute(0, 2, 3, 1), places, self.log_scales.exp()).mean()
        centres = places.detach()[:, None, None]
        codes = (latents.detach() - centres).round()
        # The gradient passes rounding as if it were nothing.
        given = latents + (codes + centres - latents).detach() if late else noisy
        error = self._apply(self.networks.decoder, given) - pixels
        squared = error.square().mean()
        edges = error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()
        share = self.of.channels / (3 * self.of.factor**2)  # latent values per pixel value
        loss = squared + EDGES * edges + math.exp(self.log_weight) * share * spent
        gradients = torch.autograd.grad(loss, list(self.parameters().values()))
        return gradients, float(squared.detach()), codes.cpu()

    @torch.no_grad()
    def _adam(self, gradients: list[Tensor], rate: float) -> None:
        """A step of Adam (Kingma & Ba 2015) with a bounded gradient. torch's own takes seconds to import."""
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (CLIPPED / norm.clamp(min=CLIPPED)))
        one, two = BETAS
        torch._foreach_lerp_(self.means, gradients, 1 - one)
        torch._foreach_mul_(self.squares, two)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - two)
        below = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(below, math.sqrt(1 - two ** (self.step + 1)))
        torch._foreach_add_(below, 1e-8)
        values: list[Tensor] = list(self.parameters().values())
        torch._foreach_addcdiv_(values, self.means, below, -rate / (1 - one ** (self.step + 1)))

    def _apply(self, network: nn.Module, values: Tensor) -> Tensor:
        """The linear part in float32, the network in bfloat16 where that is fast."""
        linear = network.linear(values)  # type: ignore[operator]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            added = network.network(values)  # type: ignore[operator]
        return linear + added.float()

    def save(self, path: Path, asked: dict, steps: int) -> None:
        """Write everything that `restore` needs, atomically. asked: what was asked for, JSON."""
        import safetensors.torch

        tensors: dict[str, Tensor] = {}
        for kind, values in self._state().items():
            tensors |= {f"{kind}.{name}": value for name, value in zip(self.parameters(), values, strict=True)}
        notes = {"asked": asked, "steps": steps, "step": self.step, "log_weight": self.log_weight}
        notes["architecture"] = self.of.to_json()
        plain = dict(zip(tensors, to_host(list(tensors.values())), strict=True))
        write_atomic(path, safetensors.torch.save(plain, {_NOTES: json.dumps(notes)}))

    def restore(self, tensors: dict[str, Tensor], notes: dict) -> None:
        """Inverse of `save`. Raises `ValueError` or `KeyError` for a state that is not this run's."""
        self.step, self.log_weight = int(notes["step"]), float(notes["log_weight"])
        for kind, values in self._state().items():
            for name, value in zip(self.parameters(), values, strict=True):
                stored = tensors[f"{kind}.{name}"]
                if stored.shape != value.shape or stored.dtype != value.dtype:
                    raise ValueError(f"{kind} of {name} has another shape")
                value.data.copy_(stored)

    def _state(self) -> dict[str, list[Tensor]]:
        return {"value": list(self.parameters().values()), "mean": self.means, "square": self.squares}


def entropy(codes: np.ndarray) -> float:
    """Bits per value that an entropy coder takes for these codes, f32 [n]."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(np.log2(len(codes)) - (counts * np.log2(counts)).sum() / len(codes))


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: a linear warm-up, then a half cosine to zero."""
    warm = min(WARM_UP, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `Trainer.save` wrote. Raises `CodecError` if it is damaged."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})[_NOTES])
            if not isinstance(notes, dict):
                raise ValueError("its notes are not a JSON object")
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CodecError(f"{path} is damaged: {error}".splitlines()[0], "delete it to start over") from error
