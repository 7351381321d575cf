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

import math
import re
from ast import literal_eval

_OPTION = re.compile("\x01([a-z0-9_]+)(?:=([^\x01\x02]*))?\x02")  # what `opt` writes


def opt(name: str, value: object = None) -> str:
    """A parameter, and maybe a value of it, in the text of an error: Python says ``shard_rows=8`` of it, the command
    line ``--shard-rows 8``. A codec's option is spelled the same in both: ``dct:luma=8``."""
    if ":" in name:
        return name if value is None else f"{name}={value}"
    return f"\x01{name}\x02" if value is None else f"\x01{name}={value!r}\x02"


def _in_python(found: re.Match[str]) -> str:
    return found[1] if found[2] is None else f"{found[1]}={found[2]}"


def _in_shell(found: re.Match[str]) -> str:
    name = found[1].replace("_", "-")
    value = None if found[2] is None else literal_eval(found[2])
    if isinstance(value, list):
        value = ",".join(map(str, value))
    given = "" if value is None or isinstance(value, bool) else f" {value}"
    return f"--{'no-' if value is False else ''}{name}{given}"


class LatentError(Exception):
    """Base of all errors that are not bugs: ``message`` says what, ``hint`` the way out. Parameters in them are written
    by `opt`, so that they read as Python's here and as options where the command line prints them."""

    exit_code = 1
    said = False  # whether another process of the same job prints it

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.texts = message, hint  # as written

    @property
    def message(self) -> str:
        return _OPTION.sub(_in_python, self.texts[0])

    @property
    def hint(self) -> str:
        return _OPTION.sub(_in_python, self.texts[1])

    @property
    def field(self) -> str | None:
        """The parameter that the message is about, if it names one."""
        found = _OPTION.search(self.texts[0])
        return found and found[1]

    def in_shell(self) -> tuple[str, str]:
        """Message and hint as the command line prints them."""
        return _OPTION.sub(_in_shell, self.texts[0]), _OPTION.sub(_in_shell, self.texts[1])

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self):  # pickled whole, so that a worker process can hand it back
        return type(self), self.texts


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
        errno.EROFS: f"the disk is read-only; choose another folder as {opt('out')}",
        errno.EACCES: f"check the permissions, or choose another folder as {opt('out')}",
        errno.EEXIST: f"it is a file where a folder is needed; choose another folder as {opt('out')}",
        errno.ENOTDIR: f"a part of the path is a file; choose another folder as {opt('out')}",
        errno.EPERM: f"check the permissions, or choose another folder as {opt('out')}",
    }
    where = f": {error.filename}" if error.filename is not None else ""
    reason = error.strerror or str(error)
    return SystemFault(f"{reason[:1].lower()}{reason[1:]}{where}", hints.get(error.errno or 0, ""))


def nearest(word: str, allowed: list[str] | tuple[str, ...]) -> str:
    """`did you mean …` for a mistyped word, or the allowed set where nothing is near."""
    import difflib

    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(allowed)}"


def check_whole(
    name: str, value: object, low: int, high: int | None = None, hint: str = "", *, optional: bool = False
) -> None:
    """`UsageError` unless the parameter's value is a whole number from low to high, or, if `optional`, None."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise UsageError(f"{opt(name)} must be a whole number {allowed}, got {value!r:.60}", hint)


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    hint: str = "",
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """`UsageError` unless the parameter's value is a finite number from low to high.

    above, below: low, or high, is itself not allowed.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        enough = low < value if above else low <= value  # false for NaN
        if enough and (value < high if below or high == math.inf else value <= high):
            return
    least = f"above {low:g}" if above else f"from {low:g}" if high < math.inf else f"of {low:g} or more"
    most = "" if high == math.inf else f" to below {high:g}" if below else f" to {high:g}"
    raise UsageError(f"{opt(name)} must be a number {least}{most}, got {value!r:.60}", hint)


def check_word(name: str, value: object, allowed: list[str] | tuple[str, ...], hint: str = "") -> None:
    """`UsageError` unless the parameter's value is one of the words that are allowed."""
    if value not in allowed:
        message = f"{opt(name)} must be {' or '.join(allowed)}, got {value!s:.60}"
        raise UsageError(message, hint or nearest(str(value), allowed))
