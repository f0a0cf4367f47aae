"""A disk that fills up during a run: the run waits for space, the last good checkpoint stays, the bits stay the same.

On a real small file system where the system lets a test mount one, and everywhere on a stand-in.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from _verbs import Done, assert_refused, metrics, run_here, trained_steps, write_run

from flux_ft.train import checkpoint, saving
from flux_ft.train.run import Recorder

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS = 10
DISK_BYTES = 96_000_000
"""Holds the run and what a save leaves free."""
SETTINGS: dict[str, object] = {
    "finetune_comment": "My Thing",
    "iterations": STEPS,
    "checkpoint": {"every": 1},
    "export": {"dtype": "fp32", "formats": ["diffusers"]},
}
DRAWING: dict[str, object] = {"preview": {"every": 2, "steps": 1, "prompts": ["a red circle"]}}
NEVER = 999


class TmpfsDisk:
    """A file system in memory, in a namespace that goes, and the file system with it, when `holder`'s input ends."""

    def __init__(self, place: Path) -> None:
        # Carries out commands with the folder as $1, and says when each is done.
        script = 'while read -r words; do eval "$words" && echo done || exit; done'
        words = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(place)]
        pipe = subprocess.PIPE
        self.holder = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.folder = Path(f"/proc/{self.holder.pid}/root{place}")
        self._filler = self.folder / "filler"

    def is_done(self, command: str) -> bool:
        """Whether a command succeeds that only the namespace's root may give."""
        assert self.holder.stdin is not None
        assert self.holder.stdout is not None
        with suppress(BrokenPipeError):
            self.holder.stdin.write(command + "\n")
            self.holder.stdin.flush()
        return self.holder.stdout.readline() == "done\n"

    def fill(self, leave: int = 0) -> None:
        """Leave hardly a byte, or so many."""
        with self._filler.open("wb", buffering=0) as file:
            left = shutil.disk_usage(self.folder).free - leave
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 20)))

    def clear(self) -> None:
        self._filler.unlink(missing_ok=True)


