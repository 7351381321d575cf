"""Contact sheets: a row of images for each sample, with its name; and latents as images."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentprep.sources.sound import sound_file
from latentprep.text import shown

TILE, WIDTH = 112, 1660  # pixels: an image's side, and the sheet's maximal width
_GAP, _MARGIN, _LINE, _TEXT = 3, 16, 18, 12
INK, MUTED = "#24292f", "#59636e"


@dataclass(frozen=True)
class Column:
    """Images under one title, u8 [n,H,W,3], one per sample. smooth: interpolate them if they are enlarged. sounds:
    f32 [n,T] at `rate` samples per second, if they are pictures of sounds."""

    title: str
    pictures: np.ndarray
    smooth: bool = False
    sounds: np.ndarray | None = None
    rate: int = 0

    def flac(self, at: int) -> bytes:
        """A sample's sound as a FLAC file; nothing for pictures of images."""
        return b"" if self.sounds is None else sound_file(self.sounds[at], self.rate)


def draw_sheet(
    columns: list[Column], names: list[str], title: str = "", tile: int = TILE, width: int = WIDTH
) -> Image.Image:
    """The contact sheet: as many samples side by side as its width allows, each with its name."""
    title = shown(title)
    group = len(columns) * (tile + _GAP) - _GAP
    across = max(1, min(len(names), (width - _MARGIN) // (group + _MARGIN)))
    down = -(-len(names) // across)
    top = _MARGIN + (_LINE + 4 if title else 0) + _LINE
    heading = font(_TEXT + 3)
    needed = across * (group + _MARGIN) + _MARGIN, round(heading.getlength(title)) + 2 * _MARGIN
    sheet = Image.new("RGB", (max(needed), top + down * (tile + _LINE + 6) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, INK, heading, anchor="lt")
    for place in range(across):
        for k, column in enumerate(columns):
            centre = _MARGIN + place * (group + _MARGIN) + k * (tile + _GAP) + tile // 2
            draw.text((centre, top - 6), fitted(column.title, tile), MUTED, font(_TEXT), anchor="ms")
    for at, name in enumerate(names):
        left = _MARGIN + at % across * (group + _MARGIN)
        up = top + at // across * (tile + _LINE + 6)
        for k, column in enumerate(columns):
            picture = _resized(column.pictures[at], tile, column.smooth)
            sheet.paste(picture, (left + k * (tile + _GAP) + (tile - picture.width) // 2, up))
        draw.text((left, up + tile + 3), fitted(name, group), INK, font(_TEXT), anchor="lt")
    return sheet


def png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def channel_pictures(unit: np.ndarray) -> np.ndarray:
    """Latents in 0…1, f32 [n,C,h,w] -> u8 [n,H,W,3]: every channel in false colours, from dark (low) to bright (high),
    side by side in reading order; grids one cell high are rows of one picture, the first channel at the bottom."""
    from matplotlib import colormaps

    n, channels, height, width = unit.shape
    across = 1 if height == 1 else math.ceil(math.sqrt(channels))
    unit = unit[:, ::-1] if height == 1 else unit
    down = -(-channels // across)
    grid = np.full((n, down * across, height, width), np.nan, np.float32)
    grid[:, :channels] = unit
    grid = grid.reshape(n, down, across, height, width).transpose(0, 1, 3, 2, 4).reshape(n, down * height, -1)
    palette = colormaps["viridis"].with_extremes(bad="white")
    return palette(np.ma.masked_invalid(grid), bytes=True)[..., :3]


def colour_pictures(unit: np.ndarray) -> np.ndarray:
    """Latents in 0…1, f32 [n,C,h,w] -> u8 [n,h,w,3]: the first three channels as red, green, blue, or one as grey."""
    three = unit[:, :3] if unit.shape[1] >= 3 else np.repeat(unit[:, :1], 3, axis=1)
    return (three.transpose(0, 2, 3, 1).clip(0, 1) * 255).round().astype(np.uint8)


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface of the plots, which has the letters of most languages."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def fitted(text: str, width: int) -> str:
    """The text, safe to draw, cut with an ellipsis if it is wider than `width` pixels."""
    text = shown(text)
    if font(_TEXT).getlength(text) <= width:
        return text
    while text and font(_TEXT).getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _resized(picture: np.ndarray, tile: int, smooth: bool) -> Image.Image:
    """Resize the longer side to `tile`: averaged if it shrinks; if it grows, blocks of pixels unless `smooth`."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = tile / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    if image.size == size:
        return image
    kind = Image.Resampling.LANCZOS if scale < 1 or smooth else Image.Resampling.NEAREST
    return image.resize((size[0], size[1]), kind)
