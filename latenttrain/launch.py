"""`fit(devices=…)`: ranks on this machine, started, watched and restarted by torchrun's own agent.

    caller            the run, planned and checked once         FOLDER/plan.json
    each rank         python -m latenttrain.worker FOLDER       trains as under torchrun
    rank 0            what the caller shows and returns         FOLDER/progress.jsonl, FOLDER/result.json
    any rank          why the run cannot go on                  FOLDER/error.json

The agent restarts all ranks if one dies, and they go on after the last whole epoch. Where one ends with an error, which
it would meet again, the restarted ranks find that and end at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep import errors
from latentprep.errors import LatentError, LatentWarning, SystemFault, opt
from latentprep.progress import Progress, ProgressFactory

if TYPE_CHECKING:
    import torch

    from latentprep.format import LatentDataset
    from latenttrain.results import FitResult

RESTARTS = 3  # after so many the agent gives up
PLAN, PROGRESS, RESULT, ERROR = "plan.json", "progress.jsonl", "result.json", "error.json"
_POLL = 0.05  # seconds between looks at what rank 0 reports


def launch(
    planned: dict[str, Any], dataset: dict[str, Any], devices: Sequence[torch.device], progress: ProgressFactory
) -> FitResult:
    """Carry out a `PlannedRun`, in JSON, with one rank a device. dataset: of `reopening`.

    Raises what the ranks raise, and `SystemFault` if one died too often.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from latenttrain.results import FitResult

    with tempfile.TemporaryDirectory(prefix="latenttrain-") as name:
        folder = Path(name)
        (folder / PLAN).write_text(json.dumps([planned, dataset, list(map(str, devices))]))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=len(devices), max_restarts=RESTARTS, run_id=folder.name,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
            **_signals_to_handle(LaunchConfig),
        )  # fmt: skip
        died = ""
        with _relayed(folder / PROGRESS, progress), _quiet_agent():
            try:
                elastic_launch(config, sys.executable)("-m", "latenttrain.worker", str(folder))
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
                died = f"ranks died {1 + RESTARTS} times, at last rank {rank} with {how}"
        if (folder / ERROR).is_file():
            raise read_error(folder)
        if died:
            raise SystemFault(died, f"if memory is short, use fewer {opt('devices')}; {opt('resume', True)} goes on")
        return FitResult(**json.loads((folder / RESULT).read_text()))


def reopening(dataset: LatentDataset) -> dict[str, Any]:
    """The arguments of `open_dataset` with which another process opens the same."""
    arguments: dict[str, Any] = {"path": str(dataset.root), "verify": dataset.verify, "cache_bytes": 0}
    if dataset.cache is not None:
        arguments |= {"cache_dir": str(dataset.cache.folder), "cache_bytes": dataset.cache.limit}
    return arguments


def write_error(folder: Path, error: LatentError) -> None:
    """For the caller. The first error of a run counts: others may follow from it."""
    part = folder / f"{ERROR}.{os.getpid()}"
    part.write_text(json.dumps([type(error).__name__, *error.texts]))
    with contextlib.suppress(FileExistsError):
        os.link(part, folder / ERROR)
    part.unlink()


def read_error(folder: Path) -> LatentError:
    """Inverse of `write_error`."""
    name, message, hint = json.loads((folder / ERROR).read_text())
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LatentError)]
    return {kind.__name__: kind for kind in kinds}.get(name, LatentError)(message, hint)


class Reported:
    """A `ProgressFactory` that writes a file for the caller: a line of JSON for each call."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # ends the line of a rank that died while it wrote

    def _write(self, *values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    @contextlib.contextmanager
    def __call__(self, description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Reported]:
        self._write("begin", description, total, unit, done)
        yield self

    def advance(self, n: int, **facts: str) -> None:
        self._write("advance", n, facts)

    def note(self, text: str) -> None:
        self._write("note", text)

    def warn(self, message: Warning | str, *_: Any) -> None:
        """In place of `warnings.showwarning`."""
        self._write("warning", str(message))


@contextlib.contextmanager
def _relayed(path: Path, progress: ProgressFactory) -> Iterator[None]:
    """What rank 0 has `Reported` goes to `progress`, and its warnings are given here."""
    over = threading.Event()

    def relay() -> None:
        path.touch()
        with path.open(encoding="utf-8") as file, contextlib.ExitStack() as stack:
            bar: Progress | None = None
            text, ended = "", False
            while not ended:
                ended = over.wait(_POLL)
                *lines, text = (text + file.read()).split("\n")
                for line in lines:
                    try:
                        kind, *values = json.loads(line)
                    except ValueError:  # its writer died
                        continue
                    if kind == "begin":
                        stack.close()
                        bar = stack.enter_context(progress(*values))
                    elif kind == "warning":
                        warnings.warn(str(values[0]), LatentWarning, stacklevel=2)
                    elif bar is not None:
                        bar.advance(values[0], **values[1]) if kind == "advance" else bar.note(*values)

    with ThreadPoolExecutor(1, "relay-progress") as pool:
        relaying = pool.submit(relay)
        try:
            yield
        finally:
            over.set()
        relaying.result()


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent logs nothing, and a signal that it takes is handled as before, once all ranks have ended."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    log, taken = logging.getLogger("torch.distributed.elastic"), None
    before = {number: signal.getsignal(number) for number in _handled()}
    handler, propagates = logging.NullHandler(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    except SignalException as error:
        taken = error.sigval
    finally:
        log.removeHandler(handler)
        log.propagate = propagates
        if threading.current_thread() is threading.main_thread():
            for number, handle in before.items():
                signal.signal(number, handle)
    if taken is not None:
        signal.raise_signal(taken)
        raise KeyboardInterrupt  # if its handler did nothing


def _signals_to_handle(config: Any) -> dict[str, Any]:
    """Those that are not ignored: nohup ignores SIGHUP, and the agent would not. Older versions of torch take none."""
    if "signals_to_handle" not in config.__dataclass_fields__:
        return {}
    return {"signals_to_handle": ",".join(n.name for n in _handled() if signal.getsignal(n) != signal.SIG_IGN)}


def _handled() -> list[signal.Signals]:
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
