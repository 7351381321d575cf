"""Folders, tars and WebDataset shards as sources: same rows whatever the packing, and one clear error for bad input."""

import gzip
import io
import os
import pickle
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from told import Told

from latentprep.errors import SourceError, UsageError
from latentprep.sources import archives, offsets
from latentprep.sources.source import Source, open_source

JPEG = b"\xff\xd8\xff\xe0"
PNG = b"\x89PNG\r\n\x1a\n"
TWO = {"train/ant/1.jpg": JPEG, "train/bee/1.jpg": JPEG, "val/ant/2.jpg": JPEG, "val/bee/2.jpg": JPEG}


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes], *, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_archive(path: Path, files: dict[str, bytes], mode: str) -> Path:
    """A tar or tgz (``w``, ``w:gz``), or a zip (``stored``, ``deflated``)."""
    if mode.startswith("w"):
        return write_tar(path, files, mode=mode)
    return write_zip(path, files, zipfile.ZIP_STORED if mode == "stored" else zipfile.ZIP_DEFLATED)


MODES = ("w", "w:gz", "stored", "deflated")


def contents(source: Source) -> dict:
    return {
        "classes": source.classes,
        **{s: [source.read(s, i) for i in range(source.size(s))] for s in source.splits},
    }


names = st.text("abcXYZ 01é", min_size=1, max_size=4).map(str.strip).filter(bool)


@st.composite
def trees(draw: Any) -> dict[str, bytes]:
    classes = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    wrapper = draw(st.sampled_from(["", "set/", "a b/set-160/"]))
    splits = draw(st.sampled_from([[""], ["train/"], ["train/", "val/"], ["train/", "validation/", "test/"]]))
    files = {f"{wrapper}README.txt": b"hello"}
    for split in splits:
        for name in classes:
            for inner in draw(st.sets(st.sampled_from(["1.jpg", "2.png", "deep/er/3.jpg", "4"]), min_size=1)):
                files[f"{wrapper}{split}{name}/{inner}"] = JPEG + draw(st.binary(max_size=600))
    return files


@settings(max_examples=25, deadline=None)
@given(trees(), st.randoms())
def test_folder_tar_tgz_and_zip_are_the_same_source(tmp_path_factory, files, rng):
    root = tmp_path_factory.mktemp("tree")
    folder = open_source(write_tree(root / "folder", files))
    order = list(files.items())
    rng.shuffle(order)
    tar = open_source(write_tar(root / "plain", dict(order)))
    tgz = open_source(write_tar(root / "packed", {f"./{name}": data for name, data in order}, mode="w:gz"))
    zipped = open_source(write_zip(root / "zipped", dict(order)))
    assert contents(folder) == contents(tar) == contents(tgz) == contents(zipped)
    assert folder.fingerprint() == tar.fingerprint() == tgz.fingerprint() == zipped.fingerprint()


def test_rows_are_sorted_by_key_relative_to_the_folder_of_the_splits(tmp_path):
    write_tree(tmp_path / "data" / "outer", {**TWO, "train/ant/0.png": PNG, "test/bee/x.jpg": JPEG, "list.csv": b"a"})
    source = open_source(tmp_path)
    assert source.spec == str(tmp_path)
    assert source.splits == ("train", "val", "test")
    assert source.classes == ("ant", "bee")
    assert source.keys("train") == ["train/ant/0.png", "train/ant/1.jpg", "train/bee/1.jpg"]
    assert source.labels("train") == [0, 0, 1]
    assert source.keys("test") == ["test/bee/x.jpg"]
    assert source.labels("test") == [1]
    with pytest.raises(UsageError, match="no split 'dev'; use one of train, val, test"):
        source.size("dev")


def test_numbered_classes_are_in_numeric_order(tmp_path):
    assert open_source(write_tree(tmp_path, {f"{n}/x.jpg": JPEG for n in (10, 9, 1)})).classes == ("1", "9", "10")


