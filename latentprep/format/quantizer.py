"""What a code means: the quantizer as plain data, and from codes back to latents in numpy.

The torch side (fitting, and quantizing on a device) is `latentprep.quantizing.scalar`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from latentprep.errors import DatasetError, UsageError, check_number, check_whole, opt
from latentprep.format.fields import Fields

MOST_BITS = 8  # of a code that a quantizer makes
MOST_TOKEN_BITS = 16  # of one that a codec gives itself
LEAST_MEAN = 0.25  # bits per value on average
FILTER_SIDE = 3  # cells
MAX_STAGES = 256


def check_bits(bits: int) -> int:
    """`bits` itself if it is 1 to 8, else a `UsageError`."""
    check_whole("bits", bits, 1, 8, f"use {opt('bits', 4)}, which keeps nearly all of the accuracy")
    return bits


def check_mean_bits(
    bits: float, equal_bits: bool | None = False, joint: bool | None = False, channels: int | None = None
) -> float:
    """`bits` itself, as an int if it is whole; else a `UsageError`, unless they are a number from 0.25 to 8, whole with
    equal bits, and at least one for all `channels` together. Codes that are chosen jointly have equal bits, too."""
    check_number("bits", bits, LEAST_MEAN, MOST_BITS, f"use {opt('bits', 4)}, which keeps nearly all of the accuracy")
    if bits != int(bits) and (equal_bits or joint):
        name = opt("equal_bits" if equal_bits else "joint", True)
        raise UsageError(
            f"{name} gives every channel the same whole number of bits, so {opt('bits', bits)} cannot be met",
            f"use a whole number, or leave out {name}",
        )
    if channels is not None and bits * channels < 1 - 1e-9:
        together = "its one channel" if channels == 1 else f"{channels} channels together"
        raise UsageError(
            f"{opt('bits', bits)} is less than one bit for {together}",
            f"use {opt('bits', whole_as_int(math.ceil(100 / channels) / 100))} or more",
        )
    return whole_as_int(bits)


def code_dtype(bits: int) -> np.dtype:
    """The type of codes of so many bits, on disk and in numpy: u8, or u16, little-endian, for more than 8."""
    return np.dtype("u1" if bits <= 8 else "<u2")


def whole_as_int(number: float) -> float:
    """``2.0`` -> ``2``, as people write it; other numbers as they are."""
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel's codes; networks scale their inputs by them.

    In units of codes: of ``(latent - lo) / step - 0.5``, with the latents that codes stand for. Without a filter, these
    are the codes themselves. A channel whose codes are all the same has deviation 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise DatasetError(
                f"the statistics have {len(self.mean)} means and {len(self.std)} deviations; one per channel is needed"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or not all(s >= 0 for s in self.std):
            raise DatasetError("the statistics' means must be finite, and their deviations finite and 0 or more")

    def to_json(self) -> dict:
        return {"mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class Quantizer:
    """Uniform scalar quantizer, one range per channel: ``latent ≈ lo + (code + 0.5) * step``.

    bits: 1 to 8; codes are of `dtype`, u8, each below ``2**bits``.
    channel_bits: 0 to `bits` for each channel, whose codes are below 2 to that power; empty means `bits` for all. A
    channel of 0 bits has the code 0 everywhere, which stands for the channel's mean.
    lo, step: one float32 value per latent channel, in latent units; ``step`` is positive.
    filter: float32 [C,C,3,3], flattened, if codes were chosen jointly (`latentprep.quantizing.joint`). Then subtract
    the middle of each channel's range from the formula's result, convolve with the filter (without flipping it, zeros
    outside the grid), and add the middle again.
    """

    bits: int
    lo: tuple[float, ...]
    step: tuple[float, ...]
    filter: tuple[float, ...] = ()
    channel_bits: tuple[int, ...] = ()
    most_bits: ClassVar[int] = MOST_BITS

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= self.most_bits:
            raise DatasetError(f"the quantizer's bits must be 1 to {self.most_bits}, got {self.bits}")
        if len(self.lo) != len(self.step) or not self.lo:
            raise DatasetError(
                f"the quantizer has {len(self.lo)} lows and {len(self.step)} steps; there must be one per channel"
            )
        if not all(map(math.isfinite, self.lo + self.step)) or not all(s > 0 for s in self.step):
            raise DatasetError("the quantizer's lows must be finite, and its steps finite and above 0")
        weights = (len(self.lo) * FILTER_SIDE) ** 2
        if self.filter and (len(self.filter) != weights or not all(map(math.isfinite, self.filter))):
            raise DatasetError(f"the quantizer's filter must be {weights} finite numbers, got {len(self.filter)}")
        if not self.channel_bits:
            object.__setattr__(self, "channel_bits", (self.bits,) * len(self.lo))
        if len(self.channel_bits) != len(self.lo) or min(self.channel_bits) < 0 or max(self.channel_bits) != self.bits:
            raise DatasetError(
                f"the quantizer's channel_bits must be {len(self.lo)} numbers from 0 to {self.bits}, the largest "
                f"{self.bits}, got {self.channel_bits}"
            )
        if self.filter and not self.equal_bits:
            raise DatasetError("a quantizer with a filter must have the same bits in all channels")

    @property
    def dtype(self) -> np.dtype:
        """The type of codes on disk and in numpy."""
        return code_dtype(self.bits)

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def equal_bits(self) -> bool:
        """Whether all channels have the same bits."""
        return min(self.channel_bits) == self.bits

    @property
    def channel_levels(self) -> tuple[int, ...]:
        """How many codes each channel has."""
        return tuple(1 << bits for bits in self.channel_bits)

    @property
    def mean_bits(self) -> float:
        """Bits per value on average; an int if it is whole."""
        return whole_as_int(sum(self.channel_bits) / len(self.channel_bits))

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """u8 [..., C, h, w] -> f32 [..., C, h, w]: the middle of each code's cell, filtered if there is a filter."""
        lo, step = (np.array(values, np.float32)[:, None, None] for values in (self.lo, self.step))
        latents = lo + (codes.astype(np.float32) + np.float32(0.5)) * step
        if not self.filter:
            return latents
        middle, (height, width) = lo + np.float32(self.levels / 2) * step, codes.shape[-2:]
        kernel = np.array(self.filter, np.float32).reshape(len(lo), len(lo), FILTER_SIDE, FILTER_SIDE)
        margin = FILTER_SIDE // 2
        padded = np.pad(latents - middle, [(0, 0)] * (codes.ndim - 2) + [(margin, margin)] * 2)
        filtered = sum(
            np.einsum("ck,...khw->...chw", kernel[:, :, i, j], padded[..., i : i + height, j : j + width])
            for i, j in np.ndindex(FILTER_SIDE, FILTER_SIDE)
        )
        return middle + filtered

    def to_json(self) -> dict:
        plain = {"bits": self.bits, "lo": list(self.lo), "step": list(self.step)}
        plain |= {"filter": list(self.filter)} if self.filter else {}
        return plain if self.equal_bits else plain | {"channel_bits": list(self.channel_bits)}


