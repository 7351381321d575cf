"""The Zarr store: arrays to the bytes of one shard's files, and back.

Zarr itself makes metadata, labels and keys, in memory, one shard at a time. Codes are laid out by hand, with the same
bytes that Zarr would write. `latentprep.format.commit` writes them to the disk. For reading, verified bytes are decoded
with the metadata that follows from the *manifest*: a dataset's own `zarr.json` files are never trusted.

Layout (Zarr v3): group / ; group /{split} ; arrays
    /{split}/codes   u8, u16 (N, V, C, h, w), sharding codec, one file per shard
    /{split}/labels  i32    (N,), one chunk per shard
    /{split}/keys    string (N,), one chunk per shard
    /{split}/hashes  u8     (N, 16), one chunk per shard; only if the manifest has a content hash
"""

from __future__ import annotations

import warnings
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from latentprep.errors import DatasetError
from latentprep.format.hashes import HASH_BYTES
from latentprep.format.manifest import Manifest, Plan

CHUNK_BYTES = 1 << 20  # codes in a separately compressed chunk, about
_ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
_BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "typesize": 1, "blocksize": 0},
}
# With channels first, each gets its own Huffman table: 6.8 instead of 7.6 bits per value for TAESD at 8 bits.
_BY_CHANNEL = {"name": "transpose", "configuration": {"order": [2, 1, 0, 3, 4]}}
CANDIDATES: tuple[list[dict], ...] = ([_BY_CHANNEL, _ZSTD], [_ZSTD], [_BY_CHANNEL, _BLOSC])
_LABEL_CODECS = [_ZSTD]
_CRC_BYTES = 4
_ABSENT = (1 << 64) - 1  # offset and length of an absent inner chunk in a shard's index
_MAX_KEY_BYTES = 1 << 16  # longer than any path


