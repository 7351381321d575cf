"""Named datasets: addresses, checksums and class names of public archives, and a download that resumes."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from latentprep.errors import SourceError, opt, system_fault
from latentprep.progress import BYTES, ProgressFactory, silent
from latentprep.storage.cache import cache_folder
from latentprep.storage.locks import held

_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_IMAGEWOOF = {
    "n02086240": "Shih-Tzu",
    "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle",
    "n02089973": "English foxhound",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
    "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog",
    "n02111889": "Samoyed",
    "n02115641": "dingo",
}
_URL = "https://s3.amazonaws.com/fast-ai-imageclas/{}"
# File and MD5. Imagenette's are torchvision's (torchvision/datasets/imagenette.py), Imagewoof's those of catalyst
# (catalyst/contrib/datasets/cv/imagewoof.py): fast.ai itself publishes only sizes and MD5s of the first MiB
# (fastai/data/checks.txt). fast.ai has rebuilt the archives under the same names, so other, older sums exist.
_ARCHIVES = {
    "imagenette": ("imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
    "imagenette-320": ("imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    "imagenette-160": ("imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "imagewoof": ("imagewoof2.tgz", "9aafe18bcdb1632c4249a76c458465ba"),
    "imagewoof-320": ("imagewoof2-320.tgz", "0f46d997ec2264e97609196c95897a44"),
    "imagewoof-160": ("imagewoof2-160.tgz", "3d200a7be99704a0d7509be2a9fbfe15"),
}
NAMES = ("shapes", *_ARCHIVES)

_ATTEMPTS = 5  # in a row that receive no byte
_BACKOFF = 1.0  # seconds before the second attempt; doubled for each further one
_TIMEOUT = 30  # seconds without an answer or a byte
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


def class_names(name: str, found: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """Readable names for the class folders ``found`` in a copy of a dataset. Raises SourceError if it is not a copy."""
    names = _IMAGEWOOF if name.startswith("imagewoof") else _IMAGENETTE
    if found != tuple(names):
        raise SourceError(
            f"{path} is no copy of {name}: its classes are {', '.join(found[:2])} …, not {', '.join([*names][:2])} …",
            f"give {path} itself as the source, or a copy of {_ARCHIVES[name][0]} with {opt('data')}",
        )
    return tuple(names.values())


def fetch(name: str, cache: Path | None = None, progress: ProgressFactory = silent) -> Path:
    """The archive of a named dataset, downloaded to the cache folder on first use.

    Raises SourceError (no network, refused, wrong checksum) or SystemFault (disk).
    """
    file, md5 = _ARCHIVES[name]
    folder = cache or cache_folder()
    target = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            download(_URL.format(file), target, md5, progress)
    except SourceError as error:
        way_out = f"or download {_URL.format(file)} yourself and name the file with {opt('data')}"
        raise SourceError(f"{name}: {error.texts[0]}", f"{error.texts[1]}, {way_out}") from error
    except OSError as error:
        raise system_fault(error) from error
    return target


def download(url: str, target: Path, md5: str, progress: ProgressFactory = silent) -> None:
    """Download ``url`` to ``target``, resuming ``target.part`` if it exists. ``target`` is complete or absent.

    Failed attempts are retried with growing pauses. Raises SourceError, OSError.
    """
    part = target.with_name(target.name + ".part")
    # Another process may be downloading it, or may have finished in the meantime, or been killed.
    with part.open("ab") as file, held(part, wait=True, opened=file.fileno()):
        if target.exists():
            part.unlink(missing_ok=True)
            return
        file.seek(0, os.SEEK_END)
        failures = 0
        while True:
            before = file.tell()
            try:
                _transfer(url, file, target.name, progress)
                break
            except _Interruption as error:
                failures = 1 if file.tell() > before else failures + 1
                if failures >= _ATTEMPTS:
                    raise SourceError(f"cannot download {url}: {error}", "check the network and run again") from error
                time.sleep(_BACKOFF * 2 ** (failures - 1))
        file.flush()
        os.fsync(file.fileno())
        got = _md5(part, f"checking {target.name}", progress)
        if got != md5:
            part.unlink()
            raise SourceError(f"{url} has MD5 {got}, not {md5}; it was deleted", "run again to download it again")
        part.replace(target)


class _Interruption(Exception):
    """A failure that is worth another attempt."""


def _transfer(url: str, file: BinaryIO, name: str, progress: ProgressFactory) -> None:
    """Request the missing rest of ``file`` once, and append it."""
    import requests

    start = file.tell()
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            if answer.status_code == 416:  # nothing after `start`: the file is complete, or another file
                return
            if answer.status_code in _RETRIED:
                raise _Interruption(f"the server answered {answer.status_code} {answer.reason}")
            if not answer.ok:
                raise SourceError(f"cannot download {url}: {answer.status_code} {answer.reason}", "try again later")
            if start and answer.status_code != 206:
                file.truncate(0)  # the server sends from the beginning
                file.seek(start := 0)
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            with progress(f"downloading {name}", total, BYTES, start) as bar:
                for chunk in answer.iter_content(1 << 18):
                    file.write(chunk)
                    bar.advance(len(chunk))
    except requests.RequestException as error:
        raise _Interruption(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The innermost of nested network errors: the outer ones only repeat the URL and object addresses."""
    while isinstance(inner := getattr(error, "reason", None) or (error.args[0] if error.args else None), Exception):
        error = inner
    return str(error).rpartition("object at ")[2].partition(">: ")[2] or str(error)


def _md5(path: Path, description: str, progress: ProgressFactory) -> str:
    digest, total = hashlib.md5(usedforsecurity=False), path.stat().st_size
    with path.open("rb") as file, progress(description, total, BYTES, 0) as bar:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.advance(len(chunk))
    return digest.hexdigest()
