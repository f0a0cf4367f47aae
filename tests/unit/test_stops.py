"""Stopping early: what several signals mean, the file that a launcher leaves, the limit of time, lengths of time."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from flux_ft.errors import ConfigError
from flux_ft.train import stops
from flux_ft.train.stops import ECHO_S, LAUNCH_FOLDER, STOP_FILE, StopSignal, TimeLimit, parse_duration, stop_requests


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LAUNCH_FOLDER, "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


class TestStopSignal:
    def test_the_first_asks_and_its_echoes_say_nothing_new(self, clock: Clock) -> None:
        stop = StopSignal(clock)
        assert not stop.asked
        assert stop.hear()
        clock.now += ECHO_S
        assert not stop.hear()
        assert stop.asked

    def test_a_later_one_is_at_once(self, clock: Clock) -> None:
        stop = StopSignal(clock)
        stop.hear()
        clock.now += ECHO_S
        stop.hear()  # an echo does not make the time of echoes longer
        clock.now += 0.01
        with pytest.raises(KeyboardInterrupt):
            stop.hear()


class TestStopRequests:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_asks_and_is_said_once(
        self, number: signal.Signals, clock: Clock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = signal.getsignal(number)
        with stop_requests(clock) as asked:
            assert not asked()
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert asked()
            clock.now += ECHO_S + 0.1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) == before
        assert capsys.readouterr().err.count("stopping after this step") == 1

    def test_off_the_main_thread_nothing_is_heard_and_nothing_breaks(self) -> None:
        said: list[bool] = []

        def work() -> None:
            with stop_requests() as asked:
                said.append(asked())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert said == [False]

    def test_a_launched_process_hears_the_launcher_by_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
        monkeypatch.setenv("RANK", "3")
        with stop_requests() as asked:
            assert [path.name for path in tmp_path.iterdir()] == ["listens-3"]
            assert not asked()
            (tmp_path / STOP_FILE).touch()
            assert asked()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["listens-3", STOP_FILE]  # it has heard

    def test_a_launched_process_hears_no_more_after_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
        monkeypatch.setenv("RANK", "3")
        with stop_requests():
            pass
        assert not list(tmp_path.iterdir())

    def test_the_launcher_itself_is_not_launched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
        assert stops.launch_folder() is None

    def test_only_a_launched_process_stops_with_its_parent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "getppid", lambda: -1)
        with stop_requests() as asked:
            assert not asked()
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
            assert asked()


class TestTimeLimit:
    def test_another_step_and_a_save_must_fit(self, clock: Clock) -> None:
        limit = TimeLimit(100, clock)
        clock.now += 60  # loading
        assert not limit.is_up()
        clock.now += 10
        assert not limit.is_up()  # 70 + 10
        limit.note_save(5)
        limit.note_save(3)
        clock.now += 10
        assert not limit.is_up()  # 80 + 10 + 5
        clock.now += 5
        assert limit.is_up()  # 85 + 10 + 5

    def test_the_longest_step_counts(self, clock: Clock) -> None:
        limit = TimeLimit(100, clock)
        for seconds in (0, 30, 1, 1):
            clock.now += seconds
            assert not limit.is_up()
        clock.now += 38
        assert limit.is_up()

    def test_the_first_call_knows_of_no_step_yet(self, clock: Clock) -> None:
        assert not TimeLimit(1, clock).is_up()
        limit = TimeLimit(1, clock)
        clock.now += 1
        assert limit.is_up()

    def test_no_limit(self, clock: Clock) -> None:
        limit = TimeLimit(float("inf"), clock)
        clock.now += 1e9
        assert not limit.is_up()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13800), ("90m", 5400), ("45s", 45), ("2d", 172800), ("1D2H3M4S", 93784), (" 90m ", 5400),
        ("2-03:00:00", 183600), ("03:50:00", 13800), ("3:50:07", 13807), ("59:30", 3570), ("1-00:00:00", 86400),
    ],
)  # fmt: skip
def test_lengths_of_time(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "90", "50m3h", "3 hours", "-5m", "1.5h", "00:00:00", "1-2", "UNLIMITED"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_duration(text)
    assert f"`--max-time {text}`" in refused.value.message
    assert "3h50m" in (refused.value.hint or "")
