"""ZIPs: the same files as a folder gives, and a refusal that names entry, fault and way out for all that is odd."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from fuzz.archives import (
    BZIP2,
    DEFLATE,
    DESCRIPTOR,
    ENCRYPTED,
    LINK,
    LZMA,
    METHODS,
    STORED,
    UTF8,
    End,
    Entry,
    build,
    compress,
    zeros,
)

from flux_ft.data import archive
from flux_ft.data.archive import NESTED, REMAKE, SPLIT, ZipSource
from flux_ft.data.folder import FolderSource
from flux_ft.errors import DataError

TRUE_END = End()


def opened(tmp_path, entries, end=TRUE_END):
    path = tmp_path / "pics.zip"
    path.write_bytes(entries if isinstance(entries, bytes) else build(entries, end))
    return ZipSource(path, "pics.zip")


def refusal(tmp_path, entries, end=TRUE_END):
    with pytest.raises(DataError) as caught:
        opened(tmp_path, entries, end)
    assert caught.value.hint
    return caught.value.message.removeprefix("`pics.zip`: ")


def contents(source):
    return {found.name: source.read(found.name) for found in source.files() if found.skip is None}


def skips(source):
    return {found.name: found.skip for found in source.files() if found.skip}


def zipped(folder: Path, to: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> ZipSource:
    with zipfile.ZipFile(to, "w", method) as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, prefix + path.relative_to(folder).as_posix())
    return ZipSource(to, to.name)


class TestNames:
    def test_folder_zip_and_zip_with_an_enclosing_folder_are_the_same(self, tmp_path):
        folder = tmp_path / "set"
        for name in ("b.png", "a/猫.png", "a/deep/c.txt", "Z.JPG", ".DS_Store", "a/Thumbs.db"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode() * 100)
        plain, enclosed = zipped(folder, tmp_path / "1.zip"), zipped(folder, tmp_path / "2.zip", "my set/")
        told = contents(FolderSource(folder, "set"))
        assert list(told) == ["Z.JPG", "a/deep/c.txt", "a/猫.png", "b.png"]
        assert list(contents(plain).items()) == list(contents(enclosed).items()) == list(told.items())
        assert skips(plain) == {".DS_Store": "hidden file", "a/Thumbs.db": "system file"}
        assert skips(enclosed) == {"my set/.DS_Store": "hidden file", "my set/a/Thumbs.db": "system file"}

    def test_an_enclosing_folder_is_left_out_only_if_all_lie_in_it(self, tmp_path):
        hidden = [Entry(b"__MACOSX/set/._a.png"), Entry(b".DS_Store"), Entry(b"set/.DS_Store")]
        inside = [Entry(b"set/a.png"), Entry(b"set/sub/b.png"), Entry(b"set/", method=STORED)]
        source = opened(tmp_path, [*inside, *hidden])
        assert list(contents(source)) == ["a.png", "sub/b.png"]
        assert skips(source) == {
            ".DS_Store": "hidden file",
            "__MACOSX/set/._a.png": "in a macOS resource folder",
            "set/.DS_Store": "hidden file",
        }
        assert list(contents(opened(tmp_path, [*inside, Entry(b"c.png")]))) == ["c.png", "set/a.png", "set/sub/b.png"]
        assert "Set2/c.png" in contents(opened(tmp_path, [*inside, Entry(b"Set2/c.png")]))
        # One folder alone, not all that could be left out.
        assert list(contents(opened(tmp_path, [Entry(b"a/b/c.png")]))) == ["b/c.png"]
        # A file that is called as the folder is no folder.
        assert list(contents(opened(tmp_path, [Entry(b"set"), Entry(b"set/a.png")]))) == ["set", "set/a.png"]

    def test_names_are_utf8_flagged_or_not_and_otherwise_one_character_a_byte(self, tmp_path):
        shift_jis = "猫.png".encode("shift-jis")
        raw = ["é.png".encode(), "ü.png".encode(), b"caf\xe9.png", b"caf\xe9.txt", shift_jis]
        source = opened(tmp_path, [Entry(raw[0], flags=UTF8), *(Entry(name, flags=0) for name in raw[1:])])
        names = list(contents(source))
        assert {"é.png", "ü.png", "cafΘ.png", "cafΘ.txt", shift_jis.decode("cp437")} == set(names)
        with pytest.raises(DataError):
            source.read("café.png")

    def test_dots_and_double_slashes_are_no_folders(self, tmp_path):
        source = opened(tmp_path, [Entry(b"./", method=STORED), Entry(b"./a.png"), Entry(b".//b//c.png")])
        assert list(contents(source)) == ["a.png", "b/c.png"]

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            (b"../a.png", "`../a.png`: its path leads out of the archive"),
            (b"b/../a.png", "`b/../a.png`: its path leads out of the archive"),
            (b"b/..", "`b/..`: its path leads out of the archive"),
            (b"/etc/a.png", "`/etc/a.png`: an absolute path"),
            (b"//host/a.png", "`//host/a.png`: an absolute path"),
            (b"C:/a.png", "`C:/a.png`: an absolute path"),
            (b"./c:a.png", "`./c:a.png`: an absolute path"),
            (b"b\\a.png", "`b\\a.png`: a backslash in its name, which is a folder on Windows alone"),
            (b"a\0.png", "`a\\x00.png`: control characters in its name"),
            (b"a\x1b[2J\n.png", "`a\\x1b[2J\\n.png`: control characters in its name"),
            (b"caf\xe9.png", "`cafΘ.png`: its name is not the UTF-8 that it says it is"),
            (b"", "``: a file without a name"),
            (b".", "`.`: a file without a name"),
        ],
    )
    def test_names_that_lead_elsewhere_are_refused(self, tmp_path, name, wrong):
        assert refusal(tmp_path, [Entry(b"ok.png"), Entry(name)]) == wrong

    def test_lengths_at_their_limits(self, tmp_path):
        longest = "ü".encode() * 127 + b"x"
        deepest = b"d/" * 16 + b"x.png"
        assert len(contents(opened(tmp_path, [Entry(b"a"), Entry(longest), Entry(deepest)]))) == 3
        assert refusal(tmp_path, [Entry(longest + b"x")]).endswith("a name of more than 255 bytes")
        assert refusal(tmp_path, [Entry(b"d/" + deepest)]).endswith("more than 16 folders deep")

    @pytest.mark.parametrize("second", ["a/é.png", "A/É.PNG", "a/e\u0301.png", "./a/é.png", "a//é.png"])
    def test_one_name_for_two_entries_is_refused(self, tmp_path, second):
        said = refusal(tmp_path, [Entry("a/é.png".encode()), Entry(second.encode())])
        assert said.endswith(": one name for two entries")
        assert refusal(tmp_path, [Entry(b"x"), Entry(b"x")]) == "`x` and `x`: one name for two entries"


class TestRefusals:
    def test_what_is_no_zip(self, tmp_path):
        assert refusal(tmp_path, b"") == "this is not a ZIP"
        assert refusal(tmp_path, b"\x89PNG\r\n\x1a\n" + bytes(500)) == "this is not a ZIP"
        assert refusal(tmp_path, build([])) == "the ZIP is empty"
        assert refusal(tmp_path, [Entry(b"folder/", method=STORED)]) == "the ZIP is empty"

    def test_every_truncation_is_refused(self, tmp_path):
        whole = build([Entry(b"a.png", b"picture"), Entry(b"b.png", b"another")])
        for length in range(len(whole)):
            said = refusal(tmp_path, whole[:length])
            assert said == ("this is not a ZIP" if length < 4 else "the ZIP is not complete: its end is missing")

    def test_missing_or_added_bytes_before_the_end(self, tmp_path):
        whole = build([Entry(b"a.png", b"picture" * 9, method=STORED)])
        moved = "damaged: its central directory is not where its end says"
        assert refusal(tmp_path, whole[:60] + whole[61:]) == moved
        assert refusal(tmp_path, whole[:60] + b"x" + whole[60:]) == moved
        assert refusal(tmp_path, whole + b"x") == "the ZIP is not complete: its end is missing"

    def test_other_data_in_front(self, tmp_path):
        front = "there is other data in front of the first entry"
        assert refusal(tmp_path, b"\x89PNG\r\n\x1a\n" + build([Entry(b"a.png")])) == front
        # With offsets that know of it, as self-extracting archives have.
        for first in (b"MZ" + bytes(60), build([Entry(b"other.png", b"seen by other readers")])):
            whole = bytearray(first + build([Entry(b"a.png", b"x", offset=len(first))]))
            start_at = len(whole) - 6
            struct.pack_into("<L", whole, start_at, struct.unpack_from("<L", whole, start_at)[0] + len(first))
            assert refusal(tmp_path, bytes(whole)) == front

    def test_a_comment_is_no_end(self, tmp_path):
        one = [Entry(b"a.png", b"x")]
        fake = build([])
        for comment in (b"made by hand", b"PK\5\6", b"PK\5\6" + bytes(30), bytes(0xFFFF), fake + b"."):
            assert contents(opened(tmp_path, one, End(comment=comment))) == {"a.png": b"x"}

    @pytest.mark.parametrize(
        ("change", "wrong"),
        [
            ({"attributes": LINK}, "`a.png`: a link, not a file"),
            ({"attributes": stat.S_IFIFO << 16}, "`a.png`: a device or pipe, not a file"),
            ({"flags": ENCRYPTED}, "`a.png`: encrypted"),
            ({"local_flags": ENCRYPTED}, "`a.png`: encrypted"),
            ({"method": 99}, "`a.png`: compressed by method 99; deflate and plain storage are read"),
            ({"local_name": b"b.png"}, "`a.png`: its own header and the central directory disagree"),
            ({"local_name": b"a.pngx"}, "`a.png`: its own header and the central directory disagree"),
            ({"local_method": STORED}, "`a.png`: its own header and the central directory disagree"),
            ({"method": STORED, "size": 3}, "`a.png`: damaged: stored with two different sizes"),
            ({"offset": 7}, "there is other data in front of the first entry"),
            ({"packed": 5000}, "`a.png`: damaged: it reaches into the central directory"),
            ({"disk": 3}, "damaged: its central directory cannot be read"),
            ({"size": 2**28 + 1}, "`a.png`: 256 MiB; files up to 256 MiB are read"),
            ({"size": 0xFFFFFFFF}, "`a.png`: damaged: its ZIP64 sizes are missing"),
            ({"size": 0xFFFFFFFF, "extra": b"\1\0\x08\0"}, "`a.png`: damaged: its ZIP64 sizes are missing"),
            ({"size": 2**20 + 1}, "`a.png`: 11 bytes that unpack to 1,048,577, as no picture does"),
        ],
    )
    def test_an_entry_that_is_odd(self, tmp_path, change, wrong):
        assert refusal(tmp_path, [Entry(b"a.png", b"a picture", **change)]) == wrong

    def test_a_folder_that_holds_data(self, tmp_path):
        assert refusal(tmp_path, [Entry(b"f/", b"x")]) == "`f`: a folder that holds data"

    def test_entries_that_share_bytes(self, tmp_path):
        kernel = Entry(b"a", bytes(1000))
        flat = [kernel, Entry(b"b", bytes(1000), local_name=b"a", offset=0, only_listed=True)]
        assert refusal(tmp_path, flat).endswith("it shares its bytes with another entry")
        inner = Entry(b"inner", b"x" * 100, method=STORED)
        quoted = [
            Entry(b"outer", build([inner])[:135], method=STORED),
            Entry(b"inner", b"x" * 100, method=STORED, offset=35, only_listed=True),
        ]
        assert refusal(tmp_path, quoted) == "`inner`: it shares its bytes with another entry"

    def test_an_offset_without_a_header(self, tmp_path):
        said = "`b`: damaged: there is no header where the central directory says"
        for offset in (72, 2**31, 2**63):
            entries = [Entry(b"a", b"a" * 40, method=STORED), Entry(b"b", b"b", offset=offset, zip64=True)]
            assert refusal(tmp_path, entries) == said

    def test_limits_of_the_whole(self, tmp_path):
        first = Entry(b"first")
        many = [first, *(Entry(b"%d" % index, offset=0, only_listed=True) for index in range(20_000))]
        assert refusal(tmp_path, many) == "20,001 entries; at most 20,000 are read"
        assert refusal(tmp_path, many, End(entries=1)) == "more than 20,000 entries"
        big = [Entry(b"%d" % index, size=2**28, packed=2**21, offset=0, only_listed=True) for index in range(17)]
        assert refusal(tmp_path, [first, *big]) == "it unpacks to 4.2 GiB; at most 4 GiB are read"
        said = "its central directory has 4,294,967,294 bytes, more than 16,777,216"
        assert refusal(tmp_path, [Entry(b"a")], End(size=2**32 - 2)) == said
        with pytest.raises(DataError) as caught:
            opened(tmp_path, many)
        assert caught.value.hint == SPLIT

    def test_an_end_that_lies(self, tmp_path):
        one = [Entry(b"a.png", b"x")]
        assert refusal(tmp_path, one, End(entries=2)) == "damaged: it lists 1 entries and says it has 2"
        assert refusal(tmp_path, one, End(disk=1)) == "this is one part of a split ZIP"
        assert refusal(tmp_path, one, End(start=0)) == "damaged: its central directory is not where its end says"
        lost = "damaged: its ZIP64 end is not where its locator says"
        for locator in (0, 1, 2**31, 2**64 - 1):
            assert refusal(tmp_path, one, End(zip64=True, locator=locator)) == lost
        assert refusal(tmp_path, one, End(zip64=True, entries64=9)) == "damaged: it lists 1 entries and says it has 9"

    def test_a_central_directory_of_other_bytes(self, tmp_path):
        whole = build([Entry(b"a.png", b"x")])
        at = whole.index(b"PK\1\2")
        unread = "damaged: its central directory cannot be read"
        assert refusal(tmp_path, whole[:at] + b"xx" + whole[at + 2 :]) == unread
        # A name, extra field or comment that would reach beyond it.
        for field in (28, 30, 32):
            assert refusal(tmp_path, whole[: at + field] + b"\xff\0" + whole[at + field + 2 :]) == unread
        cut = bytearray(whole[: at + 40] + whole[-22:])
        struct.pack_into("<L", cut, len(cut) - 10, 40)
        assert refusal(tmp_path, bytes(cut)) == unread

    def test_parts_of_a_split_archive(self, tmp_path):
        whole = build([Entry(b"a.png", b"x")])
        for back in (18, 16, 14):  # this disk, the directory's disk, the entries on this one
            part = bytearray(whole)
            struct.pack_into("<H", part, len(part) - back, 3)
            assert refusal(tmp_path, bytes(part)) == "this is one part of a split ZIP"

    def test_a_locator_that_leads_to_no_end(self, tmp_path):
        whole = build([Entry(b"a.png", b"x")], End(zip64=True))
        at = whole.index(b"PK\6\6")
        for wrong, field in ((b"XX", at), (b"\x2d\0", at + 4)):
            part = whole[:field] + wrong + whole[field + 2 :]
            assert refusal(tmp_path, part) == "damaged: its ZIP64 end is not where its locator says"

    def test_two_ends_that_disagree(self, tmp_path):
        whole = bytearray(build([Entry(b"a.png", b"x")], End(zip64=True)))
        struct.pack_into("<2H", whole, len(whole) - 14, 2, 2)
        assert refusal(tmp_path, bytes(whole)) == "damaged: its two ends disagree"
        struct.pack_into("<L", whole, len(whole) - 22 - 4, 2)
        assert refusal(tmp_path, bytes(whole)) == "this is one part of a split ZIP"

    def test_the_way_out_is_told(self, tmp_path):
        (tmp_path / "pics.zip").write_bytes(build([Entry(b"../x.png")]))
        with pytest.raises(DataError) as caught:
            ZipSource(tmp_path / "pics.zip", "data/pics.zip")
        assert caught.value.message == "`data/pics.zip`: `../x.png`: its path leads out of the archive"
        assert caught.value.hint == REMAKE

    def test_a_hostile_name_is_shown_short_and_harmless(self, tmp_path):
        said = refusal(tmp_path, [Entry(("../" + "\u202e🐈" * 200 + "\n").encode())])
        assert said.isprintable()
        assert len(said) < 200


class TestReading:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("size", [0, 1, 70_000, 600_000])
    def test_every_method_gives_the_bytes(self, tmp_path, method, size):
        data = bytes(index * index % 251 for index in range(size))
        entries = [Entry(b"a", b"before"), Entry(b"b", data, method=method, flags=UTF8 | DESCRIPTOR), Entry(b"c", b"c")]
        assert contents(opened(tmp_path, entries)) == {"a": b"before", "b": data, "c": b"c"}

    @pytest.mark.parametrize("method", METHODS)
    def test_what_zipfile_writes_is_read(self, tmp_path, method):
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "ü.png").write_bytes(os.urandom(5000))
        (folder / "empty.txt").touch()
        assert contents(zipped(folder, tmp_path / "x.zip", method=method)) == contents(FolderSource(folder, "set"))

    def test_what_zipfile_streams_as_zip64_is_read(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as out, out.open("a.png", "w", force_zip64=True) as file:
            file.write(b"picture")
        assert contents(ZipSource(tmp_path / "x.zip", "x")) == {"a.png": b"picture"}

    def test_zip64_sizes_and_end(self, tmp_path):
        entries = [Entry(b"a", b"x" * 99, zip64=True, extra=b"\x0a\0\x18\0" + bytes(24)), Entry(b"b", b"y", zip64=True)]
        assert contents(opened(tmp_path, entries, End(zip64=True))) == {"a": b"x" * 99, "b": b"y"}

    def test_damage_costs_one_entry(self, tmp_path):
        data = os.urandom(1000)
        entries = [
            Entry(b"ok", data),
            Entry(b"crc", data, crc=1),
            Entry(b"short", data, size=1001),
            Entry(b"long", data, size=999),
            Entry(b"cut", data, body=compress(data, DEFLATE)[:500]),
            Entry(b"bz2", data, method=BZIP2, body=b"garbage"),
            Entry(b"bz2 cut", data, method=BZIP2, body=compress(data, BZIP2)[:500]),
            Entry(b"lzma", data, method=LZMA, body=b"\x09\x04\x05\x00\xff" + bytes(20)),
            Entry(b"lzma none", data, method=LZMA, body=b""),
        ]
        source = opened(tmp_path, entries)
        reasons = {}
        for found in source.files():
            try:
                assert source.read(found.name) == data
                reasons[found.name] = "read"
            except DataError as error:
                reasons[found.name] = error.message
        assert reasons.pop("ok") == "read"
        assert reasons["crc"] == reasons["long"] == "damaged: its checksum is wrong"
        assert reasons["short"] == "damaged: it ends after 1,000 of 1,001 bytes"
        assert all(reason.startswith("damaged: ") for reason in reasons.values())

    @pytest.mark.parametrize("method", [DEFLATE, BZIP2, LZMA])
    def test_a_size_that_lies_bounds_what_is_unpacked(self, tmp_path, method):
        body = bytearray(zeros(2**24, method))
        if method == LZMA:
            body[5:9] = b"\xff" * 4  # a dictionary of 4 GiB
        source = opened(tmp_path, [Entry(b"a", body=bytes(body), method=method, size=1000, crc=0)])
        tracemalloc.start()
        with pytest.raises(DataError, match="damaged: its checksum is wrong"):
            source.read("a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22, f"{peak:,}"

    def test_what_follows_the_end_of_a_body_is_not_held(self, tmp_path):
        body = compress(b"short", DEFLATE) + bytes(2**24)
        source = opened(tmp_path, [Entry(b"a", body=body, size=100)])
        tracemalloc.start()
        with pytest.raises(DataError, match="damaged: it ends after 5 of 100 bytes"):
            source.read("a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**21, f"{peak:,}"

    def test_archives_inside_are_not_opened(self, tmp_path):
        inner = build([Entry(b"x.png", b"x")])
        source = opened(
            tmp_path, [Entry(b"by name.ZIP", inner), Entry(b"by content.png", inner), Entry(b"a.png", b"a")]
        )
        assert skips(source) == {"by name.ZIP": NESTED}
        with pytest.raises(DataError, match=NESTED):
            source.read("by content.png")
        assert source.read("a.png") == b"a"

    def test_nothing_but_listed_names(self, tmp_path):
        source = opened(tmp_path, [Entry(b"set/a.png")])
        for name in ("set/a.png", "../a.png", "", "b.png"):
            with pytest.raises(DataError, match="no such file in the archive"):
                source.read(name)

    def test_stamps_differ_when_the_archive_or_the_entry_does(self, tmp_path):
        entries = [Entry(b"a.png", b"one"), Entry(b"b.png", b"two")]
        first = [found.stamp for found in opened(tmp_path, entries).files()]
        assert len(set(first)) == 2
        status = os.stat(tmp_path / "pics.zip")
        assert all(
            stamp.startswith(f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}:")
            for stamp in first
        )
        source = ZipSource(tmp_path / "pics.zip", "again")
        assert [found.stamp for found in source.files()] == first
        assert [found.stamp for found in opened(tmp_path, [entries[0], Entry(b"b.png", b"2wo")]).files()] != first

    def test_an_archive_that_is_replaced_or_gone_is_noticed(self, tmp_path):
        source = opened(tmp_path, [Entry(b"a.png", b"one")])
        assert source.read("a.png") == b"one"
        (tmp_path / "new").write_bytes(build([Entry(b"a.png", b"two")]))
        (tmp_path / "new").replace(tmp_path / "pics.zip")
        for use in (lambda: source.read("a.png"), source.files):
            with pytest.raises(DataError, match="the archive was changed meanwhile"):
                use()
        (tmp_path / "pics.zip").unlink()
        with pytest.raises(DataError, match="the archive cannot be read"):
            source.read("a.png")
        with pytest.raises(DataError, match="the archive cannot be read"):
            ZipSource(tmp_path / "pics.zip", "gone")

    def test_twenty_thousand_entries_open_in_bounded_memory(self, tmp_path):
        path = tmp_path / "many.zip"
        path.write_bytes(build([Entry(b"set/%05d.png" % index, b"x", method=STORED) for index in range(20_000)]))
        tracemalloc.start()
        source = ZipSource(path, "many")
        assert sum(1 for _ in source.files()) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * 2**20, f"{peak:,}"
        assert source.read("19999.png") == b"x"


def test_a_python_without_bzip2_and_lzma_refuses_them_alone(tmp_path):
    (tmp_path / "a.zip").write_bytes(build([Entry(b"a", b"deflated")]))
    (tmp_path / "b.zip").write_bytes(build([Entry(b"b", b"b", method=BZIP2)]))
    script = (
        "import sys; sys.modules['bz2'] = sys.modules['lzma'] = None\n"
        "from flux_ft.data.archive import ZipSource\n"
        "from flux_ft.errors import DataError\n"
        "assert ZipSource('a.zip', 'a').read('a') == b'deflated'\n"
        "try: ZipSource('b.zip', 'b')\n"
        "except DataError as error: print(error.message)\n"
    )
    root = str(Path(archive.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "`b`: `b`: compressed by method 12; deflate and plain storage are read\n"
