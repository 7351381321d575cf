"""The main job: plan the shards of a source, run those that are missing, and say what came of it.

    source -> plan -> [read + decode] -> [codec + quantize] -> [compress + commit] -> records

The three bracketed stages overlap (`latentprep.encoding.pipeline`). The manifest is decided here, once, before the
first shard: the quantizer and the compression from a calibration draw, everything else from what was asked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentprep import __version__
from latentprep.encoding.driver import commit_shards, start, stored_manifest, with_quantizer_of, writing
from latentprep.encoding.parts import parse_part, part_of, plan_of_part, rows_of_plan
from latentprep.encoding.profile import Profile
from latentprep.encoding.reuse import Reuse
from latentprep.encoding.source_files import check_unchanged, source_stats
from latentprep.errors import Interrupted, SourceError, UsageError, check_number, check_whole, check_word, opt
from latentprep.format.commit import write_errors
from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.hashes import CONTENT_HASH
from latentprep.format.manifest import (
    COLOURS,
    MAX_SHARD_CODES,
    MAX_SHARDS,
    SRGB,
    Manifest,
    Plan,
    ShardId,
    ShardRecord,
)
from latentprep.format.quantizer import MOST_BITS, check_mean_bits
from latentprep.format.shard import EncodedShard
from latentprep.format.stores import check_store, code_bytes
from latentprep.format.zarr_store import chunk_rows
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.media import medium_of
from latentprep.sources.source import Source, open_source
from latentprep.storage.places import Place, place, several

if TYPE_CHECKING:
    import torch

    from latentprep.codecs import Codec
    from latentprep.encoding.crew import Crew
    from latentprep.encoding.pipeline import Stages

SHARD_ROWS = 1024
MAX_JOINT_CHANNELS = 32  # the filter has 9 weights for each pair of channels, and the search takes as many steps


@dataclass(frozen=True)
class EncodeResult:
    """What `encode` did, or, with `dry_run`, would do.

    bits: per value, on average. rows: per split; invalid: samples that could not be read; encoded: samples encoded in
    this run; reused: those of them whose codes were taken from another dataset.
    joint: codes were chosen together, see `latentprep.quantizing.joint`. latent: (C, h, w) of a view.
    code_bytes: bytes of codes on disk (with `dry_run`: the most there will be).
    profile: where the time went, if asked for: `profile.Profile.to_json`.
    note: what the user should know of the source; empty as a rule.
    left_out: what there is in the source besides its rows, and how many: see `sources.Source`.
    engine: that made the shards: "local", "processes" or "ray". workers: how many processes.
    part: of the source, such as "3/8"; "0/1": all of it. seconds_each: the length of a sound; None for images.
    """

    out: str
    codec: dict
    bits: float
    joint: bool
    size: int
    views: int
    latent: tuple[int, int, int]
    classes: tuple[str, ...]
    rows: dict[str, int]
    shards: int
    code_bytes: int
    encoded: int = 0
    reused: int = 0
    invalid: int = 0
    seconds: float = 0.0
    dry_run: bool = False
    splits_invalid: dict[str, int] = field(default_factory=dict)
    profile: dict | None = None
    note: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    engine: str = "local"
    workers: int = 1
    part: str = "0/1"
    seconds_each: float | None = None

    def to_json(self) -> dict:
        return asdict(self)


def encode(
    source: str | Path | Source,
    *,
    codec: str | Codec | None = None,
    weights: str | None = None,
    bits: float | None = None,
    equal_bits: bool | None = None,
    rate: float | None = None,
    bytes: int | None = None,
    size: int | None = None,
    seconds: float | None = None,
    phi: float = 0.0,
    out: str | Path = "shards",
    store: str = "zarr",
    quantizer: str | Path | LatentDataset | None = None,
    reuse: str | Path | LatentDataset | None = None,
    joint: bool | None = None,
    views: int = 1,
    splits: list[str] | None = None,
    limit: int | None = None,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    devices: str | list[int] | None = None,
    engine: str = "local",
    address: str | None = None,
    workers_per_device: int = 1,
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
    shard_of: str | tuple[int, int] | None = None,
    max_pixels: int | None = None,
    colour: str = SRGB,
    strict: bool = False,
    max_error_fraction: float = 0.1,
    dry_run: bool = False,
    overwrite: bool = False,
    profile: bool = False,
    progress: ProgressFactory = silent,
) -> EncodeResult:
    """Encode `source` with `codec`, quantize, store in `out`, a folder or URL. Run again, it resumes.

    source: a folder, archive, tars, Parquet files or named dataset, of images or sounds, or an open one. data, labels,
    image_column, label_column, val_fraction: see `latentprep.sources.source.open_source`.
    codec: a name, with options as in ``dct:luma=20,chroma=5``, or a `Codec`. Default: ``mdct`` for sound; for images
    ``scatter``, or ``taesd`` if `weights` are given, or ``resample`` if `size` is at most 48. weights: folder or hub
    id of a codec's weights, short for the codec's option.
    progress: ``latentprep.cli.console.progress_bar`` shows what goes on.
    bits: 0.25 to 8 per value on average, by default 4. Each channel gets 0 to 8 of them by what they are worth
    (`latentprep.quantizing.allocation`), or, with `equal_bits` or `joint`, all the same, 1 to 8. Default: as
    `quantizer` has it, else by worth. In place of bits, what is to be met on disk: rate, in bits per code, or bytes, of
    a view's codes. One step, in terms of decoded pixels, then serves all channels, so that bits go where they count
    (`latentprep.quantizing.rate`): fewer bytes for the same picture. None of them is for a codec that gives tokens.
    size: pixels per side; default suits source and codec. seconds: of each sound, which is padded with silence or cut
    to its middle; by default as long as 95% of the sounds, at most 10. phi: makes `size` 1.15**phi times as large, the
    resolution of compound scaling (https://arxiv.org/abs/1905.11946), to the nearest that the codec takes.
    store: ``zarr``, ``wds`` for WebDataset tars, or ``parquet``, which the `datasets` library reads.
    quantizer: a dataset whose quantizer is taken instead of a fitted one, so that the two can be merged. joint: choose
    the codes of a sample together, for 1 to 4 dB more (see `latentprep.quantizing.joint`). Default: as `quantizer` has
    it, else up to the ``joint_bits`` of the codec, if it has any.
    reuse: a dataset of the same codec, bits and size whose quantizer is taken, and the codes of all images that it has
    too, byte for byte, by their content hashes: only new and changed ones go through the codec. (Further views are also
    drawn by seed and key, so they are taken only where both are the same.) The result has the files of an encode with
    that ``quantizer``; only the records' counts of saturated latents are shares of the old ones.
    colour: "srgb" converts embedded colour profiles, "stored" uses an image's numbers as they are.
    views: of a train sample, see `images.load_views` and `sound.load_views`; other splits have view 0 alone.
    shard_of: ``"3/8"``, ``(3, 8)``: encode the fourth of eight parts of the source alone, to a folder of its own.
    `merge` makes of all eight what one encode would have made. ``"slurm"`` takes both numbers from a Slurm array job.
    limit: at most that many samples a split, spread over it. batch_size: images the codec takes at once.
    devices: ``"all"`` CUDA devices, some of them as ``"0,1"`` or ``[0, 1]``, or ``"cpu:4"``: a process for each makes
    shards. engine: ``"ray"`` makes them in the Ray cluster at `address`, ``"auto"`` or ``"HOST:PORT"``; without one, on
    this machine. workers_per_device: processes on each device. workers: decoding threads, of each process.
    profile: measure where the time goes.

    Raises `UsageError`, `SourceError`, `CodecError`, `DatasetError`, `SystemFault` or `Interrupted`; whatever
    was committed by then stays, and the same call goes on from there.

    >>> made = latentprep.encode("shapes", codec="dct", bits=4, limit=60, out="shards")
    >>> made.rows, made.latent
    ({'train': 60, 'val': 60}, (16, 16, 16))
    """
    from latentprep.codecs.transform import default_codec, transform_for
    from latentprep.encoding.calibration import calibrate
    from latentprep.encoding.crew import crew_of
    from latentprep.encoding.pipeline import Stages, loads
    from latentprep.encoding.worker import check_portable
    from latentprep.quantizing.tokens import check_tokens, codebook_of
    from latentprep.sources.images import MAX_PIXELS

    check_rate(bits, rate, bytes, equal_bits, joint, store)
    check_whole("views", views, 1, 256)
    check_whole("shard_rows", shard_rows, 1, 1 << 24)
    check_whole("batch_size", batch_size, 1, 1 << 16, optional=True)
    check_whole("workers", workers, 1, 1024, optional=True)
    check_whole("max_pixels", max_pixels, 1, 1 << 40, optional=True)
    check_whole("seed", seed, 0, (1 << 63) - 1)
    check_number("max_error_fraction", max_error_fraction, 0, 1)
    check_word("colour", colour, COLOURS)
    check_store(store)
    crew = crew_of(engine, devices, device, address, workers_per_device)
    part = parse_part(shard_of)
    root = place(out)

    source = open_source(
        source, data=data, labels=labels, image_column=image_column, label_column=label_column,
        val_fraction=val_fraction, seed=seed, out=out,
    )  # fmt: skip
    if limit is not None:
        source = source.take(limit)
    names = _split_names(source, splits)
    coder = _open_codec(codec or default_codec(source, weights, size), crew.device, weights, seed)
    if crew.name != "local":
        check_portable(coder)
    transform = transform_for(
        source, coder, size=size, seconds=seconds, phi=phi, max_pixels=max_pixels, views=views, splits=names,
        seed=seed, colour=colour,
    )  # fmt: skip
    latent = coder.latent_shape(*medium_of(transform).extent)
    if quantizer is not None and reuse is not None:
        raise UsageError(
            f"{opt('reuse')} takes the quantizer of that dataset, so {opt('quantizer')} has no effect", "leave it out"
        )
    other = quantizer if reuse is None else reuse
    taken = None if other is None else open_dataset(other)
    if reuse is not None and taken is not None and taken.root.resolve() == root.resolve():
        raise UsageError(f"{opt('reuse')} is the dataset to write, {root}", f"choose another folder as {opt('out')}")
    if taken is not None:
        joint = taken.manifest.joint if joint is None else joint
        equal_bits = taken.manifest.mean_bits is None if equal_bits is None else equal_bits
    if (codebook := codebook_of(coder)) is not None:
        check_tokens(coder, codebook, bits=bits, rate=rate, bytes=bytes, joint=joint)
        bits, equal_bits, joint = codebook.bits, True, False
    if bytes is not None:
        rate = 8 * bytes / int(np.prod(latent))
    if rate is None:
        bits = 4 if bits is None else bits
    whole = make_plan(source, names, coder, bits, equal_bits, joint, transform, latent, shard_rows, store, rate)
    if taken is not None:
        whole = with_quantizer_of(taken, whole, "quantizer" if reuse is None else "reuse")
    reused_codes = None if taken is None or reuse is None else Reuse(taken, whole)
    asked = plan_of_part(whole, part)

    if dry_run:
        values = sum(n * int(np.prod(asked.row_shape(split))) for split, n in asked.splits.items())
        most = round(values * (asked.rate or asked.asked_bits) / 8)
        return encode_result(root, asked, [], code_bytes=most, dry_run=True, left_out=source.left_out)

    if sum(map(asked.shard_count, names)) > MAX_SHARDS:
        raise UsageError(f"{opt('shard_rows', shard_rows)} makes more than {MAX_SHARDS} shards", "use larger shards")
    if shard_rows * max(int(np.prod(asked.row_shape(split))) for split in names) > MAX_SHARD_CODES:
        raise UsageError(
            f"{opt('shard_rows', shard_rows)} makes shards of more than {MAX_SHARD_CODES} codes", "use fewer rows"
        )

    began = time.monotonic()
    stages = Stages(source, coder, batch_size, workers, max_pixels or MAX_PIXELS, strict, reuse=reused_codes)
    source = rows_of_plan(source, asked)
    with crew, writing(root):
        manifest = stored_manifest(root, asked, overwrite, source)
        if manifest is None:
            finished = whole if isinstance(whole, Manifest) else calibrate(stages, whole, progress)
            manifest = plan_of_part(finished, part)
        stages = replace(stages, source=source)
        dataset = start(root, manifest)
        records = {
            shard: record
            for shard, record in dataset.whole_records().items()
            # A sample that could not be read may be fixed by now.
            if not any(loads(stages, manifest, shard.split, entry["row"]) for entry in record.invalid)
        }
        note = check_unchanged(dataset, source, source_stats(source, names), records)
        if profile:
            stages = replace(stages, profile=Profile(stages.threads(), crew.workers))
        encoded, reused = _run(crew, stages, dataset, records, max_error_fraction, progress)
    found = stages.profile.to_json() if stages.profile else None
    facts = {"seconds": time.monotonic() - began, "profile": found, "note": note, "left_out": source.left_out}
    facts |= {"engine": crew.name, "workers": crew.workers, "reused": reused}
    return encode_result(root, manifest, list(records.values()), encoded=encoded, **facts)


def _run(
    crew: Crew,
    stages: Stages,
    dataset: LatentDataset,
    records: dict[ShardId, ShardRecord],
    max_fraction: float,
    progress: ProgressFactory,
) -> tuple[int, int]:
    """Encode and commit the shards that `records` lacks, and add theirs; returns how many samples that were, and how
    many of them were reused."""
    manifest, reused = dataset.manifest, 0
    jobs = [shard for shard in manifest.shards() if shard not in records]
    before = sum(record.rows for record in records.values())

    def counted(shards: Generator[EncodedShard, None, None]) -> Generator[EncodedShard, None, None]:
        nonlocal reused
        with contextlib.closing(shards):
            for shard in shards:
                reused += shard.reused
                yield shard

    def done(record: ShardRecord) -> None:
        records[record.shard] = record
        if record.invalid:
            write_errors(dataset.root, list(records.values()))
        _check_errors(records, manifest, max_fraction)

    try:
        _check_errors(records, manifest, max_fraction)
        with progress("encoding", sum(manifest.splits.values()), "images", before) as bar:
            commit_shards(dataset, counted(crew.engine(manifest, stages, bar).run(jobs)), done)
    except KeyboardInterrupt as error:
        total = sum(map(manifest.shard_count, manifest.splits))
        raise Interrupted(
            f"interrupted: {len(records)} of {total} shards are committed",
            "run the same command again to continue",
        ) from error
    write_errors(dataset.root, list(records.values()))
    return sum(record.rows for record in records.values()) - before, reused


def _check_errors(records: dict[ShardId, ShardRecord], manifest: Manifest, max_fraction: float) -> None:
    """`SourceError` if more than the allowed share of a split failed."""
    for split, rows in manifest.splits.items():
        invalid = [entry for record in records.values() if record.split == split for entry in record.invalid]
        if len(invalid) > max_fraction * rows:
            raise SourceError(
                f"{len(invalid)} of {rows} samples of split '{split}' cannot be read, more than {max_fraction:g}; "
                f"the first is {invalid[0]['key']}: {invalid[0]['reason']}",
                f"fix the images listed in errors.jsonl and run again, or raise {opt('max_error_fraction')}",
            )


def _split_names(source: Source, splits: list[str] | None) -> list[str]:
    names = list(source.splits) if not splits else list(dict.fromkeys(several(splits)))
    for name in names:
        if name not in source.splits:
            raise UsageError(f"{source.spec} has no split '{name}'", f"use {opt('splits', list(source.splits))}")
    return names


def _open_codec(codec: str | Codec, device: torch.device, weights: str | None, seed: int) -> Codec:
    from latentprep.codecs import open_codec

    return open_codec(codec, device=device, weights=weights, seed=seed)


def make_plan(
    source: Source,
    names: list[str],
    codec: Codec,
    bits: float | None,
    equal_bits: bool | None,
    joint: bool | None,
    transform: dict[str, Any],
    latent: tuple[int, int, int],
    shard_rows: int,
    store: str,
    rate: float | None = None,
) -> Plan:
    """What `encode` was asked for. names: of the splits. bits: None with a rate. joint: None is `joint_by_default`.
    transform: see `transform.transform_for`."""
    from latentprep.codecs import flip_signs

    views = transform["views"]
    most = max(views.values()) if isinstance(views, dict) else views
    channels, height, width = latent
    flip = flip_signs(codec, latent)
    if joint is None:
        joint = joint_by_default(bits, channels, codec)
    if bits is not None and not hasattr(codec, "tokens"):  # those of tokens are the codec's own
        bits = check_mean_bits(bits, equal_bits, joint, channels)
    allocated = bits is not None and not equal_bits and not joint
    return Plan(
        codec=codec.config(),
        bits=MOST_BITS if bits is None or allocated else int(bits),
        mean_bits=float(bits) if bits is not None and allocated else None,
        joint=check_joint(joint, channels),
        transform=transform,
        source={"spec": str(source.spec), "sha256": source.fingerprint()},
        classes=source.classes,
        latent=latent,
        flip=flip,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows(shard_rows, most * channels * height * width),
        splits={name: source.size(name) for name in names},
        store=store,
        rate=rate,
        content_hash=CONTENT_HASH,
        written_by=f"latentprep {__version__}",
    )


def check_rate(
    bits: float | None,
    rate: float | None,
    bytes: int | None,
    equal_bits: bool | None,
    joint: bool | None,
    store: str,
) -> None:
    """Raises `UsageError` for numbers out of range, or for more than one of bits, rate and bytes."""
    given = {"bits": bits, "rate": rate, "bytes": bytes}
    asked = [opt(name, value) for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} cannot be combined", "give one of them")
    if bits is not None:
        check_mean_bits(bits, equal_bits, joint)
    if rate is not None:
        check_number("rate", rate, 0, MOST_BITS, f"use {opt('rate', 1)} for one bit per code on disk", above=True)
    check_whole("bytes", bytes, 1, 1 << 32, f"use {opt('bytes', 1000)}", optional=True)
    if rate is None and bytes is None:
        return
    for name, value in (("joint", joint), ("equal_bits", equal_bits)):
        if value:
            raise UsageError(f"{asked[0]} cannot be combined with {opt(name, True)}", "leave one of them out")
    if store == "wds":
        raise UsageError(
            f"{asked[0]} cannot be met by {opt('store', store)}, whose codes are not entropy-coded",
            f"use {opt('store', 'zarr')}",
        )


def joint_by_default(bits: float | None, channels: int, codec: Codec | str) -> bool:
    """Whether codes of a codec, or the one of that name, are chosen jointly by default."""
    from latentprep.codecs import joint_bits

    return bits in range(1, joint_bits(codec) + 1) and channels <= MAX_JOINT_CHANNELS


def check_joint(joint: bool, channels: int) -> bool:
    """`joint` itself; `UsageError` if it is true and there are more channels than can be searched."""
    if joint and channels > MAX_JOINT_CHANNELS:
        raise UsageError(
            f"{opt('joint')} takes up to {MAX_JOINT_CHANNELS} channels, these latents have {channels}",
            f"use {opt('joint', False)}",
        )
    return joint


def encode_result(root: Place, plan: Plan, records: list[ShardRecord], **facts: Any) -> EncodeResult:
    """The result of a run that left `records` in the dataset at `root`."""
    invalid = {name: sum(len(r.invalid) for r in records if r.split == name) for name in plan.splits}
    facts = {"code_bytes": sum(code_bytes(plan, record) for record in records), **facts}
    return EncodeResult(
        out=str(root),
        codec=plan.codec,
        bits=plan.quantizer.mean_bits if isinstance(plan, Manifest) else plan.asked_bits,
        joint=plan.joint,
        size=plan.transform["size"],
        views=plan.most_views,
        latent=plan.latent,
        classes=plan.classes,
        rows=dict(plan.splits),
        shards=sum(plan.shard_count(name) for name in plan.splits),
        invalid=sum(invalid.values()),
        splits_invalid=invalid,
        part=str(part_of(plan)),
        seconds_each=medium_of(plan.transform).seconds,
        **facts,
    )
