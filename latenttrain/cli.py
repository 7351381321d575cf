"""The `latenttrain` command: parse, one library call, print the result. No heavy import at module level."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from latentprep.cli import console
from latentprep.errors import Interrupted, UsageError
from latenttrain import __version__
from latenttrain.recipe import FEW_BATCH, Recipe

app = typer.Typer(
    name="latenttrain",
    help="Train small networks on the codes of a latent dataset (made by latentprep encode).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 … or mps.")]
Dataset = Annotated[str, typer.Argument(metavar="DIR", help="Latent dataset: a folder or URL.", show_default=False)]
Run = Annotated[Path, typer.Argument(help="Run folder made by latenttrain fit.", show_default=False)]
Checkpoint = Annotated[str, typer.Option(help="best (the epoch with the highest val top-1) or last.")]
Arch = Annotated[str | None, typer.Option(help="The run's network, if it is your own module:function.")]


def main() -> None:
    console.run(app)


def _version(asked: bool) -> None:
    if asked:
        print(f"latenttrain {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def fit(
    dataset: Dataset,
    preset: Annotated[
        str | None,
        typer.Option(
            help="fast: 9 epochs. best: 40, larger.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[float | None, typer.Option(help="Factor on channels (default 1).", show_default=False)] = None,
    depth: Annotated[float | None, typer.Option(help="Factor on blocks (default 1).", show_default=False)] = None,
    arch: Annotated[str | None, typer.Option(help="Your own network, module:function.", show_default=False)] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this run's weights.", show_default=False)] = None,
    freeze: Annotated[str | None, typer.Option(help="Of them, keep stem or body.", show_default=False)] = None,
    recipe: Annotated[str, typer.Option(help="default, or talk: plain Adam.", show_default=False)] = "default",
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Passes over train (default {Recipe.epochs}; more for few samples).", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help=f"Samples per step ({Recipe.batch_size}; few: {FEW_BATCH}).", show_default=False),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate (default: by epochs and batch size).", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.", show_default=False)] = Recipe.seed,
    device: Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(help="Several: all, 0,1 … or cpu:N.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder (default: in runs/).", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    limit: Annotated[int | None, typer.Option(help="At most this many train samples.", show_default=False)] = None,
    holdout: Annotated[
        float, typer.Option(help="Evaluate on this share of train, not on val.", show_default=False)
    ] = 0.0,
    labels: Annotated[Path | None, typer.Option(help="File made by latenttrain label.", show_default=False)] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read train from disk each epoch, by default if memory is short.",
            show_default=False,
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the training step first.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network on the codes in DIR, evaluate it after each epoch, and print the result.

    The run folder holds config.json, metrics.jsonl, best.safetensors, last.safetensors and curve.png.

    Examples:

      latenttrain fit shards

      latenttrain fit shards --preset best --out runs/best
    """
    from latenttrain.ranks import this_rank
    from latenttrain.train import fit as train

    _find_here(arch)
    try:
        result = train(
            dataset,
            preset=preset,
            width=width,
            depth=depth,
            arch=arch,
            init=init,
            freeze=freeze,
            recipe=recipe,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            device=device,
            devices=devices,
            out=out,
            limit=limit,
            holdout=holdout,
            labels=labels,
            stream=stream,
            compile=compile,
            tensorboard=tensorboard,
            resume=resume,
            overwrite=overwrite,
            progress=console.progress_bar,
        )
    except KeyboardInterrupt:
        again = "--resume instead of --overwrite" if overwrite else "--resume"
        error = Interrupted("interrupted; whole epochs are kept", f"run it again with {again} to continue")
        raise this_rank().known(error) from None
    if not this_rank().is_main:
        return
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_table(f"latenttrain fit {dataset}", *result.table())
    console.print_facts("", {"run": result.run, "picture": result.curve})


@app.command()
def label(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders of the teachers.", show_default=False)
    ],
    dataset: Dataset,
    out: Annotated[
        Path | None, typer.Option(help="File to write (default RUN/labels.safetensors).", show_default=False)
    ] = None,
    arch: Arch = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Json = False,
) -> None:
    """Label each view of train in DIR with the probabilities that trained networks give, for latenttrain fit --labels.

    A small network learns more from them than from classes, at no cost per epoch. Those of several runs are averaged,
    each of its last epoch, since the best one was picked by val.

    Examples:

      latenttrain fit shards --width 2 --out runs/teacher

      latenttrain label runs/teacher shards

      latenttrain fit shards --labels runs/teacher
    """
    from latenttrain.labels import label as write

    _find_here(arch)
    result = write(runs, dataset, out=out, arch=arch, device=device, overwrite=overwrite, progress=console.progress_bar)
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_facts(
        f"latenttrain label {dataset}",
        {
            "labels": f"{result.samples:,} samples, {result.views} {'view' if result.views == 1 else 'views'}, "
            f"{result.bytes / (1 << 20):.2f} MiB",
            "right": f"{result.top1:.2%} of the samples, in view 0",
            "wrote": result.labels,
            "next": f"latenttrain fit {dataset} --labels {result.labels}",
        },
    )


