"""Several processes by `--gpus` and under Slurm: stopping, the first cause of a failure, and that nobody is left over.

The processes are started on the CPU; the first that fails does so by a fault put into its training step.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from _verbs import ROOT, Done, child_env, finish, start_verb, trained_steps, wait_until, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes is tested on Linux"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="no gloo in this torch",
    ),
]

SOON_S = 60
ENDLESS = 100_000
FAULTS = {
    "none": "pass",
    "input": "if step == 2 and rank == 1: raise ConfigError('a bad thing', hint='a good one')",
    "hangs": "if step == 2: time.sleep(1000)",
}
FAULTY_STEP = """
import os, time
if "RANK" in os.environ:
    from flux_ft.errors import ConfigError
    from flux_ft.train import loop
    true_step, rank = loop.training_step, int(os.environ["RANK"])
    def training_step(state, *rest):
        step = state.step
        {fault}
        return true_step(state, *rest)
    loop.training_step = training_step
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The current directory of these runs."""
    folder = tmp_path_factory.mktemp("launch")
    write_run(folder / "run.yaml", scenes, iterations=ENDLESS, checkpoint={"every": ENDLESS})
    return folder


def environment(place: Path, fault: str = "none") -> dict[str, str]:
    """A child's, in which runs go to the CPU and every training step meets the fault."""
    env = child_env() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
    (place / "tmp").mkdir(exist_ok=True)
    site = place / f"with-{fault}"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(FAULTY_STEP.format(fault=FAULTS[fault]), encoding="utf-8")
    return env | {"PYTHONPATH": os.pathsep.join([str(site), env["PYTHONPATH"]])}


class Runs:
    """Runs that a test starts, and all their processes."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.processes: list[psutil.Process] = []

    def start(self, *words: object, fault: str = "none", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """`train run.yaml`, started."""
        env = environment(self._place, fault)
        child = start_verb("train", "run.yaml", *words, cwd=self._place, launcher=launcher, env=env)
        self.processes.append(psutil.Process(child.pid))
        return child

    def workers(self, child: subprocess.Popen[str], output: Path) -> dict[int, psutil.Process]:
        """The processes that a launcher has started, by rank, once they have trained two steps."""
        wait_until(lambda: len(trained_steps(output)) >= 2, child, "step 2")
        found = psutil.Process(child.pid).children()
        self.processes += found
        return {int(process.environ()["RANK"]): process for process in found}


@pytest.fixture
def runs(place: Path) -> Iterator[Runs]:
    """Afterwards nothing of what was started runs any more, or the test fails."""
    started = Runs(place)
    yield started
    _, left = psutil.wait_procs(started.processes, timeout=SOON_S)
    for process in left:
        process.kill()
    assert not left


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def soon(child: subprocess.Popen[str], since: float) -> Done:
    """Its end, which is to come soon."""
    done = finish(child, since)
    assert done.seconds < SOON_S
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done


def told(done: Done) -> list[str]:
    """Everything from the first error or stop on: the message is the last thing that is said."""
    lines = done.stderr.splitlines()
    first = next((n for n, line in enumerate(lines) if re.search(r"\b(error|stopped): ", line)), len(lines))
    return [line for line in lines[first:] if line]


class TestStops:
    def test_one_stop_saves_once_and_the_command_goes_on(self, place: Path, runs: Runs) -> None:
        child = runs.start("output=stopped", "--gpus", 2)
        workers = runs.workers(child, place / "stopped")
        since = time.monotonic()
        for process in (*workers.values(), child):  # a cluster reaches all of them
            process.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGINT)
        done = soon(child, since)
        steps = trained_steps(place / "stopped")
        assert done.code == 130
        stopped, hint = told(done)
        assert stopped.startswith(f"stopped: stopped after step {steps[-1]}; ")
        assert done.stderr.count("stopping after this step") == 1
        assert [path.name for path in (place / "stopped" / "checkpoints").glob("step-*")] == [f"step-{steps[-1]:06d}"]
        words = shlex.split(hint.removeprefix("hint: go on: "))
        assert words[1:] == ["train", "run.yaml", "output=stopped", "--gpus", "2", "--resume"]

    def test_a_second_stop_ends_at_once(self, place: Path, runs: Runs) -> None:
        child = runs.start("output=at-once", "--gpus", 2, fault="hangs")
        runs.workers(child, place / "at-once")
        child.send_signal(signal.SIGINT)
        time.sleep(1.5)  # within a second it is the same stop
        assert child.poll() is None
        since = time.monotonic()
        child.send_signal(signal.SIGINT)
        done = soon(child, since)
        assert done.code == 130
        assert done.stderr.endswith("stopped at once; what was not reported as saved is lost\n")
        assert not list((place / "at-once").glob("checkpoints/step-*"))

    def test_without_their_launcher_processes_save_and_end(self, place: Path, runs: Runs) -> None:
        child = runs.start("output=orphaned", "--gpus", 2)
        workers = runs.workers(child, place / "orphaned")
        child.kill()
        gone, left = psutil.wait_procs(workers.values(), timeout=SOON_S)
        assert len(gone) == 2
        assert not left
        last = trained_steps(place / "orphaned")[-1]
        assert [path.name for path in (place / "orphaned" / "checkpoints").glob("step-*")] == [f"step-{last:06d}"]
        child.communicate()


class TestFirstCause:
    def test_a_killed_process(self, place: Path, runs: Runs) -> None:
        child = runs.start("output=killed", "--gpus", 2)
        workers = runs.workers(child, place / "killed")
        since = time.monotonic()
        workers[1].kill()
        done = soon(child, since)
        assert done.code == 1
        error, _hint = told(done)
        assert error == "error: the process of rank 1 was killed by signal 9, as the system does when memory runs out"

    def test_input_that_one_process_finds_wrong(self, runs: Runs) -> None:
        since = time.monotonic()
        done = soon(runs.start("output=wrong", "--gpus", 2, fault="input"), since)
        assert done.code == 2
        assert told(done) == ["error: a bad thing", "hint: a good one"]

    def test_under_another_launcher(self, runs: Runs) -> None:
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
        done = finish(runs.start("output=others", fault="input", launcher=launcher), time.monotonic())
        assert done.code == 1
        ours, *theirs = done.stderr.split("Traceback")
        assert len(theirs) == 1  # the launcher's own, of which we know nothing
        assert ours.count("rank 1: error: a bad thing\n\nhint: a good one\n") == 1
        assert ours.count("rank 0: ended because another process did (") == 1

    def test_a_bad_run_file_starts_nothing(self, runs: Runs) -> None:
        since = time.monotonic()
        done = soon(runs.start("iterations=many", "--gpus", 2), since)
        assert done.code == 2
        assert done.stderr.count("iterations") >= 1
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


FAKE_SRUN = """#!/bin/bash
shift # --kill-on-bad-exit=1
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & children+=($!); done
code=0
for child in "${children[@]}"; do wait "$child"; one=$?; [ "$one" -le "$code" ] || code=$one; done
exit $code
"""
FAKE_SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> asked; fi
"""


