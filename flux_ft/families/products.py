"""A frozen weight's two matrix products, forwards and backwards, however it is held; for autograd functions.

    plain   one tensor (O, I) of the dtype it is computed in, or of another that is cast
    grid    `quantize.StoredLinear`: 8 bits a weight and a scale a row; exact in bf16, so the scale multiplies sums

Rows of several weights may be laid one after the other: both kinds are then one product for all of them.

Shapes in names: B batch and tokens, O out features, I in features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flux_ft.families.quantize import StoredLinear


class Frozen(NamedTuple):
    """A weight (O, I) as it lies in memory."""

    kind: str
    tensors: tuple[Tensor, ...]


def frozen(linear: nn.Module) -> Frozen | None:
    """How this linear's weight is held; None for one that is trained, or that is no linear known here."""
    if type(linear) is StoredLinear:
        return Frozen("grid", (linear.weight, linear.scale_O))
    if type(linear) is nn.Linear and not linear.weight.requires_grad:
        return Frozen("plain", (linear.weight,))
    return None


def product(weight: Frozen, x_BI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias (B, O), in x's dtype."""
    spread_IO = weight.tensors[0].to(x_BI.dtype).t()
    bias_O = None if bias_O is None else bias_O.to(x_BI.dtype)
    if weight.kind == "grid":
        sums_BO = x_BI.mm(spread_IO).mul_(weight.tensors[1])
        return sums_BO if bias_O is None else sums_BO.add_(bias_O)
    return x_BI.mm(spread_IO) if bias_O is None else torch.addmm(bias_O, x_BI, spread_IO)


def product_back(weight: Frozen, grad_BO: Tensor) -> Tensor:
    """grad W (B, I), the gradient of `product` with respect to x, in grad's dtype."""
    if weight.kind == "grid":
        grad_BO = grad_BO * weight.tensors[1].to(grad_BO.dtype)
    return grad_BO.mm(weight.tensors[0].to(grad_BO.dtype))
