"""The commands of `latentprep` about existing datasets: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentprep import text
from latentprep.cli import console
from latentprep.cli.options import (
    Data,
    Dataset,
    Device,
    EqualBits,
    ImageColumn,
    Joint,
    Json,
    LabelColumn,
    Labels,
    Out,
    Overwrite,
    SameLimit,
    SameSeed,
    SameValFraction,
    Weights,
    Workers,
    words,
)
from latentprep.cli.showing import channels, open_shown, shape, show_result, show_verified
from latentprep.errors import DatasetError

_DUPLICATES = 20  # images shown, at most

app = typer.Typer()


@app.command()
def requantize(
    dataset: Annotated[str, typer.Argument(help="Folder or URL that latentprep encode wrote to, with more bits.")],
    out: Out,
    bits: Annotated[
        float | None, typer.Option(help="Mean bits per value, fewer than the dataset has.", show_default=False)
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="Of tokens: stages to keep, the first ones.", show_default=False)
    ] = None,
    equal_bits: EqualBits = None,
    joint: Joint = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a dataset with fewer bits from a dataset's codes; needs neither the images nor the codec.

    The quantizer is fitted again. Of tokens, such as those of lyra, whole stages are left out.

    Example:

      latentprep requantize shards --bits 2 --out shards-2bit
      latentprep requantize words-lyra --stages 16 --out words-lyra16
    """
    from latentprep.derived.requantize import requantize as run

    result = run(
        dataset, bits=bits, stages=stages, out=out, equal_bits=equal_bits, joint=joint, overwrite=overwrite,
        progress=console.progress_bar,
    )  # fmt: skip
    show_result(result, as_json)


@app.command()
def convert(
    dataset: Dataset,
    out: Annotated[
        str, typer.Argument(help="Folder, s3://… or gs://… to write to; an unfinished one there is resumed.")
    ],
    store: Annotated[str, typer.Option(help="zarr, wds (WebDataset tars) or parquet.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset in OUT and start over.")] = False,
    as_json: Json = False,
) -> None:
    """Convert to another store, losslessly: converting back gives the same bytes. What is written is read back.

    Example:

      latentprep convert shards shards-tars --store wds
      latentprep convert shards shards-parquet --store parquet
    """
    from latentprep.derived.derive import convert as run

    show_result(run(dataset, out=out, store=store, overwrite=overwrite, progress=console.progress_bar), as_json)


