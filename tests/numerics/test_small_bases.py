"""A LoRA on a base of 8 or 4 bits a weight: what is computed is what its numbers say, by every road.

All on flux-tiny on the CPU, in float32. "Exact" is bit by bit; elsewhere the tolerance says why it is not zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import CPU, FP32, Run, Settings, assert_same_bits, gap
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flux_ft.adapters import lora
from flux_ft.adapters.attached import attach_states
from flux_ft.adapters.formats import read_adapter
from flux_ft.errors import ConfigError
from flux_ft.families import products
from flux_ft.families.base import Family
from flux_ft.families.quantize import why_not, why_not_fp8
from flux_ft.train import held, loop
from flux_ft.train import stream as streaming
from flux_ft.train.run import train

FP8_COMPUTE: dict[str, Any] = {"speed": {"fp8_compute": True}}
BASES: dict[str, dict[str, Any]] = {
    **{name: {"memory": {"base_precision": name}} for name in ("int8", "fp8", "nf4")},
    "fp8 compute": FP8_COMPUTE,
}
FP8_OFF = {"loss": 0.01, "gradients": 0.06}
"""The most that a LoRA's loss and gradients may change where its base multiplies in 8 bits; measured: 0.0048, 0.034."""

pytestmark = pytest.mark.usefixtures("quick_collection")


each_kind = pytest.mark.parametrize("base", ["int8", "nf4", "fp8 compute"], indirect=True)
"""fp8 is computed as int8 is."""


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> dict[str, Any]:
    name = str(request.param)
    if reason := why_not_fp8(CPU, FP32) if name == "fp8 compute" else why_not(name, "cpu"):  # type: ignore[arg-type]
        pytest.skip(reason)
    return BASES[name]


def with_(base: dict[str, Any], **memory: Any) -> dict[str, Any]:
    """The same base with further settings of `memory`."""
    return base | {"memory": base.get("memory", {}) | memory}


def step(run: Run) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    for parameter in run.state.trained.values():
        parameter.grad = None
    (batch,) = loop.step_batches(run.config, run.data.examples, [0, 0], 0)
    loss = loop.batch_loss(run.state, run.family, run.config, batch)[0].mean()
    loss.backward()
    gradients = {name: one.grad for name, one in run.state.trained.items() if one.grad is not None}
    assert gradients.keys() == run.state.trained.keys()
    return float(loss.detach()), {name: one.clone() for name, one in gradients.items()}


@torch.no_grad()
def spread_out(small: Run, plain: Run) -> None:
    """Give a plain base the numbers that a small one stands for."""
    layers = (lora.layers_of(run.state.bare, lora.TRAINED) for run in (small, plain))
    for (_, ours), (_, other) in zip(*layers, strict=True):
        kind, tensors = products.frozen(ours.base_layer)
        weight = products.Frozen("grid" if kind == "fp8" else kind, tensors)
        other.base_layer.weight.copy_(products.product_back(weight, torch.eye(ours.out_features)))


class TestOneStep:
    @pytest.mark.parametrize("fused", [True, False])
    def test_is_that_of_a_plain_base_with_the_same_numbers(
        self, start: Callable[..., Run], base: dict[str, Any], fused: bool
    ) -> None:
        """Sums have another order, hence the tolerance; and fp8 rounds what it multiplies."""
        speed = base.get("speed", {}) | {"fused_lora": fused}
        small, plain = start(**base | {"speed": speed}).stir(), start(speed={"fused_lora": fused}).stir()
        alone = step(plain)
        spread_out(small, plain)
        (loss, gradients), (wanted, others) = step(small), step(plain)
        off = FP8_OFF if base is FP8_COMPUTE else {"loss": 1e-6, "gradients": 1e-5}
        assert loss == pytest.approx(wanted, rel=off["loss"])
        assert gap(others, gradients) < off["gradients"]
        assert gap(others, alone[1]) > 1e-3  # it is another base

    @pytest.mark.parametrize("name", ["int8", "fp8", "fp8 compute"])
    def test_multiplies_no_more_than_on_a_plain_base(self, start: Callable[..., Run], name: str) -> None:
        """No gradient of a frozen weight. Fused linears add products in place, which torch does not count."""
        if name == "fp8 compute" and why_not_fp8(CPU, FP32):
            pytest.skip("this torch has no such product on a CPU")
        counted = []
        for base in (BASES[name], {}):
            run = start(**base | {"speed": base.get("speed", {}) | {"fused_lora": False}})
            with FlopCounterMode(display=False) as flops:
                step(run)
            counted.append(flops.get_total_flops())
        assert counted[0] == counted[1] > 0

    @each_kind
    @pytest.mark.parametrize("policy", ["selective", "full"])
    def test_has_the_same_bits_when_computed_again(
        self, start: Callable[..., Run], base: dict[str, Any], policy: str
    ) -> None:
        runs = [start(**with_(base, recompute=one)).stir() for one in ("none", policy)]
        (loss, gradients), (again, others) = (step(run) for run in runs)
        assert loss == again
        assert_same_bits(gradients, others)


