"""Bytes made to harm: each is one clear error, in little memory and time, and nothing is ever run."""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import subprocess
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import latentprep
from fuzz_targets import Target, make_manifest, make_targets, mutate
from latentprep.codecs import codec_from_config
from latentprep.errors import CodecError, DatasetError, LatentError, SourceError
from latentprep.format import Manifest, ShardRecord, open_dataset
from latentprep.format.commit import create_dataset
from latentprep.format.zarr_store import decode_codes, decode_hashes, decode_keys, decode_labels
from latentprep.sources import finding
from latentprep.sources.images import BadImage, decode
from latentprep.sources.source import open_source


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Fails if the test takes more than 24 MiB at once."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a program was started")

    for owner, name in ((subprocess, "Popen"), (os, "system"), (os, "popen"), (os, "posix_spawn")):
        monkeypatch.setattr(owner, name, refuse)


# --- archives


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tgz"])
def test_endless_empty_members(tmp_path: Path, little_memory: None, pack) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "x").write_bytes(pack(header("nothing") * 8_000 + bytes(1024)))
    with pytest.raises(SourceError, match="holds no images"):
        open_source(tmp_path / "x")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_name_of_gigabytes(tmp_path: Path, little_memory: None, kind: bytes) -> None:
    with gzip.open(tmp_path / "x.tgz", "wb", 1) as file:
        file.write(header("name", 64 << 20, kind))
        for _ in range(64):
            file.write(bytes(1 << 20))
    with pytest.raises(SourceError, match="headers of a member take more than"):
        open_source(tmp_path / "x.tgz")


