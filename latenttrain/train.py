"""`fit`: train a network on the codes of a latent dataset."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentprep.device import enough_memory, one_thread_each, parse_devices, to_host
from latentprep.errors import CheckpointError, UsageError, opt
from latentprep.format import LatentDataset, open_dataset
from latentprep.format.quantizer import Codebook
from latentprep.progress import Progress, ProgressFactory, silent
from latentprep.storage.places import path_of
from latenttrain.augment import Augment, augment_codes, augment_planes, draw
from latenttrain.checkpoint import (
    CURVE,
    State,
    begun_by,
    check_run_folder,
    init_tensors,
    load_init,
    read_config,
    restore,
    run_folder,
    save_epoch,
)
from latenttrain.config import RunConfig, check_init, default_out, plan_net, plan_run
from latenttrain.data import (
    Samples,
    batches_per_epoch,
    check_trainable,
    cut,
    epoch_generator,
    load_trained,
    trained_samples,
)
from latenttrain.evaluation import read_scores, split_counts
from latenttrain.labels import check_labels, labels_file, read_labels
from latenttrain.launch import launch, reopening
from latenttrain.microbatch import Learner, micro_batches
from latenttrain.nets import ARCHITECTURES, Net, NetConfig, build_net, count_flops, count_parameters
from latenttrain.networks import name_network
from latenttrain.optimizers import make_optimizer
from latenttrain.ranks import ALONE, Ranks, joined, this_rank
from latenttrain.recipe import Recipe, make_recipe, preset_settings
from latenttrain.results import FitResult, draw_curve
from latenttrain.runtime import Stopwatch, autocast, compiled, in_bfloat16, reproducible
from latenttrain.stems import CodebookStem
from latenttrain.streaming import shards_to_hold, training_data
from latenttrain.tensorboard import MetricsLog, open_log


def fit(
    dataset: str | Path | LatentDataset,
    *,
    preset: str | None = None,
    width: float | None = None,
    depth: float | None = None,
    arch: str | None = None,
    stem: str | None = None,
    full_grid: int | None = None,
    recipe: str | Mapping[str, Any] = "default",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    device: str = "auto",
    devices: str | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    holdout: float = 0.0,
    latents: str | Path | None = None,
    labels: str | Path | None = None,
    init: str | Path | None = None,
    freeze: str | None = None,
    stream: bool | None = None,
    buffer: int | None = None,
    compile: bool = False,
    tensorboard: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> FitResult:
    """Train a network on the train split of a latent dataset, and evaluate it on the val split after each epoch.

    dataset: a folder, a URL, or what `latentprep.open` returned.
    preset: one of `PRESETS`, which sets full_grid, epochs and batch_size; explicit arguments override it.
    width, depth: factors on the network's channels and blocks, by default 1; `scale_table` lists those of compound
    scaling. arch: a name in `ARCHITECTURES`, by default ``latentnet``, or a network of your own: see
    `latenttrain.networks`. stem: a name in `STEMS`, by default ``affine``. full_grid: 3 x 3 convolutions on the whole
    grid, by default 1.
    recipe: a name in `RECIPES`, or fields of `Recipe` to set, such as ``{"weight_decay": 0.1}``; epochs, batch_size and
    lr (the peak) override it. augment: by default `Augment()`, or none for ``talk``, with mirroring if the codec has
    an exact mirror image, without zoom if the dataset has views, and with changes of tone if it is of sound.
    limit: train on at most this many samples. holdout: evaluate on this share of train in place of val, and train on
    the rest, so that choices are not made on val. latents: a folder written by ``latentprep latents``, to train on
    float latents (view 0) in place of codes. labels: a file that `label` wrote, or the folder that it is in: learn from
    its probabilities in place of classes; the recipe's label smoothing then does nothing.
    init: start from the best weights of another run, on a dataset of the same codec, latent shape and bits. The network
    is that run's, and its stem reads latents as that run did; the head starts fresh where the classes differ. freeze:
    what of these weights stays as it is: ``body``, all but the head, or ``stem``, the stem and the first layer.
    stream: read train from disk in every epoch; by default only if its codes need more than half of the free memory.
    buffer: shards mixed at a time when streaming; more of them come closer to a true permutation.
    compile: generate code for the training step first, from the gather of codes to the loss: `runtime.compiled`.
    tensorboard: also log the metrics for TensorBoard, in the run folder.
    devices: train on several devices of this machine, a process (rank) each: ``all``, CUDA devices such as ``0,1``, or
    processes on the CPU, ``cpu:2``. Ranks that die are restarted, and go on after the last whole epoch. torchrun, which
    also spans machines, may start the ranks in place of this: see docs/train.md.
    out: the run folder, by default `default_out`. resume: continue after the last whole epoch, to the same weights as
    without the break. overwrite: delete an earlier run there.

    The same arguments on the same machine give the same weights, to the last bit, on CPUs with any number of ranks.

    >>> run = latenttrain.fit("shards", width=0.25, epochs=1, out="runs/narrow")
    >>> run.parameters, run.flops, run.epochs
    (20538, 1991296, 1)

    Raises `UsageError` for a value out of range or a loss that became NaN or infinite, `DatasetError` for a dataset
    that cannot be trained on, `CheckpointError` if the run folder holds another run, `SystemFault` for a device that
    is not available or too small.
    """

    def plan(target: torch.device, ranks: Ranks) -> PlannedRun:
        nonlocal dataset
        dataset = open_dataset(dataset)
        check_trainable(dataset, ("train",) if holdout else ("train", "val"))
        samples = trained_samples(dataset, limit, holdout)
        chosen = preset_settings(preset, samples)
        name_network(arch or "")
        start = None if init is None else load_init(init)
        if start is not None:
            check_init(start[1], dataset, path_of(init or ""))
        settings = make_recipe(
            recipe,
            samples,
            epochs=chosen["epochs"] if epochs is None else epochs,
            batch_size=chosen["batch_size"] if batch_size is None else batch_size,
            lr=lr,
            seed=seed,
            compile=compile,
            freeze=freeze,
        )
        floats = None if latents is None else path_of(latents)
        soft = None if labels is None else labels_file(labels)
        grid = chosen["full_grid"] if full_grid is None and start is None else full_grid
        net = plan_net(
            dataset, width=width, depth=depth, arch=arch, stem=stem, full_grid=grid, latents=floats,
            init=start and start[1].net,
        )  # fmt: skip
        check_net(net, settings, start is not None)
        root = path_of(out) if out is not None else default_out(dataset.root, net, seed)
        again = ranks.restarts > 0 and begun_by(root, ranks.job)
        held = shards_to_hold(dataset, target, stream, buffer, bool(holdout or floats or soft))
        if (resume or again) and stream is None and buffer is None:  # as the run began, whatever memory is free today
            with contextlib.suppress(CheckpointError):
                earlier = read_config(root).dataset.get("stream")
                held = earlier if earlier is None or isinstance(earlier, int) else held
        augmented = Augment.none() if augment is None and recipe == "talk" else augment
        config = plan_run(
            dataset, settings, net, augment=augmented, limit=limit, holdout=holdout, latents=floats, stream=held,
            labels=None if soft is None else check_labels(soft, dataset, limit, holdout), init=start and start[2],
        )  # fmt: skip
        if ranks.world > 1:
            check_shares(ranks.world, samples, settings)
        check_run_folder(root, config, resume or again, overwrite and not again)
        if tensorboard:
            open_log(root)  # whether its package is there
        return PlannedRun(config, root, resume or again, tensorboard, soft, None if init is None else path_of(init))

    if devices is not None:
        chosen = parse_devices(devices)
        if device != "auto":
            raise UsageError(f"{opt('device')} and {opt('devices')} cannot be combined", "leave one of them out")
        if this_rank() is not ALONE:
            raise UsageError(f"{opt('devices')} starts ranks, but torchrun has started these", "leave it out")
        planned = plan(chosen[0], Ranks(world=len(chosen)))
        return launch(planned.to_json(), reopening(open_dataset(dataset)), chosen, progress)
    with joined() as ranks:
        planned = ranks.told(lambda: plan(ranks.device(device), ranks))
        return carry_out(planned, dataset, lambda: ranks.device(device), ranks, progress)


def check_net(config: NetConfig, recipe: Recipe, starts: bool) -> None:
    """Raises `UsageError` if the network cannot be trained so. starts: whether from the weights of another run."""
    if recipe.freeze is not None and not starts:
        raise UsageError(
            f"{opt('freeze')} keeps weights as they are, and there are none yet",
            f"give {opt('init')}, a run to start from",
        )
    if config.arch not in ARCHITECTURES or starts:
        with torch.random.fork_rng([]):
            net = build_net(config)
        if starts:
            _ = net.head  # there is one
            net.freeze(recipe.freeze)


def check_shares(world: int, samples: int, recipe: Recipe) -> None:
    """Raises `UsageError` if there are more ranks than micro-batches in the smallest batch of an epoch."""
    *_, smallest = cut(samples, batches_per_epoch(samples, recipe.batch_size))
    pieces = len(micro_batches(smallest, recipe.norm_batch))
    if world > pieces:
        raise UsageError(
            f"{world} ranks need batches of {world} micro-batches, but one of {smallest} samples has only {pieces}: "
            f"norm_batch is {recipe.norm_batch}",
            f"use a larger {opt('batch_size')}, fewer ranks, or from Python a smaller norm_batch in the recipe",
        )


_PATHS = ("root", "labels", "init")


@dataclass(frozen=True)
class PlannedRun:
    """What `fit` was asked for, checked: any process that can open the dataset can carry it out."""

    config: RunConfig
    root: Path
    resume: bool
    tensorboard: bool
    labels: Path | None = None
    init: Path | None = None

    def to_json(self) -> dict[str, Any]:
        paths = {name: path and str(path) for name, path in vars(self).items() if name in _PATHS}
        return {**vars(self), **paths, "config": self.config.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> PlannedRun:
        paths = {name: fields[name] and Path(fields[name]) for name in _PATHS}
        return cls(**{**fields, **paths, "config": RunConfig.from_json(fields["config"])})


def carry_out(
    planned: PlannedRun,
    dataset: str | Path | LatentDataset,
    device: Callable[[], torch.device],
    ranks: Ranks,
    progress: ProgressFactory,
) -> FitResult:
    """This rank's part of a run: load the splits and train. device: which one, or the error why there is none."""
    name_network(planned.config.net.arch)  # who planned it has named it
    used = planned.config.dataset
    limit, holdout, latents, held = (used[name] for name in ("limit", "holdout", "latents", "stream"))

    def load() -> tuple[Samples, Samples]:
        target, opened = device(), open_dataset(dataset)
        with enough_memory(target, f"lower {opt('limit')}, or use {opt('stream', True)}"):
            soft = None if planned.labels is None else read_labels(planned.labels, opened, limit)
            if holdout or latents:
                return load_trained(opened, target, limit, holdout or 0.0, latents and Path(latents), soft)
            return training_data(opened, target, held, limit, soft)

    train, val = ranks.agreed(load)
    log = open_log(planned.root) if planned.tensorboard and ranks.is_main else None
    given = stem_tensors(planned.config.net, dataset)
    return run_fit(planned.config, train, val, planned.root, planned.resume, progress, log, ranks, planned.init, given)


