"""ZIPs of every hostile kind: read or refused, never a traceback, a file outside, or memory without a bound."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest
from fuzz.archives import CASES, MARK, Case, make_case

from flux_ft.data.archive import ZipSource
from flux_ft.errors import DataError

PEAK_BYTES = 150 * 2**20
SLOWEST_S = 5.0


def read_all(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """(contents, the reasons why others were not read), hidden files left out of both. Raises DataError alone."""
    source = ZipSource(path, path.name)
    contents, failed = {}, []
    names = [found.name for found in source.files()]
    assert names == sorted(set(names))
    for found in source.files():
        try:
            data = source.read(found.name)
        except DataError as error:
            failed.append(error.message)
        else:
            if found.skip is None:
                contents[found.name] = data
    return contents, failed


def check(case: Case, path: Path) -> str:
    """The outcome; asserts that it is the one that the case must have."""
    path.write_bytes(case.data)
    refusal = None
    try:
        contents, failed = read_all(path)
    except DataError as error:
        refusal = error
    if refusal is not None:
        assert refusal.message.startswith(f"`{path.name}`")
        assert refusal.message.isprintable()
        assert refusal.hint
        assert case.outcome in ("refused", "any"), refusal.message
        return "refused"
    assert case.outcome != "refused", "it was read"
    if case.outcome == "good":
        assert not failed
        assert contents == case.contents
    if case.outcome == "damaged":
        assert len(failed) == 1
        assert failed[0].startswith("damaged: ")
    return "damaged" if failed else "good"


def test_archives_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "a" / "b" / "c" / "run"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    path = here / "case.zip"
    seen: dict[str, int] = {}
    slowest = 0.0
    make_case(random.Random(0))  # the bombs are made once
    tracemalloc.start()
    try:
        for seed in range(CASES):
            case = make_case(random.Random(seed))
            tracemalloc.reset_peak()
            began, before = time.perf_counter(), tracemalloc.get_traced_memory()[0]
            try:
                outcome = check(case, path)
                peak = tracemalloc.get_traced_memory()[1] - before
                assert peak < PEAK_BYTES, f"{peak:,} bytes"
            except Exception as error:
                raise AssertionError(f"make_case(random.Random({seed})), {case.tricks}: {error!r}") from error
            slowest = max(slowest, time.perf_counter() - began)
            seen[outcome] = seen.get(outcome, 0) + 1
    finally:
        tracemalloc.stop()
    assert slowest < SLOWEST_S
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert not Path("/", f"{MARK}.png").exists()
    assert not Path("/tmp", f"{MARK}.png").exists()
    # Were every archive refused, nothing would have been tested.
    assert min(seen.get(outcome, 0) for outcome in ("good", "damaged", "refused")) >= CASES // 50, seen
