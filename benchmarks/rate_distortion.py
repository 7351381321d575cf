"""Rate against distortion on Imagenette: codecs at every number of bits beside JPEG, WebP and AVIF.

Draws `docs/rd.png` from 200 images of val, and keeps the figures. Needs LATENTPREP_ASSETS. The side-by-side shows
photographs, so it stays in the folder given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import latentprep
from common import assets, record
from latentprep.cli.console import progress_bar, tune_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("rd-imagenette"))
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    folder = assets()
    if folder is None:
        sys.exit("LATENTPREP_ASSETS does not name the folder of real images and weights")
    tune_process()
    start, before = time.monotonic(), os.times()
    codecs = ["learned", "dct", f"taesd3:weights={folder / 'taesd3'}", f"taesd:weights={folder / 'taesd'}"]
    source = str(folder / "imagenette2-224.tar")
    latentprep.rd(source, codecs=codecs, images=given.images, out=given.out, progress=progress_bar)
    after = os.times()
    found = json.loads((given.out / "rd.json").read_text())
    spent = {"wall": time.monotonic() - start, "cpu": after.user + after.system - before.user - before.system}
    kept = {name: found[name] for name in ("split", "images", "size", "seed", "points", "skipped", "seconds")}
    record("rate_distortion", {"source": "Imagenette", "total_seconds": spent, **kept})
    shutil.copy(given.out / "rd.png", Path(__file__).parent.parent / "docs" / "rd.png")


if __name__ == "__main__":
    main()
