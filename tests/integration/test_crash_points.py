"""A save that is cut off at any one of its operations on files: what was whole is whole still, or a newer one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _verbs import child_env, run_here, write_run

EVERY_POINT = """
import json, os, shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from flux_ft.train import checkpoint

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def save(folder, step, keep):
    state = checkpoint.State({"a": torch.full((5,), float(step))}, {"b": torch.zeros(3)})
    checkpoint.save(folder, checkpoint.About(step, {}), state, keep)

def end_at(point):
    left = iter(range(point))
    def hook(event, args):
        if event in EVENTS and next(left, None) is None:
            os._exit(9)  # as SIGKILL does: nothing is flushed, nothing cleaned up
    sys.addaudithook(hook)

place, whole, torn, step = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
ended, point = [], 0
while True:
    folder = place / str(point)
    for one in whole + torn:
        save(folder, one, keep=9)
    for one in torn:
        (folder / f"step-{one:06d}" / "weights.safetensors").write_bytes(b"")
    child = os.fork()
    if child == 0:
        end_at(point)
        save(folder, step, keep=2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found, _ = checkpoint.latest(folder)
    held = found and float(load_file(found.path / checkpoint.WEIGHTS)["a"][0])
    save(folder, step + 1, keep=2)  # and whatever was left is in nobody's way
    names = sorted(path.name for path in folder.iterdir())
    ended.append([code, found and found.about.step, held, names])
    shutil.rmtree(folder)
    point += 1
    if code == 0:
        break
print(json.dumps(ended))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("whole", "torn", "step"),
    [([], [], 1), ([10, 11], [], 12), ([10, 11], [12, 13], 12), ([10], [12, 13, 14], 11)],
    ids=["first", "usual", "over torn ones", "before torn ones"],
)
def test_a_save_that_is_cut_off_loses_nothing(tmp_path: Path, whole: list[int], torn: list[int], step: int) -> None:
    words = [sys.executable, "-c", EVERY_POINT, str(tmp_path), *map(json.dumps, (whole, torn, step))]
    done = subprocess.run(words, env=child_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert len(ended) > 10, "the points are not all seen"
    assert [code for code, *_ in ended] == [9] * (len(ended) - 1) + [0]
    before = max(whole, default=None)
    kept = [found for _, found, _, _ in ended]
    assert set(kept) == {before, step}, kept
    assert kept == sorted(kept, key=lambda found: found == step), "what was there is gone again"
    assert all(value == found for _, found, value, _ in ended), "one that holds another step's numbers"
    newest = [f"step-{one:06d}" for one in (step, step + 1)]
    assert all(set(names) <= {*newest, f"step-{before or 0:06d}"} for *_, names in ended), ended


@pytest.mark.usefixtures("on_cpu")
def test_a_finished_run_that_is_resumed_is_not_saved_again(
    tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its only checkpoint would be gone for as long as the other one takes its place."""
    run_file = write_run(tmp_path / "run.yaml", scenes, iterations=3, checkpoint={"every": 100})
    words = ("train", run_file, f"output={tmp_path / 'run'}")
    assert run_here(capsys, *words).code == 0
    (only,) = (tmp_path / "run" / "checkpoints").iterdir()
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in only.iterdir()}
    done = run_here(capsys, *words, "--resume")
    assert done.code == 0, done.stderr
    assert "resumed from step 3" in done.stderr
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in only.iterdir()} == before
