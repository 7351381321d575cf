"""Augmentation on codes: the whole batch at once, on its device, without waiting for the host.

`draw` draws all random numbers of a batch. `augment_codes` moves, mirrors and adds noise to codes; the network's stem
makes planes of them; `augment_planes` changes the tone of planes, mixes and erases them. Jointly chosen codes are moved
and mirrored after the stem, which restores their latents. An autoencoder's mirrored latents are no mirrored image
(TAESD: about 1 dB), but moving them by whole cells works (23 dB).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from latentprep.errors import UsageError, check_number, nearest
from latenttrain.nets import DROPOUT
from latenttrain.stems import whole

if TYPE_CHECKING:
    from latenttrain.nets import Net


STAGE_DROP = 0.5  # by default, where codes are tokens
TONE = 1.0  # by default, where codes are levels of sound


@dataclass(frozen=True)
class Augment:
    """How training batches are augmented. `Augment()` is the default recipe; `Augment.none` changes nothing."""

    shift: int = 3  # cells, at most, in each direction; the gap is filled by mirroring at the border
    zoom: float = 0.2  # each side stretched or squeezed by up to this fraction, to whole cells
    mixup: float = 0.0  # alpha of the Beta(alpha, alpha) that weighs two samples; 0 is off
    cutmix: float = (
        0.0  # the same for the area of a rectangle from another sample; with mixup, each for half of the samples
    )
    cutout: float = 0.4  # side of an erased rectangle as a fraction of the grid's side
    noise: bool = False  # uniform noise within the quantizer's step: costs 3 points at 2 bits, docs/results.md
    channel_drop: float = 0.0  # probability that a plane of a sample is zeroed
    stage_drop: float = 0.0  # probability that a sample of tokens keeps its first stages only, a random number of them
    tone: float = 0.0  # deviations by which planes are raised or lowered at most, and tilted: `tones`
    mirror: bool = False  # half of the samples, left-right; only for codecs whose mirror image is exact
    mirror_signs: tuple[float, ...] | None = None  # a mirrored channel's factor, 1 or -1; None is 1 for all

    def __post_init__(self) -> None:
        if self.mirror_signs is not None:
            object.__setattr__(self, "mirror_signs", tuple(float(sign) for sign in self.mirror_signs))
        limits: dict[str, float] = {
            "shift": 64,
            "zoom": 1,
            "mixup": math.inf,
            "cutmix": math.inf,
            "cutout": 1,
            "channel_drop": 1,
            "stage_drop": 1,
            "tone": math.inf,
        }
        for name, limit in limits.items():
            check_number(name, getattr(self, name), 0, limit, "0 turns it off")
        if any(sign not in (1, -1) for sign in self.mirror_signs or ()):
            raise UsageError(f"mirror_signs must be 1 or -1, got {self.mirror_signs}", "take them from the codec")

    @classmethod
    def none(cls) -> Augment:
        return cls(shift=0, zoom=0, mixup=0, cutmix=0, cutout=0, noise=False, channel_drop=0, stage_drop=0, tone=0)

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "mirror_signs": self.mirror_signs and list(self.mirror_signs)}

    @classmethod
    def from_json(cls, fields: dict) -> Augment:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UsageError(f"unknown augmentation {name!r}", nearest(name, known))
        return cls(**fields)


def draw(net: Net, batch: int, config: Augment, device: torch.device, generator: Generator | None) -> dict[str, Tensor]:
    """All random numbers of a batch, by name, uniform in 0…1, f32 [B,…]. The rest of the step is pure."""
    planes = int(net.stem.planes)  # type: ignore[arg-type]
    dropped = net.features if net.config.arch in DROPOUT else 0
    shapes = {  # and the setting that needs it
        "shift": ((batch, 2), config.shift or config.zoom),
        "zoom": ((batch, 2), config.shift or config.zoom),
        "mirror": ((batch, 1, 1, 1), config.mirror),
        "noise": ((batch, *net.config.latent), config.noise),
        "cutmix": ((batch, 2), config.cutmix),
        "which_mix": ((batch,), config.mixup and config.cutmix),
        "cutmix_centre": ((batch, 2), config.cutmix),
        "mixup": ((batch, 2), config.mixup),
        "cutout": ((batch, 2), config.cutout),
        "stage_drop": ((batch, 2), config.stage_drop),
        "channel_drop": ((batch, planes, 1, 1), config.channel_drop),
        "dropout": ((batch, dropped), dropped),
        "tone": ((batch, 2), config.tone),
    }
    return {
        name: torch.rand(shape, generator=generator, device=device) for name, (shape, asked) in shapes.items() if asked
    }


def augment_codes(net: Net, codes: Tensor, config: Augment, random: dict[str, Tensor]) -> Tensor:
    """Moves, mirror images, noise and fewer stages, with what `draw` drew: u8 or i32 [B,C,h,w] -> the same, f32 if
    noise or signs change it, or i32 with -1 for stages that are left out"""
    if not net.reads_neighbours:
        codes = _mirrored(net, _moved(codes, config, random), config, random)
    if config.noise:
        codes = codes + random["noise"] - 0.5
    if config.stage_drop:
        codes = with_fewer_stages(whole(codes, 2**net.config.bits), config.stage_drop, random["stage_drop"])
    return codes


def with_fewer_stages(codes: Tensor, share: float, random: Tensor) -> Tensor:
    """A share of the samples keeps its first stages only; their number is as likely 1 to 2 as 2 to 4, and so on.

    u8 or i32 [B,stages,h,w], f32 [B,2] in 0…1 -> i32, -1 where a stage is left out
    """
    stages = codes.shape[1]
    kept = torch.where(random[:, 0] < share, (stages + 1) ** random[:, 1], stages + 1).long()
    there = torch.arange(stages, device=codes.device) < kept[:, None]
    return torch.where(there[..., None, None], codes.int(), -1)


def augment_planes(
    net: Net, planes: Tensor, targets: Tensor, config: Augment, random: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Changes of tone, mixing and erasing, with what `draw` drew.

    planes f32 [B,P,h,w], targets f32 [B,classes] whose rows sum to one -> the same of the augmented samples
    """
    device, batch = planes.device, len(planes)
    if net.reads_neighbours:  # the stem's filter needs each code beside the neighbours that it was chosen with
        planes = _mirrored(net, _moved(planes, config, random), config, random)
    if config.tone:
        planes = planes + config.tone * tones(random["tone"], planes.shape[2])[:, None]

    if config.mixup or config.cutmix:
        partner = partners(planes, net.parts)
        keep = torch.ones(batch, device=device)
        if config.cutmix:
            area = 1 - symmetric_beta(random["cutmix"].T, config.cutmix)
            if config.mixup:
                area = area * (random["which_mix"] < 0.5)
            taken = rectangle(planes, random["cutmix_centre"].T, area.sqrt())
            planes = torch.where(taken[:, None], partner, planes)
            keep = 1 - taken.float().mean((1, 2))
        if config.mixup:
            weight = symmetric_beta(random["mixup"].T, config.mixup)
            if config.cutmix:
                weight = torch.where(keep < 1, 1.0, weight)
            planes = torch.lerp(partner, planes, weight[:, None, None, None])
            keep = keep * weight
        targets = torch.lerp(partners(targets, net.parts), targets, keep[:, None])
    if config.cutout:
        erased = rectangle(planes, random["cutout"].T, torch.full((batch,), config.cutout, device=device))
        planes = planes.masked_fill(erased[:, None], 0)
    if config.channel_drop:
        planes = planes * (random["channel_drop"] >= config.channel_drop)
    return planes, targets