def test_headers_upon_headers(tmp_path: Path) -> None:
    chain = (header("name", 1, tarfile.GNUTYPE_LONGNAME) + b"x".ljust(512)) * 3000
    (tmp_path / "x.tar").write_bytes(chain + header("a.jpg") + bytes(1024))
    with pytest.raises(SourceError, match="damaged or cut short"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tgz"])
def test_a_member_of_negative_size(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
    """tarfile goes back, and reads the same members for ever."""
    block = bytearray(header("train/ant/1.jpg"))
    block[124:136] = (-1024).to_bytes(12, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x").write_bytes(pack(header("a") + bytes(block) + bytes(2048)))
    with pytest.raises(SourceError, match="damaged or cut short"):
        open_source(tmp_path / "x")


def test_a_member_that_inflates_to_gigabytes(tmp_path: Path, little_memory: None) -> None:
    """Deflate's thousandfold: of an image more than is declared, of any other file only the beginning is inflated."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join([*(deflate.compress(bytes(1 << 20)) for _ in range(1 << 9)), deflate.flush()])
    path = tmp_path / "x.zip"
    for declared, reason in ((1000, "more than the 1000 bytes"), ((1 << 30) + 1, "more than the limit")):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a/1.jpg", "b/1.jpg", "b/README"):
                archive.writestr(name, packed)
            for member in archive.filelist:
                member.compress_type = zipfile.ZIP_DEFLATED
                member.file_size = declared if member.filename.endswith(".jpg") else 1 << 29
        source = open_source(path, val_fraction=0)
        with pytest.raises(SourceError, match=reason):
            source.read("train", 1)


def test_specs_are_never_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_runs: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finding, "MAX_TARS", 1000)
    for spec in (
        "pipe:touch ran",
        "pipe:touch ran|cat.tar",
        "$(touch ran)",
        "`touch ran`.tar",
        "| touch ran",
        "; touch ran",
    ):
        with pytest.raises(SourceError):
            open_source(spec)
        with pytest.raises(DatasetError):
            latentprep.open(spec)
    for bomb in ("{0..999999999}.tar", "{0..99999}{0..99999}.tar", "{" + "9" * 5000 + "..1}.tar", "{a,b}" * 30):
        with pytest.raises(SourceError):
            open_source(bomb)
    assert list(tmp_path.iterdir()) == []


# --- images


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    first = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + first + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def test_image_bombs(little_memory: None) -> None:
    pixels, deflate = (b"IDAT", zlib.compress(bytes(1 << 20))), zlib.compressobj()
    side = (65535, 65535)
    text = b"".join([*(deflate.compress(bytes(1 << 20)) for _ in range(64)), deflate.flush()])
    for bomb, reason in (
        (png(60_000, 60_000, pixels), "pixels"),
        (b"GIF89a" + struct.pack("<HH3xc4HBB", *side, b",", 0, 0, *side, 0, 8) + bytes(40), "pixels"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode(bomb)
    whole = zlib.compress(bytes(16 * (1 + 3 * 16)))
    for kind, body in ((b"zTXt", b"k\0\0"), (b"zTXt", b"Raw profile type exif\0\0"), (b"iCCP", b"k\0\0")):
        assert not decode(png(16, 16, (kind, body + text), (b"IDAT", whole))).any()  # left alone: it is not the picture


def test_formats_that_run_programs_are_not_read(nothing_runs: None) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%BeginBinary\n9 9 scale\n%%EOF\n"
    with pytest.raises(BadImage, match="not an image but PostScript"):
        decode(postscript)


# --- datasets


@pytest.mark.parametrize(
    "change",
    [
        {"splits": {"train": 1 << 40}, "shard_rows": 4},
        {"splits": {"train": 10, "val": 2_000_000}, "shard_rows": 2, "chunk_rows": 1},
        {"shard_rows": 1 << 40},
        {"latent": [2, 65536, 65536]},
        {"chunk_rows": 3},
        {"chunk_rows": 8},
        {"splits": {}},
        {"splits": {"records": 3}},
        {"splits": {"x" * 300: 3}},
        {"splits": {"train": float("nan")}},
        {"transform": {"size": 24, "views": 1 << 30, "seed": 0}},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_at_once(change: dict) -> None:
    document = json.loads(make_manifest().to_bytes()) | change
    if "splits" in change:
        document["transform"]["views"] = 2
    with pytest.raises(DatasetError):
        Manifest.from_bytes(json.dumps(document).encode())


def test_numbers_that_are_none_and_depth_are_refused() -> None:
    good = make_manifest().to_bytes()
    assert Manifest.from_bytes(good)
    for value in (b"1e999", b"-1e999", b"NaN", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000):
        with pytest.raises(DatasetError, match="not valid JSON"):
            Manifest.from_bytes(good.replace(b'"factor": 8', b'"factor": ' + value))


@pytest.mark.parametrize(
    "compression",
    [
        [],
        [{"name": "pickle"}],
        [{"name": ["zstd"]}],
        [{"name": "transpose", "configuration": {"order": [0, 0, 0, 0, 0]}}, {"name": "zstd"}],
        [{"name": "transpose"}, {"name": "zstd"}],
        [{"name": "zstd", "configuration": {"level": 10**9}}],
        [{"name": "numcodecs.shuffle", "configuration": {}}, {"name": "zstd"}],
    ],
    ids=str,
)
def test_compressions_that_we_never_wrote_are_refused(tmp_path: Path, compression: list) -> None:
    manifest = replace(make_manifest(), compression=compression)
    with pytest.raises(DatasetError, match="compression|cannot be decoded"):
        create_dataset(tmp_path, manifest)
        decode_codes(manifest, "train", 0, bytes(100))


def test_compressed_bombs_are_refused_before_they_grow(little_memory: None) -> None:
    manifest = make_manifest()
    bomb = zstd_frame(1 << 40)
    for parse in (decode_labels, decode_keys, decode_hashes):
        with pytest.raises(DatasetError, match=r"declares 1099511627776 bytes"):
            parse(manifest, "train", 0, bomb)
    index = struct.pack("<4Q", 0, len(bomb), 0, len(bomb)) + bytes(4)
    with pytest.raises(DatasetError, match=r"a chunk declares 1099511627776 bytes of codes, not 120"):
        decode_codes(manifest, "train", 0, bomb + index)


def zstd_frame(declared: int) -> bytes:
    """A frame that says it holds so many bytes, and holds none."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", declared) + b"\x01\0\0"


def test_records_that_point_elsewhere_are_refused(tmp_path: Path) -> None:
    create_dataset(tmp_path, make_manifest())
    dataset = open_dataset(tmp_path)
    good = ShardRecord("train", 0, 4, {}, 1, (0, 0), dataset.manifest.sha256)
    (tmp_path / "records").mkdir()
    path = tmp_path / good.path
    for change in (
        {"saturated": (0, 0, 0)},
        {"invalid": ({"row": 4, "key": "k", "reason": "r"},)},
        {"invalid": ({"row": 1 << 39, "key": "k", "reason": "r"},)},
        {"rows": 3},
        {"split": "val"},
    ):
        path.write_bytes(replace(good, **change).to_bytes())  # type: ignore[arg-type]
        with pytest.raises(DatasetError):
            dataset.record("train", 0)
    elsewhere = b'"files": {"../../etc/passwd": {"bytes": 1, "sha256": "%s"}}' % (b"0" * 64)
    text = good.to_bytes().replace(b'"files": {}', elsewhere)
    path.write_bytes(text[: text.rindex(b',\n "sha256"')] + b"\n}\n")
    found = latentprep.verify(tmp_path)
    assert "does not list the files" in next(p.what for p in found.problems if (p.split, p.index) == ("train", 0))


def test_a_manifest_chooses_no_code_to_run(nothing_runs: None) -> None:
    for name in ("os.system", "../evil", "latentprep.codecs.dct:DctCodec", ""):
        with pytest.raises(CodecError, match="unknown codec"):
            codec_from_config({"name": name})


# --- all parsers


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    "name",
    ["manifest", "record", "codes", "labels", "keys", "hashes", "image", "tar", "tar in gzip", "gzip", "zip", "parquet",
     "table", "checkpoint", "config", "latents", "dataset", "parquet shard"],
)  # fmt: skip
def test_mutations_are_our_errors_or_nothing(targets: dict[str, Target], name: str) -> None:
    """A hundred or two of each here; `benchmarks/fuzz.py` does a million."""
    target, refused = targets[name], 0
    for seed in target.seeds:
        assert name == "codes" or not target(seed)

    @settings(max_examples=25 if name == "dataset" else 150, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 1 << 32))
    def mutations(seed: int) -> None:
        nonlocal refused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused += target(mutate(target, random.Random(seed)))

    mutations()
    assert refused > 5


def test_every_target_is_fuzzed(targets: dict[str, Target]) -> None:
    assert all(issubclass(kind, (LatentError, BadImage)) for target in targets.values() for kind in target.allowed)
    assert len(targets) == 19
