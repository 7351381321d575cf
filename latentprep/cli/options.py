"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Made = Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to.")]
Out = Annotated[str, typer.Option(help="Folder, s3://… or gs://… to write to; an unfinished one there is resumed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in --out and start anew.")]
Dataset = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder or URL that latentprep encode wrote to.", show_default=False)
]
SourceOption = Annotated[
    str | None, typer.Option("--source", help="The source that it was made of, for the original images.")
]
Data = Annotated[Path | None, typer.Option(help="A copy of the named dataset that you already have.")]
Split = Annotated[str | None, typer.Option(help="Split to show. Default: val, or the first where there is no val.")]
Index = Annotated[str | None, typer.Option(help="Only these rows of the split, comma-separated.")]
Class = Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")]
DecoderOption = Annotated[
    str, typer.Option("--decoder", help="codec, or linear: see [b]latentprep linear-decoder[/b].")
]
Weights = Annotated[
    str | None, typer.Option(help="Folder of the autoencoder's weights, if they are not where they were.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int | None, typer.Option(help="Images the codec takes at once.")]
Joint = Annotated[
    bool | None,
    typer.Option(
        "--joint/--no-joint",
        help="Choose a sample's codes together, for 1 to 3 dB more. Default: at 1 bit, with autoencoders.",
    ),
]
Workers = Annotated[int | None, typer.Option(help="Threads that read and decode images.")]