@app.command()
def scale(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="Latent dataset; without it, latents of 28×28×4.", show_default=False),
    ] = None,
    phi: Annotated[str, typer.Option(help="Compound coefficients: 0..3, or 0,1,2.5.")] = "0..3",
    arch: Annotated[str, typer.Option(help="Network: latentnet or mobilenetv2.")] = "latentnet",
    as_json: Json = False,
) -> None:
    """List the networks of compound scaling (EfficientNet): factors, parameters and FLOPs at each phi.

    Width grows as 1.1^phi, depth as 1.2^phi, resolution as 1.15^phi, and FLOPs about as 2^phi. latentprep encode takes
    the resolution as --phi, latenttrain fit takes the other two as --width and --depth.

    Example:

      latenttrain scale --phi 0..3
    """
    from latenttrain.scaling import scale_table

    rows = scale_table(dataset, _numbers("--phi", phi), arch)
    if as_json:
        console.print_json({"arch": arch, "rows": rows})
        return
    columns = ["phi", "width", "depth", "resolution", "latents", "parameters", "FLOPs", "growth", "α·β²·γ²"]
    console.print_table(
        f"{arch}: FLOPs of one sample's forward pass; a multiply-add is 2",
        columns,
        [
            [
                f"{row['phi']:g}", *(f"{row[name]:.3g}" for name in ("width", "depth", "resolution")),
                "×".join(map(str, row["latent"][1:] + row["latent"][:1])), f"{row['parameters']:,}",
                f"{row['flops']:,}", f"{row['growth']:.2f}", f"{row['expected']:.2f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


@app.command()
def sweep(
    dataset: Annotated[
        str, typer.Argument(metavar="DIR", help="Latent dataset, usually of 8 bits.", show_default=False)
    ],
    bits: Annotated[str, typer.Option(help="Bits to try: 1..8, or 1,2,4.")] = "1..8",
    stems: Annotated[
        str, typer.Option(help="Stems to try, comma-separated: affine, embedding, bitplane, ordinal.")
    ] = "affine",
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, …")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over train (default {Recipe.epochs}).", show_default=False)
    ] = None,
    latents: Annotated[
        Path | None, typer.Option(help="Folder made by latentprep latents: float latents as the reference.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Points of accuracy that the recommended bits may lose.")] = 0.5,
    holdout: Annotated[float, typer.Option(help="Evaluate on this share of train, not val.")] = 0.0,
    limit: Annotated[int | None, typer.Option(help="At most this many train samples.")] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to (default sweeps/DIR).", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy that fewer bits cost: train at each number of bits with each stem, and plot the results.

    Run the same command again to continue. The folder holds the datasets of fewer bits, the runs, sweep.csv and
    sweep.png. Accuracies are those of the last epoch, so no epoch is chosen by its accuracy.

    Examples:

      latenttrain sweep shards8 --bits 1..8 --seeds 3

      latenttrain sweep shards8 --bits 2,4 --stems affine,embedding --holdout 0.15
    """
    from latenttrain.sweeps import sweep as run

    try:
        result = run(
            dataset,
            bits=_numbers("--bits", bits),
            stems=[name.strip() for name in stems.split(",")],
            seeds=seeds,
            epochs=epochs,
            latents=latents,
            margin=margin,
            holdout=holdout,
            limit=limit,
            device=device,
            out=out,
            progress=console.progress_bar,
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; whole epochs are kept", "run the same command again to continue") from None
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_table(f"latenttrain sweep {dataset}", *result.table())
    console.print_facts("", {"recommended": result.advice, "runs": result.csv, "picture": result.picture})


@app.command(name="eval")
def evaluate(
    run: Run,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Latent dataset with the run's codec, quantizer, size and classes.", show_default=False
        ),
    ],
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    checkpoint: Checkpoint = "best",
    arch: Arch = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate the network of RUN on a split of DIR: top-1, top-5, loss, and the top-1 of each class, hardest first.

    Example:

      latenttrain eval runs/shards-w1-d1-s0 shards
    """
    from latenttrain.evaluation import evaluate as measure

    _find_here(arch)
    result = measure(run, dataset, split=split, checkpoint=checkpoint, arch=arch, device=device)
    if as_json:
        console.print_json(result.to_json())
        return
    title = f"{run}, epoch {result.epoch}, on {result.samples:,} samples of {dataset} {split}"
    console.print_table(title, *result.table())


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders that latenttrain fit made.", show_default=False)
    ],
    dataset: Annotated[
        str | None, typer.Option(metavar="DIR", help="Latent dataset: show each run's mistakes on its val split, too.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("runs.html"),
    decoder: Annotated[
        str, typer.Option(help="codec, or linear: see [b]latentprep linear-decoder[/b]. Makes the pictures.")
    ] = "codec",
    weights: Annotated[str | None, typer.Option(help="Folder of the codec's weights, if it has moved.")] = None,
    arch: Arch = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare runs: a table, and one HTML page with their curves and accuracy against bits.

    With --dataset, each run's confusion matrix and worst mistakes as pictures, too.

    Examples:

      latenttrain report runs/first runs/second --out runs.html

      latenttrain report runs/first --dataset shards
    """
    from latenttrain.runs import BRIEF, runs_table
    from latenttrain.runs import report as compare

    _find_here(arch)
    summaries = compare(runs, dataset=dataset, out=out, decoder=decoder, weights=weights, arch=arch, device=device)
    if as_json:
        console.print_json({"out": str(out), "runs": [run.to_json() for run in summaries]})
        return
    columns, rows = runs_table(summaries)
    kept = [columns.index(name) for name in BRIEF]
    console.print_table("accuracies on val", list(BRIEF), [[row[i] for i in kept] for row in rows])
    console.print_facts("", {"wrote": str(out)})


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="File to write: model.onnx, or model.pt2 of torch.export.")],
    with_codec: Annotated[
        bool, typer.Option("--with-codec", help="Take pixels: the codec's encoder and the quantizer go into the file.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Folder of the codec's weights, if it has moved.")] = None,
    checkpoint: Checkpoint = "best",
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Write the network of RUN to one file that other runtimes read, and compare its results with torch's.

    Example:

      latenttrain export runs/shards-w1-d1-s0 --to model.onnx --with-codec
    """
    from latenttrain.exports import export as run_export

    _find_here(arch)
    result = run_export(run, to=to, with_codec=with_codec, weights=weights, checkpoint=checkpoint, arch=arch)
    if as_json:
        console.print_json(result.to_json())
        return
    shape = "×".join(map(str, result.shape))
    samples = "samples of the run's dataset" if result.real else "random samples"
    facts = {
        "takes": f"{result.input}, u8 [B×{shape}]; gives probabilities, f32 [B×{result.classes}]",
        "compared": f"with torch on {result.checked} {samples}: {result.same_top1} have the same likeliest class, "
        f"probabilities differ by at most {result.difference:.2g}",
        "next": f"latenttrain predict {result.to} photo.jpg" if result.to.endswith(".onnx") else "torch.export.load",
    }
    console.print_facts(f"wrote {result.to}", facts)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or model.onnx of latenttrain export.", show_default=False)],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE…", help="Image files.", show_default=False)],
    top: Annotated[int, typer.Option(help="Classes to list for each image.")] = 5,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the codec's weights, if it has moved."),
    ] = None,
    checkpoint: Checkpoint = "best",
    arch: Arch = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Classify image files with the network of RUN, through the codec and quantizer that it was trained with.

    If an image cannot be read, it is named, the others are classified, and the exit code is 3.

    Example:

      latenttrain predict runs/shards-w1-d1-s0 photo.jpg --top 3
    """
    from latenttrain.evaluation import predict as classify

    _find_here(arch)
    predictions = classify(run, images, top=top, weights=weights, checkpoint=checkpoint, arch=arch, device=device)
    if as_json:
        console.print_json({"run": str(run), "predictions": [prediction.to_json() for prediction in predictions]})
    else:
        rows = [
            [prediction.image if rank == 0 else "", name, f"{probability:.2%}"]
            for prediction in predictions
            for rank, (name, probability) in enumerate(prediction.classes)
        ]
        if rows:
            console.print_table("", ["image", "class", "probability"], rows)
    unread = [prediction for prediction in predictions if prediction.error]
    for prediction in unread:
        console.print_error(f"{prediction.image}: {prediction.error}")
    if unread:
        raise typer.Exit(3)


def _find_here(arch: str | None) -> None:
    """Let a module in the current folder be named, as ``python -m`` does; what is installed comes first."""
    if arch is not None and ":" in arch:
        sys.path.append(str(Path.cwd()))


def _numbers(option: str, text: str) -> list[float]:
    """``0..3`` or ``1-8`` (whole steps), or ``0,1,2.5`` -> the numbers. `UsageError` naming the option for all else."""
    try:
        if found := re.fullmatch(r"(\d+)(?:\.\.|-)(\d+)", text.strip()):
            first, last = map(int, found.groups())
            if not first <= last <= first + 1000:
                raise ValueError
            return [float(number) for number in range(first, last + 1)]
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} must be like 0..3 or 0,1,3, got {text!r}", f"use {option} 1..3") from None


if __name__ == "__main__":
    main()
