"""The inference bench on flux-tiny: its figures follow from what it measured."""

from __future__ import annotations

import itertools

import pytest

from flux_ft.bench.infer import bench_infer
from flux_ft.errors import ConfigError


def test_figures() -> None:
    ticks = itertools.count()
    found = bench_infer(steps=2, repeats=1, compiled=False, device="cpu", clock=lambda: float(next(ticks)))
    rows = {row.what: row for row in found.rows}
    assert list(rows)[:3] == ["diffusers", "fp32", "diffusers again"]
    assert {"int8", "fp8", "fp32 streamed"} <= rows.keys()
    for row in found.rows:
        assert (row.seconds, row.ratio, row.first_s) == (1.0, 1.0, 1.0)  # each is two looks at this clock
        assert (row.peak_gb, row.predicted_gb) == (None, None)
    assert rows["fp32"].differs == 0  # the pipeline's own picture
    assert 0 < rows["int8"].differs < 2
    assert rows["int8"].weights_gb < rows["fp32"].weights_gb / 3
    assert "flux-tiny, 64×64, 2 steps, on cpu" in found.for_people()
    assert [row["what"] for row in found.as_json()["rows"]] == list(rows)


def test_wrong_repeats() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        bench_infer(repeats=0, device="cpu")
