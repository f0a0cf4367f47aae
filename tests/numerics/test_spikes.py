"""The spike guard: a step whose gradient jumps is left out, also after a stop, and a run gone wrong is not hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import Run, assert_same_bits

from flux_ft.errors import NumbersError
from flux_ft.train import loop
from flux_ft.train.loop import NORMS_NEEDED, SPIKES_AT_MOST, StepResult

SETTINGS: dict[str, Any] = {
    "iterations": NORMS_NEEDED + 12, "optim": {"spike_factor": 20.0, "batch_size": 1}, "data": {"workers": 0},
}  # fmt: skip
SPIKE = NORMS_NEEDED + 3
"""The step, counted from 0, whose loss is multiplied."""


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """`jump(steps)`: the loss of these steps is a thousand times larger."""
    inner = loop.batch_loss

    def begin(steps: range) -> None:
        def loss(state: Any, *rest: Any) -> Any:
            loss_B, sigma_B = inner(state, *rest)
            return loss_B * (1000.0 if state.step in steps else 1.0), sigma_B

        monkeypatch.setattr(loop, "batch_loss", loss)

    return begin


def left_out(results: list[StepResult]) -> list[int]:
    return [result.step - 1 for result in results if result.left_out]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_spike_moves_nothing_and_is_told(
    start: Callable[..., Run], jump: Callable[[range], None], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    jump(range(SPIKE, SPIKE + 1))
    run = start(**SETTINGS, finetune_type=kind, learning_rate=1e-4)
    seen: list[dict[str, torch.Tensor]] = []
    run.train(log=lambda result: (run.results.append(result), seen.append(run.weights))[0])
    assert left_out(run.results) == [SPIKE]
    assert_same_bits(seen[SPIKE - 1], seen[SPIKE])
    assert any(not torch.equal(seen[SPIKE][name], one) for name, one in seen[SPIKE + 1].items())
    told = capsys.readouterr().err
    assert f"step {SPIKE + 1} is left out" in told
    assert "Pictures: " in told


def test_without_the_guard_it_is_taken(start: Callable[..., Run], jump: Callable[[range], None]) -> None:
    jump(range(SPIKE, SPIKE + 1))
    run = start(**SETTINGS | {"optim": {"batch_size": 1}}).train()
    assert left_out(run.results) == []


def test_early_steps_are_never_left_out(start: Callable[..., Run], jump: Callable[[range], None]) -> None:
    jump(range(NORMS_NEEDED - 1, NORMS_NEEDED))
    assert left_out(start(**SETTINGS).train().results) == []


def test_what_is_remembered_survives_a_stop(
    start: Callable[..., Run], jump: Callable[[range], None], tmp_path: Path
) -> None:
    """Stopped between two spikes: without the norms from before, the second would be an early step."""
    jump(range(SPIKE, SPIKE + 2))
    straight = start(**SETTINGS).train()
    start(**SETTINGS).train_until(SPIKE + 1, tmp_path)
    resumed = start(tmp_path, **SETTINGS).train()
    assert left_out(straight.results) == [SPIKE, SPIKE + 1]
    assert left_out(resumed.results) == [SPIKE + 1]
    assert resumed.state.norms == straight.state.norms
    assert_same_bits(straight.weights, resumed.weights)


def test_many_in_a_row_end_the_run(start: Callable[..., Run], jump: Callable[[range], None]) -> None:
    jump(range(SPIKE, 1000))
    run = start(**SETTINGS)
    with pytest.raises(NumbersError, match=f"so were the {SPIKES_AT_MOST} before it"):
        run.train()
    assert run.state.step == SPIKE + SPIKES_AT_MOST
