"""Adafactor's step on one bf16 weight and its rounding, compiled into a few passes over the memory.

transformers' takes some thirty, each through float32 numbers as many as the weight has, and that is as slow as the
backward pass of the block. Here is the same arithmetic (Shazeer and Stern 2018, arXiv 1804.04235, at a given rate) as
one function for a compiler, on the same state, so that a run can go on with or without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-30
"""Added to squared gradients, as in the paper."""


def draw_noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Sixteen random bits for each number, less 2¹⁵: those that `optim.stochastic_round` takes from this generator."""
    return torch.randint(
        -(1 << 15), 1 << 15, weight.shape, dtype=torch.int16, device=weight.device, generator=generator
    )


def measure_matrix(gradient: Tensor, rows: Tensor, columns: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Let a matrix's mean squares of rows and columns take in its gradient, in place; `kept` is the old ones' share.

    Returns what the gradient's rows and columns are multiplied by, and the root mean square of the product.
    """
    squares = gradient.float().square() + EPSILON
    rows.copy_(kept * rows + (1 - kept) * squares.mean(dim=-1))
    columns.copy_(kept * columns + (1 - kept) * squares.mean(dim=-2))
    of_rows = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
    of_columns = columns.rsqrt().unsqueeze(-2)
    return of_rows, of_columns, (gradient.float() * of_rows * of_columns).square().mean().sqrt()


def measure_vector(gradient: Tensor, squares: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `measure_matrix`, of a vector, whose squares are kept one by one."""
    squares.copy_(kept * squares + (1 - kept) * (gradient.float().square() + EPSILON))
    scale = squares.rsqrt()
    return scale, torch.ones_like(scale[:1]), (gradient.float() * scale).square().mean().sqrt()


def move(
    weight: Tensor, gradient: Tensor, noise: Tensor, of_rows: Tensor, of_columns: Tensor, length: Tensor, rate: Tensor,
    shrink: Tensor,
) -> None:  # fmt: skip
    """Move a weight in place by what was measured and round it; `shrink` is what weight decay leaves of it."""
    update = gradient.float() * of_rows * of_columns * (rate / length.clamp(min=1.0))
    wide = weight.float() * shrink - update
    bits = wide.view(torch.int32) + (noise.to(torch.int32) + (1 << 15))
    weight.copy_((bits & -(1 << 16)).view(torch.float32).to(weight.dtype))


class FusedUpdate:
    """All three compiled, for transformers' Adafactor as `optim` sets it: without first moments and relative steps.

    Apart from what measures, what moves reads the gradient again; in one piece, a compiler keeps the update in float32.
    """

    def __init__(self, backend: str | None = "inductor") -> None:
        """`backend` None leaves all uncompiled, to compare with."""
        parts: list[Callable[..., Any]] = [measure_matrix, measure_vector, move]
        if backend is not None:  # once for all sizes
            parts = [torch.compile(one, backend=backend, fullgraph=True, dynamic=True) for one in parts]
        self._measure_matrix, self._measure_vector, self._move = parts

    @torch.no_grad()
    def __call__(
        self, state: dict[str, Any], group: dict[str, Any], weight: Tensor, gradient: Tensor, noise: Tensor
    ) -> None:
        """Move one weight in place by its gradient; `state` and `group` are the optimizer's."""
        if not state:
            state |= {"step": 0, "RMS": 0} | _no_squares(weight)
        state["step"] += 1
        kept = 1.0 - state["step"] ** group["decay_rate"]
        # As tensors on the host: a compiler would take plain numbers for constants, and compile again at each step.
        numbers = kept, group["lr"], 1.0 - group["weight_decay"] * group["lr"]
        share, rate, shrink = (torch.tensor(number, dtype=torch.float32) for number in numbers)
        if weight.ndim > 1:
            found = self._measure_matrix(gradient, state["exp_avg_sq_row"], state["exp_avg_sq_col"], share)
        else:
            found = self._measure_vector(gradient, state["exp_avg_sq"], share)
        self._move(weight, gradient, noise, *found, rate, shrink)


def _no_squares(weight: Tensor) -> dict[str, Tensor]:
    shape = tuple(weight.shape)
    if len(shape) < 2:
        return {"exp_avg_sq": weight.new_zeros(shape, dtype=torch.float32)}
    return {
        "exp_avg_sq_row": weight.new_zeros(shape[:-1], dtype=torch.float32),
        "exp_avg_sq_col": weight.new_zeros(shape[:-2] + shape[-1:], dtype=torch.float32),
    }
