"""Options that several commands have, and lists written as text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentprep.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in --out and start over.")]
Device = Annotated[str, typer.Option(rich_help_panel="Machine", help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[
    int | None,
    typer.Option(rich_help_panel="Machine", help="Threads that read and decode images. Default: one per core."),
]

Dataset = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder or URL that latentprep encode wrote to.", show_default=False)
]
Out = Annotated[str, typer.Option(help="Folder, s3:// or gs:// URL to write.")]
Joint = Annotated[
    bool | None,
    typer.Option(
        "--joint/--no-joint",
        help="Choose up to 32 channels' codes jointly. Default: at 1 bit of autoencoders, to 2 of scatter, resample.",
    ),
]
EqualBits = Annotated[
    bool | None,
    typer.Option("--equal-bits", help="The same bits for every channel."),
]
Weights = Annotated[
    str | None, typer.Option(help="Folder of the autoencoder's weights, if it has moved since the encode.")
]

Data = Annotated[
    Path | None,
    typer.Option(rich_help_panel="Source", help="Your own copy of the named dataset, instead of a download."),
]
Labels = Annotated[
    Path | None,
    typer.Option(rich_help_panel="Source", help="Table of labels: CSV, TSV, JSON lines or Parquet."),
]
ImageColumn = Annotated[
    str | None, typer.Option(rich_help_panel="Source", help="Column of images, or of --labels' file names.")
]
LabelColumn = Annotated[
    str | None, typer.Option(rich_help_panel="Source", help="Column of labels. Default: the ClassLabel, or label.")
]
OwnSource = Annotated[
    str | None, typer.Option("--source", help="The source the dataset was made from, for the original images.")
]
SameValFraction = Annotated[float | None, typer.Option(rich_help_panel="Source", help="As for the encode.")]
SameLimit = Annotated[int | None, typer.Option(rich_help_panel="Source", help="As for the encode.")]
SameSeed = Annotated[int, typer.Option(rich_help_panel="Source", help="As for the encode.")]

Split = Annotated[str | None, typer.Option(help="Split to show. Default: val, or the first where there is no val.")]
Index = Annotated[str | None, typer.Option(help="Only these rows of the split, such as 1,2 or 5-8.")]
Classes = Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")]
Limit = Annotated[int, typer.Option(help="At most this many samples, spread over the classes.")]
DecoderOption = Annotated[
    str, typer.Option("--decoder", help="codec, or linear: see [b]latentprep linear-decoder[/b].")
]
Show = Annotated[bool, typer.Option("--show/--no-show", help="Show it in the terminal, where that is possible.")]


def words(text: str | None) -> list[str] | None:
    """``a, b`` -> ``["a", "b"]``; None where there is no text."""
    return [name.strip() for name in text.split(",")] if text else None


def whole_numbers(option: str, text: str) -> list[int]:
    """``1,2,5``, and ``1-3`` or ``1..3`` for a range. `UsageError` naming the option for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.replace("..", "-").partition("-")
        if not low.strip().isdecimal() or (dash and not high.strip().isdecimal()):
            raise UsageError(f"{option} takes whole numbers such as 1,2,5 or 1-8, got {text}")
        if dash and int(high) - int(low) > 1 << 20:
            raise UsageError(f"{option}: the range {part} is too long")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


def numbers(option: str, text: str) -> list[float]:
    """``0.5,1``. `UsageError` naming the option for anything else."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"{option} takes numbers such as 0.5,1, got {text}") from error


def indices(text: str | None) -> list[int] | None:
    """What --index names, or None."""
    return None if text is None else whole_numbers("--index", text)
