"""Labels in a table, CSV, TSV, JSON lines or Parquet: a file that is given, or the hub's metadata beside the images."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from latentprep.errors import SourceError, opt
from latentprep.sources.layouts import Columns, Found, Tree
from latentprep.sources.listing import LABEL_TABLES, METADATA_BYTES, NOT_NAMED, Entry, Listing
from latentprep.sources.offsets import PlainFile
from latentprep.sources.parquet import read_columns
from latentprep.sources.parquet_files import ParquetFile
from latentprep.sources.splits import SPLIT_NAMES, split_of_folder
from latentprep.storage.places import path_of

_FILE = ("file_name", "filename", "file", "path", "image")
_LABEL = ("label", "class")
_LONGEST = 1024  # letters of a label


class Row(NamedTuple):
    """A row of a table. split: "" if the table has no column of splits; label: "" if it is empty."""

    file: str
    label: str
    split: str


def read_labels(columns: Columns) -> tuple[str, list[Row]]:
    """The name and the rows of the table that ``columns.labels`` is the path of. Raises SourceError, SystemFault."""
    assert columns.labels is not None
    path = path_of(columns.labels)
    kind = path.suffix.lower()
    if kind not in LABEL_TABLES:
        raise SourceError(f"{path} is no table of labels", f"give a file that ends with {', '.join(LABEL_TABLES)}")
    try:
        size = path.stat().st_size
        if kind == ".parquet":
            parquet = ParquetFile(PlainFile(path), size)
            return path.name, _rows(str(path), _from_parquet(parquet, columns), columns)
        if size > METADATA_BYTES:
            raise SourceError(f"{path} has {size} bytes, more than {METADATA_BYTES}", "write it as Parquet")
        return path.name, _rows(str(path), _records(path.name, path.read_bytes()), columns)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {(error.strerror or str(error)).lower()}", "check its path") from error


def by_metadata(spec: str, listing: Listing, columns: Columns) -> Tree | None:
    """The images that ``metadata.csv`` or ``metadata.jsonl`` files of a listing label; None if none has labels.

    File names in them are paths from their own folder. Raises SourceError for a table that cannot be read.
    """
    named: dict[str, Row] = {}
    for path, text in listing.metadata.items():
        if len(text) > METADATA_BYTES:
            raise SourceError(f"{path} of {spec} has more than {METADATA_BYTES} bytes", f"give it as {opt('labels')}")
        records = list(_records(path, text))
        if not records or _column(records[0], columns.label_column, _LABEL) is None:
            continue
        folder = posixpath.dirname(path)
        for row in _rows(f"{path} of {spec}", records, columns):
            _add(named, posixpath.normpath(posixpath.join(folder, row.file)), row, path)
    if not named:
        return None
    found = [(entry, named.pop(entry.path)) for entry in listing.images if entry.path in named]
    tables = ", ".join(sorted(listing.metadata))
    tree = _tree(spec, listing, found, tables, len(named))
    tree.notes += (f"labels are those in {tables}",)
    return tree


def by_labels(spec: str, listing: Listing, columns: Columns) -> Tree:
    """The images of a listing that the table ``columns.labels`` names.

    By their path in the source, or by the end of it, or by name without an ending, if only one image fits.
    """
    table, rows = read_labels(columns)
    exact, ends = {entry.path: entry for entry in listing.images}, _by_end(listing.images)
    named: dict[str, Row] = {}
    lacking = 0
    for row in rows:
        path = posixpath.normpath(row.file)
        fitting = [exact[path]] if path in exact else _fitting(path, ends)
        if len(fitting) > 1:
            raise SourceError(
                f"{table} names {row.file}, which may be {fitting[0].path} or {fitting[1].path}",
                f"write paths from {spec} into the table",
            )
        lacking += not fitting
        if fitting:
            _add(named, fitting[0].path, row, table)
    return _tree(spec, listing, [(exact[path], row) for path, row in named.items()], table, lacking)


def _by_end(images: list[Entry]) -> dict[str, list[Entry]]:
    """Images by their file's name, and by that without its ending."""
    ends: dict[str, list[Entry]] = {}
    for entry in images:
        base = posixpath.basename(entry.path)
        for name in {base, posixpath.splitext(base)[0]}:
            ends.setdefault(name, []).append(entry)
    return ends


def _fitting(path: str, ends: dict[str, list[Entry]]) -> list[Entry]:
    near = ends.get(posixpath.basename(path), [])
    fit = [entry for entry in near if f"/{entry.path}".endswith(f"/{path}")]
    return fit or [entry for entry in near if f"/{posixpath.splitext(entry.path)[0]}".endswith(f"/{path}")]


def _add(named: dict[str, Row], path: str, row: Row, table: str) -> None:
    if named.setdefault(path, row)[1:] != row[1:]:
        raise SourceError(f"{table} names {path} with two labels or splits", "an image has one of each")


