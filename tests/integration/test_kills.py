"""SIGKILL at random moments changes nothing; and the harness that shows it (scripts/kill_test.py) can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flux_ft_scripts_kill_test", SCRIPTS / "kill_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))  # as it is for a script
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def told(harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """`told(words)`: the harness's exit code and its table."""

    def call(*words: str) -> tuple[int, Any]:
        folder = tmp_path / "kills"
        code = harness.kill_test([*words, "--output", str(folder), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def test_kills_change_nothing(harness: ModuleType, tmp_path: Path) -> None:
    """Six kills, divided between a LoRA and a full fine-tune, both ways of reading ahead and of dividing a batch."""
    lora, full = harness.tiny_runs(tmp_path, ["lora", "full"], [0], [1], iterations=7)
    lora = harness.tiny_run(lora.run_file, "lora", workers=2, accumulate=1)
    full = harness.tiny_run(full.run_file, "full", workers=0, accumulate=2)
    settings = harness.Settings(harness.environment(tiny=True))
    tallies = harness.try_all([lora, full], settings, kills=6, seed=1, folder=tmp_path, at_once=2)
    print(harness.table(tallies))
    for tally in tallies:
        assert not tally.faults, harness.table(tallies)
        assert tally.kills == 3
        assert tally.identical == tally.runs >= 1
        assert max(tally.resumed_at) > 0
        assert (tally.torn, tally.passed_over) == (0, 0)
    assert sum(tally.moments.get("saving", 0) for tally in tallies) >= 2


def test_randomness_that_is_not_keyed_is_found_out(told: Callable[..., tuple[int, Any]]) -> None:
    words = "--mutant --kills 1 --kind lora --workers 0 --accumulate 1 --iterations 4 --seed 8"
    code, table = told(*words.split())
    assert code == 1
    (one,) = table["combinations"]
    assert (one["runs"], one["identical"], table["identical"]) == (1, 0, False)
    assert max(one["resumed_at"]) > 0
    assert any("the final checkpoint's files: " in fault for fault in one["faults"])
    assert any("exported weight" in fault for fault in one["faults"])
    assert not any("traceback" in fault or "exit code" in fault for fault in one["faults"])


@pytest.mark.parametrize("seed", range(20))
def test_moments_come_in_the_order_of_a_run(harness: ModuleType, seed: int) -> None:
    drawn = harness.draw_moments(harness.random.Random(seed), 12)
    assert len(drawn) == 12
    assert set(drawn) <= {*harness.MOMENTS, "caching"}
    assert drawn.count("caching") <= 1
    assert "caching" not in drawn[1:]
    assert "export" not in drawn[: len(drawn) - drawn.count("export")]
    assert drawn == harness.draw_moments(harness.random.Random(seed), 12)


def test_a_loss_told_twice_is_a_difference(harness: ModuleType, tmp_path: Path) -> None:
    row = '{"step": 1, "loss": 0.5, "grad_norm": 1.0}\n'
    for name, text in (("straight", row), ("killed", row + row)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"step": 1, "validation_loss": 3}\n{"half')
    found = harness.differences(tmp_path / "straight", tmp_path / "killed")
    assert found == ["step 1: loss [(0.5, 1.0)] straight, [(0.5, 1.0), (0.5, 1.0)] killed"]
    assert harness.differences(tmp_path / "straight", tmp_path / "straight") == []


def test_the_script_goes_on_in_the_environment_that_it_makes(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["kill_test.py", "--kills", "7"])
    monkeypatch.setattr(harness, "ensure_environment", lambda: tmp_path / "python")
    monkeypatch.setattr(harness, "run_child", lambda command, environ: started.append(command) or 5)
    monkeypatch.setattr(harness, "kill_test", lambda words: started.append(words) or 6)
    monkeypatch.setenv("FLUX_FT_VENV", str(tmp_path))
    assert harness.main() == 5
    monkeypatch.setenv("FLUX_FT_VENV", sys.prefix)
    assert harness.main() == 6
    assert started == [[str(tmp_path / "python"), str(SCRIPTS / "kill_test.py"), "--kills", "7"], ["--kills", "7"]]
