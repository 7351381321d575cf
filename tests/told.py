"""A progress factory that keeps what it is told."""

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
