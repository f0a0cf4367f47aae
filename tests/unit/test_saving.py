"""Saving beside the training: one write at a time, failed ones again, and an end that is clean."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from flux_ft.errors import StorageError
from flux_ft.train.saving import AT_ONCE, Job, Saver

FULL = StorageError("disk full", hint="free some")


class Disk:
    """Takes states unless it is full, each after `gate` opens; a clock that is set by hand beside it."""

    def __init__(self, beside: bool = True) -> None:
        self.full, self.now, self.beside = False, 0.0, beside
        self.taken: list[int] = []
        self.written: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, step: int) -> Job:
        self.taken.append(step)

        def write() -> None:
            assert self.gate.wait(10)
            self.now += 2
            if self.full:
                raise FULL
            self.written.append(step)

        return Job(write, self.beside)

    def saver(self, again_after: tuple[float, ...] = (30, 120)) -> Saver:
        return Saver(self.prepare, clock=lambda: self.now, again_after=again_after)


def tried(saver: Saver) -> Callable[[], bool]:
    """`is_due_again` once the write under way has ended."""

    def ask() -> bool:
        if saver._thread is not None:
            saver._thread.join()
        return saver.is_due_again()

    return ask


def test_training_goes_on_while_a_state_is_written_and_the_next_save_waits_for_it() -> None:
    disk = Disk()
    disk.gate.clear()
    saver = disk.saver()
    saver.save(1)
    assert (disk.taken, disk.written) == ([1], [])
    assert not saver.is_due_again()
    threading.Timer(0.1, disk.gate.set).start()
    saver.save(2)
    assert disk.written[:1] == [1]
    assert disk.taken == [1, 2]
    saver.finish(2)
    assert disk.written == [1, 2]
    assert saver.saved_step == 2
    assert saver.longest_s == 2


def test_a_state_that_was_not_copied_is_written_before_training_goes_on() -> None:
    disk = Disk(beside=False)
    disk.saver().save(1)
    assert disk.written == [1]


def test_a_failed_save_is_tried_again_later_and_then_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    disk = Disk()
    saver, disk.full = disk.saver(), True
    due = tried(saver)
    saver.save(1)
    assert not due()
    assert "disk full. The run goes on and tries again in 30 s" in capsys.readouterr().err
    disk.now += 29
    assert not due()
    disk.now += 1
    assert due()
    disk.full = False
    saver.save(5)
    assert not due()
    assert disk.written == [5]
    disk.full = True  # and the count begins anew
    saver.save(6)
    assert not due()
    assert "again in 30 s" in capsys.readouterr().err


def test_after_the_last_try_the_run_ends() -> None:
    disk = Disk()
    saver, disk.full = disk.saver(), True
    due = tried(saver)
    for step in (1, 2):
        saver.save(step)
        assert not due()
        disk.now += 1000
        assert due()
    saver.save(3)
    with pytest.raises(StorageError) as caught:
        due()
    assert caught.value is FULL
    assert disk.taken == [1, 2, 3]


def test_at_a_stop_it_is_tried_at_once_and_the_failure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    disk = Disk()
    saver, disk.full = disk.saver(), True
    with pytest.raises(StorageError, match="disk full"):
        saver.finish(4)
    assert disk.taken == [4] * AT_ONCE
    assert "The run goes on" not in capsys.readouterr().err


def test_a_state_that_is_being_written_is_not_written_twice() -> None:
    disk = Disk()
    saver = disk.saver()
    saver.save(7)
    saver.finish(7)
    assert disk.written == [7]


def test_what_is_no_trouble_with_the_disk_is_raised_as_it_is() -> None:
    def broken(step: int) -> Job:
        raise ZeroDivisionError

    def breaks(step: int) -> Job:
        return Job(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        Saver(broken).save(1)
    saver = Saver(breaks)
    saver.save(1)
    with pytest.raises(ZeroDivisionError):
        tried(saver)()


def test_leaving_waits_for_the_write_but_not_after_the_second_ctrl_c() -> None:
    disk = Disk()
    disk.gate.clear()
    threading.Timer(0.1, disk.gate.set).start()
    with disk.saver() as saver:
        saver.save(1)
    assert disk.written == [1]
    disk.gate.clear()
    saver = disk.saver()
    saver.save(2)
    saver.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert disk.written == [1]
    disk.gate.set()
