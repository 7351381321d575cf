"""What stands between a program and its terminal: output streams that do not break it, signals that end it in order."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from latentprep.errors import SystemFault

PIPE = 128 + 13  # exit code of a program whose reader went away, as shells give it

# Signs of ours for terminals whose encoding lacks them.
_PLAIN = {"×": "x", "…": "...", "→": "->", "·": "-", "²": "^2", "√": "sqrt ", "†": "+", "±": "+-", "−": "-", "•": "*"}
_PLAIN |= {"α": "a", "β": "b", "γ": "g"}


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of encoders: a sign's like, or its escape, so that nothing is lost and nothing fails."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in part), error.end


def guard_streams() -> None:
    """Make this process's stdout and stderr safe to write to. Raises `SystemFault` if stdout is closed.

    No text is beyond their encoding. What cannot be written to stderr is dropped, since work is worth more than word of
    it. What cannot be written to stdout is a `SystemFault`, and nothing more where only the reader went away (`PIPE`).
    """
    codecs.register_error("latentprep.plain", _plain)
    if os.name != "posix":
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="latentprep.plain")
        return
    closed = sys.stdout is None
    for descriptor in range(3):  # else the next file to be opened would be taken for one of these
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    sys.stderr = _wrapped(sys.stderr, _Lossy(2, "w", closefd=False))
    sys.stdout = _wrapped(sys.stdout, _Results(1, "w", closefd=False))
    if closed:
        raise SystemFault("standard output is closed, so there is nowhere to print to", "send it to a file: > FILE")


def _wrapped(old: Any, raw: io.FileIO) -> io.TextIOWrapper:
    if old is not None:
        with contextlib.suppress(OSError, ValueError):
            old.flush()
    lines = raw.isatty() or raw.fileno() == 2
    encoding = getattr(old, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "latentprep.plain", line_buffering=lines)


class _Lossy(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


class _Results(io.FileIO):
    failed = False

    def write(self, data: Any) -> int:
        if self.failed:  # said already; what is left in buffers goes nowhere
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if error.errno == errno.EPIPE:
                raise SystemExit(PIPE) from None
            reason = (error.strerror or str(error)).lower()
            raise SystemFault(f"cannot write to standard output: {reason}", "send it elsewhere: > FILE") from error


class Ended:
    """Which signal ended the work, if one did."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGINT)


@contextlib.contextmanager
def orderly_signals() -> Iterator[Ended]:
    """SIGINT, SIGTERM and SIGHUP raise `KeyboardInterrupt` here, each but the ones that are ignored (as nohup does).

    The first one lets the work end in order; a second one ends the process at once, even process 1 of a container,
    which the system protects from signals that it does not handle.
    """
    ended = Ended()
    at_once = signal.SIG_DFL if os.getpid() != 1 else lambda number, frame: os._exit(128 + number)
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    known = [s for name in names if (s := getattr(signal, name, None)) and signal.getsignal(s) != signal.SIG_IGN]

    def handle(number: int, frame: object) -> None:
        ended.signal = number
        for each in known:
            signal.signal(each, at_once)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, handle) for each in known}
    try:
        yield ended
    finally:
        if ended.signal is None:
            for each, handler in before.items():
                signal.signal(each, handler)
