"""`fit`: train a network on the codes of a latent dataset."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.device import full_float32, pick_device, to_host
from latentprep.errors import CheckpointError, UsageError, opt
from latentprep.fitting import enough_memory
from latentprep.format import LatentDataset, open_dataset
from latentprep.progress import Progress, ProgressFactory, silent
from latentprep.storage.places import Place, path_of
from latenttrain.augment import Augment, augmented, draw
from latenttrain.checkpoint import CURVE, State, check_run_folder, read_config, restore, run_folder, save_epoch
from latenttrain.config import RunConfig, describe_dataset, versions
from latenttrain.data import Samples, batches_per_epoch, check_trainable, float_statistics, load_trained
from latenttrain.evaluation import counted, read_scores, split_logits
from latenttrain.nets import Net, NetConfig, build_net
from latenttrain.optimizers import make_optimizer
from latenttrain.recipe import Recipe, make_recipe, preset_settings
from latenttrain.runtime import Stopwatch, autocast, compiled, in_bfloat16, reproducible
from latenttrain.scaling import compound, count_flops, count_parameters
from latenttrain.streaming import shards_to_hold, training_data
from latenttrain.tables import draw_curve
from latenttrain.tensorboard import MetricsLog, open_log


@dataclass(frozen=True)
class FitResult:
    """What a run came to. Accuracies are fractions of the val split, of the averaged weights.

    top1, top5: of ``best_epoch``, chosen by val top-1, so a little optimistic; last_top1, last_top5: of the last epoch.
    parameters: that learn. flops: a sample's forward pass, 2 a multiply-add.
    seconds_per_epoch: median over this run's epochs, training alone; samples_per_second: the same as a rate.
    """

    run: str
    curve: str
    device: str
    epochs: int
    best_epoch: int
    top1: float
    top5: float
    last_top1: float
    last_top5: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    samples_per_second: float

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def fit(
    dataset: str | Path | LatentDataset,
    *,
    preset: str | None = None,
    width: float = 1.0,
    depth: float = 1.0,
    full_grid: int | None = None,
    recipe: str = "default",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    label_smoothing: float | None = None,
    warmup: float | None = None,
    ema: float | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    arch: str = "latentnet",
    stem: str = "affine",
    augment: Augment | None = None,
    limit: int | None = None,
    holdout: float = 0.0,
    phi: float = 0.0,
    latents: str | Path | None = None,
    stream: bool | None = None,
    buffer: int | None = None,
    compile: bool = False,
    tensorboard: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> FitResult:
    """Train a network on the train split of a latent dataset, evaluating it on the val split after each epoch.

    dataset: its folder, or what `latentprep.open` returned. preset: one of `PRESETS`: a network, epochs and batch
    size that go together, in place of the default and the recipe's own. width, depth: see `latenttrain.scaling`.
    full_grid: how many 3 x 3 convolutions read the whole grid, 1 by default.
    recipe: one of `RECIPES`; epochs to ema: in place of its own. lr: the peak. augment: None is the recipe's, which is
    none for ``talk`` and else the default of `Augment`, with mirroring where the dataset's codec has an exact mirror,
    and without zoom where there are views.
    limit: train on at most so many samples. holdout: judge by this share of train in place of val, and learn from the
    rest: for choices, so that val stays unseen. phi: compound scaling, factors on top of width and depth; the
    resolution is ``encode``'s. latents: a folder that ``latentprep latents`` made, to learn from float latents (view 0)
    in place of codes.
    stream: read train from disk in every epoch, by default where its codes take more than half of the free memory.
    buffer: shards that are then mixed at a time; the more, the closer the order is to a true permutation.
    compile: generate code for the training step first, gather and unpacking of codes to the loss: `device.compiled`.
    tensorboard: log the metrics for it too, under the run folder.
    out: the run folder, by default `default_out`. resume: go on after the last whole epoch, to the same weights
    as without the break; overwrite: delete an earlier run there. progress: ``latentprep.cli.console.progress_bar``.

    The same arguments on the same machine give the same weights, to the last bit.

    >>> run = latenttrain.fit("shards", width=0.25, epochs=1, out="runs/narrow")
    >>> run.parameters, run.flops, run.epochs
    (20538, 1991296, 1)

    Raises `UsageError` for a value out of range or a loss that is no number, `DatasetError` for a dataset that cannot
    be trained on, `CheckpointError` for a run folder in the way, `SystemFault` for a device absent or too small.
    """
    chosen = preset_settings(preset)
    asked = make_recipe(
        recipe,
        epochs=chosen["epochs"] if epochs is None else epochs,
        batch_size=chosen["batch_size"] if batch_size is None else batch_size,
        lr=lr,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        warmup=warmup,
        ema=ema,
        seed=seed,
        compile=compile,
    )
    if augment is None and recipe == "talk":
        augment = Augment.none()
    target = pick_device(device)
    dataset = open_dataset(dataset)
    check_trainable(dataset, ("train",) if holdout else ("train", "val"))
    factors, floats = compound(phi), None if latents is None else path_of(latents)
    full_grid = chosen["full_grid"] if full_grid is None else full_grid
    config = plan_run(dataset, asked, width * factors.width, depth * factors.depth, arch, stem, augment, full_grid)
    if floats is not None:
        config = dataclasses.replace(config, net=float_net(config.net, dataset, floats))
    for name, value in (("limit", limit), ("holdout", holdout or None), ("latents", floats and str(floats))):
        config.dataset[name] = value
    root = path_of(out) if out is not None else default_out(dataset.root, config)
    in_memory = bool(holdout) or floats is not None
    held = shards_to_hold(dataset, target, stream, buffer, in_memory)
    if resume and stream is None and buffer is None:  # as the run began, whatever memory is free today
        with contextlib.suppress(CheckpointError):
            earlier = read_config(root).dataset.get("stream")
            held = earlier if earlier is None or isinstance(earlier, int) else held
    config.dataset["stream"] = held
    check_run_folder(root, config, resume, overwrite)
    log = open_log(root) if tensorboard else None
    with enough_memory(target, f"lower {opt('limit')}, or use {opt('stream')}"):
        train, val = (
            load_trained(dataset, target, limit, holdout, floats)
            if in_memory
            else training_data(dataset, target, held, limit)
        )
    return run_fit(config, train, val, root, resume, progress, log)


def run_fit(
    config: RunConfig,
    train: Samples,
    val: Samples,
    root: Path,
    resume: bool,
    progress: ProgressFactory,
    log: MetricsLog | None = None,
) -> FitResult:
    """The run itself, once its folder was checked and its splits are on their device."""
    recipe, target = config.recipe, train.device
    with (
        enough_memory(target, f"lower {opt('batch_size')}, {opt('width')} or {opt('limit')}"),
        run_folder(root, config, resume),
        reproducible(target, recipe.seed),
    ):
        state = start_state(config, target)
        if resume:
            restore(root, state)
        train_epochs(state, config, root, train, val, progress, log)
    best, last = state.best, state.metrics[-1]
    seconds = statistics.median(epoch["seconds"] for epoch in state.metrics)
    samples = batches_per_epoch(len(train), recipe.batch_size) * min(recipe.batch_size, len(train))
    return FitResult(
        run=str(root),
        curve=str(root / CURVE),
        device=str(target),
        epochs=recipe.epochs,
        best_epoch=best["epoch"],
        top1=best["top1"],
        top5=best["top5"],
        last_top1=last["top1"],
        last_top5=last["top5"],
        parameters=count_parameters(state.net),
        flops=count_flops(state.net),
        seconds_per_epoch=seconds,
        samples_per_second=samples / seconds,
    )


def plan_run(
    dataset: LatentDataset,
    recipe: Recipe,
    width: float,
    depth: float,
    arch: str,
    stem: str,
    augment: Augment | None,
    full_grid: int = 1,
) -> RunConfig:
    """The run's whole configuration, from what was asked and what the dataset is."""
    manifest = dataset.manifest
    quantizer, statistics = manifest.quantizer, manifest.statistics
    if augment is None:
        augment = Augment(mirror=manifest.flip is not None)
        if manifest.views("train") > 1:  # true crops of many sizes: more zoom than theirs costs accuracy
            augment = dataclasses.replace(augment, zoom=0.0)
    if augment.mirror and augment.mirror_signs is None and manifest.flip is not None:
        augment = dataclasses.replace(augment, mirror_signs=tuple(map(float, manifest.flip)))
    net = NetConfig(
        latent=manifest.latent,
        classes=len(manifest.classes),
        bits=quantizer.bits,
        lo=quantizer.lo,
        step=quantizer.step,
        filter=quantizer.filter,
        arch=arch,
        stem=stem,
        width=width,
        depth=depth,
        full_grid=full_grid,
        mean=statistics.mean if statistics else (),
        std=statistics.std if statistics else (),
    )
    return RunConfig(net, recipe, augment, describe_dataset(dataset), versions())


