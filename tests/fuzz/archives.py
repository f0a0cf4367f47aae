"""ZIPs byte by byte, good ones and such as no honest tool writes: every field can be given a lie."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import random
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

STORED, DEFLATE, BZIP2, LZMA = 0, 8, 12, 14
METHODS = (STORED, DEFLATE, BZIP2, LZMA)
UTF8, ENCRYPTED, DESCRIPTOR = 0x800, 0x1, 0x8
REGULAR = 0o100644 << 16
LINK = (stat.S_IFLNK | 0o777) << 16
IN_ZIP64 = 0xFFFFFFFF

Outcome = Literal["good", "refused", "damaged", "any"]
"""What a trick must lead to: all is read, nothing is, all but one entry is; or one of these."""


@dataclass(frozen=True)
class Entry:
    """One file; None stands for the truth."""

    name: bytes
    data: bytes = b""
    method: int = DEFLATE
    flags: int = UTF8
    attributes: int = REGULAR
    body: bytes | None = None
    """The compressed bytes."""
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    offset: int | None = None
    local_name: bytes | None = None
    local_flags: int | None = None
    local_method: int | None = None
    zip64: bool = False
    """Sizes and offset stand in the ZIP64 extra field."""
    extra: bytes = b""
    disk: int = 0
    only_listed: bool = False
    """In the central directory alone: it shares another entry's bytes by `offset`."""


@dataclass(frozen=True)
class End:
    """What the archive says of itself; None stands for the truth."""

    entries: int | None = None
    size: int | None = None
    start: int | None = None
    disk: int = 0
    comment: bytes = b""
    zip64: bool = False
    locator: int | None = None
    """Where the ZIP64 end is."""
    entries64: int | None = None


def build(entries: Sequence[Entry], end: End = End()) -> bytes:
    """The archive."""
    out = bytearray()
    central = bytearray()
    for entry in entries:
        offset = len(out) if entry.offset is None else entry.offset
        body = compress(entry.data, entry.method) if entry.body is None else entry.body
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        packed = len(body) if entry.packed is None else entry.packed
        if not entry.only_listed:
            local_name = entry.name if entry.local_name is None else entry.local_name
            flags = entry.flags if entry.local_flags is None else entry.local_flags
            method = entry.method if entry.local_method is None else entry.local_method
            late = bool(flags & DESCRIPTOR)
            told = (0, 0, 0) if late else (crc & IN_ZIP64, min(packed, IN_ZIP64), min(size, IN_ZIP64))
            out += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0x21, *told, len(local_name), 0)
            out += local_name + body
            if late:
                out += struct.pack("<4s3L", b"PK\7\x08", crc & IN_ZIP64, len(body), len(entry.data))
        extra = entry.extra
        if entry.zip64:
            extra += struct.pack("<2H3Q", 1, 24, size, packed, offset)
            size = packed = offset = IN_ZIP64
        central += struct.pack(
            "<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, entry.flags, entry.method, 0, 0x21, crc & IN_ZIP64,
            *(min(value, IN_ZIP64) for value in (packed, size)), len(entry.name), len(extra), 0, entry.disk, 0,
            entry.attributes, min(offset, IN_ZIP64),
        )  # fmt: skip
        central += entry.name + extra
    start = len(out)
    out += central
    count = len(entries) if end.entries is None else end.entries
    size = len(central) if end.size is None else end.size
    start = start if end.start is None else end.start
    if end.zip64:
        at = len(out) if end.locator is None else end.locator
        count64 = count if end.entries64 is None else end.entries64
        out += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count64, count64, size, start)
        out += struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        count, size, start = 0xFFFF, IN_ZIP64, IN_ZIP64
    out += struct.pack("<4s4H2LH", b"PK\5\6", end.disk, end.disk, count, count, size, start, len(end.comment))
    return bytes(out + end.comment)


def compress(data: bytes, method: int) -> bytes:
    """`data` as a ZIP holds it; unknown methods leave it as it is."""
    match method:
        case 8:
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            return packer.compress(data) + packer.flush()
        case 12:
            return bz2.compress(data)
        case 14:
            filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 2**16, "lc": 3, "lp": 0, "pb": 2}]
            properties = struct.pack("<2H2BH", 0x0409, 5, 3 + 2 * 45, 0, 1) + b"\0"
            return properties + lzma.compress(data, lzma.FORMAT_RAW, filters=filters)
    return data


@cache
def zeros(size: int, method: int) -> bytes:
    """A bomb's body."""
    return compress(bytes(size), method)


# --- the fuzz ------------------------------------------------------------------------------------------------------

