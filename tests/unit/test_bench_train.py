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
from flux_ft.bench import sides, targets, train
from flux_ft.bench.plot import plot
from flux_ft.bench.sides import NOT_HERE, OUT_OF_MEMORY, Cell, Job
from flux_ft.bench.train import TrainBench, bench_train, compare, model_flops
from flux_ft.cli import app
from flux_ft.errors import ConfigError

CELL = "lora-64-b1-none"
RECOMPUTED, COARSE = "lora-64-b1-full", "lora-64-b1-none-int8"


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


def test_what_cannot_be_measured_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["lora.targets=['.*nothing.*']", "--order", "ours", "--cells", CELL, "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "train", *wrong, "--steps", "1", "--json"])
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert "matches none of the" in row["why_not"]

    monkeypatch.setattr(train, "CHILD", "import sys; sys.exit(3)")
    found = bench_train(cells=[CELL], output=tmp_path, order=["ours"])
    assert found.rows() == [{"cell": CELL, "side": "ours", "why_not": "ended with code 3; its own words are above"}]
    assert not found.ok


def test_settings_of_one_turn_and_a_coarser_base(tmp_path: Path) -> None:
    side = "ours memory.recompute=none"  # whatever the cell says
    found = bench_train(cells=[CELL, RECOMPUTED, COARSE], output=tmp_path, steps=1, order=[side], profile=True)
    assert found.ok
    plain, recomputed, coarse = found.rows()
    assert {row["side"] for row in found.rows()} == {side}
    assert 0 < plain["operations"] == recomputed["operations"] < coarse["operations"]
    assert (plain["distance"], recomputed["distance"]) == (0, 0)
    assert 1e-5 < coarse["distance"] < 0.5
    assert f"off the plain base's: loss {coarse['loss_apart']:.1e}" in found.for_people()
    name = f"profile-{CELL}-ours-memory.recompute=none"
    profile = json.loads((tmp_path / f"{name}.json").read_text())
    assert sum(kind["share"] for kind in profile["kinds"]) == pytest.approx(1)
    assert "matrix products" in (tmp_path / f"{name}.txt").read_text()


def test_best_policy_is_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def measure(job: Job, cell: Cell, *_: Any) -> dict[str, Any]:
        tried.append(cell.recompute)
        if cell.recompute == "none":
            raise torch.OutOfMemoryError("full")
        return {"seconds": [1.0]}

    monkeypatch.setattr(sides, "_measure", measure)
    device, job = torch.device("cpu"), Job("A", (), False, 1)
    assert sides._measured(job, "lora-64-b1-auto", device, bool) == {"seconds": [1.0]}
    assert sides._measured(job, "lora-64-b1-none", device, bool) == {"why_not": OUT_OF_MEMORY}
    assert sides._measured(job, "full-64-b1-full-24gb", device, bool)["why_not"].startswith(NOT_HERE)
    assert tried == ["none", "full", "none"]


def test_targets_are_judged_on_the_card_that_they_are_meant_for() -> None:
    best, capped = "lora-1024-b1-auto", f"{targets.UNCAPPED}-24gb"
    assert not {best, capped} - set(targets.TARGET_CELLS)
    assert all(Cell.parse(name) for name in targets.TARGET_CELLS)
    found = TrainBench(True, "model", ("A", "ours"), (), "now", dict.fromkeys((best, targets.UNCAPPED, capped), 165.0))
    found.rates = [{"matmul_tflops": 800.0, "copy_gbps": 3000.0}]
    seconds = ((best, "A", 0.9), (best, "ours", 0.35), (targets.UNCAPPED, "ours", 0.5), (capped, "ours", 1.1))
    found.runs = [
        {"cell": cell, "side": side, "seconds": [one], "first_s": 9.0, "peak_gb": 28.75} for cell, side, one in seconds
    ]
    assert found.goals == []
    found.device = "NVIDIA H100 80GB HBM3"
    verdicts = {(goal["cell"], goal["figure"]): (goal["measured"], goal["verdict"]) for goal in found.goals}
    assert verdicts == {
        (best, "seconds"): (0.35, "must"),
        (best, "times A"): (pytest.approx(0.9 / 0.35), "must"),
        (best, "times B"): (None, None),
        (targets.UNCAPPED, "seconds"): (0.5, "excellent"),
        (targets.UNCAPPED, "peak_gb"): (28.75, "excellent"),
        (capped, "times uncapped"): (2.2, "missed"),
    }
    assert "excellent 1.3, must 2: 2.2, missed" in found.for_people()
    assert plot(found).axes[1].get_ylim()[1] > 0.70  # the whole target is seen
    assert targets.judged([], 150.0)[0]["verdict"] == "must"


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
    found = TrainBench(False, "model", ("A", "ours", "A"), (), "now", {CELL: 100.0, "lora-64-b4-none": 400.0}, "card")
    found.rates = [{"matmul_tflops": rate, "copy_gbps": 3000.0} for rate in (800.0, 700.0, 900.0)]
    base: dict[str, Any] = {"cell": CELL, "side": "A"}
    found.runs = [
        base | {"seconds": [1.0, 1.2], "first_s": 9.0, "peak_gb": 40.0, "distance": 0.0},
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
    assert "at most 1.0e-02 from the first side's" in found.for_people()
    figure = plot(found)
    figure.savefig(tmp_path / "train.png")
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1  # a lone panel is narrow
    assert (tmp_path / "train.png").stat().st_size > 5000
    found.runs = found.runs[:1]
    assert "first side's" not in found.for_people()  # which it is itself


def test_flops_of_the_real_shapes() -> None:
    # Twice the linears and thrice the attention of a forward pass: 24 d² a token and block, 4 d a pair of tokens.
    tokens, width, blocks = 512 + 1024, 3072, 19 + 38
    linears, attention = 24 * width**2 * tokens * blocks, 4 * width * tokens**2 * blocks
    assert model_flops(True, "lora", 512) == pytest.approx(2 * linears + 3 * attention, rel=0.02)


def test_wrong_words_are_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "lora-1000-b1-none",
        "lora-64-b0-none",
        "lora-64-b1-some",
        "dora-64-b1-none",
        "lora-64-b1-none-nf5",
        "",
    ):
        with pytest.raises(ConfigError, match="is no cell"):
            Cell.parse(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"full": True}, "needs a CUDA card"),
        ({"order": ["A", "theirs"]}, "`theirs` is no side"),
        ({"order": ["A speed.compile=off"]}, "`A speed.compile=off` is no side"),
        ({"order": ["ours speed.compiled=off"]}, "compiled"),
        ({"settings": ["optim.beta=1"]}, "beta"),
    )
    for arguments, words in wrong:
        with pytest.raises(ConfigError, match=words):
            bench_train(output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        bench_train(output=tmp_path / "file")
