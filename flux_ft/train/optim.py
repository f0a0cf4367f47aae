"""Gradients into weights: optimizers and schedules as tables, rounding to bf16, updates inside the backward pass.

Weights of the model itself are bf16 on a GPU, where a step of 1e-5 is far below half a unit in the last place: rounding
to nearest would lose it. So every such weight is widened to float32, moved, and rounded back by one of `ROUNDINGS`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from flux_ft.config import OptimConfig
from flux_ft.errors import ConfigError
from flux_ft.flow import key_seed
from flux_ft.train.fused_update import FusedUpdate, draw_noise

# --- Optimizers. One more is one more row. ---

Parameters = Sequence[nn.Parameter]
Factory = Callable[[Parameters, float, OptimConfig], torch.optim.Optimizer]


def _adamw(parameters: Parameters, rate: float, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


def _adamw8bit(parameters: Parameters, rate: float, optim: OptimConfig, paged: bool = False) -> torch.optim.Optimizer:
    import bitsandbytes  # not on every platform, and slow to load

    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    made: torch.optim.Optimizer = kind(parameters, lr=rate, betas=optim.betas, weight_decay=optim.weight_decay)
    return made


def _adafactor(parameters: Parameters, rate: float, optim: OptimConfig) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018 (arXiv 1804.04235) at a given rate: steps do not follow the weights' own size."""
    made: torch.optim.Optimizer = Adafactor(
        parameters, lr=rate, weight_decay=optim.weight_decay, scale_parameter=False, relative_step=False,
        warmup_init=False,
    )  # fmt: skip
    return made


@dataclass(frozen=True)
class Row:
    """One optimizer."""

    make: Factory
    state_bytes: float
    """Of its state, for each weight."""
    requires: str | None = None
    """A package that has to be installed."""
    takes_rows: bool = True
    """Whether it moves some rows of a matrix as it would among all of them."""
    in_blocks: bool = False
    """Whether its state is kept in blocks of numbers, which shards of another size would cut."""


OPTIMIZERS = {
    "adamw": Row(_adamw, 8),
    "adamw8bit": Row(_adamw8bit, 2.04, "bitsandbytes", in_blocks=True),
    "paged-adamw8bit": Row(partial(_adamw8bit, paged=True), 2.04, "bitsandbytes", in_blocks=True),
    "adafactor": Row(_adafactor, 0.01, takes_rows=False),
}
LARGE_PARAMETERS = 1_000_000_000
"""From this size on, a model's activations are recomputed, and AdamW's state, four times the weights, is too much for
a card."""


def resolve_optimizer(name: str, trained: int, shards: int = 1) -> str:
    """`auto` is AdamW, but Adafactor where so many weights are trained that AdamW's state would not fit a card.

    Cut into shards it fits. Raises ConfigError for an optimizer that needs whole matrices where there are shards.
    """
    if name == "auto":
        return "adafactor" if trained >= LARGE_PARAMETERS and shards == 1 else "adamw"
    if shards > 1 and not OPTIMIZERS[name].takes_rows:
        raise ConfigError(
            f"`optim.name: {name}` factorises whole matrices, and each of these {shards} processes holds some rows "
            "of each",
            hint="set `optim.name` to adamw or adamw8bit, or start the run in one process",
        )
    return name


# --- Shards. A full fine-tune over several processes gives each some rows of every weight (torch's DTensor). ---


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without history and sharing its memory: all of it, or its rows."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_of(tensor: Tensor) -> tuple[int, ...]:
    """Which part `own_part` is: nothing for a whole tensor, else the shard's number. Replicas share it."""
    if not isinstance(tensor, DTensor):
        return ()
    along = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    return tuple(number for number, placement in along if placement.is_shard())


# --- Rounding. ---


