"""The Parquet store: arrays to the bytes of one shard's file, and back. It has the same functions as `zarr_store`.

Layout: `data/{split}-{index:05d}-of-{shards:05d}.parquet`, as the Hugging Face hub names them; one row group; zstd:
    key        string
    label      int64, −1 in a row that could not be read; the names of the classes are in the schema's metadata
    codes      lists of (C, h, w), or of (V, C, h, w) if a split has several views, of uint8 or uint16: the Array3D or
               Array4D of the `datasets` library, which reads all of this by itself
    valid      bool: label is not −1
    thumbnail  struct of bytes (a WebP file) and path (null): an Image of `datasets`; only if the manifest says how
    hash       16 bytes of the hash of the source file; only if the manifest has a content hash

pyarrow writes and reads the columns. It allocates what headers declare, so they are checked here first.
"""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from latentprep.errors import DatasetError, SystemFault, opt
from latentprep.format.hashes import HASH_BYTES
from latentprep.format.manifest import INVALID_LABEL, Manifest, Plan
from latentprep.format.thrift import read_struct
from latentprep.format.thumbnails import thumbnails

if TYPE_CHECKING:
    import pyarrow

_LEVEL = 9  # of zstd; for codes that are pixels, a tenth smaller than 1
_PAGE = 1 << 24  # bytes before compression
_FEW_BITS = 4  # up to here codes are bit-packed, as places in a dictionary; above, bytes are split from zeros
_MAX_CODES = 1 << 31  # in a shard: Arrow counts the items of lists in 32 bits
_MAX_KEY_BYTES = 1 << 16  # longer than any path
_SLACK = 1 << 16  # bytes that the pages of a column may have beside its values
_MAX_THINGS = 10_000  # in a footer; ours has a few dozen
_MAGIC, _ZSTD, _DATA, _DICTIONARY = b"PAR1", 6, 0, 2  # the end of a file, a compression, and kinds of pages
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
    """Array name -> path of the file that holds it for shard `index`: one file holds all."""
    path = f"data/{split}-{index:05d}-of-{plan.shard_count(split):05d}.parquet"
    names = ("codes", "labels", "keys") if plan.content_hash is None else ("codes", "labels", "keys", "hashes")
    return dict.fromkeys(names, path)


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
        "codes": {"shape": shape, "dtype": manifest.quantizer.dtype.name, "_type": f"Array{len(shape)}D"},
        "valid": {"dtype": "bool", "_type": "Value"},
    }
    if manifest.thumbnail is not None:
        columns["thumbnail"] = {"_type": "Image"}
    if manifest.content_hash is not None:
        columns["hash"] = {"dtype": "binary", "_type": "Value"}
    return columns


def encode_shard_files(
    manifest: Manifest,
    split: str,
    index: int,
    codes: np.ndarray,
    labels: np.ndarray,
    keys: list[str],
    hashes: np.ndarray | None = None,
) -> dict[str, bytes]:
    """One shard's arrays -> path: bytes of its file. Inverse of `decode_shard_files`.

    codes: u8 [n,V,C,h,w]; labels: i32 [n]; keys: n strings; hashes: u8 [n,16], if the manifest has a content hash; n at
    most ``manifest.shard_rows``.
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
    if hashes is not None:
        arrays["hash"] = pa.array([row.tobytes() for row in hashes], pa.binary())
    extension = {  # so that `datasets` gives the column its shape; pyarrow alone reads lists
        "ARROW:extension:name": _EXTENSION.format(columns["codes"]["_type"]),
        "ARROW:extension:metadata": json.dumps([shape, columns["codes"]["dtype"]]),
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
    found = _decode(manifest, split, index, data, ("key", "label", "codes", "valid"))
    return found["codes"], found["label"], found["key"]


def decode_labels(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's file -> i32 [n]. Raises as `decode_shard_files` does."""
    return _decode(manifest, split, index, data, ("label",))["label"]


def decode_keys(manifest: Manifest, split: str, index: int, data: bytes) -> list[str]:
    """The bytes of one shard's file -> n keys. Raises as `decode_shard_files` does."""
    return _decode(manifest, split, index, data, ("key",))["key"]


