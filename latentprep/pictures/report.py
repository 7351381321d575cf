"""`report`: one HTML page about a dataset: what it is, what its codes keep, and how good its runs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentprep.audit.duplicates import Duplicates
from latentprep.audit.info import DatasetInfo, info
from latentprep.errors import system_fault
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.manifest import INVALID_LABEL
from latentprep.pictures import page
from latentprep.pictures.decode import open_decoder
from latentprep.pictures.plots import BLUE, INK, drawn
from latentprep.pictures.preview import sample_columns
from latentprep.pictures.samples import Picked, pick
from latentprep.pictures.sheet import Column
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.source import Source, open_own_source
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of
from latentprep.text import plural, size

SAMPLES = 10
_SHARDS = 64  # shards that histograms are counted from, at most
_CHANNELS = 16  # histograms shown, at most
_ERRORS = _DUPLICATES = 50  # listed, at most
_TILE = 112  # pixels


@dataclass(frozen=True)
class ReportResult:
    """The page, its size in bytes, and for each channel: entropy in bits per value, share of saturated values.

    duplicates: all images that occur more than once; None if the dataset has no content hashes.
    """

    out: str
    bytes: int
    bits_per_value: float
    entropy: tuple[float, ...]
    saturation: tuple[float, ...]
    duplicates: Duplicates | None

    def to_json(self) -> dict:
        return asdict(self)


def report(
    dataset: str | Path | LatentDataset,
    *,
    out: str | Path = "report.html",
    samples: int = SAMPLES,
    decoder: str = "codec",
    source: str | Path | Source | None = None,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    progress: ProgressFactory = silent,
) -> ReportResult:
    """Write one HTML page about a dataset. It opens in any browser, without a network.

    samples: how many to show. Raises what `preview` raises.
    """
    opened = open_dataset(dataset)
    facts = info(opened)
    maker = open_decoder(opened, decoder, weights, device)
    picked = pick(opened, limit=samples)
    counts, shards = channel_counts(opened)
    entropies = tuple(map(entropy, counts))
    given = open_own_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column
    )  # fmt: skip
    columns = sample_columns(opened, picked, maker, source=given, progress=progress) if len(picked) else []
    sections = [
        page.section("What was encoded", page.facts(_facts(facts)), _classes(facts)),
        page.section("What the codes keep", *_samples(opened, picked, columns)),
        page.section("Latents", *_latents(opened, facts, counts, entropies, shards)),
        page.section("Duplicates", *_duplicates(facts)),
        page.section("Errors", *_errors(opened)),
    ]
    name = opened.root.resolve().name
    lead = (
        f"A latent dataset: {facts.source}, encoded by {facts.codec['name']} at {plural(facts.bits, 'bit')} per code."
    )
    document = page.page(f"Report on {name}", lead, sections)
    try:
        write_atomic(path_of(out), document)
    except OSError as error:
        raise system_fault(error) from error
    return ReportResult(str(out), len(document), facts.bits_per_value, entropies, facts.saturation, facts.duplicates)


def channel_counts(dataset: LatentDataset) -> tuple[np.ndarray, tuple[int, int]]:
    """How often each channel has each code, i64 [C,levels], in valid rows; and how many of how many shards were
    counted."""
    levels, channels = dataset.quantizer.levels, dataset.manifest.latent[0]
    every = [(split, record.index) for split in dataset.splits for record in dataset.records(split)]
    chosen = every[:: max(1, -(-len(every) // _SHARDS))]
    counts = np.zeros((channels, levels), np.int64)
    for split, index in chosen:
        shard = dataset.read_shard(split, index, keys=False)
        valid = shard.codes[shard.labels != INVALID_LABEL]
        for channel in range(channels):
            counts[channel] += np.bincount(valid[:, :, channel].ravel(), minlength=levels)
    return counts, (len(chosen), len(every))


def entropy(counts: np.ndarray) -> float:
    """Order-0 entropy in bits per value: i64 [levels] -> −Σ p log2 p; 0 if nothing was counted."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def picture_tiles(names: Sequence[str], columns: Sequence[Column], at: int, what: str) -> list[str]:
    """One sample's pictures, each under its column's name."""
    return [
        picture_tile(column.pictures[at], f"{what}: {name}", name, column.flac(at))
        for name, column in zip(names, columns, strict=True)
    ]


