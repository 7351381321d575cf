"""What is done with images is done with sounds, on the same paths."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentprep
import latenttrain
from inprocess import command
from latentprep.errors import SourceError, UsageError
from pages import Strict
from pictures import make_folder
from sounds import RATE, make_sounds, sound, sound_bytes


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return make_sounds(tmp_path / "words")


@pytest.fixture
def shards(sounds: Path, tmp_path: Path) -> Path:
    latentprep.encode(sounds, shard_rows=4, out=tmp_path / "shards")
    return tmp_path / "shards"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_defaults_suit_sounds(sounds: Path, tmp_path: Path) -> None:
    made = latentprep.encode(sounds, out=tmp_path / "out")
    assert (made.codec["name"], made.latent, made.seconds_each) == ("mdct", (1, 24, 20), 0.4)
    manifest = latentprep.open(tmp_path / "out").manifest
    assert manifest.transform == {
        "media": "sound", "size": 6400, "rate": RATE, "views": 1, "seed": 0, "resample": "soxr-hq",
    }  # fmt: skip
    facts = latentprep.info(tmp_path / "out")
    assert (facts.complete, facts.seconds_each) == (True, 0.4)
    assert facts.smaller_than_pixels == pytest.approx(18 * 12800 / facts.code_bytes)


def test_less_than_a_bit_for_the_one_channel_is_refused_before_anything_is_made(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bits=0.5 is less than one bit for its one channel; use bits=1 or more"):
        latentprep.encode(sounds, bits=0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seconds_set_the_length(sounds: Path, tmp_path: Path) -> None:
    planned = latentprep.encode(sounds, seconds=0.333, dry_run=True, out=tmp_path / "out")
    assert (planned.latent, planned.seconds_each) == ((1, 24, 17), pytest.approx(0.34))
    with pytest.raises(UsageError, match="seconds"):
        latentprep.encode(sounds, seconds=0, dry_run=True, out=tmp_path / "out")


def test_the_default_length_leaves_five_percent_to_be_cut(tmp_path: Path) -> None:
    folder = make_sounds(tmp_path / "words", train=20)
    (folder / "train" / "low" / "000.wav").write_bytes(sound_bytes(sound(200, seconds=5)))
    assert latentprep.encode(folder, dry_run=True, out=tmp_path / "out").seconds_each == 0.4


def test_a_codec_of_the_other_medium_is_refused_with_a_way_out(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="codec 'dct' is for images, and .* holds sound") as error:
        latentprep.encode(sounds, codec="dct", out=tmp_path / "out")
    assert "codec='mdct'" in error.value.hint
    pictures = make_folder(tmp_path / "pictures")
    with pytest.raises(UsageError, match="codec 'mdct' is for sound"):
        latentprep.encode(pictures, codec="mdct", out=tmp_path / "out")
    with pytest.raises(UsageError, match="seconds is for sound"):
        latentprep.encode(pictures, codec="dct", seconds=1, out=tmp_path / "out")
    for given in ({"size": 64}, {"phi": 1.0}, {"max_pixels": 100}):
        with pytest.raises(UsageError, match="is for images"):
            latentprep.encode(sounds, out=tmp_path / "out", **given)
    with pytest.raises(UsageError, match="rd compares codecs of images"):
        latentprep.rd(sounds, out=tmp_path / "rd")


def test_damaged_and_empty_sounds_are_rows_that_are_reported_and_repaired(sounds: Path, tmp_path: Path) -> None:
    damaged, good = sounds / "train" / "low" / "001.wav", (sounds / "train" / "low" / "001.wav").read_bytes()
    damaged.write_bytes(good[:5000])
    (sounds / "val" / "high" / "000.wav").write_bytes(b"")
    out = tmp_path / "out"
    made = latentprep.encode(sounds, shard_rows=4, max_error_fraction=0.5, out=out)
    assert made.splits_invalid == {"train": 1, "val": 1}
    reasons = [json.loads(line)["reason"] for line in (out / "errors.jsonl").read_text().splitlines()]
    assert "cut short" in reasons[0] and reasons[1] == "not sound but an empty file"
    damaged.write_bytes(good)
    assert latentprep.encode(sounds, shard_rows=4, max_error_fraction=0.5, out=out).invalid == 1
    with pytest.raises(SourceError, match="more than 0.1"):
        latentprep.encode(sounds, shard_rows=4, out=tmp_path / "strict")


def test_resuming_and_any_number_of_workers_make_the_same_bytes(sounds: Path, shards: Path, tmp_path: Path) -> None:
    whole = files(shards)
    (shards / "records" / "train-000001.json").unlink()
    assert latentprep.encode(sounds, shard_rows=4, out=shards).encoded == 4
    assert files(shards) == whole
    latentprep.encode(sounds, shard_rows=4, workers=3, batch_size=2, out=tmp_path / "other")
    codes = {name: data for name, data in whole.items() if name.startswith(("train", "val"))}
    assert {name: data for name, data in files(tmp_path / "other").items() if name in codes} == codes


def test_views_are_of_train_alone_and_view_0_stays(sounds: Path, shards: Path, tmp_path: Path) -> None:
    latentprep.encode(sounds, shard_rows=4, views=3, quantizer=shards, out=tmp_path / "views")
    one, more = (latentprep.open(path) for path in (shards, tmp_path / "views"))
    assert more.manifest.transform["views"] == {"train": 3, "val": 1}
    assert (more.manifest.transform["shift"], more.manifest.transform["gain"]) == (0.1, 6.0)
    codes = more.read_shard("train", 0).codes
    assert np.array_equal(codes[:, :1], one.read_shard("train", 0).codes)
    assert not np.array_equal(codes[:, 1], codes[:, 0])


def test_verify_finds_changed_sounds_and_repairs(sounds: Path, shards: Path) -> None:
    found = latentprep.verify(shards, source=sounds)
    assert found.ok and found.compared is not None and found.compared.differing == 0
    (sounds / "train" / "low" / "001.wav").write_bytes(sound_bytes(sound(2000, 9)))
    found = latentprep.verify(shards, source=sounds)
    assert found.hashed is not None and found.hashed.changed == ("train/low/001.wav",)
    assert latentprep.verify(shards, source=sounds, repair=True).repaired
    assert latentprep.verify(shards, source=sounds).ok


def as_parquet(folder: Path, root: Path, audio: bool = True) -> Path:
    """The folder's sounds, as `datasets` writes an Audio column, or as plain bytes with labels as text."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    for split in ("train", "val"):
        paths = sorted(path for path in (folder / split).rglob("*") if path.is_file())
        data, labels = [path.read_bytes() for path in paths], [path.parent.name for path in paths]
        struct = [{"bytes": one, "path": path.name} for one, path in zip(data, paths, strict=True)]
        table = pa.table({"audio": struct if audio else data, "label": labels})
        if audio:
            features = {"info": {"features": {"audio": {"_type": "Audio", "sampling_rate": RATE}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=4)
    return root


def content(shards: Path) -> list:
    dataset = latentprep.open(shards)
    return [(s, d.labels.tolist(), d.codes.tobytes()) for s in dataset.splits for d in [dataset.load(s)]]


@pytest.mark.parametrize("kind", ["tar", "audio", "bytes"])
def test_every_container_gives_the_codes_of_the_folder(sounds: Path, shards: Path, tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        source = tmp_path / "words.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(sounds, "words")
    else:
        source = as_parquet(sounds, tmp_path / "files", kind == "audio")
    out = tmp_path / "out"
    latentprep.encode(source, shard_rows=4, out=out)
    assert content(out) == content(shards)
    assert kind == "bytes" or [latentprep.open(out).load(s).keys for s in ("train", "val")] == [
        latentprep.open(shards).load(s).keys for s in ("train", "val")
    ]
    assert latentprep.verify(out, source=source).ok
    whole = files(out)
    (out / "records" / "train-000001.json").unlink()
    assert latentprep.encode(source, shard_rows=4, out=out).encoded == 4
    assert files(out) == whole


def test_damaged_rows_and_mixtures_in_parquet_are_reported(sounds: Path, tmp_path: Path) -> None:
    (sounds / "train" / "low" / "001.wav").write_bytes(b"")
    (sounds / "train" / "low" / "cover.jpg").write_bytes(b"no sound")
    source = as_parquet(sounds, tmp_path / "files")
    made = latentprep.encode(source, shard_rows=4, out=tmp_path / "out")
    assert made.splits_invalid == {"train": 1, "val": 0}
    assert latentprep.open_source(source).left_out == {"images beside sounds": 1}


@pytest.mark.parametrize("store", ["wds", "parquet"])
def test_stores_hold_sounds_and_convert_back(shards: Path, tmp_path: Path, store: str) -> None:
    latentprep.convert(shards, out=tmp_path / "there", store=store)
    latentprep.convert(tmp_path / "there", out=tmp_path / "back", store="zarr")
    assert files(tmp_path / "back") == files(shards)


def test_requantize_subset_and_merge(sounds: Path, shards: Path, tmp_path: Path) -> None:
    assert latentprep.requantize(shards, bits=2, out=tmp_path / "two").bits == 2
    assert latentprep.subset(shards, classes=["low"], out=tmp_path / "low").rows == {"train": 6, "val": 3}
    parts = []
    for i in range(2):
        parts.append(tmp_path / f"part-{i}")
        latentprep.encode(sounds, shard_rows=4, shard_of=(i, 2), out=parts[-1])
    latentprep.merge(parts, out=tmp_path / "merged")
    assert files(tmp_path / "merged") == files(shards)


def test_unchanged_sounds_are_reused(sounds: Path, shards: Path, tmp_path: Path) -> None:
    (sounds / "train" / "low" / "new.wav").write_bytes(sound_bytes(sound(250, 77)))
    made = latentprep.encode(sounds, shard_rows=4, reuse=shards, out=tmp_path / "more")
    assert (made.encoded, made.reused) == (19, 18)


def test_fewer_bytes_can_be_asked_for(sounds: Path, tmp_path: Path) -> None:
    made = latentprep.encode(sounds, rate=1.5, out=tmp_path / "out")
    assert made.bits <= 8 and made.code_bytes > 0


def test_preview_draws_spectrograms_and_writes_sounds(sounds: Path, shards: Path, tmp_path: Path) -> None:
    drawn = latentprep.preview(shards, limit=2, bits=[4], source=sounds, out=tmp_path / "sheet.png")
    assert drawn.columns == ("original", "4 bits", "channels")
    assert drawn.sounds == str(tmp_path / "sheet-sounds")
    names = sorted(path.name for path in (tmp_path / "sheet-sounds").iterdir())
    assert names == ["000001-4-bits.flac", "000001-original.flac", "000004-4-bits.flac", "000004-original.flac"]
    heard, rate = soundfile.read(tmp_path / "sheet-sounds" / "000004-original.flac")
    assert (len(heard), rate) == (6400, RATE)
    latentprep.report(shards, samples=2, source=sounds, out=tmp_path / "report.html")
    page = Strict((tmp_path / "report.html").read_text())
    assert sum(link.startswith("data:audio/flac;base64,") for link in page.links) == 2 * 4  # original, 4, 2, 1 bits


def test_decoded_sounds_are_a_source_again(sounds: Path, shards: Path, tmp_path: Path) -> None:
    made = latentprep.decode(shards, split="train", source=sounds, out=tmp_path / "decoded")
    assert (made.all.images, made.all.psnr) == (12, None)
    again = latentprep.encode(
        tmp_path / "decoded", seconds=0.4, quantizer=shards, val_fraction=0, out=tmp_path / "again"
    )
    assert again.rows == {"train": 12}
    codes = [latentprep.open(path).read_shard("train", 0).codes for path in (shards, tmp_path / "again")]
    there = np.abs(codes[0].astype(int)[0] - codes[1].astype(int)[6])  # rows are by class
    assert np.median(there) <= 1
    assert latentprep.decode(shards, limit=1, format="wav", out=tmp_path / "wav").all.images == 1
    with pytest.raises(UsageError, match="flac or wav"):
        latentprep.decode(shards, format="png", out=tmp_path / "png")


def test_a_network_learns_and_predicts_sounds(sounds: Path, shards: Path, tmp_path: Path) -> None:
    result = latenttrain.fit(shards, out=tmp_path / "run", epochs=12, batch_size=4, width=0.25)
    assert result.top1 == 1.0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["augment"]["tone"] > 0
    assert latenttrain.evaluate(tmp_path / "run", shards).top1 == 1.0
    word = tmp_path / "word.mp3"
    word.write_bytes(sound_bytes(sound(910, 5), format="MP3"))
    (tmp_path / "not.wav").write_bytes(b"no sound")
    one, two = latenttrain.predict(tmp_path / "run", [word, tmp_path / "not.wav"])
    assert one.classes[0][0] == "high"
    assert two.error == "cannot be read (not sound but text, 'no sound')"


def test_streaming_trains_as_memory_does(shards: Path, tmp_path: Path) -> None:
    result = latenttrain.fit(shards, out=tmp_path / "run", epochs=1, batch_size=4, width=0.25, stream=2)
    assert (result.epochs, result.parameters > 0) == (1, True)


def test_the_command_line(sounds: Path, tmp_path: Path) -> None:
    done = command("latentprep", "encode", sounds, "--seconds", "0.4", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "0.4 s -> 24×20×1" in done.stdout and "bytes per sound" in done.stdout
    shown = command("latentprep", "info", tmp_path / "out").stdout
    assert "0.4 s" in shown and "samples at 16 bits" in shown
    refused = command("latentprep", "encode", sounds, "--codec", "dct", "--out", tmp_path / "no")
    assert refused.returncode == 2 and "--codec mdct" in refused.stderr
    assert "mdct" in command("latentprep", "codecs").stdout
