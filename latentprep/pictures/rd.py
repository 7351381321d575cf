"""`rd`: what codecs cost and keep, beside JPEG, WebP and AVIF: bits per pixel on disk against PSNR and SSIM."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from latentprep import __version__
from latentprep.codecs import Codec, codec_spec, open_codec, parse_codec, split_codecs
from latentprep.codecs.base import MAX_SIZE
from latentprep.codecs.transform import default_size
from latentprep.device import NOT_ON_DEVICE, Fitting, pick_device
from latentprep.encoding.calibration import CALIBRATION, calibration_rows, fit_to_bits, fit_to_rate
from latentprep.encoding.encode import joint_by_default
from latentprep.errors import SourceError, UsageError, check_number, check_whole, opt, system_fault
from latentprep.format.hashes import CONTENT_HASH, HASH_BYTES
from latentprep.format.manifest import Manifest, Plan, ShardId, train_split
from latentprep.format.quantizer import MOST_BITS, check_mean_bits
from latentprep.format.shard import Codes, encoded_shard
from latentprep.format.zarr_store import choose_compression, metadata_files
from latentprep.pictures.metrics import mean, psnr, ssim
from latentprep.pictures.plots import COLOURS, GREY, INK, draw, log_below
from latentprep.pictures.samples import shown_split
from latentprep.pictures.sheet import Column, draw_sheet, png
from latentprep.progress import Progress, ProgressFactory, silent
from latentprep.quantizing.scalar import code_statistics, dequantize, quantize
from latentprep.sources.images import BadImage, load_views
from latentprep.sources.kinds import SOUND
from latentprep.sources.source import Source, open_source
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of, several

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
RATES = (0.25, 0.5, 1.0, 2.0)
BY_RATE = "by rate"  # added to a codec's name
QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
# Pillow's formats, with what it is given besides the quality: each format's own tables and default effort.
FORMATS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 4}, "AVIF": {"speed": 6}}
_FEATURES = {"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}
_BATCH = 32
_SHOWN = 5
_TALK = (20, 160)  # the talk's picture: JPEG at 20:1 beside a VAE's codes at 160:1


@dataclass(frozen=True)
class Point:
    """One codec or format at one setting: bits, rate or quality.

    bytes: per image, with everything that the dataset or file holds for it; bpp: the same in bits per pixel; psnr,
    ssim: means over the images, None where they have none.
    """

    name: str
    setting: float
    bytes: float
    bpp: float
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True)
class RdResult:
    """What `rd` found. skipped: formats that were left out, and why. seconds: by codec or format."""

    out: str
    source: str
    split: str
    images: int
    size: int
    seed: int
    points: list[Point]
    skipped: dict[str, str]
    seconds: dict[str, float]

    def to_json(self) -> dict:
        return asdict(self)


def rd(
    source: str | Path | Source,
    *,
    codecs: str | Sequence[str] = "dct",
    bits: Sequence[float] = BITS,
    rates: Sequence[float] = RATES,
    qualities: Sequence[int] = QUALITIES,
    images: int = 200,
    size: int | None = None,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path = "rd",
    progress: ProgressFactory = silent,
) -> RdResult:
    """Measure codecs at each number of bits, and JPEG, WebP and AVIF at each quality, on the same images.

    images: how many of val (or the first split) are drawn with `seed`, as their canonical view. codecs: names, with
    options as ``taesd:weights=FOLDER`` or ``dct:luma=20,chroma=6``; several in a list, or with commas between them.
    A codec runs once; its latents are quantized to each number of bits, by a quantizer fitted to train as `encode` fits
    it, and become one shard with labels, keys, record, metadata and manifest, all of which count. rates: bits per code
    on disk, to be met as by ``encode --rate``, a curve of its own. OUT gets rd.json,
    rd.png, rd.svg and side-by-side.png.
    """
    opened = open_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column, seed=seed
    )  # fmt: skip
    if opened.media == SOUND:
        raise UsageError(f"rd compares codecs of images, and {opened.spec} holds sound", "give a source of images")
    for b in bits:
        check_mean_bits(b)
    for rate in rates:
        check_number("rates", rate, 0, MOST_BITS, above=True)
    for quality in qualities:
        check_whole("qualities", quality, 1, 100)
    check_whole("images", images, 1)
    check_whole("size", size, 1, MAX_SIZE, optional=True)
    check_whole("seed", seed, 0)
    specs = split_codecs(codecs) if isinstance(codecs, str) else several(codecs)
    for name, given in (("bits", bits), ("codecs", specs)):
        if not given:
            raise UsageError(f"{opt(name)} is empty", "give at least one")
    built = _built(list(dict.fromkeys(specs)), device, seed)
    for name, codec in built.items():
        if hasattr(codec, "tokens"):
            raise UsageError(f"rd compares quantizers, and codec '{name}' gives codes itself", "leave it out")
    size = size or default_size(opened, next(iter(built.values())))
    split = shown_split(opened.splits)
    drawn = sorted(np.random.default_rng(seed).permutation(opened.size(split))[:images].tolist())
    rows, pixels = _load(opened, split, drawn, size)
    learned = train_split(opened.splits)  # what quantizers are fitted to, as by encode
    drawn = calibration_rows(opened.size(learned), CALIBRATION, seed)
    calibration = pixels if learned == split else _load(opened, learned, drawn, size)[1]
    skipped = {name: "this build of Pillow lacks it" for name in FORMATS if not features.check(_FEATURES[name])}
    formats = [name for name in FORMATS if name not in skipped]
    points, seconds = [], {}
    shown = sorted({(2 * k + 1) * len(pixels) // (2 * _SHOWN) for k in range(_SHOWN)})  # in the side-by-side
    kept: dict[tuple[str, float], Tensor] = {}  # what those become
    steps = len(built) * (len(bits) + len(rates) + 1) + len(formats) * len(qualities)
    with progress("measuring", steps * len(pixels) + len(built) * len(calibration), "images", 0) as bar:
        for name, codec in built.items():
            start = time.monotonic()
            latents, fitted = (_encoded(codec, part, bar) for part in (pixels, calibration))
            for setting, met, cost, parts in _coded(
                opened, codec, split, rows, latents, fitted, size, bits, rates, seed, skipped
            ):
                found, pictures = _measure(parts, pixels, shown, bar)
                label = f"{name} {BY_RATE}" if met else name
                points.append(Point(label, setting, cost, 8 * cost / size**2, *found))
                kept[label, setting] = pictures
            seconds[name] = round(time.monotonic() - start, 2)
        for name in formats:
            start = time.monotonic()
            for quality in qualities:
                files = _files(name, pixels, quality)
                cost = sum(map(len, files)) / len(files)
                found, _ = _measure(_opened_files(files), pixels, (), bar)
                points.append(Point(name, quality, cost, 8 * cost / size**2, *found))
            seconds[name] = round(time.monotonic() - start, 2)
    root = path_of(out)
    result = RdResult(str(root), opened.spec, split, len(pixels), size, seed, points, skipped, seconds)
    try:
        write_atomic(root / "rd.json", (json.dumps(result.to_json(), indent=1) + "\n").encode())
        for kind in ("png", "svg"):
            draw_rd(points, list(kept), root / f"rd.{kind}")
        sheet = side_by_side(points, kept, pixels[shown], formats)
        write_atomic(root / "side-by-side.png", png(sheet))
    except OSError as error:
        raise system_fault(error) from error
    return result


def side_by_side(
    points: list[Point], kept: dict[tuple[str, float], Tensor], pixels: Tensor, formats: list[str]
) -> Image.Image:
    """The talk's picture: the original, JPEG at 20:1, the last codec nearest to 160:1, and at as many bytes as that
    the formats and other codecs. Of a format the best file of no more bytes is shown, or the smallest if none is."""
    whole = float(pixels[0].numel())
    last = list(dict.fromkeys(name for name, _ in kept))[-1]

    def near(name: str, size: float) -> Point:
        return min((p for p in points if p.name == name), key=lambda p: abs(math.log(p.bytes / size)))

    def column(title: str, cost: float, pictures: Tensor) -> Column:
        ratio = f"{whole / cost:.0f}:1" if cost < whole else ""
        return Column(f"{title} · {ratio} · {cost:,.0f} B", pictures.permute(0, 2, 3, 1).numpy())

    def coded(point: Point) -> Column:
        noun = "bit" if point.setting == 1 else "bits"
        return column(f"{point.name} {point.setting:g} {noun}", point.bytes, kept[point.name, point.setting])

    def filed(name: str, most: float) -> Column:
        files = [_file_of_at_most(name, picture, most) for picture in pixels]
        return column(name, sum(map(len, files)) / len(files), torch.cat(list(_opened_files(files))))

    target = near(last, whole / _TALK[1])
    columns = [Column("original", pixels.permute(0, 2, 3, 1).numpy())]
    if "JPEG" in formats:
        columns.append(filed("JPEG", whole / _TALK[0]))
    others = dict.fromkeys(name for name, _ in kept if name != last)
    columns += [coded(target), *(filed(name, target.bytes) for name in formats)]
    columns += [coded(near(name, target.bytes)) for name in others]
    title = f"JPEG at {_TALK[0]}:1, {last} near {_TALK[1]}:1, and at as many bytes as that, or their fewest, others"
    return draw_sheet(columns, [""] * len(pixels), title, tile=224, width=len(columns) * 240)


def draw_rd(points: list[Point], codecs: list[tuple[str, float]], path: Path) -> None:
    """Quality against bits per pixel: a coloured line per codec, a grey one per format, as a PNG or SVG."""

    names = list(dict.fromkeys(point.name for point in points))
    ours = {name for name, _ in codecs}
    dashes = iter(("-", "--", ":"))
    coded = list(dict.fromkeys(name.removesuffix(f" {BY_RATE}") for name in names if name in ours))
    colours = dict(zip(coded, COLOURS * len(coded), strict=False))
    looks: dict[str, dict[str, Any]] = {
        name: {
            "color": colours[name.removesuffix(f" {BY_RATE}")], "marker": "o", "markersize": 4,
            **({"linestyle": "--", "markerfacecolor": "white"} if name.endswith(f" {BY_RATE}") else {}),
        }
        if name in ours
        else {"color": GREY, "linestyle": next(dashes)}
        for name in names
    }  # fmt: skip
    with draw(path, 2) as (left, right):
        for axes, what, title in ((left, "psnr", "PSNR (dB)"), (right, "ssim", "SSIM")):
            for name in names:
                line = sorted((p for p in points if p.name == name), key=lambda p: p.bpp)
                axes.plot([p.bpp for p in line], [getattr(p, what) for p in line], label=name, **looks[name])
            log_below(axes)
            axes.set_title(title, loc="left", color=INK)
            axes.set_xlabel("bits per pixel on disk", color=INK)
        right.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))


def _coded(
    source: Source,
    codec: Codec,
    split: str,
    rows: list[int],
    latents: Tensor,
    calibration: Tensor,
    size: int,
    bits: Sequence[float],
    rates: Sequence[float],
    seed: int,
    skipped: dict[str, str],
) -> Iterator[tuple[float, bool, float, Iterator[Tensor]]]:
    """For each number of bits, and each rate: which one, whether it is a rate, bytes per image with all overhead, and
    the decoded batches, u8 [b,3,S,S]. skipped: gets the rates that are out of reach."""
    labels = np.array(source.labels(split), np.int32)[rows]
    keys = [source.keys(split)[row] for row in rows]
    channels, height, width = calibration.shape[1:]
    latent = (channels, height, width)
    decode = Fitting(codec.decode, NOT_ON_DEVICE)
    plan = Plan(
        codec=codec.config(), bits=MOST_BITS, joint=False, transform={"size": size, "views": 1, "seed": seed},
        source={"spec": source.spec, "sha256": source.fingerprint()}, classes=source.classes, latent=latent, flip=None,
        shard_rows=len(rows), chunk_rows=len(rows), splits={split: len(rows)}, content_hash=CONTENT_HASH,
        written_by=f"latentprep {__version__}",
    )  # fmt: skip
    for setting, met in (*((b, False) for b in bits), *((rate, True) for rate in rates)):
        if met:
            asked = replace(plan, rate=setting)
            try:
                quantizer, chain = fit_to_rate(codec, calibration, asked, setting)
            except UsageError as error:
                skipped[f"{codec.name} at {setting:g} bits on disk"] = error.message
                continue
        else:
            joint = joint_by_default(setting, channels, codec)
            asked = replace(plan, bits=int(setting), joint=True) if joint else replace(plan, mean_bits=float(setting))
            quantizer = fit_to_bits(calibration, asked)
            chain = choose_compression(quantize(calibration, quantizer).numpy()[:, None])
        codes = quantize(latents, quantizer)
        manifest = asked.manifest(quantizer, code_statistics(codes, quantizer), chain)
        hashes = np.random.default_rng(0).integers(0, 256, (len(codes), HASH_BYTES), np.uint8)
        cost = _stored_bytes(manifest, split, Codes(codes.numpy()[:, None], labels, keys, hashes))
        batches = (decode(dequantize(part, quantizer)).cpu() for part in codes.split(_BATCH))
        yield setting, met, cost / len(codes), batches


def _stored_bytes(manifest: Manifest, split: str, codes: Codes) -> int:
    """Of a dataset of just these samples in one shard: codes, labels, keys, hashes, record, metadata and manifest."""
    saturated = (0,) * manifest.latent[0]
    shard = encoded_shard(manifest, ShardId(split, 0), codes, source_bytes=0, saturated=saturated)
    rest = [shard.record.to_bytes(), manifest.to_bytes(), *metadata_files(manifest).values()]
    return sum(map(len, shard.files.values())) + sum(map(len, rest))


def _encoded(codec: Codec, pixels: Tensor, bar: Progress) -> Tensor:
    """u8 [n,3,S,S] -> f32 [n,C,h,w] on the host."""
    latents, encode = [], Fitting(codec.encode, NOT_ON_DEVICE)
    for part in pixels.split(_BATCH):
        latents.append(encode(part).cpu())
        bar.advance(len(part))
    return torch.cat(latents)


def _measure(
    batches: Iterator[Tensor], pixels: Tensor, shown: Sequence[int], bar: Progress
) -> tuple[tuple[float | None, float | None], Tensor]:
    """Mean PSNR and SSIM of decoded batches, in the order of `pixels`, and the pictures at the places `shown`."""
    near: tuple[list[float], list[float]] = ([], [])
    kept: list[Tensor] = []
    for batch in batches:
        start = len(near[0])
        kept += [batch[at - start] for at in shown if start <= at < start + len(batch)]
        originals = pixels[start : start + len(batch)]
        near[0].extend(psnr(batch, originals).tolist())
        near[1].extend(ssim(batch, originals).tolist())
        bar.advance(len(batch))
    return (mean(near[0]), mean(near[1])), torch.stack(kept) if kept else pixels[:0]


def _files(name: str, pixels: Tensor, quality: int) -> list[bytes]:
    with ThreadPoolExecutor(2) as pool:  # Pillow's encoders release the interpreter lock
        return list(pool.map(lambda picture: _file(name, picture, quality), pixels))


def _file(name: str, picture: Tensor, quality: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    image.save(buffer, name.upper(), quality=quality, **FORMATS[name])
    return buffer.getvalue()


def _file_of_at_most(name: str, picture: Tensor, most: float) -> bytes:
    """The file of the highest quality that is not larger, by bisection; the smallest where all are."""

    @cache
    def at(quality: int) -> bytes:
        return _file(name, picture, quality)

    low, high = 0, 95  # the best known to fit, and the most to try
    while low < high:
        middle = (low + high + 1) // 2
        if len(at(middle)) <= most:
            low = middle
        else:
            high = middle - 1
    return at(low)


def _opened_files(files: list[bytes]) -> Iterator[Tensor]:
    """Their pictures in batches, u8 [b,3,S,S]."""
    for start in range(0, len(files), _BATCH):
        pictures = []
        for data in files[start : start + _BATCH]:
            with Image.open(io.BytesIO(data)) as image:
                pictures.append(torch.from_numpy(np.array(image.convert("RGB"))))
        yield torch.stack(pictures).permute(0, 3, 1, 2)


def _load(source: Source, split: str, rows: list[int], size: int) -> tuple[list[int], Tensor]:
    """The rows that can be read, and their canonical views, u8 [n,3,S,S]. Raises `SourceError` if none can."""

    def one(row: int) -> np.ndarray | None:
        try:
            return load_views(source.read(split, row).data, size)[0]
        except BadImage:
            return None

    with ThreadPoolExecutor(2) as pool:
        found = [(row, view) for row, view in zip(rows, pool.map(one, rows), strict=True) if view is not None]
    if not found:
        raise SourceError(f"none of {len(rows)} images of {source.spec} {split} can be read", "check the source")
    views = torch.from_numpy(np.stack([view for _, view in found])).permute(0, 3, 1, 2).contiguous()
    return [row for row, _ in found], views


def _built(specs: list[str], device: str, seed: int) -> dict[str, Codec]:
    """The codecs by what pictures call them: the name without its weights, which are long, unless that is ambiguous."""
    parsed = [parse_codec(spec) for spec in specs]
    short = [codec_spec(name, {key: v for key, v in options.items() if key != "weights"}) for name, options in parsed]
    codecs = [open_codec(spec, device=pick_device(device), seed=seed) for spec in specs]
    names = [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]
    return dict(zip(names, codecs, strict=True))
