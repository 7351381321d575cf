"""The images that a codec is trained on, in memory, and random crops of them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentprep.errors import SourceError
from latentprep.progress import ProgressFactory
from latentprep.sources.images import BadImage, load_views
from latentprep.sources.source import Source

MOST_BYTES = 2 << 30  # of images in memory; of a larger source, as many as fit are spread over it
_READERS = 4


@dataclass(frozen=True)
class Crops:
    """Square crops of images, u8 [n,S,S,3], each of `side` pixels: at a random place and of a random scale, from the
    whole image, shrunk, to its own pixels; half of them mirrored."""

    images: np.ndarray
    side: int
    batch: int

    def draw(self, seed: int, step: int) -> tuple[np.ndarray, np.random.Generator]:
        """u8 [B,3,side,side], and the generator for what else is random in this step; (seed, step) decides both."""
        random = np.random.default_rng(np.random.SeedSequence([seed, step]))
        size = self.images.shape[1]
        crops = np.empty((self.batch, 3, self.side, self.side), np.uint8)
        rows = random.integers(0, len(self.images), self.batch)
        scales, places, mirrors = random.random(self.batch), random.random((self.batch, 2)), random.random(self.batch)
        for at, row in enumerate(rows):
            region = self.side * (size / self.side) ** scales[at]
            left, top = places[at] * (size - region)
            image = Image.fromarray(self.images[row])
            box = (left, top, left + region, top + region)
            crop = np.asarray(image.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box))
            crops[at] = (crop[:, ::-1] if mirrors[at] < 0.5 else crop).transpose(2, 0, 1)
        return crops, random


def load_images(source: Source, split: str, size: int, progress: ProgressFactory) -> np.ndarray:
    """The canonical views of a split, or of as many of its samples as fit in memory: u8 [n,S,S,3].

    Raises `SourceError` if more than a tenth cannot be read.
    """
    most = max(1, MOST_BYTES // (3 * size * size))
    if source.size(split) > most:
        source = source.take(most)
    count = source.size(split)
    images = np.empty((count, size, size, 3), np.uint8)

    def one(row: int) -> str | None:
        try:
            load_views(source.read(split, row).data, size, out=images[row : row + 1])
        except BadImage as error:
            return f"{source.keys(split)[row]}: {error}"
        return None

    problems, good = [], np.ones(count, bool)
    with ThreadPoolExecutor(_READERS) as pool, progress("reading", count, "images", 0) as bar:
        for row, problem in enumerate(pool.map(one, range(count))):
            if problem is not None:
                good[row] = False
                problems.append(problem)
            bar.advance(1)
        if len(problems) > count / 10 or len(problems) == count:
            raise SourceError(
                f"{len(problems)} of {count} images of split '{split}' cannot be read; the first is {problems[0]}",
                "remove or replace them",
            )
        if problems:
            bar.note(f"warning: {len(problems)} of {count} images cannot be read; the first is {problems[0]}")
    return images if good.all() else images[good]


def crop_side(size: int, factor: int) -> int:
    """Pixels per side of a crop: half the image, but at least 64 where it has them, in whole cells."""
    return min(size, max(64, size // 2)) // math.lcm(factor, 8) * math.lcm(factor, 8) or factor
