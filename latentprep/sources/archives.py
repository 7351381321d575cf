"""Read tar and gzipped tar archives in place, by an index of offsets. Nothing is unpacked.

Joined tars (``cat a.tar b.tar``, several gzip streams) count as one archive. A plain tar inside an archive has a
listing of its own.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from latentprep.errors import SourceError, opt
from latentprep.progress import BYTES, ProgressFactory, silent
from latentprep.sources.kinds import medium_of_name
from latentprep.sources.listing import LABEL_TABLES, TABLES, Entry, Listing, hidden, is_hidden, text_path
from latentprep.sources.offsets import AGAIN, GzipFile, PlainFile, archive_kind, begins_tar

_HEADER_BYTES = 1 << 20  # of one member, including long names
_LONG_SCAN = 1 << 26  # bytes of an archive that takes long enough for a bar
_MAX_LINKED = 1 << 20  # images that links to folders may add to an archive, at most


def list_archive(path: Path, progress: ProgressFactory = silent) -> Listing:
    """List a tar or gzipped tar, in the archive's order, with the places of the images' bytes.

    Raises SourceError if the file is no archive, is cut short, damaged or followed by other bytes, or has a member that
    points outside it, or an image that is a link.
    """
    kind = archive_kind(path)
    if kind not in ("tar", "gzip"):
        what = f"a {kind} archive" if kind else "not an archive"
        if path.suffix.lower() in TABLES:
            what = f"a table ({path.suffix}), not images"
        raise SourceError(
            f"{path} is {what}",
            "give a folder, a .tar or a .tar.gz, with images in class folders or WebDataset samples"
            + (f", and the table as {opt('labels')}" if path.suffix.lower() in LABEL_TABLES else ""),
        )
    file = GzipFile(path) if kind == "gzip" else PlainFile(path)
    total = path.stat().st_size
    show = progress if total > _LONG_SCAN else silent
    try:
        with path.open("rb") as raw, show(f"reading {path.name}", total, BYTES, 0) as bar:
            cursor: Any = file.cursor(raw.fileno()) if isinstance(file, GzipFile) else raw
            done, told = cursor.compressed if isinstance(file, GzipFile) else cursor.tell, 0

            def tick() -> None:
                nonlocal told
                bar.advance(done() - told)
                told = done()

            listing = _Lister(path, file, cursor, tick).list(_Headers(cursor))
            if isinstance(file, GzipFile):
                cursor.seek_end()
            tick()
            return listing
    except (SourceError, OSError):
        raise
    except Exception as error:  # tarfile raises all kinds of errors for damaged headers
        raise SourceError(f"{path} is damaged or cut short: {error or type(error).__name__}", AGAIN) from error


class _Lister:
    """One pass through an archive's members."""

    def __init__(self, path: Path, file: PlainFile | GzipFile, cursor: Any, tick: Callable[[], None]) -> None:
        self.path, self.file, self.cursor, self.tick = path, file, cursor, tick
        self.count = 0  # members so far

    def list(self, headers: _Headers, nested: bool = False) -> Listing:
        """List what lies between the position of ``headers`` and their end: one or more tars."""
        listing, links, more = Listing(), {}, True
        while more:
            with tarfile.open(fileobj=_as_file(headers), mode="r:", encoding="utf-8") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header, about 1 KiB each
                    self.count += 1
                    headers.left = _HEADER_BYTES
                    if self.count % 256 == 0:
                        self.tick()
                    if member.issym() and not medium_of_name(member.name):
                        links[_inner_path(self.path, member.name)] = member.linkname
                    else:
                        self._add(listing, member, nested)
                end = tar.offset
            # tarfile treats a broken header, or none, as the end
            if not headers.holds(end) or self.file.pread(512, end) != bytes(512):
                raise EOFError(f"no end mark after {self.count} members")
            more = headers.skip_zeros()
        _follow(self.path, listing, links)
        listing.leave_out_ours()
        return listing

    def _add(self, listing: Listing, member: tarfile.TarInfo, nested: bool) -> None:
        name = _inner_path(self.path, member.name)
        if not name:
            return
        if is_hidden(name):
            if medium := medium_of_name(name):
                listing.leave_out(hidden(medium), int(member.isreg()))
        elif member.isdir():
            listing.folders.add(name)
        elif member.islnk() or member.issym() or member.issparse():
            if medium_of_name(name):
                how = "a sparse file" if member.issparse() else f"a link to {member.linkname}"
                way_out = "pack the archive again with: tar --dereference --hard-dereference"
                raise SourceError(f"{self.path}: {name} is {how}, not an image", way_out)
        elif member.isreg():
            self._add_file(listing, name, member.offset_data, member.size, nested)

    def _add_file(self, listing: Listing, name: str, offset: int, size: int, nested: bool) -> None:
        def read(length: int) -> bytes:
            self.cursor.seek(offset)
            return self.cursor.read(min(size, length))

        before = len(listing.images)
        head = listing.add(name, (self.file, offset, size), read)
        inner = Listing()
        if len(head) == 512 and begins_tar(head) and head.strip(b"\0"):
            if nested:
                way_out = "unpack the outermost archive"
                raise SourceError(f"{self.path}: {name} is a tar in a tar in a tar", way_out)
            inner = self.list(_Headers(self.cursor, offset + size, head), nested=True)
            listing.archives[name] = inner
        elif head:
            listing.add_other(name)
            if head.startswith(b"\x1f\x8b") and name.lower().endswith((".tgz", ".tar.gz")):
                listing.leave_out("archives not read (.tgz inside a tar)")
        if len(listing.images) > before or name in listing.archives:
            _add_folders(listing, name)


