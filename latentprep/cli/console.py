"""The terminal face that both command lines share: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.cli.terminal import guard_streams, orderly_signals
from latentprep.errors import Interrupted, LatentError, LatentWarning, SystemFault, system_fault
from latentprep.progress import BYTES, Progress
from latentprep.text import duration, shown, size
from latentprep.tuning import tune_process

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import Task
    from rich.text import Text


def run(app: Any) -> None:
    """Run a Typer `app` as a program: a user's mistake is one or two lines on stderr and its exit code."""
    with orderly_signals() as ended:
        try:
            guard_streams()
            tune_process()
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            try:
                code = _exit_code(app)
            except KeyboardInterrupt:  # before there was anything to lose
                raise Interrupted("interrupted", "run the same command again to continue") from None
            sys.stdout.flush()
        except Interrupted as error:
            _say(error)
            code = ended.exit_code
        except LatentError as error:
            _say(error)
            code = error.exit_code
        except OSError as error:
            code = _say(system_fault(error))
        except MemoryError:
            code = _say(SystemFault("out of memory", "close other programs, or use smaller batches or shards"))
    if ended.signal is not None:  # Python ends by SIGINT, whichever it was, where it met us inside of an exec()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(ended.exit_code)
    sys.exit(code)


def _exit_code(app: Any) -> int | str | None:
    """What Typer ends with; its way of leaving at Ctrl-C is a `KeyboardInterrupt` again."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == Interrupted.exit_code:
            raise KeyboardInterrupt from None
        return stop.code
    return 0


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """A warning of ours as one line for users; others as Python shows them."""
    if issubclass(category, LatentWarning):
        warn(str(message))
    else:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)


def _say(error: LatentError) -> int:
    """Print the error and its way out on stderr, and return its exit code."""
    message, hint = error.in_shell()
    print_error(message)
    if hint:
        _line(f"hint:  {hint}")
    return error.exit_code


def print_error(text: str) -> None:
    """One line on stderr about what is wrong."""
    _line(f"error: {text}")


def note(text: str) -> None:
    """One line on stderr that the user may want to know."""
    _line(text)


def warn(text: str) -> None:
    """One line on stderr about something the user should look at."""
    _line(f"warning: {text}")


def _line(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def print_json(document: dict) -> None:
    """A command's result for machines: one JSON object on stdout, in ASCII where the terminal knows no more."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal's encoding, or a file name that is no text
        text = json.dumps(document, indent=2)
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def _rich(stderr: bool = False) -> Console:
    """The one way to rich: its console, to which every string is text: no markup, no emoji, no control characters."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(
            self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any
        ) -> Text:
            return Text(shown(text), style=style, justify=justify, overflow=overflow)

    console = Plain(stderr=stderr)
    if not console.is_terminal:
        console.width = 200
    return console


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A command's result for people, on stdout: numbers to the right; as wide as it needs to be."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = _rich()
    if title:
        console.print(title, style="bold", soft_wrap=True)
    console.print(table)


def print_facts(title: str, facts: dict[str, str]) -> None:
    """Name and value pairs, on stdout."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, value)
    console = _rich()
    console.print(title, style="bold")
    console.print(grid)


def show_picture(path: Path) -> None:
    """Show a PNG file on stdout if that is a terminal which says of itself that it takes pictures: kitty's protocol
    (kitty, Ghostty) or iTerm2's (iTerm2, WezTerm). Others get nothing: asking one may hang."""
    import base64

    if not sys.stdout.isatty():
        return
    kind, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    data = base64.standard_b64encode(path.read_bytes()).decode()
    if "kitty" in kind or "ghostty" in kind or "KITTY_WINDOW_ID" in os.environ:
        parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
        for number, part in enumerate(parts):
            first, more = "a=T,f=100," if number == 0 else "", int(number < len(parts) - 1)
            sys.stdout.write(f"\x1b_G{first}m={more};{part}\x1b\\")
    elif program in ("iTerm.app", "WezTerm"):
        sys.stdout.write(f"\x1b]1337;File=inline=1;width=100%:{data}\a")
    else:
        return
    sys.stdout.write("\n")


@contextmanager
def progress_bar(description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """A bar on stderr with rate, time left and facts; plain lines every few seconds when it is no terminal."""
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Said(ProgressColumn):
        def __init__(self, say: Callable[[Task, str], str], style: str) -> None:
            super().__init__()
            self.say, self.style = say, style

        def render(self, task: Task) -> Text:
            return Text(self.say(task, unit), self.style)

    bars = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        Said(_count, "progress.download"),
        Said(_rate, "progress.data.speed"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", style="dim", markup=False),
        console=_rich(stderr=True),
        refresh_per_second=4,
    )
    bars.add_task(shown(description), total=total, completed=done, facts="")
    task = bars.tasks[0]
    if not sys.stderr.isatty():
        yield _Lines(bars, task, unit)
        return
    with bars:
        yield _Bar(bars, task)


def _count(task: Task, unit: str) -> str:
    said = size if unit == BYTES else "{:.0f}".format
    return said(task.completed) if task.total is None else f"{said(task.completed)}/{said(task.total)}"


def _rate(task: Task, unit: str) -> str:
    """Per second, as rich measures it: over the last half minute. Nothing for what has hardly begun."""
    if not task.speed or (task.elapsed or 0) < 0.5:
        return ""
    if unit == BYTES:
        return f"{size(task.speed)}/s"
    return f"{task.speed:.0f} {unit}/s" if task.speed >= 10 else f"{task.speed:.1f} {unit}/s"


class _Bar:
    def __init__(self, bars: RichProgress, task: Task) -> None:
        self.bars, self.task = bars, task

    def advance(self, n: int, **facts: str) -> None:
        self.bars.update(self.task.id, advance=n, facts=shown(_join(facts)))

    def note(self, text: str) -> None:
        self.bars.console.print(text)


class _Lines:
    """The same as lines; rich's bars count and measure, and are never shown."""

    INTERVAL = 5.0  # seconds between lines

    def __init__(self, bars: RichProgress, task: Task, unit: str) -> None:
        self.bars, self.task, self.unit, self.shown = bars, task, unit, time.monotonic()

    def advance(self, n: int, **facts: str) -> None:
        self.bars.update(self.task.id, advance=n)
        now = time.monotonic()
        if now - self.shown < self.INTERVAL and not self.task.finished:
            return
        self.shown = now
        left = self.task.time_remaining
        parts = (_rate(self.task, self.unit), f"{duration(left)} left" if left else "", _join(facts))
        self.note(f"{self.task.description}: {_count(self.task, self.unit)} " + ", ".join(filter(None, parts)))

    def note(self, text: str) -> None:
        _line(text)


def _join(facts: dict[str, str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
