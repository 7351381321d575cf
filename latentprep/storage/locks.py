"""One writer at a time on this machine's folders and files, whatever file system they lie on."""

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
_PAUSE = 0.5  # seconds between two looks at a lock file that is waited for


class Held(Exception):
    """Somebody else holds it. Its text says what to do, where that is known."""


@contextlib.contextmanager
def held(path: Path, wait: bool = False, opened: int | None = None) -> Iterator[None]:
    """Hold the folder or file `path` alone. The lock is the operating system's, so it ends with the process.

    Where the file system gives none (some NFS and FUSE mounts), a file that only one process can make stands for it:
    ``.lock`` in the folder, or ``NAME.lock`` beside the file. One that a dead process of this machine left is taken
    over; of other machines nobody can know, so theirs stay.

    opened: the file's descriptor, for one whose name may be another's by now. Raises `Held` if another process holds
    it; with `wait`, waits instead.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no advisory lock on folders; two writers would commit equal bytes
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
    """Once in a process: it may lock many files of one mount."""
    if _said:
        return
    _said.append(name)
    text = f"the file system of {name} has no locks; the file {file} stands for one while this runs"
    warnings.warn(text, LatentWarning, stacklevel=4)


@contextlib.contextmanager
def _file_held(file: Path, wait: bool) -> Iterator[None]:
    ours = json.dumps({"owner": uuid.uuid4().hex, "process": os.getpid(), **_here(), "begun": _begun(os.getpid())})
    warned = False
    while not _made(file, ours):
        text = _read(file)
        if text is None:  # gone by now
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


def _made(file: Path, text: str) -> bool:
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
    """Remove the lock that says `dead`; one that somebody made meanwhile is put back."""
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
    """What tells whether a process number is one of ours: the machine since it was started, and its process space."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return {"host": platform.node(), "boot": boot, "space": space}


def _begun(process: int) -> str:
    """When a process was started, in ticks since the machine was: numbers of processes come again."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(text: str) -> bool:
    """Whether a lock's process was one of this machine and is no more. Of what cannot be judged: no."""
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
        return "the process that made it"
