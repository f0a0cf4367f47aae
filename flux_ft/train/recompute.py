"""Which activations are kept for the backward, and which are computed a second time.

Shapes in names: K inner size of a matrix product (what is summed over), N columns of its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Policy = Literal["none", "selective", "full"]

WIDEST_KEPT = 10
"""A product with N > 10 · K takes much memory to keep and little time to repeat, and is not kept.

A LoRA's up matrix makes such products, as large as the base layer's; so do the scores of unfused attention over long
sequences. The widest layer of FLUX.2's blocks has N = 9 · K.
"""

_RIGHT_FACTORS = {"mm": 1, "bmm": 1, "addmm": 2, "baddbmm": 2, "_scaled_mm": 1}
"""The operators that linear layers and matrix products come down to, each with the place of the argument (…, K, N)."""


def apply_recompute(denoiser: nn.Module, policy: Policy) -> None:
    """Set what a diffusers model computes again in the backward, block by block, in place of an earlier policy.

    "none" keeps all that the backward reads. "full" keeps the inputs of each block and runs its forward again (Chen et
    al. 2016, arXiv 1604.06174). "selective" keeps the results of matrix products and of attention as well, and computes
    again what lies between: norms, activations, modulation, rotary embeddings, casts. All three give the same bits.

    In these models a block is run again before the first gradient of its parameters is made, so these may be updated
    during the backward. Its forward pre-hooks are called again; its forward hooks are not, unless registered with
    `always_call`, since the second run stops at the last tensor needed. Pre-hooks that move weights go with "full"
    only: "selective" pairs the operations of the two runs by their order, and such a hook need not do the same ones
    twice. "selective" costs the host some 10 µs for each operation of a block, twice.
    """
    if policy == "none":
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
    else:
        denoiser.enable_gradient_checkpointing(CHECKPOINTS[policy])  # type: ignore[operator]


def keeps(operator: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether "selective" keeps what this operator of torch's returns for these arguments."""
    place = _PRODUCTS.get(operator)
    if place is None:
        return _is_attention(operator)
    inner_K, columns_N = arguments[place].shape[-2:]
    return bool(columns_N <= WIDEST_KEPT * inner_K)


@functools.cache
def _is_attention(operator: Any) -> bool:
    # By name: each device has kernels of its own, torch's versions differ in them, and other packages add theirs.
    name = operator.name()
    return "attention" in name or "attn" in name


def _overloads(name: str) -> list[Any]:
    """The variants of an operator that return a new tensor; none if this torch does not have it."""
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, one) for one in packet.overloads() if not one.endswith("out")] if packet else []


def _choose(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(operator, arguments) else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS: dict[Any, int] = {one: place for name, place in _RIGHT_FACTORS.items() for one in _overloads(name)}

CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "full": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _choose),
    ),
}
"""What diffusers calls in place of a block, as `checkpoint(block, *inputs)`."""
