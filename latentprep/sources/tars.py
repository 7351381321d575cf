"""Make one source from several tars: WebDataset shards, one tar per split or class, or class folders in parts.

A zip counts as a tar here.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from latentprep.errors import SourceError
from latentprep.sources.layouts import Found, Tree, by_folders, sidecars, what_else
from latentprep.sources.listing import BESIDE, Entry, Listing
from latentprep.sources.splits import split_of_folder, splits_of_files

_ENDING = re.compile(r"\.(tar|tgz|tar\.gz|zip)$", re.IGNORECASE)
_SHARDS = (
    "WebDataset tars need KEY.jpg and KEY.cls for each sample; other tars need class folders, or are one class each"
)


def by_tars(spec: str, tars: dict[str, Listing]) -> Tree:
    """Read the tars of a source, by path: as WebDataset if one holds ``.cls`` members, otherwise as folders."""
    tars = _with_inner(tars)
    if any(listing.labels for listing in tars.values()):
        return _by_labels(spec, tars)
    if len(tars) == 1:
        return by_folders(spec, next(iter(tars.values())))
    return by_folders(spec, _joined(spec, tars))


def _with_inner(tars: dict[str, Listing]) -> dict[str, Listing]:
    """The tars; one that holds only tars is replaced by those."""
    flat: dict[str, Listing] = {}
    for path, listing in tars.items():
        inner = {f"{_ENDING.sub('', path)}/{name}": inside for name, inside in listing.archives.items()}
        if not inner:
            flat[path] = listing
        elif any("/" in entry.path for entry in listing.images) or listing.labels:
            beside = Counter({BESIDE: len(inner), f"images in {BESIDE}": sum(_images(one) for one in inner.values())})
            flat[path] = replace(listing, left_out=listing.left_out + beside)
        else:
            left_out = listing.left_out + Counter({"images beside archives": len(listing.images)})
            first = next(iter(inner))
            inner[first] = replace(inner[first], left_out=inner[first].left_out + left_out)
            flat |= _with_inner(inner)
    return flat


def _images(listing: Listing) -> int:
    return len(listing.images) + sum(_images(inside) for inside in listing.archives.values())


def _joined(spec: str, tars: dict[str, Listing]) -> Listing:
    """One listing of all the tars.

    A tar of images without folders is a class with the tar's name. The folders of other tars are merged, in the split
    that each tar's path names.
    """
    flat = {path: tar for path, tar in tars.items() if tar.images and not any("/" in i.path for i in tar.images)}
    _check_not_shards(spec, flat)
    splits = splits_of_files(spec, [path for path in tars if path not in flat]) if len(flat) < len(tars) else {}
    whole = Listing()
    root = _common_folder(tars)
    for path, listing in tars.items():
        if path in flat:
            prefix = f"{_ENDING.sub('', path[len(root) :])}/"
        else:
            tops = {entry.path.split("/")[0] for entry in listing.images}
            split = splits[path]
            prefix = f"{split}/" if split and not any(split_of_folder(top) for top in tops) else ""
        whole.images += [image._replace(path=prefix + image.path) for image in listing.images]
        whole.folders |= {prefix + folder for folder in listing.folders}
        above = prefix.rstrip("/")
        while above:
            whole.folders.add(above)
            above = above.rpartition("/")[0]
        whole.annotations |= {prefix + name: text for name, text in listing.annotations.items()}
        whole.others += listing.others
        whole.left_out.update(listing.left_out)
    return whole


def _common_folder(tars: dict[str, Listing]) -> str:
    """The common beginning of all tars' paths, up to a slash."""
    first, last = min(tars), max(tars)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]


def _check_not_shards(spec: str, flat: dict[str, Listing]) -> None:
    """Raise SourceError for tars of images that are not classes: with texts for each image, or numbered."""
    for path, listing in flat.items():
        if texts := sidecars(listing):
            endings = " and ".join(texts)
            raise SourceError(f"{path} holds images with {endings} files, but no .cls files (img2dataset's?)", _SHARDS)
    stems = [re.fullmatch(r"(.*?)(\d+)", _ENDING.sub("", path)) for path in sorted(flat)]
    numbers = [int(stem[2]) for stem in stems if stem]
    if len(numbers) < 2 or len(numbers) < len(stems) or len({stem[1] for stem in stems if stem}) > 1:
        return
    if max(numbers) - min(numbers) == len(numbers) - 1:
        raise SourceError(
            f"{spec} stands for numbered archives of images without folders and without .cls files", _SHARDS
        )


def _by_labels(spec: str, tars: dict[str, Listing]) -> Tree:
    """Read samples from WebDataset tars: ``KEY.jpg`` and ``KEY.cls`` are one sample; the tar's path names the split.

    If a key occurs in several tars of a split, the tars' names are put before all keys of that split.
    """
    splits = splits_of_files(spec, tars)
    root = _common_folder(tars)
    by_split: dict[str, dict[str, list[Found]]] = {}
    left_out: Counter[str] = Counter()
    for path, listing in tars.items():
        if not listing.labels:
            what = f"{path} holds no .cls files{what_else(listing)}"
            raise SourceError(what, "each sample of a WebDataset tar needs KEY.jpg and KEY.cls")
        by_split.setdefault(splits[path] or "train", {})[path] = _samples(path, listing)
        left_out.update(listing.left_out)
    tree = Tree({}, left_out=left_out)
    for split, samples in by_split.items():
        rows = [row for rows in samples.values() for row in rows]
        if len({row.key for row in rows}) < len(rows):
            rows = [
                row._replace(key=f"{_ENDING.sub('', path[len(root) :])}/{row.key}")
                for path, own in samples.items()
                for row in own
            ]
            tree.notes += (f"some keys of {split} occur in several archives, so its keys now begin with their names",)
        tree.found[split] = rows
    return tree


def _samples(tar: str, listing: Listing) -> list[Found]:
    images: dict[str, Entry] = {}
    for image in listing.images:
        key = _base_name(image.path)
        if key in images:
            raise SourceError(f"{tar}: sample {key} has two images", "keep one image per sample, or rename the other")
        images[key] = image
    labels = {_base_name(path): text for path, text in listing.labels.items()}
    for key in sorted(images.keys() ^ labels.keys())[:1]:
        lacks = ".cls" if key in images else "image"
        raise SourceError(f"{tar}: sample {key} has no {lacks}", "each sample needs KEY.jpg and KEY.cls")
    return [Found(key, _class_text(tar, key, labels[key]), image.at) for key, image in images.items()]


def _base_name(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _class_text(tar: str, key: str, text: bytes) -> str:
    try:
        name = text.decode().strip()
    except UnicodeDecodeError:
        name = ""
    if not name or "\n" in name:
        raise SourceError(f"{tar}: {key}.cls holds {text[:40]!r}", "write a class number or a class name into it")
    return str(int(name)) if re.fullmatch(r"\d+", name) else name
