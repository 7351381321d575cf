"""The command line `latentprep`: parse, one library call, render. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, cli_pictures, console
from .errors import DatasetError, UsageError
from .options import Json

if TYPE_CHECKING:
    from .encoder import EncodeResult
    from .verifier import VerifyResult

app = typer.Typer(
    name="latentprep",
    help="Encode an image dataset once with a lossy codec and keep its low-bit codes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cli_pictures.app)

_MOST_SHOWN = 50  # shards, of those that verify finds wrong


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
        typer.Option(rich_help_panel="Machine", help="Images the codec takes at once. Default: 32, on CUDA 128."),
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in --out and start anew.")] = False,
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
    from .encoder import encode as run
    from .sources import open_source

    with console.byte_progress() as reading:
        opened = open_source(source, data=data, val_fraction=val_fraction, seed=seed, progress=reading)
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
    _finish(result, as_json)
    if result.invalid:
        console.warn(f"{result.invalid} samples could not be read; they are listed in {result.out}/errors.jsonl")
        raise typer.Exit(3)


@app.command()
def requantize(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to, with more bits.")],
    bits: Annotated[int, typer.Option(help="Bits a code, fewer than the dataset has.")],
    out: Annotated[str, typer.Option(help="Folder, s3://… or gs://… to write to; an unfinished one there is resumed.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in --out and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Make a dataset of fewer bits from another one's codes, without the images and without the codec.

    The quantizer's range is fitted anew.

    Example:

      latentprep requantize shards --bits 2 --out shards-2bit
    """
    from .requantizer import requantize as run

    _finish(run(dataset, bits=bits, out=out, overwrite=overwrite, progress=console.progress_bar), as_json)


