"""What earlier scans found, so that an unchanged file is not decoded again. Only a speed-up: it never fails.

A SQLite file that several processes share. Where it cannot be written or read it is an empty index; where it is
damaged, or is not ours, it is removed and started anew. Loads without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flux_ft.files import cache_folder

DAYS_KEPT = 90
"""An entry that was not asked for in as many days is dropped."""
LARGEST_BYTES = 1 << 30
"""Past this size the entries that were asked for longest ago go first."""
SETTLED_NS = 2_000_000_000
"""FAT, the coarsest clock among file systems, counts times in 2 s."""

_OURS, _LAYOUT = 0x666C7578, 2
_COLUMNS = "key, used, facts, thumbnail, crc"
_BATCH = 200
_BUSY_S = 5.0
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_STAMP = re.compile(r"\d+:(-?\d+):(-?\d+):\d+")
_T = TypeVar("_T")
_Row = tuple[str, int, str, bytes | None, int]


@dataclass(frozen=True)
class Entry:
    """What is known of one file: how it was read, or why it could not be."""

    facts: dict[str, Any]
    """Only what JSON has."""
    thumbnail: bytes | None = None


class _ForeignError(sqlite3.DatabaseError):
    """A SQLite file of another layout or another program."""


class ScanIndex:
    """Entries by key. For one thread; several processes may share the file.

    Puts are written in batches and on `close`; a kill loses the last batch and nothing else. `path` None is an index
    that keeps nothing. `clock` gives seconds since 1970.
    """

    def __init__(
        self, path: Path | None, clock: Callable[[], float] = time.time, largest_bytes: int = LARGEST_BYTES
    ) -> None:
        self._path, self._today, self._largest_bytes = path, int(clock() // 86400), largest_bytes
        self._new: dict[str, _Row] = {}
        self._asked: set[str] = set()
        self._db: sqlite3.Connection | None = None
        self._writable = True
        self._open()

    def get(self, key: str) -> Entry | None:
        """What is known of `key`, or None."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, Entry]:
        """What is known of `keys`; those of which nothing is known are left out."""
        wanted = list(dict.fromkeys(keys))
        rows = [self._new[key] for key in wanted if key in self._new]
        rest = [key for key in wanted if key not in self._new]
        for start in range(0, len(rest), _BATCH):
            rows += self._ask(partial(_select, keys=rest[start : start + _BATCH])) or []
        found = {}
        for key, used, facts, thumbnail, checksum in rows:
            with suppress(TypeError, ValueError, RecursionError):
                if _checksum(key, facts, thumbnail) != checksum:
                    continue
                found[key] = Entry(json.loads(facts), thumbnail)
                if used != self._today:
                    self._asked.add(key)
        return found

    def put(self, key: str, entry: Entry) -> None:
        """Remember `entry` in place of a former one. Raises TypeError for facts that JSON does not have."""
        facts = json.dumps(entry.facts)
        self._new[key] = (key, self._today, facts, entry.thumbnail, _checksum(key, facts, entry.thumbnail))
        if len(self._new) >= _BATCH:
            self._write()

    def close(self) -> None:
        """Write what is pending, and drop what is old. A closed index is empty."""
        self._write(last=True)
        self._shut()

    def __enter__(self) -> ScanIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, last: bool = False) -> None:
        rows, asked = list(self._new.values()), [(self._today, key) for key in self._asked]
        self._new, self._asked = {}, set()
        if not self._writable or not (rows or asked):
            return

        def store(db: sqlite3.Connection) -> bool:
            with db:
                db.executemany(f"INSERT OR REPLACE INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)", rows)
                db.executemany("UPDATE files SET used = ? WHERE key = ?", asked)
                if last:
                    db.execute("DELETE FROM files WHERE used < ?", (self._today - DAYS_KEPT,))
                _shrink(db, self._largest_bytes)
            return True

        # A disk that is full, or a lock held for so long, would cost its wait at every batch.
        self._writable = bool(self._ask(store))

    def _ask(self, question: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """The answer, or None where there is none to be had."""
        for _ in range(2):
            if self._db is None:
                return None
            try:
                return question(self._db)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    return None
                self._shut()
                self._start_anew()
        return None

    def _open(self) -> None:
        try:
            self._db = _connect(self._path)
        except sqlite3.Error as error:
            if _is_damage(error):
                self._start_anew()
        except (OSError, ValueError):
            pass

    def _start_anew(self) -> None:
        if self._path is None:
            return
        with suppress(OSError, ValueError, sqlite3.Error):
            # The log first: a new file must not be given an old log.
            for ending in ("-wal", "-shm", "-journal", ""):
                self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
            self._db = _connect(self._path)

    def _shut(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None


def scan_key(*parts: str) -> str:
    """One key for `parts`; no two lists of parts share one."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")  # names of files need not be valid UTF-8
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def is_settled(stamp: str, now_ns: int) -> bool:
    """Whether what was read at `now_ns` under `stamp` may be remembered: no later change can leave the stamp as it is.

    A file that was changed within the tick of its file system's clock before it was read can change once more within
    that tick. Such files are scanned again, as git does with its index ("racy git"). `now_ns` is the clock just before
    the bytes are read. A folder's stamps are "size:mtime_ns:ctime_ns:inode"; any other stamp is taken at its word.
    """
    times = _STAMP.fullmatch(stamp)
    return times is None or all(abs(now_ns - int(one)) >= SETTLED_NS for one in times.groups())


def default_index_path(
    environment: Mapping[str, str] = os.environ, platform: str = sys.platform, home: Path | None = None
) -> Path | None:
    """Where the index is: in the user's `cache_folder`; None without one."""
    folder = cache_folder(environment, platform, home)
    return folder and folder / f"scans-{_LAYOUT}.sqlite3"


def _connect(path: Path | None) -> sqlite3.Connection | None:
    """An open index, made if it is missing. Raises OSError, ValueError, sqlite3.Error."""
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=_BUSY_S)
    try:
        with suppress(sqlite3.OperationalError):  # a network's file system has no WAL, and needs none
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA journal_size_limit = 4000000")
        # All marks in one transaction: a file that another process makes between two of them looks foreign.
        with db:
            db.execute("BEGIN")
            ours = _is_ours(db)
        if not ours:
            with db:
                db.execute("BEGIN IMMEDIATE")
                if not _is_ours(db):  # another process may have been faster
                    db.execute(f"CREATE TABLE files ({_COLUMNS}, PRIMARY KEY (key))")
                    db.execute("CREATE INDEX files_by_use ON files (used)")
                    db.execute(f"PRAGMA application_id = {_OURS}")
                    db.execute(f"PRAGMA user_version = {_LAYOUT}")
    except BaseException:
        db.close()
        raise
    return db


def _is_ours(db: sqlite3.Connection) -> bool:
    """False for a new, empty file. Raises _ForeignError."""
    marks = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if marks == (_OURS, _LAYOUT):
        return True
    if marks != (0, 0) or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise _ForeignError
    return False


def _checksum(key: str, facts: str, thumbnail: bytes | None) -> int:
    """SQLite keeps none, and takes flipped bits for what was written. Raises TypeError for values of other kinds."""
    return zlib.crc32(thumbnail or b"", zlib.crc32(f"{key};{facts};".encode()))


def _select(db: sqlite3.Connection, keys: Sequence[str]) -> list[_Row]:
    marks = ",".join("?" * len(keys))
    return db.execute(f"SELECT {_COLUMNS} FROM files WHERE key IN ({marks})", keys).fetchall()


def _shrink(db: sqlite3.Connection, largest_bytes: int) -> None:
    """Drop a quarter of the entries, those asked for longest ago, as often as needed."""
    while _used_bytes(db) > largest_bytes:
        (count,) = db.execute("SELECT count(*) FROM files").fetchone()
        if not count:
            return
        oldest = "SELECT rowid FROM files ORDER BY used, rowid LIMIT ?"
        db.execute(f"DELETE FROM files WHERE rowid IN ({oldest})", (-(-count // 4),))


def _used_bytes(db: sqlite3.Connection) -> int:
    size, count, free = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
    )
    return int(size * (count - free))


def _is_damage(error: sqlite3.Error) -> bool:
    return isinstance(error, _ForeignError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