def float_net(net: NetConfig, dataset: LatentDataset, latents: Path) -> NetConfig:
    """The network for float latents: they need no filter to be the latents, and are scaled by their own statistics.

    Where the dataset's codes were not counted, they are not, either.
    """
    net = dataclasses.replace(net, filter=())
    if not net.std:
        return net
    mean, std = float_statistics(dataset, latents)
    return dataclasses.replace(net, mean=mean, std=std)


def default_out(dataset: Place, config: RunConfig) -> Path:
    """``runs/imagenette-w1-d1-s0``: dataset, width, depth, seed, and the network and stem if not the defaults."""
    net = config.net
    names = [dataset.resolve().name, f"w{net.width:g}", f"d{net.depth:g}", f"s{config.recipe.seed}"]
    names += [name for name, default in ((net.arch, "latentnet"), (net.stem, "affine")) if name != default]
    return Path("runs", "-".join(names))


def start_state(config: RunConfig, device: torch.device) -> State:
    """A fresh network on the device, drawn on the CPU so that the device does not matter, and its optimizer."""
    net = build_net(config.net).to(device)
    return State(net, copy.deepcopy(net), make_optimizer(net, config.recipe), [])


def train_epochs(
    state: State,
    config: RunConfig,
    root: Path,
    train: Samples,
    val: Samples,
    progress: ProgressFactory,
    log: MetricsLog | None = None,
) -> None:
    """The epochs that `state` still lacks, each committed to the run folder as it ends; then the curve."""
    recipe, done = config.recipe, len(state.metrics)
    batches = batches_per_epoch(len(train), recipe.batch_size)
    with progress("train", recipe.epochs * batches, "batches", done * batches) as bar:
        for epoch in range(done, recipe.epochs):
            watch = Stopwatch(train.device)
            total = train_epoch(state, config, train, epoch, bar)
            watch.stop()
            tensors = state.tensors()
            # All that the host reads of an epoch, in one transfer: the only time that it waits for the device.
            numbers = [total, *counted(split_logits(state.average, val), val.labels)]
            host = to_host([*numbers, *tensors.values()])
            loss, found = float(host[0]), read_scores(host[1 : len(numbers)], len(val))
            tensors, seconds = dict(zip(tensors, host[len(numbers) :], strict=True)), watch.seconds()
            if not math.isfinite(loss) or not math.isfinite(found["loss"]):
                raise UsageError(
                    f"the loss of epoch {epoch + 1} is no number at lr {recipe.lr:g}; "
                    f"epochs before it are kept in {root}",
                    f"lower {opt('lr')}, with {opt('overwrite')} or another {opt('out')}",
                )
            state.metrics.append(
                {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "val_loss": found["loss"],
                    "top1": found["top1"],
                    "top5": found["top5"],
                    "lr": recipe.lr_at((epoch + 1) * batches - 1, batches),
                    "seconds": round(seconds, 6),
                }
            )
            save_epoch(root, state, tensors)
            if log is not None:
                log(state.metrics)
            bar.note(
                f"epoch {epoch + 1}/{recipe.epochs}: loss {loss:.3f}, val loss {found['loss']:.3f}, "
                f"val top-1 {found['top1']:.1%}, {seconds:.1f} s"
            )
    draw_curve(state.metrics, root / CURVE)


