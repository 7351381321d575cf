"""Images, or sounds, and labels in Parquet files, as ``datasets`` writes them and the Hugging Face hub stores them.

Opening a source reads the files' footers, their labels and the images' names. Images are read in blocks of a row group,
when they are asked for. Rows keep their order in the files, and a key is what it would be in a folder,
``train/CLASS/NAME``. Nothing in a file is trusted: sizes that it declares are checked against its own size before
memory is taken, extension types are read as what they store, and nothing is unpickled.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from latentprep.errors import DatasetError, LatentError, SourceError, SystemFault, opt
from latentprep.sources.kinds import HEAD_BYTES, IMAGES, SOUND, is_sound, medium_of_name
from latentprep.sources.layouts import Found, Tree
from latentprep.sources.listing import NOUNS
from latentprep.sources.parquet_files import MAGIC, Files, ParquetFile

_MOST_PARTS = 100_000  # row groups, columns or names in one list of a footer
_MOST_ROWS = 1 << 20  # of a file, if it has fewer bytes: a dictionary holds equal rows once
_INDEXED = 4096  # rows of labels and names that are read at a time
_BLOCK_ROWS, _BLOCK_BYTES = 64, 32 << 20  # of images that are read at a time: at most, but one row at least
_KEPT = 256 << 20  # bytes of blocks that are kept, so that neighbours need not be read again
_CURSORS = 8  # files that are read at once
_BUFFER = 8 << 20  # bytes of one request
_MEDIA = {"Image": IMAGES, "Audio": SOUND}  # by the feature of `datasets`
_MOST_NAME = 1024  # bytes of a class's name, or of an image's


@dataclass(frozen=True)
class _Columns:
    """Where images, or sounds, and labels are. image, name: paths of Parquet columns; name is "" if images have none.
    medium: what the feature of the column says it holds, None without one.

    classes: that the labels index, if they have names; numbers: whether labels are numbers without names. told: whether
    the schema's metadata says what the columns are.
    """

    image: str
    medium: str | None
    name: str
    label: str
    classes: tuple[str, ...] | None
    numbers: bool
    told: bool


class _Indexed(NamedTuple):
    """A row: the file's number, the row in it, the name of its class, and of its image; "" if it has none."""

    part: int
    row: int
    label: str
    image: str


@dataclass(frozen=True)
class Part:
    """One file: its column of images, and the first row of each row group, and after the last."""

    parquet: ParquetFile
    image: str
    starts: tuple[int, ...]
    block: int  # rows


def by_parquet(
    spec: str, files: Files, image_column: str | None = None, label_column: str | None = None
) -> tuple[Tree, ParquetImages]:
    """The rows of Parquet files, by split, and what reads their images.

    Raises SourceError for files that are damaged, declare more than they can hold, or have no such columns; SystemFault
    if pyarrow is not installed.
    """
    root, tree = files.root, Tree({}, left_out=files.left_out)
    by_split: dict[str | None, list[_Indexed]] = {}
    parts: list[Part] = []
    columns: _Columns | None = None
    digest = hashlib.sha256()
    for split, some in files.splits.items():
        rows: list[_Indexed] = []
        for parquet in some:
            opened = _open(parquet)
            own = _columns(parquet.name, opened.schema, image_column, label_column)
            if columns is not None and own != columns:
                raise SourceError(
                    f"{parquet.name} has other columns or classes than the files before it", "open it on its own"
                )
            columns, part = own, _part(opened, own)
            rows += _index(part, len(parts), opened, own)
            parts.append(part)
            digest.update(part.parquet.identity.encode())
        by_split[split] = rows
    images = ParquetImages(tuple(parts))
    if columns is not None:
        _settle(columns, by_split, images, tree)
    for split, rows in by_split.items():
        name = split or "train"
        if rows and not any(row.label for row in rows):
            tree.left_out[f"images in {name} (none has a label)"] += len(rows)
            continue
        tree.found[name] = _with_keys(name, split, rows, [part.parquet.name[len(root) :] for part in parts], tree)
    if columns is None or not any(tree.found.values()):
        raise SourceError(f"{spec} has no rows with labels", f"name their column with {opt('label_column')}")
    _say(columns, tree)
    tree.classes, tree.identity, tree.in_order = columns.classes, digest.hexdigest(), True
    images.check_bytes(next(rows[0].at for rows in tree.found.values() if rows))
    return tree, images