def test_images_are_told_by_content_and_damaged_ones_keep_their_row(tmp_path):
    files = {
        "a/photo": JPEG,
        "a/odd.txt": PNG,
        "a/web.data": b"RIFF\0\0\0\0WEBP",
        "a/text.jpg": b"no image at all",
        "a/empty.JPEG": b"",
        "a/README": b"BM is how this text begins, and it is no bitmap",
        "a/Thumbs.db": b"\xd0\xcf\x11\xe0",
        "a/._photo.jpg": JPEG,
        ".cache/x.jpg": JPEG,
        "__MACOSX/a/photo.jpg": JPEG,
        "b/bitmap": b"BM" + bytes(12) + (40).to_bytes(4, "little") + bytes(20),
        "b/tiff": b"II*\0",
    }
    write_tree(tmp_path, files)
    (tmp_path / "b" / "gone.jpg").symlink_to("nowhere")
    source = open_source(tmp_path, val_fraction=0)
    assert source.keys("train") == [
        *("a/empty.JPEG", "a/odd.txt", "a/photo", "a/text.jpg", "a/web.data", "b/bitmap", "b/gone.jpg", "b/tiff")
    ]
    with pytest.raises(OSError, match=r"gone\.jpg"):
        source.read("train", 6)


def test_links_are_followed_but_not_in_circles(tmp_path):
    outside = write_tree(tmp_path / "elsewhere", {"bees/1.jpg": JPEG})
    root = write_tree(tmp_path / "root", {"ant/1.jpg": JPEG})
    (outside / "bees" / "back").symlink_to(root)
    (outside / "bees" / "again").symlink_to(outside)
    (root / "bee").symlink_to(outside / "bees")
    (root / "ant" / "loop").symlink_to(root)
    (root / "ant" / "self").symlink_to(root / "ant" / "self")
    (root / "ant" / "2.jpg").symlink_to(outside / "bees" / "1.jpg")
    os.mkfifo(root / "ant" / "pipe.jpg")
    assert open_source(root, val_fraction=0).keys("train") == ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg"]


def test_names_that_are_not_utf8_give_keys_that_are(tmp_path):
    write_tree(tmp_path, {"a/1.jpg": JPEG, "b/1.jpg": JPEG})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b/\xe9.jpg")).write_bytes(JPEG + b"!")
    source = open_source(tmp_path, val_fraction=0)
    assert source.keys("train")[2] == "b/\\xe9.jpg"
    assert source.read("train", 2).data == JPEG + b"!"
    source.fingerprint()


# --- splitting off val


def many(per_class: int = 20) -> dict[str, bytes]:
    return {f"{name}/{i:03d}.jpg": JPEG for name in ("ant", "bee", "cat") for i in range(per_class)}


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 5))
def test_val_is_split_off_by_class_seed_and_key(tmp_path_factory, fraction, seed):
    folder = write_tree(tmp_path_factory.mktemp("tree"), many())
    source = open_source(folder, val_fraction=fraction, seed=seed)
    train, val = source.keys("train"), source.keys("val")
    assert sorted(train + val) == sorted(many())
    expected = min(19, max(1, round(20 * fraction)))
    assert [source.labels("val").count(label) for label in range(3)] == [expected] * 3
    assert source.fingerprint() == open_source(folder, val_fraction=fraction, seed=seed).fingerprint()


def test_val_fraction_defaults_to_a_tenth_and_0_means_none(tmp_path):
    write_tree(tmp_path, many())
    assert open_source(tmp_path).size("val") == 6
    assert open_source(tmp_path, val_fraction=0).splits == ("train",)
    assert open_source(tmp_path, seed=1).keys("val") != open_source(tmp_path, seed=2).keys("val")
    for bad in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="val_fraction must be a number from 0 to below 1"):
            open_source(tmp_path, val_fraction=bad)


def test_a_source_with_a_val_split_refuses_a_val_fraction(tmp_path):
    write_tree(tmp_path, TWO)
    with pytest.raises(UsageError, match="has its own val split"):
        open_source(tmp_path, val_fraction=0.2)
    assert open_source(tmp_path, val_fraction=0).size("val") == 2


def test_take_is_even_over_classes_and_deterministic(tmp_path):
    source = open_source(write_tree(tmp_path, many()), val_fraction=0)
    few = source.take(6)
    assert few.labels("train") == [0, 0, 1, 1, 2, 2]
    assert few.keys("train") == source.take(6).keys("train")
    assert few.keys("train") == sorted(few.keys("train"))
    assert few.read("train", 5).key == few.keys("train")[5]
    assert source.take(1000).fingerprint() == source.fingerprint()
    with pytest.raises(UsageError, match="limit must be a whole number of 1 or more"):
        source.take(0)


