"""`train_codec`: a codec of one's own, trained on a source's images; and what is known of it afterwards."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latentprep import __version__
from latentprep.codecs.base import MAX_SIZE, check_multiple
from latentprep.codecs.learned import CONFIG, FACTORS, MAX_CHANNELS, WEIGHTS, Architecture, Networks, read_config, save
from latentprep.device import enough_memory, full_float32, on_device, one_thread_each, pick_device
from latentprep.errors import (
    CodecError,
    Interrupted,
    UsageError,
    check_number,
    check_whole,
    opt,
    system_fault,
)
from latentprep.format.manifest import train_split
from latentprep.format.quantizer import MOST_BITS
from latentprep.learning.crops import Crops, crop_side, load_images
from latentprep.learning.start import started
from latentprep.learning.trainer import Trainer, load_state
from latentprep.pictures.rd import Point, rd
from latentprep.pictures.samples import shown_split
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.kinds import SOUND
from latentprep.sources.source import Source, open_source
from latentprep.storage.atomic import locked, write_atomic
from latentprep.storage.places import local

MINUTES = 10.0
STATE, REPORT = "training.safetensors", "report"
HELD_OUT = 64  # images that the report is about
_BATCH = 16  # crops
_FIRST = 8  # batches that give the transform that training starts from
_CLOCKED = 5  # steps that tell how many fit in the minutes, after two that warm up
_SAVED = 30.0  # seconds between two states
_SCALES = (0.5, 1.0, 2.0)  # of the bits asked for, in the report
_LEARNED, _BASE = "learned", "dct"


@dataclass(frozen=True)
class TrainCodecResult:
    """A trained codec. codec: what ``--codec`` takes. bytes, psnr: means of held-out images at the bits that it was
    trained for; dct_psnr: that of ``dct`` at as many bytes on disk. None if unknown. seconds: of training."""

    out: str
    codec: str
    factor: int
    channels: int
    bits: float
    images: int
    steps: int
    bytes: float | None
    psnr: float | None
    dct_psnr: float | None
    seconds: float

    def to_json(self) -> dict:
        return asdict(self)


def train_codec(
    source: str | Path | Source,
    *,
    out: str | Path,
    channels: int = 12,
    factor: int = 8,
    bits: float = 1.0,
    minutes: float | None = None,
    steps: int | None = None,
    size: int = 224,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> TrainCodecResult:
    """Train a small codec on the train split of `source` and write it to the folder `out`. Run again, it resumes.

    channels, factor: of its latents, [channels, size/factor, size/factor]; factor is 4, 8 or 16. bits: per latent value
    after entropy coding, which training meets by weighing rate against squared error. minutes: how long to train, 10 by
    default: a few steps are clocked and tell how many fit. steps: that number itself, so that two machines do the same.
    size: pixels per side of the images that will be encoded; crops of them are trained on. limit: at most that many
    samples per split. device: ``auto``, ``cpu``, ``cuda``, …; in bfloat16 where it computes in that fast.

    OUT gets codec.json, codec.safetensors and report/, which compares the codec with ``dct``, JPEG, WebP and AVIF on
    held-out images as `rd` does. The codec is then ``learned:weights=OUT``.

    Raises `UsageError`, `SourceError`, `CodecError` if OUT holds another codec, `SystemFault` or `Interrupted`.
    """
    _check(channels, factor, bits, minutes, steps, size, seed)
    opened = open_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column, seed=seed, out=out
    )  # fmt: skip
    if opened.media == SOUND:
        raise UsageError(f"train-codec learns images, and {opened.spec} holds sound", "give a source of images")
    opened = opened if limit is None else opened.take(limit)
    root, chosen = local(out, opt("out")), pick_device(device)
    asked = {
        "source": {"spec": opened.spec, "sha256": opened.fingerprint()}, "channels": channels, "factor": factor,
        "bits": bits, "minutes": (minutes or MINUTES) if steps is None else None, "steps": steps, "size": size,
        "seed": seed,
    }  # fmt: skip
    began = time.monotonic()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root), enough_memory(chosen, f"use {opt('device', 'cpu')}"):
            if overwrite:
                for name in (CONFIG, WEIGHTS, STATE):
                    (root / name).unlink(missing_ok=True)
            facts = _finished(root, asked)
            if facts is None:
                facts = _trained(root, opened, asked, chosen, progress)
            seconds = time.monotonic() - began
            measured = _report(root, opened, asked, str(chosen), progress)
    except OSError as error:
        raise system_fault(error) from error
    return TrainCodecResult(
        str(root), f"{_LEARNED}:weights={root}", factor, channels, bits, facts["images"], facts["steps"], *measured,
        seconds,
    )  # fmt: skip


def _check(
    channels: int, factor: int, bits: float, minutes: float | None, steps: int | None, size: int, seed: int
) -> None:
    if factor not in FACTORS:
        raise UsageError(f"{opt('factor')} must be 4, 8 or 16, got {factor!r:.60}")
    check_whole("channels", channels, 1, min(MAX_CHANNELS, 3 * factor**2))
    check_number("bits", bits, 0, MOST_BITS, above=True)
    if minutes is not None and steps is not None:
        raise UsageError(f"{opt('minutes')} and {opt('steps')} cannot be combined", "give one of them")
    if minutes is not None:
        check_number("minutes", minutes, 0, 1e6, above=True)
    check_whole("steps", steps, 1, 1 << 31, optional=True)
    check_whole("size", size, 1, MAX_SIZE)
    check_multiple(_LEARNED, factor, size, size)
    check_whole("seed", seed, 0, (1 << 63) - 1)


def _finished(root: Path, asked: dict) -> dict | None:
    """The facts of the codec that is complete in the folder; None if there is none. `CodecError` if it is another."""
    if not (root / CONFIG).is_file():
        return None
    facts = read_config(root)
    _check_same(root, facts.get("asked"), asked)
    return facts


def _check_same(root: Path, there: Any, asked: dict) -> None:
    for name, value in asked.items():
        have = there.get(name) if isinstance(there, dict) else None
        if have != value:
            what = (
                "of another source"
                if name == "source"
                else f"with {f'no {opt(name)}' if have is None else opt(name, have)}"
            )
            raise CodecError(
                f"{root} holds a codec {what}",
                f"choose another folder as {opt('out')}, or use {opt('overwrite', True)}",
            )


def _trained(root: Path, source: Source, asked: dict, device: torch.device, progress: ProgressFactory) -> dict:
    """Train, or go on where a run stopped, and write the codec; returns its codec.json."""
    split = train_split(source.splits)
    images = load_images(source, split, asked["size"], progress)
    crops = Crops(images, crop_side(asked["size"], asked["factor"]), _BATCH)
    state = root / STATE
    with _reproducible(device), one_thread_each(device) as pool:
        if state.is_file():
            trainer, steps = _resumed(state, crops, asked, device)
        else:
            trainer = _begun(crops, asked, device)
            steps = asked["steps"] or _steps_in(trainer, 60 * asked["minutes"], pool)
        saved = time.monotonic()
        try:
            with progress("training", steps, "steps", trainer.step) as bar:
                while trainer.step < steps:
                    squared, spent = trainer.advance(steps, pool)
                    if not math.isfinite(squared):
                        raise CodecError(
                            f"training diverged at step {trainer.step}",
                            f"use another {opt('seed')} and {opt('overwrite', True)}",
                        )
                    bar.advance(1, psnr=f"{10 * math.log10(255**2 / max(squared, 1e-9)):.1f} dB", bits=f"{spent:.2f}")
                    if time.monotonic() - saved > _SAVED:
                        trainer.save(state, asked, steps)
                        saved = time.monotonic()
        except KeyboardInterrupt as error:  # perhaps in the middle of a step, so what was saved before counts
            raise Interrupted(
                f"interrupted after {trainer.step} of {steps} steps",
                "run the same command again to go on from the last state, of at most half a minute before",
            ) from error
    facts = {
        "written_by": f"latentprep {__version__}",
        "origin": f"trained on {len(images)} images of {source.spec}, split {split}, for {steps} steps",
        "licence": "as the images allow",
        "bits": asked["bits"],
        "images": len(images),
        "steps": steps,
        "asked": asked,
    }
    for name, data in save(trainer.networks, trainer.of, facts).items():  # codec.json, which makes it whole, last
        write_atomic(root / name, data)
    state.unlink(missing_ok=True)
    return facts


def _begun(crops: Crops, asked: dict, device: torch.device) -> Trainer:
    first = np.concatenate([crops.draw(asked["seed"], (1 << 40) + k)[0] for k in range(_FIRST)])
    networks, of, scales = started(first, asked["channels"], asked["factor"], asked["bits"], asked["seed"])
    places, log_scales = nn.Parameter(torch.zeros_like(scales)), nn.Parameter(scales.log())
    return Trainer(of, networks, places, log_scales, crops, asked["bits"], asked["seed"], device)


def _resumed(state: Path, crops: Crops, asked: dict, device: torch.device) -> tuple[Trainer, int]:
    """The run as it was saved, and how many steps it has in all."""
    tensors, notes = load_state(state)
    _check_same(state.parent, notes.get("asked"), asked)
    try:
        of = Architecture.from_json(notes["architecture"])
        places, log_scales = (nn.Parameter(torch.zeros(of.channels)) for _ in range(2))
        trainer = Trainer(of, Networks(of), places, log_scales, crops, asked["bits"], asked["seed"], device)
        trainer.restore(tensors, notes)
        return trainer, int(notes["steps"])
    except (CodecError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CodecError(f"{state} is damaged: {error}".splitlines()[0], "delete it to start over") from error


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """The same state gives the same step, bit for bit, on the same machine."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    with full_float32(), on_device(device):
        try:
            cudnn.deterministic = True
            yield
        finally:
            cudnn.deterministic = before


