"""The command line `latentprep`: parse, one library call, render. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from latentprep import __version__, text
from latentprep.cli import console
from latentprep.cli import datasets as cli_datasets
from latentprep.cli import pictures as cli_pictures
from latentprep.cli.options import (
    Data,
    Device,
    EqualBits,
    ImageColumn,
    Joint,
    Json,
    LabelColumn,
    Labels,
    Out,
    Overwrite,
    Workers,
    words,
)
from latentprep.cli.showing import open_shown, shape, show_result

app = typer.Typer(
    name="latentprep",
    help="Encode an image dataset once with a lossy codec and keep its low-bit codes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    console.run(app)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        print(f"latentprep {__version__}")
        raise typer.Exit


@app.command()
def encode(
    source: Annotated[str, typer.Argument(help="Folder, archives, Parquet files, or shapes, imagenette, …")],
    out: Out = "shards",
    bits: Annotated[float | None, typer.Option(help="Mean bits per value, 0.25 to 8. Default: 4.")] = None,
    equal_bits: EqualBits = None,
    rate: Annotated[float | None, typer.Option(help="Bits per code on disk, in place of --bits.")] = None,
    bytes: Annotated[int | None, typer.Option(help="Bytes per image, in place of --bits.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels per side. Default: suits source and codec.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of sounds. Default: suits the source.")] = None,
    joint: Joint = None,
    views: Annotated[int, typer.Option(help="Views per train sample; others are crops.")] = 1,
    store: Annotated[str, typer.Option(help="zarr, wds (WebDataset tars) or parquet.")] = "zarr",
    shard_rows: Annotated[int, typer.Option(help="Samples per shard.")] = 1024,
    shard_of: Annotated[str | None, typer.Option(help="One part of the source, 0/8 to 7/8, or slurm.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of views, calibration and splitting.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be made.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    codec: Annotated[
        str | None,
        typer.Option(rich_help_panel="Codec", help="See latentprep codecs. Default: suits the source."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(rich_help_panel="Codec", help="Folder or hub id of the codec's weights.")
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(rich_help_panel="Codec", help="Dataset whose quantizer to use, so that both can be merged."),
    ] = None,
    reuse: Annotated[
        str | None,
        typer.Option(rich_help_panel="Codec", help="Dataset whose quantizer, and codes of same images, to take."),
    ] = None,
    splits: Annotated[
        str | None, typer.Option(rich_help_panel="Source", help="Comma-separated splits to encode. Default: all.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(rich_help_panel="Source", help="At most this many samples per split, over all classes."),
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(rich_help_panel="Source", help="Share of train held out where val is missing. Default: 0.1."),
    ] = None,
    max_error_fraction: Annotated[
        float, typer.Option(rich_help_panel="Source", help="Largest unreadable share of a split.")
    ] = 0.1,
    max_pixels: Annotated[
        int | None, typer.Option(rich_help_panel="Source", help="Largest image, in pixels. Default: 134217728.")
    ] = None,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    workers: Workers = None,
    device: Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(rich_help_panel="Machine", help="A process on each: all, 0,1 or cpu:4."),
    ] = None,
    workers_per_device: Annotated[
        int, typer.Option(rich_help_panel="Machine", help="Processes on each of --devices.")
    ] = 1,
    engine: Annotated[str, typer.Option(rich_help_panel="Machine", help="local, or ray for a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(rich_help_panel="Machine", help="The Ray cluster's: auto or HOST:PORT.")
    ] = None,
) -> None:
    """Encode a source of labelled images or sounds into a latent dataset.

    Run it again to resume. Exit code 3: done, but some samples could not be read (errors.jsonl).

    Example:

      latentprep encode photos/ --codec dct:luma=8,chroma=2 --size 256 --out shards
    """
    from latentprep.encoding.encode import encode as run

    opened = open_shown(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed, out=out,
    )  # fmt: skip
    result = run(
        opened, codec=codec, weights=weights, bits=bits, equal_bits=equal_bits, rate=rate, bytes=bytes, size=size,
        seconds=seconds, out=out, store=store, quantizer=quantizer, reuse=reuse, joint=joint, views=views,
        splits=words(splits), limit=limit,
        workers=workers, device=device, devices=devices, workers_per_device=workers_per_device, engine=engine,
        address=address, seed=seed, shard_rows=shard_rows, shard_of=shard_of, max_pixels=max_pixels,
        max_error_fraction=max_error_fraction, dry_run=dry_run, overwrite=overwrite, progress=console.progress_bar,
    )  # fmt: skip
    show_result(result, as_json)
    if result.note:
        console.warn(result.note)
    if result.invalid:
        console.warn(f"{text.plural(result.invalid, 'sample')} could not be read; see {result.out}/errors.jsonl")
        raise typer.Exit(3)


@app.command()
def codecs(
    size: Annotated[int, typer.Option(help="Pixels per side to show latent shapes for.")] = 224,
    bits: Annotated[float, typer.Option(help="Bits per code to show bytes for.")] = 4,
    as_json: Json = False,
) -> None:
    """List the codecs: options with defaults, latent shape, bytes of codes, and whether weights are here.

    Options go into the codec's name: dct:luma=20,chroma=5.

    Example:

      latentprep codecs --size 256 --bits 2
    """
    from latentprep.codecs.listing import list_codecs

    rows = list_codecs(size, bits)
    if as_json:
        console.print_json({"size": size, "bits": bits, "codecs": [row.to_json() for row in rows]})
        return
    columns = ["codec", "options", "latents", "bytes", "weights", "what"]
    table = []
    for row in rows:
        options = ",".join(name if default is None else f"{name}={default}" for name, default in row.options.items())
        latents = shape(row.latent) if row.latent else "-"
        table.append([row.name, options or "-", latents, str(row.code_bytes or "-"), row.weights, row.about])
    console.print_table(f"at {size}×{size} px, or 1 second, and {bits:g} bits, before compression", columns, table)


app.add_typer(cli_datasets.app)
app.add_typer(cli_pictures.app)


if __name__ == "__main__":
    main()
