"""The kinds of file that sources look for: of image, which `images` decodes, and of sound, which `sound` decodes.

A `Kind` is recognized by file endings and by first bytes; `other_kind` says what other bytes are. Nothing here opens
a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 32  # how much `kind_of` and `is_image` need
IMAGES, SOUND = MEDIA = ("images", "sound")


class BadSample(Exception):
    """Bytes that cannot be decoded. The text is the reason, for `errors.jsonl`."""


@dataclass(frozen=True)
class Kind:
    """A kind of image that can be read.

    format: Pillow's name for it. endings: of its file names. magic: how its files begin. sure: a stricter pattern, if
    texts can begin like `magic`; a file without an image's name must match it. modules: the first that can be
    imported reads it. package: what to install if none can.
    """

    format: str
    endings: tuple[str, ...]
    magic: bytes
    modules: tuple[str, ...]
    package: str = "pillow"
    sure: bytes | None = None

    @property
    def name(self) -> str:
        """Its common name, such as "HEIC" or "JPEG 2000"."""
        return {"HEIF": "HEIC", "JPEG2000": "JPEG 2000", "WEBP": "WebP", "JXL": "JPEG XL"}.get(self.format, self.format)


# Left out: formats that run a program (EPS starts Ghostscript), and those that nobody uses for data sets.
KINDS = (
    Kind("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), rb"\xff\xd8\xff", ("PIL.JpegImagePlugin",)),
    Kind("PNG", (".png", ".apng"), rb"\x89PNG\r\n\x1a\n", ("PIL.PngImagePlugin",)),
    Kind("WEBP", (".webp",), rb"RIFF....WEBP", ("PIL.WebPImagePlugin",)),
    Kind("GIF", (".gif",), rb"GIF8[79]a", ("PIL.GifImagePlugin",)),
    Kind("TIFF", (".tif", ".tiff"), rb"II[*+]\0(?!.{4}CR)|MM\0[*+]", ("PIL.TiffImagePlugin",)),
    Kind(  # the reserved field is zero, and the header's length one of the few defined
        "BMP", (".bmp",), rb"BM", ("PIL.BmpImagePlugin",),
        sure=rb"BM.{4}\0{4}.{4}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0{3}"
    ),
    Kind(  # a BMP without its first header
        "DIB", (".dib",), rb"[\x28\x34\x38\x6c\x7c]\0{3}.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0",
        ("PIL.BmpImagePlugin",),
    ),
    Kind(
        "PPM", (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), rb"P[1-6f]\s", ("PIL.PpmImagePlugin",),
        sure=rb"P[1-6f]\s+(?:#|\d+\s+\d+\s)",
    ),
    Kind(
        "JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        ("PIL.Jpeg2KImagePlugin",),
    ),
    Kind(  # `mif1` only means that there is an image: the brands after it name the kind
        "AVIF", (".avif",), rb".{4}ftyp(?:avi[fs]|(?:mi[af]f|mif1|msf1).{4}(?:.{4})*?avi[fs])",
        ("PIL.AvifImagePlugin", "pillow_avif"), "pillow-avif-plugin",
    ),
    Kind(
        "HEIF", (".heic", ".heif", ".hif"), rb".{4}ftyp(?:hei[cxms]|hev[cxms]|mif[12]|msf1)", ("pillow_heif",),
        "pillow-heif",
    ),
    Kind("JXL", (".jxl",), rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", ("pillow_jxl",), "pillow-jxl-plugin"),
)  # fmt: skip

IMAGE_EXTENSIONS = frozenset(ending for kind in KINDS for ending in kind.endings)
SOUND_EXTENSIONS = frozenset((".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"))
_SOUND = re.compile(rb"RIFF....WAVE|fLaC|OggS|ID3[\x02-\x04]|FORM....AIF[FC]", re.DOTALL)

# Image files of kinds that cannot be read: a source leaves them out, and says so.
UNSUPPORTED_EXTENSIONS = frozenset(
    (
        *(".svg", ".svgz", ".eps", ".ps", ".ai", ".wmf", ".emf", ".cdr"),  # drawings
        *(".psd", ".psb", ".xcf", ".kra"),  # layers
        *(".ico", ".cur", ".icns", ".xbm", ".xpm"),  # icons
        *(".tga", ".dds", ".ktx", ".ktx2", ".exr", ".hdr", ".qoi"),  # textures
        *(".pcx", ".sgi", ".ras", ".pam", ".jxr", ".wdp", ".bpg", ".flif", ".djvu", ".fits", ".fit", ".dcm"),
        *(".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2"),  # raw camera files
        *(".raf", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".mos", ".rwl"),
    )
)
UNREAD_SOUND_EXTENSIONS = frozenset((".m4a", ".aac", ".wma", ".amr", ".ac3", ".ape", ".wv", ".sph", ".mid", ".midi"))


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file that begins with ``head`` (`HEAD_BYTES` of it), by its contents alone."""
    return next((kind for kind in KINDS if re.match(kind.magic, head[:HEAD_BYTES], re.DOTALL)), None)


