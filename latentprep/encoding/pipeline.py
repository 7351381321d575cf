"""The three stages of an encode, overlapped: threads decode, the caller's thread runs the codec, a thread compresses.

    decoded batches [b,V,…] -> codec f32 [bV,C,h,w] -> codes u8 [b,V,C,h,w] -> bytes of shards

A view is an image, u8 [S,S,3], or a sound, f32 [T]: `latentprep.sources.media`.

A batch never spans two shards, so a resumed run makes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentprep.codecs import Codec, encoder_of
from latentprep.device import NOT_ON_DEVICE, Fitting, device_name, on_device, queues, sent
from latentprep.encoding.profile import CODEC, DECODE, QUANTIZE, WAIT_DECODE, WAIT_WRITE, WRITE, Profile
from latentprep.encoding.reuse import Found, Reuse
from latentprep.errors import CodecError, SourceError, opt
from latentprep.format.hashes import HASH_BYTES, content_hash
from latentprep.format.manifest import INVALID_LABEL, Manifest, Plan, ShardId
from latentprep.format.quantizer import Quantizer
from latentprep.format.shard import Codes, EncodedShard, encoded_shard, joined_devices
from latentprep.progress import Progress, Silent
from latentprep.quantizing.scalar import quantize_counting
from latentprep.sources.images import MAX_PIXELS
from latentprep.sources.kinds import BadSample
from latentprep.sources.media import Medium, medium_of
from latentprep.sources.source import Source

_AHEAD = 3  # decoded batches that wait for the codec
_SHARDS_TO_COMPRESS = 2  # shards that wait for the compressor
_IMAGES, _LIGHT_IMAGES, _CUDA_IMAGES = 32, 64, 512  # images per batch of a codec, at most
_PIXELS, _CUDA_PIXELS = 32 * 512**2, 128 * 256**2  # the same in pixels: SD-VAE then needs about 15 GB on a GPU
_IMAGES_PER_TASK = 16  # images that one thread decodes in one task, at most: smaller tasks cost more overhead


@dataclass(frozen=True)
class Stages:
    """What the stages work with: a source, a codec, batch size, threads, limits, and codes that need not be made."""

    source: Source
    codec: Codec
    batch_size: int | None = None
    workers: int | None = None
    max_pixels: int = MAX_PIXELS
    strict: bool = False  # stop at the first sample that cannot be read
    profile: Profile | None = None
    reuse: Reuse | None = None

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Count the time spent inside for the stage, if a profile is requested."""
        return nullcontext() if self.profile is None else self.profile.timed(stage)

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self.codec, "device", "cpu"))

    @cached_property
    def encode(self) -> Fitting:
        """The codec's latents, f32 [B,C,h,w], or its tokens, u8 or i32 [B,S,h,w], in batches that fit in memory."""
        return Fitting(
            encoder_of(self.codec), f"encode at a smaller {opt('size')}, use a smaller codec, or {NOT_ON_DEVICE}"
        )

    def batch_samples(self, views: int, height: int, width: int) -> int:
        """How many samples of height×width pixels, with all their views, make about one batch for the codec."""
        if self.device.type == "cuda":
            images, pixels = _CUDA_IMAGES, _CUDA_PIXELS
        else:
            images, pixels = (_LIGHT_IMAGES if getattr(self.codec, "light", False) else _IMAGES), _PIXELS
        return max(1, (self.batch_size or min(images, pixels // (height * width))) // views)

    @contextmanager
    def cores_left_to_decoding(self) -> Iterator[None]:
        """Run a light codec on the CPU in one thread, so that the other cores are left to decoding."""
        before = torch.get_num_threads()
        if getattr(self.codec, "light", False) and self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def threads(self) -> int:
        return self.workers or min(32, cores())


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Batch:
    """Consecutive samples of one shard. rows: those for the codec, in order; reused: where the codes of the others are.

    images: [b,V,…], of `rows`, as `medium` decodes them, all 0 for samples in `invalid`; hashes: of all others' files.
    """

    shard: ShardId
    rows: list[int]
    medium: Medium
    images: np.ndarray
    invalid: dict[int, str] = field(default_factory=dict)  # row -> reason
    reused: dict[int, Found] = field(default_factory=dict)
    hashes: dict[int, bytes] = field(default_factory=dict)
    source_bytes: int = 0

    def __len__(self) -> int:
        return len(self.rows) + len(self.reused)


class _Loaded(NamedTuple):
    """A sample that could be read: its file's size and content hash, and where its codes are, if they need not be
    made."""

    size: int
    content: bytes
    found: Found | None


@dataclass
class _Coded:
    """A batch's results on their way back from the device; `wait` blocks until they have arrived.

    codes: u8 [b,V,C,h,w]; finite: bool [b]; saturated: i64 [C].
    """

    batch: _Batch
    codes: Tensor
    finite: Tensor
    saturated: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> _Coded:
        if self.done is not None:
            self.done.synchronize()
        return self


def encoded_rows(stages: Stages, manifest: Manifest, split: str, rows: int) -> Iterator[tuple[list[int], Tensor]]:
    """Every row of a split, in order, in batches: rows, and latents of view 0, f32 [b,C,h,w] on the host, 0 for
    unreadable samples."""
    step = stages.batch_samples(1, *medium_of(manifest.transform).extent)
    specs = [(ShardId(split, 0), list(range(i, min(i + step, rows)))) for i in range(0, rows, step)]
    with ThreadPoolExecutor(stages.threads()) as pool:
        for batch in decoded(stages, manifest, specs, pool):
            latents = latents_of(stages, batch).cpu().clone()
            latents[[place for place, row in enumerate(batch.rows) if row in batch.invalid]] = 0
            yield batch.rows, latents


def code_rows(
    stages: Stages, manifest: Manifest, split: str, rows: list[int]
) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
    """The given rows of a split, in batches: rows, codes u8 [b,V,C,h,w], and why some could not be read."""
    step = stages.batch_samples(manifest.views(split), *medium_of(manifest.transform).extent)
    specs = [(ShardId(split, 0), rows[i : i + step]) for i in range(0, len(rows), step)]
    with ThreadPoolExecutor(stages.threads()) as pool:
        for batch in decoded(stages, manifest, specs, pool):
            yield batch.rows, _code(stages, manifest.quantizer, batch).wait().codes.numpy(), batch.invalid


def loads(stages: Stages, manifest: Plan, split: str, row: int) -> bool:
    """Whether a sample can be read and decoded now."""
    try:
        medium_of(manifest.transform, stages.max_pixels).check(stages.source.read(split, row).data)
    except (BadSample, SourceError, OSError):
        return False
    return True


@dataclass(frozen=True)
class LocalEngine:
    """Makes shards in this process: threads decode, the caller's thread runs the codec, another thread compresses."""

    manifest: Manifest
    stages: Stages
    progress: Progress

    def run(self, jobs: Iterable[ShardId]) -> Generator[EncodedShard, None, None]:
        """Raises `CodecError` naming a sample whose latents are not finite and, if the stages are strict, `SourceError`
        for one that cannot be read."""
        jobs, manifest, stages = list(jobs), self.manifest, self.stages
        splits = {shard.split for shard in jobs}
        keys = {split: stages.source.keys(split) for split in splits}
        labels = {split: np.array(stages.source.labels(split), np.int32) for split in splits}
        with (
            ThreadPoolExecutor(stages.threads()) as readers,
            ThreadPoolExecutor(1) as compressor,
            stages.cores_left_to_decoding(),
        ):
            waiting: deque[Future[EncodedShard]] = deque()
            batches: list[_Coded] = []
            facts: dict[str, str] = {}
            failure: BaseException | None = None
            try:
                for coded in _coded(stages, manifest, jobs, readers):
                    shard = coded.batch.shard
                    check_finite(coded.batch, coded.finite, keys[shard.split])
                    self.progress.advance(len(coded.batch), shard=str(shard), **facts)
                    batches.append(coded)
                    if sum(len(c.batch) for c in batches) == manifest.rows_in_shard(shard.split, shard.index):
                        arguments = (stages, manifest, shard, batches, keys[shard.split], labels[shard.split])
                        waiting.append(compressor.submit(_encoded, *arguments))
                        batches = []
                    while waiting and (waiting[0].done() or len(waiting) > _SHARDS_TO_COMPRESS):
                        with stages.timed(WAIT_WRITE):
                            encoded = waiting.popleft().result()
                        size = sum(file.bytes for file in encoded.record.files.values())
                        facts = {"bytes_per_image": f"{size / encoded.record.rows:.0f}"}
                        yield encoded
                assert not batches, "a shard's batches must hold all its rows"
            except GeneratorExit:
                raise
            except BaseException as error:  # also Ctrl-C: finished shards are worth keeping
                failure = error
            finally:
                readers.shutdown(wait=False, cancel_futures=True)
            while waiting:
                yield waiting.popleft().result()
            if failure is not None:
                raise failure


def encode_shard(manifest: Manifest, source: Source, codec: Codec, shard: ShardId, **limits: Any) -> EncodedShard:
    """Make one shard: a pure function, whose arguments and result can be pickled. limits: see `Stages`."""
    (encoded,) = LocalEngine(manifest, Stages(source, codec, **limits), Silent()).run([shard])
    return encoded


def _coded(stages: Stages, manifest: Manifest, jobs: list[ShardId], pool: ThreadPoolExecutor) -> Iterator[_Coded]:
    """Run decoded batches through codec and quantizer. One stays in flight, so that a GPU never waits for the host."""
    specs = []
    for shard in jobs:
        step = stages.batch_samples(manifest.views(shard.split), *medium_of(manifest.transform).extent)
        start = shard.index * manifest.shard_rows
        stop = start + manifest.rows_in_shard(shard.split, shard.index)
        specs += [(shard, list(range(i, min(i + step, stop)))) for i in range(start, stop, step)]
    previous: _Coded | None = None
    for batch in decoded(stages, manifest, specs, pool):
        current = _code(stages, manifest.quantizer, batch)
        if previous is not None:
            yield previous.wait()
        previous = current
    if previous is not None:
        yield previous.wait()


def _code(stages: Stages, quantizer: Quantizer, batch: _Batch) -> _Coded:
    if not batch.rows:
        nothing = torch.zeros(0, dtype=torch.uint8)
        return _Coded(batch, nothing, nothing.bool(), torch.zeros(len(quantizer.lo), dtype=torch.int64), None)
    with on_device(stages.device):
        with stages.timed(CODEC):
            latents = latents_of(stages, batch)
            if stages.profile is not None and queues(latents.device):
                torch.cuda.synchronize(latents.device)
        views = batch.images.shape[1]
        with stages.timed(QUANTIZE):
            codes, outside, finite = quantize_counting(latents, quantizer)
            codes, finite = codes.unflatten(0, (-1, views)), finite.view(-1, views).all(dim=1)
        if not queues(latents.device):
            return _Coded(batch, codes.cpu(), finite.cpu(), outside.cpu(), None)
    with on_device(latents.device):  # a plug-in may use another device than it says
        codes, finite, outside = (_async_copy(tensor) for tensor in (codes, finite, outside))
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(latents.device))
    return _Coded(batch, codes, finite, outside, done)


def _async_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, complete once the current stream has reached this point."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def latents_of(stages: Stages, batch: _Batch) -> Tensor:
    """What the codec gives for the quantizer: f32 [bV,C,h,w], or tokens u8 or i32 [bV,S,h,w], on the codec's device."""
    with on_device(stages.device):
        images = sent(torch.from_numpy(batch.images), stages.device)
        return stages.encode(batch.medium.for_codec(images.flatten(0, 1)))


def decoded(
    stages: Stages, manifest: Plan, specs: list[tuple[ShardId, list[int]]], pool: ThreadPoolExecutor
) -> Iterator[_Batch]:
    """Batches of decoded samples in the order of `specs`. `_AHEAD` of them are prepared while one is used."""
    medium = medium_of(manifest.transform, stages.max_pixels)

    def load(batch: _Batch, place: int) -> _Loaded | str:
        """Read one sample, and decode it into the batch unless its codes are there already; or why that cannot be."""
        try:
            split, out = batch.shard.split, batch.images[place]
            sample = stages.source.read(split, batch.rows[place])
            content = content_hash(sample.data)
            found = None if stages.reuse is None else stages.reuse.find(split, sample.key, content)
            if found is None:
                medium.load(sample.data, len(out), sample.key, out)
            return _Loaded(len(sample.data), content, found)
        except (BadSample, SourceError, OSError) as error:
            batch.images[place] = 0  # part of it may have been written
            return str(getattr(error, "strerror", None) or error)

    def load_some(batch: _Batch, places: range) -> list[_Loaded | str]:
        with stages.timed(DECODE):
            return [load(batch, place) for place in places]

    def begin(spec: tuple[ShardId, list[int]]) -> tuple[_Batch, list[Future]]:
        shard, rows = spec
        shape = (len(rows), manifest.views(shard.split), *medium.shape)
        batch = _Batch(shard, rows, medium, np.zeros(shape, medium.dtype))
        some = min(_IMAGES_PER_TASK, -(-len(rows) // stages.threads()))
        places = [range(i, min(i + some, len(rows))) for i in range(0, len(rows), some)]
        return batch, [pool.submit(load_some, batch, some) for some in places]

    todo = iter(specs)
    pending = deque(begin(spec) for spec in islice(todo, _AHEAD))
    while pending:
        batch, tasks = pending.popleft()
        with stages.timed(WAIT_DECODE):
            outcomes = [one for task in tasks for one in task.result()]
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            if isinstance(outcome, str):
                batch.invalid[row] = outcome
                continue
            batch.source_bytes += outcome.size
            batch.hashes[row] = outcome.content
            if outcome.found is not None:
                batch.reused[row] = outcome.found
        if batch.reused:
            batch.images = batch.images[[place for place, row in enumerate(batch.rows) if row not in batch.reused]]
            batch.rows = [row for row in batch.rows if row not in batch.reused]
        if stages.strict and batch.invalid:
            row, why = next(iter(batch.invalid.items()))
            key = stages.source.keys(batch.shard.split)[row]
            raise SourceError(f"{key}: {why}", f"repair the file, or leave out {opt('strict')} to go on without it")
        pending.extend(begin(spec) for spec in islice(todo, 1))
        yield batch


def check_finite(batch: _Batch, finite: Tensor, keys: list[str]) -> None:
    """`CodecError` naming the first readable sample whose latents are not finite. finite: bool [b]."""
    for row, good in zip(batch.rows, finite.tolist(), strict=True):
        if not good and row not in batch.invalid:
            raise CodecError(
                f"the codec made NaN or infinite latents of {keys[row]}",
                "give the codec the option dtype=float32, or leave the image out",
            )


def _encoded(
    stages: Stages, manifest: Manifest, shard: ShardId, batches: list[_Coded], keys: list[str], labels: np.ndarray
) -> EncodedShard:
    """Compress one shard from all its batches, and from the codes that are reused. keys, labels: of the whole split."""
    with stages.timed(WRITE):
        start, count = shard.index * manifest.shard_rows, manifest.rows_in_shard(shard.split, shard.index)
        codes = np.zeros((count, *manifest.row_shape(shard.split)), manifest.quantizer.dtype)
        hashes = np.zeros((count, HASH_BYTES), np.uint8)
        reasons: dict[int, str] = {}
        reused: dict[int, Found] = {}
        saturated = np.zeros(manifest.latent[0], np.int64)
        for coded in batches:
            batch = coded.batch
            if batch.rows:
                codes[[row - start for row in batch.rows]] = coded.codes.numpy()
            for row, content in batch.hashes.items():
                hashes[row - start] = np.frombuffer(content, np.uint8)
            saturated += coded.saturated.numpy()
            reasons |= batch.invalid
            reused |= batch.reused
        devices = {device_name(stages.device)} if len(reused) < count else set()
        if reused:
            assert stages.reuse is not None
            taken = stages.reuse.take(shard.split, list(reused.values()))
            codes[[row - start for row in reused]] = taken.codes
            saturated += taken.saturated
            devices |= taken.devices
        bad = sorted(reasons)
        rows = Codes(codes, labels[start : start + count].copy(), keys[start : start + count], hashes)
        rows.codes[[row - start for row in bad]], rows.labels[[row - start for row in bad]] = 0, INVALID_LABEL
        return encoded_shard(
            manifest,
            shard,
            rows,
            source_bytes=sum(coded.batch.source_bytes for coded in batches),
            saturated=saturated.tolist(),
            invalid=[{"row": row, "key": keys[row], "reason": reasons[row]} for row in bad],
            device=joined_devices(devices),
            reused=len(reused),
        )
