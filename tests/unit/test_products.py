"""A frozen weight's products, however it is held: as exact as its own numbers, and nothing kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flux_ft.adapters import lora
from flux_ft.families import quantize
from flux_ft.families.products import FEW_ROWS, Frozen, frozen, held_tensors, product, product_back, to_fp8
from flux_ft.families.quantize import compute_in_fp8, hold, why_not, why_not_fp8

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
KINDS = {"int8": "grid", "fp8": "grid", "nf4": "nf4"}
INS, OUTS, ROWS = 128, 192, 48
FP8_OFF = 0.05
"""Of a product of two factors with 3 bits of fraction each; measured: 0.026."""

needs_fp8 = pytest.mark.skipif(why_not_fp8(CPU, FP32) is not None, reason="this torch has no such product on a CPU")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(storage: Any, dtype: torch.dtype = FP32, bias: bool = True) -> Any:
    """A linear that is held so, with rows of very different size."""
    if reason := why_not(storage, "cpu"):
        pytest.skip(reason)
    linear = nn.Linear(INS, OUTS, bias)
    with torch.no_grad():
        linear.weight.copy_(draw(OUTS, INS) * torch.logspace(-3, 1, OUTS)[:, None])
        if bias:
            linear.bias.copy_(draw(OUTS, seed=1))
    model = nn.Sequential(linear)
    hold(model, [model], storage, CPU, dtype)
    return model[0]


def numbers(linear: Any) -> Tensor:
    """The weight that it stands for, in float32."""
    if hasattr(linear, "scale_O"):
        return linear.weight.float() * linear.scale_O.float()[:, None]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def in_fp8(linear: Any) -> Any:
    compute_in_fp8(linear)
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "most"), [(FP32, 1e-6), (BF16, 5e-3)])
@pytest.mark.parametrize("storage", KINDS)
def test_products_are_those_of_the_numbers_that_are_held(
    storage: str, dtype: torch.dtype, most: float, bias: bool
) -> None:
    linear = make(storage, dtype, bias)
    weight = frozen(linear)
    assert weight is not None
    assert weight.kind == KINDS[storage]
    x, grad = draw(ROWS, INS, seed=2).to(dtype), draw(ROWS, OUTS, seed=3).to(dtype)
    out = product(weight, x, linear.bias)
    assert out.dtype == dtype
    assert off(out, x.float() @ numbers(linear).T + (linear.bias.float() if bias else 0)) < most
    assert off(product_back(weight, grad), grad.float() @ numbers(linear)) < most


@pytest.mark.parametrize("storage", KINDS)
def test_the_linear_itself_and_its_gradient_are_these_products_to_the_bit(storage: str) -> None:
    linear = make(storage)
    weight = frozen(linear)
    assert weight is not None
    x, grad = draw(2, ROWS, INS, seed=2).requires_grad_(True), draw(2, ROWS, OUTS, seed=3)
    out = linear(x)
    out.backward(grad)
    assert torch.equal(out, product(weight, x.detach(), linear.bias))
    assert x.grad is not None
    assert torch.equal(x.grad, product_back(weight, grad.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("storage", ["int8", "fp8", "fp8 compute", "nf4"])
def test_no_spread_weight_is_kept_for_the_backward(storage: str, adapted: bool) -> None:
    if storage == "fp8 compute" and why_not_fp8(CPU, FP32):
        pytest.skip("this torch has no such product on a CPU")
    model = nn.Sequential(make(storage.split()[0]))
    if storage == "fp8 compute":
        compute_in_fp8(model)
    own = {tensor.data_ptr() for tensor in held_tensors(model).values()}
    if adapted:
        lora.attach_new(model, ["0"], 4, 4.0, 0.0, 0)
        own |= {parameter.data_ptr() for parameter in model.parameters()}
    x, kept = draw(ROWS, INS).requires_grad_(True), []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own | {x.data_ptr()}:
            kept.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    assert kept == ([(ROWS, 4)] if adapted else [])  # between the factors
    assert x.grad is not None


class TestFp8Compute:
    pytestmark = needs_fp8

    @pytest.mark.parametrize(("dtype", "most"), [(FP32, 1e-6), (BF16, 5e-3)])
    def test_multiplies_what_is_rounded_row_by_row(self, dtype: torch.dtype, most: float) -> None:
        linear = in_fp8(make("fp8", dtype))
        weight = frozen(linear)
        assert weight is not None
        assert weight.kind == "fp8"
        sizes_B1 = torch.logspace(-4, 4, ROWS)[:, None]
        x, grad = (draw(ROWS, INS, seed=2) * sizes_B1).to(dtype), (draw(ROWS, OUTS, seed=3) * sizes_B1).to(dtype)
        rounded = [grid.float() * scale for grid, scale in (to_fp8(x), to_fp8(grad * linear.scale_O.to(dtype)))]
        assert off(product(weight, x, linear.bias), rounded[0] @ numbers(linear).T + linear.bias.float()) < most
        assert off(product_back(weight, grad), rounded[1] @ linear.weight.float()) < most

    def test_is_near_the_exact_product_in_every_row(self) -> None:
        weight = frozen(in_fp8(make("fp8")))
        assert weight is not None
        grid = Frozen("grid", weight.tensors)
        sizes_B1 = torch.logspace(-4, 4, ROWS)[:, None]
        for one, numbers_of in ((product, INS), (product_back, OUTS)):
            inputs = draw(ROWS, numbers_of) * sizes_B1
            exact = one(grid, inputs)
            apart = (one(weight, inputs) - exact).norm(dim=1) / exact.norm(dim=1)
            assert 0 < float(apart.max()) < FP8_OFF

    def test_gradients_of_e4m3_are_nearer_than_of_e5m2(self) -> None:
        """Even of numbers that spread over six powers of ten within a row."""
        grad = draw(ROWS, OUTS) * torch.logspace(-3, 3, OUTS)[torch.randperm(OUTS)]
        e4m3, e5m2 = (
            off(grid.float() * scale, grad) for grid, scale in (to_fp8(grad), to_fp8(grad, torch.float8_e5m2, 57344.0))
        )
        assert e4m3 < 0.6 * e5m2

    def test_a_few_rows_are_multiplied_as_they_are(self) -> None:
        weight = frozen(in_fp8(make("fp8")))
        assert weight is not None
        grid, x, grad = Frozen("grid", weight.tensors), draw(FEW_ROWS - 1, INS), draw(FEW_ROWS - 1, OUTS)
        assert torch.equal(product(weight, x), product(grid, x))
        assert torch.equal(product_back(weight, grad), product_back(grid, grad))

    def test_zeros_stay_zero_and_what_is_not_finite_is_not_hidden(self) -> None:
        weight = frozen(in_fp8(make("fp8")))
        assert weight is not None
        x = draw(ROWS, INS)
        x[0], x[1, 3], x[2, 3] = 0.0, torch.nan, torch.inf
        out = product(weight, x)
        assert out[0].eq(0).all()
        assert out[1:3].isnan().all()
        assert out[3:].isfinite().all()

    def test_rows_of_two_weights_laid_together_are_one_product(self) -> None:
        weight = frozen(in_fp8(make("fp8")))
        assert weight is not None
        parts = [Frozen("fp8", tuple(one[rows] for one in weight.tensors)) for rows in (slice(96), slice(96, OUTS))]
        x = draw(ROWS, INS)
        assert torch.equal(product(weight, x), torch.cat([product(part, x) for part in parts], dim=1))


def test_only_fp8_weights_multiply_in_8_bits() -> None:
    assert not in_fp8(make("int8")).in_fp8
    assert in_fp8(make("fp8")).in_fp8


def test_a_gpu_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    assert "RTX 3090 cannot" in str(why_not_fp8(torch.device("cuda"), BF16))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel\nhere")

    monkeypatch.setattr(quantize, "product", refuse)
    assert why_not_fp8(CPU, FP32) == "no such kernel"


@pytest.mark.parametrize("storage", KINDS)
def test_all_that_a_weight_consists_of_is_told(storage: str) -> None:
    """So that two bases whose rows differ in size alone have two digests."""
    one, twice = (nn.Sequential(make(storage)) for _ in range(2))
    tensors = held_tensors(one)
    assert set(dict(one.named_parameters())) < set(tensors)
    weight = frozen(twice[0])
    assert weight is not None
    weight.tensors[1 if storage != "nf4" else 3].mul_(2)
    assert [name for name, tensor in held_tensors(twice).items() if not torch.equal(tensor, tensors[name])]


@pytest.mark.parametrize("storage", ["int8", "fp8 compute", "nf4"])
def test_a_compiler_can_follow(storage: str) -> None:
    """In one graph, forwards and backwards, with the bits of what is not compiled; no code is made."""
    if storage == "fp8 compute" and why_not_fp8(CPU, FP32):
        pytest.skip("this torch has no such product on a CPU")
    torch.compiler.reset()
    model = nn.Sequential(make({"fp8 compute": "fp8"}.get(storage, storage)))
    if storage == "fp8 compute":
        compute_in_fp8(model)
    x = draw(2, ROWS, INS).requires_grad_(True)

    def gradient(module: Any) -> list[Tensor]:
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]

    plain, compiled = (gradient(one) for one in (model, torch.compile(model, backend="aot_eager", fullgraph=True)))
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))
