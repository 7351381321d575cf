from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_every_package_that_a_program_or_codec_lives_in() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    named = [*project["scripts"].values(), *project["entry-points"]["latentprep.codecs"].values()]
    packages = document["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {target.partition(":")[0].partition(".")[0] for target in named} == set(packages)
    assert all((ROOT / package / "__init__.py").is_file() for package in packages)
