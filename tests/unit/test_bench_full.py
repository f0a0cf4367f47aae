"""The table of full fine-tune, extracted and trained LoRAs: each model draws, and is scored by its own pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from flux_ft.bench import full as bench
from flux_ft.errors import ConfigError
from flux_ft.families.tiny.scenes import COLORS, render_emblem
from flux_ft.quickstart import EMBLEM

pytestmark = pytest.mark.usefixtures("on_cpu")


def test_each_model_is_scored_by_what_it_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ITERATIONS", 1)
    drawn = {}

    def draw(runner, trials, title):
        """The emblem, where the model is a LoRA or the full one; else nothing."""
        drawn[title.removeprefix("draw: ")] = (runner.model, [one.path.name for one in runner.adapters])
        blank = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
        if runner.model == "flux-tiny" and not runner.adapters:
            return [blank] * len(trials)
        pictures = []
        for trial in trials:
            scene = trial.scene
            if scene.shape == "emblem":
                made = render_emblem(EMBLEM, scene.size, scene.position, COLORS[scene.background], (0.0, 0.0))
                pictures.append(Image.fromarray(made))
            else:
                pictures.append(blank)
        return pictures

    monkeypatch.setattr(bench, "draw", draw)
    monkeypatch.setattr(bench, "run_settings", quick_settings(bench.run_settings))
    figures = bench.bench_full(tmp_path / "out")
    assert {row["model"]: row["concept"] > 0.9 for row in figures["rows"]} == {
        "base": False, "full": True, "extracted, rank 32": True, "extracted, rank 16": True,
        "trained LoRA, rank 32": True,
    }  # fmt: skip
    assert drawn["base"] == ("flux-tiny", [])
    assert drawn["full"][0].endswith("-full.safetensors")
    assert drawn["extracted, rank 16"] == ("flux-tiny", ["extracted-16.safetensors"])
    assert figures["energy_kept"]["16"] < figures["energy_kept"]["32"] <= 1
    assert json.loads((tmp_path / "out" / "full.json").read_text()) == figures
    assert Image.open(figures["grid"]).size[1] > 5 * 128
    words = bench.summary_for_people(figures)
    assert all(name in words for name in drawn)


def quick_settings(original):
    def settings(*arguments):
        return original(*arguments) | {"prior": {}, "preview": {"every": None}, "optim": {"batch_size": 1}}

    return settings


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="holds something already"):
        bench.bench_full(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
