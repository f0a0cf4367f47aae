"""How these tests start a verb: in a child process as a user does, or in this process where loading torch again for
every case would cost minutes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flux_ft.families.tiny.scenes import Scene, caption, render

ROOT = Path(__file__).resolve().parents[2]
CHILD_SECONDS = 900
"""A child that takes longer hangs; the quickstart on one core, beside others, takes half of it."""

SCENES = (
    Scene("circle", "red", "large", "center", "blue"),
    Scene("square", "green", "small", "top left", "white"),
    Scene("star", "yellow", "large", "bottom right", "black"),
    Scene("ring", "purple", "small", "left", "orange"),
    Scene("heart", "white", "large", "top", "red"),
    Scene("cross", "black", "large", "right", "yellow"),
)


@dataclass(frozen=True)
class Done:
    """What a verb left behind."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; fails when there is anything else."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, f"not one line on stdout:\n{self.stdout}\n{self.stderr}"
        return json.loads(lines[0])


def child_env() -> dict[str, str]:
    """This process's environment, with our package found from any current directory and the network left alone."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    return {**os.environ, **settings}


def start_verb(*words: object, cwd: Path, launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """`python [launcher] -m flux_ft WORDS`, running."""
    command = [sys.executable, *launcher, "-m", "flux_ft", *map(str, words)]
    options = {"env": child_env(), **options}
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", **options
    )


def finish(child: subprocess.Popen[str], started: float) -> Done:
    """Wait for the child's end."""
    try:
        stdout, stderr = child.communicate(timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        stdout, stderr = child.communicate()
        pytest.fail(f"still running after {CHILD_SECONDS} s:\n{stdout}\n{stderr}")
    return Done(child.returncode, stdout, stderr, time.monotonic() - started)


def run_verb(*words: object, cwd: Path, launcher: Sequence[str] = (), **options: Any) -> Done:
    """Run a verb in a child process."""
    started = time.monotonic()
    return finish(start_verb(*words, cwd=cwd, launcher=launcher, **options), started)


def run_here(capsys: pytest.CaptureFixture[str], *words: object) -> Done:
    """Run a verb in this process, through the same `main`. A traceback of a child is a raised exception here."""
    from flux_ft.cli import main

    capsys.readouterr()
    started = time.monotonic()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["flux-ft", *map(str, words)])
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err, time.monotonic() - started)


def assert_refused(done: Done, *words: str, code: int = 2) -> None:
    """One clear message with a way out: the exit code, "error:", every one of `words`, and no traceback."""
    assert done.code == code, f"exit code {done.code}, expected {code}:\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "hint: " in done.stderr or "; expected " in done.stderr, done.stderr
    missing = [word for word in words if word not in done.stderr]
    assert not missing, f"{missing} not in:\n{done.stderr}"


def write_scenes(folder: Path, scenes: Sequence[Scene] = SCENES) -> Path:
    """A data folder: `00.png` with `00.txt` and so on, captions with the trigger word's place marked."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        Image.fromarray(render(scene, np.random.default_rng(index))).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption(scene, name="[trigger]"), encoding="utf-8")
    return folder


def write_run(path: Path, data: Path | str | dict[str, Any], **settings: object) -> Path:
    """A run file for a short LoRA run on flux-tiny; `settings` replace or add top-level keys."""
    base = {
        "model": "flux-tiny",
        "data": data if isinstance(data, dict) else str(data),
        "finetune_type": "lora",
        "captioning": False,
        "lora_rank": 4,
        "iterations": 2,
        "learning_rate": 1e-3,
        "preview": {"every": None},
    }
    path.write_text(yaml.safe_dump(base | settings, sort_keys=False), encoding="utf-8")
    return path


def hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the SHA-256 of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; fails on a line that is not JSON."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trained_steps(folder: Path) -> list[int]:
    """The optimizer steps that metrics.jsonl tells of, in its order; a line that is being written does not count."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["step"] for row in rows if "loss" in row]


def has_checkpoint(folder: Path) -> bool:
    """Whether a run could be resumed now: a save goes on beside the steps after it."""
    return any((folder / "checkpoints").glob("step-??????"))


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str], what: str) -> None:
    """Wait for something that `child` brings about; fails when it ends without."""
    deadline = time.monotonic() + CHILD_SECONDS
    while not condition():
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            stdout, stderr = child.communicate()
            pytest.fail(f"the child ended before {what}:\n{stdout}\n{stderr}")
        time.sleep(0.005)