@dataclass(frozen=True)
class Codebook(Quantizer):
    """Residual codebooks of a codec that gives tokens: ``latent = sum of the vectors that a cell's codes name``.

    Each stage has a table of its own and refines those before it, so the first stages alone are a coarser latent. As
    numbers, codes are what they are: ``lo`` is -0.5 and ``step`` 1 for every stage, and nothing saturates.

    sizes: how many vectors each stage has, 2 to 65,536; codes are u16 where one has more than 256.
    sha256: of the file of tables, which may hold further stages.
    file: its bytes, safetensors: a tensor f32 [size, D] for each stage, named by its number from 0. Empty where only
    codes are needed.

    Raises `DatasetError` for sizes out of range, or another file.
    """

    sizes: tuple[int, ...] = ()
    sha256: str = ""
    file: bytes = field(default=b"", repr=False, compare=False)
    most_bits: ClassVar[int] = MOST_TOKEN_BITS

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= MAX_STAGES or not all(2 <= size <= 1 << MOST_TOKEN_BITS for size in self.sizes):
            raise DatasetError(
                f"a codebook needs 1 to {MAX_STAGES} stages of 2 to {1 << MOST_TOKEN_BITS} vectors, "
                f"got {len(self.sizes)} stages of {min(self.sizes, default=0)} to {max(self.sizes, default=0)}"
            )
        super().__post_init__()
        if self.file and hashlib.sha256(self.file).hexdigest() != self.sha256:
            raise DatasetError("the codebooks' SHA-256 is not the recorded one", "restore the file")

    @classmethod
    def of(cls, sizes: Sequence[int], sha256: str, file: bytes = b"") -> Codebook:
        """The codebook of these stages. A code takes as many bits as the largest stage needs."""
        bits, count = max(1, (max(sizes, default=2) - 1).bit_length()), len(sizes)
        return cls(bits, (-0.5,) * count, (1.0,) * count, sizes=tuple(sizes), sha256=sha256, file=file)

    @classmethod
    def of_tables(cls, tables: Sequence[np.ndarray]) -> Codebook:
        """The codebook of a codec's tables, f32 [size,D] each."""
        from safetensors.numpy import save

        file = save({str(stage): np.ascontiguousarray(table, np.float32) for stage, table in enumerate(tables)})
        return cls.of([len(table) for table in tables], hashlib.sha256(file).hexdigest(), file)

    @property
    def levels(self) -> int:
        return max(self.sizes)

    @property
    def channel_levels(self) -> tuple[int, ...]:
        return self.sizes

    @cached_property
    def tables(self) -> tuple[np.ndarray, ...]:
        """The vectors of each stage, f32 [size,D]. Raises `DatasetError` if the file is not what it should be."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        assert self.file, "a codebook without its tables"
        try:
            found = load(self.file)
            tables = tuple(found[str(stage)] for stage in range(len(self.sizes)))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DatasetError(f"the codebooks cannot be read ({error})", "restore the file") from error
        for table, size in zip(tables, self.sizes, strict=True):
            if table.dtype != np.float32 or table.shape != (size, *tables[0].shape[1:]) or table.ndim != 2:
                raise DatasetError(f"a stage's table is {table.dtype} {table.shape}, not float32 with {size} rows")
            if not table.size or not np.isfinite(table).all():
                raise DatasetError("the codebooks hold nothing, or values that are not finite")
        return tables

    def first(self, stages: int) -> Codebook:
        """The first stages alone, of the same file."""
        return Codebook.of(self.sizes[:stages], self.sha256, self.file)

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """u8, u16 or i32 [..., stages, h, w] -> f32 [..., D, h, w]: the sum of the stages' vectors, from the first on.

        Raises `DatasetError` for a code beyond its stage's table.
        """
        latents = np.zeros((*codes.shape[:-3], *codes.shape[-2:], self.tables[0].shape[1]), np.float32)
        for stage, table in enumerate(self.tables):
            indices = codes[..., stage, :, :]
            if indices.size and int(indices.max()) >= len(table):
                raise DatasetError(f"stage {stage} has the code {indices.max()}, and a table of {len(table)} vectors")
            latents += table[indices]
        return np.ascontiguousarray(np.moveaxis(latents, -1, -3))

    def to_json(self) -> dict:
        return {"kind": "codebook", "bits": self.bits, "levels": list(self.sizes), "sha256": self.sha256}


def read_quantizer(fields: Fields, codebooks: Callable[[], bytes] | None = None) -> Quantizer:
    """A quantizer from its JSON, checked. codebooks: reads the file of tables, if they are needed.

    Raises `DatasetError` naming the first thing that is wrong.
    """
    if "kind" in fields.document:
        fields.text("kind", ("codebook",))
        codebook = Codebook.of(fields.list("levels", int), fields.sha256("sha256"))
        fields.whole("bits", codebook.bits, codebook.bits)
        return codebook if codebooks is None else replace(codebook, file=codebooks())
    weights = fields.numbers("filter") if "filter" in fields.document else ()
    each = tuple(fields.list("channel_bits", int)) if "channel_bits" in fields.document else ()
    return Quantizer(fields.whole("bits", 1, 8), fields.numbers("lo"), fields.numbers("step"), weights, each)
