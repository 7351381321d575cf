"""A run's configuration: made from a dataset and a recipe, kept as one JSON document, compared with other datasets."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from latentprep.errors import CheckpointError, UsageError, opt
from latentprep.format import LatentDataset, Quantizer
from latentprep.format.fields import Fields, differences
from latentprep.format.quantizer import Codebook, read_quantizer
from latentprep.storage.places import Place
from latenttrain import __version__
from latenttrain.augment import STAGE_DROP, TONE, Augment
from latenttrain.data import float_statistics
from latenttrain.nets import NetConfig
from latenttrain.recipe import Recipe
from latenttrain.stems import TOKEN_STEM, AffineStem

FORMAT, VERSION = "latenttrain run", 1


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run, and everything needed to use its network.

    dataset: as `plan_run` makes it. versions: of latenttrain, torch and Python. They and the dataset's path may
    change before a run is resumed. Both are read-only. init: SHA-256 of the checkpoint that the run started from.
    """

    net: NetConfig
    recipe: Recipe
    augment: Augment
    dataset: Mapping[str, Any]
    versions: Mapping[str, str]
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("dataset", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def classes(self) -> list[str]:
        return self.dataset["classes"]

    @property
    def quantizer(self) -> Quantizer:
        fields = self.dataset["quantizer"]
        if "kind" in fields:
            return read_quantizer(Fields(fields, "the run's quantizer"))
        names = ("lo", "step", "filter", "channel_bits")
        return Quantizer(fields["bits"], *(tuple(fields.get(name, ())) for name in names))

    def to_json(self) -> dict:
        return {
            "format": FORMAT,
            "version": VERSION,
            "net": self.net.to_json(),
            "recipe": self.recipe.to_json(),
            "augment": self.augment.to_json(),
            "dataset": dict(self.dataset),
            **({} if self.init is None else {"init": self.init}),
            "versions": dict(self.versions),
        }

    def __reduce__(self) -> tuple[Any, ...]:  # read-only mappings cannot be pickled
        return type(self).from_json, (self.to_json(),)

    @classmethod
    def from_json(cls, document: dict) -> RunConfig:
        """Inverse of `to_json`. Raises `LatentError`, `KeyError`, `TypeError` or `ValueError` for anything else."""
        dataset = document["dataset"]
        for name, kind in (("codec", dict), ("quantizer", dict), ("transform", dict), ("classes", list)):
            if not isinstance(dataset[name], kind):
                raise TypeError(f"dataset.{name} is not a JSON {'object' if kind is dict else 'array'}")
        config = cls(
            NetConfig.from_json({"activation": "relu"} | document["net"]),  # older runs do not record it
            Recipe.from_json(document["recipe"]),
            Augment.from_json(document["augment"]),
            dataset,
            document["versions"],
            document.get("init"),
        )
        if len(config.classes) != config.net.classes or config.quantizer.channel_bits != config.net.channel_bits:
            raise ValueError("the network and the dataset do not fit together")
        return config


def plan_net(
    dataset: LatentDataset,
    *,
    width: float | None = None,
    depth: float | None = None,
    arch: str | None = None,
    stem: str | None = None,
    full_grid: int | None = None,
    latents: Path | None = None,
    init: NetConfig | None = None,
) -> NetConfig:
    """A network for the dataset's codes, or for its float latents: they have their own statistics and no filter.

    init: the network whose weights it is to start with. Settings that are not given are its own, and the stem makes of
    a latent the planes that its stem makes. Raises `UsageError` for other settings, or a stem that cannot.
    """
    manifest = dataset.manifest
    quantizer, statistics = manifest.quantizer, manifest.statistics
    mean, std = (statistics.mean, statistics.std) if statistics else ((), ())
    if latents is not None and std:  # of a dataset without statistics, float latents are used without, too
        mean, std = float_statistics(dataset, latents)
    given = {"width": width, "depth": depth, "arch": arch, "stem": stem, "full_grid": full_grid}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if init is not None:
        for name, value in settings.items():
            if value != getattr(init, name):
                raise UsageError(
                    f"{opt(name)} is {value!r}, but the run to start from has {getattr(init, name)!r}",
                    f"leave {opt(name)} out",
                )
        settings = {name: getattr(init, name) for name in (*given, "activation")}
    codebook = quantizer if isinstance(quantizer, Codebook) else None
    if codebook is not None:
        settings.setdefault("stem", TOKEN_STEM)
    net = NetConfig(
        latent=manifest.latent,
        classes=len(manifest.classes),
        bits=quantizer.bits,
        lo=quantizer.lo,
        step=quantizer.step,
        filter=quantizer.filter if latents is None else (),
        mean=mean,
        std=std,
        channel_bits=quantizer.channel_bits,
        dim=0 if codebook is None else codebook.tables[0].shape[1],
        **settings,
    )
    return net if init is None else _reading_alike(net, init)


def _reading_alike(net: NetConfig, init: NetConfig) -> NetConfig:
    """`net` with the statistics with which its stem makes of a latent what that of `init` makes of it."""
    if (net.lo, net.step, net.filter) == (init.lo, init.step, init.filter):
        return dataclasses.replace(net, mean=init.mean, std=init.std)
    if init.stem != "affine":
        raise UsageError(
            f"the run to start from reads codes by the stem {init.stem!r}, and here the same codes are other latents",
            f"encode with {opt('quantizer', 'DIR')}, the dataset of that run, or start from one with the affine stem",
        )
    stem = AffineStem(init.latent[0], init.channel_bits, init.mean, init.std)
    old = zip(init.lo, init.step, stem.centre.flatten().tolist(), stem.scale.flatten().tolist(), strict=True)
    latents = [(lo + (centre + 0.5) * step, step / scale) for lo, step, centre, scale in old]  # mean and deviation
    new = list(zip(latents, net.lo, net.step, strict=True))
    return dataclasses.replace(
        net,
        mean=tuple((mean - lo) / step - 0.5 for (mean, _), lo, step in new),
        std=tuple(std / step for (_, std), _, step in new),
    )


def plan_run(
    dataset: LatentDataset,
    recipe: Recipe,
    net: NetConfig,
    *,
    augment: Augment | None = None,
    limit: int | None = None,
    holdout: float = 0.0,
    latents: Path | None = None,
    stream: int | None = None,
    labels: str | None = None,
    init: str | None = None,
) -> RunConfig:
    """The whole configuration of a run. augment: by default `Augment()`, as the dataset's mirror and views allow, and
    with changes of tone if codes are levels of sound.

    limit, holdout, latents, stream, labels: see `describe_dataset`. init: see `RunConfig`.
    """
    manifest = dataset.manifest
    if augment is None:
        legible = net.stem == "affine" or not net.filter  # to other stems mirrored joint codes say something else
        augment = Augment(mirror=manifest.flip is not None and legible)
        if manifest.views("train") > 1:  # views are true crops of many sizes: more zoom costs accuracy
            augment = dataclasses.replace(augment, zoom=0.0)
        if net.reads_stages:
            augment = dataclasses.replace(augment, stage_drop=STAGE_DROP)
        elif manifest.of_sound and net.stem == "affine":
            augment = dataclasses.replace(augment, tone=TONE)
    if augment.stage_drop and not net.reads_stages:
        raise UsageError(
            f"stage_drop leaves out stages of tokens, which the stem {net.stem!r} does not read", "leave it at 0"
        )
    if augment.mirror and augment.mirror_signs is None and manifest.flip is not None:
        augment = dataclasses.replace(augment, mirror_signs=tuple(map(float, manifest.flip)))
    used = {"limit": limit, "holdout": holdout or None, "latents": latents and str(latents), "stream": stream}
    used |= {"labels": labels} if labels else {}
    return RunConfig(net, recipe, augment, describe_dataset(dataset) | used, versions(), init)


def default_out(dataset: Place, net: NetConfig, seed: int) -> Path:
    """``runs/imagenette-w1-d1-s0``: dataset, width, depth, seed, and the network and stem if not the defaults."""
    names = [dataset.resolve().name, f"w{net.width:g}", f"d{net.depth:g}", f"s{seed}"]
    arch = net.arch.rpartition(":")[2]
    names += [name for name, default in ((arch, "latentnet"), (net.stem, "affine")) if name != default]
    return Path("runs", "-".join(names))


def describe_dataset(dataset: LatentDataset) -> dict[str, Any]:
    """The part of the manifest that a run depends on.

    `plan_run` adds which part of the dataset was used: ``limit``; ``holdout``; ``latents``, the folder of float
    latents; ``stream``, the shards mixed at a time. Each is None if it does not apply. ``labels``, the hash of the soft
    labels, is there if there are any.
    """
    manifest = dataset.manifest
    return {
        "path": str(dataset.root.resolve()),
        "source": manifest.source,
        "codec": manifest.codec,
        "quantizer": manifest.quantizer.to_json(),
        "transform": manifest.transform,
        "classes": list(manifest.classes),
        "manifest_sha256": dataset.manifest.sha256,
    }


def versions() -> dict[str, str]:
    return {"latenttrain": __version__, "torch": torch.__version__, "python": platform.python_version()}


def check_dataset(config: RunConfig, dataset: LatentDataset) -> None:
    """Raises `CheckpointError`, naming the first difference, if the dataset's codes or labels mean something else.

    The images may differ, and so may the number of views: view 0 does not depend on it. Tokens may have fewer stages,
    which a network that reads stages takes for a coarser whole.
    """
    there_all, here_all = meaning(config.dataset), meaning(describe_dataset(dataset))
    stages = dataset.manifest.latent[0]
    fewer = config.net.reads_stages and stages < config.net.latent[0]
    if fewer:  # the first stages of the same codebooks
        quantizer = there_all["quantizer"]
        first = {"levels": quantizer["levels"][:stages], "bits": dataset.quantizer.bits}
        there_all["quantizer"] = {**quantizer, **first}
    for name, there, here in differences(there_all, here_all):
        raise CheckpointError(
            f"{dataset.root} does not fit this network: {name} is {short(here)}, "
            f"but the network was trained with {short(there)}",
            "use a dataset encoded with the same codec, quantizer, size and classes, or train on this one",
        )
    takes = (stages, *config.net.latent[1:]) if fewer else config.net.latent
    if tuple(dataset.manifest.latent) != takes:
        raise CheckpointError(
            f"{dataset.root} has latents {dataset.manifest.latent}, the network takes {config.net.latent}"
        )


def check_init(config: RunConfig, dataset: LatentDataset, run: Path) -> None:
    """Raises `CheckpointError`, naming the first difference, unless the dataset's codes are of the codec and the shape
    of those that the run was trained with. Classes may differ, and so may the quantizer's ranges."""
    here = {
        "codec": meaning(describe_dataset(dataset))["codec"], "latent": list(dataset.manifest.latent),
        "bits": dataset.quantizer.mean_bits,
    }  # fmt: skip
    there = {
        "codec": meaning(config.dataset)["codec"], "latent": list(config.net.latent),
        "bits": config.quantizer.mean_bits,
    }  # fmt: skip
    for name, one, other in differences(there, here):
        raise CheckpointError(
            f"{dataset.root} cannot start from {run}: its {name} is {short(other)}, but the run was trained with "
            f"{short(one)}",
            "encode it with the same codec, size and bits",
        )


def meaning(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `RunConfig.dataset` that decides what codes and labels mean: without weights' paths and views."""
    codec = {k: v for k, v in dataset["codec"].items() if k != "weights" or "weights_sha256" not in dataset["codec"]}
    transform = {k: v for k, v in dataset["transform"].items() if k not in ("views", "seed")}
    return {"classes": dataset["classes"], "codec": codec, "quantizer": dataset["quantizer"], "transform": transform}


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
