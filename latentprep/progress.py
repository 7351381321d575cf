"""What long work reports to. Nothing here knows terminals; the default of the Python calls is silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """What long work reports to: ``advance(n, **facts)`` after n more items, facts shown beside the bar."""

    def advance(self, n: int, **facts: str) -> None: ...

    def note(self, text: str) -> None: ...


BYTES = "bytes"  # the unit that is shown as KiB, MiB, …

ProgressFactory = Callable[[str, int | None, str, int], AbstractContextManager[Progress]]
"""(description, total, unit, already done) -> the `Progress` of one piece of long work; a total of None is unknown."""


class Silent:
    def advance(self, n: int, **facts: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def silent(description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """A `ProgressFactory` that shows nothing: the default of the Python calls."""
    yield Silent()
