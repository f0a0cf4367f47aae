"""The index of earlier scans: kept, shared, pruned, and never in the way."""

import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flux_ft.data import index as index_module
from flux_ft.data.index import DAYS_KEPT, Entry, ScanIndex, default_index_path, is_settled, scan_key

DAY_S = 86400
ENTRY = Entry({"width_px": 640, "notes": ["first of 3 frames"], "phash": 2**64 - 1}, b"\xff\xd8")


def at_day(day):
    return lambda: day * DAY_S


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "scans.sqlite3"


def remember(path, **entries):
    with ScanIndex(path) as index:
        for key, entry in entries.items():
            index.put(key, entry)


def known(path, *keys):
    with ScanIndex(path) as index:
        return index.get_many(keys)


def test_entries_are_there_at_once_and_next_time(path):
    reason = Entry({"reason": "damaged: it ends too early"})
    with ScanIndex(path) as index:
        index.put("a", ENTRY)
        index.put("b", reason)
        assert index.get("a") == ENTRY
        assert index.get("c") is None
    assert known(path, "a", "b", "c") == {"a": ENTRY, "b": reason}


def test_an_entry_is_replaced(path):
    remember(path, a=ENTRY)
    remember(path, a=Entry({"reason": "no picture"}))
    assert known(path, "a") == {"a": Entry({"reason": "no picture"})}


def test_what_comes_back_does_not_depend_on_whether_it_was_written_yet(path):
    with ScanIndex(path) as index:
        index.put("a", Entry({"bucket": (64, 64)}))
        before = index.get("a")
    assert before == known(path, "a")["a"] == Entry({"bucket": [64, 64]})


def test_facts_that_json_lacks_are_told_where_they_are_put(path):
    with ScanIndex(path) as index, pytest.raises(TypeError):
        index.put("a", Entry({"path": Path()}))


