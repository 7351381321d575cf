"""What a run is: network, recipe, augmentation and dataset, as one JSON document, and which datasets fit it."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import Any

import torch

from latentprep.errors import CheckpointError
from latentprep.format import LatentDataset, Quantizer
from latenttrain import __version__
from latenttrain.augment import Augment
from latenttrain.nets import NetConfig
from latenttrain.recipe import Recipe

FORMAT, VERSION = "latenttrain run", 1


@dataclass(frozen=True)
class RunConfig:
    """All that decides how a run comes out, and all that is needed to use what it learned.

    dataset: ``path``, ``source``, ``codec``, ``quantizer``, ``transform``, ``classes``, ``manifest_sha256``,
    and what of it was used: ``limit``, ``holdout``, ``latents``, and ``stream``, the shards held if it was streamed.
    versions: of latenttrain, torch and Python. They and the path may differ between a run's start and its resumption.
    """

    net: NetConfig
    recipe: Recipe
    augment: Augment
    dataset: dict[str, Any]
    versions: dict[str, str]

    @property
    def classes(self) -> list[str]:
        return self.dataset["classes"]

    @property
    def quantizer(self) -> Quantizer:
        fields = self.dataset["quantizer"]
        return Quantizer(fields["bits"], *(tuple(fields.get(name, ())) for name in ("lo", "step", "filter")))

    def to_json(self) -> dict:
        return {
            "format": FORMAT,
            "version": VERSION,
            "net": self.net.to_json(),
            "recipe": self.recipe.to_json(),
            "augment": self.augment.to_json(),
            "dataset": self.dataset,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, document: dict) -> RunConfig:
        """Inverse of `to_json`. Raises `LatentError`, `KeyError`, `TypeError` or `ValueError` for anything else."""
        dataset = document["dataset"]
        for name, kind in (("codec", dict), ("quantizer", dict), ("transform", dict), ("classes", list)):
            if not isinstance(dataset[name], kind):
                raise TypeError(f"dataset.{name} is no {kind.__name__}")
        config = cls(
            NetConfig.from_json({"activation": "relu"} | document["net"]),  # there was no other before it was recorded
            Recipe.from_json(document["recipe"]),
            Augment.from_json(document["augment"]),
            dataset,
            document["versions"],
        )
        if len(config.classes) != config.net.classes or config.quantizer.bits != config.net.bits:
            raise ValueError("the network and the dataset do not fit together")
        return config


def describe_dataset(dataset: LatentDataset) -> dict[str, Any]:
    """`RunConfig.dataset`: what of the manifest a run depends on."""
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
    """`CheckpointError` naming the first thing in which the dataset's codes mean something else than the network's do.

    The images may be others, and so may the number of views: view 0 is the same whatever their number.
    """
    given = meaning(describe_dataset(dataset))
    for field, trained in meaning(config.dataset).items():
        if (found := difference(trained, given[field], field)) is not None:
            name, there, here_value = found
            raise CheckpointError(
                f"{dataset.root} does not fit this network: {name} is {short(here_value)}, "
                f"the network was trained with {short(there)}",
                "use a dataset encoded with the same codec, quantizer, size and classes, or train on this one",
            )
    if tuple(dataset.manifest.latent) != config.net.latent:
        raise CheckpointError(
            f"{dataset.root} has latents {dataset.manifest.latent}, the network takes {config.net.latent}"
        )


def meaning(dataset: dict[str, Any]) -> dict[str, Any]:
    """Of `RunConfig.dataset`, what decides what a code and a label mean: not where weights lie, nor later views."""
    codec = {k: v for k, v in dataset["codec"].items() if k != "weights" or "weights_sha256" not in dataset["codec"]}
    transform = {k: v for k, v in dataset["transform"].items() if k not in ("views", "seed")}
    return {"classes": dataset["classes"], "codec": codec, "quantizer": dataset["quantizer"], "transform": transform}


def difference(first: Any, second: Any, name: str) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: its dotted name and both values; None if they are equal."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            if (found := difference(first.get(key), second.get(key), f"{name}.{key}")) is not None:
                return found
        return None
    return None if first == second else (name, first, second)


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
