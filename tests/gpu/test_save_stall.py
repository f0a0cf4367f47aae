"""How long training waits for a save, beside the copy to host memory alone, measured in the same run.

`pytest tests/gpu/test_save_stall.py -s` on a CUDA card prints the figures: a LoRA of rank 32 (40 GB), a full fine-tune
of all of FLUX.1-dev with Adafactor (40 GB, 60 GB of host memory, 80 GB of disk). Elsewhere narrow blocks do the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _random_flux import FULL_SIZE, SMALL, run_steps
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from flux_ft.bench.infer import RandomFlux1
from flux_ft.config import RunConfig
from flux_ft.train import checkpoint
from flux_ft.train.resume import Keeper, snapshot
from flux_ft.train.saving import Saver

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"finetune_type": "lora", "lora_rank": 32},
    "full": {"finetune_type": "full", "optim": {"name": "adafactor"}},
}


def measure(family: RandomFlux1, side_px: int, folder: Path, kind: str) -> dict[str, Any]:
    """Seconds of the copy alone, of what training waits for in two saves, and of a whole save."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = KINDS[kind] | {"memory": {"base_precision": "bf16"}}
    _, state = run_steps(family, side_px, 3, folder, settings)
    config = RunConfig.model_validate({"data": str(folder), "output": str(folder), "iterations": 3, **settings})

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    snapshot(state)  # the first use of so much host memory is slower
    started = wait()
    size = snapshot(state).nbytes
    copied = wait()
    saver = Saver(Keeper(state, config, checkpoint.About(1, {})).job)
    stalls = []
    for step in (1, 2):
        began = wait()
        saver.save(step)
        stalls.append(wait() - began)
        saver.finish(step)
    found, passed_over = checkpoint.latest(folder / "checkpoints")
    assert not passed_over
    assert found is not None
    assert found.about.step == 2
    saved = load_file(found.path / checkpoint.WEIGHTS)
    assert all(torch.equal(saved[name], one.detach().cpu()) for name, one in state.trained.items())
    return {
        "saved": kind, "mb": round(size / 1e6, 1), "copy_s": round(copied - started, 3),
        "stall_s": [round(one, 3) for one in stalls], "save_s": round(saver.longest_s, 3),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_blocks_go_the_same_way(tmp_path: Path, kind: str) -> None:
    assert measure(SMALL, 64, tmp_path, kind)["mb"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_training_waits_for_little_more_than_the_copy(tmp_path: Path, kind: str) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs a CUDA card of 40 GB or more")
    told = measure(FULL_SIZE, 512, tmp_path, kind)
    print(json.dumps(told | {"device": torch.cuda.get_device_name()}))