def _add_folders(listing: Listing, name: str) -> None:
    while "/" in name and (name := name.rpartition("/")[0]) not in listing.folders:
        listing.folders.add(name)


def _follow(archive: Path, listing: Listing, links: dict[str, str]) -> None:
    """Add the images behind links to folders, as if they were copies. Links behind those links are not followed."""
    if not links:
        return
    inside: dict[str, list[Entry]] = {}
    for entry in listing.images:
        folder = entry.path
        while "/" in folder:
            folder = folder.rpartition("/")[0]
            inside.setdefault(folder, []).append(entry)
    added: list[Entry] = []
    for name, target in links.items():
        to = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        for _ in range(40):  # Linux also follows 40 links at most
            if to in links:
                to = posixpath.normpath(posixpath.join(posixpath.dirname(to), links[to]))
        if is_hidden(name):
            continue
        if to in links or name.startswith(f"{to}/") or to == ".":
            listing.leave_out("links in a circle")
        elif to not in inside:
            listing.leave_out("links to what is not in the archive", int(to not in listing.folders))
        else:
            for entry in inside[to]:
                added.append(entry._replace(path=name + entry.path.removeprefix(to)))
                _add_folders(listing, added[-1].path)
            if len(added) > _MAX_LINKED:
                raise SourceError(
                    f"{archive}: its links to folders add more than {_MAX_LINKED} images", "unpack the archive"
                )
            listing.linked = True
    listing.images += added


def _inner_path(archive: Path, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise SourceError(f"{archive}: member {name} points outside the archive", "pack it again with relative paths")
    return text_path("/".join(parts))


class _Headers:
    """A file for tarfile to read headers from: forward only, with a limit on the bytes of one member's headers.

    A header may claim a name of gigabytes, or a negative length, on which tarfile would loop forever.
    ``end``: where a tar inside another tar ends; ``ahead``: bytes that have been read already.
    """

    def __init__(self, cursor: Any, end: int | None = None, ahead: bytes = b"") -> None:
        self._cursor, self._end, self._ahead = cursor, end, ahead
        self.left = _HEADER_BYTES

    def tell(self) -> int:
        return self._cursor.tell() - len(self._ahead)

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"the headers of a member take more than {_HEADER_BYTES} bytes")
        if self._end is not None:
            size = max(0, min(size, self._end - self.tell()))
        part, self._ahead = self._ahead[:size], self._ahead[size:]
        return part + self._cursor.read(size - len(part)) if len(part) < size else part

    def seek(self, offset: int) -> int:
        if offset < self.tell():
            raise tarfile.ReadError("a member ends before it begins")
        self._ahead = self._ahead[offset - self.tell() :]
        return self._cursor.seek(offset) if not self._ahead else offset

    def holds(self, offset: int) -> bool:
        """Whether there can be a block at ``offset``."""
        return self._end is None or offset + 512 <= self._end

    def skip_zeros(self) -> bool:
        """Skip the zeros at the end of a tar. Returns whether another tar follows; EOFError for other bytes."""
        while True:
            self.left = _HEADER_BYTES
            block = self.read(512)
            if block.strip(b"\0"):
                if not begins_tar(block):
                    raise EOFError("after the end mark there are other bytes, which are not a tar")
                self._ahead = block + self._ahead
                return True
            if not block:
                return False


def _as_file(headers: _Headers) -> BinaryIO:
    return headers  # type: ignore[return-value]  # tarfile calls only read, seek and tell
