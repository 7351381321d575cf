"""One rank of `launch`, as a program: ``python -m latenttrain.worker FOLDER``. Nothing heavy is imported at first."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from latentprep.errors import LatentError, system_fault
from latenttrain.launch import ERROR, PLAN, PROGRESS, RESULT, Reported, write_error


def main(folder: Path) -> int:
    """The exit code: the agent restarts all ranks if it is not 0."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the agent passes it on: the caller says that it came
    if (folder / ERROR).exists():  # restarted for nothing
        return 0
    from latentprep.cli.console import tune_process

    tune_process()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo warns where the machine's name has no address
    import torch

    from latentprep.format import open_dataset
    from latenttrain.ranks import LostRanks, joined
    from latenttrain.train import PlannedRun, carry_out

    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]  # not without the caller
    planned, dataset, devices = json.loads((folder / PLAN).read_text())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // len(devices)))
    with joined() as ranks:
        reported = Reported(folder / PROGRESS if ranks.is_main else Path(os.devnull))
        warnings.showwarning = reported.warn  # type: ignore[assignment]
        try:
            device = torch.device(devices[ranks.local_rank])
            result = carry_out(PlannedRun.from_json(planned), open_dataset(**dataset), lambda: device, ranks, reported)
        except LostRanks:
            return 1  # another one died; or it has said why it ended
        except Exception as error:
            if not isinstance(error, LatentError | OSError):
                traceback.print_exc()
            write_error(folder, ranks.own(_in_words(error)))
            return 1
        if ranks.is_main:
            (folder / RESULT).write_text(json.dumps(result.to_json()))
    return 0


def _in_words(error: Exception) -> LatentError:
    if isinstance(error, LatentError):
        return error
    return system_fault(error) if isinstance(error, OSError) else LatentError(f"{type(error).__name__}: {error}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
