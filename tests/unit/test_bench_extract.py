"""The extraction bench at toy width: its figures follow from what it measured."""

from __future__ import annotations

import itertools

import pytest

from flux_ft.bench.extract import KINDS, WIDTH, bench_extraction, peak_rss_mb, summary_for_people


def test_the_shapes_are_those_of_flux1() -> None:
    assert sum(count for _, _, count in KINDS.values()) == 19 * 10 + 38 * 3
    entries = sum(out * into * count for out, into, count in KINDS.values()) * WIDTH**2
    assert entries == pytest.approx(11.83e9, rel=1e-3)


def test_figures() -> None:
    ticks = itertools.count()
    figures = bench_extraction(rank=4, width=64, clock=lambda: float(next(ticks)))
    whole = figures["whole_model"]
    assert [row["module"] for row in figures["kinds"]] == list(KINDS)
    for row in figures["kinds"]:
        assert row["ours_s"] == [1.0, 1.0]  # each is two looks at this clock
        assert row["exact_s"] == 1.0
        assert 1 - 1e-4 <= row["error_over_least"] <= 1.01
        assert 0 < row["energy_kept"] < 1
    assert (whole["ours_s"], whole["exact_s"], whole["ratio"]) == (304.0, 304.0, 1.0)
    assert whole["entries"] == sum(out * into * count for out, into, count in KINDS.values()) * 64**2
    assert figures["peak_rss_mb"] == pytest.approx(peak_rss_mb(), rel=0.5)
    text = summary_for_people(figures)
    assert "extrapolated to 304 matrices" in text
    assert "448×64" in text


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"width": 8}])
def test_wrong_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        bench_extraction(**wrong)
