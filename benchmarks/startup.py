"""How long `--help` takes: nothing heavy may be imported for it. Python's own start is the baseline."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from common import record, spread


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    programs = Path(sys.executable).parent
    result = {"python -c pass": spread([seconds([sys.executable, "-c", "pass"]) for _ in range(7)])}
    for name in ("latentprep", "latenttrain"):
        result[f"{name} --help"] = spread([seconds([str(programs / name), "--help"]) for _ in range(7)])
    record("startup", {"seconds": result})


if __name__ == "__main__":
    main()