def run_fit(
    config: RunConfig,
    train: Samples,
    val: Samples,
    root: Path,
    resume: bool,
    progress: ProgressFactory,
    log: MetricsLog | None = None,
    ranks: Ranks = ALONE,
    init: Path | None = None,
    given: dict[str, Tensor] | None = None,
) -> FitResult:
    """The run itself, once its folder is checked and its splits are on their device. init: the run to start from.
    given: what the network takes from the dataset, `stem_tensors`."""
    recipe, target = config.recipe, train.device
    resume = resume or ranks.told(lambda: ranks.restarts > 0 and begun_by(root, ranks.job))
    with (
        enough_memory(target, f"lower {opt('batch_size')}, {opt('width')} or {opt('limit')}"),
        run_folder(root, config, resume, ranks.job) if ranks.is_main else contextlib.nullcontext(),
        reproducible(target, recipe.seed),
    ):
        start = None if init is None else ranks.told(lambda: init_tensors(init, config))
        state = start_state(config, target, {**(given or {}), **(start or {})})
        if resume:
            restore(root, state, ranks)
        train_epochs(state, config, root, train, val, progress if ranks.is_main else silent, log, ranks)
    best, last = state.best, state.metrics[-1]
    seconds = statistics.median(epoch["seconds"] for epoch in state.metrics)
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
        samples_per_second=len(train) / seconds,
        ranks=ranks.world,
    )


