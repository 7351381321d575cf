"""From the folders of a `Listing` to splits, classes and keys.

`by_folders` makes a `Tree` from one listing, `latentprep.sources.tars` from several tars: for each split, the images
with key and class name, and how many images are in no split.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from latentprep.errors import SourceError, UsageError, opt
from latentprep.sources.kinds import IMAGES
from latentprep.sources.listing import ANNOTATIONS, LABEL_TABLES, TABLES, Entry, Listing, left_out_line
from latentprep.sources.splits import named_after_splits, split_of_folder

LAYOUTS = (
    "give a folder or archive with train/CLASS/*.jpg and val/CLASS/*.jpg, or with CLASS/*.jpg, or WebDataset tars with "
    "KEY.jpg and KEY.cls"
)
STRAY = "images beside the class folders"


class Found(NamedTuple):
    """An image before classes are numbered: its key, its class's name, "" if it has none, and where it is."""

    key: str
    name: str
    at: Any


@dataclass
class Tree:
    """Images by split; class folders by split, with or without images; and what was left out.

    notes: what else a user should know about how the source is read. classes: all of them in order, where the source
    says so. in_order: whether rows stay in this order, and are not sorted by key. identity: what changes when the files
    do, if that is known. media: what the samples are.
    """

    found: dict[str, list[Found]]
    folders: dict[str, set[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    in_order: bool = False
    identity: str = ""
    media: str = IMAGES


@dataclass(frozen=True)
class Columns:
    """Where labels are, if not in folders' names: a table's path, and the names of its columns or a Parquet file's."""

    labels: str | Path | None = None
    image_column: str | None = None
    label_column: str | None = None

    def check_unused(self, spec: str) -> None:
        """UsageError if any of them is given, for a source that has no use for it."""
        for name, given in vars(self).items():
            if given is not None:
                raise UsageError(f"{opt(name)} has no effect on {spec}", "leave it out")


def by_folders(spec: str, listing: Listing) -> Tree:
    """Find splits and classes by folders: ``{train,val,test}/CLASS/…`` or ``CLASS/…``, inside any outer folders.

    A folder with a split's name is a split only if it holds folders and, in addition, all folders beside it are splits
    too, or two splits have a class in common. Otherwise it may be a class, which is an error.
    """
    if not listing.images:
        raise SourceError(f"{spec} holds no images and no sounds{what_else(listing)}", LAYOUTS)
    depth, splits = _find_splits(spec, listing)
    tree = Tree({split: [] for split in splits.values()} or {"train": []}, {}, Counter(listing.left_out))
    level = depth + 1 if splits else depth  # where the class folders are
    beside: dict[str, list[Entry]] = {}  # images in folders beside the splits
    astray: dict[str, list[Entry]] = {}  # images in no class folder, by split
    for entry in listing.images:
        parts = entry.path.split("/")
        top = parts[depth] if len(parts) > depth + 1 else ""
        if splits and top and top not in splits:
            beside.setdefault(top, []).append(entry)
        elif len(parts) < level + 2:
            astray.setdefault(top if splits else "", []).append(entry)
        else:
            key = "/".join(parts[depth:])
            tree.found[splits[top] if splits else "train"].append(Found(key, parts[level], entry.at))
    for top, entries in astray.items():
        if not tree.found[splits[top]] if top else not any(tree.found.values()):
            raise _in_no_class(spec, entries[0], listing)
        tree.left_out[f"images in {top}/ beside the class folders" if top else STRAY] += len(entries)
    _leave_out_beside(spec, tree, beside, sorted(splits), listing)

    for folder in listing.folders:
        parts = folder.split("/")
        if len(parts) > level and (not splits or parts[depth] in splits):
            tree.folders.setdefault(splits[parts[depth]] if splits else "train", set()).add(parts[level])
    _read_annotations(tree, listing, splits, depth)
    _check_classes(spec, tree, listing, level, bool(splits))
    return tree


def sidecars(listing: Listing) -> list[str]:
    """The endings of files that there are as many of as images: captions and the like, as img2dataset writes them."""
    return [ending for ending in (".txt", ".json") if listing.others[ending] >= len(listing.images)]


def _check_classes(spec: str, tree: Tree, listing: Listing, level: int, with_splits: bool) -> None:
    """Raise SourceError where the class folders must be something else, and note what they may not have meant to be."""
    names = sorted({row.name for rows in tree.found.values() for row in rows})
    if len(names) > 1 and with_splits:
        return
    below: dict[str, set[str]] = {name: set() for name in names}  # paths of folders with images in each class folder
    for entry in listing.images:
        parts = entry.path.split("/")
        if len(parts) > level + 2 and parts[level] in below:
            below[parts[level]].add("/".join(parts[level + 1 : -1]))
    deep = next((name for name in names if len(below[name]) > 1), "")
    if len(names) == 1:
        way_out = f"give the folder {deep}/ itself if the classes are in it, or {LAYOUTS}" if deep else LAYOUTS
        raise SourceError(f"{spec} has only one class: {names[0]}{_tables(listing)}", way_out)
    if both := named_after_splits(names):
        raise SourceError(
            f"{spec} has {both[0]}/ and {both[1]}/: splits or classes?{_tables(listing)}",
            "for splits, use the names train, val and test, with a folder for each class in them; for classes, put all "
            "of them into a folder train/",
        )
    inner = {part: name for name in names for path in below[name] for part in path.split("/") if split_of_folder(part)}
    if len({split_of_folder(part) for part in inner}) > 1:
        split = min(inner)
        raise SourceError(
            f"{spec} has splits inside what would be its classes, such as {split}/ in {inner[split]}/",
            "splits lie around the class folders, as train/CLASS/*.jpg: move them there, or give a folder that holds "
            "just them",
        )
    if sidecars(listing) and all(re.fullmatch(r"\d{5,}", name) for name in names):
        raise SourceError(
            f"{spec} holds images with {' and '.join(sidecars(listing))} in numbered folders, as img2dataset writes "
            "them: these are parts, not classes",
            f"{LAYOUTS}; or give the folders the names of classes",
        )
    if words := [name for name in names if split_of_folder(name)]:
        tree.notes += (f"{words[0]}/ is taken for a class, as the folders beside it are",)
    if deep:
        tree.notes += (
            f"classes are the outer folders, {names[0]}, {names[1]}{', …' * (len(names) > 2)}: those inside them, as "
            f"{min(below[deep])}/, make no difference",
        )


def what_else(listing: Listing) -> str:
    """What a listing holds besides images, for the error that it has no usable ones."""
    left = " ".join(listing.left_out)
    unread = {ending for ending in listing.others if re.search(rf"archives not read \({re.escape(ending)}\b", left)}
    others = {f"files {end}": count for end, count in listing.others.most_common(4) if end not in unread}
    rest = left_out_line({**listing.left_out, **others})
    return f" (it has: {rest})" if rest else ""


def _find_splits(spec: str, listing: Listing) -> tuple[int, dict[str, str]]:
    """How many outer folders there are, and which folders inside them are splits, by name."""
    folders = [folder.split("/") for folder in listing.folders]
    depth = 0
    while True:
        tops = {parts[depth] for parts in folders if len(parts) > depth}
        inner = {parts[depth] for parts in folders if len(parts) > depth + 1}  # those that hold folders
        splits = {top: split for top in sorted(inner) if (split := split_of_folder(top))}
        if splits or len(tops) != 1 or not inner:
            break
        depth += 1
    twice = [split for split, n in Counter(splits.values()).items() if n > 1]
    if twice:
        both = " and ".join(top for top in splits if splits[top] == twice[0])
        raise SourceError(f"{spec} has {both}, which are both the {twice[0]} split", "keep one of them")
    return depth, splits


def _leave_out_beside(
    spec: str, tree: Tree, beside: dict[str, list[Entry]], splits: list[str], listing: Listing
) -> None:
    """Count the images in folders beside the splits, except those that a link brings into a split."""
    read = {_place(row.at) for rows in tree.found.values() for row in rows} if listing.linked else set()
    names = [{row.name for row in rows} for rows in tree.found.values()]
    sure = any(one & two for i, one in enumerate(names) for two in names[:i])
    for top, entries in beside.items():
        split = split_of_folder(top)
        rest = [entry for entry in entries if not read or _place(entry.at) not in read]
        if not rest:
            continue
        if split == "test":
            tree.left_out[f"images in {top}/ (in no class folder)"] += len(rest)
        elif split:
            raise _in_no_class(spec, rest[0], listing)
        elif sure:
            tree.left_out[f"images in {top}/ (not a known split)"] += len(rest)
        else:
            raise SourceError(
                f"{spec} has {top}/ beside {' and '.join(f'{name}/' for name in splits)}: splits or classes?",
                f"for splits, name them train, val and test, or move {top}/ away; for classes, rename {splits[0]}/, "
                "or put all of them into a folder train/",
            )


def _place(at: Any) -> Any:
    """Where an image's bytes really are, with links resolved."""
    return os.path.realpath(at) if isinstance(at, str) else at


def _in_no_class(spec: str, entry: Entry, listing: Listing) -> SourceError:
    return SourceError(
        f"{entry.path} in {spec} is in no class folder{_tables(listing)}",
        f"{LAYOUTS}; or a table of labels as {opt('labels')}",
    )


def _tables(listing: Listing) -> str:
    endings = [ending for ending in TABLES if listing.others[ending]]
    if not endings:
        return ""
    if known := [ending for ending in endings if ending in LABEL_TABLES]:
        return f" (to read labels from its {', '.join(known)}, name the file as {opt('labels')})"
    return f" (tables of labels of these kinds are not read: {', '.join(endings)})"


def _read_annotations(tree: Tree, listing: Listing, splits: dict[str, str], depth: int) -> None:
    """Tiny-ImageNet: val and test images are all in ``images``; a text file gives the classes of val."""
    if "images" in {row.name for row in tree.found.get("train", ())}:
        return
    for path, text in listing.annotations.items():
        parts = path.split("/")
        top, inside = parts[depth] if len(parts) == depth + 2 else "", "/".join([*parts[depth:-1], "images", ""])
        if top not in splits:
            continue
        lines = [line.split("\t") for line in text.decode("utf-8", "replace").splitlines()]
        names = {fields[0]: fields[1].strip() for fields in lines if len(fields) > 1}
        rows = tree.found[splits[top]]
        told = [row._replace(name=names.get(row.key.removeprefix(inside), row.name)) for row in rows]
        kept = [row for row in told if row.name != "images"]
        if len(kept) < len(rows):
            tree.left_out[f"images in {top}/ (not in its {ANNOTATIONS})"] += len(rows) - len(kept)
        tree.found[splits[top]] = kept
        tree.folders[splits[top]] = {row.name for row in kept}
    test = tree.found.get("test", [])
    if test and {row.name for row in test} == {"images"}:
        tree.left_out["images in test/ (in no class folder)"] += len(test)
        del tree.found["test"], tree.folders["test"]
