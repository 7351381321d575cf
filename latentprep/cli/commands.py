"""The command line `latentprep`: parse, one library call, render. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentprep import __version__
from latentprep.cli import console
from latentprep.cli import datasets as cli_datasets
from latentprep.cli import pictures as cli_pictures
from latentprep.cli.options import Joint, Json, Overwrite
from latentprep.cli.showing import open_shown, shape, show_result
from latentprep.errors import UsageError

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
    source: Annotated[
        str,
        typer.Argument(help="Folder, .tar/.tgz, WebDataset tars or a named dataset: shapes, imagenette, imagewoof."),
    ],
    codec: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Codec",
            help="Codec; see [b]latentprep codecs[/b]. Default: taesd if its weights are at hand, else dct.",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits a code, 1 to 8.")] = 4,
    size: Annotated[int | None, typer.Option(help="Pixels a side. Default: suits the source and the codec.")] = None,
    phi: Annotated[
        float, typer.Option(help="Compound scaling: 1.15^phi times the pixels a side; latenttrain fit has it too.")
    ] = 0.0,
    out: Annotated[
        str, typer.Option(help="Folder, s3://… or gs://… to write to; an unfinished encode there is resumed.")
    ] = "shards",
    store: Annotated[
        str, typer.Option(help="How shards are stored: zarr, or wds: tars that any WebDataset reader reads.")
    ] = "zarr",
    quantizer: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Codec", help="Take the quantizer of this dataset, so that latentprep merge takes both."
        ),
    ] = None,
    joint: Joint = None,
    views: Annotated[
        int, typer.Option(help="Renderings of a train sample: the canonical one, then random crops and mirrors.")
    ] = 1,
    splits: Annotated[
        str | None, typer.Option(rich_help_panel="Source", help="Comma-separated splits to encode. Default: all.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(rich_help_panel="Source", help="At most this many samples a split, spread over its classes."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(rich_help_panel="Source", help="A copy of the named dataset that you already have.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Source",
            help="Share of each class to hold out as val, where the source has no val. Default 0.1.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(rich_help_panel="Codec", help="Folder or hub id of the autoencoder's weights.")
    ] = None,
    posterior: Annotated[
        str | None, typer.Option(rich_help_panel="Codec", help="sd-vae, sdxl-vae: mean, or sample (seeded).")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Codec", help="Autoencoders: bfloat16 or float32. Default: what the device is fast at."
        ),
    ] = None,
    luma: Annotated[
        int | None, typer.Option(rich_help_panel="Codec", help="dct: coefficients kept of Y, 1 to 64. Default 10.")
    ] = None,
    chroma: Annotated[
        int | None,
        typer.Option(rich_help_panel="Codec", help="dct: coefficients kept of Cb and of Cr, 0 to 64. Default 3."),
    ] = None,
    factor: Annotated[
        int | None, typer.Option(rich_help_panel="Codec", help="resample: shrink by this factor. Default 4.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", rich_help_panel="Codec", help="name=value for a third-party codec; may be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Machine",
            help="Images the codec takes at once. Default: 32, with dct and resample 64, on CUDA 128.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(rich_help_panel="Machine", help="Threads that read and decode images. Default: one a core."),
    ] = None,
    device: Annotated[str, typer.Option(rich_help_panel="Machine", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of views, calibration and splitting.")] = 0,
    shard_rows: Annotated[int, typer.Option(help="Samples a shard: what a crash can cost at most.")] = 1024,
    max_pixels: Annotated[
        int | None,
        typer.Option(rich_help_panel="Source", help="Images with more pixels are not read. Default: 134217728."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel="Source", help="Stop at the first sample that cannot be read.")
    ] = False,
    max_error_fraction: Annotated[
        float, typer.Option(rich_help_panel="Source", help="Fail when more than this share of a split cannot be read.")
    ] = 0.1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be made.")] = False,
    overwrite: Overwrite = False,
    profile: Annotated[
        bool, typer.Option("--profile", rich_help_panel="Machine", help="Say where the time went, stage by stage.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode a source of labelled images into a latent dataset.

    Run the same command again to resume. Exit code 3: done, but some samples could not be read (errors.jsonl).

    Examples:

      latentprep encode shapes

      latentprep encode imagenette --codec taesd --bits 4 --out shards

      latentprep encode photos/ --codec dct --luma 8 --chroma 2 --size 256 --val-fraction 0.2
    """
    from latentprep.encoding.encode import encode as run

    opened = open_shown(source, data=data, val_fraction=val_fraction, seed=seed, out=out)
    options: dict[str, Any] = {"weights": weights, "posterior": posterior, "dtype": dtype}
    options |= {"luma": luma, "chroma": chroma, "factor": factor, **_third_party(option or [])}
    result = run(
        opened,
        codec=codec,
        bits=bits,
        size=size,
        phi=phi,
        out=out,
        store=store,
        quantizer=quantizer,
        joint=joint,
        views=views,
        splits=[name.strip() for name in splits.split(",")] if splits else None,
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        device=device,
        seed=seed,
        shard_rows=shard_rows,
        max_pixels=max_pixels,
        strict=strict,
        max_error_fraction=max_error_fraction,
        dry_run=dry_run,
        overwrite=overwrite,
        profile=profile,
        progress=console.progress_bar,
        **options,
    )
    show_result(result, as_json)
    if result.note:
        console.warn(result.note)
    if result.invalid:
        console.warn(f"{result.invalid} samples could not be read; they are listed in {result.out}/errors.jsonl")
        raise typer.Exit(3)


@app.command()
def codecs(
    size: Annotated[int, typer.Option(help="Pixels a side to show latent shapes for.")] = 224,
    bits: Annotated[int, typer.Option(help="Bits a code to show bytes for.")] = 4,
    as_json: Json = False,
) -> None:
    """List the codecs: latent shape, bytes of codes an image, and whether their weights are at hand.

    Example:

      latentprep codecs --size 256 --bits 2
    """
    from latentprep.codecs.listing import list_codecs
    from latentprep.format.quantizer import check_bits

    check_bits(bits)
    if not 1 <= size <= 1 << 14:
        raise UsageError(f"--size must be 1 to {1 << 14}, got {size}")
    rows = list_codecs(size, bits)
    if as_json:
        console.print_json({"size": size, "bits": bits, "codecs": [row.to_json() for row in rows]})
        return
    console.print_table(
        f"at {size}×{size} px and {bits} bits, before compression",
        ["codec", "latents", "bytes", "weights", "what"],
        [
            [row.name, shape(row.latent) if row.latent else "-", str(row.code_bytes or "-"), row.weights, row.about]
            for row in rows
        ],
    )


app.add_typer(cli_datasets.app)
app.add_typer(cli_pictures.app)


def _third_party(pairs: list[str]) -> dict[str, str | int | float]:
    """`name=value` options for codecs we do not know; numbers become numbers."""
    options: dict[str, str | int | float] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--option must be name=value, got {pair}")
        for kind in (int, float, str):
            try:
                options[name] = kind(value)
                break
            except ValueError:
                continue
    return options


if __name__ == "__main__":
    main()
