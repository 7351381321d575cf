"""The `latenttrain` command: parse, one library call, show what came back. No heavy import at module level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentprep.cli import console
from latentprep.errors import Interrupted
from latenttrain import __version__
from latenttrain.recipe import BASE_BATCH, BASE_EPOCHS, BASE_LR, LR_BY_EPOCHS, Recipe

app = typer.Typer(
    name="latenttrain",
    help="Train small networks on the codes of a latent dataset (made by latentprep encode).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 … or mps; auto takes the fastest that is here.")]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where copies of remote shards are kept. Default: in your cache folder.")
]
CacheSize = Annotated[float, typer.Option(help="GiB of them at most; those not used for longest go first. 0: none.")]
Run = Annotated[Path, typer.Argument(help="Run folder that latenttrain fit made.", show_default=False)]
Checkpoint = Annotated[str, typer.Option(help="best (the epoch with the highest val top-1) or last.")]


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
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Latent dataset, folder or URL, of splits train and val.", show_default=False
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help="fast: 9 epochs. best: --full-grid 2, 40 epochs, batches of 32. "
            "Each gives way to what is asked for itself.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[float, typer.Option(help="Factor on the network's channels.")] = 1.0,
    depth: Annotated[float, typer.Option(help="Factor on the network's blocks.")] = 1.0,
    full_grid: Annotated[
        int | None,
        typer.Option(help="3×3 convolutions on the whole grid, before it is halved (default 1).", show_default=False),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(help="default, or talk: Adam at 0.001, batches of 32, 20 epochs, no augmentation, no averaging."),
    ] = "default",
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the train split (default {Recipe.epochs}).", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Samples a step (default {Recipe.batch_size}).", show_default=False)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help=f"Peak learning rate; by default {BASE_LR:g} × √(batch size / {BASE_BATCH}) × "
            f"({BASE_EPOCHS} / epochs)^{LR_BY_EPOCHS:g}.",
            show_default=False,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help=f"Decay of filters and matrices (default {Recipe.weight_decay}).", show_default=False),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first weights, the order and the augmentation: same seed, same result.")
    ] = Recipe.seed,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder to make; by default runs/DIR-wWIDTH-dDEPTH-sSEED.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out after its last whole epoch, if there is one.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    limit: Annotated[
        int | None, typer.Option(help="Train on at most so many samples, spread evenly over the train split.")
    ] = None,
    arch: Annotated[str, typer.Option(help="Network: latentnet or mobilenetv2.")] = "latentnet",
    stem: Annotated[
        str, typer.Option(help="How the network takes codes in: affine, embedding, bitplane or ordinal.")
    ] = "affine",
    phi: Annotated[
        float,
        typer.Option(help="Compound scaling: width × 1.1^phi, depth × 1.2^phi; encode with the same --phi."),
    ] = 0.0,
    holdout: Annotated[
        float, typer.Option(help="Judge by this share of train in place of val: for choices, so that val stays unseen.")
    ] = 0.0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the train split from disk in every epoch.  [default: where it would fill half of free memory]",
            show_default=False,
        ),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(help="Shards mixed at a time with --stream; by default 256 MiB of codes.", show_default=False),
    ] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = 10.0,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Generate code for the training step first: for long runs. On CUDA it runs as CUDA graphs.",
        ),
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log the metrics for TensorBoard too, in the run folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a network on the codes in DIR, and print what it came to.

    A run folder holds config.json, metrics.jsonl, best.safetensors (the epoch with the highest val top-1),
    last.safetensors (all that --resume needs) and curve.png.

    Examples:

      latenttrain fit shards

      latenttrain fit shards --width 1.1 --depth 1.2 --epochs 40 --out runs/larger
    """
    from latentprep.format import open_dataset
    from latenttrain.tables import fit_table
    from latenttrain.train import fit as train

    try:
        result = train(
            open_dataset(dataset, cache_dir=cache_dir, cache_bytes=int(cache_size * 2**30)),
            preset=preset,
            width=width,
            depth=depth,
            full_grid=full_grid,
            recipe=recipe,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            device=device,
            out=out,
            arch=arch,
            stem=stem,
            limit=limit,
            phi=phi,
            holdout=holdout,
            stream=stream,
            buffer=buffer,
            compile=compile,
            tensorboard=tensorboard,
            resume=resume,
            overwrite=overwrite,
            progress=console.progress_bar,
        )
    except KeyboardInterrupt:
        again = "--resume in place of --overwrite" if overwrite else "--resume"
        raise Interrupted("interrupted; whole epochs are kept", f"the same command with {again} goes on") from None
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_table(f"latenttrain fit {dataset}", *fit_table(result))
    console.print_facts("", {"run": result.run, "picture": result.curve})