def stochastic_round(wide: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bf16, up or down with the chances that make the mean come out right.

    Gupta et al. 2015 (arXiv 1502.02551). bf16 is the upper half of float32: sixteen random bits are added below what
    stays, and the carry decides. Zeros, infinities and what bf16 holds exactly stay as they are.
    """
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    return noise.add_(wide.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class Rounding:
    """How a bf16 weight is kept between updates: `extra` is what is kept beside it."""

    extra: Callable[[Tensor], Tensor | None]
    widen: Callable[[Tensor, Tensor | None], Tensor]
    """The float32 weight that the optimizer moves, from the bf16 weight and what is beside it."""
    narrow: Callable[[Tensor, Tensor, Tensor | None, torch.Generator], None]
    """Writes (wide) into (weight, extra)."""
    extra_bytes: int
    """For each weight."""


def _narrow_stochastic(wide: Tensor, weight: Tensor, extra: Tensor | None, generator: torch.Generator) -> None:
    weight.copy_(stochastic_round(wide, generator))


def _narrow_kahan(wide: Tensor, weight: Tensor, extra: Tensor | None, generator: torch.Generator) -> None:
    assert extra is not None
    weight.copy_(wide)
    # To nearest would lose steps again: those below 2^-17 of the weight, 1e-5 for the scales of norms.
    extra.copy_(stochastic_round(wide - weight.float(), generator))


def _narrow_master(wide: Tensor, weight: Tensor, extra: Tensor | None, generator: torch.Generator) -> None:
    weight.copy_(wide)


def _sum(weight: Tensor, extra: Tensor | None) -> Tensor:
    return weight.float() if extra is None else weight.float().add_(extra)


def _master(weight: Tensor, extra: Tensor | None) -> Tensor:
    assert extra is not None
    return extra


ROUNDINGS = {
    "stochastic": Rounding(lambda weight: None, _sum, _narrow_stochastic, 0),
    # What rounding took away, in bf16 too: some seventeen bits together (Kahan's compensated sum, 1965).
    "kahan": Rounding(torch.zeros_like, _sum, _narrow_kahan, 2),
    "master": Rounding(lambda weight: weight.float(), _master, _narrow_master, 4),
}


# --- Updates. ---


class Updates:
    """The optimizer's side of a run: from `parameter.grad` to moved weights.

    One optimizer over all parameters; or one a parameter, where they are moved one at a time: bf16 weights, of which
    one is widened at once, and `fused_backward`, which moves each as soon as the backward pass has its gradient and
    drops that, so that the gradients of the whole model never exist. There the norm of all of them is not known in
    time, and `max_norm` holds for each parameter's own.

    Of sharded parameters it moves this process's rows, by the rows' gradients.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        make: Callable[[Parameters], torch.optim.Optimizer],
        *,
        rounding: str = "stochastic",
        fused_backward: bool = False,
        max_norm: float = math.inf,
        seed: int = 0,
        device: torch.device | None = None,
        update: FusedUpdate | None = None,
    ) -> None:
        """`device` is where weights are moved, if that is not where they are now: streamed ones only visit it.

        `update` moves and rounds bf16 weights in place of Adafactor and stochastic rounding.
        """
        self._update = update
        self._device = device
        self._trained, self._seed, self._max_norm = dict(trained), seed, max_norm
        self.fused_backward = fused_backward
        self._rounding = ROUNDINGS[rounding]
        self._moved = {name: nn.Parameter(own_part(p)) if isinstance(p, DTensor) else p for name, p in trained.items()}
        narrow = {name for name, parameter in trained.items() if parameter.dtype is torch.bfloat16}
        self._alone = fused_backward or bool(narrow)
        held = [name for name, parameter in self._moved.items() if parameter.numel()]  # a short weight has few rows
        groups = [[name] for name in held] if self._alone else [held] if held else []
        self._optimizers = {group[0]: make([self._moved[name] for name in group]) for group in groups}
        self._extra = {name: self._rounding.extra(self._moved[name].data) for name in trained if name in narrow}
        self._squares: list[Tensor] = []
        self._step = 0
        if fused_backward:
            for name, parameter in trained.items():
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))  # type: ignore[no-untyped-call]

    def begin(self, step: int, rate: float) -> None:
        """Set what the update that makes `step` (0-based) into `step + 1` goes by."""
        self._step, self._squares = step, []
        for optimizer in self._optimizers.values():
            set_rate(optimizer, rate)

    def finish(self, move: bool = True) -> None:
        """Move what has not been moved in the backward pass, unless told not to, and drop the gradients."""
        if move and not self.fused_backward:
            for name, parameter in self._trained.items():
                if self._moved[name] is not parameter:
                    self._moved[name].data = own_part(parameter)  # torch may have laid the rows elsewhere since
                    self._moved[name].grad = None if parameter.grad is None else own_part(parameter.grad)
            for name in self._optimizers:
                self._move(name)
        for parameter in (*self._trained.values(), *self._moved.values()):
            parameter.grad = None

    def norm(self) -> Tensor:
        """Of all gradients of a fused backward pass, before they were clipped."""
        return torch.stack(self._squares).sum().sqrt()

    def is_precise(self, name: str) -> bool:
        """Whether a weight is known more precisely than it is stored in the model."""
        return self._extra.get(name) is not None

    def precise(self, name: str) -> Tensor:
        """A trained weight, or this process's rows of it, as precisely as it is known."""
        weight = own_part(self._trained[name])
        extra = self._extra.get(name)
        return weight if extra is None else self._rounding.widen(weight, extra.to(weight.device))

    def extra(self, name: str) -> Tensor | None:
        """What is kept beside a weight between updates, itself, not a copy."""
        return self._extra.get(name)

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps of one weight, itself, not a copy: nothing before the first step or without rows."""
        optimizer = self._optimizer_of(name)
        return {} if optimizer is None else dict(optimizer.state.get(self._moved[name], {}))

    def set_optimizer_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Take over what `optimizer_state` gave, for the same rows of the same weight."""
        optimizer, parameter = self._optimizer_of(name), self._moved[name]
        if optimizer is not None:
            device = self._device or parameter.device
            optimizer.state[parameter] = {
                sys.intern(key): v.to(device) if torch.is_tensor(v) else v  # one object each, as pickle would see
                for key, v in state.items()
            }

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer | None:
        if not self._moved[name].numel():
            return None
        return self._optimizers[name] if self._alone else next(iter(self._optimizers.values()))

    def state_dict(self) -> dict[str, Any]:
        """All that is kept of the weights, by their names: tensors and numbers, themselves and not copies."""
        return {
            "state": {name: self.optimizer_state(name) for name in self._trained},
            "extra": {name: extra for name, extra in self._extra.items() if extra is not None},
        }

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._squares.append(norm.square())
        if math.isfinite(self._max_norm):
            gradient.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._move(name)
        parameter.grad = None

    def _move(self, name: str) -> None:
        parameter, optimizer = self._moved[name], self._optimizers[name]
        if name not in self._extra:
            optimizer.step()
            return
        weight, gradient, extra = parameter.data, parameter.grad, self._extra[name]
        if gradient is None:
            return
        seed = key_seed(self._seed, "rounding", self._step, name, *place_of(self._trained[name]))
        generator = torch.Generator(weight.device).manual_seed(seed)
        if self._update is not None:
            noise = draw_noise(weight, generator)
            self._update(optimizer.state[parameter], optimizer.param_groups[0], weight, gradient, noise)
            parameter.grad = None
            return
        # The optimizer sees a float32 parameter: torch's, transformers' and bitsandbytes' need no other version.
        parameter.grad = None
        parameter.data = self._rounding.widen(weight, extra)
        parameter.grad = gradient.float()
        try:
            optimizer.step()
            wide = parameter.data
        finally:
            parameter.grad = None
            parameter.data = weight
        self._rounding.narrow(wide, weight, extra, generator)


class Average:
    """An exponential average of the trained weights, or of this process's rows of them, float32 in host memory.

    It begins at the first weights, and at first forgets faster, so that a short run is not held to them: the share kept
    is at most (1 + n) / (10 + n) after n steps (Polyak averaging as TensorFlow and diffusers warm it up).
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float, every: int) -> None:
        self._decay, self._every = decay, every
        self.weights = {
            name: own_part(parameter).to("cpu", torch.float32, copy=True) for name, parameter in trained.items()
        }

    def due(self, step: int) -> bool:
        """Whether the average takes in the weights after `step` steps."""
        return step % self._every == 0

    @torch.no_grad()
    def update(self, step: int, read: Callable[[str], Tensor]) -> None:
        """Take in the weights after `step` steps, one at a time."""
        kept = min(self._decay, (1 + step) / (10 + step)) ** self._every
        for name, average in self.weights.items():
            average.lerp_(read(name).to("cpu", torch.float32), 1 - kept)


# --- Learning rates. ---

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