def train_epoch(state: State, config: RunConfig, train: Samples, epoch: int, bar: Progress) -> Tensor:
    """One epoch; the mean training loss, f32 [], still on the device: nothing here waits for it."""
    recipe, net, device = config.recipe, state.net.train(), train.device
    batches = batches_per_epoch(len(train), recipe.batch_size)
    order, dropout = np.random.SeedSequence([recipe.seed, epoch]).generate_state(2).tolist()
    generator = torch.Generator(device).manual_seed(order)
    torch.manual_seed(dropout)
    live, averaged = averaged_tensors(state.net), averaged_tensors(state.average)
    total = torch.zeros((), device=device)
    known = {"val_top-1": f"{state.metrics[-1]['top1']:.1%}"} if state.metrics else {}
    step = epoch * batches
    bfloat16, loss_of = in_bfloat16(net, device), batch_loss
    if recipe.compile:
        loss_of = compiled(batch_loss, device, [held for held in vars(train).values() if isinstance(held, Tensor)])
    for rows, labels in train.training_rows(recipe.batch_size, generator):
        state.optimizer.set_lr(recipe.lr_at(step, batches))
        random = draw(net, len(labels), config.augment, device, generator)
        with full_float32():  # for the planes: what else is float32 here, the stem's filter decides
            loss = loss_of(net, train, rows, labels, random, config, bfloat16)
        loss.backward()
        state.optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))  # the average forgets the start quickly
        torch._foreach_lerp_(averaged, live, 1 - decay)
        total += loss.detach()
        step += 1
        bar.advance(1, epoch=f"{epoch + 1}/{recipe.epochs}", **known)
    for mine, theirs in zip(state.average.buffers(), state.net.buffers(), strict=True):
        if not mine.is_floating_point():
            mine.copy_(theirs)
    return total / batches


def batch_loss(
    net: Net,
    train: Samples,
    rows: Tensor,
    labels: Tensor,
    random: dict[str, Tensor],
    config: RunConfig,
    bfloat16: bool,
) -> Tensor:
    """From rows of the split to the loss: gather, unpack, augment, dequantize, network. A pure function.

    rows: i64 [B], or u8 [B,C,h,w] where they are codes already; labels: i64 [B]; random: what `draw` drew -> f32 []
    """
    planes, targets = augmented(net, train.codes_of(rows), labels, config.augment, random)
    with autocast(bfloat16, rows.device):
        logits = net.logits(planes)
    return F.cross_entropy(logits.float(), targets, label_smoothing=config.recipe.label_smoothing)


def averaged_tensors(net: Net) -> list[Tensor]:
    """Weights and BatchNorm's statistics, to be read and written without gradients."""
    return [t.detach() for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
