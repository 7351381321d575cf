"""What a folder or an archive holds, as a `Listing`: the same for both, so every layout can be read from either.

No file is decoded. If a file has no image's or sound's name, its first bytes are checked. Everything left out is
counted: hidden files, kinds that cannot be read, links in a circle, and the folders that we write ourselves.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from latentprep.errors import SourceError
from latentprep.sources.kinds import (
    IMAGES,
    SOUND,
    has_parquet_name,
    is_image,
    is_sound,
    medium_of_name,
    unread_medium_of_name,
)
from latentprep.sources.offsets import archive_kind

NOUNS = {IMAGES: "images", SOUND: "sounds"}
HIDDEN = "images in hidden files or folders"
BESIDE = "archives beside image files"
NOT_NAMED = "images not named in "  # a table of labels
METADATA = ("metadata.csv", "metadata.jsonl")  # the hub's: a row for each image of their folder
METADATA_BYTES = 1 << 28  # of a table of labels, at most
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: FILE, CLASS and a box per line, separated by tabs
_OURS = {  # files that mark a folder as written by us, and the text in them that shows it
    "manifest.json": ("a latent dataset", re.compile(rb'"format":\s*"latentprep"')),
    "config.json": ("a training run", re.compile(rb'"format":\s*"latenttrain run"')),
}
_HEADS = {  # bytes to check; 512 of other files
    "manifest.json": 1 << 16,
    "config.json": 1 << 16,
    ANNOTATIONS: 1 << 24,
    **dict.fromkeys(METADATA, METADATA_BYTES + 1),
}
_SHADOWS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
_MOST_LINKS = 3  # links to folders on the path to a file
LABEL_BYTES = 1024  # the longest `.cls` member that counts as a label
LABEL_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # the kinds that can be read
TABLES = (*LABEL_TABLES, ".json", ".xml", ".txt", ".mat")  # may hold labels
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".zip")
_UNREAD_ARCHIVES = (".7z", ".rar", ".bz2", ".xz", ".zst", ".part", ".partial", ".crdownload")


class Entry(NamedTuple):
    """One image or sound: its '/'-separated path inside the folder or archive, and where its bytes are."""

    path: str
    at: Any
    medium: str = IMAGES


@dataclass
class Listing:
    """What a folder or an archive holds, by '/'-separated path inside it.

    images: and sounds; `settle` leaves one of the two. labels: texts of ``.cls`` files. annotations: texts of
    `ANNOTATIONS` files. archives: tars and zips, each as its `Path` or, a tar inside a tar, as a `Listing` of its own.
    parquet: Parquet files outside of archives. metadata: texts of `METADATA` files. ours: folders that we wrote ("":
    all of it), and what they are. others: the number of other files, by ending. left_out: what is not read, and how
    many. linked: whether links to folders were followed.
    """

    images: list[Entry] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    labels: dict[str, bytes] = field(default_factory=dict)
    annotations: dict[str, bytes] = field(default_factory=dict)
    archives: dict[str, Any] = field(default_factory=dict)
    parquet: dict[str, Path] = field(default_factory=dict)
    metadata: dict[str, bytes] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    linked: bool = False

    def add(self, name: str, at: Any, read: Callable[[int], bytes]) -> bytes:
        """Add a file. Returns its first bytes if it is none of the known kinds.

        ``read(n)`` returns at most its first n bytes, and is called at most once.
        """
        if (medium := medium_of_name(name)) is not None:
            self.images.append(Entry(name, at, medium))
            return b""
        ending = PurePosixPath(name).suffix.lower()
        if (medium := unread_medium_of_name(name)) is not None:
            self.leave_out(f"{NOUNS[medium]} of a kind that cannot be read ({ending})")
            return b""
        folder, _, base = name.rpartition("/")
        head = read(LABEL_BYTES if ending == ".cls" else _HEADS.get(base, 512))
        if is_image(head) or is_sound(head):
            self.images.append(Entry(name, at, IMAGES if is_image(head) else SOUND))
        elif ending == ".cls":
            self.labels[name] = head
        elif base in METADATA:
            self.metadata[name] = head
            self.add_other(name)
        elif base == ANNOTATIONS:
            self.annotations[name] = head
        elif base in _OURS and _OURS[base][1].search(head):
            self.ours[folder] = _OURS[base][0]
        else:
            return head
        return b""

    def leave_out(self, what: str, count: int = 1) -> None:
        if count:
            self.left_out[what] += count

    def add_other(self, name: str) -> None:
        """Add a file that is not read."""
        ending = PurePosixPath(name).suffix.lower() or "without an ending"
        self.others[ending] += 1
        if ending in _UNREAD_ARCHIVES:
            self.leave_out(f"archives not read ({ending})")

    def leave_out_ours(self) -> None:
        """Remove the folders that we wrote, and those that hold nothing else."""
        for folder in sorted(self.ours):
            inside, before = f"{folder}/", len(self.images)
            if folder not in self.folders:
                continue  # inside another one
            self.images = [entry for entry in self.images if not entry.path.startswith(inside)]
            self.folders = {name for name in self.folders if name != folder and not name.startswith(inside)}
            self.archives = {name: at for name, at in self.archives.items() if not name.startswith(inside)}
            self.parquet = {name: at for name, at in self.parquet.items() if not name.startswith(inside)}
            self.labels = {name: text for name, text in self.labels.items() if not name.startswith(inside)}
            self.left_out[f"images in {folder}/ ({self.ours[folder]})"] = before - len(self.images)
        used = {
            above
            for name in (*(image.path for image in self.images), *self.archives, *self.parquet)
            for above in _above(name)
        }
        self.folders -= {above for folder in self.ours for above in _above(folder)} - used


def _above(path: str) -> list[str]:
    """All folders above a path."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def left_out_line(left_out: Mapping[str, int]) -> str:
    """What was left out, for people: ``1 image in docs/ (not a known split); 3 links in a circle``."""
    parts = []
    for what, count in left_out.items():
        noun, space, rest = what.partition(" ")
        parts.append(f"{count} {noun.removesuffix('s') if count == 1 else noun}{space}{rest}")
    return "; ".join(parts)


