"""The Parquet store: arrays to the bytes of one shard's file, and back. It has the same functions as `zarr_store`.

Layout: `data/{split}-{index:05d}-of-{shards:05d}.parquet`, as the Hugging Face hub names them; one row group; zstd:
    key        string
    label      int64, −1 in a row that could not be read; the names of the classes are in the schema's metadata
    codes      uint8 lists of (C, h, w), or of (V, C, h, w) if a split has several views: the Array3D or Array4D of
               the `datasets` library, which reads all of this by itself
    valid      bool: label is not −1
    thumbnail  struct of bytes (a WebP file) and path (null): an Image of `datasets`; only if the manifest says how

pyarrow writes and reads the columns. It allocates what headers declare, so they are read here first: `_check_pages`.
"""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from latentprep.errors import DatasetError, SystemFault, opt
from latentprep.format.manifest import INVALID_LABEL, Manifest, Plan
from latentprep.format.thumbnails import thumbnails

if TYPE_CHECKING:
    import pyarrow

_LEVEL = 9  # of zstd: next to no slower than 1 for codes, and up to a tenth smaller
_PAGE = 1 << 24  # bytes before compression
_FEW_BITS = (
    4  # up to here codes are bit-packed, as places in a dictionary; above, their bytes are kept apart from zeros
)
_MAX_CODES = 1 << 31  # in a shard: Arrow counts the items of lists in 32 bits
_MAX_KEY_BYTES = 1 << 16  # longer than any path
_SLACK = 1 << 16  # bytes that the pages of a column may have beside its values
_MAX_THINGS = 10_000  # in a footer; ours has a few dozen
_EXTENSION = "datasets.features.features.{}ExtensionType"


def check_installed() -> None:
    """`SystemFault` if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise SystemFault(
            "the Parquet store needs pyarrow, which is not installed", "pip install 'latentprep[parquet]'"
        ) from error


def shard_files(plan: Plan, split: str, index: int) -> dict[str, str]:
    """Array name -> path of the file that holds it for shard `index`: one file holds all three."""
    path = f"data/{split}-{index:05d}-of-{plan.shard_count(split):05d}.parquet"
    return dict.fromkeys(("codes", "labels", "keys"), path)


def described(manifest: Manifest) -> str:
    return "dictionary+zstd" if manifest.quantizer.bits <= _FEW_BITS else "byte-stream-split+zstd"


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """None: the shards are the only files."""
    return {}


def features(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The columns, each with its type in the JSON that `datasets` keeps in a schema's metadata."""
    views = {manifest.views(split) for split in manifest.splits}
    shape = [*manifest.latent] if views == {1} else [views.pop() if len(views) == 1 else None, *manifest.latent]
    columns: dict[str, dict[str, Any]] = {
        "key": {"dtype": "string", "_type": "Value"},
        "label": {"names": list(manifest.classes), "_type": "ClassLabel"},
        "codes": {"shape": shape, "dtype": "uint8", "_type": f"Array{len(shape)}D"},
        "valid": {"dtype": "bool", "_type": "Value"},
    }
    return columns if manifest.thumbnail is None else columns | {"thumbnail": {"_type": "Image"}}


def encode_shard_files(
    manifest: Manifest, split: str, index: int, codes: np.ndarray, labels: np.ndarray, keys: list[str]
) -> dict[str, bytes]:
    """One shard's arrays -> path: bytes of its file. Inverse of `decode_shard_files`.

    codes: u8 [n,V,C,h,w]; labels: i32 [n]; keys: n strings; n at most ``manifest.shard_rows``.
    Raises `DatasetError` for more codes than a file can hold, `SystemFault` without pyarrow.
    """
    check_installed()
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = shard_files(manifest, split, index)["codes"]
    if codes.size >= _MAX_CODES:
        raise DatasetError(
            f"{path} would hold {codes.size} codes; a Parquet file of this store holds less than {_MAX_CODES}",
            f"encode with a smaller {opt('shard_rows')}",
        )
    columns, valid = features(manifest), labels != INVALID_LABEL
    shape = columns["codes"]["shape"]
    arrays = {
        "key": pa.array(keys, pa.string()),
        "label": pa.array(labels, pa.int64()),
        "codes": _nested(codes.reshape(len(codes), *codes.shape[-len(shape) :])),
        "valid": pa.array(valid),
    }
    if manifest.thumbnail is not None:
        pictures = thumbnails(manifest.quantizer, manifest.thumbnail, codes[:, 0])
        cells = [{"bytes": data} if there else None for data, there in zip(pictures, valid, strict=True)]
        arrays["thumbnail"] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    extension = {  # so that `datasets` gives the column its shape; pyarrow alone reads lists
        "ARROW:extension:name": _EXTENSION.format(columns["codes"]["_type"]),
        "ARROW:extension:metadata": json.dumps([shape, "uint8"]),
    }
    schema = pa.schema(
        [pa.field(name, array.type, metadata=extension if name == "codes" else None) for name, array in arrays.items()],
        {"huggingface": json.dumps({"info": {"features": columns}})},
    )
    few, leaf = manifest.quantizer.bits <= _FEW_BITS, _leaf(len(shape))
    sink = io.BytesIO()
    pq.write_table(
        pa.table(list(arrays.values()), schema=schema),
        sink,
        row_group_size=max(1, len(codes)),
        data_page_size=_PAGE,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=[leaf] if few else False,
        column_encoding=None if few else {leaf: "BYTE_STREAM_SPLIT"},
        write_statistics=False,
    )
    return {path: sink.getvalue()}


