"""ZIPs of pictures, read where they are: nothing is unpacked to disk, whatever the names say. Loads without torch.

    local header, name, body │ local header, name, body │ … │ central directory │ [ZIP64 end] end, comment

The format is read here and not by `zipfile`, which (3.11 to 3.13) inflates bzip2 and LZMA without a bound, builds all
of a central directory before its length can be judged, takes other data in front, and looks at local headers and for
shared bodies late or, before 3.11.8, not at all. Here an archive that could be read in two ways is refused as a whole,
before any body is read; a damaged body costs its own entry alone.

Source of the format: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5. Of archives whose bodies overlap: David Fifield,
"A better zip bomb", WOOT 2019.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

from flux_ft.data.folder import MAX_FILE_BYTES, hidden_reason, is_archive, open_regular, stat_stamp
from flux_ft.errors import DataError
from flux_ft.types import FoundFile

try:
    import bz2
except ImportError:  # Python can be built without either
    bz2 = None  # type: ignore[assignment]
try:
    import lzma
except ImportError:
    lzma = None  # type: ignore[assignment]

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
"""A ZIP with files, and one without."""
MAX_ENTRIES = 20_000
"""The largest set that the scan is measured at; more belong into several ZIPs or a folder."""
MAX_UNPACKED_BYTES = 4 * 2**30
"""What all entries together may say they hold: 20,000 pictures of 200 kB, or 400 of 10 MB."""
MAX_RATIO = 200
"""Bytes out per byte in. Pictures are near 1 and captions below 20; deflate ends at 1,032 and bzip2 far beyond."""
RATIO_FROM_BYTES = 2**20
"""Entries smaller than this cannot hurt at any ratio."""
MAX_DIRECTORY_BYTES = 16 * 2**20
"""The central directory is held in memory; this is 800 bytes for each of the most entries, 100 is common."""
MAX_COMPONENT_BYTES = 255
"""Longest name of a file or folder on all usual file systems, in UTF-8."""
MAX_DEPTH = 16
"""Folders around a file; nobody sorts pictures deeper."""

NESTED = "an archive inside the archive is not opened"
REMAKE = "make the ZIP again from the pictures alone, or unpack it and give the folder"
SPLIT = "make several ZIPs of it, or unpack it and give the folder"

_STORED, _DEFLATE, _BZIP2, _LZMA = 0, 8, 12, 14
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
"""General purpose flags: encrypted, strongly encrypted, masked headers."""
_UTF8 = 0x0800
_ARCHIVE_STARTS = (*ZIP_STARTS, b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x1f\x8b\x08", b"\xfd7zXZ\x00")
_DRIVE = re.compile(r"[A-Za-z]:")

_LOCAL = struct.Struct("<4s2B4HL2L2H")
_CENTRAL = struct.Struct("<4s4B4HL2L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_LONGEST_COMMENT = 0xFFFF
_IN_ZIP64 = 0xFFFFFFFF
_PIECE_BYTES = 2**18


class ZipSource:
    """The files of a ZIP; a folder that encloses all of them is left out of their names."""

    rows = False

    def __init__(self, path: str | os.PathLike[str], label: str) -> None:
        """Reads the headers of all entries and no body. Raises DataError for an archive that is not wholly in order."""
        self.label = label
        self.identity = os.path.realpath(path)
        self._stamp = ""
        try:
            with self._open() as file:
                self._stamp = stat_stamp(os.fstat(file.fileno()))
                self._entries = _by_name(_read_entries(file))
        except DataError as error:
            raise DataError(f"`{label}`: {error.message}", hint=error.hint or REMAKE) from None
        except (OSError, struct.error) as error:  # the disk fails, or the file shrinks meanwhile
            raise DataError(f"`{label}` cannot be read: {error}", hint="check the disk") from None

    def files(self) -> Iterator[FoundFile]:
        """Every file, sorted by name; a stamp is the archive's own and what its headers say of the entry.

        Raises DataError when the archive is no longer the one that was opened.
        """
        self._open().close()
        return (
            FoundFile(
                name,
                f"{self._stamp}:{entry.crc:08x}:{entry.size}:{entry.packed}:{entry.start}",
                hidden_reason(entry.name) or (NESTED if is_archive(name) else None),
            )
            for name, entry in self._entries.items()
        )

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError with the reason alone.

        The archive is opened each time, so that it is not held when idle, and that a replaced one is noticed.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise DataError("no such file in the archive")
        with self._open() as file:
            data = _body(file, entry)
        if data.startswith(_ARCHIVE_STARTS):
            raise DataError(NESTED)
        return data

    def _open(self) -> BinaryIO:
        try:
            file = open_regular(self.identity)
        except OSError as error:
            raise DataError(f"the archive cannot be read: {error.strerror or error}", hint="check the file") from None
        if self._stamp and stat_stamp(os.fstat(file.fileno())) != self._stamp:
            file.close()
            raise DataError("the archive was changed meanwhile", hint="start again, and leave it as it is")
        return file


class _Listed(NamedTuple):
    """An entry as the central directory has it."""

    name: str
    raw_name: bytes
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    """Of its local header."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file; sizes in bytes."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    start: int
    """Where its body begins in the archive."""


