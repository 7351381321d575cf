"""The metadata of image files that decides how they look: orientation and colour profile.

Both are read apart from the pixels: for PNG, because Pillow refuses a whole image for a damaged or large text, profile
or EXIF; for JPEG, because Pillow does not decode it. ``info`` here is the dictionary that Pillow's images have.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from PIL import Image

_MOST = 8 << 20  # bytes of a PNG's profile or text once unpacked; larger ones are left alone
_PNG_START = 8  # after the signature
_EXIF = "Raw profile type exif"
_XMP = "XML:com.adobe.xmp"
_XMP_IN_JPEG = b"http://ns.adobe.com/xap/1.0/\0"

# Markers with a length after them: all but restarts, start, end, scan and TEM (ITU-T T.81, table B.1).
_SEGMENTS = frozenset(range(0xFF02, 0xFFFF)) - frozenset(range(0xFFD0, 0xFFDB))
_marker_and_length = struct.Struct(">HH").unpack_from


def orientation(info: dict[Any, Any]) -> int:
    """The orientation, 1 to 8, that Pillow reads from EXIF or XMP; 1 if there is none or it is damaged."""
    carrier = Image.Image()
    carrier.info = info
    try:
        return int(carrier.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises all kinds of errors; broken metadata says nothing about the pixels
        return 1


def jpeg_info(data: bytes) -> dict[str, Any]:
    """``exif``, ``xmp`` and ``icc_profile`` of a JPEG, anywhere before its first scan.

    A walk over the segments' headers, about ten steps for a usual file.
    """
    info: dict[str, Any] = {}
    profile: list[bytes] = []
    at, end = 2, len(data) - 3
    while 0 <= at < end:
        marker, length = _marker_and_length(data, at)
        if marker in _SEGMENTS:
            stop = at + 2 + max(2, length)
            if marker == 0xFFE1 and data.startswith(b"Exif\0\0", at + 4):
                info["exif"] = info["exif"] + data[at + 10 : stop] if "exif" in info else data[at + 4 : stop]
            elif marker == 0xFFE1 and data.startswith(_XMP_IN_JPEG, at + 4):
                info["xmp"] = data[at + 4 + len(_XMP_IN_JPEG) : stop]
            elif marker == 0xFFE2 and data.startswith(b"ICC_PROFILE\0", at + 4):
                profile.append(data[at + 16 : stop])
            at = stop
        elif marker in (0xFFD9, 0xFFDA):  # the end, or a scan
            break
        else:  # fill bytes, or bytes between segments: decoders skip them
            at = data.find(b"\xff", at + 1)
    if not profile:
        return info
    profile.sort()  # each begins with its number and how many there are
    if len(profile[0]) > 1 and profile[0][1] == len(profile):
        info["icc_profile"] = b"".join(part[2:] for part in profile)
    return info


def split_png(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """A PNG's bytes -> the same without optional chunks, except transparency; and what ``info`` has of the others.

    Chunks whose first letter is a capital are needed to decode (PNG, third edition, section 5.4); all of them stay. The
    frames of an animation are removed; its still image stays.
    """
    kept: list[bytes] = []
    info: dict[str, Any] = {}
    at = start = _PNG_START
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):  # cut short: Pillow says so
            break
        if kind[0] & 0x20 and kind != b"tRNS":
            kept.append(data[start:at])
            start = end
            info |= _png_info(kind, data[at + 8 : end - 4])
        at = end
    return (b"".join([data[:_PNG_START], *kept, data[start:]]), info) if kept else (data, info)


def _png_info(kind: bytes, body: bytes) -> dict[str, Any]:
    """What an optional chunk adds to ``info``: nothing if it is of another kind, or damaged."""
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
    elif kind == b"iTXt":  # compressed or not, how, language, translated key, text
        fields = rest[2:].split(b"\0", 2)
        if len(fields) == 3:
            text = _unpacked(fields[2]) if rest[0] else fields[2]
    return {} if text is None else {key: text.decode("latin-1")}


def _unpacked(packed: bytes) -> bytes | None:
    """None if it is damaged, or larger than `_MOST`."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed, _MOST)
    except zlib.error:
        return None
    return None if stream.unconsumed_tail else plain
