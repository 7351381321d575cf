"""The WebDataset store: arrays to the bytes of one shard's tar, and back. It has the same functions as `zarr_store`.

Layout: `{split}-{index:06d}.tar`, uncompressed, with members in the order of the rows:
    KEY.codes                view 0: its C*h*w codes, bit-packed (`latentprep.format.packing`)
    KEY.1.codes, …           views 1 to V-1
    KEY.cls                  the label, in decimal digits
    KEY                      a row that could not be read: empty and without an extension, so that WebDataset's
                             readers skip it
If the manifest has a content hash, the hashes lie beside it in `{split}-{index:06d}.hashes`, 16 bytes for each row:
readers of the tars take no other members than these.

KEY is the sample's key. Only letters, digits, `_`, `-` and `/` (not a leading one) stay; the rest is percent-encoded,
because WebDataset cuts names at the first dot, and no name may lead out of a folder. Every header field except name and
size is fixed. Names above 100 bytes get a pax header, as usual. Tars written in any other way are refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from urllib.parse import unquote

import numpy as np

from latentprep.errors import DatasetError, opt
from latentprep.format.hashes import HASH_BYTES
from latentprep.format.manifest import INVALID_LABEL, Manifest, Plan
from latentprep.format.packing import pack_views, unpack_views, view_bytes

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_QUOTED = re.compile(rb"^/|[^A-Za-z0-9_/-]")
_PAX_PATH = re.compile(rb"[0-9]+ path=([^\n]+)\n")
_SIZE = re.compile(rb"[0-7]{11}\0")
_LABEL = re.compile(rb"[0-9]{1,9}")


def shard_files(plan: Plan, split: str, index: int) -> dict[str, str]:
    """Array name -> path of the file that holds it for shard `index`: one tar holds all but the hashes."""
    paths = dict.fromkeys(("codes", "labels", "keys"), f"{split}-{index:06d}.tar")
    return paths if plan.content_hash is None else paths | {"hashes": f"{split}-{index:06d}.hashes"}


def described(manifest: Manifest) -> str:
    return "bit-packed"


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """None: the shards are the only files."""
    return {}


def encode_shard_files(
    manifest: Manifest,
    split: str,
    index: int,
    codes: np.ndarray,
    labels: np.ndarray,
    keys: list[str],
    hashes: np.ndarray | None = None,
) -> dict[str, bytes]:
    """One shard's arrays -> path: bytes of its tar, and of its hashes. Inverse of `decode_shard_files`.

    codes: u8 [n,V,C,h,w], 0 in rows of label -1; labels: i32 [n]; keys: n strings; hashes: u8 [n,16], if the manifest
    has a content hash; n at most ``manifest.shard_rows``.
    Raises `DatasetError` for an empty or repeated key: the samples of a tar are distinguished by their names.
    """
    paths, suffixes = shard_files(manifest, split, index), _suffixes(manifest, split)
    path = paths["codes"]
    packed = pack_views(codes, manifest.quantizer)
    parts, seen = [], {""}
    for key, views, label in zip(keys, packed, labels.tolist(), strict=True):
        if key in seen:
            raise DatasetError(
                f"{path}: two samples have the key {key!r}" if key else f"{path}: a sample has an empty key",
                f"rename the image, or use {opt('store', 'zarr')}, which accepts any keys",
            )
        seen.add(key)
        name = quote_key(key)
        if label == INVALID_LABEL:
            parts.append(_member(name, b""))
            continue
        contents = (*(view.tobytes() for view in views), b"%d" % label)
        parts += [_member(f"{name}.{suffix}", data) for suffix, data in zip(suffixes, contents, strict=True)]
    files = {path: b"".join((*parts, _END))}
    return files if hashes is None else files | {paths["hashes"]: hashes.tobytes()}


def decode_shard_files(
    manifest: Manifest, split: str, index: int, files: dict[str, bytes]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """path: bytes of one shard's tar -> codes u8 [n,V,C,h,w], labels i32 [n], keys. Inverse of
    `encode_shard_files`. Raises `DatasetError` for bytes that do not decode."""
    path, row = shard_files(manifest, split, index)["codes"], manifest.row_shape(split)
    labels, keys, packed = _decode(manifest, split, index, files[path])
    views = np.frombuffer(b"".join(packed), np.uint8).reshape(-1, row[0], view_bytes(row[1:], manifest.quantizer))
    codes = unpack_views(views, manifest.quantizer, row[1:])
    if len(codes) < len(labels):
        valid, codes = codes, np.zeros((len(labels), *row), codes.dtype)
        codes[labels != INVALID_LABEL] = valid
    return codes, labels, keys


def decode_labels(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's tar -> i32 [n]."""
    return _decode(manifest, split, index, data)[0]


