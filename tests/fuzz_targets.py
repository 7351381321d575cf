"""Every parser of bytes from outside, as a function that a fuzzer calls, with good bytes to start from, and mutations.

A target returns, or raises one of its own error classes. Anything else is a bug, and so is a hang or a full memory.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import latentprep
from latentprep.errors import LatentError
from latentprep.format import Manifest, Quantizer, ShardRecord, open_dataset
from latentprep.format.hashes import CONTENT_HASH
from latentprep.format.latents import described, read_latents
from latentprep.format.stores import store_of
from latentprep.format.zarr_store import (
    CANDIDATES,
    decode_codes,
    decode_hashes,
    decode_keys,
    decode_labels,
    encode_shard_files,
    metadata_files,
    shard_files,
)
from latentprep.sources.images import BadImage, decode
from latentprep.sources.source import open_source
from latenttrain.checkpoint import load_tensors, read_config, save_tensors
from pictures import jpeg, make_folder, picture

_NUMBERS = ("0", "-1", "1e999", "NaN", "Infinity", "9" * 30, "1099511627776", "4294967296", "0.5", "true", "null")
_TEXTS = ('""', '"../../x"', '"\\ud800"', '"pipe:true"', "[]", "{}", "[" * 2000, '{"a":' * 2000)
TOKENS = [token.encode() for token in (*_NUMBERS, *_TEXTS)]
WORDS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


@dataclass(frozen=True)
class Target:
    """seeds: good inputs. run: parses one; what it may raise. text: whether tokens of JSON are of use."""

    seeds: list[bytes]
    run: Callable[[bytes], object]
    text: bool = False
    allowed: tuple[type[Exception], ...] = (LatentError,)

    def __call__(self, data: bytes) -> bool:
        """Whether the bytes were refused."""
        try:
            self.run(data)
        except self.allowed as error:
            assert str(error)
            return True
        return False


def mutate(target: Target, draw: random.Random) -> bytes:
    """One of the target's seeds with a few things wrong."""
    data = bytearray(draw.choice(target.seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        if not data:
            break
        at, kind = draw.randrange(len(data)), draw.randrange(9)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + draw.choice((1, 2, 4, 16, len(data)))]
        elif kind == 3:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 16)))
        elif kind == 4:
            other = draw.choice(target.seeds)
            start = draw.randrange(len(other))
            data[at:] = other[start:]
        elif kind == 5:
            data[at:at] = data[at : at + draw.choice((1, 8, 64, 512))]
        elif kind == 6:
            size = draw.choice((1, 2, 4, 8))
            word = draw.choice(WORDS) & ((1 << 8 * size) - 1)
            data[at : at + size] = word.to_bytes(size, draw.choice(("little", "big")))
        elif target.text:
            _put_token(data, at, draw.choice(TOKENS))
        else:
            data[at : at + draw.choice((4, 16, 64))] = bytes(draw.choice((4, 16, 64)))
    return bytes(data)


def _put_token(data: bytearray, at: int, token: bytes) -> None:
    """In place of the JSON value after the next colon or comma."""
    starts = [place for place in (data.find(mark, at) for mark in (b": ", b", ", b",\n")) if place >= 0]
    if starts:
        start = min(starts) + 2
        ends = [place for place in (data.find(mark, start) for mark in (b",", b"\n", b"]", b"}")) if place >= 0]
        data[start : min(ends, default=len(data))] = token


def make_manifest(compression: int = 0) -> Manifest:
    return Manifest(
        codec={"name": "resample", "factor": 8},
        quantizer=Quantizer(3, (-1.0, 0.5), (0.25, 0.125)),
        transform={"size": 24, "views": {"train": 2, "val": 1}, "seed": 0, "resize": "bicubic"},
        source={"spec": "somewhere", "sha256": "ab" * 32},
        classes=("cat", "dog"),
        latent=(2, 3, 5),
        flip=(1, -1),
        shard_rows=4,
        chunk_rows=2,
        compression=CANDIDATES[compression],
        splits={"train": 10, "val": 3},
        content_hash=CONTENT_HASH,
        written_by="test",
    )


def make_targets(folder: Path) -> dict[str, Target]:
    """All of them; they work in `folder`, best one in memory."""
    return {
        "manifest": Target([make_manifest(i).to_bytes() for i in range(3)], Manifest.from_bytes, text=True),
        "record": _record(),
        **_shards(),
        "tar shard": _whole_shard("wds"),
        "parquet shard": _whole_shard("parquet"),
        "image": Target(_images(), _decode, allowed=(BadImage,)),
        **_archives(folder),
        "parquet": _parquet(folder),
        "table": _table(folder),
        "checkpoint": _checkpoint(folder),
        "config": _config(folder),
        "latents": _latents(folder),
        "dataset": _dataset(folder),
    }