# --- archives


def big_archive(path: Path, mode: Any = "w") -> dict[str, bytes]:
    rng = random.Random(0)
    files = {f"{c}/{i:02d}.jpg": JPEG + rng.randbytes(rng.randrange(4000)) for c in "ab" for i in range(60)}
    write_archive(path, files, mode)
    return files


def read_in_threads(source: Source, files: dict[str, bytes]) -> None:
    order = random.Random(1).sample(range(len(files)), len(files))
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(lambda i: source.read("train", i), order))
    assert {sample.key: sample.data for sample in samples} == files


def test_tgz_is_read_in_any_order_from_many_threads_and_after_pickling(tmp_path, monkeypatch):
    monkeypatch.setattr(offsets, "_GZIP_SPACING", 5000)
    monkeypatch.setattr(offsets, "CHUNK", 777)
    files = big_archive(tmp_path / "x.tgz", "w:gz")
    source = open_source(tmp_path / "x.tgz", val_fraction=0)
    read_in_threads(source, files)
    read_in_threads(pickle.loads(pickle.dumps(source)), files)


@pytest.mark.parametrize("mode", ["stored", "deflated"])
def test_a_zip_is_read_in_any_order_from_many_threads_and_after_pickling(tmp_path, mode):
    files = big_archive(tmp_path / "x.zip", mode)
    source = open_source(tmp_path / "x.zip", val_fraction=0)
    read_in_threads(source, files)
    read_in_threads(pickle.loads(pickle.dumps(source)), files)


def test_gzip_of_several_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(offsets, "_GZIP_SPACING", 5000)
    files = big_archive(tmp_path / "x.tar")
    plain = (tmp_path / "x.tar").read_bytes()
    parts = [gzip.compress(plain[i : i + 30_000]) for i in range(0, len(plain), 30_000)]
    (tmp_path / "y").write_bytes(b"".join(parts) + bytes(100))
    read_in_threads(open_source(tmp_path / "y", val_fraction=0), files)
    read_in_threads(open_source(tmp_path / "x.tar", val_fraction=0), files)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_long_scan_reports_bytes(tmp_path, mode, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {f"{c}/{i}.jpg": JPEG for c in "ab" for i in range(300)}, mode=mode)
    monkeypatch.setattr(archives, "_LONG_SCAN", 100)
    size, told = path.stat().st_size, Told()
    open_source(path, progress=told)
    assert told.begun == [("reading x.tar", size, "bytes", 0)]
    assert len(told.steps) == 3
    assert all(step > 0 for step in told.steps[:2])
    assert size - 10_240 <= sum(told.steps) <= size  # zeros fill the last of tar's blocks


def test_a_long_scan_of_a_zip_reports_bytes(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", {f"{c}/{i}.jpg": JPEG for c in "ab" for i in range(300)})
    monkeypatch.setattr(archives, "_LONG_SCAN", 100)
    size, told = path.stat().st_size, Told()
    open_source(path, progress=told)
    assert told.begun == [("reading x.zip", size, "bytes", 0)]
    assert told.steps == [256 * size // 600] * 2


def test_a_short_scan_reports_nothing(tmp_path):
    told = Told()
    open_source(write_tar(tmp_path / "x.tar", {f"{c}/0.jpg": JPEG for c in "ab"}), progress=told)
    assert told.begun == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.97])
def test_an_archive_cut_short_is_one_error(tmp_path, mode, share):
    path = tmp_path / "x.tar"
    big_archive(path, mode)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError, match=r"x\.tar is (damaged or cut short|not an archive)"):
        open_source(path)


def test_a_tar_cut_between_members_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{c}/{i}.jpg": JPEG for c in "ab" for i in range(3)})
    path.write_bytes(path.read_bytes()[: 4 * 1024])  # four members of a header and a block
    with pytest.raises(SourceError, match="cut short"):
        open_source(path)


def test_a_damaged_tgz_is_one_error(tmp_path):
    path = tmp_path / "x.tgz"
    big_archive(path, "w:gz")
    data = bytearray(path.read_bytes())
    for place in range(20, len(data), 1009):
        data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(SourceError, match="damaged or cut short"):
        open_source(path)


