"""What a worker, a process on this machine or another, must know to make shards, and how it makes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from latentprep import __version__
from latentprep.codecs import Codec, codec_class, codec_from_config
from latentprep.encoding.pipeline import LocalEngine, Stages
from latentprep.encoding.profile import Profile
from latentprep.encoding.reuse import Reuse
from latentprep.errors import CodecError, LatentError, SourceError, SystemFault, opt
from latentprep.format.dataset import open_dataset
from latentprep.format.manifest import Manifest, ShardId
from latentprep.format.shard import EncodedShard
from latentprep.progress import Progress
from latentprep.sources.source import Source


class Made(NamedTuple):
    """A shard, and the seconds that its stages took, if they were to be measured."""

    shard: EncodedShard
    seconds: dict[str, float]


@dataclass(frozen=True)
class Work:
    """All that a worker must know. It can be pickled.

    codec: its `config`. device: that it runs on. threads: of torch. decoders: threads that read and decode.
    folder: that relative paths start from. version: of latentprep. probe: (split, row, SHA-256) of samples that every
    worker must be able to read. reuse: where the dataset is whose codes are reused. The other fields: see `Stages`.
    """

    manifest: Manifest
    source: Source
    codec: dict
    device: str
    threads: int
    decoders: int
    batch_size: int | None
    max_pixels: int
    strict: bool
    timed: bool
    folder: str
    version: str
    probe: tuple[tuple[str, int, str], ...]
    reuse: str | None

    def open(self, progress: Progress) -> Callable[[ShardId], Made]:
        """Get ready, in the worker; returns the function that makes a shard.

        Raises `SourceError` if a sample cannot be read here, `CodecError` if the codec or its weights are missing or
        others, `SystemFault` for another version of latentprep.
        """
        if self.version != __version__:
            raise SystemFault(
                f"latentprep {__version__} is installed, where {self.version} is needed", "install the same version"
            )
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        for split, row, sha256 in self.probe:
            self._check_readable(split, row, sha256)
        codec = codec_from_config(self.codec, device=self.device)
        profile = Profile(self.decoders) if self.timed else None
        reuse = None if self.reuse is None else Reuse(open_dataset(self.reuse), self.manifest)
        stages = Stages(
            self.source, codec, self.batch_size, self.decoders, self.max_pixels, self.strict, profile, reuse
        )  # fmt: skip

        def make(shard: ShardId) -> Made:
            (encoded,) = LocalEngine(self.manifest, stages, progress).run([shard])
            return Made(encoded, {} if profile is None else profile.take())

        return make

    def _check_readable(self, split: str, row: int, sha256: str) -> None:
        way_out = "the images must be where every worker can read them under the same path, such as a shared folder"
        try:
            sample = self.source.read(split, row)
        except (SourceError, OSError) as error:
            reason = error.message if isinstance(error, LatentError) else str(error.strerror or error).lower()
            raise SourceError(
                f"cannot read {self.source.keys(split)[row]} of {self.source.spec}: {reason}", way_out
            ) from None
        if hashlib.sha256(sample.data).hexdigest() != sha256:
            raise SourceError(f"{sample.key} of {self.source.spec} is another image than the driver reads", way_out)


def work_of(manifest: Manifest, stages: Stages, device: torch.device, threads: int) -> Work:
    """What a worker must know to do what `stages` do here. threads: that it has by default."""
    return Work(
        manifest, stages.source, stages.codec.config(), str(device), threads, stages.workers or threads,
        stages.batch_size, stages.max_pixels, stages.strict, stages.profile is not None, str(Path.cwd()), __version__,
        tuple(probe for split in manifest.splits for probe in _readable(stages.source, split)),
        None if stages.reuse is None else str(stages.reuse.dataset.root),
    )  # fmt: skip


def _readable(source: Source, split: str) -> list[tuple[str, int, str]]:
    """The first sample of a split that can be read here, of the first few, as `Work.probe` has it."""
    for row in range(min(8, source.size(split))):
        try:
            return [(split, row, hashlib.sha256(source.read(split, row).data).hexdigest())]
        except (SourceError, OSError):
            continue
    return []


def check_portable(codec: Codec) -> None:
    """`CodecError` if a worker could not build the codec again from its `config`."""
    way_out = (
        f"register its class as an entry point, see docs/extend.md, or encode in one process: leave out "
        f"{opt('devices')} and {opt('engine')}"
    )
    try:
        known = codec_class(codec.name)
    except CodecError:
        raise CodecError(f"workers cannot build codec '{codec.name}': no installed package has it", way_out) from None
    if type(codec) is not known:
        raise CodecError(
            f"workers cannot build codec '{codec.name}': by that name they find {known.__qualname__}, "
            f"not {type(codec).__qualname__}",
            way_out,
        )
