"""Progress factories for tests: one that keeps what it is told, and one at which someone presses Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Told:
    def __init__(self) -> None:
        self.begun: list[tuple[str, int | None, str, int]] = []
        self.steps: list[int] = []
        self.notes: list[str] = []

    @contextmanager
    def __call__(self, description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Told]:
        self.begun.append((description, total, unit, done))
        yield self

    def advance(self, n: int, **facts: str) -> None:
        self.steps.append(n)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Interrupting:
    """Someone presses Ctrl-C after more than `count` steps of the work described so, or of any work."""

    def __init__(self, count: int, description: str | None = None) -> None:
        self.left, self.description = count, description

    @contextmanager
    def __call__(self, description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Interrupting]:
        self.counts = self.description in (None, description)
        yield self

    def advance(self, n: int, **facts: object) -> None:
        self.left -= n if self.counts else 0
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass
