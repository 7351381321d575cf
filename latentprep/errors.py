"""The few errors a user can meet: what is wrong, the way out, and an exit code a script can branch on.

Both command lines print ``message`` and ``hint`` on one line each and exit with ``exit_code``; anything
that is not a `LatentError` is a bug of ours and shows its traceback.

| code | class | meaning |
| --- | --- | --- |
| 2 | `UsageError` | an option's value is not allowed |
| 3 | (no error) | finished, but some samples could not be read: see ``errors.jsonl`` |
| 4 | `SourceError` | the images or their folders, archives or downloads |
| 5 | `CodecError` | unknown codec, missing weights, bad latents |
| 6 | `DatasetError` | the latent dataset: absent, damaged, incomplete or another version |
| 7 | `CheckpointError` | a run folder or its weights, or a dataset they were not trained for |
| 8 | `SystemFault` | the machine: full disk, no permission, missing package, no such device |
| 130 | `Interrupted` | Ctrl-C; what was committed stays. As programs: 128 + the signal's number |
"""

from __future__ import annotations


class LatentError(Exception):
    """Base of all errors that are not bugs: ``message`` says what, ``hint`` the way out."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self):  # pickled whole, so that a worker process can hand it back
        return type(self), (self.message, self.hint)


class LatentWarning(UserWarning):
    """What the user should know of, though the work goes on."""


class UsageError(LatentError):
    exit_code = 2


class SourceError(LatentError):
    exit_code = 4


class CodecError(LatentError):
    exit_code = 5


class DatasetError(LatentError):
    exit_code = 6


class CheckpointError(LatentError):
    exit_code = 7


class SystemFault(LatentError):
    exit_code = 8


class Interrupted(LatentError):
    exit_code = 130


def system_fault(error: OSError) -> SystemFault:
    """The `SystemFault` for an operating-system error, with a way out for the common ones."""
    import errno

    hints = {
        errno.ENOSPC: "free some space, then run the same command again: committed shards are kept",
        errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again",
        errno.EROFS: "the disk is read-only; choose another folder with --out",
        errno.EACCES: "check the permissions, or choose another folder with --out",
        errno.EEXIST: "it is a file where a folder is needed; choose another --out",
        errno.ENOTDIR: "a part of the path is a file; choose another --out",
        errno.EPERM: "check the permissions, or choose another folder with --out",
    }
    where = f": {error.filename}" if error.filename is not None else ""
    reason = error.strerror or str(error)
    return SystemFault(f"{reason[:1].lower()}{reason[1:]}{where}", hints.get(error.errno or 0, ""))


def nearest(word: str, allowed: list[str] | tuple[str, ...]) -> str:
    """`did you mean …` for a mistyped word, or the allowed set where nothing is near."""
    import difflib

    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(allowed)}"
