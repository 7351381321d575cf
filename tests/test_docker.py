"""The Dockerfile, compose.yaml and what is said of them, without building: tests/docker/build.sh does that."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
import yaml

import latentprep.cli.commands
import latenttrain.cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = re.sub(r"\\\n\s*", "", re.sub("^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M))
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line]
ARGUMENTS = dict(text.partition("=")[::2] for step, text in STEPS if step == "ARG")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
PROGRAMS = {"latentprep": latentprep.cli.commands.app, "latenttrain": latenttrain.cli.app}


def parse(words: list[str]) -> None:
    """Fails if the line is no command of ours with options that it has. Nothing runs."""
    program, name, *options = words
    commands = typer.main.get_command(PROGRAMS[program]).commands
    commands[name].make_context(name, options)


def test_what_is_copied_is_here_and_passes_the_ignore_file() -> None:
    copied = {name for step, text in STEPS if step == "COPY" and "--from" not in text for name in text.split()[:-1]}
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) < copied
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch("latentprep/__pycache__", line) for line in lines[1:])


def test_the_image_agrees_with_the_project() -> None:
    project = PROJECT["project"]
    assert dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', dict(STEPS)["LABEL"])) == {
        "title": project["name"], "description": project["description"], "version": project["version"],
        "licenses": project["license"],
    }  # fmt: skip
    assert set(ARGUMENTS["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    pinned = re.search(r"^torch==(.*)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert f":{pinned[1]}-cuda" in ARGUMENTS["BASE"]


def test_the_program_is_process_1_and_no_root() -> None:
    last = STEPS[max(i for i, (step, _) in enumerate(STEPS) if step == "FROM") :]
    assert not {"ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL"} & {step for step, _ in last}
    program, *rest = json.loads(dict(last)["CMD"])  # a list: no shell between the signal and the program
    assert program in PROJECT["project"]["scripts"]
    assert rest == ["--help"]
    assert int(dict(last)["USER"]) > 0


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_what_compose_runs_are_commands_of_ours(name: str) -> None:
    service = COMPOSE["services"][name]
    arguments, command = service["build"]["args"], service["command"]
    assert set(arguments) <= set(ARGUMENTS)
    extras = arguments.get("EXTRAS", "").split(",")
    assert set(filter(None, extras)) <= set(PROJECT["project"]["optional-dependencies"])
    assert command[0] in [*PROGRAMS, *extras]  # ray comes with its extra
    if command[0] in PROGRAMS:
        parse(command)


def test_what_the_page_and_the_script_run_are_commands_of_ours() -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    lines = [shlex.split(line) for line in re.findall("^docker run .*", page, re.M)]
    script = (ROOT / "tests" / "docker" / "build.sh").read_text()
    compose = (ROOT / "compose.yaml").read_text()
    lines += [shlex.split(words) for words in re.findall(r"^ *#.*docker compose .* (latent\w+ .*)", compose, re.M)]
    lines += [shlex.split(words) for words in re.findall(r"^\w+=\((latent.*)\)$", script, re.M)]
    lines += [shlex.split(words) for words in re.findall(r'" run (latent\w+ [a-z].*)$', script, re.M)]
    assert len(lines) >= 8
    for words in lines:
        [*_, start] = [i for i, word in enumerate(words) if word in PROGRAMS]
        parse(words[start:])
    for name in re.findall("--build-arg ([A-Z_]+)", page):
        assert name in ARGUMENTS
    subprocess.run(["bash", "-n", ROOT / "tests" / "docker" / "build.sh"], check=True)