class _End(NamedTuple):
    """Where the central directory lies."""

    start: int
    length: int
    entries: int


def _read_entries(file: BinaryIO) -> list[_Entry]:
    """All files of the archive, directories left out. Raises DataError."""
    end = _find_end(file)
    file.seek(end.start)
    listed = list(_read_directory(file.read(end.length)))
    if len(listed) != end.entries:
        raise DataError(f"damaged: it lists {len(listed):,} entries and says it has {end.entries:,}")
    _check_totals(listed)
    entries = [entry for one, entry in _locate(file, listed, end.start) if not one.raw_name.endswith(b"/")]
    if not entries:
        raise DataError("the ZIP is empty", hint="give a ZIP that holds JPEG, PNG or WebP pictures")
    _check_distinct(entries)
    return entries


def _by_name(entries: Iterable[_Entry]) -> dict[str, _Entry]:
    """Sorted by name, without the folder that encloses all files but hidden ones."""
    by_name = {entry.name: entry for entry in entries}
    meant = [name for name in by_name if hidden_reason(name) is None]
    folders = {name[: name.find("/") + 1] for name in meant}
    if len(folders) == 1:
        # Hidden ones keep their names, since the same may lie outside of the folder too.
        prefix = folders.pop()
        by_name |= {name.removeprefix(prefix): by_name.pop(name) for name in meant}
    return dict(sorted(by_name.items()))


# --- end and central directory -------------------------------------------------------------------------------------


def _find_end(file: BinaryIO) -> _End:
    length = file.seek(0, os.SEEK_END)
    tail_start = max(0, length - _END.size - _LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    file.seek(0)
    starts_as_zip = file.read(4) in ZIP_STARTS
    at = _rfind_end(tail)
    if at is None:
        if starts_as_zip:
            raise DataError("the ZIP is not complete: its end is missing", hint="download or copy it again")
        raise DataError("this is not a ZIP", hint="give a folder or a ZIP of pictures")
    if not starts_as_zip:
        raise DataError("there is other data in front of the first entry")
    _, disk, start_disk, entries_here, entries, size, start, _ = _END.unpack_from(tail, at)
    end_at = tail_start + at
    if (end64 := _find_end64(file, end_at)) is not None:
        end_at, entries64, size64, start64 = end64
        told = (entries, entries64, 0xFFFF), (size, size64, _IN_ZIP64), (start, start64, _IN_ZIP64)
        if any(narrow not in (wide, most) for narrow, wide, most in told):
            raise DataError("damaged: its two ends disagree")
        entries = entries_here = entries64
        size, start = size64, start64
    if disk not in (0, 0xFFFF) or start_disk not in (0, 0xFFFF) or entries_here != entries:
        raise DataError("this is one part of a split ZIP", hint="unpack all parts and give the folder")
    if entries > MAX_ENTRIES:
        raise DataError(f"{entries:,} entries; at most {MAX_ENTRIES:,} are read", hint=SPLIT)
    if size > MAX_DIRECTORY_BYTES:
        raise DataError(f"its central directory has {size:,} bytes, more than {MAX_DIRECTORY_BYTES:,}")
    if start + size != end_at:
        raise DataError("damaged: its central directory is not where its end says", hint="download or copy it again")
    return _End(start, size, entries)


def _rfind_end(tail: bytes) -> int | None:
    """Where in `tail` the end record is whose comment reaches to the archive's last byte."""
    at = len(tail)
    while (at := tail.rfind(b"PK\x05\x06", 0, at)) >= 0:
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail):
            return at
    return None


def _find_end64(file: BinaryIO, end_at: int) -> tuple[int, int, int, int] | None:
    """(where it begins, entries, bytes and start of the central directory) by the ZIP64 end, if there is one."""
    locator_at = end_at - _LOCATOR64.size
    if locator_at < 0:
        return None
    file.seek(locator_at)
    signature, disk, at, disks = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if signature != b"PK\x06\x07":
        return None
    if disk != 0 or disks > 1:
        raise DataError("this is one part of a split ZIP", hint="unpack all parts and give the folder")
    # The record must reach to its locator: one that points elsewhere shows other readers another archive.
    if at + _END64.size <= locator_at:
        file.seek(at)
        found = _END64.unpack(file.read(_END64.size))
        _, length, *_, entries, size, start = found
        if found[0] == b"PK\x06\x06" and at + 12 + length == locator_at:
            return at, entries, size, start
    raise DataError("damaged: its ZIP64 end is not where its locator says")


