"""The terminal face that both command lines share: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.cli.terminal import guard_streams, orderly_signals
from latentprep.errors import Interrupted, LatentError, LatentWarning, SystemFault, system_fault
from latentprep.progress import Progress
from latentprep.text import duration, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def run(app: Any) -> None:
    """Run a Typer `app` as a program: a user's mistake is one or two lines on stderr and its exit code."""
    with orderly_signals() as ended:
        try:
            guard_streams()
            tune_process()
            warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which we report ourselves
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            try:
                code = _exit_code(app)
            except KeyboardInterrupt:  # before there was anything to lose
                raise Interrupted("interrupted", "run the same command again to go on") from None
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


def tune_process() -> None:
    """Make this process good at CPU networks. Call it before torch is imported; programs do, libraries must not.

    Idle OpenMP threads that spin for long take the cores from those that decode, and from everybody else: on two shared
    cores, training ran 20 times slower. Those that sleep at once wake late: 1.4 times slower on two cores of its own.
    So they spin for some tens of microseconds. And glibc gives large blocks back to the system whenever they are freed,
    only to get them again as pages to be zeroed: keeping them makes TAESD's encoder 1.4 times as fast.
    """
    import ctypes

    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes


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
def progress_bar(description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """A bar on stderr with rate, time left and facts; plain lines every few seconds when it is no terminal."""
    if not sys.stderr.isatty():
        yield _Lines(description, total, unit, done)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    with RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", style="dim", markup=False),
        console=_rich(stderr=True),
        refresh_per_second=4,
    ) as bar:
        task = bar.add_task(shown(description), total=total, completed=done, rate="", facts="")
        yield _Bar(bar, task, unit)


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """``report(description, done_bytes, total_bytes)``: a bar in MiB for each description, and none if never called."""
    with ExitStack() as stack:
        shown: dict[str, tuple[Progress, int]] = {}

        def report(description: str, done: int, total: int | None) -> None:
            if description not in shown:
                stack.close()
                shown[description] = stack.enter_context(progress_bar(description, (total or 0) >> 20, "MiB")), 0
            bar, before = shown[description]
            bar.advance((done >> 20) - before)
            shown[description] = bar, done >> 20

        yield report


class _Rate:
    """Items a second since the first report, which is where slow starts end."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.count = 0

    def add(self, n: int) -> None:
        if self.start is None:
            self.start = time.monotonic()
        else:
            self.count += n

    def per_second(self) -> float | None:
        elapsed = time.monotonic() - (self.start or time.monotonic())
        return self.count / elapsed if self.count and elapsed > 0.5 else None

    def text(self, unit: str) -> str:
        rate = self.per_second()
        return "" if rate is None else f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


class _Bar:
    def __init__(self, bar: Any, task: Any, unit: str) -> None:
        self.bar, self.task, self.unit, self.rate = bar, task, unit, _Rate()

    def advance(self, n: int, **facts: str) -> None:
        self.rate.add(n)
        self.bar.update(self.task, advance=n, rate=self.rate.text(self.unit), facts=shown(_join(facts)))

    def note(self, text: str) -> None:
        self.bar.console.print(text)


class _Lines:
    INTERVAL = 5.0  # seconds between lines

    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.rate, self.shown = _Rate(), time.monotonic()

    def advance(self, n: int, **facts: str) -> None:
        self.rate.add(n)
        self.done += n
        now = time.monotonic()
        if now - self.shown < self.INTERVAL and self.done < self.total:
            return
        self.shown = now
        rate = self.rate.per_second()
        left = f"{duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        parts = (self.rate.text(self.unit), left, _join(facts))
        self.note(f"{self.description}: {self.done}/{self.total} " + ", ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        _line(text)


def _join(facts: dict[str, str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
