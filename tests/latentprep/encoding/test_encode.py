from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from told import Interrupting

import latentprep
import profiles
from latentprep.codecs import make_codec, transform
from latentprep.encoding.encode import EncodeResult
from latentprep.encoding.pipeline import Stages, code_rows, encode_shard
from latentprep.errors import CodecError, DatasetError, Interrupted, SourceError, SystemFault, UsageError
from latentprep.quantizing.scalar import quantize
from latentprep.sources.images import MAX_PIXELS, load_views
from latentprep.sources.source import open_source
from latenttrain import scaling
from pictures import jpeg, make_folder, picture

PLUGIN = Path(__file__).parents[2] / "plugin"


def encode(source: Path, out: Path, **options: object) -> EncodeResult:
    return latentprep.encode(source, **{"codec": "dct", "size": 32, "out": out, "shard_rows": 4, **options})


def digest(root: Path) -> dict[str, str]:
    """path -> SHA-256 of every file of a dataset."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_rows_are_the_sources_samples_coded(images: Path, tmp_path: Path) -> None:
    result = encode(images, tmp_path / "out", codec="resample:factor=8", bits=6)
    assert result.rows == {"train": 12, "val": 6}
    assert result.latent == (3, 4, 4)
    assert result.encoded == 18
    dataset = latentprep.open(tmp_path / "out")
    loaded = dataset.load("train")
    assert len(loaded) == 12
    assert loaded.labels.tolist() == [0] * 6 + [1] * 6
    codec = make_codec("resample", factor=8)
    for row in (0, 7):
        pixels = load_views((images / loaded.keys[row]).read_bytes(), 32)
        latents = codec.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert np.array_equal(quantize(latents, dataset.quantizer).numpy(), loaded.codes[row])


def test_a_light_codec_leaves_the_cores_to_decoding(images: Path, tmp_path: Path, monkeypatch) -> None:
    before, threads = torch.get_num_threads(), []
    codec = make_codec("dct")
    honest = codec.encode
    monkeypatch.setattr(codec, "encode", lambda images: threads.append(torch.get_num_threads()) or honest(images))
    torch.set_num_threads(2)
    try:
        encode(images, tmp_path / "light", codec=codec)
        assert threads[-1] == 1
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(codec, "light", False)
        encode(images, tmp_path / "heavy", codec=codec)
        assert threads[-1] == 2
    finally:
        torch.set_num_threads(before)
    one, other = (digest(tmp_path / name) for name in ("light", "heavy"))
    assert one == other


def test_views(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "one")
    encode(images, tmp_path / "three", views=3)
    one, three = latentprep.open(tmp_path / "one"), latentprep.open(tmp_path / "three")
    assert three.manifest.transform["views"] == {"train": 3, "val": 1}
    assert three.quantizer == one.quantizer  # calibrated on view 0
    codes = three.load("train").codes
    assert codes.shape[1] == 3
    assert np.array_equal(codes[:, :1], one.load("train").codes)
    assert not np.array_equal(codes[:, 1], codes[:, 2])
    assert np.array_equal(three.load("val").codes, one.load("val").codes)
    assert latentprep.encode(images, codec="resample:factor=8", views=3, out=tmp_path / "x", dry_run=True).views == 3


def test_same_input_same_bytes_whatever_the_threads(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "a", workers=1)
    encode(images, tmp_path / "b", workers=7)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_archive_and_folder_give_the_same_shards(images: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "images.tgz", "w:gz") as tar:
        tar.add(images, "images")
    encode(images, tmp_path / "a")
    encode(tmp_path / "images.tgz", tmp_path / "b")
    a, b = latentprep.open(tmp_path / "a"), latentprep.open(tmp_path / "b")
    assert a.manifest.source["sha256"] == b.manifest.source["sha256"]
    assert np.array_equal(a.load("train").codes, b.load("train").codes)


def test_damaged_samples_keep_their_rows(images: Path, tmp_path: Path) -> None:
    bad = images / "train" / "class_1" / "002.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    (images / "val" / "class_0" / "001.jpg").write_bytes(b"junk")
    result = encode(images, tmp_path / "out", max_error_fraction=0.3)
    assert result.invalid == 2
    assert result.splits_invalid == {"train": 1, "val": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(line["split"], line["row"], line["key"]) for line in lines] == [
        ("train", 8, "train/class_1/002.jpg"),
        ("val", 1, "val/class_0/001.jpg"),
    ]
    assert all(line["reason"] for line in lines)
    dataset = latentprep.open(tmp_path / "out")
    shard = dataset.read_shard("train", 2)
    assert shard.labels.tolist() == [-1, 1, 1, 1]
    assert not shard.codes[0].any()
    assert len(dataset.load("train")) == 11
    again = encode(images, tmp_path / "out", max_error_fraction=0.3)
    assert (again.encoded, again.invalid) == (0, 2)


def test_colours_are_converted_and_that_is_recorded(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", train=3, val=1)
    wide = Image.new("RGB", (64, 72), (200, 100, 50))
    wide.save(root / "train" / "class_0" / "000.jpg", icc_profile=profiles.P3_GAMMA, quality=100)
    exact = {"codec": "resample:factor=8", "bits": 8, "size": 64}
    codes = {}
    for colour in ("srgb", "stored"):
        out = tmp_path / colour
        encode(root, out, colour=colour, **exact)
        dataset = latentprep.open(out)
        assert dataset.manifest.transform["colour"] == colour
        codes[colour] = dataset.load("train").codes
        assert latentprep.verify(out, source=open_source(root)).problems == ()
    assert (codes["srgb"][0] != codes["stored"][0]).any()
    with pytest.raises(DatasetError, match="transform.colour is stored, but srgb was requested"):
        encode(root, tmp_path / "stored", **exact)
    with pytest.raises(UsageError, match="colour must be srgb or stored, got sRGB"):
        encode(root, tmp_path / "other", colour="sRGB")


def test_a_dataset_of_before_colours_were_recorded_is_verified_as_it_was_made(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", train=3, val=1)
    for path in root.rglob("*.jpg"):
        with Image.open(path) as image:
            image.save(path, icc_profile=profiles.PROPHOTO, quality=100)
    source = open_source(root)
    encode(root, tmp_path / "out", colour="stored")
    old = latentprep.open(tmp_path / "out").manifest
    transform = {name: value for name, value in old.transform.items() if name != "colour"}
    manifest = replace(old, transform=transform)
    stored = latentprep.open(tmp_path / "out").load("train").codes
    stages = Stages(source, make_codec("dct"), None, 1, MAX_PIXELS)
    for has, same in ((manifest, True), (replace(old, transform=transform | {"colour": "srgb"}), False)):
        ((_, codes, invalid),) = code_rows(stages, has, "train", list(range(6)))
        assert not invalid
        assert np.array_equal(codes, stored.reshape(codes.shape)) == same


def test_too_many_damaged_samples_fail_the_run_but_keep_what_was_made(images: Path, tmp_path: Path) -> None:
    for i in (0, 1, 2):
        (images / "train" / "class_0" / f"{i:03}.jpg").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"3 of 12 samples of split 'train'.*max_error_fraction"):
        encode(images, tmp_path / "out")
    assert (tmp_path / "out" / "errors.jsonl").is_file()
    assert encode(images, tmp_path / "out", max_error_fraction=0.5).invalid == 3


def test_strict_stops_at_the_first(images: Path, tmp_path: Path) -> None:
    (images / "train" / "class_0" / "001.jpg").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"train/class_0/001\.jpg.*leave out strict"):
        encode(images, tmp_path / "out", strict=True, max_error_fraction=1)
    assert not list((tmp_path / "out").rglob("codes"))  # before anything was committed


def test_no_image_decodes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images", train=2, val=1)
    for file in source.rglob("*.jpg"):
        file.write_bytes(b"junk")
    with pytest.raises(SourceError, match="none of 4 images drawn from split 'train' can be decoded"):
        encode(source, tmp_path / "out")


def test_limit_and_splits(images: Path, tmp_path: Path) -> None:
    result = encode(images, tmp_path / "out", limit=4, splits=["train"])
    assert result.rows == {"train": 4}
    assert sorted(latentprep.open(tmp_path / "out").load("train").labels.tolist()) == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="no split 'test'"):
        encode(images, tmp_path / "other", splits=["test"])


def test_dry_run_writes_nothing_and_bounds_the_bytes(images: Path, tmp_path: Path) -> None:
    predicted = encode(images, tmp_path / "out", dry_run=True, bits=4)
    assert not (tmp_path / "out").exists()
    made = encode(images, tmp_path / "out", bits=4)
    assert predicted.rows == made.rows
    assert predicted.latent == made.latent
    assert predicted.code_bytes == 18 * 16 * 4 * 4 // 2


@pytest.mark.parametrize(
    ("side", "codec", "size", "cells"),
    [
        (300, "dct", 224, 28),
        (130, "dct", 128, 16),  # its own size, to whole blocks
        (107, "dct", 224, 28),  # its own would leave 13 cells
        (49, "dct", 224, 28),
        (48, "dct", 128, 16),  # more cells would take more bytes than pixels
        (40, "resample:factor=1", 40, 40),
    ],
)
def test_default_size_suits_source_and_codec(tmp_path: Path, side: int, codec: str, size: int, cells: int) -> None:
    source = make_folder(tmp_path / "images", train=2, val=1, side=side)
    planned = latentprep.encode(source, codec=codec, out=tmp_path / "a", dry_run=True)
    assert (planned.size, planned.latent[1:]) == (size, (cells, cells))


@pytest.mark.parametrize(
    ("side", "given", "codec", "latent"),
    [
        (28, {}, "scatter", (17, 16, 16)),
        (48, {}, "scatter", (17, 16, 16)),
        (49, {}, "scatter", (17, 28, 28)),
        (64, {}, "scatter", (17, 28, 28)),
        (200, {"size": 32}, "resample", (3, 32, 32)),
        (32, {"codec": "dct"}, "dct", (16, 16, 16)),
    ],
)
def test_small_images_are_enlarged_and_small_sizes_are_pixels(
    tmp_path: Path, side: int, given: dict, codec: str, latent: tuple
) -> None:
    source = make_folder(tmp_path / "images", train=2, val=1, side=side)
    planned = latentprep.encode(source, **given, out=tmp_path / "a", dry_run=True)
    assert (planned.codec["name"], planned.latent) == (codec, latent)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"bits": 5}, "bits is 4, but 5 was requested"),
        ({"size": 40}, "transform.size is 32, but 40 was requested"),
        ({"codec": "dct:luma=3"}, "codec.luma is 10, but 3 was requested"),
        ({"codec": "resample"}, "codec.name is dct, but resample was requested"),
        ({"views": 2}, "transform.views"),
        ({"seed": 7}, "transform.seed"),
        ({"limit": 3}, "the source of .* has changed|splits.train"),
        ({"shard_rows": 8}, "shard_rows"),
    ],
)
def test_resuming_with_other_settings_is_refused(images: Path, tmp_path: Path, change: dict, field: str) -> None:
    encode(images, tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(DatasetError, match=field):
        encode(images, tmp_path / "out", **change)
    assert digest(tmp_path / "out") == before
    assert encode(images, tmp_path / "out", overwrite=True, **change).encoded > 0


def test_what_a_codec_leaves_out_is_called_none(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "out", codec="scatter")
    with pytest.raises(DatasetError, match="codec.order is none, but 2 was requested"):
        encode(images, tmp_path / "out", codec="scatter:order=2")
    with pytest.raises(DatasetError, match="codec.order is none there, but 2 was requested"):
        encode(images, tmp_path / "more", codec="scatter:order=2", quantizer=tmp_path / "out")


def test_a_changed_source_is_refused(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "out")
    (images / "train" / "class_0" / "new.jpg").write_bytes(jpeg(picture(1)))
    (images / "train" / "class_0" / "000.jpg").unlink()
    with pytest.raises(DatasetError, match="the source of .* has changed"):
        encode(images, tmp_path / "out")


def test_folders_that_hold_other_things_are_left_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match=r"not empty and holds no latent dataset \(it has thesis.tex\)"):
        encode(images, tmp_path / "out")
    with pytest.raises(DatasetError, match="choose another folder as out"):
        encode(images, tmp_path / "out", overwrite=True)
    with pytest.raises(DatasetError, match="not empty"):
        encode(images, images, overwrite=True)
    assert len(list(images.rglob("*.jpg"))) == 18


def test_overwriting_deletes_only_what_was_made(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "out")
    (tmp_path / "out" / "train" / "thesis.tex").write_text("years of work")
    encode(images, tmp_path / "out", overwrite=True, codec="resample")
    assert (tmp_path / "out" / "train" / "thesis.tex").read_text() == "years of work"
    assert latentprep.open(tmp_path / "out").manifest.codec["name"] == "resample"


def test_mended_images_are_read_again(images: Path, tmp_path: Path) -> None:
    file = images / "train" / "class_0" / "001.jpg"
    good = file.read_bytes()
    file.write_bytes(good[:200])
    assert encode(images, tmp_path / "out").invalid == 1
    assert encode(images, tmp_path / "out").encoded == 0  # still damaged: nothing to do
    file.write_bytes(good)
    mended = encode(images, tmp_path / "out")
    assert (mended.encoded, mended.invalid) == (4, 0)  # its shard alone
    assert len(latentprep.open(tmp_path / "out").load("train")) == 12
    assert not (tmp_path / "out" / "errors.jsonl").exists()


@pytest.mark.parametrize("name", ["codes", "labels", "keys"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_encoding_again_makes_missing_and_cut_files_anew(images: Path, tmp_path: Path, name: str, how: str) -> None:
    encode(images, tmp_path / "out")
    before = digest(tmp_path / "out")
    file = next((tmp_path / "out" / "train" / name / "c").rglob("0"))
    file = file if file.is_file() else next(path for path in file.rglob("*") if path.is_file())
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert encode(images, tmp_path / "out").encoded == 4
    assert digest(tmp_path / "out") == before


def test_interrupted_then_resumed_is_the_same(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "whole", batch_size=2)
    for count in (1, 5, 6, 3):
        with pytest.raises(Interrupted, match=r"of 5 shards are committed; run the same command again"):
            encode(images, tmp_path / "parts", batch_size=2, progress=Interrupting(count - 1, "encoding"))
    encode(images, tmp_path / "parts", batch_size=2)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_a_deleted_shard_is_made_again(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "out")
    before = digest(tmp_path / "out")
    (tmp_path / "out" / "records" / "train-000001.json").unlink()
    (tmp_path / "out" / "train" / "codes" / "c" / "1" / "0" / "0" / "0" / "0").unlink()
    assert encode(images, tmp_path / "out").encoded == 4
    assert digest(tmp_path / "out") == before


def test_killed_again_and_again_and_resumed_is_the_same(tmp_path: Path) -> None:
    """SIGKILL just after a commit; `benchmarks/chaos.py` does it at random moments, on real images."""
    source = make_folder(tmp_path / "images", train=60, val=10)
    command = [sys.executable, "-m", "latentprep", "encode", str(source), "--codec", "dct", "--shard-rows", "4"]
    encode(source, tmp_path / "whole", size=None)
    kills = 0
    for delay in (0.0, 0.005):
        done = len(list((tmp_path / "parts" / "records").glob("*.json")))
        process = subprocess.Popen([*command, "--out", str(tmp_path / "parts")], stdout=-3, stderr=-3)
        while process.poll() is None and len(list((tmp_path / "parts" / "records").glob("*.json"))) == done:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    encode(source, tmp_path / "parts", size=None)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_nan_latents_name_the_sample(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)
    (images / "train" / "class_1" / "004.jpg").write_bytes(jpeg(np.zeros((40, 40, 3), np.uint8)))
    with pytest.raises(CodecError, match=r"NaN or infinite latents of train/class_1/004\.jpg"):
        encode(images, tmp_path / "out", codec="broken")


def test_a_plug_in_codec_encodes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)
    encode(images, tmp_path / "out", codec="grey:gain=0.5")
    dataset = latentprep.open(tmp_path / "out")
    assert dataset.manifest.codec == {"name": "grey", "gain": 0.5}
    assert dataset.manifest.flip == (1,)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 9},
        {"size": 30},
        {"size": 0},
        {"views": 0},
        {"workers": 0},
        {"batch_size": 0},
        {"limit": 0},
    ],
)
def test_bad_options_are_refused_before_anything_is_written(images: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(UsageError, match=r"must be|multiples of"):
        encode(images, tmp_path / "out", **options)
    with pytest.raises(UsageError, match="seed must be"):
        encode(images, tmp_path / "out", seed=-1)
    with pytest.raises(UsageError, match="max_error_fraction"):
        encode(images, tmp_path / "out", max_error_fraction=float("nan"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(images, tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 25:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemFault, match=r"no space left on device.*free some space"):
        encode(images, tmp_path / "out")
    monkeypatch.undo()
    encode(images, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_out_that_cannot_be_written_is_a_system_fault(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemFault):
        encode(images, tmp_path / "file" / "out")


def test_imagenette_with_taesd(assets: Path, tmp_path: Path) -> None:
    tar = assets / "imagenette2-224.tar"
    result = latentprep.encode(
        "imagenette", data=tar, codec="taesd", weights=str(assets / "taesd"), limit=10, out=tmp_path, bits=4
    )
    assert result.rows == {"train": 10, "val": 10}
    assert result.latent == (4, 28, 28)
    dataset = latentprep.open(tmp_path)
    assert "tench" in dataset.classes
    loaded = dataset.load("val")
    assert len(set(loaded.labels.tolist())) == 10
    assert dataset.manifest.flip is None
    histogram = np.bincount(loaded.codes.ravel(), minlength=16)
    assert (histogram > 0).all()  # the whole range is used


@pytest.mark.parametrize(("phi", "size"), [(0, 32), (1, 40), (2, 40), (3, 48), (-2, 24)])
def test_phi_scales_the_resolution(images: Path, tmp_path: Path, phi: float, size: int) -> None:
    """1.15**phi times 32 pixels, to the nearest that a codec of factor 8 takes."""
    planned = latentprep.encode(images, codec="resample:factor=8", size=32, phi=phi, out=tmp_path / "out", dry_run=True)
    assert planned.size == size
    assert scaling.RESOLUTION_BASE == transform.RESOLUTION_BASE


def test_a_profile_says_where_the_time_went(images: Path, tmp_path: Path) -> None:
    class Slow:
        """A codec that takes a fifth of a second a batch: more than the disk takes to flush a shard."""

        name = "slow"

        def __init__(self) -> None:
            self.inner = make_codec("resample", factor=8)

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            time.sleep(1 / 5)
            return self.inner.encode(pixels)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    result = latentprep.encode(images, codec=Slow(), size=32, shard_rows=4, out=tmp_path / "out", profile=True)
    assert result.profile is not None
    busy = {stage["stage"]: stage["seconds"] for stage in result.profile["stages"]}
    assert list(busy) == ["read and decode", "codec", "quantize", "compress and write"]
    assert min(busy.values()) > 0
    assert busy["codec"] >= 5 / 5  # three batches of train, two of val
    assert result.profile["bottleneck"] == "codec"
    assert latentprep.encode(images, codec=Slow(), size=32, shard_rows=4, out=tmp_path / "out").profile is None


def test_slow_decoding_is_named(tmp_path: Path) -> None:
    from latentprep.encoding.profile import DECODE, WAIT_DECODE, Profile

    profile = Profile(decoders=2)
    profile.seconds, profile.wall = {DECODE: 10.0, WAIT_DECODE: 4.0}, 6.0
    assert profile.to_json()["bottleneck"] == "read and decode"


def test_a_shard_made_in_another_process_from_pickled_arguments_has_the_same_bytes(
    images: Path, tmp_path: Path
) -> None:
    encode(images, tmp_path / "out", views=2)
    dataset, source, codec = latentprep.open(tmp_path / "out"), open_source(images), make_codec("dct")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for shard in dataset.manifest.shards():
            made = pool.submit(encode_shard, dataset.manifest, source, codec, shard).result()
            assert {path: (tmp_path / "out" / path).read_bytes() for path in made.files} == made.files
            assert (tmp_path / "out" / made.record.path).read_bytes() == made.record.to_bytes()