def _record() -> Target:
    invalid = ({"row": 1, "key": "k", "reason": "r"},)
    record = ShardRecord("train", 0, 4, {}, 1, (0, 1), "ab" * 32, invalid).to_bytes()
    plain = record[: record.rindex(b',\n "sha256"')] + b"\n}\n"
    return Target([record, plain], lambda data: ShardRecord.from_bytes(data, "record"), text=True)


def _shards() -> dict[str, Target]:
    """The four files of a shard, past their checksums."""
    seeds: dict[str, list[bytes]] = {"codes": [], "labels": [], "keys": [], "hashes": []}
    manifests = [make_manifest(i) for i in range(3)]
    for manifest in manifests:
        codes = np.random.default_rng(0).integers(0, 8, (4, *manifest.row_shape("train")), dtype=np.uint8)
        labels, keys = np.arange(4, dtype=np.int32) % 2, list("abcd")
        files = encode_shard_files(manifest, "train", 0, codes, labels, keys, _hashes())
        for name, path in shard_files(manifest, "train", 0).items():
            seeds[name].append(files[path])

    def codes_as(data: bytes) -> None:
        codes = [decode_codes(manifest, "train", 0, data) for manifest in (manifests[len(data) % 3],)]
        assert codes[0].shape == (4, 2, 2, 3, 5)

    def labels_as(data: bytes) -> None:
        assert decode_labels(manifests[0], "train", 0, data).shape == (4,)

    def keys_as(data: bytes) -> None:
        assert len(decode_keys(manifests[0], "train", 0, data)) == 4

    def hashes_as(data: bytes) -> None:
        assert decode_hashes(manifests[0], "train", 0, data).shape == (4, 16)

    runs = {"codes": codes_as, "labels": labels_as, "keys": keys_as, "hashes": hashes_as}
    return {name: Target(seeds[name], run) for name, run in runs.items()}


def _hashes() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (4, 16), np.uint8)


def _whole_shard(store: str) -> Target:
    """A shard of a store that keeps it in one file, past its checksum."""
    manifest = replace(make_manifest(), store=store)
    functions = store_of(manifest)
    codes = np.random.default_rng(0).integers(0, 8, (4, *manifest.row_shape("train")), dtype=np.uint8)
    codes[2] = 0
    labels, keys = np.array([0, 1, -1, 1], np.int32), ["a.jpg", "b/ä c.png", "d", "e" * 120]
    path = functions.shard_files(manifest, "train", 0)["codes"]
    data = functions.encode_shard_files(manifest, "train", 0, codes, labels, keys, _hashes())[path]

    def run(data: bytes) -> None:
        codes, labels, keys = functions.decode_shard_files(manifest, "train", 0, {path: data})
        assert codes.shape == (4, 2, 2, 3, 5)
        assert len(labels) == len(keys) == 4
        if functions.shard_files(manifest, "train", 0)["hashes"] == path:
            assert functions.decode_hashes(manifest, "train", 0, data).shape == (4, 16)

    return Target([data], run)


