"""Ten thousand JPEGs, a thousand of them damaged: the rest is encoded, the bad ones are reported, memory stays flat.

Damage: flipped bits, cuts, splices with another file, zeroed ranges, broken headers. Not every such file is beyond
reading: a flipped bit in the entropy-coded data may only change colours. "Bad" is what our decoder refuses, judged for
each file alone, outside the encode; Pillow's opinion is counted beside it. A broken header may claim a large picture,
and each thread keeps the memory of the largest that it met: rounds over the same files show that it ends there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import latentprep
from common import assets, record
from latentprep.sources.images import BadImage, load_views
from latentprep.sources.source import open_source

SIZE = 64
KINDS = ("bit flips", "cut", "spliced", "zeroed range", "header")


def damaged(data: bytes, other: bytes, kind: str, draw: random.Random) -> bytes:
    changed = bytearray(data)
    at = draw.randrange(len(data) // 8, len(data))
    if kind == "bit flips":
        for _ in range(draw.randrange(1, 9)):
            bit = draw.randrange(8 * len(data))
            changed[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        del changed[draw.randrange(len(data)) :]
    elif kind == "spliced":
        changed[at:] = other[draw.randrange(len(other)) :]
    elif kind == "zeroed range":
        length = min(len(data) - at, draw.randrange(16, 4096))
        changed[at : at + length] = bytes(length)
    else:
        for _ in range(draw.randrange(1, 9)):
            changed[draw.randrange(min(600, len(data)))] = draw.randrange(256)
    return bytes(changed)


def make(root: Path, count: int, bad: int, draw: random.Random) -> dict[str, str]:
    """Write the source; key -> kind of damage."""
    folder = assets()
    source = open_source("imagenette", data=folder / "imagenette2-224.tar") if folder else open_source("shapes")
    every = [(split, i) for split in source.splits for i in range(source.size(split))]
    assert len(every) >= count, f"the source has {len(every)} images"
    places = [every[k * len(every) // count] for k in range(count)]
    victims = {place: KINDS[n % len(KINDS)] for n, place in enumerate(draw.sample(places, bad))}
    kinds = {}
    for n, (split, i) in enumerate(places):
        sample = source.read(split, i)
        key = f"{'val' if n % 5 == 0 else 'train'}/{sample.label:02}/{n:05}.jpg"
        data = sample.data
        if (split, i) in victims:
            kinds[key] = victims[split, i]
            data = damaged(data, source.read(*draw.choice(places)).data, kinds[key], draw)
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return kinds


def ours(data: bytes) -> str | None:
    try:
        load_views(data, SIZE)
    except BadImage as error:
        return str(error)
    return None


def pillows(data: bytes) -> bool:
    """Whether Pillow, which stops at the first truncation, refuses it too."""
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:
        return True
    return False


def encode(source: Path, out: Path) -> tuple[int, list[float]]:
    """`latentprep encode` as a program: its exit code, and its resident memory in MiB, ten times a second."""
    command = [sys.executable, "-m", "latentprep", "encode", str(source), "--codec", "dct", "--size", str(SIZE)]
    command += ["--out", str(out), "--shard-rows", "256", "--max-error-fraction", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory: list[float] = []

    def watch() -> None:
        pages = Path(f"/proc/{process.pid}/statm")
        while process.poll() is None:
            try:
                memory.append(int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20))
            except (OSError, IndexError):
                return
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    watcher.join()
    return process.returncode, memory


def rounds(paths: list[Path], count: int) -> list[float]:
    """Decode the files again and again, by as many threads as an encode has: resident MiB after each round."""
    pages, sizes = Path("/proc/self/statm"), []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in range(count):
            for _ in pool.map(lambda path: ours(path.read_bytes()), paths):
                pass
            sizes.append(round(int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20), 1))
    return sizes


def quarters(memory: list[float]) -> list[float]:
    """The most in each quarter of the run."""
    return [round(max(part), 1) for part in np.array_split(np.array(memory), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--damaged", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, clean = Path(scratch) / "damaged", Path(scratch) / "clean"
        kinds = make(root, options.images, options.damaged, random.Random(options.seed))
        make(clean, options.images, 0, random.Random(options.seed))
        reasons = {key: ours((root / key).read_bytes()) for key in kinds}
        bad = {key for key, reason in reasons.items() if reason}
        code, memory = encode(root, Path(scratch) / "out")
        clean_code, clean_memory = encode(clean, Path(scratch) / "clean-out")
        dataset = latentprep.open(Path(scratch) / "out")
        lines = [json.loads(line) for line in (dataset.root / "errors.jsonl").read_text().splitlines()]
        encoded = sum(len(dataset.load(split)) for split in dataset.splits)
        again = latentprep.verify(dataset.root, deep=True, source=open_source(root), samples=options.images // 4)
        assert again.compared is not None
        by_kind = {
            kind: {
                "files": sum(k == kind for k in kinds.values()),
                "bad": sum(k == kind and key in bad for key, k in kinds.items()),
                "pillow refuses": sum(k == kind and pillows((root / key).read_bytes()) for key, k in kinds.items()),
            }
            for kind in KINDS
        }
        result = {
            "images": options.images,
            "damaged": options.damaged,
            "bad": len(bad),
            "reported": len(lines),
            "reported_are_the_bad": {line["key"] for line in lines} == bad,
            "encoded": encoded,
            "encoded_again_for_comparison": again.compared.images,
            "codes_that_differ": again.compared.differing,
            "exit_code": code,
            "exit_code_undamaged": clean_code,
            "memory_mib_by_quarter": quarters(memory),
            "memory_mib_by_quarter_undamaged": quarters(clean_memory),
            "memory_mib_by_round_of_decoding_the_damaged": rounds([root / key for key in kinds], 12),
            "by_kind": by_kind,
            "reasons": dict(Counter(reason.split(":")[0][:60] for reason in reasons.values() if reason).most_common(8)),
        }
        record("damaged", result)
        assert code == 3
        assert clean_code == 0
        assert {line["key"] for line in lines} == bad
        assert encoded == options.images - len(bad)
        assert again.ok
        assert again.compared.differing == 0


if __name__ == "__main__":
    main()
