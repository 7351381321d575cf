"""PNG files without their side chunks: what Pillow is given to decode, and what we read of the rest.

Pillow refuses a whole picture for what is wrong with, or larger than it allows in, a text, profile or EXIF chunk.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST = 8 << 20  # bytes of a profile or a text once unpacked; larger ones are left alone
_EXIF = "Raw profile type exif"
_XMP = "XML:com.adobe.xmp"


def split(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """A PNG file's bytes -> the same without side chunks but for transparency, and Pillow's ``info`` of what was in them.

    Of that just what decides how the picture looks: ``icc_profile``, ``exif``, and texts that may hold an orientation.
    Chunks whose first letter is a capital are needed to decode (PNG, third edition, section 5.4): they all stay. The frames
    of an animation go; what stays is its still picture.
    """
    kept, info, at, start = [], {}, len(SIGNATURE), 0
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break  # cut short: Pillow says so, or shows what there is
        if kind[0] & 0x20 and kind != b"tRNS":
            kept.append(data[start:at])
            start = end
            info |= _read(kind, data[at + 8 : end - 4])
        at = end
    return (b"".join([*kept, data[start:]]), info) if kept else (data, info)


def _read(kind: bytes, body: bytes) -> dict[str, Any]:
    """What a side chunk adds to ``info``: nothing if it is another chunk, or damaged."""
    if kind == b"eXIf":
        return {"exif": b"Exif\0\0" + body}
    name, _, rest = body.partition(b"\0")
    if kind == b"iCCP":
        profile = _unpacked(rest[1:])
        return {"icc_profile": profile} if profile else {}
    key = name.decode("latin-1")
    if key not in (_EXIF, _XMP):
        return {}
    text: bytes | None = None
    if kind == b"tEXt":
        text = rest
    elif kind == b"zTXt":
        text = _unpacked(rest[1:])
    elif kind == b"iTXt":  # whether compressed, how, the language, the key translated, the text
        fields = rest[2:].split(b"\0", 2)
        text = None if len(fields) < 3 else _unpacked(fields[2]) if rest[0] else fields[2]
    return {} if text is None else {key: text.decode("latin-1")}


def _unpacked(packed: bytes) -> bytes | None:
    """None if it is damaged or larger than `_MOST`."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed, _MOST)
    except zlib.error:
        return None
    return None if stream.unconsumed_tail else plain
