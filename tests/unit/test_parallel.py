"""Threads: results in order, a bounded number in flight, errors at their place, nothing left running."""

import threading
import time

import pytest

from flux_ft.data.parallel import ordered_map, usable_cpus


def slow_double(number):
    time.sleep(0.001 * (number % 3))
    return 2 * number


@pytest.mark.parametrize(("workers", "window"), [(1, 1), (1, 5), (4, 2), (4, 9), (4, 500)])
def test_results_come_in_the_order_of_the_items(workers, window):
    assert list(ordered_map(slow_double, range(100), workers, window)) == [2 * number for number in range(100)]
    assert list(ordered_map(slow_double, [], workers, window)) == []


def test_work_runs_in_several_threads_at_once():
    meeting = threading.Barrier(3, timeout=10)
    assert list(ordered_map(lambda _: meeting.wait() >= 0, range(6), 3, 6)) == [True] * 6


def test_items_are_drawn_in_the_calling_thread_and_no_more_than_the_window_ahead():
    drawn = []

    def items():
        for number in range(50):
            assert threading.current_thread() is caller
            drawn.append(number)
            yield number

    caller = threading.current_thread()
    for given, _ in enumerate(ordered_map(slow_double, items(), 4, 7)):
        assert len(drawn) - given <= 7
    assert drawn == list(range(50))


def test_nothing_is_drawn_before_a_result_is_asked_for():
    drawn = []
    results = ordered_map(slow_double, (drawn.append(number) or number for number in range(9)), 2, 3)
    assert drawn == []
    assert next(results) == 0
    assert drawn == [0, 1, 2]


def fail_at(where):
    def work(number):
        if number >= where:
            raise KeyError(number)
        return slow_double(number)

    return work


def test_an_error_comes_out_at_its_place():
    results, got = ordered_map(fail_at(7), range(50), 4, 12), []
    with pytest.raises(KeyError, match="7"):
        got.extend(results)
    assert got == [2 * number for number in range(7)]


def test_an_error_in_drawing_comes_after_the_results_before_it():
    def items():
        yield from range(5)
        raise OSError("the disk is gone")

    results, got = ordered_map(slow_double, items(), 4, 12), []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(results)
    assert got == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("error", [None, KeyError])
def test_stopping_early_leaves_no_thread_and_begins_nothing_new(error):
    before, begun = threading.active_count(), []

    def work(number):
        begun.append(number)
        if number == 3 and error:
            raise error
        time.sleep(0.005)
        return number

    results = ordered_map(work, range(1000), 2, 100)
    if error:
        with pytest.raises(error):
            list(results)
    else:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        results.close()
    assert threading.active_count() == before
    after = len(begun)
    assert after < 20
    time.sleep(0.02)
    assert len(begun) == after


def test_a_window_or_workers_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        next(ordered_map(slow_double, [1], 0, 1))
    with pytest.raises(ValueError, match="at least 1"):
        next(ordered_map(slow_double, [1], 1, 0))


def test_usable_cpus_follows_the_affinity_where_there_is_one(monkeypatch):
    assert usable_cpus() >= 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert usable_cpus() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cpus() == 1