def _settle(columns: _Columns, by_split: dict[str | None, list[_Indexed]], images: ParquetImages, tree: Tree) -> None:
    """Keep the rows of images, or those of sounds, whichever are more, and count the others in `tree`.

    A row's medium is what its name says, else the column's feature, else the first bytes in the first rows.
    """
    first = next((row for rows in by_split.values() for row in rows), None)
    default = columns.medium or (images.medium((first.part, first.row)) if first else IMAGES)
    media = {split: [medium_of_name(row.image) or default for row in rows] for split, rows in by_split.items()}
    counts = Counter(medium for some in media.values() for medium in some)
    tree.media = SOUND if counts[SOUND] > counts[IMAGES] else IMAGES
    if len(counts) > 1:
        other = IMAGES if tree.media == SOUND else SOUND
        tree.left_out[f"{NOUNS[other]} beside {NOUNS[tree.media]}"] += counts[other]
        for split, rows in by_split.items():
            by_split[split] = [row for row, one in zip(rows, media[split], strict=True) if one == tree.media]


def _say(columns: _Columns, tree: Tree) -> None:
    if not columns.told:
        image = columns.image.removesuffix(".bytes")
        tree.notes += (f"{NOUNS[tree.media]} are in column {image}, labels in {columns.label}",)
    if columns.numbers:
        tree.notes += (f"the labels in {columns.label} have no names: classes are named by their numbers",)
    if columns.classes is None:
        return
    base = tree.found.get("train") or next(iter(tree.found.values()))
    used = {row.name for row in base}
    if none := [name for name in columns.classes if name not in used]:
        some = f"{', '.join(none[:3])}{', …' if len(none) > 3 else ''}"
        tree.notes += (f"classes without images in train, of {len(columns.classes)}: {len(none)} ({some})",)


def _with_keys(name: str, split: str | None, rows: list[_Indexed], files: list[str], tree: Tree) -> list[Found]:
    """Rows with keys: as in a folder, or, if images have no names or share them, by file and row."""
    above = [split] if split else []
    keys = ["/".join([*above, *filter(None, [row.label]), _base(row.image)]) for row in rows if row.image]
    if len(set(keys)) < len(rows):
        keys = [f"{files[row.part].rpartition('.')[0]}:{row.row:09}" for row in rows]
        tree.notes += (f"some images of {name} have no name or share one: keys are files and rows",)
    return [Found(key, row.label, (row.part, row.row)) for key, row in zip(keys, rows, strict=True)]


def _base(path: str) -> str:
    return path.rpartition("/")[2]


