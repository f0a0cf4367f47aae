"""Whether and how often a run is saved beside its training must not show in what comes out. Exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _runs import Settings, assert_same_bits
from safetensors.torch import load_file
from torch import Tensor

from flux_ft.train.run import read_metrics, train

pytestmark = pytest.mark.usefixtures("on_cpu", "quick_collection")

EVERY = (None, 1, 3)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"dropout": 0.2}},
    "full": {"finetune_type": "full", "optim": {"ema_decay": 0.9, "ema_every": 2}},
    "full, gradients kept": {"finetune_type": "full", "memory": {"fused_backward": False}},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_saves_change_nothing(run_settings: Settings, tmp_path: Path, kind: str) -> None:
    weights: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for every in EVERY:
        settings = KINDS[kind] | {"iterations": 6, "checkpoint": {"every": every}}
        result = train(run_settings(tmp_path / str(every), **settings))
        steps = sorted(path.name for path in result.folder.glob("checkpoints/*"))
        assert steps == {None: [], 1: ["step-000005", "step-000006"], 3: ["step-000003", "step-000006"]}[every]
        weights.append(load_file(result.loras["diffusers"]))
        losses.append([row["loss"] for row in read_metrics(result.folder)])
    assert len(losses[0]) == 6
    assert losses[1:] == losses[:1] * 2
    for other in weights[1:]:
        assert_same_bits(weights[0], other)