def tones(random: Tensor, height: int) -> Tensor:
    """What is added to the rows of each sample: a constant, and a slope from the first row to the last, each from -1 to
    1. Of levels of sound, that is louder or softer, brighter or duller: f32 [B,2] in 0…1 -> f32 [B,h,1]"""
    raised, tilted = (2 * random - 1)[:, :, None, None].unbind(1)
    return raised + tilted * torch.linspace(1, -1, height, device=random.device)[:, None] * (height > 1)


def partners(values: Tensor, parts: Sequence[int]) -> Tensor:
    """Each sample's partner to be mixed with, which is of the same part of the batch: [B,…] -> [B,…]"""
    return torch.cat([part.roll(1, 0) for part in values.split(parts or len(values))])  # it came shuffled


def _moved(values: Tensor, config: Augment, random: dict[str, Tensor]) -> Tensor:
    if not (config.shift or config.zoom):
        return values
    shift = (random["shift"].T * (2 * config.shift + 1)).long() - config.shift
    return moved(values, shift, (1 + config.zoom) ** (2 * random["zoom"].T - 1))


def moved(codes: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Each sample shifted by whole cells and scaled about its centre; gaps are filled by mirroring at the border.

    [B,C,h,w], i64 [2,B] down and right, f32 [2,B] of height and width -> [B,C,h,w]
    """
    batch, channels, height, width = codes.shape

    def origins(size: int, cells: Tensor, factor: Tensor) -> Tensor:
        centre = (size - 1) / 2
        straight = (torch.arange(size, device=codes.device) - centre) / factor[:, None] + centre
        return reflected(straight.round().long() - cells[:, None], size)

    rows, columns = origins(height, shift[0], scale[0]), origins(width, shift[1], scale[1])
    cells = (rows[:, :, None] * width + columns[:, None]).view(batch, 1, -1).expand(-1, channels, -1)
    return codes.flatten(2).gather(2, cells).view(codes.shape)


def reflected(positions: Tensor, size: int) -> Tensor:
    """Positions outside 0…size-1 mirrored at the border cells until they are inside."""
    period = max(2 * size - 2, 1)
    inside = positions.remainder(period)
    return torch.minimum(inside, period - inside)


def _mirrored(net: Net, values: Tensor, config: Augment, random: dict[str, Tensor]) -> Tensor:
    if not config.mirror:
        return values
    return torch.where(random["mirror"] < 0.5, mirrored(net, values, config.mirror_signs), values)


def mirrored(net: Net, values: Tensor, signs: tuple[float, ...] | None) -> Tensor:
    """Flipped left-right, channels of sign -1 negated as latents.

    u8 [B,C,h,w] -> u8, or f32 where signs change; where the stem reads neighbours, f32 planes [B,C,h,w] -> the same
    """
    flipped = values.flip(-1)
    if signs is None or all(sign == 1 for sign in signs):
        return flipped
    if len(signs) != len(net.zeros):
        raise UsageError(f"mirror_signs has {len(signs)} entries for {len(net.zeros)} channels", "give one per channel")
    channels = [
        plane if sign == 1 else 2 * zero - plane.float()
        for plane, sign, zero in zip(flipped.unbind(1), signs, net.zeros, strict=True)
    ]
    return torch.stack([plane.float() for plane in channels], 1)


def rectangle(planes: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """A rectangle a sample, cut at the border: [B,P,h,w], centre f32 [2,B], side f32 [B], 0 to 1 -> bool [B,h,w]"""
    inside = []
    for size, middle in zip(planes.shape[2:], centre, strict=True):
        cells = (torch.arange(size, device=planes.device) + 0.5) / size
        span = (cells - middle[:, None]).abs() < side[:, None] / 2
        inside.append(span if size > 1 else torch.ones_like(span))  # a stretch of time, where the grid is a line
    return inside[0][:, :, None] & inside[1][:, None]


def symmetric_beta(uniforms: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) samples from two uniform ones: f32 [2,B] -> f32 [B]

    Exact for every alpha and free of rejection, so nothing waits: Devroye 1996, Random Variate Generation in One Line.
    """
    first, second = uniforms.clamp(1e-7, 1 - 1e-7)
    spread = (first ** (-1 / alpha) - 1) * torch.cos(2 * math.pi * second) ** 2
    return 0.5 + torch.sign(second - 0.5) * 0.5 / torch.sqrt(1 + 1 / spread)
