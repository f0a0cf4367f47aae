"""When a run must end early: Ctrl-C and SIGTERM, in one process or many, and a limit of time. Loads without torch."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flux_ft import log
from flux_ft.errors import ConfigError

LAUNCH_FOLDER = "FLUX_FT_LAUNCH_FOLDER"
"""Names, in the environment of the processes that `launch` starts, the folder by which they and it speak."""
STOP_FILE, LISTENS = "stop", "listens-"
"""In that folder: there once the run shall stop; and there for each process while it would hear that."""
ECHO_S = 1.0
"""Signals this close to the first are the same request: clusters and launchers pass on what also came directly."""
STOPPING = "stopping after this step; press Ctrl-C again to stop at once without saving"

Clock = Callable[[], float]
_PARENT_PID = os.getppid()


class StopSignal:
    """What one person's, or one cluster's, several signals mean: the first asks, its echoes say nothing new."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the run shall stop."""
        return self._asked_at is not None

    def hear(self) -> bool:
        """Take in a signal; True for the first. Raises KeyboardInterrupt for one that is later than its echoes."""
        now = self._clock()
        if self._asked_at is None:
            self._asked_at = now
            return True
        if now - self._asked_at > ECHO_S:
            raise KeyboardInterrupt
        return False


@contextmanager
def on_signals(handle: Callable[[], None]) -> Iterator[None]:
    """Call `handle` at Ctrl-C and SIGTERM. Nothing outside the main thread, where no signal arrives."""

    def heard(_number: int, _frame: Any) -> None:
        handle()

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in kept:
            signal.signal(number, heard)
    except ValueError:  # a notebook's executor, a server
        kept = {}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests(clock: Clock = time.monotonic) -> Iterator[Callable[[], bool]]:
    """A function that says, step by step, whether to stop: Ctrl-C or SIGTERM asks; a later one ends at once, unsaved.

    One of several processes also stops when its launcher is gone. `launch` tells those that it started by a file, since
    signals may reach them directly too, and it speaks for them.
    """
    stop = StopSignal(clock)
    folder = launch_folder()
    told = [] if folder is None else [folder / STOP_FILE]
    listens = [] if folder is None else [folder / f"{LISTENS}{os.environ['RANK']}"]

    def heard() -> None:
        if stop.hear() and folder is None:
            log.say(STOPPING)

    def asked() -> bool:
        return stop.asked or any(file.exists() for file in told) or is_orphaned()

    with on_signals(heard):
        for file in listens:
            file.touch()
        try:
            yield asked
        finally:
            for file in () if asked() else listens:  # who has heard may end before the launcher has heard the same
                file.unlink(missing_ok=True)


def launch_folder() -> Path | None:
    """The folder of the `launch` that started this process; None in any other process."""
    return Path(os.environ[LAUNCH_FOLDER]) if LAUNCH_FOLDER in os.environ and "RANK" in os.environ else None


def is_orphaned() -> bool:
    """Whether the launcher of this process was killed; one without a launcher may well outlive the shell it came from.

    Not known on Windows, where a parent's number stays.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT_PID


class TimeLimit:
    """Says, once a step, whether another step and a save would pass the limit. The time starts with this object."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._asked_at: float | None = None
        self._longest_step = self._longest_save = 0.0

    def note_save(self, seconds: float) -> None:
        """Take in how long a save has taken."""
        self._longest_save = max(self._longest_save, seconds)

    def is_up(self) -> bool:
        """Whether to save and end now. Judged by the longest time between two calls, previews and all, so far."""
        now = self._clock()
        if self._asked_at is not None:
            self._longest_step = max(self._longest_step, now - self._asked_at)
        self._asked_at = now
        return now + self._longest_step + self._longest_save >= self._end


_IN_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_IN_COLONS = re.compile(r"(?:(?:(\d+)-)?(\d{1,2}):)?(\d{1,2}):(\d{2})")


def parse_duration(text: str) -> int:
    """Seconds of `3h50m`, `90m`, `1d`, or of a time as clusters write it: [[days-]hours:]minutes:seconds.

    Raises ConfigError.
    """
    found = _IN_UNITS.fullmatch(text.strip().lower()) or _IN_COLONS.fullmatch(text.strip())
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(
            f"`--max-time {text}` is not a length of time",
            hint="write for example 3h50m, 90m, 45s, 2-03:00:00 or 03:50:00 (hours:minutes:seconds)",
        )
    return total