def decode_keys(manifest: Manifest, split: str, index: int, data: bytes) -> list[str]:
    """The bytes of one shard's tar -> n keys."""
    return _decode(manifest, split, index, data)[1]


def decode_hashes(manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
    """The bytes of one shard's hashes -> u8 [n,16]. Raises `DatasetError` for another number of bytes."""
    size = HASH_BYTES * manifest.rows_in_shard(split, index)
    if len(data) != size:
        path = shard_files(manifest, split, index)["hashes"]
        raise DatasetError(f"{path} cannot be decoded (it has {len(data)} bytes, not {size})", "encode it again")
    return np.frombuffer(data, np.uint8).reshape(-1, HASH_BYTES)


def quote_key(key: str) -> str:
    """A sample's key -> what its members' names begin with. Inverse of `unquote_key`."""
    return _QUOTED.sub(lambda match: b"%%%02X" % ord(match[0]), key.encode()).decode()


def unquote_key(name: str) -> str:
    """WebDataset's ``__key__`` -> the sample's key. Inverse of `quote_key`."""
    return unquote(name, errors="strict")


def _suffixes(manifest: Manifest, split: str) -> list[str]:
    """What follows KEY and a dot in the names of a sample's members, in their order."""
    return ["codes", *(f"{view}.codes" for view in range(1, manifest.views(split))), "cls"]


def _decode(manifest: Manifest, split: str, index: int, data: bytes) -> tuple[np.ndarray, list[str], list[bytes]]:
    """A tar -> labels i32 [n], keys, and the packed codes of each view of each valid row."""
    rows, suffixes = manifest.rows_in_shard(split, index), _suffixes(manifest, split)
    length = view_bytes(manifest.latent, manifest.quantizer)
    labels: list[int] = []
    keys: list[str] = []
    packed: list[bytes] = []
    try:
        members = _members(data)
        for name, content in members:
            stem, dot, _ = name.partition(".")
            keys.append(unquote_key(stem))
            if len(keys) > rows:
                raise ValueError(f"more than {rows} samples")
            if not dot and not content:
                labels.append(INVALID_LABEL)
                continue
            sample = [(name, content), *islice(members, len(suffixes) - 1)]
            if [member for member, _ in sample] != [f"{stem}.{suffix}" for suffix in suffixes]:
                raise ValueError(f"the members of sample {stem} are not {', '.join(suffixes)}")
            *views, label = (content for _, content in sample)
            if any(len(view) != length for view in views) or not _LABEL.fullmatch(label):
                raise ValueError(f"sample {stem} has no label, or codes that are not {length} bytes long")
            labels.append(int(label))
            packed += views
        if len(keys) < rows:
            raise ValueError(f"{len(keys)} samples, not {rows}")
    except ValueError as error:
        path = shard_files(manifest, split, index)["codes"]
        raise DatasetError(f"{path} cannot be decoded ({error})", "encode it again") from error
    return np.array(labels, np.int32), keys, packed


def _member(name: str, data: bytes) -> bytes:
    """One file of a tar: header, contents, padding."""
    info = tarfile.TarInfo(name)  # mode 0644, owner 0, no times: the same bytes on every machine
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % _BLOCK)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of every file in a tar. Inverse of `_member`; `ValueError` for anything that it does not write.

    By hand: tarfile takes ten times as long for a thousand small members, and shards are read again in each epoch.
    """
    place, long_name = 0, b""
    while True:
        header, start = data[place : place + _BLOCK], place + _BLOCK
        if not header.strip(b"\0"):
            if data[place:] != _END:
                raise ValueError(f"its end mark at byte {place} is damaged")
            return
        if header[257:265] != b"ustar\x0000" or not _SIZE.fullmatch(header, 124, 136):
            raise ValueError(f"no header at byte {place}")
        size = int(header[124:135], 8)
        content, place = data[start : start + size], start + size + -size % _BLOCK
        if len(content) < size:
            raise ValueError(f"it is cut short at byte {len(data)}")
        kind = header[156:157]
        if kind == b"x" and (path := _PAX_PATH.fullmatch(content)):
            long_name = path[1]
        elif kind == b"0":
            yield (long_name or header[:100].rstrip(b"\0")).decode("ascii"), content
            long_name = b""
        else:
            raise ValueError(f"a member of type {kind!r}")