@pytest.mark.parametrize("mode", ["w", "stored"])
def test_an_archive_that_changes_is_reported_with_the_key(tmp_path, mode):
    path = write_archive(tmp_path / "x.tar", {name: data + bytes(3000) for name, data in TWO.items()}, mode)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(SourceError, match=r"train/bee/1\.jpg: .* is shorter than when it was opened"):
        source.read("train", 1)
    path.unlink()
    with pytest.raises(OSError, match=r"x\.tar"):
        source.read("train", 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg"])
def test_members_that_point_outside_are_refused(tmp_path, name, mode):
    path = write_archive(tmp_path / "x.tar", {**TWO, name: JPEG}, mode)
    with pytest.raises(SourceError, match="points outside the archive"):
        open_source(path)


def test_links_and_devices_in_a_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar", TWO)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("train/ant/tty", tarfile.CHRTYPE), ("train/ant/note", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert open_source(path).keys("train") == ["train/ant/1.jpg", "train/bee/1.jpg"]
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("train/ant/9.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(member)
    with pytest.raises(SourceError, match=r"train/ant/9\.jpg is a link to 1\.jpg.*--dereference"):
        open_source(path)


def test_a_key_twice_is_an_error_that_names_it(tmp_path):
    path = write_tar(tmp_path / "x.tar", TWO)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("./train/ant/1.jpg"), io.BytesIO(b""))
    write_zip(tmp_path / "x.zip", TWO)
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("./train/ant/1.jpg", b"")
    for both in (path, tmp_path / "x.zip"):
        with pytest.raises(SourceError, match=r"key train/ant/1\.jpg occurs twice in train"):
            open_source(both)


# --- zips


def altered(path: Path, **fields: Any) -> Path:
    """A zip whose directory says something else of its second member, ``train/bee/1.jpg``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in TWO.items():
            archive.writestr(name, data)
        for field, value in fields.items():
            setattr(archive.filelist[1], field, value)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flag_bits": 1}, r"train/bee/1\.jpg is encrypted; unpack it with its password"),
        ({"compress_type": zipfile.ZIP_LZMA}, r"train/bee/1\.jpg is compressed by LZMA, not deflate; unpack it"),
        ({"compress_type": 99}, r"train/bee/1\.jpg is compressed by method 99, not deflate"),
        ({"header_offset": 1 << 33}, r"damaged or cut short: train/bee/1\.jpg lies outside of it"),
        ({"compress_size": 1 << 33}, r"damaged or cut short: train/bee/1\.jpg lies outside of it"),
        ({"external_attr": 0o120777 << 16}, r"train/bee/1\.jpg is a link to .*, not an image; pack .* without -y"),
        ({"filename": "../1.jpg"}, r"member \.\./1\.jpg points outside the archive"),
    ],
)
def test_zips_with_a_member_that_cannot_be_read_are_refused(tmp_path, fields, message):
    with pytest.raises(SourceError, match=message):
        open_source(altered(tmp_path / "x.zip", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"CRC": 5}, "do not match their checksum"),
        ({"file_size": 3}, "more than the 3 bytes that the archive's list says"),
        ({"file_size": 5}, "is shorter than when"),
        ({"file_size": 1 << 40}, "inflates to 1099511627776 bytes, more than the limit of"),
        ({"header_offset": 9}, "no member begins there"),
        ({"filename": "./train/bee/1.jpg"}, "another name than the archive's list"),
        ({"compress_type": zipfile.ZIP_STORED}, "more than the 4 bytes"),
    ],
)
def test_a_damaged_member_of_a_zip_is_reported_with_its_key_and_the_others_are_read(tmp_path, fields, message):
    source = open_source(altered(tmp_path / "x.zip", **fields))
    with pytest.raises(SourceError, match=rf"train/bee/1\.jpg: .*{message}"):
        source.read("train", 1)
    assert source.read("train", 0).data == JPEG


def test_a_zip_behind_other_bytes_is_read_and_one_beside_another_is_not(tmp_path):
    path = write_zip(tmp_path / "x.zip", TWO)
    plain = path.read_bytes()
    more = write_zip(tmp_path / "y.zip", {"train/cat/1.jpg": JPEG}).read_bytes()
    entry = plain.index(b"PK\1\2")
    swallowed = plain[: entry + 33] + b"\1" + plain[entry + 34 :]  # a comment of 256 bytes: all other members
    whole = contents(open_source(path))
    path.write_bytes(b"MZ a program that unpacks itself" * 99 + plain)
    assert contents(open_source(path)) == whole
    for data, message in (
        (more + plain, "begins with members that its own list lacks, as joined zips do; give each zip by itself"),
        (swallowed, "damaged or cut short: its list says 4 members, but has 1"),
        (plain[:50] + plain[59:], "damaged or cut short: bytes are missing in it"),
        (plain + b"more", "after its end there are other bytes"),
        (plain[:-18] + b"\2" + plain[-17:], "is one of several parts; join them with: zip -s 0 x.zip"),
    ):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=message):
            open_source(path)
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.comment = b"by a tool that leaves a comment"
        for name, data in TWO.items():
            archive.writestr(name, data)
    assert contents(open_source(tmp_path / "y.zip")) == whole


def test_a_zip_with_64_bit_fields(tmp_path, monkeypatch):
    whole = contents(open_source(write_zip(tmp_path / "x.zip", TWO)))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    data = write_zip(tmp_path / "x.zip", TWO).read_bytes()
    assert b"PK\6\6" in data
    assert contents(open_source(tmp_path / "x.zip")) == whole


@pytest.mark.parametrize(
    ("written", "system", "flags", "read"),
    [
        ("é/1.jpg".encode(), 3, 0x800, "é/1.jpg"),
        ("é/1.jpg".encode(), 3, 0, "é/1.jpg"),
        ("é/1.jpg".encode("cp437"), 0, 0, "é/1.jpg"),
        (b"set\\bee\\1.jpg", 0, 0, "bee/1.jpg"),
        (b"bee/\\1.jpg", 3, 0, "bee/\\1.jpg"),
    ],
)
def test_names_in_a_zip_are_those_of_the_folder(tmp_path, written, system, flags, read):
    wrapper = b"set\\" if b"set" in written else b""
    for name in (wrapper.decode() + "ant/1.jpg".replace("/", "\\" if wrapper else "/"), "?" * len(written)):
        with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
            member = zipfile.ZipInfo(name)
            member.create_system = system
            archive.writestr(member, JPEG)
    data = (tmp_path / "x.zip").read_bytes().replace(b"?" * len(written), written)
    at = data.rindex(b"PK\1\2")
    data = data[: at + 8] + flags.to_bytes(2, "little") + data[at + 10 :]
    (tmp_path / "x.zip").write_bytes(data)
    source = open_source(tmp_path / "x.zip", val_fraction=0)
    assert source.keys("train") == sorted(["ant/1.jpg", read])
    assert source.read("train", 1).data == JPEG


# --- WebDataset tars


def shard(path: Path, samples: dict[str, str], suffix: str = "jpg") -> Path:
    files = {f"{key}.{suffix}": JPEG + key.encode() for key in samples}
    return write_tar(path, files | {f"{key}.cls": label.encode() for key, label in samples.items()})


def test_webdataset_by_brace_pattern_folder_and_single_tar(tmp_path):
    shard(tmp_path / "train-000000.tar", {"b/0001": "10\n", "b/0000": "2"})
    shard(tmp_path / "train-000001.tar", {"a.v/0002": "2"}, "img.png")
    shard(tmp_path / "val-000000.tar", {"0000": "10", "0009": "2"})
    folder = open_source(tmp_path)
    assert folder.classes == ("2", "10")
    assert folder.keys("train") == ["a.v/0002", "b/0000", "b/0001"]
    assert folder.labels("train") == [0, 0, 1]
    assert folder.read("train", 0).data == JPEG + b"a.v/0002"
    assert folder.keys("val") == ["0000", "0009"]
    both = open_source(f"{tmp_path}/{{train-{{000000..000001}},val-000000}}.tar")
    assert contents(both) == contents(folder)
    assert open_source(tmp_path / "val-000000.tar").splits == ("val",)
    with pytest.raises(SourceError, match=r"2 of 4 files do not exist, the first is .*train-000002\.tar"):
        open_source(f"{tmp_path}/train-{{000000..000003}}.tar")
    with pytest.raises(SourceError, match="ends before it begins"):
        open_source(f"{tmp_path}/train-{{3..0}}.tar")


def test_webdataset_class_names_and_val_fraction(tmp_path):
    shard(tmp_path / "shard.tar", {f"{i:03d}": ("ant", "7")[i % 2] for i in range(20)})
    source = open_source(tmp_path / "shard.tar", val_fraction=0.2)
    assert source.classes == ("7", "ant")
    assert (source.size("train"), source.size("val")) == (16, 4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"3.jpg": JPEG}, r"sample 3 has no \.cls"),
        ({"3.cls": b"1"}, "sample 3 has no image"),
        ({"1.mask.png": PNG}, "sample 1 has two images"),
        ({"3.jpg": JPEG, "3.cls": b"\xff\xfe"}, r"3\.cls holds b'"),
        ({"3.jpg": JPEG, "3.cls": b" "}, "write a class number or a class name"),
    ],
)
def test_webdataset_samples_that_are_not_whole(tmp_path, extra, message):
    files = {"1.jpg": JPEG, "1.cls": b"0", "2.jpg": JPEG, "2.cls": b"1", **extra}
    with pytest.raises(SourceError, match=message):
        open_source(write_tar(tmp_path / "train.tar", files))


def test_webdataset_keys_that_restart_are_put_behind_the_tars_names(tmp_path):
    shard(tmp_path / "train-0.tar", {"1": "0", "2": "1"})
    shard(tmp_path / "train-1.tar", {"2": "0"})
    shard(tmp_path / "val-0.tar", {"1": "0"})
    source = open_source(tmp_path)
    assert source.keys("train") == ["train-0/1", "train-0/2", "train-1/2"]
    assert source.labels("train") == [0, 1, 0]
    assert source.keys("val") == ["1"]
    assert source.notes == ("some keys of train occur in several archives, so its keys now begin with their names",)


# --- bad input


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/notes.txt": b"x"}, "holds no images"),
        ({**TWO, "train/cow/notes.txt": b"x"}, "class cow of .* has no images in train"),
        ({"a/1.jpg": JPEG, "b/1.jpg": JPEG, "c/notes.txt": b"x"}, "class c of .* has no images"),
        ({"a/1.jpg": JPEG}, "has only one class: a"),
        ({"train/a/1.jpg": JPEG}, "has only one class: a"),
        ({"1.jpg": JPEG, "2.jpg": JPEG}, "is in no class folder"),
        ({"train/a/1.jpg": JPEG, "train/b/1.jpg": JPEG, "val/1.jpg": JPEG}, r"val/1\.jpg in .* is in no class"),
        ({**TWO, "val/cow/1.jpg": JPEG}, "class cow of .* is in val but not in train"),
        ({**TWO, "valid/ant/1.jpg": JPEG}, "has val and valid, which are both the val split"),
    ],
)
def test_bad_trees_are_one_clear_error(tmp_path, files, message):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(write_tree(tmp_path, files))
    assert caught.value.hint


def test_what_val_and_test_may_lack(tmp_path):
    files = {**TWO, "train/cow/1.jpg": JPEG, "val/cow/notes.txt": b"", "test/unlabelled.jpg": JPEG, "docs/fig.png": PNG}
    source = open_source(write_tree(tmp_path, files))
    assert source.splits == ("train", "val")
    assert source.classes == ("ant", "bee", "cow")


def test_a_class_may_be_called_like_a_split(tmp_path):
    assert open_source(write_tree(tmp_path, {"train/1.jpg": JPEG, "bus/1.jpg": JPEG})).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.7z", b"7z\xbc\xaf...", "is a 7z archive; give a folder, a .zip, a .tar or a .tar.gz"),
        ("x.zip", b"PK\3\4...", "damaged or cut short: the list of its members is missing at its end"),
        ("x.zip", b"PK\5\6" + bytes(18), "holds no images"),
        ("x.tar", b"hello", "is not an archive"),
        ("x.csv.gz", gzip.compress(b"a,b\n" * 1000, mtime=0), "is not an archive"),
        ("x.tar", bytes(10240), "holds no images"),
        ("x.jpg", JPEG, "is a single image"),
    ],
)
def test_files_that_are_no_source(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name)


def test_no_such_path(tmp_path):
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(SourceError, match="imagenete is neither a path nor a named dataset; did you mean imagenette"):
        open_source("imagenete")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        open_source(tmp_path / "pipe")