def test_entries_not_asked_for_are_dropped_and_others_stay(path):
    with ScanIndex(path, at_day(100)) as index:
        index.put("asked", ENTRY)
        index.put("forgotten", ENTRY)
    with ScanIndex(path, at_day(101 + DAYS_KEPT // 2)) as index:
        assert index.get("asked") == ENTRY
    with ScanIndex(path, at_day(101 + DAYS_KEPT)) as index:
        index.put("new", ENTRY)
    assert known(path, "asked", "forgotten", "new") == {"asked": ENTRY, "new": ENTRY}


def test_the_file_stays_below_its_size_and_the_oldest_go_first(path):
    limit = 1_000_000
    for day in range(4):
        with ScanIndex(path, at_day(day), largest_bytes=limit) as index:
            for number in range(40):
                index.put(f"{day}-{number}", Entry({}, random.randbytes(10_000)))
    assert path.stat().st_size < 1.5 * limit
    days = [key[0] for key in known(path, *(f"{day}-{number}" for day in range(4) for number in range(40)))]
    assert days.count("3") == 40
    assert days.count("0") == 0


def test_one_entry_too_large_is_dropped_alone(path):
    with ScanIndex(path, largest_bytes=200_000) as index:
        index.put("large", Entry({}, bytes(1_000_000)))
    remember(path, a=ENTRY)
    assert known(path, "large", "a") == {"a": ENTRY}


@pytest.mark.parametrize(
    "content",
    [b"", b"not a database", b"SQLite format 3\x00" + bytes(4096), random.Random(0).randbytes(20_000)],
    ids=len,
)
def test_a_damaged_file_is_started_anew(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    remember(path, a=ENTRY)
    assert known(path, "a") == {"a": ENTRY}


def test_damage_inside_costs_the_entries_and_nothing_else(path):
    remember(path, **{f"k{number}": Entry({"number": number}, random.randbytes(3000)) for number in range(300)})
    data = bytearray(path.read_bytes())
    data[4096 : len(data) // 2] = random.randbytes(len(data) // 2 - 4096)
    path.write_bytes(data)
    assert all(
        entry.facts == {"number": int(key[1:])} for key, entry in known(path, *(f"k{n}" for n in range(300))).items()
    )
    remember(path, a=ENTRY)
    assert known(path, "a") == {"a": ENTRY}


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
def test_a_torn_file_is_started_anew(path, keep):
    remember(path, **{f"k{number}": Entry({}, random.randbytes(3000)) for number in range(100)})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    remember(path, a=ENTRY)
    assert known(path, "a") == {"a": ENTRY}


@pytest.mark.parametrize("layout", [0, 1, 99])
def test_the_database_of_another_program_is_started_anew(path, layout):
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE files (other)")
    other.execute(f"PRAGMA user_version = {layout}")
    other.commit()
    other.close()
    remember(path, a=ENTRY)
    assert known(path, "a") == {"a": ENTRY}


@pytest.mark.parametrize(
    "change",
    [
        "facts = '{}'",
        "facts = '[]'",
        "facts = 5",
        "facts = x'ff00'",
        "facts = replace(facts, '640', '641')",
        "thumbnail = 5",
        "thumbnail = x'ffd9'",
        "thumbnail = NULL",
        "crc = NULL",
    ],
)
def test_a_damaged_row_is_not_known(path, change):
    remember(path, a=ENTRY)
    db = sqlite3.connect(path)
    db.execute(f"UPDATE files SET {change}")
    db.commit()
    db.close()
    assert known(path, "a") == {}
    remember(path, a=ENTRY)
    assert known(path, "a") == {"a": ENTRY}


def test_where_nothing_can_be_written_the_index_is_empty(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (None, tmp_path, tmp_path / "file" / "scans.sqlite3", Path("a\0b")):
        remember(path, **{f"k{number}": ENTRY for number in range(500)})
        assert known(path, "k0") == {}
    assert tmp_path.is_dir()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_gives_an_empty_index(tmp_path):
    tmp_path.chmod(0o500)
    remember(tmp_path / "scans.sqlite3", a=ENTRY)
    assert known(tmp_path / "scans.sqlite3", "a") == {}


def test_a_full_disk_keeps_what_was_there_and_raises_nothing(path):
    remember(path, a=ENTRY)
    with ScanIndex(path) as index:
        index._db.execute("PRAGMA max_page_count = 8")  # what SQLite says when the disk is full: SQLITE_FULL
        for number in range(500):
            index.put(f"k{number}", Entry({}, bytes(5000)))
        assert index.get("a") == ENTRY
        assert index.get("k0") is None
    assert known(path, "a") == {"a": ENTRY}


def test_a_lock_that_stays_is_waited_for_once(path, monkeypatch):
    monkeypatch.setattr(index_module, "_BUSY_S", 0.1)
    remember(path, a=ENTRY)
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    started = time.perf_counter()
    with ScanIndex(path) as index:
        assert index.get("a") == ENTRY
        for number in range(5000):
            index.put(f"k{number}", ENTRY)
    assert time.perf_counter() - started < 1
    other.close()
    assert known(path, "a", "k0") == {"a": ENTRY}


WRITER = """
import sys
from pathlib import Path
from flux_ft.data.index import Entry, ScanIndex
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with ScanIndex(path) as index:
    for number in range(count):
        index.put(f"{name}-{number}", Entry({"number": number}, bytes(500)))
        if number == 1000:
            print("under way", flush=True)
"""


def start_writer(path, name, count):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE)


def test_several_processes_write_at_once(path):
    writers = [start_writer(path, name, 600) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.stdout.close()
    keys = [f"{name}-{number}" for name in "abc" for number in range(600)]
    assert {key: entry.facts["number"] for key, entry in known(path, *keys).items()} == {
        key: int(key[2:]) for key in keys
    }


def test_indexes_that_are_opened_at_once_make_one_file(tmp_path):
    for number in range(100):
        path, start = tmp_path / str(number) / "scans.sqlite3", threading.Barrier(4)

        def write(key, path=path, start=start):
            start.wait()
            remember(path, **{key: ENTRY})

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, "abcd"))
        assert set(known(path, *"abcd")) == set("abcd")


def test_a_kill_loses_the_last_batch_at_most(path):
    writer = start_writer(path, "a", 10**9)
    assert writer.stdout.readline().strip() == b"under way"
    writer.kill()
    writer.wait()
    writer.stdout.close()
    found = known(path, *(f"a-{number}" for number in range(1000)))
    assert len(found) == 1000
    assert all(entry == Entry({"number": int(key[2:])}, bytes(500)) for key, entry in found.items())


def test_a_closed_index_is_empty(path):
    remember(path, a=ENTRY)
    index = ScanIndex(path)
    index.close()
    index.close()
    assert index.get("a") is None


def test_asking_is_fast(path):
    keys = [scan_key(str(number)) for number in range(5000)]
    with ScanIndex(path) as index:
        for key in keys:
            index.put(key, Entry({"digest": key, "buckets": [[1024, 1024]], "signals": {"phash": 2**63}}))
    with ScanIndex(path) as index:
        started = time.perf_counter()
        assert len(index.get_many(keys)) == 5000
        assert (time.perf_counter() - started) / 5000 < 200e-6  # measured: 10 µs


def test_keys_differ_when_any_part_does():
    assert scan_key("a", "b") == scan_key("a", "b")
    assert len({scan_key(*parts) for parts in (("ab",), ("a", "b"), ("b", "a"), ("a", "b", ""), (), ("",))}) == 6
    assert scan_key("caf\udce9.jpg") != scan_key("café.jpg")


SECOND_NS = 10**9


@pytest.mark.parametrize(
    ("mtime_s", "ctime_s", "settled"),
    [
        (0, 0, True),
        (97, 97, True),
        (99, 99, False),
        (100, 100, False),
        (0, 99, False),
        (101, 0, False),
        (9999, 0, True),
    ],
)
def test_a_file_changed_just_now_is_not_settled(mtime_s, ctime_s, settled):
    stamp = f"5:{mtime_s * SECOND_NS}:{ctime_s * SECOND_NS}:77"
    assert is_settled(stamp, 100 * SECOND_NS) is settled


def test_a_stamp_of_another_form_is_taken_at_its_word():
    assert is_settled("crc32-9f3a", 0)
    assert is_settled("5:-1:-1:77", 100 * SECOND_NS)


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "home/.cache/flux_ft"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/flux_ft"),
        ("darwin", {}, "home/Library/Caches/flux_ft"),
        ("win32", {}, "home/AppData/Local/flux_ft"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/flux_ft"),
        ("linux", {"FLUX_FT_CACHE": "mine"}, "mine"),
        ("linux", {"FLUX_FT_CACHE": ""}, "home/.cache/flux_ft"),
    ],
)
def test_the_index_lies_in_the_users_cache(platform, environment, expected):
    found = default_index_path(environment, platform, Path("home"))
    assert found.parent == Path(expected)
    assert found.suffix == ".sqlite3"


def test_an_absolute_cache_folder_is_taken(tmp_path):
    found = default_index_path({"XDG_CACHE_HOME": str(tmp_path)}, "linux", Path("home"))
    assert found.parent == tmp_path / "flux_ft"