STEMS = ("cat", "Hündin", "猫", "a b", "x" * 60, "emoji 🐈‍⬛", "dot.in.name", "%2e%2e", "CON", "nul", "-rf", "~")
FOLDERS = ("", "", "set", "set/day 1", "a/b/c")
MARK = "flux-ft-fuzz"
"""In every name that tries to get out."""


@dataclass(frozen=True)
class Case:
    """An archive, and what must come of it."""

    data: bytes
    tricks: tuple[str, ...]
    outcome: Outcome
    contents: dict[str, bytes]
    """By the names that a reader shows, where the outcome is "good"."""


def make_archive(rng: random.Random) -> bytes:
    """Some archive: good, hostile in one or several ways, or damaged."""
    return make_case(rng).data


def make_case(rng: random.Random) -> Case:
    """As `make_archive`, with what must come of it."""
    entries = good_entries(rng)
    contents = {entry.name.decode(): entry.data for entry in entries}
    prefix = rng.choice(("", "", "my set/"))
    entries = [replace(entry, name=prefix.encode() + entry.name) for entry in entries]
    end, tricks, outcomes = End(), [], set()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        trick, outcome = rng.choice(TRICKS)
        tricks.append(trick.__name__)
        outcomes.add(outcome)
        entries, end = trick(rng, entries, end)
    data = build(entries, end)
    if rng.random() < 0.2:
        damage = rng.choice(DAMAGES)
        tricks.append(damage.__name__)
        outcomes.add("any")
        data = damage(rng, data)
    common = {name.partition("/")[0] if "/" in name else "" for name in contents}
    if not prefix and len(common) == 1 and (folder := common.pop()):
        contents = {name.removeprefix(f"{folder}/"): content for name, content in contents.items()}
    # Several tricks can undo each other; what one alone leads to is certain.
    outcomes -= {"good"}
    outcome = "good" if not outcomes else outcomes.pop() if len(tricks) == 1 else "any"
    return Case(data, tuple(tricks), outcome, contents)


def good_entries(rng: random.Random) -> list[Entry]:
    names: dict[str, str] = {}
    for _ in range(rng.randint(1, 8)):
        name = f"{rng.choice(FOLDERS)}/{rng.choice(STEMS)}.{rng.choice(('png', 'JPG', 'txt', 'webp', ''))}".strip("/")
        names.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
    return [
        Entry(
            name.encode(),
            rng.randbytes(rng.choice((0, 1, 50, 3000))) + b"na" * rng.choice((0, 200)),
            method=rng.choice(METHODS),
            flags=rng.choice((0, UTF8, UTF8 | DESCRIPTOR)),
            attributes=rng.choice((0, REGULAR, 0x20)),
            zip64=rng.random() < 0.1,
        )
        for name in names.values()
    ]


Trick = Callable[[random.Random, list[Entry], End], tuple[list[Entry], End]]