@app.command()
def convert(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to.")],
    out: Annotated[
        str, typer.Argument(help="Folder, s3://… or gs://… to write to; an unfinished one there is resumed.")
    ],
    store: Annotated[str, typer.Option(help="zarr, or wds: tars that any WebDataset reader reads.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in OUT and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Store a dataset otherwise. Nothing is lost: there and back gives the same bytes. What is written is read back.

    Example:

      latentprep convert shards shards-tars --store wds
    """
    from .derived import convert as run

    _finish(run(dataset, out=out, store=store, overwrite=overwrite, progress=console.progress_bar), as_json)


@app.command()
def subset(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to.")],
    out: Annotated[str, typer.Option(help="Folder, s3://… or gs://… to write to; an unfinished one there is resumed.")],
    classes: Annotated[str | None, typer.Option(help="Comma-separated classes to keep. Default: all.")] = None,
    fraction: Annotated[float, typer.Option(help="Share of each class of each split to keep.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws which. A smaller share is part of a larger one.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in --out and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Make a dataset of some of another one's samples. Those that could not be read are left out.

    Example:

      latentprep subset shards --classes circle,star --fraction 0.5 --out shards-small
    """
    from .selection import subset as run

    names = [name.strip() for name in classes.split(",")] if classes else None
    result = run(
        dataset, out=out, classes=names, fraction=fraction, seed=seed, overwrite=overwrite,
        progress=console.progress_bar,
    )  # fmt: skip
    _finish(result, as_json)


@app.command()
def merge(
    datasets: Annotated[list[str], typer.Argument(help="Two folders or URLs or more that latentprep encode wrote to.")],
    out: Annotated[str, typer.Option(help="Folder, s3://… or gs://… to write to; an unfinished one there is resumed.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in --out and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Make one dataset of several that were encoded alike: other splits, or other samples of the same ones.

    Encode the first part, and the others with --quantizer FIRST. Parts whose codes mean different things are refused.

    Example:

      latentprep encode more/ --codec dct --quantizer shards --out more-shards

      latentprep merge shards more-shards --out all-shards
    """
    from .selection import merge as run

    _finish(run(datasets, out=out, overwrite=overwrite, progress=console.progress_bar), as_json)


@app.command()
def push(
    dataset: Annotated[str, typer.Argument(help="Folder that latentprep encode wrote to.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    as_json: Json = False,
) -> None:
    """Put a dataset on the Hugging Face hub, in one commit, with a card made from its manifest.

    Example:

      latentprep push shards me/shapes-dct
    """
    from .hub import push as run

    result = run(dataset, repository, private=private, progress=console.progress_bar)
    if as_json:
        console.print_json(result.to_json())
    else:
        facts = {"files": f"{result.files}, {console.size(result.bytes)}", "next": f"latenttrain fit {result.place}"}
        console.print_facts(f"wrote {result.url}", facts)


@app.command()
def latents(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to.")],
    source: Annotated[str, typer.Argument(help="The source that it was made of.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; splits that are there already are left alone.")],
    data: Annotated[Path | None, typer.Option(help="A copy of the named dataset that you already have.")] = None,
    val_fraction: Annotated[float | None, typer.Option(help="As it was for the encode.")] = None,
    limit: Annotated[int | None, typer.Option(help="As it was for the encode.")] = None,
    seed: Annotated[int, typer.Option(help="As it was for the encode.")] = 0,
    weights: Annotated[
        str | None, typer.Option(help="Folder of the autoencoder's weights, if they are not where they were.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images the codec takes at once.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that read and decode images.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write a dataset's float16 latents as .npy files: what latenttrain sweep compares its codes with.

    Example:

      latentprep latents shards imagenette --out shards-float
    """
    from .latents import write_latents as run
    from .sources import open_source

    with console.byte_progress() as reading:
        opened = open_source(source, data=data, val_fraction=val_fraction, seed=seed, progress=reading)
    opened = opened.take(limit) if limit is not None else opened
    folder = run(
        dataset, opened, out=out, weights=weights, device=device, batch_size=batch_size, workers=workers,
        progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json({"out": str(folder)})
    else:
        console.print_facts(f"wrote {folder}", {"next": f"latenttrain sweep {dataset} --latents {folder}"})


@app.command()
def verify(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to.")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every shard, not only some of each split.")] = False,
    source: Annotated[
        str | None, typer.Option(help="The source that it was made of: compare with it, and encode some images again.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode damaged and missing shards again, from --source.")
    ] = False,
    samples: Annotated[int, typer.Option(rich_help_panel="Source", help="Images to encode again and compare.")] = 64,
    data: Annotated[
        Path | None, typer.Option(rich_help_panel="Source", help="A copy of the named dataset that you already have.")
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(rich_help_panel="Source", help="As it was for the encode.")
    ] = None,
    limit: Annotated[int | None, typer.Option(rich_help_panel="Source", help="As it was for the encode.")] = None,
    seed: Annotated[
        int, typer.Option(rich_help_panel="Source", help="As it was for the encode; it also draws the samples.")
    ] = 0,
    weights: Annotated[
        str | None, typer.Option(help="Folder of the autoencoder's weights, if they are not where they were.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images the codec takes at once.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that read and decode images.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check every file of a dataset against its checksums, and its rows against what they must be.

    Exit code 0: all is well. 6: something is damaged or missing; each shard is named, and --repair makes it again.

    Examples:

      latentprep verify shards --deep

      latentprep verify shards --source photos/ --repair
    """
    from .verifier import verify as run

    opened = None
    if source is not None:
        from .sources import open_source

        with console.byte_progress() as reading:
            opened = open_source(source, data=data, val_fraction=val_fraction, seed=seed, progress=reading)
        opened = opened.take(limit) if limit is not None else opened
    found = run(
        dataset, deep=deep, source=opened, samples=samples, seed=seed, repair=repair, weights=weights, device=device,
        batch_size=batch_size, workers=workers, progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json(found.to_json())
    else:
        _show_verified(found)
    if not found.ok:
        raise typer.Exit(DatasetError.exit_code)


@app.command()
def info(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to.")],
    as_json: Json = False,
) -> None:
    """Say what a latent dataset is: codec, bits, samples a class, bytes an image, compression.

    Example:

      latentprep info shards
    """
    from .info import info as run

    found = run(dataset)
    if as_json:
        console.print_json(found.to_json())
        return
    options = ", ".join(f"{key} {value}" for key, value in found.codec.items() if key not in ("name", "weights_sha256"))
    console.print_facts(
        f"{found.path}" + ("" if found.complete else " (not complete: run the same encode again)"),
        {
            "source": found.source,
            "codec": found.codec["name"] + (f" ({options})" if options else ""),
            "latents": f"{_shape(found.latent)} of {found.size}×{found.size} px at {found.bits} bits"
            + (f", {found.views} views" if found.views > 1 else "")
            + (", exact mirror" if found.mirror else ""),
            "codes": f"{console.size(found.code_bytes)}, {found.bytes_per_image:.0f} bytes an image, "
            f"{found.bits_per_value:.2f} bits a value ({found.store}, {found.compression})",
            "smaller": f"{found.smaller_than_source:.1f} times than the images' files, "
            f"{found.smaller_than_pixels:.0f} times than their pixels",
            "saturated": " ".join(f"{share:.2%}" for share in found.saturation[:16])
            + (" …" if len(found.saturation) > 16 else "")
            + " of values, a channel",
        },
    )
    names = list(found.splits)
    rows = [
        [name, *(str(found.splits[split].samples[name]) for split in names)] for name in found.splits[names[0]].samples
    ]
    rows.append(["invalid", *(str(found.splits[split].invalid) for split in names)])
    rows.append(["all", *(f"{found.splits[split].committed} of {found.splits[split].rows}" for split in names)])
    console.print_table("", ["class", *names], rows)


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
    from .codecs.listing import list_codecs
    from .format.quantizer import check_bits

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
            [row.name, _shape(row.latent) if row.latent else "-", str(row.code_bytes or "-"), row.weights, row.about]
            for row in rows
        ],
    )


def _finish(result: EncodeResult, as_json: bool) -> None:
    if as_json:
        console.print_json(result.to_json())
    else:
        _show_result(result)


def _show_verified(found: VerifyResult) -> None:
    facts = {
        "checked": f"{found.checked} of {console.plural(found.shards, 'shard')}, {found.rows} rows, "
        f"{console.size(found.bytes)}; codes of {found.decoded} decoded"
    }
    if found.invalid:
        facts["invalid"] = f"{found.invalid} samples could not be read when they were encoded"
    if found.compared is not None:
        facts["compared"] = (
            f"{console.plural(found.compared.images, 'image')} encoded again: {found.compared.differing:.3%} of the "
            f"codes differ, an image by {found.compared.farthest:.3%} of the range at most"
        )
        if found.compared.unreadable:
            facts["unreadable"] = f"{len(found.compared.unreadable)} now, first {found.compared.unreadable[0]}"
    if found.repaired:
        same = sum(map(bool, found.repaired.values()))
        facts["repaired"] = ", ".join(found.repaired) + (f"; {same} to the recorded bytes" if same else "")
    if not found.ok:
        facts["next"] = "run the same command with --source SOURCE --repair: it encodes just these shards again"
    console.print_facts(f"{found.path} is " + ("whole" if found.ok else "not whole"), facts)
    if found.problems:
        rows = [["-" if p.split is None else f"{p.split} {p.index}", p.what] for p in found.problems[:_MOST_SHOWN]]
        if len(found.problems) > _MOST_SHOWN:
            rows.append(["…", f"and {len(found.problems) - _MOST_SHOWN} more; --json has them all"])
        console.print_table("", ["shard", "what is wrong"], rows)


def _show_result(result: EncodeResult) -> None:
    samples = sum(result.rows.values())
    verb = "would write" if result.dry_run else "wrote" if result.encoded else "already complete:"
    most = "at most " if result.dry_run else ""
    rows = ", ".join(f"{name} {count}" for name, count in result.rows.items())
    facts = {
        "rows": f"{rows} in {console.plural(result.shards, 'shard')}, {len(result.classes)} classes",
        "codec": f"{result.codec['name']}, {console.plural(result.bits, 'bit')}, "
        f"{result.size} px -> {_shape(result.latent)}" + (f", {result.views} views" if result.views > 1 else ""),
        "codes": f"{most}{console.size(result.code_bytes)}, {result.code_bytes / max(1, samples):.0f} bytes an image",
    }
    if result.encoded:
        rate = result.encoded / max(1e-9, result.seconds)
        facts["time"] = f"{console.duration(result.seconds)}, {rate:.0f} images/s"
    if not result.dry_run and {"train", "val"} <= set(result.rows):
        facts["next"] = f"latenttrain fit {result.out}"
    console.print_facts(f"{verb} {result.out}", facts)
    if result.profile and result.encoded:
        _show_profile(result.profile)


def _show_profile(profile: dict) -> None:
    rows = [[s["stage"], str(s["threads"]), f"{s['seconds']:.1f}", f"{s['busy']:.0%}"] for s in profile["stages"]]
    rows += [[name, "1", f"{spent:.1f}", f"{spent / profile['wall']:.0%}"] for name, spent in profile["waits"].items()]
    console.print_table(f"{profile['wall']:.1f} s", ["stage", "threads", "busy s", "busy"], rows)
    console.print_facts("", {"bottleneck": f"{profile['bottleneck']}: {profile['hint']}"})


def _shape(latent: tuple[int, int, int]) -> str:
    channels, height, width = latent
    return f"{height}×{width}×{channels}"


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
