"""How folders and member names give splits, classes and keys.

A `Listing` (from `list_folder` here, or from an archive by `archives.list_archive`) says what there is; `by_folders`
and `by_labels` read a `Tree` off it: for each split, images with key and class name. No image is decoded, and only
files without an image's name are opened.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from latentprep.errors import SourceError
from latentprep.kinds import HEAD_BYTES, has_image_name, has_unsupported_name, is_image

Progress = Callable[[str, int, "int | None"], None]

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LAYOUTS = "give a folder or archive with train/CLASS/*.jpg and val/CLASS/*.jpg, or with CLASS/*.jpg"

_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|val|valid|validation|test)(?=[-_.\d]|$)", re.IGNORECASE)


class Entry(NamedTuple):
    """One image: its '/'-separated path inside the folder or archive, and where its bytes are."""

    path: str
    at: Any


@dataclass
class Listing:
    """What a folder or an archive holds: its images, all its folders, and the texts of its ``.cls`` members."""

    images: list[Entry] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    labels: dict[str, bytes] = field(default_factory=dict)


class Found(NamedTuple):
    """An image before the classes are numbered: its key, its class's name, where its bytes are."""

    key: str
    name: str
    at: Any


class Tree(NamedTuple):
    """Images by split; and by split the class folders that exist, with or without images."""

    found: dict[str, list[Found]]
    folders: dict[str, set[str]]


def is_hidden(path: str) -> bool:
    """Whether a part of the path begins with a dot, or is macOS's shadow folder."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def text_path(path: str) -> str:
    """``path`` with undecodable bytes written ``\\xNN``, so that it can be stored as UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_file(at: str) -> bytes:
    """The bytes of a folder's image. Raises OSError."""
    return Path(at).read_bytes()


def list_folder(root: Path) -> Listing:
    """All images below a folder. Links are followed, but neither back into the folder nor in circles.

    Raises SourceError for a folder that cannot be listed.
    """
    listing = Listing()
    real_root = str(root.resolve())
    todo: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", (real_root,))]
    while todo:
        folder, inside, above = todo.pop()  # its path, its path inside the root, real paths of it and those above
        try:
            with os.scandir(folder) as items:
                for item in items:
                    if is_hidden(item.name):
                        continue
                    name = inside + text_path(item.name)
                    if _is_folder(item):
                        link = item.is_symlink()
                        real = str(Path(item.path).resolve()) if link else f"{above[-1]}/{item.name}"
                        if real in above or (link and f"{real}/".startswith(f"{real_root}/")):
                            continue
                        listing.folders.add(name)
                        todo.append((item.path, f"{name}/", (*above, real)))
                    elif _is_image_file(item):
                        listing.images.append(Entry(name, item.path))
        except OSError as error:
            raise SourceError(f"cannot list {folder}: {error.strerror}", "check its permissions") from error
    return listing


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image_file(item: os.DirEntry[str]) -> bool:
    try:
        regular = item.is_file()  # not a pipe or a device, which could block
        if has_image_name(item.name):
            return regular or not Path(item.path).exists()  # a broken link keeps its row, to be reported when read
        if not regular or has_unsupported_name(item.name):
            return False
        with Path(item.path).open("rb") as file:
            return is_image(file.read(HEAD_BYTES))
    except OSError:
        return has_image_name(item.name)


def by_folders(spec: str, listing: Listing) -> Tree:
    """Read splits and classes off the folders: ``{train,val,test}/CLASS/…`` or ``CLASS/…``, inside any wrappers."""
    if not listing.images:
        raise SourceError(f"{spec} holds no images", LAYOUTS)
    folders = [folder.split("/") for folder in listing.folders]
    depth = 0
    while True:
        tops = {parts[depth] for parts in folders if len(parts) > depth}
        inner = {parts[depth] for parts in folders if len(parts) > depth + 1}  # those that hold folders
        splits = {top: SPLIT_NAMES[top.lower()] for top in sorted(inner) if top.lower() in SPLIT_NAMES}
        if splits or len(tops) != 1 or not inner:
            break
        depth += 1  # one folder around all the others
    twice = [split for split, n in Counter(splits.values()).items() if n > 1]
    if twice:
        both = " and ".join(top for top in splits if splits[top] == twice[0])
        raise SourceError(f"{spec} has {both}, which are both the {twice[0]} split", "keep one of them")

    level = depth + 1 if splits else depth  # where the class folders are
    found: dict[str, list[Found]] = {split: [] for split in splits.values()} or {"train": []}
    classes: dict[str, set[str]] = {split: set() for split in found}
    for parts in folders:
        if len(parts) > level and (not splits or parts[depth] in splits):
            classes[splits[parts[depth]] if splits else "train"].add(parts[level])
    for path, at in listing.images:
        parts = path.split("/")
        top = parts[depth] if len(parts) > depth else ""
        if splits and top not in splits and SPLIT_NAMES.get(top.lower(), "test") == "test":
            continue  # beside the splits; or a test split without classes
        if len(parts) < level + 2:
            raise SourceError(f"{path} in {spec} lies in no class folder", LAYOUTS)
        split = splits[top] if splits else "train"
        found[split].append(Found("/".join(parts[depth:]), parts[level], at))
    return Tree(found, classes)


def by_labels(spec: str, listings: dict[Path, Listing]) -> Tree:
    """Read samples off WebDataset tars: members ``KEY.jpg`` and ``KEY.cls`` are one; the split is in the tar's name."""
    found: dict[str, list[Found]] = {}
    for tar, listing in listings.items():
        if not listing.labels:
            raise SourceError(f"{tar} holds no .cls members", "each sample of a WebDataset tar is KEY.jpg and KEY.cls")
        match = _SPLIT_IN_NAME.search(tar.name)
        rows = found.setdefault(SPLIT_NAMES[match[1].lower()] if match else "train", [])
        images: dict[str, Entry] = {}
        for image in listing.images:
            key = _base_name(image.path)
            if key in images:
                raise SourceError(f"{tar}: sample {key} has two images", "keep one image a sample, or rename the other")
            images[key] = image
        labels = {_base_name(path): text for path, text in listing.labels.items()}
        for key in sorted(images.keys() ^ labels.keys())[:1]:
            lacks = ".cls" if key in images else "image"
            raise SourceError(f"{tar}: sample {key} has no {lacks}", "each sample needs KEY.jpg and KEY.cls")
        rows += [Found(key, _class_text(tar, key, labels[key]), image.at) for key, image in images.items()]
    return Tree(found, {})


def _base_name(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _class_text(tar: Path, key: str, text: bytes) -> str:
    try:
        name = text.decode().strip()
    except UnicodeDecodeError:
        name = ""
    if not name or "\n" in name:
        raise SourceError(f"{tar}: {key}.cls is {text[:40]!r}", "write a class number or a class name into it")
    return str(int(name)) if re.fullmatch(r"\d+", name) else name
