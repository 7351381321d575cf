"""The names that people give to splits, as folders and in the names of tars."""

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
_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(SPLIT_NAMES)})(?=[-_.\d]|$)", re.IGNORECASE)


def split_of_folder(name: str) -> str | None:
    """The split that a folder of this name is, in any case of letters, or None."""
    return SPLIT_NAMES.get(name.lower())


def splits_of_tars(spec: str, tars: Iterable[str]) -> dict[str, str | None]:
    """The split of each tar, by its path: off its name, else off the nearest folder that is a split's.

    Looked at are the folder that all the tars lie in, and those inside it. None for each where no path tells a split.
    Raises SourceError where some tell it and others do not, or a name tells two.
    """
    paths = {tar: PurePath(tar) for tar in tars}
    common = os.path.commonpath([path.parent for path in paths.values()])
    outside = max(0, len(PurePath(common).parts) - 1)
    splits: dict[str, str | None] = {}
    for tar, path in paths.items():
        named = {SPLIT_NAMES[match.lower()] for match in _IN_NAME.findall(path.name)}
        if len(named) > 1:
            both = " and ".join(sorted(named))
            raise SourceError(f"the name of {tar} says both {both}", "rename it after its one split")
        folders = [split_of_folder(part) for part in reversed(path.parent.parts[outside:])]
        splits[tar] = next((split for split in (*named, *folders) if split), None)
    untold = [tar for tar, split in splits.items() if split is None]
    if untold and len(untold) < len(splits):
        told = next(tar for tar, split in splits.items() if split)
        others = f" and {len(untold) - 1} more" if len(untold) > 1 else ""
        raise SourceError(
            f"{spec}: {untold[0]}{others} could be of any split, while {told} says {splits[told]}",
            "put the split into each tar's path, as train-000.tar or train/000.tar, or leave those tars out",
        )
    return splits