class TestStreamed:
    @pytest.mark.parametrize("name", ["int8", "fp8", "fp8 compute"])
    def test_has_the_bits_of_a_resident_base_and_sends_nothing_home(
        self, start: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if name == "fp8 compute" and why_not_fp8(CPU, FP32):
            pytest.skip("this torch has no such product on a CPU")
        sent = []
        monkeypatch.setattr(streaming._Copies, "bring_home", lambda *_: sent.append(1))
        resident = start(**with_(BASES[name], recompute="full", stream_blocks=0)).train()
        streamed = start(**with_(BASES[name], stream_blocks=5)).train()
        assert streamed.state.stream is not None
        assert streamed.state.stream.host_bytes > 5 * 100_000
        assert streamed.losses == resident.losses
        assert_same_bits(streamed.weights, resident.weights)
        assert not sent
        assert streamed.state.base_digest == resident.state.base_digest

    def test_four_bits_cannot_be(self, run_settings: Settings, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=re.escape("cannot move weights that `memory.base_precision: nf4`")):
            run_settings(tmp_path, memory={"base_precision": "nf4", "stream_blocks": 2})


@each_kind
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    start: Callable[..., Run], base: dict[str, Any], tmp_path: Path
) -> None:
    straight = start(**base).train()
    start(**base).train_until(2, tmp_path)
    resumed = start(resume=tmp_path, **base).train()
    assert resumed.losses == straight.losses[2:]
    assert_same_bits(resumed.weights, straight.weights)


def test_a_whole_run_draws_and_writes_a_lora_for_the_plain_model(
    run_settings: Settings, tiny_family: Family, tmp_path: Path, base: dict[str, Any]
) -> None:
    preview = {"every": 2, "steps": 2, "prompts": ["a red circle"]}
    result = train(run_settings(tmp_path, preview=preview, validation={"fraction": 0.3}, **base))
    assert [len(list((result.folder / "previews" / f"step-{at:06d}").glob("*.png"))) for at in (0, 2, 3)] == [1] * 3
    assert result.worst_error == 0
    state = read_adapter(result.loras["diffusers"])
    denoiser = tiny_family.load_denoiser(CPU, FP32)
    assert set(state.layers) == set(tiny_family.lora_targets(denoiser))
    attach_states(denoiser, [("one", state, 1.0)])


@each_kind
def test_previews_between_steps_change_nothing(start: Callable[..., Run], base: dict[str, Any]) -> None:
    """Drawing makes bitsandbytes lay out weights anew where the processor likes that, if it is let."""
    run = start(**base).stir()
    loss, gradients = step(run)
    loop.validation_loss(run.state, run.family, run.config, run.data.examples.select([0]))
    again, others = step(run)
    assert again == loss
    assert_same_bits(others, gradients)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            *((
                {"finetune_type": "full", "memory": {"base_precision": name}},
                f"`memory.base_precision: {name}` holds them in numbers too coarse",
            ) for name in ("int8", "fp8", "nf4")),
            ({"finetune_type": "full", **FP8_COMPUTE}, "`finetune_type: full` moves them"),
            ({**FP8_COMPUTE, "memory": {"base_precision": "bf16"}}, "but `memory.base_precision` is bf16"),
        ],
    )  # fmt: skip
    def test_settings_that_cannot_both_be_meant(
        self, run_settings: Settings, tmp_path: Path, settings: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(named)):
            run_settings(tmp_path, **settings)

    def test_fp8_compute_may_be_named_with_its_own_storage(self, run_settings: Settings, tmp_path: Path) -> None:
        config = run_settings(tmp_path, memory={"base_precision": "fp8"}, **FP8_COMPUTE)
        assert held.base_storage(config) == held.base_storage(run_settings(tmp_path, **FP8_COMPUTE)) == "fp8"

    @pytest.mark.parametrize(("name", "base", "hint"), [
        ("why_not_fp8", FP8_COMPUTE, "keeps weights in 8 bits all the same"),
        ("why_not", BASES["nf4"], "int8 works everywhere"),
    ])  # fmt: skip
    def test_what_does_not_work_here_is_before_anything_is_encoded(
        self, start: Callable[..., Run], cache: Path, monkeypatch: pytest.MonkeyPatch,
        name: str, base: dict[str, Any], hint: str,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(held, name, lambda *_: "it is too old")
        before = set(cache.rglob("*"))
        with pytest.raises(ConfigError, match="it is too old") as refused:
            start(**base, data={"resolutions": [32]})
        assert hint in str(refused.value.hint)
        assert set(cache.rglob("*")) == before
