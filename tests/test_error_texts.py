"""Errors speak of parameters in Python and of options on the command line, and only of those that exist."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentprep
import latentprep.encoding.encode
import latentprep.pictures.rd
import latentprep.pictures.report
import latenttrain
from latentprep.cli import commands as latentprep_cli
from latentprep.cli import datasets as cli_datasets
from latentprep.cli import pictures as cli_pictures
from latentprep.codecs.dct import DctCodec
from latentprep.errors import UsageError, opt
from latenttrain import cli as latenttrain_cli
from latenttrain.recipe import Recipe

ROOT = Path(__file__).parent.parent
LIBRARY = [
    path
    for package in ("latentprep", "latenttrain")
    for path in (ROOT / package).rglob("*.py")
    if "cli" not in path.relative_to(ROOT).with_suffix("").parts and path.name != "page.py"
]
# Whole command lines to type, which stay so from Python too.
COMMAND = re.compile(r"pip install |tar --|aws configure |latentprep \S+ .*--|latenttrain \S+ .*--")


def texts(path: Path) -> Iterator[str]:
    """The string constants of a module, f-strings whole, without docstrings."""
    tree = ast.parse(path.read_text())
    strings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            strings |= {id(part) for part in node.values}
            yield ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in strings:
            yield node.value


def test_no_library_text_spells_an_option() -> None:
    # The reason of an image that is not read is kept in records, and so has no parameters.
    wrong = {
        (path.name, text)
        for path in LIBRARY
        for text in texts(path)
        if re.search(r"(^|[\s(\"'])--[a-z]", text) and not COMMAND.search(text) and path.name != "images.py"
    }
    assert not wrong


def test_every_parameter_that_an_error_names_exists() -> None:
    functions = [getattr(m, name) for m in (latentprep, latenttrain) for name in m.__all__]
    functions = [function for function in functions if callable(function)]
    functions += [
        DctCodec,
        Recipe,
        latentprep.pictures.rd.rd,
        latentprep.pictures.report.report,
        latentprep.encoding.encode.encode,
    ]
    for module in (latentprep_cli, cli_datasets, cli_pictures, latenttrain_cli):
        functions += [command.callback for command in module.app.registered_commands]
    known = {name for f in functions for name in inspect.signature(f).parameters}
    named = {
        (path.name, call.args[0].value)
        for path in LIBRARY
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "opt"
        if isinstance(call.args[0], ast.Constant)
    }
    assert len(named) > 40
    assert not {(file, name) for file, name in named if name not in known}


def test_a_text_reads_as_python_and_as_options() -> None:
    name = "{braces} --kept \x01 [x]"
    error = UsageError(
        f"{opt('shard_rows')} must be 1 to 8, got {name}",
        f"use {opt('shard_rows', 8)}, {opt('joint', False)}, {opt('strict', True)} or {opt('codec', 'dct')}",
    )
    assert error.message == f"shard_rows must be 1 to 8, got {name}"
    assert error.hint == "use shard_rows=8, joint=False, strict=True or codec='dct'"
    assert str(error) == f"{error.message}; {error.hint}"
    assert error.in_shell() == (
        f"--shard-rows must be 1 to 8, got {name}",
        "use --shard-rows 8, --no-joint, --strict or --codec dct",
    )
    assert error.field == "shard_rows"
    assert UsageError("no parameter").field is None
    again = pickle.loads(pickle.dumps(error))
    assert again.in_shell() == error.in_shell()


def test_python_calls_are_told_of_parameters() -> None:
    with pytest.raises(UsageError, match=r"^shard_rows must be 1 to 16777216, got 0$") as caught:
        latentprep.encode("shapes", shard_rows=0)
    assert caught.value.field == "shard_rows"
    with pytest.raises(UsageError, match=r"^codec 'dct' has no option weights; it takes luma and chroma$"):
        latentprep.encode("shapes", codec="dct", weights="x")
