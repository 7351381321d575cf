from __future__ import annotations

import io
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from latentprep.errors import SourceError, SystemFault
from latentprep.sources.kinds import IMAGES, SOUND, BadSample
from latentprep.sources.media import canonical_view, medium_of
from latentprep.sources.sound import GAIN, SHIFT, decode, duration, load_views, random_change, sound_file
from latentprep.sources.source import open_source
from pictures import jpeg, make_folder, picture
from sounds import RATE, make_sounds, sound, sound_bytes

FORMATS = ("WAV", "FLAC", "OGG", "MP3", "AIFF")


@pytest.mark.parametrize("format", FORMATS)
def test_all_formats_decode_to_the_same_waveform(format: str) -> None:
    wave = sound(300)
    data = sound_bytes(wave, format=format)
    decoded = decode(data, RATE)
    assert decoded.dtype == np.float32 and decoded.ndim == 1
    assert abs(len(decoded) - len(wave)) < 2500  # MP3 pads to whole frames
    assert np.corrcoef(decoded[: len(wave)], wave[: len(decoded)])[0, 1] > (0.9 if format in ("OGG", "MP3") else 0.9999)
    assert duration(data) == pytest.approx(0.4, abs=0.16)


def test_channels_are_averaged_and_the_rate_is_changed() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(4410) / 44100).astype(np.float32)
    decoded = decode(sound_bytes(np.stack([tone, np.zeros_like(tone)], 1), 44100, "FLAC"), RATE)
    assert len(decoded) == 1600
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1600) / RATE)
    assert np.abs(decoded - wanted)[100:-100].max() < 0.01


def test_sounds_are_padded_and_cut_at_the_centre() -> None:
    data = sound_bytes(np.linspace(-0.5, 0.5, 1000, dtype=np.float32), format="FLAC")
    whole = decode(data, RATE)
    assert np.array_equal(load_views(data, 400, RATE)[0], whole[300:700])
    padded = load_views(data, 1500, RATE)[0]
    assert np.array_equal(padded[250:1250], whole)
    assert not padded[:250].any() and not padded[1250:].any()


def test_further_views_are_moved_and_louder_or_softer() -> None:
    data, size = sound_bytes(sound(300)), 6400
    views = load_views(data, size, RATE, 8, 5, "a/b.wav")
    assert np.array_equal(views[0], load_views(data, size, RATE)[0])
    assert np.array_equal(views, load_views(data, size, RATE, 8, 5, "a/b.wav"))
    assert not np.array_equal(views[1:], load_views(data, size, RATE, 8, 6, "a/b.wav")[1:])
    for view in range(1, 8):
        shift, gain = random_change(5, "a/b.wav", view)
        assert abs(shift) <= SHIFT and abs(gain) <= GAIN
        moved, by = views[view], round(shift * size)
        wanted = np.roll(views[0], -by) * 10 ** (gain / 20)
        inside = slice(max(0, -by), size - max(0, by))
        assert np.allclose(moved[inside], wanted[inside], atol=1e-6)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not sound but an empty file"),
        (bytes(100), "nothing but zeros"),
        (b"what is this", "not sound but text"),
        (jpeg(picture(1)), "not sound but an image"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "cut short"),
        (b"fLaC" + bytes(60), "damaged sound"),
        (sound_bytes(sound(300))[:3000], "cut short"),
        (sound_bytes(np.zeros(0, np.float32)), "no samples"),
        (b"\xff\xfb\x90" + bytes(40), "not|damaged"),
    ],
)
def test_what_is_no_sound_says_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode(data, RATE)


def test_samples_that_are_no_numbers_are_refused() -> None:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(100, np.nan), RATE, format="WAV", subtype="FLOAT")
    with pytest.raises(BadSample, match="NaN"):
        decode(buffer.getvalue(), RATE)


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_cut_flac_is_damaged(cut: float) -> None:
    data = sound_bytes(sound(300), format="FLAC")
    with pytest.raises(BadSample, match="damaged|cut short"):
        decode(data[: int(cut * len(data))], RATE)


def test_a_wav_from_a_pipe_has_no_size_and_is_read() -> None:
    data = bytearray(sound_bytes(sound(300)))
    data[4:8] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data), RATE)) == 6400


