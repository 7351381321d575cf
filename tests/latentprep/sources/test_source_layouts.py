"""Layouts people have: what is read, and that rows and images said to be left out are all the images there are."""

import gzip
import io
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import latentprep
from latentprep.cli.commands import app
from latentprep.codecs.autoencoder import find_weights
from latentprep.errors import LatentError, SourceError
from latentprep.sources.listing import left_out_line
from latentprep.sources.source import Source, open_source
from pictures import jpeg, picture

JPEG = b"\xff\xd8\xff\xe0"
ENDINGS = (".jpg", ".jpeg", ".png", ".svg", ".psd")


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar_bytes(files: dict[str, bytes], mode: Any = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def as_zip(tar: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        return zip_bytes({member.name: members.extractfile(member).read() for member in members})  # type: ignore[union-attr]


def images(*names: str, count: int = 2) -> dict[str, bytes]:
    return {f"{name}/{i}.jpg": JPEG + name.encode() for name in names for i in range(count)}


def shard(start: int, count: int = 2) -> bytes:
    keys = [f"{i:06d}" for i in range(start, start + count)]
    return tar_bytes({f"{k}.jpg": JPEG for k in keys} | {f"{k}.cls": str(int(k) % 2).encode() for k in keys})


def count_images(path: Path) -> int:
    """Image files below a folder or in an archive, archives inside included; by a walk of its own."""
    if path.is_dir():
        files = {os.path.realpath(Path(f) / n) for f, _, names in os.walk(path, followlinks=True) for n in names}
        return sum(n.lower().endswith(ENDINGS) or (n.endswith((".tar", ".zip")) and count_in(n)) for n in files)
    return count_in(path)


def count_in(file: Any) -> int:
    data = Path(file).read_bytes() if isinstance(file, str | Path) else file
    if data.startswith(b"PK"):
        return sum(name.lower().endswith(ENDINGS) for name in zipfile.ZipFile(io.BytesIO(data)).namelist())
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*", ignore_zeros=True) as tar:
        total = 0
        for member in tar:
            total += member.name.lower().endswith(ENDINGS)
            if member.name.endswith(".tar") and (inner := tar.extractfile(member)):
                total += count_in(inner.read())
    return total


def check_count(source: Source, path: Path) -> None:
    rows = sum(source.size(split) for split in source.splits)
    assert rows + sum(n for what, n in source.left_out.items() if what.startswith("images")) == count_images(path)


@pytest.fixture(params=["folder", "tar", "tgz", "zip"])
def pack(request, tmp_path):
    """Makes a source of files: a folder, or an archive of one; of tars not a zip, but a folder of zips."""

    def make(files: dict[str, bytes]) -> Path:
        path = tmp_path / f"set.{request.param}"
        if request.param == "zip" and any(name.endswith(".tar") for name in files):
            zips = {f"{name[:-4]}.zip": as_zip(data) for name, data in files.items() if name.endswith(".tar")}
            return write_tree(path, zips | {name: data for name, data in files.items() if not name.endswith(".tar")})
        if request.param == "folder":
            return write_tree(tmp_path / "set", files)
        if request.param == "zip":
            path.write_bytes(zip_bytes(files))
            return path
        path.write_bytes(tar_bytes(files, "w:gz" if request.param == "tgz" else "w"))
        return path

    return make


def sizes(source: Source) -> dict[str, int]:
    return {split: source.size(split) for split in source.splits}


TWO = ("train/a", "train/b", "val/a", "val/b")
TINY = {
    **images("tiny/train/n1/images", "tiny/train/n2/images", "tiny/val/images", "tiny/test/images"),
    "tiny/val/val_annotations.txt": b"0.jpg\tn2\t0\t0\t9\t9\n1.jpg\tn1\t0\t0\t9\t9\n",
}


@pytest.mark.parametrize(
    ("files", "rows", "left_out"),
    [
        (images("Training/a", "Training/b", "Test/a"), {"train": 2, "val": 2, "test": 2}, {}),
        (images("TRAIN/a", "TRAIN/b", "Testing/a"), {"train": 2, "val": 2, "test": 2}, {}),
        (images("train/a", "train/b", "dev/a"), {"train": 4, "val": 2}, {}),
        (images("train/a", "train/b", "validate/b"), {"train": 4, "val": 2}, {}),
        (images("train/a", "train/b", "eval/b"), {"train": 2, "val": 2, "test": 2}, {}),
        (images("x/train/a", "x/train/b", "x/Validation/b", "x/evaluation/a"), {"train": 4, "val": 2, "test": 2}, {}),
        (images(*TWO, "extra/a", "docs"), {"train": 4, "val": 4},
         {"images in docs/ (not a known split)": 2, "images in extra/ (not a known split)": 2}),
        (images(*TWO, "test"), {"train": 4, "val": 4}, {"images in test/ (in no class folder)": 2}),
        (images(*TWO, "train"), {"train": 4, "val": 4}, {"images in train/ beside the class folders": 2}),
        (images("a", "b") | {"x.jpg": JPEG}, {"train": 2, "val": 2}, {"images beside the class folders": 1}),
        (images("a/deep/er", "b") | {"labels.csv": b"a,b"}, {"train": 2, "val": 2}, {}),
        (images("a", "b", ".thumbs", "b/__MACOSX") | {"a/._0.jpg": b""}, {"train": 2, "val": 2},
         {"images in hidden files or folders": 5}),
        (images("a", "b") | {"a/x.svg": b"<svg/>", "b/y.PSD": b"8BPS"}, {"train": 2, "val": 2},
         {"images of a kind that cannot be read (.psd)": 1, "images of a kind that cannot be read (.svg)": 1}),
        (TINY, {"train": 4, "val": 2}, {"images in test/ (in no class folder)": 2}),
        (images("a", "b", "shards/png") | {"shards/manifest.json": b'{\n "format": "latentprep",'},
         {"train": 2, "val": 2}, {"images in shards/ (a latent dataset)": 2}),
        (images("a", "b") | {"runs/r1/config.json": b'{\n "format": "latenttrain run",', "runs/r1/curve.png": JPEG},
         {"train": 2, "val": 2}, {"images in runs/r1/ (a training run)": 1}),
        (images("train/bus", "train/train"), {"train": 2, "val": 2}, {}),
        ({"train/0.tar": tar_bytes(images("a", "b")), "test/0.tar": tar_bytes(images("a", "b"))},
         {"train": 2, "val": 2, "test": 4}, {}),
        ({"train.tar": tar_bytes(images("a", "b")), "val.tar": tar_bytes(images("a", "b"))},
         {"train": 4, "val": 4}, {}),
        ({"cat.tar": tar_bytes({"1.jpg": JPEG, "2.jpg": JPEG}), "dog.tar": tar_bytes({"1.jpg": JPEG, "2.jpg": JPEG})},
         {"train": 2, "val": 2}, {}),
        (images("a/1", "a/2", "b"), {"train": 4, "val": 2}, {}),
        (images("cat", "dog", "test"), {"train": 3, "val": 3}, {}),
        (images("a/@eaDir/x", "b", "a"), {"train": 2, "val": 2}, {"images in hidden files or folders": 2}),
        ({"cat.tar": tar_bytes(images("cat")), "dog.tar": tar_bytes(images("dog")), "x.jpg": JPEG},
         {"train": 2, "val": 2}, {"images beside archives": 1}),
        ({"wds/train/0.tar": shard(0, 15), "wds/val/0.tar": shard(0, 15)}, {"train": 15, "val": 15}, {}),
        ({"train/0.tar": shard(0), "train/1.tar": shard(0), "val/0.tar": shard(0)}, {"train": 4, "val": 2}, {}),
    ],
)  # fmt: skip
def test_every_image_is_a_row_or_counted(pack, files, rows, left_out):
    path = pack(files)
    source = open_source(path)
    assert sizes(source) == rows
    assert dict(sorted(source.left_out.items())) == left_out
    check_count(source, path)
    for split in source.splits:
        assert source.read(split, 0).data.startswith(JPEG)


def test_tiny_imagenet_takes_the_classes_of_val_from_its_text(pack):
    source = open_source(pack(TINY))
    assert source.classes == ("n1", "n2")
    assert dict(zip(source.keys("val"), source.labels("val"), strict=True)) == {
        "val/images/0.jpg": 1,
        "val/images/1.jpg": 0,
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (images("bus/city", "bus/coach", "train/steam"), "has bus/ beside train/: splits or classes"),
        (images("bus", "train/steam", "train/diesel"), "has bus/ beside train/: splits or classes"),
        (images("trainset/a", "trainset/b", "test/a"), "has trainset/ beside test/: splits or classes"),
        (images(*TWO, "dev/a"), "has dev and val, which are both the val split"),
        (images(*TWO) | images("more/a", count=30), "most of its 38 images would be left out: 30 images in more/"),
        (images("a", "b") | {f"{i}.jpg": JPEG for i in range(9)}, "most of its 13 images would be left out: 9 images"),
        ({f"{i}.jpg": JPEG for i in range(3)} | {"labels.csv": b"0,a"}, "to read labels from its .csv,"),
        ({"a/x.svg": b"<svg/>", "p.mat": b"MATL"}, r"no sounds \(it has: 1 image of .*\.svg.; 1 file \.mat"),
        ({"train/0.tar": shard(0), "val/0.tar": shard(0), "x/0.tar": shard(0)}, r"the split of .*x/0\.\w+ is unknown"),
        (images("images") | {"labels.csv": b"0,a"}, r"only one class: images \(to read labels from its .csv, name"),
        ({"train/0.tar": shard(0), "val/0.tar": shard(0), "dev/0.tar": shard(0)}, "files of dev and val, which are"),
        ({"train-val-0.tar": shard(0), "val-0.tar": shard(0)}, "contains two splits, train and val"),
        ({"00000.tar": tar_bytes({"0.jpg": JPEG, "0.txt": b"a cat", "0.json": b"{}"}),
          "1.tar": tar_bytes({"1.jpg": JPEG})},
         r"00\.\w+ holds images with \.txt and \.json files, but no \.cls"),
        (images("training_set/training_set/cat", "training_set/training_set/dog", "test_set/test_set/cat"),
         "has test_set/ and training_set/: splits or classes"),
        (images("seg_train/a", "seg_test/a", "seg_pred"), "has seg_test/ and seg_train/: splits or classes"),
        (images("train", "test") | {"train.csv": b"0,a"}, r"has test/ and train/: splits or classes\? \(to read"),
        (images("train2017", "val2017") | {"annotations/a.json": b"{}"}, "has train2017/ and val2017/: splits or"),
        ({"Train Set.tar": tar_bytes({"1.jpg": JPEG}), "Val Set.tar": tar_bytes({"1.jpg": JPEG})}, "splits or classes"),
        (images("one/train/a", "one/train/b", "one/val/a", "two/train/a"), "such as train/ in (one|two)/"),
        (images("cat/train", "cat/val", "dog/train", "dog/val"), "such as train/ in (cat|dog)/"),
        ({f"{i:05d}/{i:05d}{j:04d}.{end}": JPEG if end == "jpg" else b"a" for i in range(2) for j in range(2)
          for end in ("jpg", "json", "txt")},
         r"\.txt and \.json in numbered folders, as img2dataset writes them"),
        ({"x-0.tar": tar_bytes({"0.jpg": JPEG}), "x-1.tar": tar_bytes({"1.jpg": JPEG})}, "numbered archives of images"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(pack, files, message):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(pack(files))
    assert caught.value.hint


def test_two_named_shards_stay_in_train_and_patterns_tell_splits_by_folder(tmp_path):
    write_tree(tmp_path / "wds", {"train/0.tar": shard(0, 15), "val/0.tar": shard(0, 15)})
    assert sizes(open_source(f"{tmp_path}/wds/{{train,val}}/0.tar")) == {"train": 15, "val": 15}
    assert sizes(open_source(tmp_path / "wds" / "val")) == {"val": 15}


# --- links


def test_links_to_folders_are_followed(tmp_path):
    root = write_tree(tmp_path, images("train/a", "train/b", "holdout/a", "raw/c"))
    (root / "val").symlink_to("holdout")
    (root / "train" / "c").symlink_to("../raw/c")
    (root / "train" / "b" / "up").symlink_to("..")
    (root / "train" / "b" / "gone").symlink_to("nowhere")
    source = open_source(root)
    assert sizes(source) == {"train": 6, "val": 2}
    assert source.keys("train")[4:] == ["train/c/0.jpg", "train/c/1.jpg"]
    assert source.left_out == {"links in a circle": 1, "broken links": 1}
    check_count(source, root)


def test_folders_full_of_links_to_each_other_end(tmp_path):
    names = [f"c{i}" for i in range(5)]
    write_tree(tmp_path, images(*names, count=1))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / name / f"to-{other}").symlink_to(f"../{other}")
    source = open_source(tmp_path, val_fraction=0)
    assert source.size("train") == 5 * (1 + 4 + 4 * 3 + 4 * 3 * 2)
    assert source.left_out["links behind 3 others"] == 5 * 4 * 3 * 2


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_links_to_folders_in_an_archive_are_followed(tmp_path, mode):
    root = write_tree(tmp_path / "x", images("train/a", "train/b", "holdout/a"))
    (root / "val").symlink_to("holdout")
    (root / "train" / "b" / "up").symlink_to("..")
    (root / "train" / "b" / "gone").symlink_to("/nowhere")
    if mode == "zip":
        with zipfile.ZipFile(tmp_path / "x.tar", "w") as archive:
            for path in sorted(root.rglob("*")):
                mode, data = path.lstat().st_mode, b""
                if path.is_symlink():
                    data = str(path.readlink()).encode()
                elif path.is_file():
                    data = path.read_bytes()
                member = zipfile.ZipInfo(f"{path.relative_to(tmp_path)}{'/' if stat.S_ISDIR(mode) else ''}")
                member.external_attr = mode << 16
                archive.writestr(member, data)
    else:
        with tarfile.open(tmp_path / "x.tar", mode) as tar:
            tar.add(root, "x")
    source = open_source(tmp_path / "x.tar")
    assert sizes(source) == {"train": 4, "val": 2}
    assert source.read("val", 0).data == JPEG + b"holdout/a"
    assert source.left_out == {"links in a circle": 1, "links to what is not in the archive": 1}


# --- joined archives


@pytest.mark.parametrize("zipped", [bytes, gzip.compress])
def test_joined_tars_are_one(tmp_path, zipped):
    path = tmp_path / "x.tar"
    parts = [tar_bytes(images("a")), tar_bytes(images("b")), tar_bytes(images("c"))]
    path.write_bytes(b"".join(map(zipped, parts)))
    source = open_source(path, val_fraction=0)
    assert source.classes == ("a", "b", "c")
    check_count(source, path) if zipped is bytes else None
    assert [source.read("train", i).data for i in (0, 2, 5)] == [JPEG + b"a", JPEG + b"b", JPEG + b"c"]


@pytest.mark.parametrize("zipped", [bytes, gzip.compress])
def test_other_bytes_after_an_archive_are_refused(tmp_path, zipped):
    path = tmp_path / "x.tar"
    path.write_bytes(zipped(tar_bytes(images("a", "b")) + b"more" * 300))
    with pytest.raises(SourceError, match="after the end mark there are other bytes"):
        open_source(path)
    path.write_bytes(gzip.compress(tar_bytes(images("a", "b"))) + b"more")
    with pytest.raises(SourceError, match="after the end of the gzip data there are other bytes"):
        open_source(path)


def test_a_tar_in_a_tar_in_a_tar_is_refused(tmp_path):
    inner = tar_bytes({"in.tar": tar_bytes(images("a", "b"))})
    (tmp_path / "x.tar").write_bytes(tar_bytes({"mid.tar": inner}))
    with pytest.raises(SourceError, match="tar in a tar in a tar"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("outer", "inner", "what"),
    [
        (tar_bytes, ("in.zip", zip_bytes(images("c"))), "archives not read (.zip inside a tar)"),
        (tar_bytes, ("in.tgz", tar_bytes(images("c"), "w:gz")), "archives not read (.tgz inside a tar)"),
        (zip_bytes, ("in.zip", zip_bytes(images("c"))), "archives not read (.zip inside a zip)"),
        (zip_bytes, ("in.tar", tar_bytes(images("c"))), "archives not read (.tar inside a zip)"),
        (zip_bytes, ("in.tar.gz", tar_bytes(images("c"), "w:gz")), "archives not read (.gz inside a zip)"),
    ],
)
def test_archives_inside_zips_and_zips_inside_tars_are_counted(tmp_path, outer, inner, what):
    (tmp_path / "x").write_bytes(outer(images("a", "b") | dict([inner])))
    assert open_source(tmp_path / "x").left_out == {what: 1}
    (tmp_path / "x").write_bytes(outer(dict([inner])))
    with pytest.raises(SourceError, match=r"holds no images and no sounds \(it has: 1 archive not read \([^()]*\)\);"):
        open_source(tmp_path / "x")


def test_files_that_are_zips_inside_are_no_archives_of_a_folder(tmp_path):
    write_tree(tmp_path, images("a", "b") | {"a/notes.docx": zip_bytes(images("word")), "b/net.pt": zip_bytes({})})
    assert open_source(tmp_path).left_out == {}
    write_tree(tmp_path, {"more.zip": zip_bytes(images("c")), "broken.zip": b""})
    assert open_source(tmp_path).left_out == {"archives beside image files": 2}


def test_parquet_files_beside_archives_are_counted(tmp_path):
    write_tree(tmp_path, {"x.zip": zip_bytes(images("a", "b")), "train.parquet": b"PAR1", "labels.parquet": b"PAR1"})
    assert open_source(tmp_path).left_out == {"Parquet files beside archives": 2}


def test_a_tar_that_is_none_is_not_passed_over(tmp_path):
    write_tree(tmp_path, {"train-0.tar": shard(0), "train-1.tar": b""})
    with pytest.raises(SourceError, match=r"train-1\.tar is not an archive"):
        open_source(tmp_path)
    (tmp_path / "train-1.tar").write_bytes(b"BZh" + bytes(600))
    with pytest.raises(SourceError, match=r"train-1\.tar is a bzip2 archive"):
        open_source(tmp_path)
    (tmp_path / "train-1.tar").unlink()
    (tmp_path / "train-1.tar.part").write_bytes(b"begun")
    assert open_source(tmp_path).left_out == {"archives not read (.part)": 1}


def test_images_in_tars_beside_image_folders_are_counted(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(images("a", "b") | {"c.tar": tar_bytes(images("c"))}))
    source = open_source(path)
    assert source.left_out == {"archives beside image files": 1, "images in archives beside image files": 2}
    check_count(source, path)


def test_what_the_folders_may_have_meant_is_noted(tmp_path):
    source = open_source(write_tree(tmp_path / "x", images("a/1", "a/2", "b")))
    assert source.notes == ("classes are the outer folders, a, b: those inside them, as 1/, make no difference",)
    source = open_source(write_tree(tmp_path / "y", images("cat", "dog", "test")))
    assert source.notes == ("test/ is taken for a class, as the folders beside it are",)
    with pytest.raises(SourceError, match="only one class: Images .*; give the folder Images/ itself"):
        open_source(write_tree(tmp_path / "z", images("Images/a", "Images/b") | {"Lists/a.txt": b"a"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("made", "made is a latent dataset, not images"),
        ("run", "run is a training run, not images"),
        ("labels.csv", r"labels.csv is a table \(.csv\), not images"),
        ("https://example.org/x.tar", "is a URL: images are read from this machine"),
        ("", "the path is empty"),
    ],
)
def test_a_source_that_holds_no_images_is_named(tmp_path, name, message):
    write_tree(tmp_path, {"labels.csv": b"0,a", "made/manifest.json": b'{"format": "latentprep"'})
    write_tree(tmp_path, {"run/config.json": b'{"format": "latenttrain run"', "run/curve.png": JPEG})
    with pytest.raises(LatentError, match=message) as caught:
        open_source(name if not name or "://" in name else tmp_path / name)
    assert caught.value.hint


def test_tars_beside_image_folders_are_said(tmp_path):
    write_tree(tmp_path, images("a", "b") | {"backup.tar": tar_bytes(images("a"))})
    source = open_source(tmp_path)
    assert sizes(source) == {"train": 2, "val": 2}
    assert source.left_out == {"archives beside image files": 1}


# --- commands


def test_encoding_the_current_folder_twice_leaves_its_output_out(tmp_path, monkeypatch):
    write_tree(tmp_path, {f"{c}/{i}.jpg": jpeg(picture(i, 16, 16)) for c in "ab" for i in range(3)} | images(".git"))
    write_tree(tmp_path, {"docs/x.svg": b""})
    (tmp_path / "docs" / "x.svg").rename(tmp_path / "a" / "x.svg")
    (tmp_path / "docs").rmdir()
    monkeypatch.chdir(tmp_path)
    results = [CliRunner().invoke(app, ["encode", ".", "--codec", "dct", "--size", "16", "--json"]) for _ in range(2)]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert "left out: " in results[0].stderr
    assert "0 images in shards/ (a latent dataset)" in results[1].stderr
    first, second = (json.loads(result.stdout)["left_out"] for result in results)
    hidden = {"images in hidden files or folders": 2, "images of a kind that cannot be read (.svg)": 1}
    assert first == hidden
    assert second == hidden | {"images in shards/ (a latent dataset)": 0}
    assert latentprep.encode(".", codec="dct", size=16, out=tmp_path / "shards").left_out == second
    (tmp_path / "begun").mkdir()
    assert "images in begun/ (the output folder)" in open_source(".", out="begun").left_out


def test_one_line_says_what_was_left_out():
    found = {"images in docs/ (not a known split)": 1, "links in a circle": 2}
    assert left_out_line(found) == "1 image in docs/ (not a known split); 2 links in a circle"


def test_weights_of_a_whole_pipeline_are_its_vae(tmp_path):
    write_tree(tmp_path, {"model_index.json": b"{}", "vae/config.json": b"{}", "unet/config.json": b"{}"})
    assert find_weights(str(tmp_path), "sd-vae") == tmp_path / "vae"
    assert find_weights(str(tmp_path / "unet"), "sd-vae") == tmp_path / "unet"
