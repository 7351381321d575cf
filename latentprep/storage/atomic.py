"""Atomic writes, so that a crash at any moment leaves only complete files; and one writer at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from latentprep.errors import DatasetError
from latentprep.storage.lease import leased
from latentprep.storage.locks import Held, held
from latentprep.storage.places import Place, RemotePath


def write_atomic(path: Place, data: bytes) -> None:
    """Write `data` to a temporary file, flush it to the disk, rename it. Readers of `path` never see a part of it.

    Object stores write atomically by themselves.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def make_folder(folder: Place) -> None:
    """Create a folder and its parents so that they survive a power cut: their names are flushed to the disk too."""
    if isinstance(folder, RemotePath) or folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextlib.contextmanager
def locked(root: Place) -> Iterator[None]:
    """Lock `root` for one writer: a local folder by `locks.held`, a remote one by `leased`.

    Raises `DatasetError` if another process holds it.
    """
    if isinstance(root, RemotePath):
        with leased(root):
            yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(root))
        except Held as error:
            raise DatasetError(f"{root} is being written by another latentprep encode", str(error)) from error
        yield


def sync_folder(folder: Place) -> None:
    """Make a rename in `folder` survive a power cut, if the platform supports that."""
    if isinstance(folder, RemotePath):
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