def _images() -> list[bytes]:
    pixels = picture(0, 24, 32)
    seeds = [jpeg(pixels), jpeg(pixels[:, :, 0])]
    for kind, options in (
        ("JPEG", {"progressive": True, "quality": 50}),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    return [*seeds, buffer.getvalue()]


def _decode(data: bytes) -> None:
    pixels = decode(data, need_side=8, max_pixels=1 << 20)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.size <= 3 << 20


def _archives(folder: Path) -> dict[str, Target]:
    images = make_folder(folder / "tarred", train=1, val=1, side=16)
    seeds = []
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for split in ("train", "val"):
                tar.add(images / split, "x" * 120 + "ä" * 60 + "/" + split)
        seeds.append(buffer.getvalue().rstrip(b"\0") + bytes(1024 + 512))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:  # WebDataset
        for key in "ab":
            for name, data in ((f"{key}.jpg", jpeg(picture(1, 16, 16))), (f"{key}.cls", key.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    seeds.append(buffer.getvalue().rstrip(b"\0") + bytes(1024 + 512))
    path = folder / "archive.bin"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        source = open_source(path)
        for split in source.splits:
            for i in range(source.size(split)):
                source.read(split, i)

    def zipped(data: bytes) -> None:
        read(gzip.compress(data, 1))

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(images.rglob("*.jpg")):
            archive.write(file, f"ä/{file.relative_to(images)}")
        archive.writestr("README", "nothing")
    packed = [buffer.getvalue()]

    small = [gzip.compress(seed, 9, mtime=0) for seed in seeds]
    return {
        "tar": Target(seeds, read),
        "tar in gzip": Target(seeds, zipped),
        "gzip": Target(small, read),
        "zip": Target(packed, read),
    }


def _parquet(folder: Path) -> Target:
    """A source of a Parquet file: columns, labels, images, and the JSON of `datasets` in its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    images = [{"bytes": jpeg(picture(i, 16, 16)), "path": f"{i}.jpg"} for i in range(8)]
    table = pa.table({"image": images, "label": [0, 1] * 4})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    plain = pa.table({"image": [image["bytes"] for image in images], "label": ["cat", "dog"] * 4})
    seeds = []
    for rows, options in (
        (table, {"compression": "none", "row_group_size": 4}),
        (table, {"compression": "zstd", "row_group_size": 3, "data_page_version": "2.0"}),
        (plain, {"compression": "snappy", "row_group_size": 8}),
    ):
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, **options)
        seeds.append(buffer.getvalue())
    path = folder / "train.parquet"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        source = open_source(path)
        for split in source.splits:
            for i in range(source.size(split)):
                source.read(split, i)

    return Target(seeds, read, text=True)


def _table(folder: Path) -> Target:
    """A table of labels: CSV, or JSON lines."""
    seeds = [
        b'file_name,label,split\n0.jpg,"a ""cat""",train\n1.jpg,dog,train\n2.jpg,dog,val\n',
        b'{"file_name": "0.jpg", "label": 1}\n{"file_name": "1.jpg", "label": 2}\n',
    ]
    images = folder / "labelled"
    images.mkdir()
    for i in range(3):
        (images / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0")

    def read(data: bytes) -> None:
        path = folder / ("labels.jsonl" if data[:1] == b"{" else "labels.csv")
        path.write_bytes(data)
        open_source(images, labels=path, val_fraction=0 if path.suffix == ".jsonl" else None)

    return Target(seeds, read, text=True)


def _checkpoint(folder: Path) -> Target:
    path = folder / "best.safetensors"
    save_tensors(path, {"a": torch.zeros(2, 3), "b": torch.arange(4)}, {"epoch": 1, "top1": 0.5})
    seeds = [path.read_bytes()]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tensors, notes = load_tensors(path)
        assert isinstance(notes, dict)
        assert sum(tensor.numel() for tensor in tensors.values()) < 1000

    return Target(seeds, read, text=True)


def _config(folder: Path) -> Target:
    import latenttrain

    root = folder / "run"
    images = make_folder(folder / "learned", train=4, val=2, side=32)
    latentprep.encode(images, codec="resample:factor=4", size=32, out=folder / "codes", shard_rows=8)
    latenttrain.fit(folder / "codes", epochs=1, width=0.25, depth=0.25, batch_size=4, out=root)
    path = root / "config.json"
    seeds = [path.read_bytes()]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_config(root)

    return Target(seeds, read, text=True)


def _latents(folder: Path) -> Target:
    """The header of a .npy file, and the JSON beside it."""
    root, dataset = folder / "floats", open_dataset(folder / "codes")
    root.mkdir()
    about = json.dumps(described(dataset)).encode()
    np.save(root / "val.npy", np.zeros((4, *dataset.manifest.latent), np.float16))
    seed = (root / "val.npy").read_bytes()

    def read(data: bytes) -> None:
        (root / "latents.json").write_bytes(data if data[:1] == b"{" else about)
        (root / "val.npy").write_bytes(seed if data[:1] == b"{" else data)
        read_latents(root, dataset, "val")

    return Target([seed, about], read, text=True)


def _dataset(folder: Path) -> Target:
    """A manifest with records that name it, so that all that follows from it is used: reading, verifying, metadata."""
    root = folder / "hostile"
    shutil.copytree(folder / "codes", root)
    good = open_dataset(root)
    records = [record for split in good.splits for record in good.records(split)]

    def read(data: bytes) -> None:
        (root / "manifest.json").write_bytes(data)
        for record in records:
            named = replace(record, manifest=hashlib.sha256(data).hexdigest())
            (root / record.path).write_bytes(named.to_bytes())
        latentprep.verify(root)
        dataset = open_dataset(root)
        metadata_files(dataset.manifest)
        for split in dataset.splits:
            dataset.load(split)

    return Target([good.manifest.to_bytes()], read, text=True)
