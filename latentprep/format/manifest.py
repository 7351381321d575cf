"""`manifest.json` and the shard records: everything needed to read a dataset and to encode more like it.

The manifest is written once, before the first shard, and never changes. A shard exists if its record exists: the
record is written last, and names each of the shard's files with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from latentprep.errors import DatasetError
from latentprep.format.fields import Fields, dump_json, parse_json, read_json
from latentprep.format.hashes import CONTENT_HASH
from latentprep.format.quantizer import MOST_BITS, Codebook, Quantizer, Statistics, read_quantizer, whole_as_int
from latentprep.format.thumbnails import ColourMap
from latentprep.storage.places import Place

FORMAT = "latentprep"
VERSION = 2  # of datasets with codes of more than 8 bits; that of all others is 1
STORES = ("zarr", "wds", "parquet")
MANIFEST = "manifest.json"
CODEBOOKS = "codebooks.safetensors"  # the vectors of a codebook, whose SHA-256 the manifest has
RECORDS = "records"
ERRORS = "errors.jsonl"
LINEAR_DECODER = "linear-decoder.safetensors"  # derived from the dataset and its source; may be absent
SOURCE_FILES = "source-files.safetensors"  # sizes and times of the images' files; may be absent
SRGB, STORED = COLOURS = ("srgb", "stored")  # convert embedded colour profiles to sRGB, or ignore them
INVALID_LABEL = -1  # the label of a row whose sample could not be read

_MAX_ROWS = 1 << 40
_MAX_SIDE = 1 << 16
_MAX_SOUND = 1 << 32  # samples of a waveform: an hour at any usual rate
MAX_SHARDS = 1_000_000  # in a dataset: its records are looked up one by one
MAX_SHARD_CODES = 1 << 34  # a shard is read into memory whole


@dataclass(frozen=True, order=True)
class ShardId:
    """A shard's name in its dataset: a split, and which of the split's shards it is, from 0."""

    split: str
    index: int

    def __str__(self) -> str:
        return f"{self.split} {self.index}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a dataset's bytes, except the quantizer and the compression.

    codec: JSON configuration; ``latentprep.codecs.codec_from_config`` rebuilds the codec from it.
    bits: per code; with `rate` or `mean_bits`, the most that a code may take. rate: bits per code on disk that the
    quantizer was fitted to, mean_bits: bits per code on average, which channels get by what they are worth; None of
    both: it was fitted to `bits` in every channel.
    joint: whether the codes of a sample are chosen together, see `latentprep.quantizing.joint`.
    transform: how a sample becomes pixels: ``size`` (pixels), ``views``, ``seed``, ``resize``,
    ``colour`` (`SRGB`: embedded profiles are converted; `STORED`, or absent: they are ignored). With ``media``
    ``sound``, how it becomes a waveform: ``size`` (samples), ``rate`` (per second), ``views``, ``seed``, ``resample``.
    source: ``spec`` as the user gave it; ``sha256`` of its splits, keys, labels and classes, all of them; ``part``:
    ``index`` and ``of``, where the dataset has only that part of it.
    classes: names; a label is an index into them.
    latent: (C, h, w) of one view's codes.
    flip: per-channel signs, if ``sign * mirrored latents`` are exactly the mirrored image's latents, else None.
    shard_rows, chunk_rows: samples per shard (the last may have fewer), and per separately compressed chunk of it.
    splits: rows of each split, including invalid ones.
    content_hash: how source files are hashed, `CONTENT_HASH`; None in older datasets, whose rows have no hashes.
    store: how shards are stored; see `latentprep.format.stores`.
    """

    codec: dict
    bits: int
    joint: bool
    transform: dict
    source: dict
    classes: tuple[str, ...]
    latent: tuple[int, int, int]
    flip: tuple[int, ...] | None
    shard_rows: int
    chunk_rows: int
    splits: dict[str, int]
    store: str = "zarr"
    rate: float | None = None
    mean_bits: float | None = None
    content_hash: str | None = None
    written_by: str = ""

    @property
    def equal_bits(self) -> bool:
        """Whether every channel was to have `bits`, neither more nor fewer."""
        return self.rate is None and self.mean_bits is None

    @property
    def asked_bits(self) -> float:
        """Bits per value, on average, that were asked for; with `rate`, the most."""
        return self.bits if self.mean_bits is None else whole_as_int(self.mean_bits)

    def views(self, split: str) -> int:
        """Views of each sample of a split."""
        views = self.transform["views"]
        return int(views[split] if isinstance(views, dict) else views)

    @property
    def of_sound(self) -> bool:
        """Whether samples are sounds, in place of images."""
        return self.transform.get("media") == "sound"

    @property
    def most_views(self) -> int:
        """Views of each sample of the split that has the most."""
        return max(map(self.views, self.splits))

    def row_shape(self, split: str) -> tuple[int, int, int, int]:
        """(V, C, h, w): the codes of one sample of a split."""
        return (self.views(split), *self.latent)

    def shard_count(self, split: str) -> int:
        return -(-self.splits[split] // self.shard_rows)

    def rows_in_shard(self, split: str, index: int) -> int:
        return min(self.shard_rows, self.splits[split] - index * self.shard_rows)

    def shards(self) -> Iterator[ShardId]:
        """Every shard, in order."""
        return (ShardId(split, index) for split in self.splits for index in range(self.shard_count(split)))

    def manifest(self, quantizer: Quantizer, statistics: Statistics | None, compression: list[dict]) -> Manifest:
        """The finished plan. Inverse of `Manifest.plan`."""
        fits = quantizer.bits == self.bits if self.equal_bits else quantizer.bits <= self.bits
        assert fits and bool(quantizer.filter) == self.joint, "a quantizer for another plan"
        planned: dict[str, Any] = {name: getattr(self, name) for name in _PLANNED if name not in ("bits", "joint")}
        return Manifest(**planned, quantizer=quantizer, statistics=statistics, compression=compression)


_PLANNED = tuple(f.name for f in fields(Plan))


@dataclass(frozen=True, kw_only=True)
class Manifest(Plan):
    """A finished plan: everything needed to read the dataset and to encode more like it.

    quantizer: what codes mean; `bits` and `joint` follow from it.
    statistics: of the calibration samples' codes; None in older datasets.
    compression: the Zarr codec chain of the codes array, chosen by measurement. Other stores keep it for `convert`.
    thumbnail: how latents become the thumbnails of a Parquet store; None if it has none, as other stores.
    """

    bits: int = field(init=False)
    joint: bool = field(init=False)
    quantizer: Quantizer
    compression: list[dict]
    statistics: Statistics | None = None
    thumbnail: ColourMap | None = None
    _file_sha256: str = field(init=False, default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", self.quantizer.bits if self.equal_bits else MOST_BITS)
        object.__setattr__(self, "joint", bool(self.quantizer.filter))

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file it was read from, else of its bytes. It identifies the dataset's settings."""
        return self._file_sha256 or hashlib.sha256(self.to_bytes()).hexdigest()

    def plan(self) -> Plan:
        """The plan that it finishes. Inverse of `Plan.manifest`."""
        return Plan(**{name: getattr(self, name) for name in _PLANNED})

    def to_bytes(self) -> bytes:
        return dump_json(
            {
                "format": FORMAT,
                "version": VERSION if self.bits > MOST_BITS else 1,
                "written_by": self.written_by,
                "store": self.store,
                "codec": self.codec,
                "quantizer": self.quantizer.to_json(),
                **({} if self.rate is None else {"rate": self.rate}),
                **({} if self.mean_bits is None else {"mean_bits": self.mean_bits}),
                **({} if self.statistics is None else {"statistics": self.statistics.to_json()}),
                "transform": self.transform,
                "source": self.source,
                "classes": list(self.classes),
                "latent": list(self.latent),
                "flip": None if self.flip is None else list(self.flip),
                "shard_rows": self.shard_rows,
                "chunk_rows": self.chunk_rows,
                "compression": self.compression,
                "splits": self.splits,
                **({} if self.content_hash is None else {"content_hash": self.content_hash}),
                **({} if self.thumbnail is None else {"thumbnail": self.thumbnail.to_json()}),
            }
        )

    def files(self) -> dict[str, bytes]:
        """What a dataset's folder holds before its first shard: its own bytes by their name, after a codebook's."""
        file = self.quantizer.file if isinstance(self.quantizer, Codebook) else b""
        return {**({CODEBOOKS: file} if file else {}), MANIFEST: self.to_bytes()}

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST, codebooks: Callable[[], bytes] | None = None) -> Manifest:
        """Parse and check; `DatasetError` names the first thing that is wrong. codebooks: see `read_quantizer`."""
        top = parse_json(data, where, "restore it, or delete the folder and encode again")
        if top.document.get("format") != FORMAT:
            raise DatasetError(
                f"{where} is not a latent dataset's manifest", "give a folder that latentprep encode made"
            )
        version = top.whole("version", 1, 1 << 30)
        if version > VERSION:
            raise DatasetError(
                f"{where} has format version {version}; this latentprep reads up to {VERSION}",
                "upgrade with pip install --upgrade latentprep",
            )
        quantizer = read_quantizer(top.object("quantizer"), codebooks)
        latent = tuple(top.list("latent", int))
        if len(latent) != 3 or not all(1 <= n <= _MAX_SIDE for n in latent) or latent[0] != len(quantizer.lo):
            raise top.error(f"has latent = {latent}; it must be the quantizer's number of channels, height, width")
        statistics = None
        if "statistics" in top.document:
            counted = top.object("statistics")
            statistics = Statistics(counted.numbers("mean"), counted.numbers("std"))
            if len(statistics.mean) != latent[0]:
                raise top.error(f"has statistics for {len(statistics.mean)} channels; its latents have {latent[0]}")
        flip = None if top.get("flip") is None else tuple(top.list("flip", int))
        if flip is not None and (len(flip) != latent[0] or set(flip) - {-1, 1}):
            raise top.error("has a field 'flip' that is not one sign per channel")
        thumbnail = None
        if "thumbnail" in top.document:
            colours = top.object("thumbnail")
            thumbnail = ColourMap(colours.numbers("matrix"), colours.numbers("bias"))
            if len(thumbnail.matrix) != 3 * latent[0]:
                raise top.error(f"has a thumbnail's map for {len(thumbnail.matrix)} / 3 channels, not {latent[0]}")
        transform = top.object("transform")
        sound = "media" in transform.document and transform.text("media", ("images", "sound")) == "sound"
        transform.whole("size", 1, _MAX_SOUND if sound else _MAX_SIDE)
        if sound:
            transform.whole("rate", 1, 1 << 20)
            transform.whole("seed", 0, (1 << 63) - 1)
        if "colour" in transform.document:
            transform.text("colour", COLOURS)
        source = top.object("source")
        source.text("spec")
        source.sha256("sha256")
        if "part" in source.document:
            part = source.object("part")
            part.whole("index", 0, part.whole("of", 1, MAX_SHARDS) - 1)
        codec = top.object("codec")
        codec.text("name")
        splits = top.object("splits")
        if isinstance(transform.get("views"), dict):
            for name in splits.document:
                transform.object("views").whole(name, 1, 4096)
        else:
            transform.whole("views", 1, 4096)
        manifest = cls(
            codec=codec.document,
            quantizer=quantizer,
            transform=transform.document,
            source=source.document,
            classes=tuple(top.list("classes", str)),
            latent=(latent[0], latent[1], latent[2]),
            flip=flip,
            shard_rows=top.whole("shard_rows", 1, _MAX_ROWS),
            chunk_rows=top.whole("chunk_rows", 1, _MAX_ROWS),
            compression=top.list("compression", dict),
            splits={_split_name(name, top): splits.whole(name, 0, _MAX_ROWS) for name in splits.document},
            store=top.text("store", STORES),
            rate=top.number("rate", 0, MOST_BITS) if "rate" in top.document else None,
            mean_bits=top.number("mean_bits", 0, MOST_BITS) if "mean_bits" in top.document else None,
            content_hash=top.text("content_hash", (CONTENT_HASH,)) if "content_hash" in top.document else None,
            written_by=top.text("written_by"),
            statistics=statistics,
            thumbnail=thumbnail,
        )
        manifest._check_sizes(top)
        object.__setattr__(manifest, "_file_sha256", hashlib.sha256(data).hexdigest())
        return manifest

    def _check_sizes(self, where: Fields) -> None:
        """Refuse sizes that would take all of a reader's memory or time."""
        if self.shard_rows % self.chunk_rows:
            raise where.error(f"has chunk_rows = {self.chunk_rows}, which does not divide shard_rows")
        if not self.splits or sum(map(self.shard_count, self.splits)) > MAX_SHARDS:
            raise where.error(f"has no splits, or more than {MAX_SHARDS} shards")
        if self.shard_rows * max(math.prod(self.row_shape(split)) for split in self.splits) > MAX_SHARD_CODES:
            raise where.error(f"has shards of more than {MAX_SHARD_CODES} codes")


def _split_name(name: str, where: Fields) -> str:
    """The name, checked: it becomes the name of a folder."""
    if not name.isidentifier() or len(name) > 60 or name == RECORDS:
        raise where.error(f"has a split named {name!r:.60}; a split's name is letters, digits and _")
    return name


@dataclass(frozen=True)
class FileRecord:
    """One file of a shard: its size in bytes and SHA-256."""

    bytes: int
    sha256: str


# A record's checksum of itself, its last field; absent in records of the first release.
_CHECKSUM, _END = b',\n "sha256": "', b"\n}\n"
_FIELDS = {"split", "index", "rows", "manifest", "files", "source_bytes", "saturated", "invalid"}


@dataclass(frozen=True)
class ShardRecord:
    """The proof that a shard was committed.

    rows: samples in it. invalid: those that could not be read, as {row, key, reason}.
    files: path relative to the dataset's root -> `FileRecord`.
    source_bytes: size of the valid samples' image files.
    saturated: per channel, how many latents lay outside the quantizer's range.
    manifest: SHA-256 of the manifest that this shard was made with.
    device: that the codec ran on, such as "cuda: NVIDIA H100"; empty for CPUs, and for shards made of codes.
    """

    split: str
    index: int
    rows: int
    files: dict[str, FileRecord]
    source_bytes: int
    saturated: tuple[int, ...]
    manifest: str
    invalid: tuple[dict, ...] = field(default=())
    device: str = ""

    @property
    def shard(self) -> ShardId:
        return ShardId(self.split, self.index)

    @property
    def path(self) -> str:
        return record_path(self.split, self.index)

    def to_bytes(self) -> bytes:
        """The record's file: its fields, and at the end the SHA-256 of all bytes before it."""
        plain = dump_json(
            {
                "split": self.split,
                "index": self.index,
                "rows": self.rows,
                "manifest": self.manifest,
                "files": {path: {"bytes": f.bytes, "sha256": f.sha256} for path, f in self.files.items()},
                "source_bytes": self.source_bytes,
                "saturated": list(self.saturated),
                "invalid": list(self.invalid),
                **({"device": self.device} if self.device else {}),
            }
        )
        head = plain.removesuffix(_END)
        return head + _CHECKSUM + hashlib.sha256(head).hexdigest().encode() + b'"' + _END

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ShardRecord:
        """Parse and check; `DatasetError` names the first thing that is wrong."""
        top = parse_json(data, where, "delete it and run the same latentprep encode again: it makes only that shard")
        head, mark, tail = data.rpartition(_CHECKSUM)
        if mark and tail != hashlib.sha256(head).hexdigest().encode() + b'"' + _END:
            raise top.error("was altered: it does not match the SHA-256 at its end")
        if not mark and (unknown := set(top.document) - _FIELDS):  # it may be the checksum under an altered name
            raise top.error(f"was altered: it has an unknown field '{min(unknown):.60}' and no checksum")
        files = top.object("files")
        invalid = top.list("invalid", dict)
        rows = top.whole("rows", 1, _MAX_ROWS)
        for entry in (Fields(e, f"{where}: invalid", top.way_out) for e in invalid):
            entry.whole("row", 0, _MAX_ROWS)
            entry.text("key")
            entry.text("reason")
        saturated = top.list("saturated", int)
        if not all(0 <= count <= _MAX_ROWS << 20 for count in saturated):
            raise top.error("has a number in 'saturated' that is not a count")
        return cls(
            split=top.text("split"),
            index=top.whole("index", 0, _MAX_ROWS),
            rows=rows,
            files={
                path: FileRecord(files.object(path).whole("bytes", 0, 1 << 50), files.object(path).sha256("sha256"))
                for path in files.document
            },
            source_bytes=top.whole("source_bytes", 0, 1 << 60),
            saturated=tuple(saturated),
            manifest=top.sha256("manifest"),
            invalid=tuple(invalid),
            device=top.text("device") if "device" in top.document else "",
        )


def record_path(split: str, index: int) -> str:
    return f"{RECORDS}/{split}-{index:06d}.json"


def read_manifest(root: Place) -> Manifest:
    """The manifest of the dataset at `root`; `DatasetError` if there is none."""
    path = root / MANIFEST
    try:
        data = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        what = "no such folder" if not root.exists() else "no latent dataset (it has no manifest.json)"
        raise DatasetError(f"{root}: {what}", "give a folder that latentprep encode made") from None

    def codebooks() -> bytes:
        try:
            return (root / CODEBOOKS).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetError(f"{root / CODEBOOKS} is missing", "restore it, or encode again") from None

    manifest = Manifest.from_bytes(data, str(path), codebooks)
    if isinstance(manifest.quantizer, Codebook):
        _ = manifest.quantizer.tables  # they can be read
    return manifest


def read_record(root: Place, split: str, index: int) -> ShardRecord | None:
    """The record of one shard, or None if that shard is not committed."""
    path = root / record_path(split, index)
    try:
        data = read_json(path)
    except FileNotFoundError:
        return None
    record = ShardRecord.from_bytes(data, str(path))
    if (record.split, record.index) != (split, index):
        raise DatasetError(
            f"{path} is the record of shard {record.split} {record.index}", "restore the file that belongs there"
        )
    return record


def train_split(splits: Iterable[str]) -> str:
    """The split to learn from: train, or the first if there is no train."""
    names = list(splits)
    return "train" if "train" in names else names[0]