def test_slurm_stops_in_time_and_goes_on(place: Path, scenes: Path, free_port: int) -> None:
    """Two machines, played by this one, with a process each."""
    fakes = place / "fakes"
    fakes.mkdir()
    flux_ft = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m flux_ft "$@"\n'
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "flux-ft": flux_ft}.items():
        (fakes / name).write_text(text, encoding="utf-8")
        (fakes / name).chmod(0o755)
    job = {
        "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "MASTER_PORT": str(free_port),
    }  # fmt: skip

    def submit(iterations: int, **variables: object) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / "slurm_train.sh"), "run.yaml", "output=slurm"]
        env = environment(place) | job | {name: str(value) for name, value in variables.items()}
        return subprocess.run(
            [*command, f"iterations={iterations}"], cwd=place, env=env, capture_output=True, text=True, timeout=600
        )

    now = int(time.time())
    # A second, less ten minutes' margin; queued again before the run began.
    first = submit(ENDLESS, SLURM_JOB_END_TIME=now + 601, SLURM_RESTART_COUNT=1)
    assert first.returncode == 130, first.stderr
    assert first.stderr.count("holds no run to resume; starting from step 0") == 1
    assert (place / "asked").read_text() == "requeue 77\n"
    steps = trained_steps(place / "slurm")
    assert [path.name for path in (place / "slurm" / "checkpoints").glob("step-*")] == [f"step-{steps[-1]:06d}"]

    then = submit(steps[-1] + 1, SLURM_JOB_END_TIME=now + 10_000, SLURM_RESTART_COUNT=1)
    assert then.returncode == 0, then.stderr
    assert f"resumed from step {steps[-1]}" in then.stderr
    assert (place / "asked").read_text() == "requeue 77\n"
    assert not list(place.glob(".flux-ft-*"))