def picture_tile(picture: np.ndarray, alt: str, caption: str, flac: bytes = b"") -> str:
    """A picture u8 [h,w,3] on a page: a large one as a thumbnail, a small one in exact pixels. flac: its sound."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    exact = max(picture.shape[:2]) < _TILE
    if not exact:
        image.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return page.tile(image, alt, caption, exact, flac)


def _facts(found: DatasetInfo) -> dict[str, str]:
    channels, height, width = found.latent
    sample, raw, of = "image", "pixels", f"{found.size}×{found.size} px"
    if found.seconds_each is not None:
        sample, raw, of = "sound", "samples at 16 bits", f"{found.seconds_each:g} s"
    options = ", ".join(
        f"{key} {value}" for key, value in found.codec.items() if key not in ("name", "weights", "weights_sha256")
    )
    weights = f", weights {found.codec['weights_sha256'][:12]}…" if "weights_sha256" in found.codec else ""
    rows = ", ".join(f"{name} {split.committed:,} of {split.rows:,}" for name, split in found.splits.items())
    return {
        "source": found.source,
        "codec": found.codec["name"] + (f" ({options}{weights})" if options else ""),
        "latents": f"{height}×{width}×{channels} of {of}, {plural(found.bits, 'bit')} per code"
        + (", chosen jointly" if found.joint else "")
        + (f", {found.views} views" if found.views > 1 else ""),
        "samples": f"{rows}; {found.classes} classes",
        "codes": f"{size(found.code_bytes)}: {found.bytes_per_image:,.0f} bytes per {sample} ({found.store}, "
        f"{found.compression})",
        "compression": f"{found.smaller_than_source:.1f}× smaller than the {sample} files, "
        f"{found.smaller_than_pixels:.0f}× smaller than their {raw}",
    }


def _classes(found: DatasetInfo) -> str:
    names = list(found.splits)
    rows = [
        [name, *(f"{found.splits[split].samples[name]:,}" for split in names)]
        for name in found.splits[names[0]].samples
    ]
    rows.append(["could not be read", *(f"{found.splits[split].invalid:,}" for split in names)])
    return page.table("Samples of each class", ["class", *names], rows)


def _samples(dataset: LatentDataset, picked: Picked, columns: Sequence[Column]) -> list[str]:
    if not len(picked):
        return [page.paragraph("No sample could be read.")]
    every = []
    for at in np.argsort(picked.labels, kind="stable"):
        name = f"{dataset.classes[picked.labels[at]]}, row {picked.rows[at]} of {picked.split}"
        every.append(page.card(name, picture_tiles([column.title for column in columns], columns, at, name)))
    what = "Images" if columns[0].sounds is None else "Sounds"
    last = "" if columns[-1].title == "channels" else "; the last picture has the first three as red, green, blue"
    return [
        page.paragraph(
            f"{what} at fewer bits are derived from the stored codes. Channels are in false colours, from dark (low) "
            f"to bright (high){last}."
        ),
        page.cards(every),
    ]


def _latents(
    dataset: LatentDataset,
    found: DatasetInfo,
    counts: np.ndarray,
    entropies: Sequence[float],
    shards: tuple[int, int],
) -> list[str]:
    quantizer = dataset.quantizer
    mean = sum(entropies) / len(entropies)
    text = (
        f"A value takes {found.bits_per_value:.2f} bits on disk. The codes' order-0 entropy, averaged by channel, is "
        f"{mean:.2f} bits; without entropy coding, a value would take {found.bits:.3g}."
    )
    if shards[0] < shards[1]:
        text += f" Counted on {shards[0]} of {shards[1]} shards."
    figures, rows = [], []
    for channel, (lo, step) in enumerate(zip(quantizer.lo, quantizer.step, strict=True)):
        bits, levels = quantizer.channel_bits[channel], quantizer.channel_levels[channel]
        high, outside = lo + step * levels, found.saturation[channel]
        numbers = f"{lo:.4g}", f"{high:.4g}", f"{step:.3g}", f"{outside:.3%}", f"{entropies[channel]:.2f}"
        rows.append([f"{channel}", f"{bits}", *numbers])
        if channel < _CHANNELS:
            alt = (
                f"Histogram of channel {channel} over the quantizer's range {lo:.3g} to {high:.3g}: "
                f"entropy {entropies[channel]:.2f} bits, {outside:.2%} saturated"
            )
            figures.append(_histogram(counts[channel, :levels], lo, high, channel, alt, f"{outside:.2%} saturated"))
    more = len(rows) - len(figures)
    return [
        page.paragraph(text),
        page.charts(figures, small=True),
        *([page.paragraph(f"The table has {more} more channels.")] if more else []),
        page.table(
            "Quantizer range, share of values outside it, and entropy of each channel",
            ["channel", "bits", "low", "high", "step", "saturated", "entropy, bits"],
            rows,
        ),
    ]


def _histogram(counts: np.ndarray, lo: float, high: float, channel: int, alt: str, caption: str) -> str:
    with drawn(1, 2.2, 1.5) as ((axes,), picture):
        axes.stairs(counts / max(1, counts.sum()), np.linspace(lo, high, len(counts) + 1), fill=True, color=BLUE)
        axes.set_title(f"channel {channel}", loc="left", color=INK, fontsize=11)
        axes.set_xticks([lo, high], [f"{lo:.3g}", f"{high:.3g}"])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    return page.chart(picture, alt, caption)


def _duplicates(found: DatasetInfo) -> list[str]:
    duplicates = found.duplicates
    if duplicates is None:
        return [page.paragraph("Unknown: the dataset has no content hashes, because an earlier version made it.")]
    text = page.paragraph(
        f"Images that occur more than once, by the content hashes of their files: {duplicates.text()}."
    )
    count = len(duplicates.images)
    if not count:
        return [text]
    shown = f", the first {_DUPLICATES} of {count}" if count > _DUPLICATES else ""
    return [text, page.table(f"Duplicates{shown}", ["rows", "keys"], duplicates.lines(_DUPLICATES))]


def _errors(dataset: LatentDataset) -> list[str]:
    records = [record for split in dataset.splits for record in dataset.records(split)]
    lines = [[str(e["row"]), record.split, e["key"], e["reason"]] for record in records for e in record.invalid]
    if not lines:
        return [page.paragraph("Every sample could be read.")]
    shown = f", the first {_ERRORS} of {len(lines)}" if len(lines) > _ERRORS else ""
    title = f"Samples that could not be read{shown}"
    return [page.table(title, ["row", "split", "key", "reason"], lines[:_ERRORS])]
