"""Which attention kernel a run takes: right ones, the fastest of them, one that repeats where bits matter."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from flux_ft.errors import ConfigError
from flux_ft.train import attention
from flux_ft.train.attention import (
    FACT,
    KERNELS,
    choose_attention,
    exact_attention,
    offered,
    prepare_attention,
    set_attention,
    try_kernels,
)
from flux_ft.train.determinism import Mode

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SHAPE = (2, 33, 3, 16)


def good(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    turned = (one.transpose(1, 2) for one in (query, key, value))
    return F.scaled_dot_product_attention(*turned).transpose(1, 2)


def slow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    time.sleep(0.02)
    return good(query, key, value)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.05 * grad


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return good(query, key, _WrongGradient.apply(value))  # type: ignore[no-untyped-call]


def wrong_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return good(1.1 * query, key, value)


def wrong_last_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = good(query, key, value)
    return torch.cat([out[:, :, :-1], 1.1 * out[:, :, -1:]], dim=2)


def not_a_number(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return good(query, key, value) * float("nan")


def failing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("no such kernel for this card\nand much more")


def without_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return good(query, key, value).detach()


class Restless:
    """Right within a rounding error, and never the same twice."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls += 1
        return good(query, key, value) * (1 + 1e-6 * self.calls)


@pytest.mark.parametrize("tokens", [7, 2500])
def test_the_reference_is_attention_with_its_gradients(tokens: int) -> None:
    draw = torch.Generator().manual_seed(1)
    query, key, value, grad = (torch.randn(tokens, 8, generator=draw, dtype=torch.float64) for _ in range(4))
    inputs = [one.clone().requires_grad_() for one in (query, key, value)]
    out = F.scaled_dot_product_attention(*(one[None] for one in inputs))[0]
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    for found, one in zip(exact_attention(query, key, value, grad), expected, strict=True):
        assert found.dtype is FP32
        assert float((found - one).detach().norm() / one.detach().norm()) < 1e-5


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_right_kernels_pass_and_wrong_ones_do_not(dtype: torch.dtype) -> None:
    wrong = {"gradient": wrong_gradient, "scale": wrong_scale, "last head": wrong_last_head, "nan": not_a_number}
    trials = try_kernels({"good": good, **wrong}, SHAPE, CPU, dtype)
    assert not trials["good"].refused
    assert trials["good"].seconds > 0
    for name in wrong:
        assert trials[name].wrong, name
        assert "off" in trials[name].refused


def test_what_fails_is_refused_by_its_first_line_and_not_called_wrong() -> None:
    trials = try_kernels({"failing": failing, "none": without_gradient}, SHAPE, CPU, FP32)
    assert trials["failing"].refused == "no such kernel for this card"
    assert "grad" in trials["none"].refused
    assert not trials["failing"].wrong
    assert not trials["none"].wrong


