"""`shapes`: ten classes of shapes among clutter, rendered as JPEGs on demand. It needs no download.

Each image shows one shape, of random size, place, angle, stretch, colours and lighting, on a mottled background. Around
it, and a few in front of it, are strokes, blobs, hatchings and specks, which are none of the ten shapes. Noise comes
last. So colour and place say nothing about the class: a linear classifier on pixels stays near chance, and a small CNN
learns it.
"""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from latentprep.sources.layouts import Found, Tree

CLASSES = ("arrow", "circle", "crescent", "cross", "heart", "hexagon", "ring", "square", "star", "triangle")
SIZES = {"train": 5000, "val": 1000}  # samples, equally many of each class
PIXELS = 128  # width and height of an image

_SCALE = 2  # drawn larger by this factor, then shrunk, for smooth edges
_CANVAS = PIXELS * _SCALE
_RADIUS = (0.22, 0.42)  # of the shape, as a share of the image

Points = NDArray[np.float64]  # [n, 2]: x to the right, y down
Colour = tuple[int, int, int]


def find() -> Tree:
    """All rows of the dataset, by split; nothing is rendered."""
    found = {}
    for split, size in SIZES.items():
        names = [CLASSES[i % len(CLASSES)] for i in range(size)]
        found[split] = [Found(f"{split}/{name}/{i:04d}.jpg", name, (split, i)) for i, name in enumerate(names)]
    return Tree(found)


def read(at: tuple[str, int]) -> bytes:
    """The JPEG of image ``(split, index)``, 128×128, of class ``CLASSES[index % 10]``; always the same bytes."""
    split, index = at
    rng = np.random.default_rng([list(SIZES).index(split), index])
    image = Image.fromarray(render(CLASSES[index % len(CLASSES)], rng))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=int(rng.integers(82, 96)))
    return out.getvalue()


