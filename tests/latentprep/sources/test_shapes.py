"""`shapes` is the same at each call, balanced, and beyond a linear classifier on pixels."""

import hashlib
import io

import numpy as np
from PIL import Image

from latentprep.sources import shapes
from latentprep.sources.source import Source, open_source


def test_rows_are_balanced_and_sorted():
    source = open_source("shapes")
    assert source.splits == ("train", "val")
    assert source.classes == shapes.CLASSES
    for split, size in shapes.SIZES.items():
        assert source.size(split) == len(set(source.keys(split))) == size
        assert np.bincount(source.labels(split)).tolist() == [size // 10] * 10
        assert source.keys(split) == sorted(source.keys(split))
    assert source.keys("val")[0] == "val/arrow/0000.jpg"


def test_the_seed_changes_nothing_and_bytes_repeat():
    one, two = open_source("shapes"), open_source("shapes", seed=5)
    assert one.fingerprint() == two.fingerprint()
    digests = [hashlib.sha256(source.read("train", 4321).data).hexdigest() for source in (one, two, one)]
    assert len(set(digests)) == 1
    assert one.read("train", 0).data != one.read("train", 1).data != one.read("val", 1).data


def test_images_are_jpegs_of_128_pixels():
    sample = open_source("shapes").read("val", 999)
    assert sample.key == "val/triangle/0999.jpg"
    assert sample.label == 9
    with Image.open(io.BytesIO(sample.data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))


def pixels(source: Source, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """32×32 RGB pixels f64 [N,3072] and labels [N] of evenly spaced samples."""
    source = source.take(count)
    rows = []
    for i in range(count):
        with Image.open(io.BytesIO(source.read(split, i).data)) as image:
            rows.append(np.asarray(image.reduce(4)).reshape(-1) / 255 - 0.5)
    return np.array(rows), np.array(source.labels(split))


def test_a_linear_classifier_on_pixels_fails():
    source = open_source("shapes")
    train, labels = pixels(source, "train", 600)
    val, truth = pixels(source, "val", 200)
    train, val = train - train.mean(0), val - train.mean(0)
    for strength in (1e2, 1e3, 1e4):  # ridge regression on one-hot labels, in its dual form
        weights = np.linalg.solve(train @ train.T + strength * np.eye(len(train)), np.eye(10)[labels] - 0.1)
        assert np.mean((val @ train.T @ weights).argmax(1) == truth) < 0.3
