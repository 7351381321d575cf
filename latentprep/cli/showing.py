"""What commands print of their results: as one JSON object, or as lines and tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

from latentprep import text
from latentprep.cli import console

if TYPE_CHECKING:
    from latentprep.audit.info import DatasetInfo
    from latentprep.audit.verify import VerifyResult
    from latentprep.encoding.encode import EncodeResult
    from latentprep.sources.source import Source

_MOST_SHOWN = 50  # shards, of those that verify finds wrong
_FEW_SHOWN = 10  # changed images
_CHANNELS = 16


@overload
def open_shown(spec: str, **options: Any) -> Source: ...
@overload
def open_shown(spec: str | None, **options: Any) -> Source | None: ...
def open_shown(spec: str | None, **options: Any) -> Source | None:
    """`sources.open_own_source` with a bar, and what the source leaves out said on stderr."""
    from latentprep.sources.listing import left_out_line
    from latentprep.sources.source import open_own_source

    source = open_own_source(spec, progress=console.progress_bar, **options)
    if source is not None:
        for note in source.notes:
            console.note(f"note: {note}")
        if source.left_out:
            console.note(f"left out: {left_out_line(source.left_out)}")
    return source


def show_result(result: EncodeResult, as_json: bool) -> None:
    """What an encode, or a command that makes a dataset of another, did."""
    if as_json:
        console.print_json(result.to_json())
        return
    samples, sample = sum(result.rows.values()), "image" if result.seconds_each is None else "sound"
    verb = "would write" if result.dry_run else "wrote" if result.encoded else "already complete:"
    most = "at most " if result.dry_run else ""
    rows = ", ".join(f"{name} {count}" for name, count in result.rows.items())
    facts = {
        "rows": f"{rows} in {text.plural(result.shards, 'shard')}, {len(result.classes)} classes",
        "codec": f"{result.codec['name']}, {text.plural(result.bits, 'bit')}{' (joint)' if result.joint else ''}, "
        f"{side(result)} -> {shape(result.latent)}" + (f", {result.views} views" if result.views > 1 else ""),
        "codes": f"{most}{text.size(result.code_bytes)}, {result.code_bytes / max(1, samples):.0f} bytes per {sample}",
    }
    if result.encoded:
        rate = result.encoded / max(1e-9, result.seconds)
        by = "" if result.engine == "local" else f", {result.engine}: {text.plural(result.workers, 'worker')}"
        facts["time"] = f"{text.duration(result.seconds)}, {rate:.0f} {sample}s/s{by}"
    if result.reused:
        facts["reused"] = f"{result.reused} of {text.plural(result.encoded, sample)}; the codec encoded the others"
    if result.part != "0/1":
        facts["part"] = f"{result.part} of the source; latentprep merge puts all parts together"
    elif not result.dry_run and {"train", "val"} <= set(result.rows):
        facts["next"] = f"latenttrain fit {result.out}"
    console.print_facts(f"{verb} {result.out}", facts)


def show_verified(found: VerifyResult) -> None:
    facts = {
        "checked": f"{found.checked} of {text.plural(found.shards, 'shard')}, {found.rows} rows, "
        f"{text.size(found.bytes)}; codes of {found.decoded} decoded"
    }
    if found.invalid:
        facts["invalid"] = f"{found.invalid} samples could not be read when they were encoded"
    if found.compared is not None:
        if found.compared.images:
            facts["compared"] = (
                f"{text.plural(found.compared.images, 'image')} encoded again: {found.compared.differing:.3%} of the "
                f"codes differ, by at most {found.compared.farthest:.3%} of the range per image"
            )
        if found.compared.unreadable and found.hashed is None:
            facts["unreadable"] = f"{len(found.compared.unreadable)} now, the first {found.compared.unreadable[0]}"
    if found.hashed is not None:
        changed = found.hashed.changed
        which = ", ".join(changed[:_FEW_SHOWN]) + (", …; --json has them all" if len(changed) > _FEW_SHOWN else "")
        facts["hashed"] = f"{text.plural(found.hashed.images, 'image')} of the source, {len(changed)} changed" + (
            f": {which}" if changed else ""
        )
        if found.hashed.unreadable:
            facts["unreadable"] = f"{len(found.hashed.unreadable)} now, the first {found.hashed.unreadable[0]}"
    if found.repaired:
        same = sum(map(bool, found.repaired.values()))
        facts["repaired"] = ", ".join(found.repaired) + (f"; {same} to the recorded bytes" if same else "")
    if not found.ok:
        facts["next"] = "run the same command with --source SOURCE --repair: it encodes just these shards again"
    state = "is intact" if found.ok else f"has {text.plural(len(found.problems), 'problem')}"
    console.print_facts(f"{found.path} {state}", facts)
    if found.problems:
        rows = [["-" if p.split is None else f"{p.split} {p.index}", p.what] for p in found.problems[:_MOST_SHOWN]]
        if len(found.problems) > _MOST_SHOWN:
            rows.append(["…", f"and {len(found.problems) - _MOST_SHOWN} more; --json has them all"])
        console.print_table("", ["shard", "what is wrong"], rows)


def side(found: EncodeResult | DatasetInfo) -> str:
    """``224 px`` or ``0.7 s``."""
    return f"{found.size} px" if found.seconds_each is None else f"{found.seconds_each:g} s"


def channels(values: Iterable[object]) -> str:
    """A value for each channel, in a line."""
    texts = list(map(str, values))
    return " ".join(texts[:_CHANNELS]) + (" …" if len(texts) > _CHANNELS else "")


def shape(latent: tuple[int, int, int]) -> str:
    channels, height, width = latent
    return f"{height}×{width}×{channels}"
