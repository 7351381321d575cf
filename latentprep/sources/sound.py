"""From a sample's bytes to a waveform: decoding, one channel, the codec's rate, and the views of a sample.

libsndfile (soundfile) decodes WAV, FLAC, Ogg, MP3 and AIFF from memory; the SoX resampler (soxr) changes the rate. Both
come with the extra ``audio``. Nothing here knows about codecs.
"""

from __future__ import annotations

import hashlib
import io
from types import ModuleType
from typing import Any

import numpy as np

from latentprep.errors import SystemFault
from latentprep.sources.kinds import BadSample, other_kind

MAX_VALUES = 1 << 27  # samples of all channels: 512 MB decoded
RESAMPLE = "soxr-hq"
SHIFT = 0.1  # of the length, at most, by which further views are moved in time, to either side
GAIN = 6.0  # decibels, at most, by which they are louder or softer

_PART = 1 << 18  # samples that are decoded at a time
_ENDLESS = 1 << 48  # samples; libsndfile gives more for a FLAC file that does not say how many it has
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in the header of a WAV file that was written to a pipe


class _Bytes(io.BytesIO):
    """Bytes in which a damaged file cannot seek before the first: cffi would print the traceback."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(max(0, offset + (0, self.tell(), len(self.getbuffer()))[whence]))


class BadSound(BadSample):
    """Bytes that cannot be decoded to sound."""


def load_views(
    data: bytes, size: int, rate: int, views: int = 1, seed: int = 0, key: str = "", out: np.ndarray | None = None
) -> np.ndarray:
    """An encoded sound -> f32 [V, size], `size` samples at `rate` per second, written to `out` if given.

    View 0 is the canonical one: the middle of the sound, or all of it between silence. Views 1… are moved in time and
    changed in level, drawn from (`seed`, `key`, view) alone.

    Raises `BadSound`; `SystemFault` if the extra ``audio`` is missing.
    """
    wave = decode(data, rate)
    out = np.empty((views, size), np.float32) if out is None else out
    for view in range(views):
        shift, gain = random_change(seed, key, view) if view else (0.0, 0.0)
        start = (len(wave) - size) // 2 + round(shift * size)
        part = wave[max(0, start) : max(0, start + size)]
        before = max(0, -start)
        out[view] = 0
        out[view, before : before + len(part)] = part * np.float32(10 ** (gain / 20))
    return out


def decode(data: bytes, rate: int) -> np.ndarray:
    """An encoded sound -> f32 [n] at `rate` samples per second: the mean of its channels, full scale at 1.

    Raises `BadSound` for bytes that cannot be decoded, are cut short, hold no samples or too many.
    """
    wave, own_rate = _decoded(data)
    return wave if own_rate == rate else _soxr().resample(wave, own_rate, rate, quality="HQ")


def duration(data: bytes) -> float:
    """Seconds of an encoded sound, by its header. Raises `BadSound`."""
    with _opened(data) as file:
        if file.frames >= _ENDLESS:
            raise BadSound("its header does not say how long it is")
        return file.frames / file.samplerate


def random_change(seed: int, key: str, view: int) -> tuple[float, float]:
    """How far a view is moved, as a share of its length, and its gain in decibels: the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{view}".encode(errors="surrogateescape")).digest()
    random = np.random.default_rng(np.frombuffer(digest, np.uint32))
    return random.uniform(-SHIFT, SHIFT), random.uniform(-GAIN, GAIN)


def sound_file(wave: np.ndarray, rate: int, format: str = "flac") -> bytes:
    """f32 [n], full scale at 1 -> the bytes of a file with 16 bits per sample; what is louder is clipped."""
    buffer = io.BytesIO()
    _soundfile().write(buffer, np.clip(wave, -1, 1), rate, format=format.upper(), subtype="PCM_16")
    return buffer.getvalue()


def _decoded(data: bytes) -> tuple[np.ndarray, int]:
    """f32 [n], the mean of the channels, and samples per second."""
    parts, count = [], 0
    with _opened(data) as file:
        try:  # in parts, since a header may claim any number of samples
            while len(part := file.read(_PART, dtype="float32", always_2d=True)):
                parts.append(part[:, 0] if file.channels == 1 else part.mean(1, dtype=np.float32))
                count += len(part)
                if count * file.channels > MAX_VALUES:
                    raise BadSound(f"more than the limit of {MAX_VALUES} samples in all channels")
        except BadSound:
            raise
        except Exception as error:
            raise BadSound(f"damaged {file.format}: {_reason(error)}") from error
        if count < file.frames < _ENDLESS:
            raise BadSound(f"damaged {file.format}: cut short after {count} of {file.frames} samples")
        rate = file.samplerate
    if not count:
        raise BadSound("no samples in it")
    wave = np.concatenate(parts)
    if not np.isfinite(wave).all():
        raise BadSound("NaN or infinite samples in it")
    return wave, rate


def _opened(data: bytes) -> Any:
    """The open `soundfile.SoundFile`."""
    soundfile = _soundfile()
    size = int.from_bytes(data[4:8], "little")
    if data[:4] == b"RIFF" and size not in _UNKNOWN_SIZES and size + 8 > len(data) + 1:  # libsndfile reads what is left
        raise BadSound(f"damaged WAV: cut short after {len(data)} of {size + 8} bytes")
    try:
        return soundfile.SoundFile(_Bytes(data))
    except Exception as error:
        what = other_kind(data, "sound")
        raise BadSound(f"damaged sound: {_reason(error)}" if what.endswith("but sound") else what) from error


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error)) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


def _soundfile() -> ModuleType:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its library
        raise _missing(error) from error
    return soundfile


def _soxr() -> ModuleType:
    try:
        import soxr
    except ImportError as error:
        raise _missing(error) from error
    return soxr


def _missing(error: Exception) -> SystemFault:
    return SystemFault(f"reading sound needs soundfile and soxr ({error})", "pip install 'latentprep[audio]'")
