"""Work shared out over the processes of a run. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process does of work that all of them see alike."""

    index: int = 0
    """Of this process, from 0."""
    count: int = 1
    """Of all processes."""
    wait: Callable[[], None] = lambda: None
    """Returns once every process has called it as often as this one."""

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items: every `count`-th, in their order."""
        return items[self.index :: self.count]

    def turns(self, items: int) -> list[tuple[int, bool]]:
        """This process's positions among so many items, and whether each counts; as many turns for every process.

        A process without an item left takes the last one again, which does not count: a model that is spread over
        processes computes only when all of them do.
        """
        rounds = -(-items // self.count)
        own = range(self.index, rounds * self.count, self.count)
        return [(min(position, items - 1), position < items) for position in own]

    def named(self, work: str) -> str:
        """What the bar of shared work is called: it shows this process's share alone."""
        return work if self.count == 1 else f"{work}, the share of process {self.index + 1} of {self.count}"


ALONE = Share()