def hidden(medium: str) -> str:
    """What left-out files of a medium in hidden places are called."""
    return HIDDEN.replace(NOUNS[IMAGES], NOUNS[medium])


def settle(listings: Iterable[Listing]) -> str:
    """Whether these listings are of images or of sounds: what they hold more of. The others are left out, and counted.

    Returns `IMAGES` or `SOUND`.
    """
    every = list(_and_inner(listings))
    counts = Counter(entry.medium for listing in every for entry in listing.images)
    medium = SOUND if counts[SOUND] > counts[IMAGES] else IMAGES
    for listing in every if len(counts) > 1 else ():
        kept = [entry for entry in listing.images if entry.medium == medium]
        other = IMAGES if medium == SOUND else SOUND
        listing.leave_out(f"{NOUNS[other]} beside {NOUNS[medium]}", len(listing.images) - len(kept))
        listing.images = kept
    return medium


def _and_inner(listings: Iterable[Listing]) -> Iterator[Listing]:
    for listing in listings:
        yield listing
        yield from _and_inner(inner for inner in listing.archives.values() if isinstance(inner, Listing))


def is_hidden(path: str) -> bool:
    """Whether a part of the path begins with a dot, or is a shadow folder of macOS, Synology or Windows."""
    return any(part.startswith(".") or part in _SHADOWS for part in path.split("/"))


def text_path(path: str) -> str:
    """``path`` with undecodable bytes written as ``\\xNN``, so that it can be stored as UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_file(at: str) -> bytes:
    """The bytes of a folder's image. Raises OSError."""
    return Path(at).read_bytes()


def list_folder(root: Path, out: Path | None = None) -> Listing:
    """All files below a folder. Links are followed as if they were copies, but not in a circle.

    ``out``, a folder that is being written, is left out. Raises SourceError for a folder that cannot be listed.
    """
    listing = Listing()
    real_out = str(out.resolve()) if out else None
    todo: list[tuple[str, str, tuple[str, ...], int]] = [(str(root), "", (str(root.resolve()),), 0)]
    while todo:
        # its path, its path inside the root, the real paths of it and the folders above, how many of these are links
        folder, inside, above, links = todo.pop()
        try:
            with os.scandir(folder) as items:
                for item in items:
                    name = inside + text_path(item.name)
                    if is_hidden(item.name):
                        for hidden_medium, count in _named(item).items():
                            listing.leave_out(hidden(hidden_medium), count)
                    elif _is_folder(item):
                        link = item.is_symlink()
                        real = str(Path(item.path).resolve()) if link else f"{above[-1]}/{item.name}"
                        if real in above:
                            listing.leave_out("links in a circle")
                            continue
                        if link and links == _MOST_LINKS:  # folders full of links to each other have endless paths
                            listing.leave_out(f"links behind {_MOST_LINKS} others")
                            continue
                        if real == real_out:
                            listing.ours[name] = "the output folder"
                        listing.linked |= link
                        listing.folders.add(name)
                        todo.append((item.path, f"{name}/", (*above, real), links + link))
                    elif fault := _fault(item):
                        if (medium := medium_of_name(name)) and fault == _BROKEN:
                            listing.images.append(Entry(name, item.path, medium))  # its row is reported when read
                        else:
                            listing.leave_out(fault)
                    else:
                        head = listing.add(name, item.path, lambda size, path=item.path: _head(path, size))  # type: ignore[misc]
                        kind = archive_kind(Path(item.path), head) if head else None
                        if kind in ("tar", "gzip") or name.lower().endswith(ARCHIVES):
                            listing.archives[name] = Path(item.path)  # another or a damaged one, too: reading says so
                        elif head and (kind == "Parquet" or has_parquet_name(name)):
                            listing.parquet[name] = Path(item.path)
                            listing.add_other(name)
                        elif head:
                            listing.add_other(name)
        except OSError as error:
            raise SourceError(f"cannot list {folder}: {error.strerror}", "check its permissions") from error
    listing.leave_out_ours()
    return listing


_BROKEN = "broken links"


def _fault(item: os.DirEntry[str]) -> str | None:
    """Why an item is not a readable file; None if it is one."""
    try:
        if item.is_file():
            return None
        item.stat()
    except OSError:
        return _BROKEN
    return "pipes, sockets or devices"  # reading them could block


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _head(path: str, size: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _named(item: os.DirEntry[str]) -> Counter[str]:
    """How many files with an image's name, and a sound's, a hidden file or folder stands for, by medium."""
    folder = item.is_dir(follow_symlinks=False)
    names = [name for _, _, some in os.walk(item.path) for name in some] if folder else [item.name]
    return Counter(medium for name in names if (medium := medium_of_name(name)))
