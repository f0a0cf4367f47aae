"""The bench of pictures runs on a handful of small ones, and its fields say what was measured."""

import itertools

import numpy as np
import pytest
from PIL import Image

from flux_ft.bench.data import SYNTHETIC, bench_pictures, summary_for_people
from flux_ft.data.parallel import usable_cpus
from flux_ft.errors import DataError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deeper").mkdir()
    for name in ("a.jpg", "deeper/b.JPEG", "deeper/c.png"):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (tmp_path / "a.txt").write_text("a caption")
    return tmp_path


def test_photographs_are_brought_to_the_size(folder):
    figures = bench_pictures(folder, 3.0, 1)
    assert (figures["pictures"], figures["synthetic"], figures["repeats"]) == (3, False, 1)
    assert figures["megapixels"] == pytest.approx(3, rel=0.01)
    assert 50 < figures["psnr_db"]["min"] <= figures["psnr_db"]["median"] < 99
    assert [row["threads"] for row in figures["threads"]] == sorted({1, usable_cpus()})
    assert "3 photographs of 3 MP" in summary_for_people(figures)


def test_without_a_folder_they_are_made_up_and_called_so():
    figures = bench_pictures(None, 0.3, 1)
    assert (figures["pictures"], figures["synthetic"]) == (SYNTHETIC, True)
    assert figures["megapixels"] == pytest.approx(0.3, rel=0.01)
    assert f"{SYNTHETIC} made-up pictures of 0.3 MP" in summary_for_people(figures)


def test_rates_and_ratios_follow_from_the_clock(folder, monkeypatch):
    monkeypatch.setattr("flux_ft.bench.data.usable_cpus", lambda: 1)
    # Pillow takes 4, 2 and 3 seconds for the three pictures, and ours always 1.
    ticks = itertools.accumulate([0, 4, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1])
    figures = bench_pictures(folder, 0.3, 3, clock=lambda: float(next(ticks)))
    assert figures["threads"] == [
        {
            "threads": 1,
            "pillow_pictures_per_s": 1.0,
            "ours_pictures_per_s": 3.0,
            "ratio": {"median": 3.0, "min": 2.0, "max": 4.0},
        }
    ]
    assert "1           1.0            3.0  3.00 (2.00 to 4.00)" in summary_for_people(figures)


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no picture that can be read"):
        bench_pictures(tmp_path, 12.0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        bench_pictures(None, 12.0, 0)
