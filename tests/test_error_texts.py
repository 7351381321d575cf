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
from latentprep.errors import UsageError, check_number, check_whole, check_word, opt
from latentprep.torch import LatentStream
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


def test_folders_and_switches_read_as_english_in_python_too() -> None:
    found = [text for path in LIBRARY for text in re.findall(r"(?:another|with) {opt\('out'\)}", path.read_text())]
    assert not found  # "choose another out"
    found = [text for path in LIBRARY for text in re.findall(r"(?:with|or|use) {opt\('overwrite'\)}", path.read_text())]
    assert not found  # "or overwrite to encode all anew"


def test_every_parameter_that_an_error_names_exists() -> None:
    functions = [getattr(m, name) for m in (latentprep, latenttrain) for name in m.__all__]
    functions = [function for function in functions if callable(function)]
    functions += [
        DctCodec,
        Recipe,
        latentprep.pictures.rd.rd,
        latentprep.pictures.report.report,
        latentprep.encoding.encode.encode,
        LatentStream,
        LatentStream.set_epoch,
    ]
    for module in (latentprep_cli, cli_datasets, cli_pictures, latenttrain_cli):
        functions += [command.callback for command in module.app.registered_commands]
    known = {name for f in functions for name in inspect.signature(f).parameters}
    named = {
        (path.name, call.args[0].value)
        for path in LIBRARY
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if call.func.id in ("opt", "check_whole", "check_number", "check_word")
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
    both = UsageError(f"{opt('dct:luma')} is too large", f"use {opt('dct:luma', 8)} or {opt('splits', ['a', 'b'])}")
    assert str(both) == "dct:luma is too large; use dct:luma=8 or splits=['a', 'b']"
    assert both.in_shell() == ("dct:luma is too large", "use dct:luma=8 or --splits a,b")
    again = pickle.loads(pickle.dumps(error))
    assert again.in_shell() == error.in_shell()


@pytest.mark.parametrize("value", [1, 8, 5])
def test_a_number_in_range_passes(value: int) -> None:
    check_whole("size", value, 1, 8)
    check_number("phi", value, 1, 8)
    check_number("phi", value / 2, 0, 8, above=True, below=True)
    check_whole("size", None, 1, 8, optional=True)
    check_word("store", "wds", ("zarr", "wds"))


@pytest.mark.parametrize("value", [0, 9, True, "3", None, float("nan"), float("inf"), 10**400, [1]])
def test_a_number_out_of_range_is_a_usage_error(value: object) -> None:
    with pytest.raises(UsageError, match=r"^size must be a whole number from 1 to 8, got "):
        check_whole("size", value, 1, 8)
    with pytest.raises(UsageError, match=r"^phi must be a number from 1 to 8, got "):
        check_number("phi", value, 1, 8)
    with pytest.raises(UsageError, match=r"^store must be zarr or wds, got "):
        check_word("store", value, ("zarr", "wds"))


def test_the_allowed_range_is_said() -> None:
    for check, text in (
        (lambda: check_whole("limit", 0, 1), "limit must be a whole number of 1 or more, got 0"),
        (lambda: check_whole("size", 1.0, 1, 8), "size must be a whole number from 1 to 8, got 1.0"),
        (lambda: check_number("lr", 0, 0, above=True), "lr must be a number above 0, got 0"),
        (lambda: check_number("decay", -1, 0), "decay must be a number of 0 or more, got -1"),
        (lambda: check_number("ema", 1, 0, 1, below=True), "ema must be a number from 0 to below 1, got 1"),
        (lambda: check_number("fraction", 0, 0, 1, above=True), "fraction must be a number above 0 to 1, got 0"),
    ):
        with pytest.raises(UsageError) as caught:
            check()
        assert caught.value.message == text


def test_python_calls_are_told_of_parameters() -> None:
    with pytest.raises(UsageError, match=r"^shard_rows must be a whole number from 1 to 16777216, got 0$") as caught:
        latentprep.encode("shapes", shard_rows=0)
    assert caught.value.field == "shard_rows"
    with pytest.raises(UsageError, match=r"^codec 'dct' has no option weights; it takes luma and chroma$"):
        latentprep.encode("shapes", codec="dct", weights="x")
