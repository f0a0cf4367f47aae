"""Adafactor's step and its rounding as few operations: the same arithmetic, draws and state as transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _compiler import needs_compiler
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flux_ft.config import OptimConfig, RunConfig
from flux_ft.errors import ConfigError
from flux_ft.train import compiled
from flux_ft.train.compiled import prepare_update
from flux_ft.train.fused_update import FusedUpdate, draw_noise
from flux_ft.train.optim import OPTIMIZERS, Updates, stochastic_round

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
SHAPES = {"matrix": (40, 64), "tall": (96, 24), "vector": (50,), "scale": (16,)}
RATE, STEPS = 3e-3, 4
MANY = 10**10


def moved(update: FusedUpdate | None, weight_decay: float = 0.0, switch_at: int = 0) -> tuple[dict[str, Tensor], Any]:
    """The weights after STEPS steps, and all optimizer's state; `update` takes over after `switch_at` of them."""
    draw = torch.Generator().manual_seed(1)
    random = {name: torch.randn((1 + STEPS, *shape), generator=draw).to(BF16) for name, shape in SHAPES.items()}
    trained = {name: nn.Parameter(one[0].clone()) for name, one in random.items()}
    optim = OptimConfig(weight_decay=weight_decay)
    updates = Updates(trained, lambda some: OPTIMIZERS["adafactor"].make(some, RATE, optim), update=None)
    for step in range(STEPS):
        updates._update = update if step >= switch_at else None
        for name, parameter in trained.items():
            parameter.grad = (0.1 if step % 2 else 5) * random[name][1 + step]  # the longer is cut, the shorter is not
        updates.begin(step, RATE / (1 + step))
        updates.finish()
    return {name: one.detach() for name, one in trained.items()}, updates.state_dict()["state"]


def assert_same(one: Any, other: Any) -> None:
    """Both round by the same draws, so numbers that differ by float32's rounding differ in bf16 once in thousands."""
    weights, others = (torch.cat([w.flatten() for w in found[0].values()]) for found in (one, other))
    assert float((weights != others).float().mean()) < 1e-3
    assert torch.allclose(weights.float(), others.float(), rtol=2**-7, atol=1e-4)
    for name in SHAPES:
        assert one[1][name].keys() == other[1][name].keys()
        for key, value in one[1][name].items():
            if torch.is_tensor(value) and value.ndim:
                assert torch.allclose(value, other[1][name][key], rtol=1e-5), (name, key)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_moves_as_transformers_does(weight_decay: float) -> None:
    expected = moved(None, weight_decay)
    assert_same(expected, moved(FusedUpdate(None), weight_decay))
    start = moved(None, weight_decay, switch_at=STEPS)
    assert float((start[0]["matrix"] - moved(None, 0.5)[0]["matrix"]).float().norm()) > 0  # decay is felt


def test_a_run_goes_on_with_it_and_without() -> None:
    assert_same(moved(None), moved(FusedUpdate(None), switch_at=2))


def test_it_rounds_by_the_draws_of_stochastic_rounding() -> None:
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    expected = stochastic_round(wide.clone(), torch.Generator().manual_seed(3))
    noise = draw_noise(wide, torch.Generator().manual_seed(3))
    assert noise.dtype is torch.int16
    bits = (wide.view(torch.int32) + (noise.int() + (1 << 15))) & -(1 << 16)
    assert torch.equal(bits.view(torch.float32).to(BF16), expected)


def config(choice: str = "auto", **more: Any) -> RunConfig:
    return RunConfig.model_validate({"data": ".", "finetune_type": "full", "speed": {"compile": choice}, **more})


@pytest.mark.parametrize(
    ("settings", "optimizer", "size", "device", "mode", "is_made"),
    [
        (config(), "adafactor", MANY, GPU, "fast", True),
        (config(), "adafactor", MANY, GPU, "strict", False),
        (config(), "adafactor", 10**6, GPU, "fast", False),
        (config(), "adafactor", MANY, CPU, "strict", False),
        (config("off"), "adafactor", MANY, GPU, "fast", False),
        (config("blocks"), "adafactor", 10**6, CPU, "strict", True),
        (config("blocks"), "adamw", MANY, GPU, "fast", False),
        (config("blocks", finetune_type="lora"), "adafactor", MANY, GPU, "fast", False),
        (config("blocks", full={"rounding": "kahan"}), "adafactor", MANY, GPU, "fast", False),
    ],
)
def test_where_it_is_taken(
    settings: RunConfig, optimizer: str, size: int, device: torch.device, mode: Any, is_made: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(compiled, "_lacks_compiler", lambda _: None)
    monkeypatch.setattr(compiled, "keep_compiled", lambda: None)
    monkeypatch.setattr(compiled, "_moved_once", lambda *_: torch.ones(2))
    assert (prepare_update(settings, optimizer, size, device, mode) is not None) == is_made


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
def test_a_compiler_that_cannot_is_told_of(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Faulty(FusedUpdate):
        def __call__(self, state: Any, group: Any, weight: Tensor, gradient: Tensor, noise: Tensor) -> None:
            if self._backend and fault == "fails":
                raise RuntimeError("no such kernel\nand more")
            super().__call__(state, group, weight, gradient, noise)
            if self._backend:
                weight.mul_(1.1)

        def __init__(self, backend: str | None = None) -> None:
            self._backend = backend
            super().__init__(None)

    monkeypatch.setattr(compiled, "FusedUpdate", Faulty)
    monkeypatch.setattr(compiled, "_lacks_compiler", lambda _: None)
    monkeypatch.setattr(compiled, "is_worthwhile", lambda *_: True)
    monkeypatch.setattr(compiled, "keep_compiled", lambda: None)
    assert prepare_update(config(), "adafactor", MANY, CPU, "strict") is None
    told = capsys.readouterr().err
    assert told.startswith("warning: the optimizer's update is not compiled")
    assert ("no such kernel" if fault == "fails" else "10.0% off") in told
    with pytest.raises(ConfigError, match=r"speed\.compile` does not work"):
        prepare_update(config("blocks"), "adafactor", MANY, CPU, "strict")


@needs_compiler
def test_compiled_once_for_all_sizes_it_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled._lacks_compiler(CPU):
        pytest.skip("no C compiler")
    monkeypatch.setattr(compiled, "keep_compiled", lambda: None)
    torch.compiler.reset()
    counters.clear()
    update = prepare_update(config("blocks"), "adafactor", 1, CPU, "strict")
    assert update is not None
    assert_same(moved(None), moved(update))
    assert counters["stats"]["unique_graphs"] <= 4  # both measurements; moving both kinds
    torch.compiler.reset()