def test_a_written_file_is_read_back() -> None:
    wave = sound(300)
    assert np.abs(decode(sound_file(wave, RATE), RATE) - wave).max() < 2**-14


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_folders_and_archives_of_sounds_are_sources(tmp_path: Path, kind: str) -> None:
    folder = make_sounds(tmp_path / "words", format="FLAC")
    source = open_source(folder)
    assert (source.media, source.classes, source.size("train"), source.size("val")) == (SOUND, ("high", "low"), 12, 6)
    packed = open_source(shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path, "words"))
    assert (packed.media, packed.fingerprint()) == (SOUND, source.fingerprint())
    assert packed.read("val", 0).data == source.read("val", 0).data
    assert packed.take(3).media == SOUND


def test_webdataset_tars_of_sounds_are_sources(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for i in range(4):
            for name, data in ((f"{i}.mp3", sound_bytes(sound(300), format="MP3")), (f"{i}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    source = open_source(tmp_path / "train-0.tar", val_fraction=0)
    assert (source.media, source.size("train")) == (SOUND, 4)


def test_sounds_without_a_name_are_known_by_their_bytes(tmp_path: Path) -> None:
    folder = make_sounds(tmp_path / "words")
    for path in folder.rglob("*.wav"):
        path.rename(path.with_suffix(""))
    assert open_source(folder).size("train") == 12


def test_of_a_mixture_the_larger_part_is_the_source_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = make_sounds(tmp_path / "words")
    (folder / "train" / "low" / "cover.jpg").write_bytes(jpeg(picture(1)))
    (folder / "train" / "low" / "song.m4a").write_bytes(b"x")
    (folder / "stray.wav").write_bytes(sound_bytes(sound(300)))
    source = open_source(folder)
    assert source.media == SOUND
    assert source.left_out == {
        "images beside sounds": 1,
        "sounds of a kind that cannot be read (.m4a)": 1,
        "sounds beside the class folders": 1,
    }
    pictures = make_folder(tmp_path / "pictures")
    (pictures / "train" / "class_0" / "noise.wav").write_bytes(sound_bytes(sound(300)))
    source = open_source(pictures)
    assert (source.media, source.left_out) == (IMAGES, {"sounds beside images": 1})


def test_an_empty_class_is_named_in_words_of_sound(tmp_path: Path) -> None:
    folder = make_sounds(tmp_path / "words")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(SourceError, match="has no sounds in train"):
        open_source(folder)
    with pytest.raises(SourceError, match="a single sound"):
        open_source(folder / "train" / "low" / "000.wav")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sound_bytes(sound(300, rate=8000), 8000)
    for module in ("soxr", "soundfile"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemFault) as fault:
            decode(data, RATE)
        assert "latentprep[audio]" in fault.value.hint


def test_a_medium_follows_from_the_transform() -> None:
    pixels = medium_of({"size": 16, "views": 1, "seed": 3})
    assert (pixels.shape, pixels.extent, pixels.raw_bytes, pixels.seconds) == ((16, 16, 3), (16, 16), 768, None)
    waves = medium_of({"media": "sound", "size": 6400, "rate": RATE, "views": 1, "seed": 3})
    assert (waves.shape, waves.extent, waves.raw_bytes, waves.seconds) == ((6400,), (1, 6400), 12800, 0.4)
    assert canonical_view(jpeg(picture(1)), {"size": 16}).shape == (3, 16, 16)
    view = canonical_view(sound_bytes(sound(300)), {"media": "sound", "size": 640, "rate": RATE, "seed": 0})
    assert view.shape == (640,) and view.dtype == np.float32


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_end_in_a_sound_or_in_one_error(format: str) -> None:
    good, random = sound_bytes(sound(300, seconds=0.1), format=format), np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(good[: random.integers(1, len(good) + 1)])
        for place in random.integers(0, min(len(data), random.choice([64, len(good)])), 4):
            data[place] = random.integers(256)
        try:
            assert decode(bytes(data), RATE).ndim == 1
        except BadSample as error:
            assert str(error) and "\n" not in str(error)


def test_a_flac_that_claims_a_hundred_hours_takes_no_memory_for_them() -> None:
    data = bytearray(sound_bytes(sound(300), format="FLAC"))
    data[22:26] = b"\xff\xff\xff\xff"  # of STREAMINFO's 36 bits
    with pytest.raises(BadSample, match="cut short|damaged"):
        decode(bytes(data), RATE)