def decode_shard_files(
    manifest: Manifest, split: str, index: int, files: dict[str, bytes]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """path: bytes of one shard's file -> codes u8 [n,V,C,h,w], labels i32 [n], keys. Inverse of
    `encode_shard_files`. Raises `DatasetError` for bytes that do not decode, `SystemFault` without pyarrow."""
    data = files[shard_files(manifest, split, index)["codes"]]
    return _decode(manifest, split, index, data, ("key", "label", "codes", "valid"))


def decode_labels(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's file -> i32 [n]. Raises as `decode_shard_files` does."""
    return _decode(manifest, split, index, data, ("label",))[1]


def decode_keys(manifest: Manifest, split: str, index: int, data: bytes) -> list[str]:
    """The bytes of one shard's file -> n keys. Raises as `decode_shard_files` does."""
    return _decode(manifest, split, index, data, ("key",))[2]


def _decode(
    manifest: Manifest, split: str, index: int, data: bytes, wanted: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The wanted columns of a file, as arrays; the others are empty."""
    check_installed()
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, row = manifest.rows_in_shard(split, index), manifest.row_shape(split)
    shape = row if len(features(manifest)["codes"]["shape"]) == len(row) else row[1:]
    codes, labels, keys = np.empty((0, *row), np.uint8), np.empty(0, np.int32), list[str]()
    try:
        limits = {"thrift_string_size_limit": len(data), "thrift_container_size_limit": _MAX_THINGS}
        with pq.ParquetFile(pa.BufferReader(data), **limits) as file:
            _check_columns(file, data, wanted, rows, shape)
            table = file.read(list(wanted), use_threads=False)  # whoever reads shards has threads already
        columns = {name: _whole(table.column(name)) for name in wanted}
        if "label" in wanted:
            found = columns["label"].to_numpy()
            labels = found.astype(np.int32)
            if not np.array_equal(labels, found):
                raise ValueError("a label is no 32-bit integer")
        if "key" in wanted:
            keys = columns["key"].to_pylist()
        if "codes" in wanted:
            codes = _flat(columns["codes"], shape).reshape(rows, *row)
        if "valid" in wanted and not np.array_equal(
            columns["valid"].to_numpy(zero_copy_only=False), labels != INVALID_LABEL
        ):
            raise ValueError("its columns valid and label do not fit together")
    except Exception as error:  # pyarrow, and the types that other libraries register with it, raise many kinds
        path = shard_files(manifest, split, index)["codes"]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DatasetError(f"{path} cannot be decoded ({what:.200})", "encode it again") from error
    return codes, labels, keys


def _leaf(depth: int) -> str:
    """The path in the schema of codes in so many lists."""
    return ".".join(["codes", *["list", "element"] * depth])


def _nested(values: np.ndarray) -> pyarrow.Array:
    """u8 [n,…] -> n lists of lists of … values, without copying values. Inverse of `_flat`."""
    import pyarrow as pa

    array = pa.array(values.ravel())
    for size in values.shape[:0:-1]:
        offsets = np.arange(len(array) // size + 1, dtype=np.int32) * np.int32(size)
        array = pa.ListArray.from_arrays(pa.array(offsets), array)
    return array


def _flat(array: pyarrow.Array, shape: tuple[int, ...]) -> np.ndarray:
    """n lists of lists of … values -> u8 [n·…]; `ValueError` unless all have this shape. Inverse of `_nested`."""
    for size in shape:
        ends = np.arange(len(array) + 1, dtype=np.int64) * size
        if array.null_count or not np.array_equal(array.offsets.to_numpy(), ends):
            raise ValueError(f"codes are not all of the shape {shape}")
        array = array.values
    if array.null_count:
        raise ValueError("a code is missing")
    return np.array(array.to_numpy())  # a copy that may be written to


def _whole(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """A column as one array, without the type that `datasets` gives codes where it is imported."""
    array = column.combine_chunks()
    if array.null_count:
        raise ValueError("a value is missing")
    return getattr(array, "storage", array)


def _check_columns(
    file: pyarrow.parquet.ParquetFile, data: bytes, wanted: tuple[str, ...], rows: int, shape: tuple[int, ...]
) -> None:
    """`ValueError` unless these columns have the types, rows and sizes that we write: then reading them takes no more
    memory than it should."""
    import pyarrow as pa

    kind = pa.uint8()
    for _ in shape:
        kind = pa.list_(kind)
    count = rows * math.prod(shape)
    known = {  # name -> type, path, values, their most bytes in memory, the most entries of a dictionary
        "key": (pa.string(), "key", rows, _MAX_KEY_BYTES, 0),
        "label": (pa.int64(), "label", rows, 8, 0),
        "codes": (kind, _leaf(len(shape)), count, 8, 1 << _FEW_BITS),
        "valid": (pa.bool_(), "valid", rows, 1, 0),
    }
    if file.num_row_groups != 1 or file.metadata.num_rows != rows:
        raise ValueError(f"{file.metadata.num_rows} rows in {file.num_row_groups} groups, not {rows} in one")
    group = file.metadata.row_group(0)
    chunks = [group.column(place) for place in range(group.num_columns)]
    for name in wanted:
        want, path, values, width, entries = known[name]
        (place,) = file.schema_arrow.get_all_field_indices(name)
        found = file.schema_arrow.field(place).type
        (chunk,) = (chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == name)
        if getattr(found, "storage_type", found) != want or chunk.path_in_schema != path:
            raise ValueError(f"column {name} is {found}, not {want}")
        if chunk.num_values != values or chunk.compression != "ZSTD":
            raise ValueError(f"{chunk.num_values} values of {name} by {chunk.compression}, not {values} by ZSTD")
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        last = first + chunk.total_compressed_size
        if not 4 <= first < last <= len(data):
            raise ValueError(f"column {name} lies outside the file")
        _check_pages(memoryview(data)[first:last], values, values * width + _SLACK, entries)


def _check_pages(pages: memoryview, values: int, most: int, entries: int) -> None:
    """`ValueError` unless a column's pages together have so many values, take at most so many bytes when decompressed,
    and its dictionary, if there may be one, has at most so many entries."""
    at = found = size = 0
    while at < len(pages):
        header, at = _struct(pages, at)
        at += header[_COMPRESSED]
        size += header[_SIZE]
        if header[_COMPRESSED] < 0 or header[_SIZE] < 0 or at > len(pages):
            raise ValueError("a page ends outside its column")
        if header[_KIND] == _DICTIONARY:
            if not 0 < header[_DICTIONARY_HEADER][_COUNT] <= entries or found:
                raise ValueError("a dictionary that we would not write")
        elif header[_KIND] == _DATA:
            if header[_DATA_HEADER][_COUNT] < 0:
                raise ValueError("a page of less than no values")
            found += header[_DATA_HEADER][_COUNT]
        else:
            raise ValueError(f"a page of kind {header[_KIND]}")
    if found != values or size > most:
        raise ValueError(f"its pages declare {found} values in {size} bytes, not {values} in {most} at most")


# The fields of a page's header (parquet.thrift) that are looked at, and its kinds.
_KIND, _SIZE, _COMPRESSED, _DATA_HEADER, _DICTIONARY_HEADER = 1, 2, 3, 5, 7
_COUNT = 1
_DATA, _DICTIONARY = 0, 2


def _struct(data: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The struct at byte `at` in Thrift's compact protocol, field -> value, and where it ends.

    Numbers, booleans, strings and structs, which is all that headers of pages have. `ValueError` for others,
    `IndexError` after the last byte.
    """
    fields: dict[int, Any] = {}
    name = 0
    if depth > 2:
        raise ValueError("a header nested too deep")
    while kind := data[at] & 15:
        step, at = data[at] >> 4, at + 1
        if step:
            name += step
        else:
            name, at = _number(data, at)
        if kind in (1, 2):
            fields[name] = kind == 1
        elif kind in (4, 5, 6):
            fields[name], at = _number(data, at)
        elif kind == 8:
            length, at = _unsigned(data, at)
            at += length
        elif kind == 12:
            fields[name], at = _struct(data, at, depth + 1)
        else:
            raise ValueError(f"a header with a field of type {kind}")
    return fields, at + 1


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """A signed number: 0, −1, 1, −2, … are stored as 0, 1, 2, 3, …"""
    value, at = _unsigned(data, at)
    return value >> 1 ^ -(value & 1), at


def _unsigned(data: memoryview, at: int) -> tuple[int, int]:
    """A number of at most ten bytes: seven bits each, the lowest first; the last byte is below 128."""
    value = 0
    for place in range(10):
        value |= (data[at + place] & 127) << 7 * place
        if data[at + place] < 128:
            return value, at + place + 1
    raise ValueError("a number that does not end")
