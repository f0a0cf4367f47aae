"""Fixtures of the numerics tests: runs in memory that share one cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _runs import Run, Settings
from PIL import Image
from torch import Tensor

from flux_ft.families.base import Family
from flux_ft.families.tiny.scenes import all_scenes, caption, render
from flux_ft.train import loop
from flux_ft.train.loop import StepResult
from flux_ft.train.setup import TrainState


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """Set aside the objects of the imports, which each run's `gc.collect` would go through again: half the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all runs: pictures are encoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tiny_family: Family, run_settings: Settings, cache: Path, tmp_path: Path) -> Callable[..., Run]:
    """`start(**overrides)`: a fresh run with these settings; `resume`: a folder with checkpoints to go on from."""

    def begin(resume: Path | None = None, **overrides: Any) -> Run:
        return Run(tiny_family, run_settings(tmp_path, **overrides), cache, resume)

    return begin


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings with all on that `data` can do: two sources, repeats, weights, masks, captions as tags, some dropped."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    rng = np.random.default_rng(11)
    for number in range(10):
        scene, folder = all_scenes()[int(rng.integers(len(all_scenes())))], folders[number % 2]
        Image.fromarray(np.ascontiguousarray(render(scene, rng))).save(folder / f"{number}.png")
        tags = ["TOK", *caption(scene, rng).split()[:4]]
        (folder / f"{number}.txt").write_text(", ".join(tags))
        if number % 3 == 0:
            mask = np.zeros((64, 64), np.uint8)
            mask[8:40, 16 : 40 + number] = 255
            Image.fromarray(mask).save(folder / f"{number}_mask.png")
    data = {
        "path": str(folders[0]), "sources": [{"path": str(folders[1]), "repeats": 2, "weight": 0.5}],
        "unmasked_weight": 0.1, "caption_dropout": 0.3, "tag_orders": 3, "resample_latents": True,
    }  # fmt: skip
    return {"data": data, "trigger_word": "TOK"}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The gradients of every step, as the optimizer is about to see them; not of fused backward passes."""
    seen: list[dict[str, Tensor]] = []
    states: list[TrainState] = []
    inner_step, inner_check = loop.training_step, loop.refuse_non_finite

    def step(state: TrainState, *rest: Any) -> StepResult:
        states.append(state)
        return inner_step(state, *rest)

    def check(*given: Any) -> None:
        inner_check(*given)
        named = states[-1].bare.named_parameters()
        seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    monkeypatch.setattr(loop, "training_step", step)
    monkeypatch.setattr(loop, "refuse_non_finite", check)
    return seen
