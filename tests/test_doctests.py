"""The examples in docstrings of what the packages export, run in a folder where `shards` and `runs/first` are."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import latentprep
import latenttrain

EXPORTED = {f"{package.__name__}.{name}": getattr(package, name) for package in (latentprep, latenttrain)
            for name in package.__all__}  # fmt: skip
EXAMPLES = {name: found for name, found in EXPORTED.items() if ">>>" in (inspect.getdoc(found) or "")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    latentprep.encode("shapes", codec="dct", limit=60, out=folder / "shards")
    latenttrain.fit(folder / "shards", epochs=1, width=0.25, out=folder / "runs" / "first")
    return folder


def test_the_main_functions_have_examples() -> None:
    assert {"latentprep.encode", "latentprep.open", "latentprep.requantize", "latenttrain.fit"} <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_it_says(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = {"latentprep": latentprep, "latenttrain": latenttrain}
    (test,) = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, module=False, globs=names)
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert results.attempted
    assert not results.failed, "".join(said)
