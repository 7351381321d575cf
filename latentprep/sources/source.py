"""Where labelled images or sounds come from: a folder, archives, Parquet files or a named dataset, behind `Source`.

A source is an index, made without decoding any image: for each split, rows of (key, label, place), sorted by key. A key
is the image's path below the folder with the splits (``train/n01440764/x.JPEG``), or below the folder with the classes
(``n01440764/x.JPEG``); in WebDataset tars it is the sample's base name. Outer folders (``imagenette2-224/train/…``) do
not count, so a folder, its tar, its .tgz and its .zip have the same rows and fingerprint.

An image is a file with an image's name (.jpg, .png, …), or any other file that begins like an image. A damaged file
with an image's name keeps its row, so that encoding reports it. `left_out` counts every image that is in no row. All
this holds for sounds (.wav, .flac, .ogg, .mp3, …), too. Of a mixture, the medium with more files is the source's.

Classes are the folders below ``train``, or the distinct texts of WebDataset's ``.cls`` members, sorted; by number if
all are numbers. A class without images in ``train`` is an error; without images in ``val`` or ``test``, it is not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from latentprep.errors import SourceError, UsageError, check_number, check_whole, opt
from latentprep.format.manifest import INVALID_LABEL
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.finding import Load, find
from latentprep.sources.kinds import IMAGES
from latentprep.sources.layouts import LAYOUTS, Columns, Found, Tree
from latentprep.sources.listing import HIDDEN, NOT_NAMED, NOUNS, left_out_line
from latentprep.storage.places import path_of

_STATTERS = 8  # threads that ask for files' sizes and times: on a network, each answer takes a while
_STATTED = 256  # files that a thread asks for at a time
VAL_FRACTION = 0.1  # of each class, taken from train if a source has no val split


@dataclass(frozen=True)
class Sample:
    """One image or sound of a source: its key, the bytes of its file, and its class as an index."""

    key: str
    data: bytes
    label: int


class Row(NamedTuple):
    key: str
    label: int
    at: Any  # where the bytes are, for the source's `load`


class Source:
    """An index of labelled images or sounds and a way to read one. Can be pickled, and read from many threads at once.

    left_out: what is in no row, and how many: "images in docs/ (not a known split)", "links in a circle". The rows and
    the entries that begin with "images" add up to all image files; `take` does not change it.
    notes: what else a user should know about how the source is read.
    media: what its samples are, ``images`` or ``sound``.
    identity: for Parquet files, a SHA-256 (hex) of their sizes and footers; it is part of the fingerprint.
    """

    def __init__(
        self,
        spec: str,
        classes: tuple[str, ...],
        rows: dict[str, list[Row]],
        load: Callable[[Any], bytes],
        left_out: Mapping[str, int] | None = None,
        notes: tuple[str, ...] = (),
        identity: str = "",
        media: str = IMAGES,
    ) -> None:
        self.spec = spec
        self.classes = classes
        self.splits = tuple(rows)
        self._rows = rows
        self._load = load
        self.left_out = dict(left_out or {})
        self.notes = notes
        self.identity = identity
        self.media = media

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.size(split)}" for split in self.splits)
        return f"Source({self.spec!r}: {len(self.classes)} classes, {sizes})"

    def _split(self, split: str) -> list[Row]:
        if split not in self._rows:
            raise UsageError(f"{self.spec} has no split {split!r}", f"use one of {', '.join(self.splits)}")
        return self._rows[split]

    def size(self, split: str) -> int:
        """Samples in a split. Like all methods below, raises UsageError for a split that the source does not have."""
        return len(self._split(split))

    def keys(self, split: str) -> list[str]:
        """The samples' keys, unique within the split; sorted, except that Parquet files keep their order."""
        return [row.key for row in self._split(split)]

    def labels(self, split: str) -> list[int]:
        """The samples' classes, as indices into `classes`; -1 for a sample without a label, which cannot be read."""
        return [row.label for row in self._split(split)]

    def read(self, split: str, i: int) -> Sample:
        """Sample ``i`` of a split. Raises OSError or SourceError if its file or archive is gone or has changed, or it
        has no label."""
        row = self._split(split)[i]
        if row.label < 0:
            raise SourceError(f"{row.key} has no label")
        try:
            return Sample(row.key, self._load(row.at), row.label)
        except SourceError as error:
            raise SourceError(f"{row.key}: {error.texts[0]}", error.texts[1]) from error

    def stat(self, split: str) -> list[tuple[int, int]] | None:
        """Each sample's size in bytes, and when its file (or archive) last changed, in ns since 1970. (-1, -1) for a
        file that is gone, which reading will report. None if samples are not in files."""
        rows = self._split(split)
        runs = [rows[first : first + _STATTED] for first in range(0, len(rows), _STATTED)]  # a task of the pool is 1 KB
        with ThreadPoolExecutor(_STATTERS) as pool:
            stats = [one for some in pool.map(lambda run: [_stat(row.at) for row in run], runs) for one in some]
        return None if any(one is None for one in stats) else [one for one in stats if one is not None]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of classes, splits, keys and labels, and of `identity`. To resume, it must be unchanged."""
        whole = fingerprint(self.classes, {split: [row[:2] for row in rows] for split, rows in self._rows.items()})
        return hashlib.sha256(f"{whole} {self.identity}".encode()).hexdigest() if self.identity else whole

    def take(self, limit: int) -> Source:
        """The source with at most ``limit`` samples per split, evenly spaced over its classes and keys.

        Raises UsageError if ``limit`` is below 1.
        """
        check_whole("limit", limit, 1, hint=f"leave {opt('limit')} out for all samples")
        rows = {split: _spread(rows, limit) for split, rows in self._rows.items()}
        return Source(self.spec, self.classes, rows, self._load, self.left_out, self.notes, self.identity, self.media)

    def only(self, rows: Mapping[str, range]) -> Source:
        """The source with these splits, and these rows of each, alone."""
        some = {split: self._split(split)[run.start : run.stop] for split, run in rows.items()}
        return Source(self.spec, self.classes, some, self._load, self.left_out, self.notes, self.identity, self.media)


def _stat(at: Any) -> tuple[int, int] | None:
    """Size and last change of the file at a path, or of the member at (archive, offset, size)."""
    try:
        if isinstance(at, str | Path):
            stat = Path(at).stat()
            return stat.st_size, stat.st_mtime_ns
        if isinstance(at, tuple) and len(at) == 3 and hasattr(at[0], "path"):
            return int(at[2]), Path(at[0].path).stat().st_mtime_ns
    except OSError:
        return -1, -1
    return None


def fingerprint(classes: Sequence[str], splits: Mapping[str, Iterable[tuple[str, int]]]) -> str:
    """SHA-256 (hex) of the class names, the split names, and the (key, label) of every row."""
    digest = hashlib.sha256(json.dumps([list(classes), list(splits)]).encode())
    for rows in splits.values():
        digest.update(json.dumps(list(rows)).encode())
    return digest.hexdigest()


def _spread(rows: list[Row], limit: int) -> list[Row]:
    if limit >= len(rows):
        return rows
    by_class = sorted(range(len(rows)), key=lambda i: (rows[i].label, rows[i].key))
    return [rows[i] for i in sorted(by_class[(2 * k + 1) * len(rows) // (2 * limit)] for k in range(limit))]


def open_source(
    spec: str | Path | Source,
    *,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    cache: Path | None = None,
    out: str | Path | None = None,
    progress: ProgressFactory = silent,
) -> Source:
    """Open a source of labelled images. A source that is already open is returned as it is.

    ``spec`` is a named dataset (``shapes``, ``imagenette-160``, …), a folder, a .tar, .tar.gz or .zip of such a folder,
    or several of these: WebDataset shards, or one archive per split or class; in a folder, tars also in a tar, or as a
    brace pattern ``train-{000000..000012}.tar``. A named dataset takes precedence over a folder; write ``./shapes``
    for the folder.
    Or it is Parquet files, which need the extra ``parquet``: one, a folder of them, a pattern ``data/train-*.parquet``,
    or any of these at ``s3://…``, ``gs://…``, ``https://…`` (no folder) or ``hf://datasets/NAME[/CONFIG][@REVISION]``.

    ``data``: a local copy of the named dataset (folder or archive), used instead of a download to ``cache``.
    ``labels``: a table of labels for the images of a folder or archive, CSV, TSV, JSON lines or Parquet, with columns
    ``file_name``, ``label`` and, if there are several splits, ``split``. Without one, ``metadata.csv`` or
    ``metadata.jsonl`` beside the images is read, if it has labels.
    ``image_column``, ``label_column``: of Parquet files, where the features that ``datasets`` writes do not tell them,
    and of tables of labels.
    ``val_fraction``: the share of each class, in [0, 1), to move from train to val if there is no val split (0.1 if
    None; 0 for no val split). ``seed`` and the keys alone decide which samples.
    ``out``: a folder that is being written; it is left out if it is inside the source.
    ``progress`` reports downloads and long scans of archives, in bytes.

    Raises SourceError for anything wrong with the images, their folders, archives or download; UsageError for a
    parameter that does not fit.

    >>> source = latentprep.open_source("shapes")
    >>> source.splits, source.read("val", 0).key
    (('train', 'val'), 'val/arrow/0000.jpg')
    """
    from latentprep.sources import named as datasets

    columns = Columns(labels, image_column, label_column)
    if isinstance(spec, Source):
        if data is not None or val_fraction is not None:
            raise UsageError(
                f"{opt('data')} and {opt('val_fraction')} have no effect on an open source", "leave them out"
            )
        columns.check_unused("an open source")
        return spec
    if val_fraction is not None:
        check_number("val_fraction", val_fraction, 0, 1, f"use {opt('val_fraction', 0.1)}", below=True)
    name = spec if isinstance(spec, str) and spec in datasets.NAMES else None
    if data is not None and name in (None, "shapes"):
        downloads = ", ".join(known for known in datasets.NAMES if known != "shapes")
        raise UsageError(
            f"{opt('data')} is only for datasets that are downloaded, not for {spec}", f"use it with {downloads}"
        )
    if name is not None:
        columns.check_unused(name)
    if name == "shapes":
        from latentprep.sources import shapes

        return _build(name, shapes.find(), shapes.read, val_fraction, seed)
    if name is None:
        folder = None if out is None or "://" in str(out) else path_of(out)
        return _build(str(spec), *find(str(spec), folder, progress, columns), val_fraction, seed)
    path = path_of(data) if data is not None else datasets.fetch(name, cache, progress)
    if not path.exists():
        raise SourceError(
            f"no such file or folder: {path}", f"give a copy of {name} with {opt('data')}, or leave it out"
        )
    source = _build(name, *find(str(path), progress=progress), val_fraction, seed)
    source.classes = datasets.class_names(name, source.classes, path)
    return source


def open_own_source(
    source: str | Path | Source | None,
    *,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: ProgressFactory = silent,
) -> Source | None:
    """Open the source that a dataset was made from, with the parameters of its encode. None if ``source`` is None.

    Raises UsageError for ``data`` without a source, and as `open_source` and `Source.take` do.
    """
    if source is None:
        if data is not None:
            raise UsageError(
                f"{opt('data')} needs {opt('source')}: it is a local copy of that dataset", f"give {opt('source')} too"
            )
        Columns(labels, image_column, label_column).check_unused("a dataset without its source")
        return None
    opened = open_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed, out=out, progress=progress,
    )  # fmt: skip
    return opened if limit is None else opened.take(limit)


def _build(spec: str, tree: Tree, load: Load, val_fraction: float | None, seed: int) -> Source:
    """Number the classes, check them, split off val if there is none, and sort."""
    _check_left_out(spec, tree)
    found = {s: rows if tree.in_order else sorted(rows, key=lambda row: row.key) for s, rows in tree.found.items()}
    base = "train" if "train" in found else next(iter(found))
    counts = Counter(row.name for row in found[base] if row.name)
    for split in [base, *found] if tree.classes is None else ():
        for name in sorted(tree.folders.get(split, set()) | {row.name for row in found[split]} - {""}):
            if split == base and not counts[name]:
                way_out = f"add {NOUNS[tree.media]} to it or remove the folder"
                where = f" in {split}" if len(found) > 1 else ""
                raise SourceError(f"class {name} of {spec} has no {NOUNS[tree.media]}{where}", way_out)
            if not counts[name] and any(row.name == name for row in found[split]):
                way_out = f"add the class to {base}, or remove it from {split}"
                raise SourceError(f"class {name} of {spec} is in {split} but not in {base}", way_out)
    if len(counts) < 2:
        way_out = f"name another column with {opt('label_column')}" if tree.in_order else LAYOUTS
        raise SourceError(f"{spec} has only one class: {', '.join(counts) or 'none'}", way_out)
    for split, rows in found.items():
        for one, two in pairwise(sorted(row.key for row in rows)):
            if one == two:
                raise SourceError(f"{spec}: key {one} occurs twice in {split}", "rename or remove one of them")

    notes = tree.notes
    if "val" not in found:
        if "test" in found and "train" in found and val_fraction is None:
            notes += (f"no val split beside train and test: {VAL_FRACTION:.0%} of train becomes val",)
        found = _split_off_val(found, VAL_FRACTION if val_fraction is None else val_fraction, seed)
    elif val_fraction:
        raise UsageError(
            f"{spec} has its own val split, so {opt('val_fraction')} has no effect", f"leave {opt('val_fraction')} out"
        )
    numbers = all(name.isascii() and name.isdigit() for name in counts)
    classes = sorted(counts, key=lambda name: (int(name), name)) if numbers else sorted(counts)
    classes = list(tree.classes or classes)
    index = {name: label for label, name in enumerate(classes)} | {"": INVALID_LABEL}
    order = sorted((split for split in found if found[split]), key=["train", "val", "test"].index)
    numbered = {split: [Row(row.key, index[row.name], row.at) for row in found[split]] for split in order}
    left_out = {_named(what, tree.media): count for what, count in tree.left_out.items()}
    return Source(spec, tuple(classes), numbered, load, left_out, notes, tree.identity, tree.media)


def _named(what: str, media: str) -> str:
    """What was left out, as layouts call it, with the right noun for a source of sounds."""
    others = f"{NOUNS[IMAGES]} beside {NOUNS[media]}"
    return what if what == others else re.sub(f"^{NOUNS[IMAGES]} ", f"{NOUNS[media]} ", what)


def _check_left_out(spec: str, tree: Tree) -> None:
    """Raise SourceError if more than half of the images that are not hidden would be left out."""
    lost = {what: n for what, n in tree.left_out.items() if what.startswith("images") and what != HIDDEN}
    lost = {what: n for what, n in lost.items() if not what.startswith(NOT_NAMED)}  # a table may name a few alone
    total = sum(lost.values()) + sum(map(len, tree.found.values()))
    if sum(lost.values()) > total / 2:
        way_out = f"{LAYOUTS}; or give the folder with the class folders directly"
        raise SourceError(
            f"{spec}: most of its {total} {NOUNS[tree.media]} would be left out: {left_out_line(lost)}", way_out
        )


def _split_off_val(found: dict[str, list[Found]], fraction: float, seed: int) -> dict[str, list[Found]]:
    """Move ``fraction`` of each class from train to val: at least one image of a class with two or more, never all.

    Chosen by a hash of seed and key, so that adding images to a class moves few of the others.
    """
    if fraction == 0 or "train" not in found:
        return found
    by_class: dict[str, list[Found]] = {}
    for row in found["train"]:
        by_class.setdefault(row.name, []).append(row)
    held: set[str] = set()
    for rows in by_class.values():
        count = min(len(rows) - 1, max(1, round(len(rows) * fraction)))
        drawn = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row.key}".encode()).digest())
        held.update(row.key for row in drawn[:count])
    train = [row for row in found["train"] if row.key not in held]
    return {**found, "train": train, "val": [row for row in found["train"] if row.key in held]}
