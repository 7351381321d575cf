"""Commands and Python as a reader would run them, each in a process of its own that need not import everything first.

The processes are forked from a server that has imported torch and what the commands need.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import tempfile
from importlib import import_module
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [f"latentprep.{name}" for name in ("cli", "encoding.encode", "pictures.rd", "pictures.report")]
    + [f"latenttrain.{name}" for name in ("cli", "train", "comparison", "evaluation")]
    + ["torch._dynamo", "torch.utils.flop_counter", "matplotlib.figure", "matplotlib.backends.backend_agg"]
)


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run a line `latentprep …`, `latenttrain …` or else Python code in `folder`: (exit code, what it printed)."""
    with tempfile.NamedTemporaryFile() as log:
        process = _SERVER.Process(target=_child, args=(command, folder, log.name))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
        return process.exitcode if process.exitcode is not None else -1, Path(log.name).read_text()


def _child(command: str, folder: Path, log: str) -> None:
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    program = command.split(maxsplit=1)[0]
    if program in ("latentprep", "latenttrain"):
        sys.argv = shlex.split(command)
        import_module(f"{program}.cli").main()
    else:
        exec(compile(command, "documentation", "exec"), {"__name__": "__main__"})
