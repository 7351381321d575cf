"""The Python functions do what the commands do: same names, same defaults, paths and URLs and opened objects alike."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer.main

import latentprep
import latentprep.cli.commands
import latenttrain
import latenttrain.cli
from inprocess import command
from latentprep.cli.options import numbers, whole_numbers
from latentprep.errors import UsageError
from latentprep.sources.source import Source
from loopback import Loopback
from pictures import make_folder

RENDERED = {"as_json", "show"}  # how a command prints its result
STUDY = "for studies, in Python only"
DIFFERENT = {
    "latentprep encode": dict.fromkeys(("batch_size", "colour", "phi", "profile", "strict"), STUDY),
    "latentprep latents": {"batch_size": STUDY},
    "latentprep verify": {"batch_size": STUDY},
    "latenttrain fit": dict.fromkeys(("stem", "full_grid", "augment", "latents", "buffer"), STUDY),
}  # fmt: skip
FUNCTIONS = {
    "latentprep codecs": latentprep.list_codecs,
    "latentprep latents": latentprep.write_latents,
    "latentprep linear-decoder fit": latentprep.fit_linear_decoder,
    "latentprep linear-decoder show": latentprep.linear_preview,
    "latentprep train-codec": latentprep.train_codec,
    "latenttrain eval": latenttrain.evaluate,
    "latenttrain scale": latenttrain.scale_table,
}


def commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}

    def add(name: str, command: click.Command) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found[name] = command
        for word, one in (below or {}).items():
            add(f"{name} {word}", one)

    add("latentprep", typer.main.get_command(latentprep.cli.commands.app))
    add("latenttrain", typer.main.get_command(latenttrain.cli.app))
    return found


def function_of(name: str) -> Callable[..., Any]:
    package = latentprep if name.startswith("latentprep") else latenttrain
    return FUNCTIONS.get(name) or getattr(package, name.split()[1])


@pytest.mark.parametrize("name", sorted(commands()))
def test_a_command_has_the_names_and_defaults_of_its_function(name: str) -> None:
    function = function_of(name)
    package = latentprep if name.startswith("latentprep") else latenttrain
    assert function.__name__ in package.__all__
    different = DIFFERENT.get(name, {})
    options = {p.name: p for p in commands()[name].params if p.name not in RENDERED | {"help"}}
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("progress", None)
    assert set(different) <= set(options) | set(parameters)  # the list of differences has nothing stale
    assert set(options) - set(different) == set(parameters) - set(different)
    for option in set(options) - set(different):
        default = parameters[option].default
        if options[option].required:
            assert default is inspect.Parameter.empty, option
            continue
        given = options[option].get_default(click.Context(commands()[name]))
        if isinstance(given, str) and not isinstance(default, str):  # a list, as text
            parse = {str: lambda _, text: text.split(","), int: whole_numbers, float: numbers}[type(default[0])]
            given, default = parse(option, given), list(default)
        assert (str(given) if isinstance(given, Path) else given) == default, option


def test_what_is_exported_is_callable_whatever_was_imported_before() -> None:
    import importlib
    import pkgutil

    for package in (latentprep, latenttrain):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
        for name in package.__all__:
            assert callable(getattr(package, name)), name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("api") / "images", train=12, val=6)


@pytest.fixture(scope="module")
def site(images: Path) -> Iterator[tuple[Path, str]]:
    """A dataset's folder and its URL on a web server."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    folder = images.parent / "codes"
    latentprep.encode(images, codec="dct", size=64, shard_rows=8, bits=4, out=folder)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with Loopback(functools.partial(Quiet, directory=images.parent)) as web:
        yield folder, f"{web.url}/codes"


