"""Saving beside the training: a state is copied to host memory at once and written by a thread, one at a time.

A save that fails does not end the run: it is tried again with the state of a later step, after longer and longer waits,
and only when the last try has failed does the run end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from flux_ft import log
from flux_ft.errors import StorageError

AGAIN_AFTER_S = (30.0, 120.0, 480.0)
"""Waits between the tries of a save that fails: some ten minutes in which a disk can be cleared."""
AT_ONCE = 2
"""More tries where nothing can be waited for, at a stop."""


@dataclass(frozen=True)
class Job:
    """What writes a state."""

    write: Callable[[], object]
    beside: bool = True
    """The state was copied, so that training may go on meanwhile."""


class Saver:
    """Takes a state by `prepare(step)`, which returns what writes it, and lets that run on a thread."""

    def __init__(
        self,
        prepare: Callable[[int], Job],
        *,
        clock: Callable[[], float] = time.monotonic,
        again_after: tuple[float, ...] = AGAIN_AFTER_S,
        saved_step: int | None = None,
    ) -> None:
        self._prepare, self._clock, self._again_after = prepare, clock, again_after
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step, self._started, self._ended = 0, 0.0, 0.0
        self._failures, self._again_at = 0, 0.0
        self.saved_step = saved_step
        """The last step that is known to be saved; at first that of the checkpoint that the run goes on from."""
        self.longest_s = 0.0
        """That a save has taken."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._join()
        elif not issubclass(kind, KeyboardInterrupt) and self._thread is not None:
            self._thread.join()  # its own failure would hide the first; who presses Ctrl-C twice does not wait

    def save(self, step: int, at_once: bool = True) -> None:
        """Begin to save the state after `step` steps; waits while an earlier one is still being written.

        Unless `at_once`, nothing is begun after a failure, which has its own time to be tried again: not asked of the
        clock here, since processes that write together must all begin or none.
        """
        self._join()
        if at_once or self._error is None:
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._step, self._started, self._error = step, self._clock(), None
        job = self._prepare(step)

        def run() -> None:
            try:
                job.write()
            except BaseException as error:  # noqa: BLE001 (raised where the thread is joined)
                self._error = error
            self._ended = self._clock()

        # A daemon: at the second Ctrl-C nothing waits for it, and what it has not finished is not there.
        self._thread = threading.Thread(target=run, name="flux_ft save", daemon=True)
        self._thread.start()
        if not job.beside:
            self._join()

    def is_due_again(self) -> bool:
        """Whether a save that failed should now be tried again.

        Raises StorageError when it has been tried often enough, and at once what is no trouble with the disk.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        if self._error is None:
            return False
        if self._failures > len(self._again_after):
            raise self._error
        return self._clock() >= self._again_at

    def finish(self, step: int) -> None:
        """See to it that the state after `step` steps is saved. Raises StorageError if it cannot be."""
        self._join(tries_later=False)
        for _ in range(AT_ONCE):
            if self.saved_step != step:
                self._begin(step)
                self._join(tries_later=False)
        if self._error is not None:
            raise self._error

    def _join(self, tries_later: bool = True) -> None:
        """Wait for the thread, and take in how it went."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self.longest_s = max(self.longest_s, self._ended - self._started)
        if self._error is None:
            self.saved_step, self._failures = self._step, 0
            return
        if not isinstance(self._error, StorageError):
            raise self._error
        if tries_later and self._failures < len(self._again_after):
            wait = self._again_after[self._failures]
            self._again_at = self._clock() + wait
            log.warn(f"{self._error.message}. The run goes on and tries again in {wait:.0f} s: free some disk space")
        self._failures += 1
