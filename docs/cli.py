"""Writes `cli.md`, the reference of both programs, from their commands. `make docs` runs it; a test compares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

PROGRAMS = ("latentprep", "latenttrain")
INTRODUCTION = """# Commands

Written by `python docs/cli.py` (`make docs`) from the programs' own help; do not edit it by hand. Results go to stdout,
progress and errors to stderr. Every command has `--json`. `--install-completion` sets up completion in bash, zsh, fish
and PowerShell.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 2 | an option's value is not allowed |
| 3 | done, but some samples could not be read |
| 4 | the source: no such path, an empty class, a damaged archive, too many unreadable images |
| 5 | the codec: unknown, weights missing, latents that are not finite |
| 6 | the latent dataset: absent, incomplete, damaged (also what `verify` found), or with different settings |
| 7 | the run folder: absent, damaged, or not of this dataset |
| 8 | the machine: disk full, no permission, package or device missing, output that cannot be written |
| 130, 143, 129 | interrupted by Ctrl-C, SIGTERM or SIGHUP: whole shards are kept; run the same command again |
| 141 | the reader of the output went away, as `head` does |
"""


def main() -> None:
    Path(__file__).with_name("cli.md").write_text(document())


def document() -> str:
    parts = [INTRODUCTION]
    for program in PROGRAMS:
        module = __import__(f"{program}.cli", fromlist=["app"])
        parts.append(f"## {program}\n\n{module.app.info.help}\n")
        parts += [described(path, command) for path, command in commands(program, get_command(module.app))]
    return "\n".join(parts)


def commands(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    """("latentprep linear-decoder fit", command) of every command below a group."""
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from commands(f"{path} {name}", command)
        else:
            yield f"{path} {name}", command


def described(path: str, command: Any) -> str:
    """A command's section: usage, what it does, arguments and options, examples."""
    text, _, examples = re.sub(r"\n(Examples?):\n", "\n\0\n", command.help).partition("\0")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([path, *("[OPTIONS]" for _ in options[:1]), *(argument(p) for p in arguments)])
    lines = [f"### {path}", "", "```", usage, "```", "", *(plain(part) + "\n" for part in text.strip().split("\n\n"))]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| `{argument(p)}` | {plain(p.help)} |" for p in arguments]
    kinds = get_type_hints(inspect.unwrap(command.callback))
    lines += [f"| {spelled(p, kinds)} | {plain(p.help)}{default(p)} |" for p in options]
    if shown := [line.strip() for line in examples.strip().splitlines() if line.strip()]:
        lines += ["", "```", *shown, "```"]
    return "\n".join(lines) + "\n"


def argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).strip("[]")
    name = name if parameter.nargs == 1 or name.endswith("…") else f"{name}…"
    name = name if name.isupper() or name.endswith("…") else name.upper()
    return name if parameter.required else f"[{name}]"


def spelled(parameter: Any, kinds: dict[str, Any]) -> str:
    """The option as it is written: `--bits N`."""
    names = "/".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return f"`{names}`"
    kind = {part for part in (kinds[parameter.name], *get_args(kinds[parameter.name])) if isinstance(part, type)}
    value = next((word for known, word in ((int, "N"), (float, "X"), (Path, "PATH")) if known in kind), "TEXT")
    return f"`{names} {value}`"


def default(parameter: Any) -> str:
    """` Default: 4.` where the help does not say it itself."""
    value = parameter.default
    if parameter.is_flag or value is None or value == "" or "efault" in (parameter.help or "") or not shown(parameter):
        return " Required." if parameter.required else ""
    return f" Default: {value:g}." if isinstance(value, float) else f" Default: {value}."


def shown(parameter: Any) -> bool:
    return bool(getattr(parameter, "show_default", True))


def plain(text: str) -> str:
    """Help as Markdown: rich's bold becomes code, lines are joined, bars escaped."""
    text = re.sub(r"\[b\](.*?)\[/b\]", r"`\1`", " ".join(text.split()))
    return text.replace("|", r"\|").replace("<", r"\<")


if __name__ == "__main__":
    main()
