"""HTML pages, read strictly."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Strict(HTMLParser):
    """Collects what a page refers to, the names it gives, and whether its elements nest."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.names: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        self.names += [str(found["id"])] if "id" in found else []
        if tag == "img":
            self.pictures.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def check_page(text: str) -> Strict:
    """That the page refers to nothing outside itself, runs nothing, and describes its pictures."""
    found = Strict(text)
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert "<script" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert len(found.names) == len(set(found.names))
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.names
    assert all(picture["alt"] for picture in found.pictures)
    return found
