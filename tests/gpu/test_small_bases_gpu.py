"""A LoRA on a base of 8 or 4 bits at FLUX.1-dev's full size with random weights: a step's time, and its peak memory.

`pytest tests/gpu/test_small_bases_gpu.py -s` on a machine with a CUDA card of 40 GB or more prints the figures; random
weights are made in bf16 before they are held in less. Without one, the same code runs on a few narrow blocks.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _random_flux import FULL_SIZE, SMALL, run_steps
from accelerate.state import AcceleratorState
from torch import Tensor

from flux_ft.families.products import Frozen, product, product_back
from flux_ft.families.quantize import store, why_not, why_not_fp8

LORA: dict[str, Any] = {"finetune_type": "lora", "lora_rank": 16}
BASES: dict[str, dict[str, Any]] = {
    **{name: {"memory": {"base_precision": name}} for name in ("int8", "fp8", "nf4")},
    "fp8 compute": {"speed": {"fp8_compute": True}},
}
CELLS: dict[str, tuple[str, int, dict[str, Any], float]] = {
    "nf4, 512 px": ("nf4", 512, {"recompute": "full", "stream_blocks": 0}, 8.5e9),
    "nf4, 512 px, 8-bit states": ("nf4", 512, {"recompute": "full", "stream_blocks": 0}, 8.0e9),
    "int8, 1024 px": ("int8", 1024, {"recompute": "full", "stream_blocks": 0}, 18e9),
    "fp8, 1024 px": ("fp8", 1024, {"recompute": "full", "stream_blocks": 0}, 18e9),
    "fp8 compute, 1024 px": ("fp8 compute", 1024, {"recompute": "full", "stream_blocks": 0}, 18e9),
    "int8, 1024 px, streamed": ("int8", 1024, {"stream_blocks": 50}, 9e9),
}
"""A base, a size, what else is set of `memory`, and the most that a step may take in bytes."""
SHAPES = ((4608, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 15360), (1536, 12288, 3072))
"""Of products: tokens, features out, features in."""


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What accelerate keeps from an earlier run in this process, its precision above all, is wiped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def require_card(size: float) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < size:
        pytest.skip(f"needs a CUDA card of {size / 1e9:.0f} GB or more")
    gc.collect()
    torch.cuda.empty_cache()


def with_memory(base: str, memory: dict[str, Any]) -> dict[str, Any]:
    settings = BASES[base]
    return LORA | settings | {"memory": settings.get("memory", {}) | memory}


@pytest.mark.parametrize("base", BASES)
def test_the_loop_runs_with_random_weights(tmp_path: Path, base: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if reason := why_not_fp8(device, dtype) if base == "fp8 compute" else why_not(base, device.type):  # type: ignore[arg-type]
        pytest.skip(reason)
    results, _ = run_steps(SMALL, 64, 3, tmp_path, LORA | BASES[base])
    assert [result.step for result in results] == [1, 2, 3]
    assert all(result.grad_norm > 0 for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_at_full_size_fits(tmp_path: Path, cell: str) -> None:
    require_card(40e9)
    base, side_px, memory, most = CELLS[cell]
    if base == "fp8 compute" and (reason := why_not_fp8(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(reason)
    optim = {"optim": {"name": "adamw8bit"}} if cell.endswith("8-bit states") else {}
    results, state = run_steps(FULL_SIZE, side_px, 20, tmp_path, with_memory(base, memory) | optim)
    peak = torch.cuda.max_memory_allocated()
    seconds = statistics.median(result.seconds for result in results[4:])
    told = {"cell": cell, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "step_s_median": round(seconds, 4), "peak_gb": round(peak / 1e9, 2)}  # fmt: skip
    print(json.dumps(told))
    assert all(result.grad_norm > 0 for result in results)
    assert peak <= most
    del state


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_8_bits_are_right_and_how_fast_they_are(shape: tuple[int, int, int]) -> None:
    require_card(8e9)
    device = torch.device("cuda")
    if reason := why_not_fp8(device, torch.bfloat16):
        pytest.skip(reason)
    tokens, outs, ins = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.bfloat16)

    weight, x, grad = draw(outs, ins), draw(tokens, ins), draw(tokens, outs)
    held = store(weight, "fp8")
    plain, grid, fp8 = Frozen("plain", (weight,)), Frozen("grid", held), Frozen("fp8", held)
    told: dict[str, Any] = {"tokens": tokens, "outs": outs, "ins": ins, "device": torch.cuda.get_device_name()}
    for way, one, inputs in (("forward", product, x), ("back", product_back, grad)):
        exact = one(Frozen("grid", (held[0], held[1].double())), inputs.double())
        assert float((one(grid, inputs) - exact).norm() / exact.norm()) < 0.01
        assert float((one(fp8, inputs) - exact).norm() / exact.norm()) < 0.05
        for name, how in (("bf16", plain), ("grid", grid), ("fp8", fp8)):
            told[f"{way} {name} us"] = round(1e6 * seconds_of(partial(one, how, inputs)), 1)
    print(json.dumps(told))


def seconds_of(work: Callable[[], object], times: int = 20) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times
