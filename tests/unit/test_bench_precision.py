"""The table of bases: each is measured, trained on and scored by its own pictures, and held against the first."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ft.bench import precision as bench
from flux_ft.errors import ConfigError, FluxFTError
from flux_ft.families.registry import open_family
from flux_ft.runfile import load_run
from flux_ft.train.run import train

pytestmark = pytest.mark.usefixtures("on_cpu")


def here(command: Sequence[str]) -> dict[str, Any]:
    """The training of a child, in this process."""
    assert command[:4] == [sys.executable, "-m", "flux_ft", "train"]
    assert command[5] == "--json"
    return train(load_run(Path(command[4])).config).as_json()


def test_each_base_is_trained_on_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(runner: Any, trials: Sequence[Any], title: str) -> list[Image.Image]:
        drawn.append((runner.model, [one.path.parent.name for one in runner.adapters]))
        return [Image.fromarray(np.zeros((64, 64, 3), np.uint8))] * len(trials)

    monkeypatch.setattr(bench, "draw", draw)
    monkeypatch.setattr(bench, "_in_a_child", here)
    monkeypatch.setattr(bench, "PICTURES", 4)
    output = tmp_path / "out"
    figures = bench.bench_precision(output, bases=["int8", "fp32"], iterations=2)
    assert json.loads((output / "precision.json").read_text()) == figures
    full, small = figures["rows"]
    assert (full["base"], small["base"]) == ("fp32", "int8")
    assert load_run(output / "int8.yaml").config.memory.base_precision == "int8"
    assert full["velocity_off"] == 0 < small["velocity_off"] < 0.02
    for key, _ in bench.COLUMNS:
        assert 0 < abs(small[key] / full[key] - 1) < 0.02
    assert drawn == [("flux-tiny", ["fp32"]), ("flux-tiny", ["int8"])]
    assert (small["concept"], small["prior"]) == (0, 0)
    words = bench.summary_for_people(figures)
    assert f"{small['own_loss']:.5f} {small['own_loss'] / full['own_loss'] - 1:+8.2%}" in words


def test_another_model_is_trained_on_the_users_pictures(
    tmp_path: Path, pictures: Path, tiny_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_in_a_child", here)
    figures = bench.bench_precision(
        tmp_path / "out", model=tiny_family.source, data=pictures, bases=["nf4", "int8"], iterations=1
    )
    assert [row["base"] for row in figures["rows"]] == [
        name for name in ("int8", "nf4") if name not in figures["left_out"]
    ]
    assert "concept" not in figures["rows"][0]
    assert "velocity off" not in bench.summary_for_people(figures)


def test_the_own_loss_is_what_the_model_was_trained_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has learned its world is far better at it than one that says nothing, whose loss is near 2."""
    monkeypatch.setattr(bench, "PICTURES", 8)
    rows = bench._own_losses(open_family("flux-tiny"), ["fp32", "fp8"], torch.device("cpu"), torch.float32, 0)
    assert rows["fp32"]["own_loss"] < 0.1
    assert 0.002 < rows["fp8"]["velocity_off"] < 0.05


def test_bad_wishes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`--base int4` is not known"):
        bench.bench_precision(tmp_path / "a", bases=["int4"])
    with pytest.raises(ConfigError, match="`--model flux1-dev` needs pictures"):
        bench.bench_precision(tmp_path / "a", model="flux1-dev")
    assert not (tmp_path / "a").exists()
    (tmp_path / "note").touch()
    with pytest.raises(ConfigError, match="holds something already"):
        bench.bench_precision(tmp_path)


def test_bases_of_which_none_works_are_told_with_their_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "why_not", lambda storage, device_type: "no" if storage == "nf4" else None)
    with pytest.raises(ConfigError, match="none of these bases works here: nf4: no"):
        bench.bench_precision(tmp_path / "a", bases=["nf4"])
    assert not (tmp_path / "a").exists()


def test_one_picture_alone_is_refused(
    tmp_path: Path, pictures: Path, tiny_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_in_a_child", here)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("00.png", "00.txt"):
        shutil.copy(pictures / name, alone)
    with pytest.raises(ConfigError, match="holds one picture only"):
        bench.bench_precision(tmp_path / "out", model=tiny_family.source, data=alone, bases=["fp32"], iterations=1)


def test_a_child_that_fails_is_told_with_its_last_words() -> None:
    assert bench._in_a_child([sys.executable, "-c", "print('{\"loss\": 1}')"]) == {"loss": 1}
    with pytest.raises(FluxFTError, match="a training failed: no memory") as failed:
        bench._in_a_child([sys.executable, "-c", "import sys; sys.exit('no memory')"])
    assert "try it alone" in str(failed.value.hint)
