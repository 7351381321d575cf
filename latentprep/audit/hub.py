"""`push`: upload a dataset to the Hugging Face hub, with a card made from its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from latentprep.derived.derive import opened
from latentprep.errors import SystemFault, UsageError
from latentprep.format import parquet_store
from latentprep.format.dataset import LatentDataset
from latentprep.format.manifest import ERRORS, Manifest, ShardRecord
from latentprep.format.quantizer import Codebook
from latentprep.format.stores import store_of
from latentprep.progress import ProgressFactory, silent
from latentprep.storage.buckets import hub_errors
from latentprep.storage.places import RemotePath, local

CARD = "README.md"


@dataclass(frozen=True)
class PushResult:
    """What `push` did. url: the commit's address; place: the address that `latentprep.open` takes."""

    repository: str
    place: str
    url: str
    files: int
    bytes: int

    def to_json(self) -> dict:
        return asdict(self)


def push(
    dataset: str | Path | LatentDataset,
    repository: str,
    *,
    private: bool = False,
    progress: ProgressFactory = silent,
) -> PushResult:
    """Upload the dataset in a local folder to the hub's dataset repository `repository`, in one commit, with a card.

    The repository is created if it does not exist. Every file is checked against its checksum first. huggingface_hub
    finds the token, in ``HF_TOKEN`` or from ``hf auth login``.

    Raises `UsageError` for a name that is not ``owner/name``, `DatasetError` if the dataset is damaged or incomplete,
    `SystemFault` if the hub refuses or cannot be reached.
    """
    if len(repository.split("/")) != 2 or not all(repository.split("/")):
        raise UsageError(f"the repository must be owner/name, got {repository}")
    source = opened(dataset)
    if isinstance(source.root, RemotePath):
        raise UsageError(f"{source.root} is not on this machine", "copy it to a folder with latentprep convert first")
    root, manifest = local(source.root, "the dataset to push"), source.manifest
    paths = [*manifest.files(), *store_of(manifest).metadata_files(manifest)]
    paths += [ERRORS] if (root / ERRORS).is_file() else []
    records = [record for split in source.splits for record in source.records(split)]
    with progress("checking", len(records), "shards", 0) as bar:
        for record in records:
            source.check_files(record)
            paths += [*record.files, record.path]
            bar.advance(1)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise SystemFault(
            "latentprep push needs huggingface_hub, which is not installed", "pip install 'latentprep[hub]'"
        ) from error
    added = [CommitOperationAdd(path, str(root / path)) for path in paths]
    added.append(CommitOperationAdd(CARD, card(source, repository).encode()))
    try:
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        message = f"{manifest.codec['name']} latents at {manifest.quantizer.mean_bits:.3g} bits"
        commit = api.create_commit(repository, added, commit_message=message, repo_type="dataset")
    except hub_errors() as error:
        raise SystemFault(
            f"cannot push to {repository}: {str(error).partition(chr(10))[0][:300]}",
            "check the name, the network and your token (hf auth login), then run the same command again",
        ) from error
    size = sum((root / path).stat().st_size for path in paths)
    return PushResult(repository, f"hf://datasets/{repository}", str(commit.commit_url), len(added), size)


def card(dataset: LatentDataset, repository: str) -> str:
    """The repository's README: what the dataset is, from its manifest and records, and how to read it."""
    manifest, where = dataset.manifest, f"hf://datasets/{repository}"
    records = [record for split in dataset.splits for record in dataset.records(split)]
    channels, height, width = manifest.latent
    rows = sum(manifest.splits.values())
    facts = {
        "codec": manifest.codec,
        "bits per code": manifest.quantizer.mean_bits,
        "latents": f"{channels} channels of {height} x {width}",
        "images": f"{manifest.transform['size']} px per side",
        "views": {split: manifest.views(split) for split in manifest.splits},
        "rows": manifest.splits,
        "rows that could not be read": sum(len(record.invalid) for record in records),
        "bytes": sum(file.bytes for record in records for file in record.files.values()),
        "store": manifest.store,
        "source": manifest.source["spec"],
        "made by": manifest.written_by,
        "SHA-256 of the manifest": dataset.manifest.sha256,
        "classes": list(manifest.classes),
    }
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    table = "\n".join(f"{name}: {text}" for name, text in texts.items())
    size = next(name for most, name in _SIZES if rows < most)
    columns, reading = (
        (_columns(manifest, records), _DATASETS.format(repository)) if manifest.store == "parquet" else ("", "")
    )
    meaning = (
        "Latents are the sum of the vectors that a cell's codes name, of tables in `codebooks.safetensors`."
        if isinstance(manifest.quantizer, Codebook)
        else "Latents are `lo + (code + 0.5) * step`, with each channel's `lo` and `step` from `manifest.json`."
    )
    made = "the codes" if manifest.thumbnail is None else "the codes, and to the thumbnails made of them,"
    return f"""---
pretty_name: {json.dumps(repository.partition("/")[2])}
task_categories:
- image-classification
size_categories:
- {size}
tags:
- latentprep
- latents
{columns}---

# {repository.partition("/")[2]}

Images as low-bit codes, made by a lossy codec, with their labels: for training small networks on the codes.
The images themselves are not included; their licence applies to {made} too.

````text
{table.replace("````", "")}
````

Read it, or train on it, with latentprep:

````bash
pip install 'latentprep[hub]'
latentprep info {where}
latenttrain fit {where}
````
{reading}
{meaning} Every file except this
one has a checksum; `latentprep verify` checks them.
"""


_DATASETS = """
Or with the `datasets` library alone: `datasets.load_dataset("{}")`. In rows that are not `valid` all codes are 0.
"""


def _columns(manifest: Manifest, records: list[ShardRecord]) -> str:
    """The card's fields that tell the hub's viewer and ``load_dataset`` of a Parquet store's columns and splits."""
    names = [split for split, rows in manifest.splits.items() if rows]
    lines = ["configs:", "- config_name: default", "  data_files:"]
    lines += [line for name in names for line in (f"  - split: {name}", f"    path: data/{name}-*.parquet")]
    lines += ["dataset_info:", "  features:"]
    for name, kind in parquet_store.features(manifest).items():
        lines += [f"  - name: {name}", *_YAML_TYPES[kind["_type"]](kind)]
    lines += ["  splits:"]
    for name in names:
        size = sum(file.bytes for record in records if record.split == name for file in record.files.values())
        lines += [f"  - name: {name}", f"    num_bytes: {size}", f"    num_examples: {manifest.splits[name]}"]
    return "".join(f"{line}\n" for line in lines)


def _class_label(kind: dict) -> list[str]:
    names = [f"          '{label}': {_quoted(name)}" for label, name in enumerate(kind["names"])]
    return ["    dtype:", "      class_label:", "        names:", *names]


def _array(kind: dict) -> list[str]:
    name, shape, dtype = kind["_type"].lower()[:-1], json.dumps(kind["shape"]), kind["dtype"]
    return ["    dtype:", f"      {name}_d:", f"        shape: {shape}", f"        dtype: {dtype}"]


def _quoted(text: str) -> str:
    """A string in YAML: printable ASCII in quotes, and all else by its number."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


# What follows a feature's name, from the JSON of its type; the words are those of `datasets`.
_YAML_TYPES: dict[str, Callable[[dict], list[str]]] = {
    "Value": lambda kind: [f"    dtype: {kind['dtype']}"],
    "ClassLabel": _class_label,
    "Array3D": _array,
    "Array4D": _array,
    "Image": lambda kind: ["    dtype: image"],
}

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1 << 62, "100M<n<1B"),
)