def render(name: str, rng: Generator) -> NDArray[np.uint8]:
    """One image of class ``name`` -> u8 [128,128,3]."""
    tone = rng.uniform(0.15, 0.85)  # the background's lightness; the shape's differs from it
    canvas = _mottled(rng, tone, cells=int(rng.integers(2, 9)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 9)):
        clutter = _CLUTTER[rng.integers(len(_CLUTTER))]
        clutter(draw, rng, _colour(rng, rng.uniform(0.1, 0.9)))

    radius = rng.uniform(*_RADIUS) * _CANVAS
    centre = rng.uniform(radius * 0.85, _CANVAS - radius * 0.85, 2)
    shape = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(shape)
    bend = _bend(rng) * radius
    for points, ink in _OUTLINES[name]:
        pen.polygon((points @ bend + centre).ravel().tolist(), fill=ink)
    if rng.random() < 0.6:
        shadow = shape.point([ink * 2 // 5 for ink in range(256)])
        drop = rng.uniform(-0.2, 0.2, 2) * radius
        canvas.paste((0, 0, 0), (int(drop[0]), int(drop[1])), shadow)
    apart = rng.uniform(0.28, 0.5)
    lighter = tone + apart if tone < 0.5 else tone - apart
    canvas.paste(_mottled(rng, lighter, cells=int(rng.integers(2, 5))), (0, 0), shape)

    for _ in range(rng.integers(0, 4)):
        _stroke(draw, rng, _colour(rng, rng.uniform(0.1, 0.9)))
    return _light(np.asarray(canvas.reduce(_SCALE)), rng)


def _light(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Brightness that falls off in one direction, a tint, and grain: u8 [H,W,3] -> u8 [H,W,3]."""
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    ramp = np.linspace(-depth, depth, PIXELS, dtype=np.float32)
    light: NDArray[np.float32] = (
        1 + np.float32(math.cos(angle)) * ramp[None, :] + np.float32(math.sin(angle)) * ramp[:, None]
    )
    grain = rng.standard_normal(light.shape, dtype=np.float32) * np.float32(rng.uniform(2, 11))
    tint = rng.uniform(0.9, 1.1, 3).astype(np.float32)
    lit = pixels * (light[:, :, None] * tint)
    lit += grain[:, :, None]
    return lit.clip(0, 255, out=lit).astype(np.uint8)


def _colour(rng: Generator, lightness: float) -> Colour:
    lightness = min(max(lightness + rng.uniform(-0.06, 0.06), 0.04), 0.96)
    red, green, blue = colorsys.hls_to_rgb(rng.random(), lightness, rng.uniform(0.15, 0.75))
    return int(red * 255), int(green * 255), int(blue * 255)


def _mottled(rng: Generator, lightness: float, cells: int) -> Image.Image:
    """A canvas of two hues that blend into each other, of about the same lightness."""
    hues = [_colour(rng, lightness) for _ in range(2)]
    mix = rng.random((cells, cells, 1))
    grid = np.array(hues[0]) * mix + np.array(hues[1]) * (1 - mix) + rng.normal(0, 8, (cells, cells, 3))
    small = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
    smooth = small.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    return smooth.resize((_CANVAS, _CANVAS), Image.Resampling.NEAREST)  # `reduce` gives `smooth` back


def _bend(rng: Generator) -> NDArray[np.float64]:
    """A random turn, mirror, and stretch of up to about a sixth, [2,2]."""
    turn, along = rng.uniform(0, 2 * math.pi, 2)
    stretch = _rotation(along) @ np.diag([1.0, rng.uniform(0.85, 1.0)]) @ _rotation(-along)
    return stretch @ _rotation(turn) @ np.diag([1.0, rng.choice([-1.0, 1.0])])


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


# --- the ten shapes: polygons within the unit circle, drawn in turn with ink 255 (shape) or 0 (hole)


def _arc(start: float, stop: float, radius: float = 1.0, n: int = 60) -> Points:
    angles = np.radians(np.linspace(start, stop, n))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _regular(corners: int, radius: float = 1.0) -> Points:
    return _arc(-90, 270, radius, corners + 1)[:-1]


def _star() -> Points:
    points = np.empty((10, 2))
    points[0::2], points[1::2] = _regular(5), -_regular(5, 0.42)[[3, 4, 0, 1, 2]]
    return points


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 80)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], axis=1) / 16


def _crescent() -> Points:
    outer = _arc(50, 310)
    inner = _arc(292, 68, 0.86)
    inner[:, 0] += outer[-1, 0] - inner[0, 0]
    inner[:, 1] *= outer[0, 1] / inner[-1, 1]
    return np.concatenate([outer, inner]) + np.array([0.25, 0.0])


def _cross(arm: float = 0.3) -> Points:
    corner = np.array([[arm, -arm], [1, -arm], [1, arm]])
    return np.concatenate([corner @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])


def _arrow() -> Points:
    half = np.array([[-1, -0.2], [0.1, -0.2], [0.1, -0.62], [1, 0]])
    return np.concatenate([half, half[2::-1] * [1, -1]])


_OUTLINES: dict[str, list[tuple[Points, int]]] = {
    "arrow": [(_arrow(), 255)],
    "circle": [(_arc(0, 360), 255)],
    "crescent": [(_crescent(), 255)],
    "cross": [(_cross(), 255)],
    "heart": [(_heart(), 255)],
    "hexagon": [(_regular(6), 255)],
    "ring": [(_arc(0, 360), 255), (_arc(0, 360, 0.58), 0)],
    "square": [(_regular(4), 255)],
    "star": [(_star(), 255)],
    "triangle": [(_regular(3), 255)],
}

# --- clutter: none of the ten shapes, nor close to one


def _stroke(draw: ImageDraw.ImageDraw, rng: Generator, colour: Colour) -> None:
    """A bent line right across part of the image."""
    ends, pull = rng.uniform(-0.1, 1.1, (2, 2)) * _CANVAS, rng.uniform(-0.25, 1.25, 2) * _CANVAS
    t = np.linspace(0, 1, 12)[:, None]
    curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * pull + t**2 * ends[1]
    draw.line(curve.ravel().tolist(), fill=colour, width=int(rng.integers(2, 8)), joint="curve")


def _blob(draw: ImageDraw.ImageDraw, rng: Generator, colour: Colour) -> None:
    """A closed, uneven, lumpy outline, filled."""
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    lumps = np.sum([rng.uniform(0.12, 0.3) * np.cos(k * t + rng.uniform(0, 6.28)) for k in (2, 3, 5)], axis=0)
    radius = rng.uniform(0.04, 0.13) * _CANVAS * (1.0 + lumps)
    points = np.stack([np.cos(t) * rng.uniform(0.5, 1.6), np.sin(t)], axis=1) * radius[:, None]
    draw.polygon((points + rng.uniform(0, _CANVAS, 2)).ravel().tolist(), fill=colour)


def _hatching(draw: ImageDraw.ImageDraw, rng: Generator, colour: Colour) -> None:
    """A few parallel lines."""
    angle, start = rng.uniform(0, math.pi), rng.uniform(0, _CANVAS, 2)
    along = np.array([math.cos(angle), math.sin(angle)]) * rng.uniform(0.1, 0.35) * _CANVAS
    across = np.array([-math.sin(angle), math.cos(angle)]) * rng.uniform(7, 16)
    for k in range(int(rng.integers(3, 8))):
        line = np.concatenate([start + k * across, start + k * across + along])
        draw.line(line.tolist(), fill=colour, width=int(rng.integers(2, 5)))


def _zigzag(draw: ImageDraw.ImageDraw, rng: Generator, colour: Colour) -> None:
    """A line of sharp turns."""
    steps = rng.normal(0, 0.07, (int(rng.integers(3, 8)), 2)) + rng.normal(0, 0.05, 2)
    points = rng.uniform(0, _CANVAS, 2) + np.cumsum(steps, axis=0) * _CANVAS
    draw.line(points.ravel().tolist(), fill=colour, width=int(rng.integers(3, 9)))


def _specks(draw: ImageDraw.ImageDraw, rng: Generator, colour: Colour) -> None:
    """Small dots around a place."""
    for x, y in rng.normal(rng.uniform(0, _CANVAS, 2), 0.1 * _CANVAS, (int(rng.integers(5, 16)), 2)):
        size = rng.uniform(1.5, 5)
        draw.rectangle((x, y, x + size, y + size * rng.uniform(0.6, 1.7)), fill=colour)


_CLUTTER = (_stroke, _stroke, _blob, _blob, _hatching, _zigzag, _specks)