def is_image(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (`HEAD_BYTES` of it) is surely an image of one of the `KINDS`.

    Raw camera files begin as TIFFs do: ask `has_unsupported_name` first.
    """
    kind = kind_of(head)
    return kind is not None and (kind.sure is None or re.match(kind.sure, head, re.DOTALL) is not None)


def has_image_name(path: str) -> bool:
    """Whether the name has an ending of one of the `KINDS`, in upper or lower case."""
    return _ending(path) in IMAGE_EXTENSIONS


def is_sound(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (`HEAD_BYTES` of it) is surely sound; an MP3 only if it has a tag."""
    return _SOUND.match(head) is not None


def medium_of_name(path: str) -> str | None:
    """`IMAGES` or `SOUND`, by the name's ending; None for the name of another kind of file."""
    ending = _ending(path)
    return IMAGES if ending in IMAGE_EXTENSIONS else SOUND if ending in SOUND_EXTENSIONS else None


def unread_medium_of_name(path: str) -> str | None:
    """The same of kinds that cannot be read, such as ``.svg``, ``.cr2`` and ``.m4a``."""
    ending = _ending(path)
    return IMAGES if ending in UNSUPPORTED_EXTENSIONS else SOUND if ending in UNREAD_SOUND_EXTENSIONS else None


def has_unsupported_name(path: str) -> bool:
    """Whether the name is that of an image of a kind that cannot be read, such as ``.svg`` or ``.cr2``."""
    return unread_medium_of_name(path) == IMAGES


def has_parquet_name(path: str) -> bool:
    """Whether the name ends as those of Parquet files do."""
    return _ending(path) in (".parquet", ".pq")


def _ending(path: str) -> str:
    dot = path.rfind(".")
    return path[dot:].lower() if dot >= 0 else ""


# Other files in place of images: how they begin, in upper or lower case, and how messages describe them.
_OTHERS = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), what)
    for start, what in (
        (rb"\Z", "an empty file"),
        (rb"\0+\Z", "nothing but zeros"),
        (rb"version https://git-lfs", "a Git LFS pointer to the file; fetch it with git lfs pull"),
        (rb"\x1f\x8b", "a gzip file; unpack it"),
        (rb"PK\x03\x04|PK\x05\x06|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a packed archive; unpack it"),
        (rb"(?:<!--[^>]*>|\s)*<(?:!doctype\s+html|html|head|body)\b", "an HTML page, perhaps a server's error message"),
        (rb"(?:<[?!][^>]*>|\s)*<svg\b", "an SVG drawing; convert it to PNG"),
        (rb"\s*<\?xml|\s*<[a-z]+[ >]", "XML"),
        (rb"%PDF-", "a PDF; convert its pages to PNG"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript, a program, which is never run"),
        (rb"8BPS", "a Photoshop file; save it as PNG or TIFF"),
        (rb"II\*\0.{4}CR|II[RU][SO\0]|FUJIFILMCCD|.{4}ftypcrx ", "a raw camera file; develop it to JPEG or TIFF"),
        (rb"v/1\x01|#\?R(?:ADIANCE|GBE)", "a high-dynamic-range image; map its tones to 8 or 16 bits"),
        (rb"\0\0[\x01\x02]\0.\0", "an icon"),
        (rb"DDS |qoif|P7\n", "an image of a kind that cannot be read; save it as PNG"),
        (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF....AVI", "a video"),
        (rb"RIFF....WAVE|ID3|OggS|fLaC", "sound"),
        (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", "an image"),
        (rb"\s*[\[{]\s*[\[{\"\d\]}]", "JSON"),
    )
)  # fmt: skip


def other_kind(data: bytes, wanted: str = "an image") -> str:
    """Why bytes that are not what is wanted cannot be read: what they are, and what to do about it."""
    head = data[:1024]
    for start, what in _OTHERS:
        if start.match(data if what == "nothing but zeros" else head):
            return f"not {wanted} but {what}"
    try:
        text = head.decode("utf-8-sig" if len(data) <= len(head) else "latin-1")
    except UnicodeDecodeError:
        text = "\0"
    if all(c.isprintable() or c.isspace() for c in text):
        return f"not {wanted} but text, {' '.join(text.split())[:40]!r}"
    return f"not a known kind of {wanted.removeprefix('an ')}: it begins with the bytes {data[:8].hex(' ')}"