def stem_tensors(net: NetConfig, dataset: str | Path | LatentDataset) -> dict[str, Tensor]:
    """What a fresh network's stem takes from the dataset, by its name in the network: the vectors of its codebook."""
    if not net.reads_stages:
        return {}
    codebook = open_dataset(dataset).quantizer
    assert isinstance(codebook, Codebook)
    return {"stem.vectors": CodebookStem.table_of(codebook.tables, net.bits)}


def start_state(config: RunConfig, device: torch.device, start: dict[str, Tensor] | None = None) -> State:
    """A fresh network on the device, drawn on the CPU so that the device does not matter, and its optimizer.

    start: weights that it takes over, those of another network, `init_tensors`, and `stem_tensors`.
    """
    net = build_net(config.net)
    if start:
        net.load_state_dict({**net.state_dict(), **start})
    net.freeze(config.recipe.freeze)
    net = net.to(device)
    return State(net, copy.deepcopy(net), make_optimizer(net, config.recipe), [])


def train_epochs(
    state: State,
    config: RunConfig,
    root: Path,
    train: Samples,
    val: Samples,
    progress: ProgressFactory,
    log: MetricsLog | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """The epochs that `state` still lacks, each committed to the run folder as it ends; then the curve.

    Rank 0 alone writes.
    """
    recipe, done = config.recipe, len(state.metrics)
    batches = batches_per_epoch(len(train), recipe.batch_size)
    with (
        progress("train", recipe.epochs * batches, "batches", done * batches) as bar,
        one_thread_each(train.device) as pool,
    ):
        if ranks.restarts:
            bar.note(f"a rank died; going on after epoch {done} (restart {ranks.restarts})")
        learner = make_learner(state, config, train, pool, ranks)
        for epoch in range(done, recipe.epochs):
            watch = Stopwatch(train.device)
            total = train_epoch(state, config, train, epoch, bar, learner)
            watch.stop()
            tensors = state.tensors() if ranks.is_main else {}
            counts = split_counts(state.average, val, pool, ranks)
            # Everything that the host reads of an epoch, in one transfer: the host waits for the device only here.
            mean, counts, *saved = to_host([total, counts, *tensors.values()])
            loss, found = float(mean), read_scores(counts, len(val))
            tensors, seconds = dict(zip(tensors, saved, strict=True)), watch.seconds()
            if not math.isfinite(loss) or not math.isfinite(found["loss"]):
                error = UsageError(
                    f"the loss became NaN or infinite in epoch {epoch + 1} at lr {recipe.lr:g}; "
                    f"earlier epochs are kept in {root}",
                    f"train with a lower {opt('lr')}, and {opt('overwrite', True)} or another folder as {opt('out')}",
                )
                raise ranks.known(error)
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
            if not ranks.is_main:
                continue
            save_epoch(root, state, tensors)
            if log is not None:
                log(state.metrics)
            bar.note(
                f"epoch {epoch + 1}/{recipe.epochs}: loss {loss:.3f}, val loss {found['loss']:.3f}, "
                f"val top-1 {found['top1']:.1%}, {seconds:.1f} s"
            )
    if ranks.is_main:
        draw_curve(state.metrics, root / CURVE)


def make_learner(
    state: State, config: RunConfig, train: Samples, pool: ThreadPoolExecutor | None, ranks: Ranks = ALONE
) -> Learner:
    """What computes the gradients of a run's batches with `batch_loss`, compiled if the recipe says so."""
    bfloat16, function = in_bfloat16(state.net, train.device), batch_loss
    if config.recipe.compile:
        function = compiled(function, train.device, [held for held in vars(train).values() if isinstance(held, Tensor)])

    def loss_of(net: Net, rows: Tensor, labels: Tensor, random: dict[str, Tensor]) -> Tensor:
        return function(net, train, rows, labels, random, config, bfloat16)

    return Learner(state.net, loss_of, config.recipe.norm_batch, pool, ranks)


def train_epoch(
    state: State, config: RunConfig, train: Samples, epoch: int, bar: Progress, learner: Learner | None = None
) -> Tensor:
    """One epoch; returns the mean training loss, f32 [], on the device: the host waits for nothing.

    learner: of `make_learner`, by default one for this epoch.
    """
    if learner is None:
        with one_thread_each(train.device) as pool:
            return train_epoch(state, config, train, epoch, bar, make_learner(state, config, train, pool))
    recipe, net, device = config.recipe, state.net, train.device
    batches = batches_per_epoch(len(train), recipe.batch_size)
    generator = epoch_generator(recipe.seed, epoch, device)
    live, averaged = averaged_tensors(state.net), averaged_tensors(state.average)
    total = torch.zeros((), device=device)
    known = {"val_top-1": f"{state.metrics[-1]['top1']:.1%}"} if state.metrics else {}
    for step, (rows, labels) in enumerate(train.training_rows(recipe.batch_size, generator, epoch), epoch * batches):
        loss = learner.learn(rows, labels, draw(net, len(labels), config.augment, device, generator))
        state.optimizer.set_lr(recipe.lr_at(step, batches))
        state.optimizer.step(learner.pool)  # clears the gradients, too
        decay = min(recipe.ema, (1 + step) / (10 + step))  # low at first, so that the average forgets the start
        torch._foreach_lerp_(averaged, live, 1 - decay)
        total += loss * len(labels)
        bar.advance(1, epoch=f"{epoch + 1}/{recipe.epochs}", **known)
    return total / len(train)


def batch_loss(
    net: Net,
    train: Samples,
    rows: Tensor,
    labels: Tensor,
    random: dict[str, Tensor],
    config: RunConfig,
    bfloat16: bool,
) -> Tensor:
    """The mean loss of some samples: a pure function, so that it can be compiled whole.

    rows: i64 [B], or u8 [B,C,h,w] if they are codes already; labels: i64 [B]; random: from `draw` -> f32 []
    """
    codes = train.codes_of(rows)  # u8 [B,C,h,w]: gathered, and unpacked if they are held packed
    codes = augment_codes(net, codes, config.augment, random)
    planes = net.planes(codes)  # f32 [B,P,h,w]: the stem
    targets = train.targets_of(rows, labels, net.config.classes)  # f32 [B,classes]
    planes, targets = augment_planes(net, planes, targets, config.augment, random)
    with autocast(bfloat16, planes.device):
        logits = net.logits(planes, random.get("dropout"))  # f32 [B,classes]
    smoothing = config.recipe.label_smoothing if train.soft is None else 0.0  # soft labels are smooth already
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def averaged_tensors(net: Net) -> list[Tensor]:
    """Weights and BatchNorm's statistics, to be read and written without gradients."""
    return [t.detach() for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
