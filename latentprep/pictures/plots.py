"""Plots in this project's style."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentprep.storage.atomic import write_atomic
from latentprep.text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, BLUE, INK, GRID = "#8a8f98", "#1f6feb", "#24292f", "#e6e8eb"
COLOURS = (BLUE, "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700")  # for lines that differ by colour


@contextlib.contextmanager
def draw(path: Path, panels: int) -> Iterator[Sequence[Axes]]:
    """Axes side by side to draw on, in this project's style; afterwards they are saved to `path`, a PNG or an SVG."""
    with drawn(panels) as (axes, picture):
        yield axes
    write_atomic(path, picture(path.suffix[1:]))


def log_below(axes: Axes) -> None:
    """A logarithmic axis below, marked at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


@contextlib.contextmanager
def drawn(panels: int, width: float = 4.5, height: float = 3.6) -> Iterator[tuple[Sequence[Axes], _Picture]]:
    """The same, with a function that afterwards returns the bytes of a file. width, height: of a panel, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(width * panels, height), dpi=144, layout="constrained")
    every = figure.subplots(1, panels, squeeze=False)[0]
    yield every, _Picture(figure)
    for text in figure.findobj(Text):  # a $ in the name of a class or run does not start a formula
        text.set_text(shown(text.get_text()))
        text.set_parse_math(False)
    for axes in every:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


class _Picture:
    def __init__(self, figure: object) -> None:
        self.figure = figure

    def __call__(self, format: str) -> bytes:
        """The bytes as png, or as svg with real text. The same drawing gives the same bytes."""
        import matplotlib

        picture = io.BytesIO()
        options = {"metadata": {"Date": None, "Creator": None}} if format == "svg" else {}
        with matplotlib.rc_context({"svg.hashsalt": "latentprep", "svg.fonttype": "none"}):
            self.figure.savefig(picture, format=format, **options)  # type: ignore[attr-defined]
        return picture.getvalue()