def _tree(spec: str, listing: Listing, found: list[tuple[Entry, Row]], table: str, lacking: int) -> Tree:
    if not found:
        example = f", such as {listing.images[0].path}" if listing.images else ""
        raise SourceError(
            f"{table} names none of the {len(listing.images)} images of {spec}{example}",
            "its file names are paths from the images' folder, or names that only one image has",
        )
    tree = Tree({}, left_out=Counter(listing.left_out))
    tree.left_out[f"{NOT_NAMED}{table}"] = len(listing.images) - len(found)
    tree.left_out[f"rows of {table} without an image"] = lacking
    depth = _outer([entry.path for entry, _ in found])
    splits = _splits(spec, found, depth, table)
    for (entry, row), split in zip(found, splits, strict=True):
        key = "/".join(entry.path.split("/")[depth:])
        tree.found.setdefault(split, []).append(Found(key, row.label, entry.at))
    for split, rows in list(tree.found.items()):
        if not any(row.name for row in rows):
            tree.left_out[f"images of {split} without a label in {table}"] += len(rows)
            del tree.found[split]
    if not tree.found:
        raise SourceError(
            f"{table} has no label for any image of {spec}", f"name its column with {opt('label_column')}"
        )
    tree.left_out = +tree.left_out
    return tree


def _outer(paths: list[str]) -> int:
    """How many folders are around all of the images, and have no split's name."""
    first, last = min(paths).split("/")[:-1], max(paths).split("/")[:-1]
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth] and not split_of_folder(first[depth]):
        depth += 1
    return depth


def _splits(spec: str, found: list[tuple[Entry, Row]], depth: int, table: str) -> list[str]:
    """The split of each image: as the table says, or else by the folder it is in."""
    if any(row.split for _, row in found):
        for _, row in found:
            if row.split.lower() not in SPLIT_NAMES:
                raise SourceError(
                    f"{table} has {row.split!r:.60} as the split of {row.file}", "use train, val or test, in every row"
                )
        return [SPLIT_NAMES[row.split.lower()] for _, row in found]
    folders = [split_of_folder(entry.path.split("/")[depth]) if "/" in entry.path else None for entry, _ in found]
    if None in folders and any(folders):
        stray = found[folders.index(None)][0].path
        raise SourceError(f"{spec}: the split of {stray} is unknown, while other folders name theirs",
                          f"add a column split to {table}")  # fmt: skip
    return [folder or "train" for folder in folders]


def _rows(table: str, records: Iterable[dict[str, Any]], columns: Columns) -> list[Row]:
    """The records' file names, labels and splits. Raises SourceError naming the columns there are."""
    rows, names = [], None
    for number, record in enumerate(records, 1):
        if names is None:
            names = _names(table, record, columns)
        file, label, split = (record.get(name) if name else None for name in names)
        if not isinstance(file, str) or not file.strip():
            raise SourceError(f"row {number} of {table} has no file name in column {names[0]}", "remove or complete it")
        rows.append(Row(file.strip(), _text(table, number, label), str(split or "").strip()))
    if not rows:
        raise SourceError(f"{table} has no rows", "give a table with a header and a row for each image")
    return rows


def _names(table: str, record: dict[str, Any], columns: Columns) -> tuple[str, str, str | None]:
    file = _column(record, columns.image_column, _FILE)
    label = _column(record, columns.label_column, _LABEL)
    has = f"it has: {', '.join(f'{name:.40}' for name in list(record)[:8])}"
    if file is None:
        raise SourceError(f"{table} has no column of file names ({has})", f"name it with {opt('image_column')}")
    if label is None:
        raise SourceError(f"{table} has no column of labels ({has})", f"name it with {opt('label_column')}")
    return file, label, _column(record, None, ("split",))


def _column(record: dict[str, Any], asked: str | None, usual: tuple[str, ...]) -> str | None:
    """The record's column that was asked for, or else the first with a usual name, in upper or lower case."""
    if asked is not None:
        return asked if asked in record else None
    lower = {name.lower(): name for name in reversed(list(record))}
    return next((lower[name] for name in usual if name in lower), None)


def _text(table: str, number: int, label: Any) -> str:
    if label is None:
        return ""
    if isinstance(label, bool):
        return str(label).lower()
    if not isinstance(label, str | int) or len(str(label)) > _LONGEST:
        raise SourceError(f"row {number} of {table} has {label!r:.60} as its label", "write one number or name")
    return str(label).strip()


def _records(name: str, data: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, TSV or JSON lines file as dictionaries. Raises SourceError."""
    try:
        text = data.decode("utf-8-sig")
        if name.lower().endswith(".jsonl"):
            for line in text.split("\n"):  # not splitlines: JSON's texts may hold U+2028
                record = json.loads(line) if line.strip() else None
                if isinstance(record, dict):
                    yield record
                elif record is not None:
                    raise ValueError("a line is not a JSON object")
            return
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        for record in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            record.pop(None, None)  # more fields than the header has
            yield record
    except (ValueError, RecursionError, csv.Error) as error:
        raise SourceError(f"{name} is no table that can be read: {error}", "write it as CSV with a header") from error


def _from_parquet(parquet: ParquetFile, columns: Columns) -> Iterator[dict[str, Any]]:
    names = [name for name in (columns.image_column, columns.label_column) if name]
    return read_columns(parquet, names, (*_FILE, *_LABEL, "split"))
