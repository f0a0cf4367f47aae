"""Optimizers and learning-rate schedules, as tables: one more is one more row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from flux_ft.config import OptimConfig


def _adamw(parameters: Sequence[nn.Parameter], rate: float, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter], float, OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the peak rate left when the share `done` (0..1) of the steps after warm-up is done."""


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate for the update that makes `step` (0-based) into `step + 1`.

    A closed form of the step, so that a resumed run needs no scheduler state. Warm-up rises linearly and reaches the
    peak on the first step after it.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
