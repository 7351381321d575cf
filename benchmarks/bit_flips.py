"""Flip single bits of a dataset, one at a time: which does `verify` catch, and which does ordinary reading?

Equally many in each kind of file, so that the small ones get their share. "named": the report names the very shard.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import latentprep
from common import assets, record
from latentprep.errors import DatasetError
from latentprep.format.manifest import SOURCE_FILES
from latentprep.sources.source import open_source

SHARDS = {  # kinds that belong to one shard
    "zarr": ("codes", "labels", "keys", "hashes", "record"),
    "wds": ("tar", "hashes", "record"),
    "parquet": ("parquet", "record"),
}
DERIVED = {"zarr": ("errors.jsonl", "zarr.json"), "wds": ("errors.jsonl",), "parquet": ("errors.jsonl",)}
WHOLE = (".tar", ".parquet", ".hashes")  # of a shard, by its name


def make(root: Path, store: str) -> None:
    """A small dataset of real images where there are some, two of its samples damaged, five shards."""
    folder = assets()
    spec = {"data": folder / "imagenette2-224.tar"} if folder else {}
    source = open_source("imagenette" if folder else "shapes", **spec).take(40)
    read, bad = source.read, {("train", 3), ("val", 17)}

    def damaged(split: str, row: int):
        sample = read(split, row)
        return type(sample)(sample.key, sample.data[: 99 if (split, row) in bad else None], sample.label)

    source.read = damaged  # type: ignore[method-assign]
    latentprep.encode(source, codec="dct", size=64, out=root, shard_rows=16, store=store)


def kind_of(path: Path) -> str:
    parts = path.parts
    if parts[0] == "records" or path.suffix in WHOLE:
        return path.suffix[1:] if path.suffix in WHOLE else "record"
    return path.name if len(parts) == 1 or "c" not in parts else parts[1]


def shard_of(path: Path) -> tuple[str, int] | None:
    parts = path.parts
    if parts[0] == "records" or path.suffix in WHOLE:
        split, index, *_ = path.stem.split("-")
        return split, int(index)
    return (parts[0], int(parts[3])) if "c" in parts else None


def outcome(root: Path, path: Path) -> str:
    """How `verify` takes the dataset as it is now: ``named`` or ``caught``; ``missed`` if it finds nothing."""
    try:
        found = latentprep.verify(root)
    except DatasetError:
        return "caught"
    if found.ok:
        return "missed"
    return "named" if shard_of(path) in {(problem.split, problem.index) for problem in found.problems} else "caught"


def reads(root: Path) -> bool:
    """Whether ordinary reading notices nothing."""
    try:
        dataset = latentprep.open(root)
        for split in dataset.splits:
            dataset.load(split)
    except DatasetError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=list(SHARDS), default="zarr")
    options = parser.parse_args()
    kinds = (*SHARDS[options.store], "manifest.json", *DERIVED[options.store])
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "data"
        make(root, options.store)
        files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
        kinds += (SOURCE_FILES,) if (root / SOURCE_FILES).is_file() else ()
        assert {kind_of(path) for path in files} == set(kinds), files
        assert latentprep.verify(root, deep=True).ok
        table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        missed = []
        start = time.monotonic()
        for number in range(options.flips):
            kind = kinds[number % len(kinds)]
            some = [path for path in files if kind_of(path) == kind]
            path = draw.choices(some, [(root / path).stat().st_size for path in some])[0]
            good = (root / path).read_bytes()
            bit = draw.randrange(8 * len(good))
            changed = bytearray(good)
            changed[bit // 8] ^= 1 << bit % 8
            (root / path).write_bytes(changed)
            found = outcome(root, path)
            table[kind].update(("flips", found, *(("noticed by reading",) if not reads(root) else ())))
            if found == "missed":
                missed.append([str(path), bit])
            (root / path).write_bytes(good)
        seconds = time.monotonic() - start
        assert latentprep.verify(root, deep=True).ok
        result = {
            "flips": options.flips,
            "missed": missed,
            "seconds": seconds,
            "files": len(files),
            "bytes": sum((root / path).stat().st_size for path in files),
            "table": {
                kind: {
                    "flips": counts["flips"],
                    "caught": counts["caught"] + counts["named"],
                    "shard named": counts["named"] if kind in SHARDS[options.store] else None,
                    "noticed by reading": counts["noticed by reading"],
                }
                for kind, counts in table.items()
            },
        }
        record("bit_flips" if options.store == "zarr" else f"bit_flips_{options.store}", result)
        assert not missed, f"{len(missed)} flips were not detected"


if __name__ == "__main__":
    main()
