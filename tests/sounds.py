"""Sounds and folders of sounds that the tests make."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000


def sound(pitch: float, seed: int = 0, seconds: float = 0.4, rate: int = RATE) -> np.ndarray:
    """f32 [n]: a tone with overtones that fades away, and some noise, different for each seed."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch * k * time + random.uniform(0, 6)) / k for k in (1, 2, 3))
    return (0.2 * tone * np.exp(-2 * time) + 0.01 * random.normal(size=len(time))).astype(np.float32)


def sound_bytes(wave: np.ndarray, rate: int = RATE, format: str = "WAV") -> bytes:
    """f32 [n] or [n,channels] -> a sound file's bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=format)
    return buffer.getvalue()


def make_sounds(root: Path, train: int = 6, val: int = 3, format: str = "WAV") -> Path:
    """`root`/{train,val}/{low,high}/*.wav (or another format) with that many sounds a class."""
    for split, count in (("train", train), ("val", val)):
        for name, pitch in (("low", 200.0), ("high", 900.0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                data = sound_bytes(sound(pitch + 20 * i, 2 * i + (split == "val")), format=format)
                (folder / f"{i:03}.{format.lower()}").write_bytes(data)
    return root