def _steps_in(trainer: Trainer, seconds: float, pool: Any) -> int:
    """How many steps fit in so many seconds, by a few steps of a copy."""
    copied = copy.deepcopy(trainer, {id(trainer.crops): trainer.crops})
    for _ in range(2):
        copied.advance(1000, pool)
    start = time.monotonic()
    for _ in range(_CLOCKED):
        copied.advance(1000, pool)
    return max(1, round(seconds * _CLOCKED / (time.monotonic() - start)))


def _report(
    root: Path, source: Source, asked: dict, device: str, progress: ProgressFactory
) -> tuple[float | None, float | None, float | None]:
    """Draw the report; returns bytes per image and PSNR at the bits asked for, and ``dct``'s PSNR at those bytes."""
    values = asked["channels"] * (asked["size"] // asked["factor"]) ** 2
    base = 16 * (asked["size"] // 8) ** 2
    own = [asked["bits"] * scale for scale in _SCALES]
    rates = sorted({round(min(8.0, one), 4) for rate in own for one in (rate, rate * values / base)})
    found = rd(
        source, codecs=[_BASE, f"{_LEARNED}:weights={root}"], bits=[4], rates=rates, qualities=[10, 30, 60],
        images=min(HELD_OUT, source.size(shown_split(source.splits))), size=asked["size"], seed=asked["seed"],
        device=device, out=root / REPORT, progress=progress,
    )  # fmt: skip
    mine = [p for p in found.points if p.name.startswith(_LEARNED) and p.setting == round(asked["bits"], 4)]
    if not mine:
        return None, None, None
    curve = [p for p in found.points if p.name.startswith(_BASE) and p.setting in rates]
    return mine[0].bytes, mine[0].psnr, at_bytes(curve, mine[0].bytes)


def at_bytes(points: list[Point], size: float) -> float | None:
    """PSNR of a codec at so many bytes, between its points, linear in the bytes' logarithm; None outside them."""
    line = sorted((p.bytes, p.psnr) for p in points if p.psnr is not None)
    if len(line) < 2 or not line[0][0] <= size <= line[-1][0]:
        return None
    xs, ys = zip(*line, strict=True)
    return float(np.interp(math.log(size), np.log(xs), ys))
