"""Parts of a source, encoded apart without a word between them, each to a dataset of its own: `encode(shard_of=)`.

All parts calibrate on the same images, drawn from the whole source, and are cut between shards. So `merge` makes of
them, byte for byte, what one encode would have made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from latentprep.errors import UsageError, opt
from latentprep.format.manifest import MAX_SHARDS, Plan
from latentprep.sources.source import Source

SLURM = "slurm"
_P = TypeVar("_P", bound=Plan)


class Part(NamedTuple):
    """Part `number`, counted from 0, of `of`."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def text(self) -> str:
        return "all of its source" if self == WHOLE else f"part {self} of its source"


WHOLE = Part(0, 1)


def parse_part(shard_of: str | tuple[int, int] | None) -> Part:
    """``"3/8"`` or ``(3, 8)``: the fourth of eight parts; ``"slurm"``: this task's of its Slurm array. None is `WHOLE`.

    Raises `UsageError` for anything else, and for an array whose tasks are not numbered from 0 or 1 without gaps.
    """
    if shard_of is None:
        return WHOLE
    if shard_of == SLURM:
        return _task_of_array()
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard_of, re.ASCII) if isinstance(shard_of, str) else None
    given = tuple(map(int, numbers.groups())) if numbers else shard_of
    if not isinstance(given, tuple) or len(given) != 2 or not all(type(number) is int for number in given):
        raise UsageError(f"{opt('shard_of')} must be I/N or {SLURM}, got {shard_of!s:.60}", "the first of eight is 0/8")
    index, of = given
    if not 1 <= of <= MAX_SHARDS:
        raise UsageError(f"{opt('shard_of')} takes from 1 to {MAX_SHARDS} parts, got {of}")
    if not 0 <= index < of:
        raise UsageError(
            f"{opt('shard_of')} counts parts from 0: there is no {index}/{of}", f"use 0/{of} to {of - 1}/{of}"
        )
    return Part(index, of)


def _task_of_array() -> Part:
    names = [f"SLURM_ARRAY_TASK_{word}" for word in ("ID", "MIN", "MAX", "COUNT")]
    values = [os.environ.get(name, "") for name in names]
    for name, value in zip(names, values, strict=True):
        if not (value.isascii() and value.isdigit()):
            what = f"is {value!r:.60}" if value else "is not set"
            raise UsageError(f"{opt('shard_of', SLURM)}: {name} {what}", "start it as a Slurm array job, or give I/N")
    number, least, most, count = map(int, values)
    if least > 1 or most - least + 1 != count or not least <= number <= most:
        raise UsageError(  # some tasks of an array, submitted again, would be taken for all
            f"{opt('shard_of', SLURM)} takes arrays from 0 or 1 without gaps, not {count} tasks from {least} to {most}",
            "give I/N, such as $SLURM_ARRAY_TASK_ID/8",
        )
    return Part(number - least, count)


def part_of(plan: Plan) -> Part:
    """The part of its source that a plan is for."""
    part = plan.source.get("part")
    return Part(part["index"], part["of"]) if part else WHOLE


def plan_of_part(whole: _P, part: Part) -> _P:
    """The plan of one part; `UsageError` if there are more parts than shards."""
    if part == WHOLE:
        return whole
    shards = sum(map(whole.shard_count, whole.splits))
    if part.of > shards:
        raise UsageError(
            f"{opt('shard_of', str(part))}: there are only {shards} shards of {whole.shard_rows} rows to share out",
            f"make at most {shards} parts, or set {opt('shard_rows')} lower for all of them",
        )
    rows = _rows(whole.splits, whole.shard_rows, part)
    source = {**whole.source, "part": {"index": part.number, "of": part.of}}
    return replace(whole, splits={split: len(some) for split, some in rows.items()}, source=source)


def rows_of_plan(source: Source, plan: Plan) -> Source:
    """The whole source's rows that are in the part which a plan is for."""
    if part_of(plan) == WHOLE:
        return source
    return source.only(_rows({split: source.size(split) for split in plan.splits}, plan.shard_rows, part_of(plan)))


def _rows(sizes: Mapping[str, int], shard_rows: int, part: Part) -> dict[str, range]:
    """The part's rows in each split, maybe none. The shards of all splits, in their order, are shared out evenly."""
    counts = {split: -(-size // shard_rows) for split, size in sizes.items()}
    edges = [number * sum(counts.values()) // part.of for number in (part.number, part.number + 1)]
    rows, before = {}, 0
    for split, size in sizes.items():
        rows[split] = range(*(min(max(edge - before, 0) * shard_rows, size) for edge in edges))
        before += counts[split]
    return rows
