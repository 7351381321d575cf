"""docs/cli.md says what the commands say, the drawing what the code imports, and completion knows the commands."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from records import accuracies

DOCS = Path(__file__).parent.parent / "docs"


def test_the_reference_of_the_commands_is_fresh() -> None:
    assert (DOCS / "cli.md").read_text() == script("cli").document(), "run make docs"


def test_the_drawing_of_the_packages_is_fresh() -> None:
    drawn = script("architecture")
    assert (DOCS / "architecture.svg").read_text() == drawn.drawing(), "run make docs"
    pairs = drawn.imports(drawn.layers())
    assert ("latenttrain", "latentprep.format") in pairs
    assert ("latentprep.format", "latentprep.encoding") not in pairs


ACCURACY = re.compile(r"\d+\.\d% ± \d+\.\d|\d+\.\d(?=%)")


def test_the_accuracies_of_the_results_are_in_the_records_that_they_link() -> None:
    _, *sections = re.split(r"^## ", (DOCS / "results.md").read_text(), flags=re.MULTILINE)
    checked = 0
    for section in sections:
        known: set[str] = set().union(*map(accuracies, re.findall(r"benchmarks/records/([\w.]+\w)", section)))
        written = {figure.replace("%", "") for figure in ACCURACY.findall(section)}
        assert written <= known, f"{section.partition(chr(10))[0]}: {sorted(written - known)}"
        checked += len(written)
    assert checked > 50


def test_the_accuracies_of_the_readme_are_in_the_results() -> None:
    results = set(ACCURACY.findall((DOCS / "results.md").read_text()))
    written = set(ACCURACY.findall((DOCS.parent / "README.md").read_text()))
    assert written and written <= results, sorted(written - results)


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"write_{name}", DOCS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("program", "typed", "expected"),
    [("latentprep", "latentprep pre", "preview"), ("latenttrain", "latenttrain fit --te", "--tensorboard")],
)
def test_completion(program: str, typed: str, expected: str) -> None:
    environment = {
        **os.environ, f"_{program.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }  # fmt: skip
    code = f"import sys; sys.argv = ['{program}']; from {program}.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [expected], done.stderr
