"""Find the images that a source's name stands for: in a folder, an archive, several tars, or Parquet files."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentprep.errors import SourceError, nearest
from latentprep.progress import ProgressFactory, silent
from latentprep.sources.archives import list_archive
from latentprep.sources.kinds import has_parquet_name, medium_of_name
from latentprep.sources.layouts import LAYOUTS, Columns, Tree, by_folders
from latentprep.sources.listing import ARCHIVES, BESIDE, NOUNS, Listing, list_folder, read_file, settle
from latentprep.sources.offsets import archive_kind, read_member
from latentprep.sources.parquet import by_parquet
from latentprep.sources.parquet_files import Files, local_files, remote_files
from latentprep.sources.tables import by_labels, by_metadata
from latentprep.sources.tars import by_tars
from latentprep.storage.places import SCHEMES, path_of

MAX_TARS = 100_000  # in one brace pattern, at most

NO_COLUMNS = Columns()
Load = Callable[[Any], bytes]


def find(
    spec: str, out: Path | None = None, progress: ProgressFactory = silent, columns: Columns = NO_COLUMNS
) -> tuple[Tree, Load]:
    """The images that ``spec`` names, by split, and the function that reads one. ``out``: a folder to leave out.

    Raises SourceError.
    """
    try:
        if _is_url(spec):
            return _parquet(spec, remote_files(spec, _expand_braces(spec)), columns)
        return _find(spec, path_of(spec), out, progress, columns)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SourceError(f"cannot read {error.filename or spec}: {reason}", "check its permissions") from error


def _is_url(spec: str) -> bool:
    """Whether Parquet files at this URL are read; tars are not."""
    return spec.partition("://")[0].lower() in SCHEMES and "://" in spec and not spec.lower().endswith(ARCHIVES)


def _parquet(spec: str, files: Files, columns: Columns) -> tuple[Tree, Load]:
    replace(columns, image_column=None, label_column=None).check_unused(f"{spec}, which has labels of its own")
    return by_parquet(spec, files, columns.image_column, columns.label_column)


def _find(spec: str, path: Path, out: Path | None, progress: ProgressFactory, columns: Columns) -> tuple[Tree, Load]:
    if path.is_dir():
        listing = list_folder(path, out)
        media = settle([listing])
        if what := listing.ours.get(""):
            raise SourceError(f"{spec} is {what}, not images", "give the images that it was made of")
        if listing.parquet and not listing.images and not listing.archives:
            tree, load = _parquet(
                spec, local_files(spec, [listing.parquet[n] for n in sorted(listing.parquet)]), columns
            )
            tree.left_out.update(listing.left_out)
            return tree, load
        if not listing.archives or any("/" in image.path for image in listing.images):
            listing.leave_out(BESIDE, len(listing.archives))
            return replace(_labelled(spec, listing, columns), media=media), read_file
        tars = [listing.archives[name] for name in sorted(listing.archives)]
        left_out = listing.left_out
        listing.leave_out("Parquet files beside archives", len(listing.parquet))
        listing.leave_out("images beside archives", len(listing.images))
    else:
        tars, left_out = _named(spec, path), None
        if parquet := [has_parquet_name(str(tar)) or archive_kind(tar) == "Parquet" for tar in tars]:
            if all(parquet):
                return _parquet(spec, local_files(spec, tars), columns)
            if any(parquet):
                other = tars[parquet.index(False)]
                raise SourceError(f"{spec} names Parquet files and others, such as {other}", "name the ones alone")
    listings = {str(tar): list_archive(tar, progress) for tar in tars}
    media = settle(listings.values())
    only = next(iter(listings.values()))
    if len(listings) == 1 and not only.labels and not only.archives:
        tree = _labelled(spec, only, columns)
    else:
        columns.check_unused(f"{spec}, whose labels are in archives")
        tree = by_tars(spec, listings)
    tree.left_out.update(left_out or {})
    return replace(tree, media=media), read_member


def _labelled(spec: str, listing: Listing, columns: Columns) -> Tree:
    """The images of a folder or archive with the labels of a table, if there is one, or else of its folders."""
    if columns.labels is not None:
        return by_labels(spec, listing, columns)
    if tree := by_metadata(spec, listing, columns):
        return tree
    columns.check_unused(f"{spec}, where folders are the labels")
    return by_folders(spec, listing)


def _named(spec: str, path: Path) -> list[Path]:
    """The archives that a path or a brace pattern names."""
    if path.is_file():
        if medium := medium_of_name(spec):
            raise SourceError(f"{spec} is a single {NOUNS[medium].removesuffix('s')}", LAYOUTS)
        return [path]
    if path.exists():
        raise SourceError(f"{spec} is neither a file nor a folder", LAYOUTS)
    tars = []
    for name in _expand_braces(spec):
        one = path_of(name)
        matching = sorted(Path(one.anchor).glob(str(one.relative_to(one.anchor)))) if glob.has_magic(name) else []
        tars += matching or [one]
    _check_exists(spec, tars)
    return tars


def _check_exists(spec: str, paths: list[Path]) -> None:
    from latentprep.sources import named as datasets

    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return
    if len(paths) > 1:
        raise SourceError(f"{spec}: {len(missing)} of {len(paths)} files do not exist, the first is {missing[0]}")
    if "://" in spec:
        raise SourceError(f"{spec} is a URL: images are read from this machine", "download them, and give the path")
    if "/" in spec or "." in spec:
        raise SourceError(f"no such file or folder: {spec}", LAYOUTS)
    raise SourceError(f"{spec} is neither a path nor a named dataset", nearest(spec, datasets.NAMES))


def _expand_braces(spec: str) -> list[str]:
    """``train-{000..002}.tar`` -> its three names, ``{train,val}-0.tar`` -> both, as shells and webdataset do."""
    match = re.search(r"\{([^{}]*)\}", spec)
    if not match:
        return [spec]
    bounds = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if bounds:
        if int(bounds[1]) > int(bounds[2]):
            raise SourceError(
                f"the range in {spec} ends before it begins", "write a range as train-{000000..000012}.tar"
            )
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        parts: Iterable[str] = (str(n).zfill(width) for n in range(int(bounds[1]), int(bounds[2]) + 1))
    else:
        parts = match[1].split(",")
    names: list[str] = []
    for part in parts:
        names += _expand_braces(spec[: match.start()] + part + spec[match.end() :])
        if len(names) > MAX_TARS:
            raise SourceError(f"{spec} stands for more than {MAX_TARS} files", "name fewer")
    return names