@app.command()
def scale(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="Latent dataset to count for; else 28×28×4 latents.", show_default=False),
    ] = None,
    phi: Annotated[str, typer.Option(help="Compound coefficients: 0..3, or 0,1,2.5.")] = "0..3",
    arch: Annotated[str, typer.Option(help="Network: latentnet or mobilenetv2.")] = "latentnet",
    as_json: Json = False,
) -> None:
    """List what compound scaling makes of a network: parameters and FLOPs at each phi.

    Width grows as 1.1^phi, depth as 1.2^phi, resolution as 1.15^phi, FLOPs by about 2^phi (EfficientNet).

    Example:

      latenttrain scale --phi 0..3
    """
    from latenttrain.scaling import numbers, scale_table

    rows = scale_table(dataset, numbers("--phi", phi), arch)
    if as_json:
        console.print_json({"arch": arch, "rows": rows})
        return
    columns = ["phi", "width", "depth", "resolution", "latents", "parameters", "FLOPs", "growth", "α·β²·γ²"]
    console.print_table(
        f"{arch}: FLOPs of a sample's forward pass, 2 a multiply-add",
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
        str, typer.Argument(metavar="DIR", help="Latent dataset, at 8 bits as a rule.", show_default=False)
    ],
    bits: Annotated[str, typer.Option(help="Bits to try: 1..8, or 1,2,4.")] = "1..8",
    stem: Annotated[str, typer.Option(help="Stems to try, comma-separated.")] = "affine",
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, …")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the train split (default {Recipe.epochs}).", show_default=False)
    ] = None,
    latents: Annotated[
        Path | None, typer.Option(help="Folder that latentprep latents made: the float latents as reference.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Recommend the fewest bits within so many points of it.")] = 0.5,
    holdout: Annotated[
        float, typer.Option(help="Judge by this share of train in place of val, so that val stays unseen.")
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Train on at most so many samples.")] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; by default sweeps/DIR.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what fewer bits cost: train at each number of bits and with each stem, and draw accuracy against bytes.

    The same command goes on where it stopped. The folder holds the datasets of fewer bits, the runs, sweep.csv and
    sweep.png. Accuracies are of the last epoch, so that nothing is chosen by them.

    Examples:

      latenttrain sweep shards8 --bits 1..8 --seeds 3

      latenttrain sweep shards8 --bits 2,4 --stem affine,embedding --holdout 0.15
    """
    from latenttrain.scaling import numbers
    from latenttrain.sweeping import sweep as run

    try:
        result = run(
            dataset,
            bits=numbers("--bits", bits),
            stems=[name.strip() for name in stem.split(",")],
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
        raise Interrupted("interrupted; whole epochs are kept", "the same command goes on") from None
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
            metavar="DIR", help="Latent dataset of the same codec, quantizer, size and classes.", show_default=False
        ),
    ],
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    cache_dir: CacheDir = None,
    cache_size: CacheSize = 10.0,
    as_json: Json = False,
) -> None:
    """Evaluate the network of RUN on a split of DIR: top-1, top-5, loss, and top-1 of each class, the hardest first.

    Example:

      latenttrain eval runs/shards-w1-d1-s0 shards
    """
    from latentprep.format import open_dataset
    from latenttrain.evaluation import evaluate as measure
    from latenttrain.tables import eval_table

    opened = open_dataset(dataset, cache_dir=cache_dir, cache_bytes=int(cache_size * 2**30))
    result = measure(run, opened, split=split, checkpoint=checkpoint, device=device)
    if as_json:
        console.print_json(result.to_json())
        return
    title = f"{run}, epoch {result.epoch}, on {result.samples:,} samples of {dataset} {split}"
    console.print_table(title, *eval_table(result))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders that latenttrain fit made.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("runs.html"),
    as_json: Json = False,
) -> None:
    """Compare runs: a table, and one HTML page with their curves and accuracy against bits.

    latentprep report DIR --run RUN shows their mistakes too.

    Example:

      latenttrain report runs/first runs/second --out runs.html
    """
    from latenttrain.comparison import BRIEF, runs_table
    from latenttrain.comparison import report as compare

    found = compare(runs, out=out)
    if as_json:
        console.print_json({"out": str(out), "runs": [run.to_json() for run in found]})
        return
    columns, rows = runs_table(found)
    kept = [columns.index(name) for name in BRIEF]
    console.print_table("accuracies on val", list(BRIEF), [[row[i] for i in kept] for row in rows])
    console.print_facts("", {"wrote": str(out)})


@app.command()
def predict(
    run: Run,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE…", help="Image files.", show_default=False)],
    top: Annotated[int, typer.Option(help="Classes to name for each image.")] = 5,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the codec's weights, if they are not where they were at encoding."),
    ] = None,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what the network of RUN sees in image files: pixels through the codec and quantizer it was trained with.

    An image that cannot be read is named, the others go on, and the exit code is 3.

    Example:

      latenttrain predict runs/shards-w1-d1-s0 photo.jpg --top 3
    """
    from latenttrain.evaluation import predict as classify

    predictions = classify(run, images, top=top, weights=weights, checkpoint=checkpoint, device=device)
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


if __name__ == "__main__":
    main()
