"""Which kinds of image there are: the one list that sources look for, and that `images` decodes.

A `Kind` is known by the ends of file names and by the first bytes. Nothing here opens an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 32  # what `kind_of` and `is_image` look at


@dataclass(frozen=True)
class Kind:
    """A kind of image that is read.

    format: Pillow's name for it. endings: of file names. magic: how its files begin. sure: the same, stricter, where
    `magic` also begins texts: what it takes for a file whose name is not an image's. modules: the first that can be
    imported is the reader. package: what to install where none can.
    """

    format: str
    endings: tuple[str, ...]
    magic: bytes
    modules: tuple[str, ...]
    package: str = "pillow"
    sure: bytes | None = None

    @property
    def name(self) -> str:
        """As people call it: "HEIC" and "JPEG 2000"."""
        return {"HEIF": "HEIC", "JPEG2000": "JPEG 2000", "WEBP": "WebP", "JXL": "JPEG XL"}.get(self.format, self.format)


# Left out: formats that run a program (EPS starts Ghostscript) and those in which nobody keeps a data set.
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
    Kind(  # `mif1` says only that there is some image: the brands after it say of which kind
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

# Files that hold pictures, too, of kinds that are not read: a source leaves them out, and says so.
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
    """Whether the name ends as those of the `KINDS` do, in any case."""
    return _ending(path) in IMAGE_EXTENSIONS


def has_unsupported_name(path: str) -> bool:
    """Whether the name says that it is a picture of a kind that is not read, such as ``.svg`` or ``.cr2``."""
    return _ending(path) in UNSUPPORTED_EXTENSIONS


def _ending(path: str) -> str:
    dot = path.rfind(".")
    return path[dot:].lower() if dot >= 0 else ""
