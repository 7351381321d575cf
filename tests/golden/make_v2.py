"""Made `v2`, `v2-wds`, `v2-parquet` and `v2.json`, once: tokens of 10 bits. Not run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import latentprep

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "plugin"))
from make import expected
from sounds import make_sounds


def main(sounds: Path) -> None:
    here = Path(__file__).parent
    make_sounds(sounds, train=3, val=1)
    (sounds / "train" / "low" / "001.wav").write_bytes(b"RIFF damaged")
    latentprep.encode(
        sounds, codec="loudness", views=2, seconds=0.2, shard_rows=4, out=here / "v2", max_error_fraction=0.5
    )
    for store in ("wds", "parquet"):
        latentprep.convert(here / "v2", out=here / f"v2-{store}", store=store)
    (here / "v2.json").write_text(json.dumps(expected(here / "v2", "train/low/001.wav")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
