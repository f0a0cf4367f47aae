"""Words for people go to stderr; data goes to stdout; one JSON line a step goes to metrics.jsonl."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flux_ft.files import write_whole

PLAIN_LINE_EVERY_S = 1.0
"""Where there is no terminal, a bar says nothing more often than this: what takes no time needs no lines."""

# Of several processes, the first speaks for all.
console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def say(message: str) -> None:
    """One line for people."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """One warning for people."""
    console.print(f"warning: {message}", style="yellow", markup=False)


def command(*words: str) -> str:
    """A call of flux-ft that can be pasted into this machine's shell, whether or not the environment is on its path."""
    program = "flux-ft" if shutil.which("flux-ft") else str(Path(sys.executable).with_name("flux-ft"))
    line = [program, *words]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Bar]:
    """A bar with rate and ETA on a terminal, at most about twenty plain lines elsewhere. `total` None = not known."""
    bar = Bar(title, total)
    with bar:
        yield bar


class Bar:
    """Counts towards `total`; `advance(n, note)` moves it and shows a short note beside it."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self._skipped = 0
        self._rich: Progress | None = None
        if console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=console,
            )  # fmt: skip
            self._task = self._rich.add_task(title, total=total, note="")

    def __enter__(self) -> Bar:
        self._started = self._told = time.monotonic()
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich:
            self._rich.stop()

    def skip(self, count: int) -> None:
        """Count `count` as done before the start, so that rate and ETA speak of what is left."""
        self.done, self._skipped = count, count
        if self._rich:
            self._rich.update(self._task, completed=count)

    def advance(self, count: int = 1, note: str = "") -> None:
        before, self.done = self.done, self.done + count
        now = time.monotonic()
        rate = (self.done - self._skipped) / max(1e-9, now - self._started)
        if self._rich:
            self._rich.update(self._task, advance=count, note=f"{rate:.2f}/s  {note}")
        elif self._is_worth_a_line(before, now):
            self._told = now
            of = f"/{self.total}" if self.total else ""
            eta = f"  ETA {(self.total - self.done) / rate:.0f} s" if self.total else ""
            say(f"{self.title} {self.done}{of}  {rate:.2f}/s{eta}  {note}".rstrip())

    def _is_worth_a_line(self, before: int, now: float) -> bool:
        if self.done == self.total:
            return now - self._started >= PLAIN_LINE_EVERY_S
        every = max(1, self.total // 20) if self.total else 1
        return now - self._told >= PLAIN_LINE_EVERY_S and before // every != self.done // every


class MetricsFile:
    """Appends one JSON object a line; after a resume, lines past `step` are dropped first so none is told twice.

    What a full disk does not take is kept and written with a later line: training does not end for its diary.
    """

    def __init__(self, path: Path, resume_step: int = 0, keep: Callable[[dict[str, Any]], bool] = bool) -> None:
        """`keep` may drop more of the earlier rows."""
        kept = [line for line, row in metrics_rows(path) if 0 <= row["step"] <= resume_step and keep(row)]
        write_whole(path, "".join(kept if resume_step else []).encode())
        self._path, self._pending = path, b""
        self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        was_stuck = bool(self._pending)
        self._pending += json.dumps(row).encode() + b"\n"
        self._flush(tell=not was_stuck)

    def close(self) -> None:
        self._flush(tell=False)
        if self._pending:
            warn(f"the last {self._pending.count(10)} lines of `{self._path}` could not be written")
        self._file.close()

    def _flush(self, tell: bool) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if tell:
                warn(f"cannot write `{self._path}`: {error.strerror or error}; its lines are kept until there is space")


def metrics_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with what it says; one that a crash of the machine has spoilt is left out."""
    for line in path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            row["step"] = int(row["step"])
            if line.endswith("\n"):
                yield line, row