@app.command()
def subset(
    dataset: Dataset,
    out: Out,
    classes: Annotated[str | None, typer.Option(help="Comma-separated classes to keep. Default: all.")] = None,
    fraction: Annotated[float, typer.Option(help="Share of each class of each split to keep.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw. A smaller share is part of a larger one.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a dataset from some of a dataset's samples. Samples that could not be read are left out.

    Example:

      latentprep subset shards --classes circle,star --fraction 0.5 --out shards-small
    """
    from latentprep.derived.selection import subset as run

    result = run(
        dataset, out=out, classes=words(classes), fraction=fraction, seed=seed, overwrite=overwrite,
        progress=console.progress_bar,
    )  # fmt: skip
    show_result(result, as_json)


@app.command()
def merge(
    datasets: Annotated[list[str], typer.Argument(help="Two or more folders or URLs that latentprep encode wrote to.")],
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge datasets with the same settings into one: other splits, or more samples of the same splits.

    Encode the first part, then the others with --quantizer FIRST. Parts whose codes mean different things are refused.

    Parts of one source (encode --shard-of) need no --quantizer. All of them, in any order, make what one encode makes.

    Examples:

      latentprep encode more/ --codec dct --quantizer shards --out more-shards

      latentprep merge shards more-shards --out all-shards

      latentprep merge part-* --out shards
    """
    from latentprep.derived.selection import merge as run

    show_result(run(datasets, out=out, overwrite=overwrite, progress=console.progress_bar), as_json)


@app.command()
def push(
    dataset: Annotated[str, typer.Argument(help="Folder that latentprep encode wrote to.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub; created if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a dataset to the Hugging Face hub, in one commit, with a card made from its manifest.

    Example:

      latentprep push shards me/shapes-dct
    """
    from latentprep.audit.hub import push as run

    result = run(dataset, repository, private=private, progress=console.progress_bar)
    if as_json:
        console.print_json(result.to_json())
    else:
        facts = {"files": f"{result.files}, {text.size(result.bytes)}", "next": f"latenttrain fit {result.place}"}
        console.print_facts(f"wrote {result.url}", facts)


@app.command()
def latents(
    dataset: Dataset,
    source: Annotated[str, typer.Argument(help="The source the dataset was made from.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; splits already there are left alone.")],
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    val_fraction: SameValFraction = None,
    limit: SameLimit = None,
    seed: SameSeed = 0,
    weights: Weights = None,
    workers: Workers = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a dataset's float16 latents as .npy files: what latenttrain sweep compares its codes with.

    Example:

      latentprep latents shards imagenette --out shards-float
    """
    from latentprep.audit.latents import write_latents as run

    opened = open_shown(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed,
    )  # fmt: skip
    folder = run(
        dataset, opened, out=out, limit=limit, weights=weights, device=device, workers=workers,
        progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json({"out": str(folder)})
    else:
        console.print_facts(f"wrote {folder}", {"next": f"latenttrain sweep {dataset} --latents {folder}"})


@app.command()
def verify(
    dataset: Dataset,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every shard, not only some of each split.")] = False,
    source: Annotated[
        str | None, typer.Option(help="The source the dataset was made from: encode some images again and compare.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode damaged and missing shards again from --source.")
    ] = False,
    samples: Annotated[int, typer.Option(rich_help_panel="Source", help="Images to encode again and compare.")] = 64,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    val_fraction: SameValFraction = None,
    limit: SameLimit = None,
    seed: SameSeed = 0,
    weights: Weights = None,
    workers: Workers = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every file of a dataset against its checksum, and its rows against the manifest.

    Exit code 0: intact. 6: something is damaged or missing; each bad shard is named, and --repair makes it again.

    Examples:

      latentprep verify shards --deep

      latentprep verify shards --source photos/ --repair
    """
    from latentprep.audit.verify import verify as run

    opened = open_shown(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed, limit=limit,
    )  # fmt: skip
    found = run(
        dataset, deep=deep, source=opened, samples=samples, seed=seed, repair=repair, weights=weights, device=device,
        workers=workers, progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json(found.to_json())
    else:
        show_verified(found)
    if not found.ok:
        raise typer.Exit(DatasetError.exit_code)


@app.command()
def info(
    dataset: Dataset,
    as_json: Json = False,
) -> None:
    """Describe a latent dataset: codec, bits, samples per class, bytes per image, compression, duplicates.

    Duplicates are images that a split holds twice, or two splits hold (leaks), by the content hashes of their files.

    Example:

      latentprep info shards
    """
    from latentprep.audit.info import info as run

    found = run(dataset)
    if as_json:
        console.print_json(found.to_json())
        return
    sample, of = "image", f"{found.size}×{found.size} px"
    if found.seconds_each is not None:
        sample, of = "sound", f"{found.seconds_each:g} s"
    made_by = ", ".join(f"{device} ({text.plural(n, 'shard')})" for device, n in found.devices.items())
    unnamed = ("name", "model", "weights_sha256")  # no options, but facts about the weights
    options = ",".join(f"{key}={value}" for key, value in found.codec.items() if key not in unnamed)
    console.print_facts(
        f"{found.path}" + ("" if found.complete else " (incomplete: run the same encode again)"),
        {
            "source": found.source + (f", part {found.part}" if found.part != "0/1" else ""),
            "codec": found.codec["name"] + (f":{options}" if options else ""),
            "latents": f"{shape(found.latent)} of {of} at {text.plural(found.bits, 'bit')}"
            + (", chosen jointly" if found.joint else "")
            + (f", {found.views} views" if found.views > 1 else "")
            + (", exact mirror" if found.mirror else ""),
            **({} if found.equal_bits else {"bits": channels(found.channel_bits) + ", per channel"}),
            "codes": f"{text.size(found.code_bytes)}, {found.bytes_per_image:.0f} bytes per {sample}, "
            f"{found.bits_per_value:.2f} bits per value ({found.store}, {found.compression})",
            "smaller": f"{found.smaller_than_source:.1f}× than the {sample} files, "
            f"{found.smaller_than_pixels:.0f}× than their {'pixels' if sample == 'image' else 'samples at 16 bits'}",
            "saturated": channels(f"{share:.2%}" for share in found.saturation) + " of values, per channel",
            "duplicates": "unknown: an earlier version made it, without content hashes"
            if found.duplicates is None
            else found.duplicates.text(),
            **({"made by": made_by} if made_by else {}),
            **{
                f"channel {poor.channel}": f"{poor.entropy:.2f} bits per code: {poor.cause}" for poor in found.poor[:16]
            },
        },
    )
    names = list(found.splits)
    rows = [
        [name, *(str(found.splits[split].samples[name]) for split in names)] for name in found.splits[names[0]].samples
    ]
    rows.append(["invalid", *(str(found.splits[split].invalid) for split in names)])
    rows.append(["all", *(f"{found.splits[split].committed} of {found.splits[split].rows}" for split in names)])
    console.print_table("", ["class", *names], rows)
    if found.duplicates is not None and found.duplicates.images:
        lines, count = found.duplicates.lines(_DUPLICATES), len(found.duplicates.images)
        if count > _DUPLICATES:
            lines.append(["…", f"and {count - _DUPLICATES} more; --json has them all"])
        console.print_table("images that occur more than once", ["rows", "keys"], lines)