class ParquetImages:
    """Reads the image at (part, row). Many threads may call it; it is pickled without what it holds open."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int, int], Any] = OrderedDict()  # by part, group, number in the group
        self._kept = 0  # their bytes
        self._cursors: OrderedDict[int, tuple[int, int, Iterator[Any]]] = OrderedDict()  # part: group, next block, rest

    def __getstate__(self) -> tuple[Part, ...]:
        return self.parts

    def __setstate__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts
        self._reset()

    def __call__(self, at: tuple[int, int]) -> bytes:
        """The bytes of an image. Raises SourceError if the row has none, or the file has changed; OSError."""
        number, row = at
        part = self.parts[number]
        group = bisect.bisect_right(part.starts, row) - 1
        block, inside = divmod(row - part.starts[group], part.block)
        with self._lock, _damage(part.parquet.name):
            data = self._block(number, group, block)[inside].as_py()
        if data is None:
            raise SourceError(f"row {row} of {part.parquet.name} has no bytes")
        return data

    def _block_of(self, at: tuple[int, int]) -> Any:
        number, row = at
        part = self.parts[number]
        group = bisect.bisect_right(part.starts, row) - 1
        with self._lock, _damage(part.parquet.name):
            return self._block(number, group, (row - part.starts[group]) // part.block)

    def medium(self, at: tuple[int, int]) -> str:
        """What most of the first rows in a row's block begin as: `SOUND`; or `IMAGES`, also if nothing can be told."""
        with _damage(self.parts[at[0]].parquet.name):
            rows = self._block_of(at).drop_null()[:8]
            heads = [row.as_py()[:HEAD_BYTES] for row in rows]
        return SOUND if sum(map(is_sound, heads)) > len(heads) / 2 else IMAGES

    def check_bytes(self, at: tuple[int, int]) -> None:
        """SourceError if none of the rows in the block of an image has bytes: then there are only paths."""
        rows = self._block_of(at)
        if rows.null_count == len(rows):
            raise SourceError(
                f"{self.parts[at[0]].parquet.name} holds no bytes of images or sounds, perhaps their paths",
                "write it with push_to_hub, or embed them with embed_table_storage of datasets.table",
            )

    def _block(self, number: int, group: int, block: int) -> Any:
        """Rows of a row group: from the blocks kept, or by reading on, or again from the group's beginning."""
        if (number, group, block) in self._blocks:
            self._blocks.move_to_end((number, group, block))
            return self._blocks[number, group, block]
        at, upcoming, rest = self._cursors.pop(number, (-1, 0, iter(())))
        if at != group or upcoming > block:
            upcoming, rest = 0, self._read(self.parts[number], group)
        while upcoming <= block:
            rows = next(rest, None)
            if rows is None:
                raise ValueError("a row group has fewer rows than it declares")
            self._keep((number, group, upcoming), rows)
            upcoming += 1
        self._cursors[number] = group, upcoming, rest
        while len(self._cursors) > _CURSORS:
            self._cursors.popitem(last=False)
        return rows

    def _keep(self, key: tuple[int, int, int], rows: Any) -> None:
        gone = self._blocks.pop(key, None)
        self._blocks[key] = rows
        self._kept += rows.get_total_buffer_size() - (gone.get_total_buffer_size() if gone is not None else 0)
        while self._kept > _KEPT and len(self._blocks) > 1:
            self._kept -= self._blocks.popitem(last=False)[1].get_total_buffer_size()

    @staticmethod
    def _read(part: Part, group: int) -> Iterator[Any]:
        """The blocks of a row group, as arrays of bytes."""
        import pyarrow as pa

        leaf, pieces, count = "." in part.image, [], 0
        opened = _open(part.parquet)
        # Values of a dictionary are shared, not copied for each row: a file of 1 KB may repeat 1 GB a thousand times.
        shared = [] if leaf else [part.image]
        for batch in opened.batches([part.image], part.block, shared, [group]):
            pieces.append(batch.column(0).flatten()[0] if leaf else batch.column(0))
            count += len(batch)
            while count >= part.block:
                whole = pa.chunked_array(pieces)
                yield whole[: part.block]
                pieces, count = whole[part.block :].chunks, count - part.block
        if count:
            yield pa.chunked_array(pieces)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn whatever pyarrow raises for bytes that it cannot read into a SourceError."""
    try:
        yield
    except LatentError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__
        raise SourceError(f"{name} is damaged or cut short: {reason}", "copy or download it again") from error


@dataclass(frozen=True)
class _Opened:
    """A file whose footer has been read."""

    parquet: ParquetFile
    metadata: Any
    schema: Any

    def batches(
        self, columns: list[str], rows: int, shared: Sequence[str] = (), groups: list[int] | None = None
    ) -> Iterator[Any]:
        """Record batches of up to so many rows. shared: columns whose equal values are kept once, as dictionaries."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        stream = pa.PythonFile(self.parquet.open(), mode="r")
        reader = pq.ParquetFile(
            stream, metadata=self.metadata, read_dictionary=list(shared), pre_buffer=False, buffer_size=_BUFFER
        )
        return reader.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False)


