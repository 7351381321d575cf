"""`decode`: turn a dataset's codes back into files, and measure how close images are to the originals."""

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

from latentprep.codecs.linear import load_linear_decoder
from latentprep.errors import UsageError, check_word, opt, system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.pictures.metrics import mean, psnr, ssim
from latentprep.pictures.samples import Decoder, Originals, decoded, pick
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.kinds import IMAGES, SOUND
from latentprep.sources.sound import sound_file
from latentprep.sources.source import Source, open_own_source
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of

LISTING = "decoded.jsonl"
FORMATS = {IMAGES: ("png", "jpeg"), SOUND: ("flac", "wav")}  # the first is the default
DECODERS = ("codec", "linear")
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ClassQuality:
    """The quality of one class, or of all: how many images, and their mean PSNR (decibels) and SSIM. None if
    unknown, or if an image is exact, so that its PSNR is infinite."""

    images: int
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True)
class DecodeResult:
    """What `decode` wrote. all, per_class: how close the images are to the originals, if a source was given; unknown of
    sounds."""

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
    format: str | None = None,
    decoder: str = "codec",
    source: str | Path | Source | None = None,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: ProgressFactory = silent,
) -> DecodeResult:
    """Decode samples of a dataset to ``OUT/SPLIT/CLASS/ROW.png`` or ``.flac``: a folder that `encode` takes as source.

    split, index, classes, limit: which samples; see `samples.pick`. format: ``png`` or ``jpeg``, of sounds ``flac`` or
    ``wav``; the first of the two by default. decoder: ``codec``, or ``linear`` for the fitted
    linear decoder. ``decoded.jsonl`` lists each file's row, key, class and, of images with a `source`, PSNR and SSIM.
    Raises `UsageError` for samples that do not exist or a folder that is not empty (`overwrite` replaces files of the
    same name), `SourceError`, `DatasetError`, `CodecError`.

    >>> latentprep.decode("shards", out="decoded", limit=10).all.images
    10
    """
    opened = open_dataset(dataset)
    transform = opened.manifest.transform
    allowed = FORMATS[transform.get("media", IMAGES)]
    format = format or allowed[0]
    check_word("format", format, allowed)
    root = path_of(out)
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file", f"choose another folder as {opt('out')}")
    if root.is_dir() and any(root.iterdir()) and not overwrite:
        raise UsageError(
            f"{root} is not empty", f"choose another folder as {opt('out')}, or use {opt('overwrite', True)}"
        )
    picked = pick(opened, split, index=index, classes=classes, limit=limit)
    if not len(picked):
        raise UsageError(f"no valid sample of {picked.split} in {opened.root} matches", "choose other classes or rows")
    given = open_own_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column
    )  # fmt: skip
    originals = None if given is None else Originals(opened, given)
    lines: list[dict] = []
    try:
        maker = open_decoder(opened, decoder, weights, device)
        with progress("decoding", len(picked), "images", 0) as bar:
            for places, pictures in decoded(maker, picked.codes, opened.quantizer):
                part = picked.at(places)
                known = None if originals is None else originals.load(part)
                quality = {} if known is None or known.ndim == 2 else measured(pictures, known)
                for at, picture in enumerate(pictures):
                    name = opened.classes[part.labels[at]]
                    path = f"{picked.split}/{safe_name(name)}/{part.rows[at]:06d}.{format}"
                    write_atomic(root / path, sample_file(picture, format, transform.get("rate", 0)))
                    entry = {"file": path, "split": picked.split, "row": int(part.rows[at]), "key": part.keys[at]}
                    lines.append({**entry, "class": name, **{k: finite(v[at]) for k, v in quality.items()}})
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
    check_word("decoder", name, DECODERS)
    if name == "linear":
        return load_linear_decoder(dataset)
    from latentprep.codecs import codec_from_config
    from latentprep.device import pick_device

    return codec_from_config(dataset.manifest.codec, device=pick_device(device), weights=weights)


def measured(pictures: Tensor, originals: Tensor) -> dict[str, list[float]]:
    """u8 [n,3,H,W] twice -> ``psnr`` and ``ssim`` of each."""
    return {"psnr": psnr(pictures, originals).tolist(), "ssim": ssim(pictures, originals).tolist()}


def sample_file(sample: Tensor, format: str, rate: int) -> bytes:
    """An image, u8 [3,H,W], or a sound, f32 [T] at this rate -> the bytes of a file."""
    return image_file(sample, format) if sample.ndim == 3 else sound_file(sample.numpy(), rate, format)


def image_file(picture: Tensor, format: str = "png") -> bytes:
    """u8 [3,H,W] -> the bytes of an image file."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    options = {"quality": _JPEG_QUALITY, "subsampling": 0} if format == "jpeg" else {}
    image.save(buffer, format.upper(), **options)
    return buffer.getvalue()


def safe_name(name: str) -> str:
    """A class's name as the name of a folder, which must not lead out of the output folder."""
    return re.sub(r"[^\w .-]", "_", name).strip(" .") or "_"


def finite(value: float) -> float | None:
    """The value, or None if JSON cannot hold it."""
    return round(value, 6) if math.isfinite(value) else None


def _quality(lines: list[dict]) -> ClassQuality:
    values = {name: [line.get(name) for line in lines] for name in ("psnr", "ssim")}
    known = {name: None if None in own else mean(own) for name, own in values.items()}  # type: ignore[arg-type]
    return ClassQuality(len(lines), known["psnr"], known["ssim"])
