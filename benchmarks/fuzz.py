"""Mutate good inputs of every parser of outside bytes, a million times: nothing but our own errors, no hang, no bomb.

`tests/fuzz_targets.py` has the targets. Each runs in a process of its own, with limits on its memory and on the time of
one execution; the random numbers are seeded, so a crash can be had again. `--atheris TARGET` lets atheris (`pip install
atheris`) choose the mutations by coverage instead, until a crash or `--executions`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from common import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
if "--atheris" in sys.argv:  # which must see the modules as they are imported
    import atheris

    with atheris.instrument_imports(include=["latentprep", "latenttrain", "tarfile"]):
        from fuzz_targets import make_targets, mutate
else:
    from fuzz_targets import make_targets, mutate

# Of a hundred executions. The cheap parsers get most; `dataset` is `verify` and `load` of a whole dataset.
SHARES = {
    "manifest": 16.0,
    "record": 20.0,
    "codes": 14.0,
    "labels": 5.0,
    "hashes": 2.0,
    "keys": 10.0,
    "tar shard": 4.0,
    "image": 9.0,
    "tar": 3.0,
    "tar in gzip": 1.0,
    "gzip": 2.0,
    "parquet": 2.0,
    "parquet shard": 2.0,
    "table": 2.0,
    "checkpoint": 4.0,
    "config": 2.5,
    "latents": 1.0,
    "dataset": 0.5,
}
MEMORY = 6 << 30  # bytes of address space beyond what the start takes
SECONDS = 20  # for one execution; the machine is shared


def fuzz(name: str, count: int, seed: int, results: Any) -> None:
    """Run one target; puts its counts. In a process of its own."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes to it

    def hang(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    draw, crashes, refused, slowest = random.Random(f"{seed} {name}"), Counter[str](), 0, 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        target = make_targets(Path(folder))[name]
        start_pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (start_pages + MEMORY, start_pages + MEMORY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        for _ in range(count):
            data, began = mutate(target, draw), time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                refused += target(data)
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                crashes[f"{type(error).__name__}: {str(error)[:100]} at {Path(last.filename).name}:{last.lineno}"] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - began)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results.put(
            {
                "executions": count,
                "refused": refused,
                "crashes": dict(crashes),
                "seconds": round(time.monotonic() - start, 1),
                "slowest_ms": round(1000 * slowest),
                "peak_memory_grew_mib": (after - before) >> 10,
            }
        )


def by_coverage(name: str, count: int) -> None:
    """Hand a target to atheris, which stops at the first crash."""
    with tempfile.TemporaryDirectory() as folder:
        target = make_targets(Path(folder))[name]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(target.seeds):
            (corpus / str(i)).write_bytes(seed)
        limits = [f"-runs={count}", "-rss_limit_mb=6000", f"-timeout={SECONDS}", "-max_len=20000", str(corpus)]
        atheris.Setup([sys.argv[0], *limits], lambda data: target(data))
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", metavar="TARGET", choices=SHARES)
    options = parser.parse_args()
    if options.atheris:
        by_coverage(options.atheris, options.executions)
        return
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name, share in SHARES.items():
        results = spawn.SimpleQueue()
        count = -int(-options.executions * share // 100)
        process = spawn.Process(target=fuzz, args=(name, count, options.seed, results))
        process.start()
        process.join()
        found[name] = results.get() if process.exitcode == 0 else {"executions": 0, "died": process.exitcode}
        print(name, found[name], file=sys.stderr, flush=True)
    record(
        "fuzz",
        {
            "seed": options.seed,
            "executions": sum(target["executions"] for target in found.values()),
            "crashes": sum(sum(target.get("crashes", {"died": 1}).values()) for target in found.values()),
            "targets": found,
        },
    )


if __name__ == "__main__":
    main()
