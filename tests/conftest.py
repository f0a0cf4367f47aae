"""What the tests share: no network, flux-tiny, a small folder of pictures, and run settings for a few steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_ft.config import RunConfig
from flux_ft.families.base import Family
from flux_ft.families.tiny.scenes import all_scenes, caption, render

# Set before transformers and diffusers are imported: nothing here may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

NUM_SQUARE, NUM_TALL = 6, 4


@pytest.fixture(autouse=True, scope="module")
def no_accelerator_is_remembered() -> Iterator[None]:
    """Wipe what accelerate keeps in a process, its precision above all, after each file of tests."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def own_scan_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests scan is remembered apart from what the user scans; children inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_FT_CACHE", str(tmp_path_factory.mktemp("scan-index")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models of this size are slower on several threads, and sums then come out alike on every machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_family() -> Family:
    """flux-tiny; nothing is loaded yet."""
    from flux_ft.families.registry import open_family

    return open_family("flux-tiny")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scenes with captions in two sizes: six of 64×64 px, four of 48×64 px."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(7)
    scenes = [all_scenes()[i] for i in rng.choice(len(all_scenes()), NUM_SQUARE + NUM_TALL, replace=False)]
    for index, scene in enumerate(scenes):
        picture = render(scene, rng)
        picture = picture if index < NUM_SQUARE else picture[:, 8:56]
        Image.fromarray(np.ascontiguousarray(picture)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption(scene, rng) + "\n")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of whole trainings first: they take longest, and no core shall wait for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("trained") is None)


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate, which takes one precision a process, remembers none, before the test and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, another_precision: None) -> None:
    """accelerate takes the CPU even where there is a GPU; what it remembers between runs is wiped."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def run_settings(pictures: Path) -> Callable[..., RunConfig]:
    """`run_settings(folder, **overrides)`: a valid run of three quiet steps on flux-tiny; sections merge key by key."""

    def settings(folder: Path, **overrides: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": "flux-tiny",
            "data": {"path": str(pictures)},
            "output": str(folder / "run"),
            "finetune_comment": "test run",
            "trigger_word": "",
            "finetune_type": "lora",
            "lora_rank": 4,
            "iterations": 3,
            "learning_rate": 1e-3,
            "seed": 3,
            "optim": {"batch_size": 2},
            "preview": {"every": None},
            "checkpoint": {"every": None},
            "export": {"dtype": "fp32"},
        }
        for key, value in overrides.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        return RunConfig.model_validate(values)

    return settings