def _one(change: Callable[[random.Random, Entry], Entry], name: str) -> Trick:
    """A trick that changes one entry."""

    def trick(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
        at = rng.randrange(len(entries))
        return [*entries[:at], change(rng, entries[at]), *entries[at + 1 :]], end

    trick.__name__ = name
    return trick


def _add(make: Callable[[random.Random], Entry], name: str) -> Trick:
    """A trick that adds one entry."""

    def trick(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
        at = rng.randint(0, len(entries))
        return [*entries[:at], make(rng), *entries[at:]], end

    trick.__name__ = name
    return trick


def _end(change: Callable[[random.Random, list[Entry], End], End], name: str) -> Trick:
    def trick(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
        return entries, change(rng, entries, end)

    trick.__name__ = name
    return trick


def escape(rng: random.Random) -> Entry:
    up = "../" * rng.randint(1, 9)
    names = (
        f"{up}{MARK}.png", f"a/{up}{MARK}.png", f"/{MARK}.png", f"//host/share/{MARK}.png", f"C:/{MARK}.png",
        f"c:{MARK}.png", f"..\\..\\{MARK}.png", f"\\\\host\\{MARK}.png", f"C:\\{MARK}.png", f"./../{MARK}.png",
        f"a/../{MARK}.png", f"/tmp/{MARK}.png", "..", f"{MARK}/..", f"./C:/{MARK}.png",
    )  # fmt: skip
    return Entry(rng.choice(names).encode(), b"out")


def odd_name(rng: random.Random) -> Entry:
    names = (
        b"a\0.png",
        b"a\n.png",
        b"\x1b[2J.png",
        b"a\x7f.png",
        b"n" * 300,
        b"d/" * 17 + b"x",
        "ü".encode() * 200,
        b"",
    )
    return Entry(rng.choice(names), b"odd")


def wrong_utf8(rng: random.Random) -> Entry:
    return Entry(b"caf\xe9.png", b"latin", flags=UTF8)


def hidden(rng: random.Random) -> Entry:
    name = rng.choice(("__MACOSX/._x.png", ".DS_Store", "h/.git/x.png", "h/Thumbs.db", "h/desktop.ini", "h/.x.png"))
    return Entry(name.encode(), rng.randbytes(20))


def second_name(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
    name = rng.choice(entries).name.decode(errors="replace")
    form = rng.choice((str, str.swapcase, lambda text: unicodedata.normalize("NFD", text), lambda text: f"./{text}"))
    return [*entries, Entry(form(name).encode(), b"second")], end


def link(rng: random.Random, entry: Entry) -> Entry:
    kind = rng.choice((LINK, stat.S_IFIFO << 16, stat.S_IFCHR << 16, stat.S_IFSOCK << 16))
    return replace(entry, data=b"/etc/passwd", attributes=kind)


def encrypted(rng: random.Random, entry: Entry) -> Entry:
    flags = entry.flags | rng.choice((ENCRYPTED, ENCRYPTED | 0x40, 0x2000))
    return replace(entry, flags=flags, local_flags=rng.choice((None, entry.flags)))


def method(rng: random.Random, entry: Entry) -> Entry:
    return replace(entry, method=rng.choice((1, 6, 9, 93, 95, 98, 99, 0xFFFF)))


def local_differs(rng: random.Random, entry: Entry) -> Entry:
    if rng.random() < 0.5:
        return replace(entry, local_name=rng.choice((b"../" + entry.name, entry.name + b"x", b"")))
    return replace(entry, local_method=STORED if entry.method else DEFLATE)


def bomb(rng: random.Random) -> Entry:
    size, kind = rng.choice((2**24, 2**25)), rng.choice((DEFLATE, BZIP2, LZMA))
    return Entry(b"bomb.png", method=kind, body=zeros(size, kind), size=size, crc=0)


def lying_bomb(rng: random.Random) -> Entry:
    kind = rng.choice((DEFLATE, BZIP2, LZMA))
    body = zeros(2**25, kind)
    return Entry(b"lie.png", method=kind, body=body, size=rng.choice((1, 10, 1000, 2**19, 150 * len(body))), crc=0)


def lying_dictionary(rng: random.Random, entry: Entry) -> Entry:
    body = bytearray(compress(entry.data, LZMA))
    body[5:9] = b"\xff" * 4
    return replace(entry, method=LZMA, body=bytes(body))


def huge(rng: random.Random, entry: Entry) -> Entry:
    size = rng.choice((2**28 + 1, 2**31, 2**32 - 2, 2**40, 2**63, 2**64 - 1))
    return replace(entry, size=size, zip64=True)


def many_big(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
    """No entry is too large, all together are."""
    big = Entry(b"", body=b"", packed=2**21, size=2**28, offset=0, only_listed=True)
    return [*entries, *(replace(big, name=b"big/%d.png" % index) for index in range(17))], end


def wrong_size(rng: random.Random, entry: Entry) -> Entry:
    data = entry.data + b"!"
    if rng.random() < 0.5 and entry.method != STORED:
        return replace(entry, data=data, size=len(data) + rng.choice((-1, 1, 5000)))
    return replace(entry, data=data, crc=zlib.crc32(data) ^ 1)


def garbage(rng: random.Random, entry: Entry) -> Entry:
    data = entry.data + b"some content"
    return replace(entry, data=data, method=rng.choice(METHODS[1:]), body=rng.randbytes(rng.randint(0, 200)))


def shared(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
    """All entries have one body, as in the flattest of the bombs."""
    kernel = replace(entries[0], name=b"kernel", data=bytes(1000), method=DEFLATE, local_name=None, zip64=False)
    others = [replace(kernel, name=b"%d" % n, local_name=b"kernel", offset=0, only_listed=True) for n in range(50)]
    return [kernel, *others], end


def quoted(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
    """A body that quotes the next entry's header, as in Fifield's bomb."""
    inner = Entry(b"inner", b"x" * 100, method=STORED)
    record = build([inner])[: 30 + 5 + 100]
    whole = Entry(b"outer", record, method=STORED)
    return [whole, replace(inner, offset=30 + 5, only_listed=True)], end


def into_directory(rng: random.Random, entries: list[Entry], end: End) -> tuple[list[Entry], End]:
    """The last body reaches into the central directory."""
    last = Entry(b"last", b"y" * 10, method=STORED, packed=50, size=50)
    return [*entries, last], end


def nested(rng: random.Random) -> Entry:
    inner = build([Entry(b"in.png", b"inside")])
    return Entry(rng.choice((b"n/inner.zip", b"n/inner.png", b"n/inner.7z", b"n/inner")), inner)


def pointer(rng: random.Random, entry: Entry) -> Entry:
    return replace(entry, offset=rng.choice((1, 2**31, 2**32 - 2, 2**63 - 1, 2**64 - 1)), zip64=True)


def no_wide_sizes(rng: random.Random, entry: Entry) -> Entry:
    extra = rng.choice((b"", b"\1\0\x18\0", b"\1\0\x08\0" + bytes(8), b"\1", b"\x0a\0\xff\xff"))
    return replace(entry, size=IN_ZIP64, packed=IN_ZIP64, zip64=False, extra=extra)


def folder_with_data(rng: random.Random) -> Entry:
    return Entry(b"folder/", b"data")


def count(rng: random.Random, entries: list[Entry], end: End) -> End:
    return replace(end, entries=rng.choice((0, len(entries) + 1, 20_001, 0xFFFE)))


def directory(rng: random.Random, entries: list[Entry], end: End) -> End:
    lie = rng.choice((0, 1, 45, 2**31, 2**32 - 2))
    return replace(end, size=lie) if rng.random() < 0.5 else replace(end, start=lie)


def disks(rng: random.Random, entries: list[Entry], end: End) -> End:
    return replace(end, disk=rng.choice((1, 7)))


def locator(rng: random.Random, entries: list[Entry], end: End) -> End:
    return replace(end, zip64=True, locator=rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)))


def count64(rng: random.Random, entries: list[Entry], end: End) -> End:
    return replace(end, zip64=True, entries64=rng.choice((0, len(entries) + 1, 20_001, 2**64 - 1)))


def zip64(rng: random.Random, entries: list[Entry], end: End) -> End:
    return replace(end, zip64=True)


def comment(rng: random.Random, entries: list[Entry], end: End) -> End:
    fake = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 3)
    return replace(end, comment=rng.choice((b"made by hand", b"PK\5\6", fake, bytes(0xFFFF))))


def plain_folder(rng: random.Random) -> Entry:
    return Entry(rng.choice((b"folder/", b"a/b/", b"./")), method=STORED, attributes=(stat.S_IFDIR | 0o755) << 16)


TRICKS: tuple[tuple[Trick, Outcome], ...] = (
    (_add(escape, "escape"), "refused"),
    (_add(odd_name, "odd_name"), "refused"),
    (_add(wrong_utf8, "wrong_utf8"), "refused"),
    (_add(hidden, "hidden"), "good"),
    (second_name, "refused"),
    (_one(link, "link"), "refused"),
    (_one(encrypted, "encrypted"), "refused"),
    (_one(method, "method"), "refused"),
    (_one(local_differs, "local_differs"), "refused"),
    (_add(bomb, "bomb"), "refused"),
    (_add(lying_bomb, "lying_bomb"), "any"),
    (_one(lying_dictionary, "lying_dictionary"), "good"),
    (_one(huge, "huge"), "refused"),
    (many_big, "refused"),
    (_one(wrong_size, "wrong_size"), "damaged"),
    (_one(garbage, "garbage"), "damaged"),
    (shared, "refused"),
    (quoted, "refused"),
    (into_directory, "refused"),
    (_add(nested, "nested"), "any"),
    (_one(pointer, "pointer"), "refused"),
    (_one(no_wide_sizes, "no_wide_sizes"), "refused"),
    (_add(folder_with_data, "folder_with_data"), "refused"),
    (_end(count, "count"), "refused"),
    (_end(directory, "directory"), "refused"),
    (_end(disks, "disks"), "refused"),
    (_end(locator, "locator"), "refused"),
    (_end(count64, "count64"), "refused"),
    (_end(zip64, "zip64"), "good"),
    (_end(comment, "comment"), "any"),
    (_add(plain_folder, "plain_folder"), "good"),
)


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def cut_out(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 100) :]


def pasted(rng: random.Random, data: bytes) -> bytes:
    at, start = rng.randrange(len(data)), rng.randrange(len(data))
    return data[:at] + data[start : start + rng.randint(1, 300)] + data[at:]


def polyglot(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"MZ", b"PK00", b"#!/bin/sh\n")) + data


def tail(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\n", rng.randbytes(100), bytes(70_000)))


def not_a_zip(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"", b"PK", b"PK\3\4", b"PK\5\6", rng.randbytes(500), b"PK\5\6" + bytes(18)))


def by_zipfile(rng: random.Random, data: bytes) -> bytes:
    """What a common tool writes, now and then with one byte wrong."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for index in range(rng.randint(1, 5)):
            archive.writestr(f"set/{index}.png", rng.randbytes(200))
    return flipped(rng, out.getvalue()) if rng.random() < 0.5 else out.getvalue()


DAMAGES = (truncated, flipped, cut_out, pasted, polyglot, tail, not_a_zip, by_zipfile)

CASES = int(os.environ.get("FLUX_FT_FUZZ", "300"))
"""How many; 10,000 take a few minutes."""
