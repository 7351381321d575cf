"""A search of the network's first half with optuna: kernel, stride, width, depth, kind of block, normalized codes.

    python benchmarks/net_search.py shards --trials 30 --epochs 8 --out net_search

Judged by a held-out part of train, never by val. Trials are kept in a journal under --out, so that the same command
goes on where it stopped. The rest of the network is the default's; a candidate above 260,000 parameters is left out.
Needs `pip install optuna`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor, nn

import latentprep
from common import record
from latentprep.cli.console import progress_bar, tune_process
from latentprep.progress import silent
from latenttrain import nets
from latenttrain.config import RunConfig, plan_net, plan_run
from latenttrain.data import load_trained
from latenttrain.evaluation import scores, split_logits
from latenttrain.nets import BatchNorm, NetConfig, bottleneck, convolution, count_flops, count_parameters, dense
from latenttrain.recipe import make_recipe
from latenttrain.train import start_state, train_epoch

PARAMETERS = 260_000
# The default network as a point of the space: the search begins there.
DEFAULT = {
    "normalize": False, "kernel": 3, "first": 32, "again": 0, "read": 1, "block": "dense", "second": 64, "blocks": 2,
}  # fmt: skip
ACT = nn.Hardswish  # the default network's


def candidate(trial: dict):
    """A network's builder from a point of the search space."""

    def build(planes: int, config: NetConfig) -> nn.Sequential:
        layers: list[nn.Module] = [BatchNorm(planes)] if trial["normalize"] else []
        channels = trial["first"]
        layers += [convolution(planes, channels, trial["kernel"], trial["read"]), ACT()]
        for _ in range(trial["again"]):
            layers += [convolution(channels, channels), ACT()]
        for index in range(trial["blocks"]):
            stride = (1 if trial["read"] == 2 else 2) if index == 0 else 1
            layers.append(BLOCKS[trial["block"]](channels, trial["second"], stride, ACT))
            channels = trial["second"]
        for index in range(3):
            layers.append(bottleneck(channels, 128, 1 if index else 2, ACT))
            channels = 128
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, config.classes))

    return build


class Depthwise(nn.Module):
    """A depthwise 5 x 5 and a 1 x 1 that widens fourfold and back (ConvNeXt's order), pooled where the grid shrinks."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            *([nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []),
            *([convolution(inputs, outputs, 1)] if inputs != outputs else []),
        )
        self.branch = nn.Sequential(
            convolution(outputs, outputs, 5, groups=outputs), convolution(outputs, 4 * outputs, 1), act(),
            convolution(4 * outputs, outputs, 1),
        )  # fmt: skip
        self.activation = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.activation(x + self.branch(x))


BLOCKS = {"dense": dense, "bottleneck": bottleneck, "depthwise": Depthwise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path, default=None)
    parser.add_argument("--trials", type=int, default=20, help="in all, earlier ones counted in")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--holdout", type=float, default=0.15)
    parser.add_argument("--out", type=Path, default=Path("net_search"))
    parser.add_argument("--name", default="net_search_optuna", help="of the record")
    asked = parser.parse_args()
    tune_process()
    asked.out.mkdir(parents=True, exist_ok=True)
    shards = asked.shards or asked.out / "shapes"
    if asked.shards is None:
        latentprep.encode("shapes", codec="resample:factor=4", out=shards, progress=progress_bar)
    device, dataset = torch.device("cpu"), latentprep.open(shards)
    learned, judged = load_trained(dataset, device, holdout=asked.holdout)

    def objective(trial: optuna.Trial) -> float:
        point = {
            "normalize": trial.suggest_categorical("normalize", [False, True]),
            "kernel": trial.suggest_categorical("kernel", [1, 3, 5]),
            "first": trial.suggest_categorical("first", [16, 32, 48, 64]),
            "again": trial.suggest_int("again", 0, 2),
            "read": trial.suggest_categorical("read", [1, 2]),
            "block": trial.suggest_categorical("block", list(BLOCKS)),
            "second": trial.suggest_categorical("second", [48, 64, 80]),
            "blocks": trial.suggest_int("blocks", 1, 3),
        }
        nets.ARCHITECTURES["latentnet"] = candidate(point)
        recipe = make_recipe(epochs=asked.epochs)
        config: RunConfig = plan_run(dataset, recipe, plan_net(dataset))
        torch.manual_seed(0)
        state = start_state(config, device)
        parameters = count_parameters(state.net)
        if parameters > PARAMETERS:
            raise optuna.TrialPruned(f"{parameters:,} parameters")
        spent, loss = 0.0, 0.0
        for epoch in range(asked.epochs):
            start = time.process_time()
            with silent("", 0, "") as bar:
                train_epoch(state, config, learned, epoch, bar)
            spent += time.process_time() - start
            found = scores(split_logits(state.average, judged), judged.labels)
            loss = found["loss"]
            trial.report(loss, epoch)
            trial.set_user_attr("top1", found["top1"])
            if trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("parameters", parameters)
        trial.set_user_attr("flops", count_flops(state.net))
        trial.set_user_attr("cpu_seconds_per_epoch", spent / asked.epochs)
        return loss

    study = optuna.create_study(
        study_name="first half", storage=JournalStorage(JournalFileBackend(str(asked.out / "journal.log"))),
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=8, multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2), load_if_exists=True,
    )  # fmt: skip
    if not study.trials:
        study.enqueue_trial(DEFAULT)
    done = sum(trial.state.is_finished() for trial in study.trials)
    study.optimize(objective, n_trials=max(0, asked.trials - done))
    rows = [
        {"state": t.state.name, "loss": t.value, **t.user_attrs, **t.params}
        for t in study.trials
        if t.state.is_finished()
    ]
    rows.sort(key=lambda row: (row["loss"] is None, row["loss"]))
    facts = {"dataset": shards.name, "epochs": asked.epochs, "holdout": asked.holdout}
    record(asked.name, facts | {"trials": rows})


if __name__ == "__main__":
    main()