class StandIn:
    """An ordinary folder; `fill` makes the system refuse whatever is to be brought to a disk."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch, self._usage = folder, patch, shutil.disk_usage(folder)

    def fill(self, leave: int = 0) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if leave:
            usage = self._usage._replace(free=leave)
            self._patch.setattr(shutil, "disk_usage", lambda _: usage)
        else:
            self._patch.setattr(os, "fsync", full)

    def clear(self) -> None:
        self._patch.undo()


Disk = TmpfsDisk | StandIn


@pytest.fixture(params=["tmpfs", "stand-in"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "stand-in":
        with pytest.MonkeyPatch.context() as patch:
            yield StandIn(tmp_path, patch)
        return
    with tmpfs(tmp_path / "disk") as mounted:
        yield mounted


@contextmanager
def tmpfs(place: Path) -> Iterator[TmpfsDisk]:
    """Skips the test where the system does not let it mount anything."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("a test may mount a file system on Linux only, by unshare")
    place.mkdir()
    disk = TmpfsDisk(place)
    with disk.holder as holder:
        if not disk.is_done(f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "$1"'):
            assert holder.stderr is not None
            pytest.skip(f"this system does not let a test mount a file system: {holder.stderr.read().strip()}")
        yield disk
        holder.communicate()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried again at once."""
    set_waits(monkeypatch, (0.0, 0.0, 0.0))


def set_waits(patch: pytest.MonkeyPatch, waits: tuple[float, ...]) -> None:
    patch.setitem(saving.Saver.__init__.__kwdefaults__, "again_after", waits)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[str, bytes]:
    """The files of the final checkpoint of a run that has space."""
    from accelerate.state import AcceleratorState

    from flux_ft.runfile import load_run
    from flux_ft.train.run import train

    place = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        train(load_run(write_run(place / "run.yaml", scenes, **SETTINGS), [f"output={place / 'run'}"]).config)
        AcceleratorState._reset_state(reset_partial_state=True)
    return final(place / "run")


def final(folder: Path) -> dict[str, bytes]:
    newest, passed_over = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    assert (newest.about.step, passed_over) == (STEPS, [])
    return {path.name: path.read_bytes() for path in newest.path.iterdir()}


@pytest.fixture
def train(
    disk: Disk, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """`train(*words, full_from, full_to, leave, **settings)`: a run in `disk`, which is full between two steps."""
    recorded = Recorder.step

    def begin(*words: str, full_from: int = NEVER, full_to: int = NEVER, leave: int = 0, **settings: object) -> Done:
        def step(recorder: Recorder, result: object) -> None:
            recorded(recorder, result)  # type: ignore[arg-type]
            at = result.step  # type: ignore[attr-defined]
            if at == full_from:
                disk.fill(leave)
            if at == full_to:
                disk.clear()

        monkeypatch.setattr(Recorder, "step", step)
        run_file = write_run(tmp_path / "run.yaml", scenes, **(SETTINGS | settings))
        return run_here(capsys, "train", run_file, f"output={disk.folder / 'run'}", *words)

    return begin


def failures(done: Done) -> list[str]:
    return [line for line in done.stderr.splitlines() if "the checkpoint could not be written" in line]


def test_a_run_waits_for_space_and_ends_with_the_same_bits(
    disk: Disk, train: Callable[..., Done], straight: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at six saves on end, which is no reason to give up as long as the waits are not over."""
    set_waits(monkeypatch, (3600.0, 3600.0))
    done = train(full_from=2, full_to=8)
    assert done.code == 0, done.stderr
    assert 1 <= len(failures(done)) <= 2, done.stderr
    assert "warning: " in failures(done)[0]
    assert "tries again in 3600 s: free some disk space" in failures(done)[0]
    assert final(disk.folder / "run") == straight
    assert trained_steps(disk.folder / "run") == list(range(1, STEPS + 1))
    assert (disk.folder / "run" / "my-thing.safetensors").is_file()


def test_what_failed_is_tried_again(disk: Disk, train: Callable[..., Done], straight: dict[str, bytes]) -> None:
    """A save is due at step 4 alone; the one that succeeds is a try of a later step."""
    done = train(full_from=4, full_to=6, checkpoint={"every": 4}, iterations=7)
    assert done.code == 0, done.stderr
    assert len(failures(done)) >= 1
    newest = disk.folder / "run" / "checkpoints" / "step-000007"
    assert checkpoint.find_fault(newest) is None
    done = train("--resume", checkpoint={"every": 1})
    assert done.code == 0, done.stderr
    assert final(disk.folder / "run") == straight


def test_space_that_never_comes_ends_the_run_with_one_message(
    disk: Disk, train: Callable[..., Done], straight: dict[str, bytes]
) -> None:
    done = train(full_from=3)
    assert_refused(done, "the checkpoint could not be written", "free some disk space", "--resume", code=1)
    folder = disk.folder / "run" / "checkpoints"
    newest, passed_over = checkpoint.latest(folder)
    assert newest is not None
    assert (newest.about.step, passed_over) == (2, [])
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    disk.clear()
    done = train("--resume")
    assert done.code == 0, done.stderr
    assert "resumed from step 2" in done.stderr
    assert final(disk.folder / "run") == straight
    assert trained_steps(disk.folder / "run") == list(range(1, STEPS + 1))


def test_low_space_is_seen_before_a_write(disk: Disk, train: Callable[..., Done]) -> None:
    done = train(full_from=3, leave=30_000_000)
    assert done.code == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = re.search(r"it takes ([\d.]+) MB, and ([\d.]+) MB are free", error)
    assert told, error
    assert 1.0 < float(told[1]) < 2.0
    assert 20 < float(told[2]) <= 30


def test_too_little_space_for_the_run_is_said_before_the_first_step(disk: Disk, train: Callable[..., Done]) -> None:
    disk.fill(leave=15_000_000)
    assert_refused(train(), "GB are free, this run needs about", "checkpoints", "exported files", code=1)
    assert not list(disk.folder.glob("run/checkpoints/step-*"))


def test_previews_do_not_end_a_run(disk: Disk, train: Callable[..., Done], straight: dict[str, bytes]) -> None:
    """Those of steps 4 and 6 find no space; the run goes on without them, and later ones are there again."""
    done = train(full_from=3, full_to=7, **DRAWING, checkpoint={"every": 8})
    assert done.code == 0, done.stderr
    assert final(disk.folder / "run") == straight
    drawn = sorted(path.parent.name[-2:] for path in (disk.folder / "run" / "previews").glob("*/prompts.json"))
    assert drawn == ["00", "02", "08", "10"]
    assert any("previews" in line for line in done.stderr.splitlines() if line.startswith("warning: ")), done.stderr
    assert [row["step"] for row in metrics(disk.folder / "run") if "loss" in row] == list(range(1, STEPS + 1))


def test_no_space_for_the_results_is_one_message_and_resume_writes_them(
    disk: Disk, train: Callable[..., Done], straight: dict[str, bytes]
) -> None:
    done = train(full_from=STEPS, checkpoint={"every": 9})
    assert_refused(done, "cannot write", "my-thing.safetensors", code=1)
    assert "The run is at its end" in done.stderr
    disk.clear()
    done = train("--resume")
    assert done.code == 0, done.stderr
    assert "resumed from step 9" in done.stderr
    assert final(disk.folder / "run") == straight


def test_a_disk_that_may_only_be_read(tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(tmp_path / "disk") as disk:
        assert disk.is_done('mount -o remount,ro "$1"')
        done = run_here(capsys, "train", write_run(tmp_path / "run.yaml", scenes), f"output={disk.folder / 'run'}")
    assert_refused(done, "`output: ", "cannot be written: Read-only file system", code=1)


def test_a_folder_that_may_not_be_written(tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(closed, os.W_OK) or sys.platform == "win32":
            pytest.skip("this user may write everywhere")
        done = run_here(capsys, "train", write_run(tmp_path / "run.yaml", scenes), f"output={closed / 'run'}")
        assert_refused(done, "`output: ", "cannot be written", code=1)
    finally:
        closed.chmod(stat.S_IRWXU)
