"""Steps with `speed.fused_lora` and `speed.fused_attention` on and off: the same training but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _random_flux import SMALL, run_steps
from _runs import PRIOR, Run

from flux_ft.adapters.adapted import TrainedLinear
from flux_ft.train import setup

OFF = {"fused_lora": False, "fused_attention": False}
STEPS, SIDE_PX = 4, 64
LORA: dict[str, Any] = {"finetune_type": "lora", "lora_rank": 4}
FULL: dict[str, Any] = {"finetune_type": "full", "full": {"train": "all"}}
RUNS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "recomputed, adafactor": {**LORA, "memory": {"recompute": "full"}, "optim": {"name": "adafactor"}},
    "some linears, another alpha": {**LORA, "lora": {"targets": [r".*\.to_[qv]", ".*proj_mlp"], "alpha": 9.0}},
    "streamed": {**LORA, "memory": {"stream_blocks": 2}},
    "full": FULL,
    "full, streamed": {**FULL, "memory": {"stream_blocks": 2}},
}


def trained(folder: Path, settings: dict[str, Any], **speed: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All losses, all trained weights in one, and how many linears are ours."""
    settings = {"learning_rate": 1e-3, **settings, "speed": speed}
    results, state = run_steps(SMALL, SIDE_PX, STEPS, folder, settings)
    state.settle()
    weights = torch.cat([one.detach().flatten().float() for one in state.trained.values()])
    ours = sum(isinstance(one, TrainedLinear) for one in state.bare.modules())
    return torch.tensor([one.loss for one in results]), weights, ours


@pytest.mark.parametrize("kind", RUNS)
def test_on_is_off_but_for_rounding(kind: str, tmp_path: Path) -> None:
    losses, weights, none = trained(tmp_path, RUNS[kind], **OFF)
    assert none == 0
    for speed in ({}, {"fused_lora": False}, {"fused_attention": False}):
        loss, weight, ours = trained(tmp_path, RUNS[kind], **speed)
        assert (ours > 0) is (kind[:4] != "full" and speed.get("fused_lora", True))
        torch.testing.assert_close(loss, losses, rtol=1e-5, atol=1e-6)
        assert (weight - weights).norm() < 1e-3 * (weights.norm())


def test_prior_pictures_are_the_same_drawn_together_or_alone(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = {"prior": {"prompts": [*PRIOR["prompts"], "small green square, left"]}}
    together = start(**prior).prior
    assert len({one.texts[0].embeds_BLD.data_ptr() for one in together}) == 3
    monkeypatch.setattr(setup, "PRIOR_TOKENS", 1)
    for one, other in zip(together, start(**prior).prior, strict=True):
        assert one.digest == other.digest
        torch.testing.assert_close(one.mean_CHW, other.mean_CHW, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, vars(one.texts[0]).values(), vars(other.texts[0]).values()))
    assert not torch.allclose(together[0].mean_CHW, together[1].mean_CHW, atol=0.1)


@pytest.mark.usefixtures("another_precision")
def test_in_bf16_on_is_off_but_for_rounding(tmp_path: Path) -> None:
    settings = {**LORA, "memory": {"base_precision": "bf16"}}
    losses, weights, _ = trained(tmp_path, settings, **OFF)
    loss, weight, _ = trained(tmp_path, settings)
    torch.testing.assert_close(loss, losses, rtol=2e-2, atol=1e-3)
    assert (weight - weights).norm() < 0.05 * weights.norm()
