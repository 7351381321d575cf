"""A command line run in this process, which spares it the seconds that Python and PyTorch take to start."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock


def command(
    program: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run([program, …], capture_output=True, text=True)`` would give.

    Standard output and error are files, so no terminal. What only a process of its own shows has to be tested in one:
    what is imported, signals, streams that are closed, what is written as the interpreter ends.
    """
    main = importlib.import_module(f"{program}.cli").main
    streams, before = (sys.stdout, sys.stderr), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
        mock.patch.dict(os.environ, {} if env is None else env, clear=env is not None),
        mock.patch.object(os, "_exit", sys.exit),  # after a signal; these tests' own process goes on
        warnings.catch_warnings(),
    ):
        try:
            for number, file in enumerate((out, err), 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", line_buffering=True)
                for number in (1, 2)
            )
            os.chdir(cwd or before)
            code = _exit_code(main)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = streams
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)
            os.chdir(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        written = [_text(file) for file in (out, err)]
    return subprocess.CompletedProcess([program, *map(str, arguments)], code, *written)


def at_hub(endpoint: str, cache: Path) -> AbstractContextManager[object]:
    """What HF_ENDPOINT and HF_HUB_CACHE would do, which the hub's client reads as it is imported; and it is online."""
    from huggingface_hub import constants

    return mock.patch.multiple(
        constants,
        ENDPOINT=endpoint,
        HUGGINGFACE_CO_URL_TEMPLATE=endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_CACHE=str(cache),
        HF_HUB_OFFLINE=False,
        HF_HUB_DISABLE_XET=True,
    )


def _exit_code(main: object) -> int:
    try:
        main()  # type: ignore[operator]
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _text(file: io.BufferedRandom) -> str:
    file.seek(0)
    return file.read().decode()
