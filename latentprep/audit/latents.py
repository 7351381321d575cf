"""`write_latents`: a dataset's latents before quantization, in float16, in a folder of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from latentprep.audit.reencode import own_stages
from latentprep.errors import UsageError, opt, system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.fields import dump_json
from latentprep.format.latents import LATENTS, check_latents, described
from latentprep.format.quantizer import Codebook
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.source import Source, open_source
from latentprep.storage.atomic import locked, write_atomic
from latentprep.storage.places import local


def write_latents(
    dataset: str | Path | LatentDataset,
    source: str | Path | Source,
    *,
    out: str | Path,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    weights: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: ProgressFactory = silent,
) -> Path:
    """Write the float16 latents of view 0 of every sample of `dataset` to the folder `out`, and return it.

    source: the images that the dataset was made from; data, labels, image_column, label_column, val_fraction, limit,
    seed: the values used to encode it.
    Splits that are already in `out` are left alone. `latenttrain.sweep` compares codes with these latents; training
    needs only codes, which are a tenth of the size.

    Raises `UsageError` if `out` is the dataset, `DatasetError` if it holds another dataset's latents, `SourceError` if
    the source is not the dataset's, `CodecError` if the codec is not available, `SystemFault` if the disk is full.
    """
    from latentprep.encoding.pipeline import encoded_rows

    opened, root = open_dataset(dataset), local(out, opt("out"))
    if root.resolve() == opened.root.resolve():
        raise UsageError(f"{opt('out')} is the dataset itself, {root}", "choose another folder")
    manifest = opened.manifest
    if isinstance(manifest.quantizer, Codebook):
        raise UsageError(
            f"codec '{manifest.codec['name']}' gives codes itself: there are no latents before quantization",
            "compare with latentprep requantize --stages",
        )
    source = open_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed,
    )  # fmt: skip
    source = source if limit is None else source.take(limit)
    stages = own_stages(opened, source, weights, device, batch_size, workers)
    canonical = replace(manifest, transform={**manifest.transform, "views": 1})
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root), progress("latents", sum(manifest.splits.values()), "images", 0) as bar:
            check_latents(root, opened)
            write_atomic(root / LATENTS, dump_json(described(opened)))  # first, so that no array lies here without it
            for split, rows in manifest.splits.items():
                final, part = root / f"{split}.npy", root / f"{split}.npy.tmp"
                if final.exists():
                    bar.advance(rows)
                    continue
                shape = (rows, *manifest.latent)
                values = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
                for batch_rows, latents in encoded_rows(stages, canonical, split, rows):
                    values[batch_rows] = latents.numpy()
                    bar.advance(len(batch_rows))
                values.flush()
                part.replace(final)
    except OSError as error:
        raise system_fault(error) from error
    return root
