"""One writer at a time for local folders and files, on any file system."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

from latentprep.errors import LatentWarning

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
_PAUSE = 0.5  # seconds between two checks of a lock file


class Held(Exception):
    """Another process holds the lock. The text says what to do, if that is known."""


@contextlib.contextmanager
def held(path: Path, wait: bool = False, opened: int | None = None) -> Iterator[None]:
    """Lock the folder or file `path`. The operating system holds the lock, so it ends with the process.

    If the file system has no locks (some NFS and FUSE mounts), a file that only one process can create replaces it:
    ``.lock`` in the folder, or ``NAME.lock`` beside the file. A lock file left by a dead process of this machine is
    taken over. Those of other machines stay, because nobody can tell whether their process is alive.

    opened: the file's descriptor, if another file may have its name by now. Raises `Held` if another process holds
    the lock; with `wait`, waits instead.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks on folders; two writers would commit equal bytes
        yield
        return
    file = path / LOCK if path.is_dir() else path.with_name(path.name + LOCK)
    handle = os.open(path, os.O_RDONLY) if opened is None else os.dup(opened)
    try:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Held("wait for it to end") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
            _say(str(path), str(file))
        if locked and not file.exists():
            yield
            return
        with _file_held(file, wait):
            yield
    finally:
        os.close(handle)


_said: list[str] = []


def _say(name: str, file: str) -> None:
    """Warn, once per process: it may lock many files of one mount."""
    if _said:
        return
    _said.append(name)
    text = f"the file system of {name} has no locks; the file {file} replaces one while this runs"
    warnings.warn(text, LatentWarning, stacklevel=4)


@contextlib.contextmanager
def _file_held(file: Path, wait: bool) -> Iterator[None]:
    ours = json.dumps({"owner": uuid.uuid4().hex, "process": os.getpid(), **_here(), "begun": _begun(os.getpid())})
    warned = False
    while not _created(file, ours):
        text = _read(file)
        if text is None:  # deleted in the meantime
            continue
        if _is_dead(text):
            _take_away(file, text)
            continue
        hint = f"wait for {_holder(text)} to end; if it has ended, delete {file}"
        if not wait:
            raise Held(hint)
        if not warned:
            warnings.warn(f"waiting for {file}: {hint}", LatentWarning, stacklevel=5)
            warned = True
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        if _read(file) == ours:
            file.unlink(missing_ok=True)


def _created(file: Path, text: str) -> bool:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


def _read(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _take_away(file: Path, dead: str) -> None:
    """Remove the lock file with the text `dead`. If another process has replaced it, put that one back."""
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    if _read(aside) != dead:
        with contextlib.suppress(OSError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def _here() -> dict[str, str]:
    """What a process number is valid for: this host, since it was booted, and this process namespace."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return {"host": platform.node(), "boot": boot, "space": space}


def _begun(process: int) -> str:
    """When a process was started, in ticks since boot: process numbers are used again."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(text: str) -> bool:
    """Whether a lock's process ran on this machine and has ended. False if unknown."""
    try:
        lock = json.loads(text)
        process, begun = int(lock["process"]), lock["begun"]
        if process <= 0 or any(lock[name] != value for name, value in _here().items()):
            return False
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return bool(begun) and _begun(process) not in ("", begun)


def _holder(text: str) -> str:
    try:
        lock = json.loads(text)
        return f"process {lock['process']} on {lock['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the process that created it"
