"""Work on many things at once, in threads, with the results in order. Loads without torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def usable_cpus() -> int:
    """How many cores this process may run on, which are fewer than the machine's where it is pinned. At least 1."""
    if hasattr(os, "sched_getaffinity"):  # neither Windows nor macOS has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(work: Callable[[T], R], items: Iterable[T], workers: int, window: int) -> Iterator[R]:
    """`work(item)` for each item, in the items' order.

    Items are drawn in the calling thread, only as results are asked for, and at most `window` of them are drawn and not
    yet given back; `work` runs in up to `workers` threads. An error, of `work` or in drawing, comes out at its place:
    after every result before it. Then, and when the iterator is closed early, what has not begun is dropped and what
    has is waited for, so no thread is left.
    """
    if workers < 1 or window < 1:
        raise ValueError("workers and window are at least 1")
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for future in _submitted(pool, work, items):
            pending.append(future)
            if len(pending) == window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[Future[R]]:
    try:
        for item in items:
            yield pool.submit(work, item)
    except Exception as error:  # noqa: BLE001 (raised again by whoever asks the future)
        failed: Future[R] = Future()
        failed.set_exception(error)
        yield failed