def test_a_kernel_that_breaks_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access: whatever is asked of the device afterwards fails with the same error."""
    broken: list[str] = []

    def breaking(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        broken.append("an illegal memory access was encountered")
        raise RuntimeError(broken[0])

    def wait(device: torch.device) -> None:
        if broken:
            raise RuntimeError(broken[0])

    monkeypatch.setattr(attention, "_wait_for", wait)
    kernels = {"native": good, "flash3": breaking, "cudnn": good}
    with pytest.raises(ConfigError, match=r"attention kernel flash3 .*illegal memory access") as caught:
        choose_attention("auto", SHAPE, CPU, FP32, kernels=kernels)
    assert "speed.attention: native" in (caught.value.hint or "")


@pytest.mark.parametrize(("mode", "is_taken"), [("fast", True), ("strict", False)])
def test_strict_takes_only_what_repeats(mode: Mode, is_taken: bool) -> None:
    trial = try_kernels({"restless": Restless()}, SHAPE, CPU, FP32, mode)["restless"]
    assert (not trial.refused) == is_taken
    assert trial.wrong != is_taken


def test_the_fastest_right_one_is_taken_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = {"native": slow, "cudnn": wrong_gradient, "flash": good, "efficient": failing}
    assert choose_attention("auto", SHAPE, CPU, FP32, kernels=kernels) == "flash"
    told = capsys.readouterr().err
    assert "attention: flash, " in told
    assert " ms forwards and backwards for 2 × 33 tokens (native " in told
    assert "cudnn is left out: its numbers are 5.0% off" in told
    assert "efficient" not in told  # that a card lacks a kernel is no news


def test_strict_mode_leaves_out_those_without_an_order_of_sums() -> None:
    kernels = {"native": slow, "cudnn": good, "flash3": good}
    assert choose_attention("auto", SHAPE, CPU, FP32, "strict", kernels=kernels) == "native"
    with pytest.raises(ConfigError, match=r"speed\.attention: cudnn.*determinism: strict"):
        choose_attention("cudnn", SHAPE, CPU, FP32, "strict", kernels=kernels)


def test_a_resumed_run_takes_what_it_began_with_if_that_is_still_good() -> None:
    kernels = {"native": slow, "flash": good, "cudnn": wrong_scale}
    assert choose_attention("auto", SHAPE, CPU, FP32, recorded="native", kernels=kernels) == "native"
    assert choose_attention("auto", SHAPE, CPU, FP32, recorded="cudnn", kernels=kernels) == "flash"
    assert choose_attention("auto", SHAPE, CPU, FP32, recorded="gone", kernels=kernels) == "flash"
    assert choose_attention("flash", SHAPE, CPU, FP32, recorded="native", kernels=kernels) == "flash"


@pytest.mark.parametrize(
    ("kernel", "why"), [(failing, "no such kernel"), (wrong_scale, "% off"), (Restless(), "not the same")]
)
def test_a_named_kernel_that_cannot_be_taken_is_an_error(kernel: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"speed\.attention: flash.*{why}") as caught:
        choose_attention("flash", SHAPE, CPU, FP32, "strict", kernels={"flash": kernel, "native": good})
    assert "native" in (caught.value.hint or "")


def test_nothing_that_works_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"native: no such kernel.*flash: its numbers"):
        choose_attention("auto", SHAPE, CPU, FP32, kernels={"native": failing, "flash": wrong_scale})


def test_all_kernels_are_diffusers_and_torchs_own_choice_passes() -> None:
    assert {AttentionBackendName(name) for name in KERNELS.values()}
    assert not try_kernels({"native": offered()["native"]}, SHAPE, CPU, FP32)["native"].refused


def test_the_choice_reaches_every_block_and_no_other_model(tiny_family: Any) -> None:
    denoiser, other = (tiny_family.load_denoiser(CPU, FP32) for _ in range(2))
    active = _AttentionBackendRegistry._active_backend
    set_attention(denoiser, "efficient")
    chosen = [one.processor._attention_backend for one in denoiser.modules() if hasattr(one, "processor")]
    assert chosen == [AttentionBackendName("_native_efficient")] * len(tiny_family.blocks(denoiser))
    assert not any(one.processor._attention_backend for one in other.modules() if hasattr(one, "processor"))
    assert _AttentionBackendRegistry._active_backend == active


def test_a_cpu_is_not_tested_and_says_nothing(
    tiny_family: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "try_kernels", lambda *_: pytest.fail("tried"))
    denoiser = tiny_family.load_denoiser(CPU, FP32)
    for setting in ("auto", "native"):
        assert prepare_attention(denoiser, setting, 1, 16, CPU, FP32, "strict") == {}
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"speed\.attention: flash.*needs a GPU"):
        prepare_attention(denoiser, "flash", 1, 16, CPU, FP32, "strict")


def test_on_a_gpu_the_models_own_shape_is_tried_and_the_choice_recorded(
    tiny_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = tiny_family.load_denoiser(CPU, FP32)
    asked: list[Any] = []
    monkeypatch.setattr(attention, "choose_attention", lambda *given: asked.append(given) or "flash")
    gpu = torch.device("cuda")
    assert prepare_attention(denoiser, "auto", 2, 80, gpu, BF16, "fast", "native") == {FACT: "flash"}
    shape = (2, 80, denoiser.config.num_attention_heads, denoiser.config.attention_head_dim)
    assert asked == [("auto", shape, gpu, BF16, "fast", "native")]
    first = next(iter(tiny_family.blocks(denoiser).values()))
    assert first.attn.processor._attention_backend == "_native_flash"
    monkeypatch.setattr(attention, "DIFFUSERS_ATTN_BACKEND", "sage")
    assert prepare_attention(denoiser, "auto", 2, 80, gpu, BF16, "fast") == {}