def chunk_rows(shard_rows: int, row_bytes: int) -> int:
    """The most rows that make about `CHUNK_BYTES` of codes and divide `shard_rows`."""
    most = max(1, min(shard_rows, CHUNK_BYTES // row_bytes))
    return next(rows for rows in range(most, 0, -1) if shard_rows % rows == 0)


def shard_files(plan: Plan, split: str, index: int) -> dict[str, str]:
    """Array name -> path of its file for shard `index`, relative to the dataset's root."""
    paths = {
        "codes": f"{split}/codes/c/{index}/0/0/0/0",
        "labels": f"{split}/labels/c/{index}",
        "keys": f"{split}/keys/c/{index}",
    }
    return paths if plan.content_hash is None else paths | {"hashes": f"{split}/hashes/c/{index}/0"}


def encode_shard_files(
    manifest: Manifest,
    split: str,
    index: int,
    codes: np.ndarray,
    labels: np.ndarray,
    keys: list[str],
    hashes: np.ndarray | None = None,
) -> dict[str, bytes]:
    """One shard's arrays -> path: bytes of its files. Inverse of `decode_shard_files`.

    codes: u8 [n,V,C,h,w]; labels: i32 [n]; keys: n strings; hashes: u8 [n,16], if the manifest has a content hash; n at
    most ``manifest.shard_rows``.
    """
    paths = shard_files(manifest, split, index)
    arrays = {"labels": labels, "keys": np.array(keys, dtype=np.dtypes.StringDType())}
    if hashes is not None:
        arrays["hashes"] = hashes
    files = {paths["codes"]: encode_codes(manifest, codes)}
    return files | {paths[name]: _chunk_bytes(manifest, split, name, array) for name, array in arrays.items()}


def decode_shard_files(
    manifest: Manifest, split: str, index: int, files: dict[str, bytes]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """path: bytes of one shard's files -> codes u8 [n,V,C,h,w], labels i32 [n], keys. Inverse of
    `encode_shard_files`. No keys if their file is left out. Raises `DatasetError` for bytes that do not decode."""
    paths = shard_files(manifest, split, index)
    return (
        decode_codes(manifest, split, index, files[paths["codes"]]),
        decode_labels(manifest, split, index, files[paths["labels"]]),
        decode_keys(manifest, split, index, files[paths["keys"]]) if paths["keys"] in files else [],
    )


def encode_codes(manifest: Manifest, codes: np.ndarray) -> bytes:
    """One shard's codes, u8 [n,V,C,h,w] -> the bytes of its file. Inverse of `decode_codes`.

    Zarr's sharding codec by hand: the same bytes as zarr-python, in 0.5 to 0.8 of its time. First the inner chunks,
    each compressed, the last one padded with zeros; then the index, which marks chunks without rows as absent, and its
    CRC-32C. Raises `DatasetError` for a compression that this version does not write.
    """
    _codecs(manifest.compression)  # Zarr refuses what it cannot write
    try:
        compressor, order = _chain(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown_compression(error) from error
    rows, end, chunks = manifest.chunk_rows, 0, []
    index = np.full((manifest.shard_rows // rows, 2), _ABSENT, "<u8")
    for place, start in enumerate(range(0, len(codes), rows)):
        part = codes[start : start + rows]
        if len(part) < rows:
            part = np.concatenate([part, np.zeros((rows - len(part), *codes.shape[1:]), codes.dtype)])
        chunks.append(bytes(compressor.encode(np.ascontiguousarray(part.transpose(order)))))
        index[place] = end, len(chunks[-1])
        end += len(chunks[-1])
    places = index.tobytes()
    return b"".join([*chunks, places, google_crc32c.value(places).to_bytes(_CRC_BYTES, "little")])


def decode_codes(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's codes file -> u8 [n,V,C,h,w]. Raises `DatasetError` for bytes that do not decode.

    Zarr's sharding codec by hand: the inner chunks, each compressed; then an index of (offset, length) u64 pairs and
    its CRC-32C. Zarr's own reader gives the same result at a quarter of the speed; streaming waits for nothing else.
    """
    rows, row = manifest.rows_in_shard(split, index), manifest.row_shape(split)
    count = manifest.shard_rows // manifest.chunk_rows
    end = len(data) - 16 * count - _CRC_BYTES  # of the inner chunks
    try:
        compressor, order = _chain(manifest)
        raw = np.empty([(manifest.chunk_rows, *row)[axis] for axis in order], manifest.quantizer.dtype)
        codes = np.empty((rows, *row), raw.dtype)
        if end < 0:
            raise ValueError(f"its {len(data)} bytes are fewer than the index needs")
        places = np.frombuffer(data, "<u8", 2 * count, end).reshape(count, 2).tolist()
        for start, (offset, length) in zip(range(0, rows, manifest.chunk_rows), places, strict=False):
            if offset + length > end:
                raise ValueError(f"its index points to byte {offset + length}, but the chunks end at {end}")
            chunk = data[offset : offset + length]
            if _declared_bytes(chunk) != raw.nbytes:
                raise ValueError(f"a chunk declares {_declared_bytes(chunk)} bytes of codes, not {raw.nbytes}")
            compressor.decode(chunk, out=raw)
            part = codes[start : start + manifest.chunk_rows]
            part[:] = raw.transpose(np.argsort(order))[: len(part)]
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, MemoryError) as error:
        raise _undecodable(shard_files(manifest, split, index)["codes"], error) from error
    return codes


def decode_labels(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's labels file -> i32 [n]. Raises `DatasetError` for bytes that do not decode."""
    try:
        if _declared_bytes(data) != 4 * manifest.shard_rows:
            raise ValueError(f"it declares {_declared_bytes(data)} bytes, not {4 * manifest.shard_rows}")
        values = np.frombuffer(numcodecs.Zstd().decode(data), "<i4").astype(np.int32)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise _undecodable(shard_files(manifest, split, index)["labels"], error) from error
    return values[: manifest.rows_in_shard(split, index)]


def decode_keys(manifest: Manifest, split: str, index: int, data: bytes) -> list[str]:
    """The bytes of one shard's keys file -> n keys. Raises `DatasetError` for bytes that do not decode.

    ``vlen-utf8``: the number of keys, u32; then for each key its length in bytes, u32, and its bytes.
    """
    keys: list[str] = []
    try:
        if not 0 <= _declared_bytes(data) <= _MAX_KEY_BYTES * manifest.shard_rows:
            raise ValueError(f"it declares {_declared_bytes(data)} bytes for {manifest.shard_rows} keys")
        plain = memoryview(numcodecs.Zstd().decode(data))
        if (count := int.from_bytes(plain[:4], "little")) != manifest.shard_rows:
            raise ValueError(f"it holds {count} keys, not {manifest.shard_rows}")
        at = 4
        for _ in range(manifest.rows_in_shard(split, index)):
            start, at = at + 4, at + 4 + int.from_bytes(plain[at : at + 4], "little")
            if at > len(plain):
                raise ValueError("a key ends after the last byte")
            keys.append(str(plain[start:at], "utf-8"))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise _undecodable(shard_files(manifest, split, index)["keys"], error) from error
    return keys


def decode_hashes(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's hashes file -> u8 [n,16]. Raises `DatasetError` for bytes that do not decode."""
    size = HASH_BYTES * manifest.shard_rows
    try:
        if _declared_bytes(data) != size:
            raise ValueError(f"it declares {_declared_bytes(data)} bytes, not {size}")
        values = np.frombuffer(numcodecs.Zstd().decode(data), np.uint8).reshape(-1, HASH_BYTES)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise _undecodable(shard_files(manifest, split, index)["hashes"], error) from error
    return values[: manifest.rows_in_shard(split, index)]


def _chain(manifest: Manifest) -> tuple[numcodecs.abc.Codec, list[int]]:
    """The manifest's compression as a compressor, and the order of axes in which it gets a chunk.

    Raises `KeyError`, `TypeError` or `ValueError` unless the chain is one compressor, with or without a transposition
    before it.
    """
    *filters, step = manifest.compression
    settings = step["configuration"]
    if step["name"] == "zstd":
        compressor = numcodecs.Zstd(level=settings["level"], checksum=settings["checksum"])
    elif step["name"] == "blosc":
        shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[settings["shuffle"]]
        blocks = settings["blocksize"]
        compressor = numcodecs.Blosc(settings["cname"], settings["clevel"], shuffle, blocks, settings["typesize"])
    else:
        raise ValueError(f"{step['name']} is not a known compressor")
    if [f["name"] for f in filters] not in ([], ["transpose"]):
        raise ValueError("more than a transposition before the compressor")
    return compressor, filters[0]["configuration"]["order"] if filters else [0, 1, 2, 3, 4]


def _declared_bytes(chunk: bytes) -> int:
    """The size that a zstd frame (RFC 8878, section 3.1.1.1) or a blosc buffer declares, in bytes; −1 if none.

    Decompressors allocate the declared size. Checked first, a small damaged file cannot fill the memory.
    """
    if chunk[:4] != b"\x28\xb5\x2f\xfd":
        return int.from_bytes(chunk[4:8], "little") if len(chunk) >= 16 else -1
    if len(chunk) < 6:
        return -1
    width, single = chunk[4] >> 6, chunk[4] >> 5 & 1
    if width == single == 0:
        return -1
    start = 6 - single + (0, 1, 2, 4)[chunk[4] & 3]
    size = int.from_bytes(chunk[start : start + (1 << width)], "little")
    return size + 256 if width == 1 else size


def described(manifest: Manifest) -> str:
    return "+".join(step["name"] for step in manifest.compression)


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """path -> bytes of the `zarr.json` files, so that any Zarr v3 reader opens the dataset."""
    files: dict[str, Any] = {}
    store = MemoryStore(files)
    zarr.create_group(store=store, zarr_format=3)
    for split, rows in manifest.splits.items():
        zarr.create_group(store=store, path=split, zarr_format=3, attributes={"classes": list(manifest.classes)})
        for name in shard_files(manifest, split, 0):
            try:
                _create(manifest, store, f"{split}/{name}", split, name, rows)
            except (TypeError, ValueError) as error:
                raise _unknown_compression(error) from error
    return {path: buffer.to_bytes() for path, buffer in files.items()}


def choose_compression(codes: np.ndarray) -> list[dict]:
    """The candidate codec chain that compresses these codes, u8 or u16 [n,V,C,h,w], best; the first one if equal."""
    chains = [[_sized(step, codes.itemsize) for step in chain] for chain in CANDIDATES]
    sizes = []
    for chain in chains:
        files: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(files),
            shape=codes.shape,
            dtype=codes.dtype,
            chunks=codes.shape,
            **_codecs(chain),
            **_WRITE_EVERY_CHUNK,
        )
        array[:] = codes
        sizes.append(len(_only_chunk(files)))
    return chains[int(np.argmin(sizes))]


def _sized(step: dict, size: int) -> dict:
    """A step of a chain for codes of so many bytes: blosc takes their bits apart, so it must know."""
    settings = step["configuration"]
    return step | {"configuration": settings | {"typesize": size}} if "typesize" in settings else step


_WRITE_EVERY_CHUNK: dict[str, Any] = {"config": {"write_empty_chunks": True}}


def _codecs(chain: list[dict]) -> dict[str, Any]:
    """A recorded chain -> arguments of `zarr.create_array`. Only core Zarr codecs are built."""
    kinds: dict[str, Any] = {"zstd": ZstdCodec, "blosc": BloscCodec}
    try:
        return {
            "filters": [TransposeCodec.from_dict(c) for c in chain if c.get("name") == "transpose"],
            "compressors": [kinds[c["name"]].from_dict(c) for c in chain if c["name"] != "transpose"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown_compression(error) from error


def _unknown_compression(error: Exception) -> DatasetError:
    return DatasetError(f"this version does not know the manifest's compression ({error})", "restore the manifest")


def _create(manifest: Manifest, store: Any, path: str, split: str, name: str, rows: int) -> zarr.Array:
    """An array of the dataset, with the same metadata on disk and in memory."""
    with warnings.catch_warnings():  # `string` is a registered extension type; zarr-python warns at each use
        warnings.simplefilter("ignore")
        if name == "codes":
            row = manifest.row_shape(split)
            return zarr.create_array(
                store,
                name=path or None,
                shape=(rows, *row),
                dtype=manifest.quantizer.dtype,
                chunks=(manifest.chunk_rows, *row),
                shards=(manifest.shard_rows, *row),
                fill_value=0,
                dimension_names=("sample", "view", "channel", "height", "width"),
                **_codecs(manifest.compression),
                **_WRITE_EVERY_CHUNK,
            )
        kind, fill, tail = {"labels": ("i4", 0, ()), "keys": ("string", "", ()), "hashes": ("u1", 0, (HASH_BYTES,))}[
            name
        ]
        return zarr.create_array(
            store,
            name=path or None,
            shape=(rows, *tail),
            dtype=kind,
            chunks=(manifest.shard_rows, *tail),
            fill_value=fill,
            dimension_names=("sample", "byte")[: 1 + len(tail)],
            compressors=_codecs(_LABEL_CODECS)["compressors"],
            **_WRITE_EVERY_CHUNK,
        )


def _chunk_bytes(manifest: Manifest, split: str, name: str, values: np.ndarray) -> bytes:
    """The bytes that Zarr stores for one chunk (labels, keys or hashes) with these values."""
    files: dict[str, Any] = {}
    array = _create(manifest, MemoryStore(files), "", split, name, len(values))
    array[:] = values
    return _only_chunk(files)


def _undecodable(where: str, error: Exception) -> DatasetError:
    return DatasetError(f"{where} cannot be decoded ({type(error).__name__}: {error})", "encode it again")


def _only_chunk(files: dict[str, Any]) -> bytes:
    """The bytes of the only chunk in a store with one array."""
    (chunk,) = [data for key, data in files.items() if not key.endswith("zarr.json")]
    return chunk.to_bytes()
