"""Training at FLUX.1-dev's full size with random weights: no download, the real loop, time and peak memory.

`pytest tests/gpu -s` on a machine with a CUDA card of 40 GB or more prints the figures. Without one, the same code
runs on the CPU with a few narrow blocks, so that it cannot rot.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _random_flux import FULL_SIZE, SMALL, run_steps
from accelerate.state import AcceleratorState

from flux_ft.train.loop import StepResult

LORA = {"finetune_type": "lora", "lora_rank": 16}
FULL: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "adafactor": ({"optim": {"name": "adafactor"}}, 29e9, None),
    "adamw8bit": ({"optim": {"name": "adamw8bit"}}, 53e9, None),
    "streamed": ({"optim": {"name": "adafactor"}, "memory": {"stream_blocks": 30}}, 24e9, 24e9),
}
"""Recipes of full fine-tunes: settings, the most memory that they may take at 1 MP in bytes, and the card's size that
is made believe."""


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What accelerate keeps from an earlier run in this process, its precision above all, is wiped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def figures(what: str, side_px: int, results: list[StepResult]) -> dict[str, Any]:
    """What is printed: a step's time is the median after the first fifth."""
    seconds = [result.seconds for result in results[len(results) // 5 :]]
    return {
        "run": what, "device": torch.cuda.get_device_name(), "torch": torch.__version__, "side_px": side_px, "batch": 1,
        "step_s_median": round(statistics.median(seconds), 4), "step_s_max": round(max(seconds), 4),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }  # fmt: skip


def require_card(size: float) -> None:
    """Skip without a CUDA card of so many bytes; else begin with it empty."""
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < size:
        pytest.skip(f"needs a CUDA card of {size / 1e9:.0f} GB or more")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("settings", [LORA, *(recipe[0] for recipe in FULL.values())], ids=["lora", *FULL])
def test_the_loop_runs_with_random_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    """In bf16, as on a GPU."""
    memory = {"base_precision": "bf16", **settings.get("memory", {})}
    results, state = run_steps(SMALL, 64, 3, tmp_path, {**settings, "memory": memory})
    assert [result.step for result in results] == [1, 2, 3]
    assert all(result.grad_norm > 0 for result in results)
    assert (state.stream is not None) == ("stream_blocks" in memory)


@pytest.mark.gpu
@pytest.mark.parametrize("side_px", [512, 1024])
def test_fifty_lora_steps_at_full_size(tmp_path: Path, side_px: int) -> None:
    require_card(40e9)
    results, state = run_steps(FULL_SIZE, side_px, 50, tmp_path, LORA)
    print(json.dumps(figures("lora", side_px, results)))
    assert all(result.grad_norm > 0 for result in results)
    del state


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", FULL)
def test_a_full_fine_tune_at_full_size_fits(tmp_path: Path, recipe: str) -> None:
    settings, most, card = FULL[recipe]
    require_card(most * 1.05 if card is None else card)
    if card is not None:
        torch.cuda.set_per_process_memory_fraction(card / torch.cuda.get_device_properties(0).total_memory)
    try:
        results, state = run_steps(FULL_SIZE, 1024, 10, tmp_path, {"finetune_type": "full", **settings})
        told = figures(recipe, 1024, results)
        print(json.dumps(told))
        assert told["peak_gb"] * 1e9 <= most
        assert all(result.grad_norm > 0 for result in results)
        del state
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
