"""Text that came from outside, made safe to show: names of files and classes may hold anything."""

from __future__ import annotations

import re

# Control characters (a terminal obeys them), line ends that are none of ours, marks that reverse the direction of
# writing, and lone surrogates: what Python makes of bytes in a file name that are no UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text on one line, unsafe characters spelled as Python does: ``\x1b``, ``\n``, and ``\xff`` for a byte."""
    return _UNSAFE.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()
