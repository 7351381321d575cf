"""Read tar, gzipped tar and zip archives in place, by an index of offsets. Nothing is unpacked.

Joined tars (``cat a.tar b.tar``, several gzip streams) count as one archive. A plain tar inside a tar has a listing of
its own. Of a zip, `zipfile` reads the directory at its end; archives inside it are not read.
"""

from __future__ import annotations

import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from latentprep.errors import SourceError, opt
from latentprep.progress import BYTES, ProgressFactory, silent
from latentprep.sources.kinds import medium_of_name
from latentprep.sources.listing import ARCHIVES, LABEL_TABLES, TABLES, Entry, Listing, hidden, is_hidden, text_path
from latentprep.sources.offsets import AGAIN, GzipFile, PlainFile, ZipMember, archive_kind, begins_tar

_HEADER_BYTES = 1 << 20  # of one member, including long names
_LONG_SCAN = 1 << 26  # bytes of an archive that takes long enough for a bar
_MAX_LINKED = 1 << 20  # images that links to folders may add to an archive, at most
_LINK_BYTES = 4096  # of a link's target in a zip
_ZIP_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}  # APPNOTE 6.3.10, section 4.4.5


def list_archive(path: Path, progress: ProgressFactory = silent) -> Listing:
    """List a tar, gzipped tar or zip, in the archive's order, with the places of the images' bytes.

    Raises SourceError if the file is no archive, is cut short, damaged or followed by other bytes, or has a member that
    points outside it, or is encrypted or packed in a way that is not read, or an image that is a link.
    """
    kind = archive_kind(path)
    if kind not in ("tar", "gzip", "zip"):
        what = f"a {kind} archive" if kind else "not an archive"
        if path.suffix.lower() in TABLES:
            what = f"a table ({path.suffix}), not images"
        raise SourceError(
            f"{path} is {what}",
            "give a folder, a .zip, a .tar or a .tar.gz, with images in class folders or WebDataset samples"
            + (f", and the table as {opt('labels')}" if path.suffix.lower() in LABEL_TABLES else ""),
        )
    file = GzipFile(path) if kind == "gzip" else PlainFile(path)
    total = path.stat().st_size
    show = progress if total > _LONG_SCAN else silent
    try:
        with path.open("rb") as raw, show(f"reading {path.name}", total, BYTES, 0) as bar:
            if kind == "zip":
                return _list_zip(path, raw, total, bar.advance)
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
    except Exception as error:  # tarfile and zipfile raise all kinds of errors for damaged headers
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
            if head.startswith((b"\x1f\x8b", b"PK\3\4")) and name.lower().endswith(ARCHIVES):
                listing.leave_out(f"archives not read ({posixpath.splitext(name)[1].lower()} inside a tar)")
        if len(listing.images) > before or name in listing.archives:
            _add_folders(listing, name)


def _list_zip(path: Path, file: BinaryIO, total: int, advance: Callable[[int], None]) -> Listing:
    """List a zip of ``total`` bytes. Only members without an image's or sound's name are looked into."""
    if not zipfile.is_zipfile(file):
        raise EOFError("the list of its members is missing at its end")
    listing, links = Listing(), {}
    with zipfile.ZipFile(file) as archive:
        _check_whole(path, archive, file)
        for number, member in enumerate(members := archive.infolist()):
            if number % 256 == 255:
                advance(256 * total // len(members))
            raw = _zip_name(member)
            name = _inner_path(path, raw)
            medium = medium_of_name(name)
            if is_hidden(name):
                if medium:
                    listing.leave_out(hidden(medium), int(not raw.endswith("/")))
                continue
            if raw.endswith("/"):
                listing.folders |= {name} - {""}
                continue
            _check_readable(path, name, member, total)

            def read(length: int, member: zipfile.ZipInfo = member) -> bytes:
                with archive.open(member) as opened:
                    return opened.read(length)

            if stat.S_ISLNK(member.external_attr >> 16):
                links[name] = read(_LINK_BYTES).decode("utf-8", "replace")
                if medium:
                    way_out = "pack the archive again with: zip -r, without -y"
                    raise SourceError(f"{path}: {name} is a link to {links[name]}, not an image", way_out)
                continue
            before = len(listing.images)
            if listing.add(name, (_zip_member(path, member), member.header_offset, member.file_size), read):
                listing.add_other(name)
                if name.lower().endswith(ARCHIVES):
                    listing.leave_out(f"archives not read ({posixpath.splitext(name)[1].lower()} inside a zip)")
            if len(listing.images) > before:
                _add_folders(listing, name)
    _follow(path, listing, links)
    listing.leave_out_ours()
    return listing


def _check_whole(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> None:
    """Raise an error for a zip that is a part of one, or has bytes beside it that may be another."""
    file.seek(-22 - len(archive.comment), 2)  # where the end record is, if nothing follows
    end = file.read(12)
    if not end.startswith(b"PK\5\6"):
        raise EOFError("after its end there are other bytes")
    if end[4:6] not in (b"\0\0", b"\xff\xff"):
        raise SourceError(f"{path} is one of several parts", f"join them with: zip -s 0 {path.name} -O whole.zip")
    count = len(archive.infolist())  # zipfile passes over members that a damaged length in its list covers
    if end[10:] not in ((count & 0xFFFF).to_bytes(2, "little"), b"\xff\xff"):  # the latter where 64 bits are in use
        raise EOFError(f"its list says {int.from_bytes(end[10:], 'little')} members, but has {count}")
    first = min((member.header_offset for member in archive.infolist()), default=archive.start_dir)
    file.seek(0)
    if first < 0:
        raise EOFError("bytes are missing in it")
    if first and file.read(4) in (b"PK\3\4", b"PK\5\6"):
        what = f"{path} begins with members that its own list lacks, as joined zips do"
        raise SourceError(what, "give each zip by itself, or pack the images again")


def _check_readable(path: Path, name: str, member: zipfile.ZipInfo, total: int) -> None:
    if member.flag_bits & 0x41:
        raise SourceError(f"{path}: {name} is encrypted", "unpack it with its password, and give the folder")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = _ZIP_METHODS.get(member.compress_type, f"method {member.compress_type}")
        raise SourceError(f"{path}: {name} is compressed by {how}, not deflate", "unpack it, and give the folder")
    if not 0 <= member.header_offset <= total - member.compress_size:
        raise EOFError(f"{name} lies outside of it")


def _zip_member(path: Path, member: zipfile.ZipInfo) -> ZipMember:
    name = zlib.crc32(member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437"))
    return ZipMember(path, member.compress_type == zipfile.ZIP_DEFLATED, member.compress_size, member.CRC, name)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """A member's name: UTF-8 if it can be, as macOS and Linux write it without saying so, else cp437, by `zipfile`."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    # .NET once wrote backslashes, which names on Windows, system 0, cannot hold
    return name.replace("\\", "/") if member.create_system == 0 else name


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
