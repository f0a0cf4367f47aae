"""Whatever a run file holds, it is a run or one message that says where it is wrong."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest
from runfiles import make_overrides, make_run_file

from flux_ft.errors import ConfigError
from flux_ft.runfile import COMMAND_LINE, MOST_TOLD, dump_run, load_run

CASES = int(os.environ.get("FLUX_FT_FUZZ", "300"))
LONGEST_SECONDS = 1.0
LONGEST_MISTAKE = 2500
WITHOUT_A_LINE = r"run\.yaml: (`data` is missing|the file is empty|too large for a run file)"


def test_a_run_file_is_a_run_or_a_message_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        content = make_run_file(rng)
        Path("run.yaml").write_bytes(content)
        overrides = make_overrides(rng)
        started = time.process_time()
        try:
            loaded += _is_run_or_refusal(content, overrides)
        except Exception as error:
            raise AssertionError(f"seed {seed} of {CASES}: {content[:2000]!r} with {overrides!r}") from error
        seconds = time.process_time() - started
        assert seconds < LONGEST_SECONDS, f"seed {seed} of {CASES} took {seconds:.1f} s of CPU"
    assert CASES / 20 < loaded < CASES * 9 / 10, "the fuzzer writes too few good files, or too few bad ones"


def _is_run_or_refusal(content: bytes, overrides: list[str]) -> bool:
    try:
        loaded = load_run(Path("run.yaml"), overrides)
    except ConfigError as error:
        _check_message(error, content)
        return False
    assert all(" has no effect: " in warning for warning in loaded.warnings)
    Path("resolved.yaml").write_text(dump_run(loaded.config), encoding="utf-8")
    assert load_run(Path("resolved.yaml")).config == loaded.config
    return True


def _check_message(error: ConfigError, content: bytes) -> None:
    """Every mistake names the file and a line of it, or the command line; nothing endless, nothing unprintable."""
    first, *rest = error.message.split("\n")
    told = rest if re.fullmatch(r"\d+ mistakes", first) else [error.message]
    if len(told) > MOST_TOLD:
        assert re.fullmatch(r"and \d+ more", told.pop())
    assert 0 < len(told) <= MOST_TOLD
    num_lines = len(content.decode("utf-8", "replace").splitlines()) + content.count(b"\r") + 1
    for mistake in told:
        place = re.match(r"run\.yaml:(\d+): ", mistake)
        assert place or mistake.startswith(f"{COMMAND_LINE}: ") or re.match(WITHOUT_A_LINE, mistake), mistake
        assert place is None or 1 <= int(place[1]) <= num_lines, mistake
        assert len(mistake) < LONGEST_MISTAKE, mistake
        assert mistake.isprintable(), mistake
    assert error.hint is None or error.hint.isprintable()
