"""Encode in one process, in several, and in a Ray cluster of three nodes on this machine: the same bytes, and how fast.

Every time is that of the whole call, the start of workers included. Imagenette and TAESD where LATENTPREP_ASSETS has
them, else `shapes` and the block DCT alone. A codec that sleeps shows what an engine costs, on however few cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import assets, record, spread
from latentprep.tuning import tune_process

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import clusters

SHARD_ROWS = 100
DELAY = 0.2  # seconds that the slow codec sleeps for each image


class Engines:
    """folder: for datasets. images: of each split."""

    def __init__(self, folder: Path, images: int) -> None:
        from latentprep.sources.source import open_source

        data = assets()
        self.folder = folder
        source = open_source("imagenette", data=data / "imagenette2-224.tar") if data else open_source("shapes")
        self.source = source.take(images)
        self.codecs = {"dct": None, "taesd": str(data / "taesd")} if data else {"dct": None}
        self.runs = 0

    def encode(self, codec: str, **options: Any) -> tuple[float, dict[str, str]]:
        """Seconds, and the SHA-256 of all files."""
        import latentprep
        from faults import digest

        self.runs += 1
        out, began = self.folder / str(self.runs), time.monotonic()
        latentprep.encode(self.source, **{"codec": codec, "out": out, "shard_rows": SHARD_ROWS, **options})
        return time.monotonic() - began, digest(out)

    def same_bytes(self, codec: str) -> dict:
        """One process, two, and three nodes with a core each."""
        weights = self.codecs[codec]
        images = sum(map(self.source.size, self.source.splits))
        with clusters.cluster() as nodes:
            asked: dict[str, dict] = {
                "local": {}, "cpu:2": {"devices": "cpu:2"}, "ray": {"engine": "ray", "address": nodes.address},
            }  # fmt: skip
            made = {name: self.encode(codec, weights=weights, **options) for name, options in asked.items()}
        first = made["local"][1]
        assert all(files == first for _, files in made.values()), f"{codec}: other bytes"
        rates = {f"{name}_images_per_s": round(images / seconds, 1) for name, (seconds, _) in made.items()}
        return {"images": images, "files": len(first), "identical": True, **rates}

    def slow_codec(self) -> dict:
        """Four workers against one, with a codec that sleeps."""
        codec = f"slow:delay={DELAY}"
        one, files = self.encode(codec)
        four, same = self.encode(codec, devices="cpu:4")
        with clusters.cluster((2, 1, 1)) as nodes:
            ray, there = self.encode(codec, engine="ray", address=nodes.address)
        assert files == same == there
        found = {"one_s": one, "cpu_4_s": four, "ray_4_s": ray, "cpu_4_speedup": one / four, "ray_4_speedup": one / ray}
        return {name: round(value, 2) for name, value in found.items()}

    def two_processes(self, codec: str, repeats: int) -> dict:
        """Two processes against one on the same cores, in turn. Calibration, the driver's alone, is spared."""
        out = self.folder / "quantizer"
        options = {"weights": self.codecs[codec], "quantizer": out}
        self.encode(codec, weights=self.codecs[codec], out=out, limit=64)
        pairs = [
            (self.encode(codec, **options)[0], self.encode(codec, devices="cpu:2", **options)[0])
            for _ in range(repeats)
        ]  # fmt: skip
        return {"one_s": spread([one for one, _ in pairs]), "rate_over_one": spread([one / two for one, two in pairs])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="a split, for all parts")
    parser.add_argument("--repeats", type=int, default=2, help="of the last part")
    options = parser.parse_args()
    tune_process()
    with tempfile.TemporaryDirectory() as folder, clusters.plugin():
        engines = Engines(Path(folder), options.images)
        result: dict = {"shard_rows": SHARD_ROWS, "delay_s": DELAY}
        for codec in engines.codecs:
            result[codec] = engines.same_bytes(codec)
            print(codec, result[codec], file=sys.stderr, flush=True)
        result["slow_codec"] = engines.slow_codec()
        print("slow_codec", result["slow_codec"], file=sys.stderr, flush=True)
        heavy = list(engines.codecs)[-1]
        result[f"{heavy}_two_processes"] = engines.two_processes(heavy, options.repeats)
        record("engines", result)


if __name__ == "__main__":
    main()