def _open(parquet: ParquetFile) -> _Opened:
    """Read a file's footer. Raises SourceError if it has none, or is not the file it was; SystemFault."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SystemFault(
            "reading Parquet needs pyarrow, which is not installed", "pip install 'latentprep[parquet]'"
        ) from error
    footer = parquet.footer()
    identity = parquet.digest(footer)
    if parquet.identity and identity != parquet.identity:
        raise SourceError(f"{parquet.name} has changed since it was opened", "open the source again")
    with _damage(parquet.name):
        limits = {"thrift_string_size_limit": len(footer), "thrift_container_size_limit": _MOST_PARTS}
        reader = pq.ParquetFile(pa.BufferReader(MAGIC + footer), **limits)
        return _Opened(replace(parquet, identity=identity), reader.metadata, reader.schema_arrow)


def _part(opened: _Opened, columns: _Columns) -> Part:
    """Raises SourceError if the file declares more rows than it can hold."""
    parquet, metadata, name = opened.parquet, opened.metadata, opened.parquet.name
    if metadata.num_rows > max(parquet.size, _MOST_ROWS):
        raise SourceError(f"{name} declares {metadata.num_rows} rows in {parquet.size} bytes", "it is damaged")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    counts = [group.num_rows for group in groups]
    if any(count < 0 for count in counts) or sum(counts) != metadata.num_rows:
        raise SourceError(f"{name} declares {metadata.num_rows} rows, and row groups of {sum(counts)}", "it is damaged")
    # Only of row groups: asking pyarrow for a column's own figures ends the process if a file lies about its type.
    widest = max((group.total_byte_size // group.num_rows for group in groups if group.num_rows), default=1)
    block = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(1, widest)))
    return Part(parquet, columns.image, (0, *accumulate(counts)), block)


def _index(part: Part, number: int, opened: _Opened, columns: _Columns) -> Iterator[_Indexed]:
    wanted = [columns.label, *([columns.name] if columns.name else [])]
    shared = [columns.label] if _is_text(opened.schema.field(columns.label).type) else []
    row = 0
    with _damage(part.parquet.name):
        for batch in opened.batches(wanted, _INDEXED, shared):
            labels = _values(batch.column(batch.schema.get_field_index(columns.label)))
            names: Sequence[str | None] = [None] * len(labels)
            if columns.name:
                images = batch.column(batch.schema.get_field_index(columns.name.partition(".")[0]))
                names = _values(images.flatten()[0])
            for label, name in zip(labels, names, strict=True):
                yield _Indexed(number, row, _class_of(label, columns, part.parquet.name, row), name or "")
                row += 1
        if row != part.starts[-1]:
            raise ValueError(f"it has {row} rows, and declares {part.starts[-1]}")


def _values(column: Any) -> list[Any]:
    """The values of a column. Raises ValueError for texts that are too long to be names."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    texts = column.dictionary if types.is_dictionary(column.type) else column
    if _is_text(texts.type) and (longest := compute.max(compute.binary_length(texts)).as_py() or 0) > _MOST_NAME:
        raise ValueError(f"a name or label has {longest} bytes")
    return column.to_pylist()


def _class_of(label: Any, columns: _Columns, file: str, row: int) -> str:
    """The class's name, "" if there is none."""
    if label is None or label == "" or (columns.classes is not None and label == -1):  # so the hub writes "unknown"
        return ""
    if columns.classes is None:
        return str(label).lower() if isinstance(label, bool) else str(label)
    if not 0 <= label < len(columns.classes):
        raise SourceError(
            f"row {row} of {file} has label {label}, but there are {len(columns.classes)} classes",
            f"name the labels' column with {opt('label_column')}, or write the file again",
        )
    return columns.classes[label]


def _columns(file: str, schema: Any, image: str | None, label: str | None) -> _Columns:
    """Find the columns: by name, else by the features that ``datasets`` puts into the schema's metadata, else by type.

    Raises SourceError naming the columns there are if none or several fit.
    """
    features = _features(file, schema)
    image_told = [name for name, kind in features.items() if kind in _MEDIA]
    label_told = [name for name, kind in features.items() if isinstance(kind, tuple)]
    picked = _pick(
        file, schema, "image_column", image, image_told, [f.name for f in schema if _image_leaf(f.type) is not None]
    )
    field = _field(file, schema, picked, "image_column")
    leaf = _image_leaf(field.type)
    if leaf is None:
        raise _unfit(file, field, "image_column", "images or sounds as bytes, or as bytes and path")
    named = [f.name for f in schema if f.name in ("label", "labels")]
    label_picked = _pick(file, schema, "label_column", label, label_told, named)
    label_field = _field(file, schema, label_picked, "label_column")
    classes = features.get(label_picked)
    if not _is_label(label_field.type, isinstance(classes, tuple)):
        raise _unfit(file, label_field, "label_column", "one number or text for each image")
    told = picked in image_told and label_picked in label_told
    inner = [] if leaf == "" else [one.name for one in field.type]
    name = f"{picked}.path" if "path" in inner and _is_text(field.type.field("path").type) else ""
    known = classes if isinstance(classes, tuple) else None
    medium = _MEDIA[features[picked]] if picked in image_told else None
    return _Columns(
        picked + leaf, medium, name, label_picked, known, known is None and _is_number(label_field.type), told
    )


