"""The run folder: a run's configuration, its weights, and everything needed to resume it.

    config.json        `RunConfig`: network, recipe, augmentation, dataset, versions
    best.safetensors   the averaged weights of the epoch with the best val top-1
    last.safetensors   the last whole epoch: weights, averaged weights, the optimizer's moments, the metrics
    metrics.jsonl      the metrics, one line per epoch
    curve.png          a plot of the metrics

JSON and safetensors only, so opening a run never runs code. Each file is written whole or not at all, and
``last.safetensors`` commits an epoch: ``best.safetensors`` is written just before it, and ``metrics.jsonl``, which
repeats what it holds, just after.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from latentprep.device import to_host
from latentprep.errors import CheckpointError, LatentError, UsageError, check_word, opt
from latentprep.format.fields import differences, dump_json
from latentprep.storage.atomic import write_atomic
from latentprep.storage.locks import LOCK, Held, held
from latentprep.storage.places import path_of
from latenttrain.config import FORMAT, VERSION, RunConfig, short
from latenttrain.nets import Net, build_net
from latenttrain.optimizers import Adam
from latenttrain.ranks import ALONE, Ranks

CONFIG, METRICS, BEST, LAST, CURVE = "config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "curve.png"
RUN_FILES = (CONFIG, METRICS, BEST, LAST, CURVE)
_TEMPORARIES = tuple(name + ".tmp" for name in RUN_FILES)  # left over from a killed `write_atomic`
_JOB = ".job"  # which job of several ranks works on the run, until it ends
_LEFTOVERS = (*_TEMPORARIES, LOCK, _JOB)
_NOTES = "latenttrain"  # the one metadata key we write: safetensors does not keep the order of several


@dataclass
class State:
    """A run after some whole epochs. Random numbers follow from (seed, epoch), so no generator is part of it.

    net: the weights that learn; average: their moving average, which is evaluated and kept.
    metrics: one entry per epoch, as in ``metrics.jsonl``.
    """

    net: Net
    average: Net
    optimizer: Adam
    metrics: list[dict]

    @property
    def best(self) -> dict:
        """The metrics of the epoch with the highest val top-1, the first of equals."""
        return max(self.metrics, key=lambda epoch: epoch["top1"])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name, on the state's device."""
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        return tensors


def check_run_folder(root: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Checks the folder before anything is written.

    Raises `CheckpointError` if it holds a run that may not be continued or replaced, or anything else; `UsageError` for
    both `resume` and `overwrite`.
    """
    if resume and overwrite:
        raise UsageError(
            f"{opt('resume', True)} and {opt('overwrite', True)} cannot be combined",
            f"{opt('resume', True)} keeps the run, {opt('overwrite', True)} deletes it",
        )
    if not root.exists() or (root.is_dir() and not any(path.name not in _LEFTOVERS for path in root.iterdir())):
        return
    if not _is_run(root):
        raise CheckpointError(f"{root} exists and is not a run folder", f"choose another folder as {opt('out')}")
    if overwrite:
        return
    if not resume:
        raise CheckpointError(
            f"{root} already holds a run",
            f"continue it with {opt('resume', True)}, replace it with {opt('overwrite', True)}, or choose another "
            f"folder as {opt('out')}",
        )
    earlier, now = (document.to_json() for document in (read_config(root), config))
    found = differences(earlier, now)
    # The network's statistics follow from what it started from, and the recipe from the dataset.
    for name, there, here in sorted(found, key=lambda one: (one[0] != "init", one[0].startswith("recipe."))):
        if name != "dataset.path" and not name.startswith("versions."):
            name = name.removeprefix("recipe.").removeprefix("net.")
            raise CheckpointError(
                f"{root} has different settings: {name} is {short(there)}, but {short(here)} was requested",
                f"resume with the same settings, or choose another folder as {opt('out')}",
            )


def _is_run(root: Path) -> bool:
    """Whether `fit` made the folder: other programs write a config.json, too."""
    try:
        return json.loads((root / CONFIG).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def begun_by(root: Path, job: str) -> bool:
    """Whether this job (`Ranks.job`) has begun to write the run, so that its ranks go on with it when restarted."""
    try:
        return (root / _JOB).read_text() == job
    except OSError:
        return False


@contextlib.contextmanager
def run_folder(root: Path, config: RunConfig, resume: bool, job: str = "") -> Iterator[None]:
    """Create and lock the run folder for one `fit`. Unless it resumes, an earlier run's files are deleted.

    job: see `begun_by`.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(root))
        except Held as error:
            hint = f"choose another folder as {opt('out')}, or {error}"
            raise CheckpointError(f"{root} is being written by another latenttrain fit", hint) from error
        for name in _TEMPORARIES:
            (root / name).unlink(missing_ok=True)
        if not (resume and (root / CONFIG).is_file()):
            for name in reversed(RUN_FILES):
                (root / name).unlink(missing_ok=True)
            write_atomic(root / CONFIG, dump_json(config.to_json()))
        if job:
            write_atomic(root / _JOB, job.encode())
        yield
        (root / _JOB).unlink(missing_ok=True)


