"""What decodes samples for a codec: a medium, which is images or sound, as a manifest's ``transform`` describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from latentprep.sources import sound
from latentprep.sources.images import MAX_PIXELS, colour_of, load_views
from latentprep.sources.kinds import IMAGES, SOUND

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", "np.ndarray", "Tensor")


class Medium(Protocol):
    """Decodes samples, all to arrays of one shape.

    shape, dtype: of a view. extent: (height, width) of a view, as `Codec.latent_shape` takes it. raw_bytes: that a view
    takes uncompressed, at 8 bits a colour or 16 bits a sample. seconds: of a sound, None for images.
    """

    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def extent(self) -> tuple[int, int]: ...

    @property
    def raw_bytes(self) -> int: ...

    @property
    def seconds(self) -> float | None: ...

    def load(self, data: bytes, views: int = 1, key: str = "", out: np.ndarray | None = None) -> np.ndarray:
        """A sample's bytes -> [V, *shape], written to `out` if given. Raises `BadSample`."""
        ...

    def check(self, data: bytes) -> None:
        """Raises `BadSample` for bytes that cannot be decoded."""
        ...

    def for_codec(self, views: Array) -> Array:
        """[B, *shape] -> what `Codec.encode` takes, without a copy."""
        ...


@dataclass(frozen=True)
class Images:
    """Square images: u8 [S,S,3], for codecs u8 [B,3,S,S]."""

    size: int
    seed: int
    colour: str
    max_pixels: int = MAX_PIXELS
    dtype = np.dtype(np.uint8)
    seconds = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size, 3

    @property
    def extent(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def raw_bytes(self) -> int:
        return 3 * self.size**2

    def load(self, data: bytes, views: int = 1, key: str = "", out: np.ndarray | None = None) -> np.ndarray:
        return load_views(data, self.size, views, self.seed, key, self.max_pixels, out, self.colour)

    def check(self, data: bytes) -> None:
        load_views(data, size=8, max_pixels=self.max_pixels)

    def for_codec(self, views: Array) -> Array:
        return views.swapaxes(2, 3).swapaxes(1, 2)


@dataclass(frozen=True)
class Sound:
    """Waveforms of one channel: f32 [T], full scale at 1, for codecs f32 [B,T]."""

    size: int
    rate: int
    seed: int
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def extent(self) -> tuple[int, int]:
        return 1, self.size

    @property
    def raw_bytes(self) -> int:
        return 2 * self.size

    @property
    def seconds(self) -> float | None:
        return self.size / self.rate

    def load(self, data: bytes, views: int = 1, key: str = "", out: np.ndarray | None = None) -> np.ndarray:
        return sound.load_views(data, self.size, self.rate, views, self.seed, key, out)

    def check(self, data: bytes) -> None:
        sound.decode(data, self.rate)

    def for_codec(self, views: Array) -> Array:
        return views


def medium_of(transform: dict[str, Any], max_pixels: int = MAX_PIXELS) -> Medium:
    """What decodes samples by a manifest's ``transform``."""
    if transform.get("media", IMAGES) == SOUND:
        return Sound(transform["size"], transform["rate"], transform["seed"])
    return Images(transform["size"], transform.get("seed", 0), colour_of(transform), max_pixels)


def canonical_view(data: bytes, transform: dict[str, Any]) -> np.ndarray:
    """View 0 by a manifest's ``transform``, as one of the batch that `Codec.encode` takes. Raises `BadSample`."""
    medium = medium_of(transform)
    return medium.for_codec(medium.load(data))[0]