def _pick(file: str, schema: Any, option: str, asked: str | None, told: list[str], fit: list[str]) -> str:
    if asked is not None:
        return asked
    for some in (told, fit):
        if len(some) == 1:
            return some[0]
        if some:
            raise SourceError(
                f"{file} has several columns to choose from: {', '.join(some)}", f"name one with {opt(option, some[0])}"
            )
    what = "images or sounds" if option == "image_column" else "labels"
    raise SourceError(
        f"{file} has no column of {what} that can be told (it has: {_listed(schema)})", f"name it with {opt(option)}"
    )


def read_columns(parquet: ParquetFile, wanted: list[str], usual: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a table of labels, as dictionaries of its columns that are wanted or have a usual name.

    Numbers of a ClassLabel become the names. Raises SourceError for a damaged file, SystemFault without pyarrow.
    """
    opened = _open(parquet)
    if opened.metadata.num_rows > max(parquet.size, _MOST_ROWS):
        raise SourceError(f"{parquet.name} declares {opened.metadata.num_rows} rows in {parquet.size} bytes")
    features = _features(parquet.name, opened.schema)
    fields = [one for one in opened.schema if (one.name in wanted or one.name.lower() in usual)]
    names = [one.name for one in fields if _is_label(one.type, False)]
    shared = [one.name for one in fields if _is_text(one.type)]
    others = dict.fromkeys(one.name for one in opened.schema if one.name not in names)
    with _damage(parquet.name):
        for batch in opened.batches(names, _INDEXED, shared):
            kinds = [(name, features.get(name)) for name in batch.schema.names]
            for row in zip(*map(_values, batch.columns), strict=True):
                yield others | {name: _named(value, kind) for (name, kind), value in zip(kinds, row, strict=True)}


def _named(value: Any, classes: Any) -> Any:
    """A label's name, if it is a number of a ClassLabel's."""
    if not isinstance(classes, tuple) or not isinstance(value, int):
        return value
    return classes[value] if 0 <= value < len(classes) else None


def _field(file: str, schema: Any, name: str, option: str) -> Any:
    if len(schema.get_all_field_indices(name)) != 1 or "." in name:
        raise SourceError(f"{file} has no single column {name} (it has: {_listed(schema)})", f"use {opt(option)}")
    return schema.field(name)


def _listed(schema: Any) -> str:
    names = [f"{field.name:.40} {field.type!s:.40}" for field in list(schema)[:8]]
    return ", ".join(names) + (f" and {len(schema) - 8} more" if len(schema) > 8 else "")


def _unfit(file: str, field: Any, option: str, wanted: str) -> SourceError:
    return SourceError(
        f"column {field.name:.60} of {file} holds {field.type!s:.80}, not {wanted}",
        f"name another with {opt(option)}",
    )


def _image_leaf(kind: Any) -> str | None:
    """Where the bytes are inside a column of images: "" for plain ones, ".bytes" for a struct's; None for others."""
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return ""
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _image_leaf(kind.field("bytes").type) == "":
        return ".bytes"
    return None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_label(kind: Any, numbers: bool) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_label(kind.value_type, numbers)
    return types.is_integer(kind) or (not numbers and (_is_text(kind) or types.is_boolean(kind)))


def _is_number(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind)


def _features(file: str, schema: Any) -> dict[str, Any]:
    """What ``datasets`` says of columns: "Image", "Audio", or the names of a ClassLabel's classes, as a tuple."""
    from latentprep.format.fields import parse_json

    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features: Any = parse_json(text, f"the metadata of {file}", "write the file again").document
    except DatasetError as error:
        raise SourceError(*error.texts) from error
    for key in ("info", "features"):
        features = features.get(key) if isinstance(features, dict) else None
    found: dict[str, Any] = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        kind = feature.get("_type") if isinstance(feature, dict) else None
        if kind in _MEDIA:
            found[name] = kind
        elif kind == "ClassLabel":
            names = feature.get("names")
            if not isinstance(names, list) or not all(isinstance(n, str) and 0 < len(n) <= _MOST_NAME for n in names):
                raise SourceError(
                    f"{file}: the ClassLabel {name:.60} has no list of class names", "write the file again"
                )
            if len(set(names)) < len(names):
                raise SourceError(f"{file}: two classes of {name:.60} have one name", "write the file again")
            found[name] = tuple(names)
    return found