def read_config(root: Path) -> RunConfig:
    """The run's configuration. Raises `CheckpointError` if the folder holds none that this version can read."""
    path = root / CONFIG
    if not path.is_file():
        what = "not a run folder (it has no config.json)" if root.exists() else "no such folder"
        raise CheckpointError(f"{root}: {what}", "name a folder that latenttrain fit made")
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT:
            raise ValueError(f"format is {short(document['format'])}")
        if document["version"] > VERSION:
            raise CheckpointError(
                f"{path} has version {document['version']}; this latenttrain reads up to {VERSION}",
                "upgrade with pip install --upgrade latentprep",
            )
        return RunConfig.from_json(document)
    except CheckpointError:
        raise
    except (LatentError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged: {reason}", "restore it, or train again") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Tensors of any layout on one device, and JSON notes, to one file. Equal contents give equal bytes."""
    plain = dict(zip(tensors, to_host(list(tensors.values())), strict=True))
    text = json.dumps(notes, allow_nan=False)
    write_atomic(path, safetensors.torch.save(plain, {_NOTES: text}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Inverse of `save_tensors`, on the CPU. Raises `CheckpointError` if the file is absent, damaged or not ours."""
    if not path.is_file():
        other = path.with_name(LAST if path.name == BEST else BEST)
        way_out = (
            f"use {opt('checkpoint', other.stem)}" if other.is_file() else "no epoch of the run has ended; train again"
        )
        raise CheckpointError(f"{path} is missing", way_out)
    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})[_NOTES])
            if not isinstance(notes, dict):
                raise ValueError("its notes are not a JSON object")
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written by latenttrain ({error})",
            "restore it, or train again; pickle files are never read",
        ) from error


def load_net(run: str | Path, checkpoint: str = "best") -> tuple[Net, RunConfig, dict]:
    """A run's network in evaluation mode on the CPU, its configuration, and the metrics of the epoch it is from.

    checkpoint: ``best`` (highest val top-1) or ``last``. Raises `CheckpointError` for a damaged run.
    """
    root = path_of(run)
    check_word("checkpoint", checkpoint, ("best", "last"))
    config = read_config(root)
    path = root / (BEST if checkpoint == "best" else LAST)
    tensors, notes = load_tensors(path)
    try:
        if checkpoint == "last":
            tensors, notes = part(tensors, "average."), notes["metrics"][-1]
        int(notes["epoch"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not say which epoch it is from", "restore it, or train again") from error
    net = config_net(config, root).eval()
    fill(net, tensors, path)
    return net, config, notes


def config_net(config: RunConfig, root: Path) -> Net:
    """A run's network with fresh weights. Raises `CheckpointError` if it is one of others' that is not there."""
    try:
        with torch.random.fork_rng([]):
            return build_net(config.net)
    except UsageError as error:
        message, hint = error.texts
        raise CheckpointError(f"{root}: {message}", hint) from error


def load_init(run: str | Path) -> tuple[Net, RunConfig, str]:
    """The network of a run's best epoch, its configuration, and the SHA-256 of the file. Raises as `load_net` does."""
    net, config, _ = load_net(run)
    return net, config, hashlib.sha256((path_of(run) / BEST).read_bytes()).hexdigest()


def init_tensors(run: str | Path, config: RunConfig) -> dict[str, Tensor]:
    """What a run that starts from another one takes over: its weights, and the head only if the classes are the same.

    config: of the new run. Raises `CheckpointError` if it is not the checkpoint that the run was planned with.
    """
    net, earlier, sha256 = load_init(run)
    if sha256 != config.init:
        raise CheckpointError(f"{run} has changed since the run was planned", "start again, from a run that has ended")
    tensors = net.state_dict()
    if earlier.classes != config.classes:
        head = net.head[0] + "."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}
    return tensors


def fill(net: Net, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into the network. Raises `CheckpointError` if a name or shape is not the network's."""
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} belongs to another network: {reason}", "restore it, or train again") from error


def save_epoch(root: Path, state: State, tensors: dict[str, Tensor]) -> None:
    """Commit the epoch that just ended. tensors: the state's, on the host."""
    if state.best is state.metrics[-1]:
        notes = {name: value for name, value in state.best.items() if name != "seconds"}  # same run, same bytes
        save_tensors(root / BEST, part(tensors, "average."), notes)
    save_tensors(root / LAST, tensors, {"metrics": state.metrics})
    write_metrics(root, state.metrics)


def write_metrics(root: Path, metrics: list[dict]) -> None:
    write_atomic(root / METRICS, "".join(json.dumps(epoch) + "\n" for epoch in metrics).encode())


def restore(root: Path, state: State, ranks: Ranks = ALONE) -> None:
    """Make `state` what `save_epoch` last saved; without a committed epoch, leave it as it is. Rank 0 reads for all.

    Raises `CheckpointError` if the file is damaged or of another network.
    """
    path = root / LAST
    saved = ranks.told(lambda: load_tensors(path) if path.is_file() else None)
    if saved is None:
        return
    tensors, notes = saved
    fill(state.net, part(tensors, "net."), path)
    fill(state.average, part(tensors, "average."), path)
    try:
        restore_optimizer(state.optimizer, part(tensors, "optimizer."))
        state.metrics[:] = notes["metrics"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} belongs to another run: {error}", f"train again with {opt('overwrite', True)}"
        ) from error
    if ranks.is_main:
        write_metrics(root, state.metrics)


def restore_optimizer(optimizer: Adam, tensors: dict[str, Tensor]) -> None:
    """Restore the optimizer's state. Raises `KeyError` or `RuntimeError` if the tensors are not of this optimizer."""
    entries: dict[int, dict[str, Tensor]] = {}
    owned = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for index, (group, parameter) in enumerate(owned):
        entry = entries[index] = {"step": tensors[f"{index}.step"].reshape(())}
        for name in ("velocity",) if group["momentum"] else ("exp_avg", "exp_avg_sq"):
            # in the memory layout of the parameter, which fused AdamW takes for granted
            entry[name] = torch.empty_like(parameter).copy_(tensors[f"{index}.{name}"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
