"""The training bench with real children: equal sides get times, a side that computes something else gets none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flux_ft import files
from flux_ft.bench import train
from flux_ft.bench.sides import OUT_OF_MEMORY, Cell
from flux_ft.bench.train import TrainBench, bench_train, compare, model_flops, plot
from flux_ft.cli import app
from flux_ft.errors import ConfigError

CELL = "lora-64-b1-none"


def test_equal_sides_get_times_until_one_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, Any]] = []  # what a bench that is killed after each cell leaves behind

    def write(path: Path, content: bytes) -> None:
        files.write_whole(path, content)
        kept.append(json.loads(path.read_text(encoding="utf-8")))

    monkeypatch.setattr(train, "write_whole", write)
    found = bench_train(cells=[CELL], output=tmp_path, steps=2, order=["A", "ours", "B"], seeds={"B": 1})
    assert len(kept) == 3
    theirs, ours = kept[1]["runs"]
    assert [len(run["seconds"]) for run in (theirs, ours)] == [2, 2]
    assert ours["distance"] < 1e-5
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert all(row["seconds"] > 0 for row in kept[1]["rows"])

    assert not found.ok
    assert kept[2] == json.loads(json.dumps(found.as_json()))
    assert kept[2]["runs"] == []
    assert f"{CELL} has no times: side B does not compute what the first side does" in found.for_people()


def test_child_that_dies_is_told_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = ["lora.targets=['.*nothing.*']", "--order", "ours", "--cells", CELL, "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "train", *wrong, "--steps", "1", "--json"])
    assert done.exit_code == 1
    rows = json.loads(done.stdout)["rows"]
    assert rows == [{"cell": CELL, "side": "ours", "why_not": "ended with code 1; its own words are above"}]
    assert "matches none of the" in capfd.readouterr().err


def test_every_number_of_a_gradient_counts() -> None:
    first = {"loss": 2.0, "norm": 1.0, "dtype": "float32", "gradients": {"a": [3.0, 4.0], "b": [0.0, 0.0]}}
    assert compare("B", first, first) == (0.0, "")
    other = first | {"gradients": {"a": [3.0, 4.0], "b": [0.0, 0.001]}}
    assert compare("B", other, first)[0] == pytest.approx(0.0002)
    for wrong in ({"loss": 2.0001}, {"norm": 1.0001}, {"gradients": {"a": [3.0, 4.0]}}, {"loss": math.nan}, other):
        assert compare("B", first | wrong, first)[1]
    rounded = first | {"dtype": "bfloat16"}
    assert compare("B", rounded | {"loss": 2.001, "norm": 1.01}, rounded)[1] == ""


def test_table_and_plot_of_a_card(tmp_path: Path) -> None:
    found = TrainBench("model", ("A", "ours", "A"), (), "now", {CELL: 100.0, "lora-64-b4-none": 400.0}, "card")
    found.rates = [{"matmul_tflops": rate, "copy_gbps": 3000.0} for rate in (800.0, 700.0, 900.0)]
    base: dict[str, Any] = {"cell": CELL, "side": "A"}
    found.runs = [
        base | {"seconds": [1.0, 1.2], "first_s": 9.0, "peak_gb": 40.0},
        base | {"cell": "lora-64-b4-none", "why_not": OUT_OF_MEMORY},
        base | {"side": "ours", "seconds": [0.5, 0.5], "first_s": 5.0, "peak_gb": 30.0, "distance": 0.01},
        base | {"seconds": [1.0, 1.0], "first_s": 8.0, "peak_gb": 41.0},
    ]
    theirs, ours, lost = found.rows()
    assert (theirs["seconds"], theirs["ours_is_faster"], theirs["peak_gb"]) == (1.0, 2.0, 41.0)
    assert theirs["turns_apart"] == pytest.approx(0.1)
    assert ours["mfu"] == 100 / 0.5 / 800
    assert lost["why_not"] == OUT_OF_MEMORY
    assert found.ok
    assert "2.00 ×" in found.for_people()
    plot(found).savefig(tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 5000


def test_flops_of_the_real_shapes() -> None:
    # Twice the linears and thrice the attention of a forward pass: 24 d² a token and block, 4 d a pair of tokens.
    tokens, width, blocks = 512 + 1024, 3072, 19 + 38
    linears, attention = 24 * width**2 * tokens * blocks, 4 * width * tokens**2 * blocks
    assert model_flops(True, "lora", 512) == pytest.approx(2 * linears + 3 * attention, rel=0.02)


def test_wrong_words_are_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lora-1000-b1-none", "lora-64-b0-none", "lora-64-b1-some", "dora-64-b1-none", ""):
        with pytest.raises(ConfigError, match="is no cell"):
            Cell.parse(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"full": True}, "needs a CUDA card"),
        ({"order": ["A", "theirs"]}, "names no side"),
        ({"settings": ["optim.beta=1"]}, "beta"),
    )
    for arguments, words in wrong:
        with pytest.raises(ConfigError, match=words):
            bench_train(output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
