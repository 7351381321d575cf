"""The names of splits, as folders and in the names of tars and Parquet files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import PurePath

from latentprep.errors import SourceError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_IN_NAME = re.compile(rf"(?:^|[-_. ])({'|'.join(SPLIT_NAMES)})(?=[-_. \d]|$)", re.IGNORECASE)


def split_of_folder(name: str) -> str | None:
    """The split that a folder of this name is, in upper or lower case, or None."""
    return SPLIT_NAMES.get(name.lower())


def named_after_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Two folders whose names differ in the split alone, as ``seg_train`` and ``seg_test`` do; None if there are none.

    Folders like these are hardly classes, though none is called just what a split is.
    """
    seen: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        for match in _IN_NAME.finditer(name):
            rest = f"{name[: match.start(1)]}/{name[match.end(1) :]}".lower()
            splits = seen.setdefault(rest, {})
            splits.setdefault(SPLIT_NAMES[match[1].lower()], name)
            if len(splits) > 1:
                one, two = splits.values()
                return one, two
    return None


def splits_of_files(spec: str, files: Iterable[str]) -> dict[str, str | None]:
    """The split of each tar or Parquet file, from its name, or else from the nearest folder with a split's name.

    Only the folder around all the files, and those inside it, are considered. None for every file if no path names a
    split. Raises SourceError if some paths name a split and others do not, or a name contains two.
    """
    paths = {file: PurePath(file) for file in files}
    common = os.path.commonpath([path.parent for path in paths.values()])
    outside = max(0, len(PurePath(common).parts) - 1)
    splits: dict[str, str | None] = {}
    words: dict[str, str] = {}  # the name in use for each split
    for file, path in paths.items():
        named = {match.lower() for match in _IN_NAME.findall(path.name)}
        if len({SPLIT_NAMES[word] for word in named}) > 1:
            both = " and ".join(sorted(named))
            raise SourceError(f"the name of {file} contains two splits, {both}", "rename it so that it contains one")
        folders = [part.lower() for part in reversed(path.parent.parts[outside:])]
        word = next((word for word in (*sorted(named), *folders) if word in SPLIT_NAMES), None)
        splits[file] = split = word and SPLIT_NAMES[word]
        if word and split and words.setdefault(split, word) != word:
            both = " and ".join(sorted((word, words[split])))
            raise SourceError(f"{spec} has files of {both}, which are both the {split} split", "keep one of them")
    untold = [file for file, split in splits.items() if split is None]
    if untold and len(untold) < len(splits):
        told = next(file for file, split in splits.items() if split)
        others = f" and {len(untold) - 1} more" if len(untold) > 1 else ""
        raise SourceError(
            f"{spec}: the split of {untold[0]}{others} is unknown, while {told} names {splits[told]}",
            "put the split into each file's path, as in train-000.tar or train/000.tar, or leave those files out",
        )
    return splits