def decode_hashes(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's file -> u8 [n,16]. Raises as `decode_shard_files` does."""
    return _decode(manifest, split, index, data, ("hash",))["hash"]


def _decode(manifest: Manifest, split: str, index: int, data: bytes, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The wanted columns of a file: codes u8 [n,V,C,h,w], label i32 [n], key as n strings, hash u8 [n,16]."""
    check_installed()
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, row = manifest.rows_in_shard(split, index), manifest.row_shape(split)
    shape = row if len(features(manifest)["codes"]["shape"]) == len(row) else row[1:]
    found: dict[str, Any] = {}
    try:
        _check_sizes(memoryview(data), wanted, rows, shape)
        limits = {"thrift_string_size_limit": len(data), "thrift_container_size_limit": _MAX_THINGS}
        with pq.ParquetFile(pa.BufferReader(data), **limits) as file:
            _check_types(file.schema_arrow, wanted, len(shape), manifest.quantizer.dtype)
            table = file.read(list(wanted), use_threads=False)  # whoever reads shards has threads already
        columns = {name: _whole(table.column(name)) for name in wanted}
        if "label" in wanted:
            labels = columns["label"].to_numpy()
            found["label"] = labels.astype(np.int32)
            if not np.array_equal(labels, found["label"]):
                raise ValueError("a label is no 32-bit integer")
        if "key" in wanted:
            found["key"] = columns["key"].to_pylist()
        if "hash" in wanted:
            hashes = columns["hash"].to_pylist()
            if any(len(one) != HASH_BYTES for one in hashes):
                raise ValueError(f"a hash is not {HASH_BYTES} bytes long")
            found["hash"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)
        if "codes" in wanted:
            found["codes"] = _flat(columns["codes"], shape).reshape(rows, *row)
        if "valid" in wanted and not np.array_equal(
            columns["valid"].to_numpy(zero_copy_only=False), found["label"] != INVALID_LABEL
        ):
            raise ValueError("its columns valid and label do not fit together")
    except Exception as error:  # pyarrow, and the types that other libraries register with it, raise many kinds
        path = shard_files(manifest, split, index)["codes"]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DatasetError(f"{path} cannot be decoded ({what:.200})", "encode it again") from error
    return found


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


def _check_types(schema: pyarrow.Schema, wanted: tuple[str, ...], depth: int, dtype: np.dtype) -> None:
    """`ValueError` unless these columns have the types that we write."""
    import pyarrow as pa

    codes = pa.from_numpy_dtype(dtype)
    for _ in range(depth):
        codes = pa.list_(codes)
    types = {"key": pa.string(), "label": pa.int64(), "codes": codes, "valid": pa.bool_(), "hash": pa.binary()}
    for name in wanted:
        found = schema.field(name).type
        if getattr(found, "storage_type", found) != types[name]:
            raise ValueError(f"column {name} is {found}, not {types[name]}")


def _check_sizes(data: memoryview, wanted: tuple[str, ...], rows: int, shape: tuple[int, ...]) -> None:
    """`ValueError` unless these columns have the rows and sizes that we write: then reading them takes no more memory
    than it should.

    Numbers are those of fields in parquet.thrift. pyarrow's own parser ends the process for some bad footers.
    """
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or bytes(data[-4:]) != _MAGIC or length > len(data) - 12:
        raise ValueError("no Parquet file")
    footer, _ = read_struct(data[-8 - length : -8])
    (group,) = footer[4]
    if footer[3] != rows or group[3] != rows:
        raise ValueError(f"{footer[3]} rows, not {rows}")
    chunks = {b".".join(chunk[3][3]).decode(): chunk[3] for chunk in group[1]}
    for name in wanted:
        path, values, width, entries = {  # in the schema; values; their most bytes; most entries of a dictionary
            "codes": (_leaf(len(shape)), rows * math.prod(shape), 8, 1 << _FEW_BITS),
            "key": (name, rows, _MAX_KEY_BYTES, 0),
            "hash": (name, rows, 4 + HASH_BYTES, 0),
        }.get(name, (name, rows, 8, 0))
        if path not in chunks:
            raise ValueError(f"no column {path}")
        chunk = chunks[path]
        if chunk[5] != values:
            raise ValueError(f"column {name} has {chunk[5]} values, not {values}")
        if chunk[4] != _ZSTD:
            raise ValueError(f"column {name} is not compressed by zstd")
        first = min(place for place in (chunk[9], chunk.get(11)) if place)
        last = first + chunk[7]
        if not 4 <= first < last <= len(data):
            raise ValueError(f"column {name} lies outside the file")
        _check_pages(data[first:last], values, values * width + _SLACK, entries)


def _check_pages(pages: memoryview, values: int, most: int, entries: int) -> None:
    """`ValueError` unless a column's pages together have so many values and at most so many bytes when decompressed,
    and its dictionary, if there may be one, has at most so many entries."""
    at = found = size = 0
    while at < len(pages):
        header, at = read_struct(pages, at)
        kind, large, packed = header[1], header[2], header[3]
        at += packed
        size += large
        if packed < 0 or large < 0 or at > len(pages):
            raise ValueError("a page ends outside its column")
        if kind == _DICTIONARY:
            if not 0 < header[7][1] <= entries or found:
                raise ValueError("a dictionary that we would not write")
        elif kind == _DATA and header[5][1] >= 0:
            found += header[5][1]
        else:
            raise ValueError(f"a page of kind {kind} that we would not write")
    if found != values or size > most:
        raise ValueError(f"its pages declare {found} values in {size} bytes, not {values} in {most} at most")