@pytest.fixture(params=["path", "opened", "URL"])
def dataset(request: pytest.FixtureRequest, site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LATENTPREP_CACHE", str(site[0].parent / "cache"))
    folder, url = site
    return {"path": folder, "opened": latentprep.open(folder), "URL": url}[request.param]


@pytest.fixture(params=["path", "opened"])
def source(request: pytest.FixtureRequest, images: Path) -> str | Source:
    return {"path": str(images), "opened": latentprep.open_source(images)}[request.param]


def test_functions_take_a_dataset_as_path_url_or_opened(dataset: Any, images: Path, tmp_path: Path) -> None:
    assert latentprep.open(dataset).splits == ("train", "val")
    assert latentprep.info(dataset).splits["train"].rows == 24
    assert latentprep.verify(dataset, source=images, samples=2).ok
    assert latentprep.requantize(dataset, bits=2, out=tmp_path / "two").encoded == 36
    assert latentprep.convert(dataset, out=tmp_path / "tars", store="wds").encoded == 36
    assert latentprep.subset(dataset, fraction=0.5, out=tmp_path / "half").rows == {"train": 12, "val": 6}
    parts = [tmp_path / name for name in ("train", "val")]
    for part in parts:
        latentprep.encode(
            images, codec="dct", size=64, shard_rows=8, quantizer=dataset, splits=[part.name], out=part
        )  # fmt: skip
    assert latentprep.merge([latentprep.open(parts[0]), str(parts[1])], out=tmp_path / "both").encoded == 36
    latents = latentprep.write_latents(dataset, images, out=tmp_path / "floats")
    assert np.load(latents / "val.npy").shape[0] == 12
    result = latentprep.decode(dataset, out=tmp_path / "decoded", limit=4, source=images)
    assert result.all.images == 4
    assert result.all.psnr > 20
    assert latentprep.preview(dataset, out=tmp_path / "p.png", limit=2, source=images).samples == 2
    assert latentprep.report(dataset, out=tmp_path / "r.html", samples=2, source=images).bytes > 1000
    rows = latenttrain.scale_table(dataset, [0])
    assert rows[0]["latent"] == latentprep.open(dataset).manifest.latent


def test_functions_that_train_take_a_dataset_as_path_url_or_opened(dataset: Any, tmp_path: Path) -> None:
    small = {"epochs": 1, "device": "cpu"}
    run = latenttrain.fit(dataset, width=0.25, depth=0.5, batch_size=8, out=tmp_path / "run", **small)
    assert run.epochs == 1
    assert latenttrain.evaluate(str(tmp_path / "run"), dataset).samples == 12
    (summary,) = latenttrain.report([tmp_path / "run"], out=tmp_path / "runs.html")
    assert summary.bits == 4


def test_one_of_several_need_not_be_in_a_list(site: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    folder = site[0]
    assert latentprep.subset(folder, classes="class_1", out=tmp_path / "one").classes == ("class_1",)
    assert latentprep.encode(images, codec="dct", splits="val", dry_run=True, out=tmp_path / "val").rows == {"val": 12}
    assert latentprep.decode(folder, classes="class_1", out=tmp_path / "pictures").all.images == 6
    with pytest.raises(UsageError, match="two or more datasets"):
        latentprep.merge(folder, out=tmp_path / "both")
    latenttrain.fit(folder, width=0.25, depth=0.5, batch_size=8, epochs=1, device="cpu", out=tmp_path / "run")
    assert len(latenttrain.report(str(tmp_path / "run"), out=tmp_path / "runs.html")) == 1
    photo = next((images / "val").rglob("*.jpg"))
    for path in (photo, str(photo)):
        assert [one.image for one in latenttrain.predict(tmp_path / "run", path)] == [str(photo)]


def test_functions_take_a_source_as_path_or_opened(
    source: Any, images: Path, site: tuple[Path, str], tmp_path: Path
) -> None:
    folder = site[0]
    result = latentprep.encode(source, codec="dct", size=64, shard_rows=8, bits=4, out=tmp_path / "codes")
    assert result.rows == {"train": 24, "val": 12}
    same = [(path / "train/codes/c/0/0/0/0/0").read_bytes() for path in (folder, tmp_path / "codes")]
    assert same[0] == same[1]
    found = latentprep.verify(folder, source=source, samples=4)
    assert found.ok
    assert found.compared.images == 4
    assert (latentprep.write_latents(folder, source, out=tmp_path / "floats") / "train.npy").is_file()
    assert latentprep.decode(folder, out=tmp_path / "decoded", limit=2, source=source).all.psnr > 20
    assert "original" in latentprep.preview(folder, out=tmp_path / "p.png", limit=2, source=source).columns
    decoder = latentprep.fit_linear_decoder(tmp_path / "codes", source, samples=8)
    assert decoder.factor == 8
    assert latentprep.linear_preview(tmp_path / "codes", out=tmp_path / "l.png", limit=2, source=source).samples == 2
    latentprep.report(folder, out=tmp_path / "r.html", samples=2, source=source)
    rd = latentprep.rd(source, bits=[4], rates=[], qualities=[50], images=4, size=64, out=tmp_path / "rd")
    assert rd.images == 4


def test_what_shows_the_images_reads_labels_from_a_table_too(images: Path, tmp_path: Path) -> None:
    flat, lines = tmp_path / "flat", ["photo,kind,split"]
    flat.mkdir()
    for path in sorted(images.rglob("*.jpg")):
        split, name = path.parts[-3:-1]
        (flat / f"{split}-{name}-{path.name}").hardlink_to(path)
        lines.append(f"{split}-{name}-{path.name},{name},{split}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    own = {"labels": tmp_path / "labels.csv", "image_column": "photo", "label_column": "kind"}
    folder = tmp_path / "codes"
    latentprep.encode(flat, codec="dct", size=64, out=folder, **own)
    assert latentprep.decode(folder, out=tmp_path / "decoded", limit=2, source=flat, **own).all.psnr > 20
    assert "original" in latentprep.preview(folder, out=tmp_path / "p.png", limit=2, source=flat, **own).columns
    latentprep.report(folder, out=tmp_path / "r.html", samples=2, source=flat, **own)
    latentprep.fit_linear_decoder(folder, flat, samples=8, **own)
    latentprep.linear_preview(folder, out=tmp_path / "l.png", limit=2, source=flat, **own)
    assert latentprep.rd(flat, bits=[4], qualities=[50], images=4, size=64, out=tmp_path / "rd", **own).images == 4
    words = [word for name, value in own.items() for word in (f"--{name.replace('_', '-')}", value)]
    sheet = command("latentprep", "preview", folder, "--source", flat, *words, "--limit", 2, "--json", cwd=tmp_path)
    assert "original" in json.loads(sheet.stdout)["columns"]
    refused = command("latentprep", "preview", folder, "--source", flat, cwd=tmp_path)
    assert (refused.returncode, "or a table of labels as --labels" in refused.stderr) == (4, True)


def test_a_sources_options_without_a_source_to_open_are_refused(images: Path, site: tuple[Path, str]) -> None:
    opened = latentprep.open_source(images)
    assert latentprep.open_source(opened) is opened
    with pytest.raises(UsageError, match="have no effect on an open source"):
        latentprep.encode(opened, val_fraction=0.2, out="nowhere")
    with pytest.raises(UsageError, match="data needs source"):
        latentprep.verify(site[0], data="copy")


def test_verify_looks_at_what_is_there_now_even_of_an_opened_dataset(site: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(site[0], tmp_path / "codes")
    dataset = latentprep.open(tmp_path / "codes")
    dataset.load("train")
    record = tmp_path / "codes" / "records" / "train-000000.json"
    record.write_bytes(record.read_bytes().replace(b'"rows": 8', b'"rows": 7'))
    assert [(p.split, p.index) for p in latentprep.verify(dataset).problems] == [("train", 0)]
    assert json.loads(json.dumps(latentprep.list_codecs()[0].to_json()))["name"]


@pytest.mark.parametrize("store", ["zarr", "wds", "parquet"])
def test_a_record_is_read_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    from collections import Counter

    from latentprep.format import dataset as module

    reads: Counter[tuple[str, int]] = Counter()
    found: Counter[tuple[str, int]] = Counter()
    real = module.read_record

    def counted(root: Any, split: str, index: int) -> Any:
        record = real(root, split, index)
        reads[split, index] += 1
        found[split, index] += record is not None
        return record

    monkeypatch.setattr(module, "read_record", counted)
    options = {"codec": "dct", "size": 64, "shard_rows": 4, "out": tmp_path / "out", "store": store}
    shards = 9
    latentprep.encode(images, **options)
    assert reads.total() == shards  # each was looked for, once
    assert found.total() == 0
    reads.clear()
    assert latentprep.encode(images, **options).encoded == 0
    assert (len(reads), reads.total()) == (shards, shards)
    reads.clear()
    (tmp_path / "out" / "records" / "train-000001.json").unlink()
    assert latentprep.encode(images, **options).encoded == 4
    assert (len(reads), reads.total()) == (shards, shards)
    reads.clear()
    opened = latentprep.open(tmp_path / "out")
    for split in ("train", "train", "val"):
        opened.records(split)
        opened.load(split)
    assert (len(reads), reads.total()) == (shards, shards)
    reads.clear()
    latentprep.convert(opened, out=tmp_path / "other", store="wds" if store == "zarr" else "zarr")
    assert reads.total() == shards  # looked for; what was just written is known