def _read_directory(table: bytes) -> Iterator[_Listed]:
    at = count = 0
    while at < len(table):
        count += 1
        if count > MAX_ENTRIES:
            raise DataError(f"more than {MAX_ENTRIES:,} entries", hint=SPLIT)
        if at + _CENTRAL.size > len(table) or table[at : at + 4] != b"PK\x01\x02":
            raise DataError("damaged: its central directory cannot be read", hint="download or copy it again")
        (
            _, _, _, _, _, flags, method, _, _, crc, packed, size,
            name_length, extra_length, comment_length, disk, _, attributes, offset,
        ) = _CENTRAL.unpack_from(table, at)  # fmt: skip
        at += _CENTRAL.size
        raw_name, extra = table[at : at + name_length], table[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if at > len(table) or disk not in (0, 0xFFFF):
            raise DataError("damaged: its central directory cannot be read", hint="download or copy it again")
        name = _checked_name(raw_name, flags)
        try:
            size, packed, offset = _wide(extra, size, packed, offset)
            _check_entry(flags, method, packed, size, attributes >> 16, is_folder=raw_name.endswith(b"/"))
        except DataError as error:
            raise DataError(f"`{shown(name)}`: {error.message}", hint=error.hint) from None
        yield _Listed(name, raw_name, method, crc, packed, size, offset)


def _wide(extra: bytes, *values: int) -> list[int]:
    """`values` with those that 32 bits could not hold taken from the ZIP64 extra field, which has them in order."""
    missing = values.count(_IN_ZIP64)
    if not missing:
        return list(values)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1 and 8 * missing <= length <= len(extra) - at:
            wide = iter(struct.unpack_from(f"<{missing}Q", extra, at))
            return [next(wide) if value == _IN_ZIP64 else value for value in values]
        at += length
    raise DataError("damaged: its ZIP64 sizes are missing")


def _checked_name(raw: bytes, flags: int) -> str:
    """The POSIX path of an entry. Raises DataError for one that could lead anywhere but below the archive."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        if flags & _UTF8:
            raise DataError(f"`{shown(raw.decode('cp437'))}`: its name is not the UTF-8 that it says it is") from None
        # The format's own code page has a character for every byte, so pictures and captions still find each other.
        name = raw.decode("cp437")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if wrong := _wrong_name(name, parts, is_folder=name.endswith("/")):
        raise DataError(f"`{shown(name)}`: {wrong}")
    return "/".join(parts)


def _wrong_name(name: str, parts: list[str], *, is_folder: bool) -> str | None:
    if any(unicodedata.category(char) == "Cc" for char in name):
        return "control characters in its name"
    if "\\" in name:
        return "a backslash in its name, which is a folder on Windows alone"
    if name.startswith("/") or (parts and _DRIVE.match(parts[0])):
        return "an absolute path"
    if ".." in parts:
        return "its path leads out of the archive"
    if any(len(part.encode()) > MAX_COMPONENT_BYTES for part in parts):
        return f"a name of more than {MAX_COMPONENT_BYTES} bytes"
    if len(parts) - (not is_folder) > MAX_DEPTH:
        return f"more than {MAX_DEPTH} folders deep"
    return None if parts or is_folder else "a file without a name"


def _check_entry(flags: int, method: int, packed: int, size: int, mode: int, *, is_folder: bool) -> None:
    """Raises DataError for what is refused whatever the other entries are."""
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError("a link, not a file" if stat.S_ISLNK(mode) else "a device or pipe, not a file")
    if flags & _ENCRYPTED:
        raise DataError("encrypted", hint="make the ZIP again without a password, or unpack it and give the folder")
    if method != _STORED and method not in _OPENERS:
        raise DataError(f"compressed by method {method}; deflate and plain storage are read")
    if is_folder and size:
        raise DataError("a folder that holds data")
    if method == _STORED and packed != size:
        raise DataError("damaged: stored with two different sizes")
    if size > MAX_FILE_BYTES:
        raise DataError(f"{size / 2**20:,.0f} MiB; files up to {MAX_FILE_BYTES // 2**20} MiB are read")
    if size > RATIO_FROM_BYTES and size > MAX_RATIO * packed:
        raise DataError(f"{packed:,} bytes that unpack to {size:,}, as no picture does")


def _check_totals(listed: Iterable[_Listed]) -> None:
    total = sum(one.size for one in listed)
    if total > MAX_UNPACKED_BYTES:
        raise DataError(
            f"it unpacks to {total / 2**30:.1f} GiB; at most {MAX_UNPACKED_BYTES // 2**30} GiB are read", hint=SPLIT
        )


def _check_distinct(entries: Iterable[_Entry]) -> None:
    """Raises DataError for two files that are one on a file system without case, or that writes é another way."""
    seen: dict[str, str] = {}
    for entry in entries:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", entry.name).casefold())
        if key in seen:
            raise DataError(f"`{shown(seen[key])}` and `{shown(entry.name)}`: one name for two entries")
        seen[key] = entry.name


# --- local headers and bodies --------------------------------------------------------------------------------------


def _locate(file: BinaryIO, listed: Iterable[_Listed], limit: int) -> Iterator[tuple[_Listed, _Entry]]:
    """Each entry with the place of its body. Raises DataError unless all lie one after the other from byte 0 on."""
    free_from = 0
    for position, one in enumerate(sorted(listed, key=lambda one: one.offset)):
        header_length = _LOCAL.size + len(one.raw_name)
        if one.offset > 0 and position == 0:
            raise DataError("there is other data in front of the first entry")
        if one.offset < free_from:
            raise DataError(f"`{shown(one.name)}`: it shares its bytes with another entry")
        file.seek(min(one.offset, limit))
        head = file.read(header_length)
        if len(head) < header_length or head[:4] != b"PK\x03\x04":
            raise DataError(f"`{shown(one.name)}`: damaged: there is no header where the central directory says")
        _, _, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(head)
        if name_length != len(one.raw_name) or head[_LOCAL.size :] != one.raw_name or method != one.method:
            raise DataError(f"`{shown(one.name)}`: its own header and the central directory disagree")
        if flags & _ENCRYPTED:
            raise DataError(f"`{shown(one.name)}`: encrypted")
        start = one.offset + header_length + extra_length
        free_from = start + one.packed
        if free_from > limit:
            raise DataError(f"`{shown(one.name)}`: damaged: it reaches into the central directory")
        yield one, _Entry(one.name, one.method, one.crc, one.packed, one.size, start)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_Opener = Callable[[BinaryIO, int], _Decompressor]
"""From the archive, at the start of a body, and the bytes that the body unpacks to."""


def _open_lzma(file: BinaryIO, size: int) -> _Decompressor:
    """Reads the properties in front of the data (APPNOTE 5.8.8)."""
    _, _, packed, dict_size = struct.unpack("<2HBL", file.read(9))
    # No distance reaches back further than the file is long, and a lying dictionary must not claim gigabytes.
    dict_size = max(4096, min(dict_size, size))
    properties = {"dict_size": dict_size, "lc": packed % 9, "lp": packed // 9 % 5, "pb": packed // 45}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, **properties}])


_OPENERS: dict[int, _Opener] = {_DEFLATE: lambda *_: zlib.decompressobj(-zlib.MAX_WBITS)}
_DAMAGE: tuple[type[Exception], ...] = (zlib.error, ValueError, EOFError, OSError, struct.error)
if bz2 is not None:
    _OPENERS[_BZIP2] = lambda *_: bz2.BZ2Decompressor()  # its damage is an OSError
if lzma is not None:
    _OPENERS[_LZMA] = _open_lzma
    _DAMAGE = (*_DAMAGE, lzma.LZMAError)


def _body(file: BinaryIO, entry: _Entry) -> bytes:
    """The bytes of one entry, never more than it says it has. Raises DataError."""
    try:
        file.seek(entry.start)
        data = file.read(entry.size) if entry.method == _STORED else _inflate(file, entry)
    except _DAMAGE as error:
        raise DataError(f"damaged: {error}") from None
    if len(data) < entry.size:
        raise DataError(f"damaged: it ends after {len(data):,} of {entry.size:,} bytes")
    if zlib.crc32(data) != entry.crc:
        raise DataError("damaged: its checksum is wrong")
    return data


def _inflate(file: BinaryIO, entry: _Entry) -> bytes:
    """At most `entry.size` bytes, read from at most `entry.packed`."""
    decompressor = _OPENERS[entry.method](file, entry.size)
    pieces = []
    wanted, end = entry.size, entry.start + entry.packed
    # A decompressor that stops short of what it was asked for has used up its input, so nothing is left inside it.
    while wanted and not decompressor.eof and (packed := file.read(max(0, min(_PIECE_BYTES, end - file.tell())))):
        pieces.append(decompressor.decompress(packed, wanted))
        wanted -= len(pieces[-1])
    return b"".join(pieces)


def shown(name: str) -> str:
    """A name as it can stand in a message: control characters as escapes, and not too long."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
    return text if len(text) <= 120 else f"{text[:60]}…{text[-50:]}"
