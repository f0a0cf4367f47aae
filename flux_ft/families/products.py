"""A frozen weight's two matrix products, forwards and backwards, however it is held; for autograd functions.

    plain   one tensor (O, I) of the dtype it is computed in, or of another that is cast
    grid    `StoredLinear`: 8 bits a weight and a scale a row; exact in bf16, so the scale multiplies sums
    fp8     the same, of 8-bit floats, which multiply numbers that are rounded to 8 bits as well
    nf4     bitsandbytes' Linear4bit: 4 bits a weight, spread out for each product

A product may make a copy of the weight in the dtype that is computed in, and never leaves one for the backward pass.
Rows of several weights of one kind may be laid one after the other, but for nf4: that is one product for all of them.

Shapes in names: B batch and tokens, O out features, I in features.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FP8, FP8_LARGEST = torch.float8_e4m3fn, 448.0
"""Of gradients too: with a scale for each row they need its third bit of fraction more than e5m2's range."""
FEW_ROWS = 16
"""Below this a product takes the time to read the weight, and rounding its other factor would gain nothing: FLUX.1's
modulation layers see one row for each picture."""
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share theirs."""


class StoredLinear(nn.Linear):
    """A linear whose weight is held in 8 bits with one scale a row; it computes in its input's dtype."""

    scale_O: Tensor

    def __init__(self, grid_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = grid_OI.shape
        self.weight = nn.Parameter(grid_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("scale_O", scale_O)
        self.in_fp8 = False
        """Whether it multiplies in 8 bits."""

    @property
    def held(self) -> Frozen:
        """Its weight."""
        return Frozen("fp8" if self.in_fp8 else "grid", (self.weight, self.scale_O))

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if not (torch.is_grad_enabled() and input.requires_grad):
            return product(self.held, input, self.bias)
        kind, tensors = self.held
        return cast(Tensor, _FrozenLinear.apply(input, self.bias, kind, *tensors))  # type: ignore[no-untyped-call]


class Frozen(NamedTuple):
    """A weight (O, I) as it lies in memory."""

    kind: str
    tensors: tuple[Tensor, ...]


def frozen(linear: nn.Module) -> Frozen | None:
    """How this linear's weight is held; None for one that is trained, or that is no linear known here."""
    if type(linear) is StoredLinear:
        return linear.held
    if type(linear) is nn.Linear and not linear.weight.requires_grad:
        return Frozen("plain", (linear.weight,))
    packed = cast(Tensor, linear.weight)
    state: Any = getattr(packed, "quant_state", None)
    if state is None or (state.quant_type, state.nested, state.blocksize) != ("nf4", True, NF4_BLOCK):
        return None
    return Frozen("nf4", (packed, state.absmax, state.offset, state.state2.absmax, state.state2.code))


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that the weights of a model consist of, by name: its parameters, and what some of them need to be read."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        weight = frozen(module) if isinstance(module, nn.Linear) else None
        if weight is not None and weight.kind != "plain":
            names = (f"{path}.weight.{place}" for place in range(1, len(weight.tensors)))
            tensors |= zip(names, weight.tensors[1:], strict=True)
    return tensors


def product(weight: Frozen, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias (…, O) of x (…, I), in x's dtype."""
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if weight.kind == "fp8" and x.numel() >= FEW_ROWS * x.shape[-1]:
        grid_OI, scale_O = weight.tensors
        rounded_BI, scale_B1 = to_fp8(x.reshape(-1, x.shape[-1]))
        summed_BO = _fp8_product(rounded_BI, scale_B1, grid_OI, scale_O.float()[None], x.dtype, bias_O)
        return summed_BO.view(*x.shape[:-1], -1)
    spread_OI = _spread(weight, x.dtype, columns=x.shape[-1])
    if weight.kind not in ("grid", "fp8"):
        return F.linear(x, spread_OI, bias_O)
    sums, scale_O = F.linear(x, spread_OI), weight.tensors[1].to(x.dtype)
    # Not in place: recomputing may have kept the sums.
    return sums * scale_O if bias_O is None else torch.addcmul(bias_O, sums, scale_O)


def product_back(weight: Frozen, grad_BO: Tensor) -> Tensor:
    """grad W (B, I), the gradient of `product` with respect to x, in grad's dtype."""
    if weight.kind not in ("grid", "fp8"):
        return grad_BO.mm(_spread(weight, grad_BO.dtype, rows=grad_BO.shape[1]))
    grid_OI, scale_O = weight.tensors
    grad_BO = grad_BO * scale_O.to(grad_BO.dtype)  # what is summed over has to be scaled before
    if weight.kind == "grid" or len(grad_BO) < FEW_ROWS:
        return grad_BO.mm(grid_OI.to(grad_BO.dtype))
    rounded_BO, scale_B1 = to_fp8(grad_BO)
    # Hopper multiplies 8-bit numbers only where both lie along what is summed over. A second copy of all weights would
    # be as large as the model; turning one over is 2 bytes of traffic a weight.
    turned_IO = grid_OI.t().contiguous()
    return _fp8_product(rounded_BO, scale_B1, turned_IO, scale_B1.new_ones(1, len(turned_IO)), grad_BO.dtype)


def to_fp8(x_BI: Tensor, dtype: torch.dtype = FP8, largest: float = FP8_LARGEST) -> tuple[Tensor, Tensor]:
    """Numbers of 8 bits and the scale of each row (B, 1), float32, with x ≈ numbers · scale."""
    scale_B1 = torch.linalg.vector_norm(x_BI, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32) / largest
    return (x_BI / scale_B1.clamp(min=torch.finfo(torch.float32).tiny)).to(dtype), scale_B1


def _fp8_product(
    x_BI: Tensor, scale_B1: Tensor, grid_OI: Tensor, scale_1O: Tensor, dtype: torch.dtype, bias_O: Tensor | None = None
) -> Tensor:
    # Sums of some 22 bits: with those of 32 the kernel for scales by rows is far slower (pytorch/ao issue 2184).
    return torch._scaled_mm(
        x_BI, grid_OI.t(), scale_B1, scale_1O, bias=bias_O, out_dtype=dtype, use_fast_accum=True
    )  # fmt: skip


def _spread(weight: Frozen, dtype: torch.dtype, columns: int = -1, rows: int = -1) -> Tensor:
    """The numbers (O, I) of a weight in this dtype, a grid's without their scale; nf4 has to be told a side."""
    if weight.kind != "nf4":
        return weight.tensors[0].to(dtype)
    packed, scales, offset, scales_of_scales, code = weight.tensors
    ops = torch.ops.bitsandbytes
    scales = ops.dequantize_blockwise(scales, scales_of_scales, code, NF4_SCALES_BLOCK, torch.float32) + offset
    count = 2 * packed.numel()
    shape = (count // columns, columns) if rows < 0 else (rows, count // rows)
    return cast(Tensor, ops.dequantize_4bit(packed, scales, NF4_BLOCK, "nf4", shape, dtype))


class _FrozenLinear(torch.autograd.Function):
    """`product` with a gradient for x alone; it keeps the weight as it is held, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_O: Tensor | None, kind: str, *held: Tensor) -> Tensor:
        ctx.shape, ctx.kind = x.shape, kind
        ctx.save_for_backward(*held)
        return product(Frozen(kind, held), x, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held = Frozen(ctx.kind, ctx.saved_tensors)
        x_grad = product_back(held, grad.reshape(-1, grad.shape[-1])).view(ctx.shape)
        return x_grad, None, None, *(None for _ in held.tensors)
