"""The commands of `latentprep` that make pictures: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentprep import text
from latentprep.cli import console
from latentprep.cli.options import (
    Classes,
    Data,
    Dataset,
    DecoderOption,
    Device,
    ImageColumn,
    Index,
    Json,
    LabelColumn,
    Labels,
    Limit,
    OwnSource,
    Show,
    Split,
    Weights,
    indices,
    numbers,
    whole_numbers,
)
from latentprep.cli.showing import open_shown

if TYPE_CHECKING:
    from latentprep.sources.source import Source

app = typer.Typer()
linear = typer.Typer(
    help="Decode latents with one matrix: fit it, and look at its pictures.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(linear, name="linear-decoder")


@app.command()
def decode(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="Folder to write to: SPLIT/CLASS/ROW.png and decoded.jsonl.")],
    split: Split = None,
    index: Index = None,
    classes: Classes = None,
    limit: Annotated[int | None, typer.Option(help="At most this many samples, spread over the classes.")] = None,
    format: Annotated[
        str | None, typer.Option(help="png or jpeg, of sounds flac or wav. Default: png, flac.", show_default=False)
    ] = None,
    source: OwnSource = None,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    decoder: DecoderOption = "codec",
    weights: Weights = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Decode codes back to files and, with --source, measure how close images are to the originals.

    latentprep encode can read the folder as a source.

    Examples:

      latentprep decode shards --out decoded --limit 100 --source shapes

      latentprep decode shards --out decoded --split train --class ring --format jpeg
    """
    from latentprep.pictures.decode import decode as run

    opened = _source(source, data, labels, image_column, label_column)
    result = run(
        dataset, out=out, split=split, index=indices(index), classes=classes, limit=limit, format=format,
        decoder=decoder, source=opened, weights=weights, device=device, overwrite=overwrite,
        progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json(result.to_json())
        return
    if source is not None:
        every = {"all": result.all, **result.per_class}
        rows = [[name, str(q.images), _number(q.psnr, 2), _number(q.ssim, 4)] for name, q in every.items()]
        console.print_table(
            f"{result.split}, decoded by {result.decoder}", ["class", "images", "PSNR dB", "SSIM"], rows
        )
    console.print_facts("", {"wrote": f"{text.plural(result.all.images, 'image')} to {result.out}"})


@app.command()
def preview(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    split: Split = None,
    index: Index = None,
    classes: Classes = None,
    limit: Limit = 20,
    bits: Annotated[
        str | None, typer.Option(help="Bits to decode at, such as 4,2,1. Default: the stored ones, and 4, 2, 1.")
    ] = None,
    source: OwnSource = None,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    decoder: DecoderOption = "codec",
    weights: Weights = None,
    device: Device = "auto",
    show: Show = True,
    as_json: Json = False,
) -> None:
    """Draw a contact sheet: originals, decoded at the stored bits and at fewer, and the latents themselves.

    Fewer bits come from the codes: neither the images nor the codec's encoder is needed.

    Examples:

      latentprep preview shards

      latentprep preview shards --decoder linear --limit 64 --out latents.png
    """
    from latentprep.pictures.preview import preview as run

    opened = _source(source, data, labels, image_column, label_column)
    result = run(
        dataset, out=out, split=split, index=indices(index), classes=classes, limit=limit,
        bits=None if bits is None else whole_numbers("--bits", bits), source=opened, decoder=decoder,
        weights=weights, device=device, progress=console.progress_bar,
    )  # fmt: skip
    _show_sheet(result.out, result.samples, result.split, result.columns, show, as_json)


@app.command()
def rd(
    source: Annotated[
        str, typer.Argument(help="Folder, archives, Parquet files or a named dataset.", show_default=False)
    ],
    codecs: Annotated[
        str, typer.Option(help="Codecs, comma-separated, with options as in taesd:weights=DIR or dct:luma=20,chroma=5.")
    ] = "dct",
    bits: Annotated[str, typer.Option(help="Bits per code, such as 1-8 or 2,4.")] = "1-8",
    rates: Annotated[str, typer.Option(help="Bits per code on disk, as for encode --rate.")] = "0.25,0.5,1,2",
    qualities: Annotated[
        str, typer.Option(help="Qualities of JPEG, WebP and AVIF.")
    ] = "5,10,20,30,40,50,60,70,80,90,95",
    images: Annotated[int, typer.Option(help="Images of val, or of the first split, drawn with the seed.")] = 200,
    size: Annotated[int | None, typer.Option(help="Pixels per side. Default: suits source and codec.")] = None,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder to write to: rd.json, rd.png, rd.svg, side-by-side.png.")] = Path(
        "rd"
    ),
    as_json: Json = False,
) -> None:
    """Measure rate against distortion: codecs at each number of bits beside JPEG, WebP and AVIF.

    Bytes are those on disk: compressed as by encode, with labels, keys, metadata and manifest.

    Examples:

      latentprep rd shapes --images 100

      latentprep rd imagenette --codecs taesd,dct,dct:luma=20,chroma=5 --out rd-imagenette
    """
    from latentprep.pictures.rd import rd as run

    opened = _source(source, data, labels, image_column, label_column)
    assert opened is not None
    result = run(
        opened, codecs=codecs, bits=whole_numbers("--bits", bits), rates=numbers("--rates", rates),
        qualities=whole_numbers("--qualities", qualities), images=images, size=size, seed=seed, device=device,
        out=out, progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json(result.to_json())
        return
    rows = [
        [p.name, f"{p.setting:g}", f"{p.bytes:,.0f}", f"{p.bpp:.3f}", f"{result.size**2 * 3 / p.bytes:.1f}",
         _number(p.psnr, 2), _number(p.ssim, 4)]
        for p in result.points
    ]  # fmt: skip
    columns = ["codec", "setting", "bytes", "bits per pixel", "ratio", "PSNR dB", "SSIM"]
    console.print_table(f"{result.images} images of {source} {result.split} at {result.size} px", columns, rows)
    for name, reason in result.skipped.items():
        console.warn(f"{name} is left out: {reason}")
    console.print_facts("", {"wrote": f"rd.json, rd.png, rd.svg and side-by-side.png to {result.out}"})


@app.command("train-codec")
def train_codec(
    source: Annotated[
        str, typer.Argument(help="Folder, archives or a named dataset, as for encode.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: codec.json, codec.safetensors, report/.")],
    channels: Annotated[int, typer.Option(help="Latent channels.")] = 12,
    factor: Annotated[int, typer.Option(help="Pixels per side of a latent cell: 4, 8 or 16.")] = 8,
    bits: Annotated[float, typer.Option(help="Bits per latent value, after entropy coding.")] = 1.0,
    minutes: Annotated[float | None, typer.Option(help="How long to train, about. Default: 10.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of --minutes.")] = None,
    size: Annotated[int, typer.Option(help="Pixels per side of the images to be encoded.")] = 224,
    limit: Annotated[int | None, typer.Option(help="At most this many samples per split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, crops and noise.")] = 0,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the codec in --out and start over.")] = False,
    as_json: Json = False,
) -> None:
    """Train a small codec on the images of a source, with a decoder and an exact mirror.

    Run it again to resume. The report compares it with dct on held-out images.

    Examples:

      latentprep train-codec photos/ --out my-codec

      latentprep encode photos/ --codec learned:weights=my-codec --rate 1
    """
    from latentprep.learning.train import train_codec as run

    opened = _source(source, data, labels, image_column, label_column)
    assert opened is not None
    result = run(
        opened, out=out, channels=channels, factor=factor, bits=bits, minutes=minutes, steps=steps, size=size,
        limit=limit, seed=seed, device=device, overwrite=overwrite, progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json(result.to_json())
        return
    facts = {
        "trained": f"{text.plural(result.steps, 'step')} on {text.plural(result.images, 'image')}, "
        f"{text.duration(result.seconds)}",
        "held out": f"{_number(result.psnr, 2)} dB at {_number(result.bytes, 0)} bytes per image; "
        f"dct: {_number(result.dct_psnr, 2)} dB",
        "report": f"{result.out}/report/rd.png and side-by-side.png",
        "next": f"latentprep encode {source} --codec {result.codec} --rate {result.bits:g}",
    }
    console.print_facts(f"wrote {result.out}", facts)


@app.command()
def report(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    samples: Annotated[int, typer.Option(help="Samples to show, spread over the classes.")] = 10,
    source: OwnSource = None,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    decoder: DecoderOption = "codec",
    weights: Weights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write one HTML page: what was encoded and how, and what the codes keep.

    It needs no network and opens from disk, even on a phone. latenttrain report makes such a page about runs.

    Example:

      latentprep report shards --out report.html
    """
    from latentprep.pictures.report import report as write

    opened = _source(source, data, labels, image_column, label_column)
    result = write(
        dataset, out=out, samples=samples, decoder=decoder, source=opened,
        weights=weights, device=device, progress=console.progress_bar,
    )  # fmt: skip
    if as_json:
        console.print_json(result.to_json())
        return
    mean = sum(result.entropy) / len(result.entropy)
    console.print_facts(
        f"wrote {result.out}",
        {
            "page": f"{text.size(result.bytes)}, in one file",
            "codes": f"{result.bits_per_value:.2f} bits per value, entropy {mean:.2f}",
            "saturated": f"at most {max(result.saturation):.2%} of a channel's values",
        },
    )


@linear.command("fit")
def linear_fit(
    dataset: Dataset,
    source: Annotated[str, typer.Option(help="The source the dataset was made from.", show_default=False)],
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    samples: Annotated[int, typer.Option(help="Samples to fit to, and as many to evaluate on.")] = 1000,
    as_json: Json = False,
) -> None:
    """Fit two matrices from latents to pixels by least squares, and store them beside the manifest.

    One maps the C latents of a grid cell to the mean colour of its pixels, the other to all of its pixels.
    Colours are from -1 to 1.

    Example:

      latentprep linear-decoder fit shards --source shapes
    """
    from latentprep.pictures.linear_decoder import fit_linear_decoder

    opened = _source(source, data, labels, image_column, label_column)
    assert opened is not None
    result = fit_linear_decoder(dataset, opened, samples=samples, progress=console.progress_bar)
    if as_json:
        console.print_json(result.to_json())
        return
    rows = [[f"channel {c}", *(f"{v:+.3g}" for v in row)] for c, row in enumerate(result.small_matrix)]
    rows.append(["bias", *(f"{v:+.3g}" for v in result.small_bias)])
    rows.append(["R²", *(f"{v:.3f}" for v in result.small.r2)])
    rows.append([f"R², {result.factor}×{result.factor} pixels", *(f"{v:.3f}" for v in result.full.r2)])
    console.print_table(f"latents to colours, fitted to {result.fitted}", ["", "red", "green", "blue"], rows)
    names = {"all": (result.small.psnr, result.full.psnr)}
    names |= {n: (p, result.full.per_class[n]) for n, p in result.small.per_class.items() if p is not None}
    console.print_table(
        f"PSNR in dB, evaluated on {result.judged}",
        ["class", "shrunk image", "all pixels"],
        [[name, _number(small, 2), _number(full, 2)] for name, (small, full) in names.items()],
    )
    console.print_facts("", {"next": f"latentprep preview {dataset} --decoder linear"})


@linear.command("show")
def linear_show(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("linear-decoder.png"),
    split: Split = None,
    index: Index = None,
    classes: Classes = None,
    limit: Limit = 20,
    source: OwnSource = None,
    data: Data = None,
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    weights: Weights = None,
    device: Device = "auto",
    show: Show = True,
    as_json: Json = False,
) -> None:
    """Draw the linear decoder's pictures beside the codec's, and its pseudo-inverse's through the codec's decoder.

    Example:

      latentprep linear-decoder show shards --source shapes
    """
    from latentprep.pictures.preview import linear_preview

    opened = _source(source, data, labels, image_column, label_column)
    result = linear_preview(
        dataset, out=out, split=split, index=indices(index), classes=classes, limit=limit, source=opened,
        weights=weights, device=device,
    )  # fmt: skip
    _show_sheet(result.out, result.samples, result.split, result.columns, show, as_json)


def _show_sheet(out: str, samples: int, split: str, columns: tuple[str, ...], show: bool, as_json: bool) -> None:
    if as_json:
        console.print_json({"out": out, "split": split, "samples": samples, "columns": list(columns)})
        return
    if show:
        console.show_picture(Path(out))
    console.print_facts(f"wrote {out}", {"samples": f"{samples} of {split}", "columns": ", ".join(columns)})


def _source(
    spec: str | None, data: Path | None, labels: Path | None, image_column: str | None, label_column: str | None
) -> Source | None:
    """The source that was named; its splits and limits do not matter, for samples are found by their keys."""
    return open_shown(spec, data=data, labels=labels, image_column=image_column, label_column=label_column)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
