"""`decode`: a dataset's codes back to image files, and how near they come to the originals."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from latentprep.errors import UsageError, nearest, opt, system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.pictures.linear_decoder import load_linear_decoder
from latentprep.pictures.metrics import mean, psnr, ssim
from latentprep.pictures.samples import Decoder, Originals, decoded, pick
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.source import Source, open_own_source
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of

LISTING = "decoded.jsonl"
FORMATS = ("png", "jpeg")
DECODERS = ("codec", "linear")
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ClassQuality:
    """Of one class, or of all: images, and the mean over them of PSNR (decibels) and SSIM; None where not known, or
    where PSNR has no mean because a picture is exact."""

    images: int
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True)
class DecodeResult:
    """What `decode` wrote. all, per_class: how near to the originals, where a source was given."""

    out: str
    split: str
    decoder: str
    all: ClassQuality
    per_class: dict[str, ClassQuality]

    def to_json(self) -> dict:
        return asdict(self)


def decode(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path,
    split: str | None = None,
    index: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    format: str = "png",
    decoder: str = "codec",
    source: str | Path | Source | None = None,
    data: str | Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> DecodeResult:
    """Decode samples of a dataset to ``OUT/SPLIT/CLASS/ROW.png``, which `encode` takes for a source again.

    split, index, classes, limit: which; see `samples.pick`. decoder: ``codec``, or ``linear``, the one fitted before.
    ``decoded.jsonl`` says of each file its row, key, class and, with a `source`, PSNR and SSIM.
    Raises `UsageError` for a choice that is not there or a folder that is in use (`overwrite` replaces files of the
    same name), `SourceError`, `DatasetError`, `CodecError`.

    >>> latentprep.decode("shards", out="decoded", limit=10).all.images
    10
    """
    if format not in FORMATS:
        raise UsageError(f"{opt('format')} must be png or jpeg, got {format}", nearest(format, FORMATS))
    opened = open_dataset(dataset)
    root = path_of(out)
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file", f"choose another folder with {opt('out')}")
    if root.is_dir() and any(root.iterdir()) and not overwrite:
        raise UsageError(f"{root} is not empty", f"choose another folder with {opt('out')}, or give {opt('overwrite')}")
    picked = pick(opened, split, index=index, classes=classes, limit=limit)
    if not len(picked):
        raise UsageError(f"{opened.root} has no valid sample of that choice in {picked.split}", "choose others")
    given = open_own_source(source, data=data)
    images = None if given is None else Originals(opened, given)
    lines: list[dict] = []
    try:
        maker = open_decoder(opened, decoder, weights, device)
        with progress("decoding", len(picked), "images", 0) as bar:
            for places, pictures in decoded(maker, picked.codes, opened.quantizer):
                part = picked.at(places)
                near = {} if images is None else measured(pictures, images.load(part))
                for at, picture in enumerate(pictures):
                    name = opened.classes[part.labels[at]]
                    path = f"{picked.split}/{safe_name(name)}/{part.rows[at]:06d}.{format}"
                    write_atomic(root / path, image_file(picture, format))
                    entry = {"file": path, "split": picked.split, "row": int(part.rows[at]), "key": part.keys[at]}
                    lines.append({**entry, "class": name, **{k: finite(v[at]) for k, v in near.items()}})
                bar.advance(len(part))
        write_atomic(root / LISTING, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode())
    except OSError as error:
        raise system_fault(error) from error
    present = [name for label, name in enumerate(opened.classes) if (picked.labels == label).any()]
    return DecodeResult(
        str(root), picked.split, decoder, _quality(lines),
        {name: _quality([line for line in lines if line["class"] == name]) for name in present},
    )  # fmt: skip


def open_decoder(dataset: LatentDataset, name: str, weights: str | None = None, device: str = "auto") -> Decoder:
    """The dataset's codec, or the linear decoder that was fitted to it."""
    if name not in DECODERS:
        raise UsageError(f"{opt('decoder')} must be codec or linear, got {name}", nearest(name, DECODERS))
    if name == "linear":
        return load_linear_decoder(dataset)
    from latentprep.codecs import codec_from_config
    from latentprep.device import pick_device

    return codec_from_config(dataset.manifest.codec, device=pick_device(device), weights=weights)


def measured(pictures: Tensor, originals: Tensor) -> dict[str, list[float]]:
    """u8 [n,3,H,W] twice -> ``psnr`` and ``ssim`` of each."""
    return {"psnr": psnr(pictures, originals).tolist(), "ssim": ssim(pictures, originals).tolist()}


def image_file(picture: Tensor, format: str = "png") -> bytes:
    """u8 [3,H,W] -> the bytes of an image file."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    options = {"quality": _JPEG_QUALITY, "subsampling": 0} if format == "jpeg" else {}
    image.save(buffer, format.upper(), **options)
    return buffer.getvalue()


def safe_name(name: str) -> str:
    """A class's name as a folder's: what a dataset calls its classes must not lead out of the folder."""
    return re.sub(r"[^\w .-]", "_", name).strip(" .") or "_"


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return round(value, 6) if math.isfinite(value) else None


def _quality(lines: list[dict]) -> ClassQuality:
    found = {name: [line.get(name) for line in lines] for name in ("psnr", "ssim")}
    known = {name: None if None in values else mean(values) for name, values in found.items()}  # type: ignore[arg-type]
    return ClassQuality(len(lines), known["psnr"], known["ssim"])
