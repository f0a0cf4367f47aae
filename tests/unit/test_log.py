"""Metrics survive a resume without a step told twice; bars say how far and how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_ft import log


def rows(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resume_drops_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = log.MetricsFile(path)
    for step in range(1, 6):
        first.write({"step": step, "run": 1})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "ru')  # cut off by a kill
    second = log.MetricsFile(path, resume_step=3)
    second.write({"step": 4, "run": 2})
    second.close()
    assert rows(path) == [{"step": s, "run": 1} for s in (1, 2, 3)] + [{"step": 4, "run": 2}]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    log.MetricsFile(path).close()
    assert path.read_text() == ""


class Disk:
    """A file on a disk that takes no more than `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = data[: self.room]
        self.content, self.room = self.content + taken, self.room - len(taken)
        return len(taken)

    def close(self) -> None:
        pass


def test_what_a_full_disk_does_not_take_comes_later_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log.MetricsFile(tmp_path / "metrics.jsonl")
    disk = Disk(room=20)
    file._file = disk  # type: ignore[assignment]
    for step in range(1, 4):
        file.write({"step": step})
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert disk.content == b'{"step": 1}\n{"step":'
    disk.room = 10**6
    file.write({"step": 4})
    file.close()
    assert disk.content == b"".join(b'{"step": %d}\n' % step for step in range(1, 5))
    assert capsys.readouterr().err == ""


def test_lines_that_are_lost_in_the_end_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log.MetricsFile(tmp_path / "metrics.jsonl")
    file._file = Disk(room=0)  # type: ignore[assignment]
    for step in range(3):
        file.write({"step": step})
    file.close()
    assert "the last 3 lines" in capsys.readouterr().err


def test_more_rows_may_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x": 1}\n{"step": 2}\n')
    log.MetricsFile(path, 2, keep=lambda row: "x" not in row).close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


class Clock:
    """A second later at each look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_lines_that_a_crash_has_spoilt_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n\xff\n[1]\n{"step": 2}\n{"ste')
    log.MetricsFile(path, resume_step=5).close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_what_takes_no_time_needs_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with log.progress("count", 200) as bar:
        for _ in range(200):
            bar.advance()
    assert capsys.readouterr().err == ""


def test_an_unknown_total_has_no_eta(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.time, "monotonic", Clock())
    with log.progress("count", None) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr().err.splitlines()[-1] == "count 3  1.00/s"


def test_a_bar_without_a_terminal_prints_about_twenty_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.time, "monotonic", Clock())
    with log.progress("count", 200) as bar:
        for _ in range(200):
            bar.advance(note="loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[-1].startswith("count 200/200")
    assert "/s  ETA 0 s  loss 1.0" in lines[-1]


def test_skipped_steps_do_not_count_as_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with log.Bar("train", 101) as bar:
        bar.skip(100)
        bar.advance()
    assert "101/101  0.10/s" in capsys.readouterr().err
