"""Text for people: making names from outside safe to show, and formatting counts, times and sizes."""

from __future__ import annotations

import re

# Control characters (a terminal obeys them), Unicode line separators, marks that change the direction of
# writing, and lone surrogates, which stand for bytes in a file name that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text on one line, unsafe characters escaped as in Python: ``\x1b``, ``\n``, and ``\xff`` for a byte."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode()


def plural(count: float, noun: str) -> str:
    """`1 shard`, `2 shards`, `1.5 bits`."""
    number = f"{count}" if isinstance(count, int) else f"{count:.3g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """`75.3` -> `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes for people: `1568` -> `1.53 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
