"""What a LoRA in training computes: adapted linears that read the same input as one operation for autograd.

    x ──┬── downs of all, one product ── up of each ──┐
        └── weights of all, one product ──────────────┴──→ one result for each

Each linear keeps its own factors, weight and names. Where weights lie in one storage, their parameters are views of it,
so that nothing is in memory twice. The factors are float32; where another dtype is computed in, all of them are cast at
the beginning of each pass through the model, and not for every product, nor again when a block is recomputed.

Shapes in names: B batch and tokens, R rank, S ranks of several linears, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux_ft.families import products

TRAINED = "trained"
"""Name of the adapter that training attaches."""
JOINABLE = ("plain", "grid", "fp8")
"""Kinds of weights whose rows may be laid one after the other."""


class TrainedLinear(PeftLinear):  # type: ignore[misc]
    """peft's, which while a LoRA is trained on a frozen linear runs as one operation for autograd.

    A quarter fewer operations a step; under autocast the input is cast once, not to float32 and back.
    """

    group: Group | None = None
    """This linear alone, once it is prepared."""
    joined: Group | None = None
    """On each of several that read the same input: all of them."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if arguments or options or not self.is_plain():
            return cast(Tensor, super().forward(x, *arguments, **options))
        return (self.group or Group((self,)))(x)[0]

    def _apply(self, *arguments: Any, **options: Any) -> TrainedLinear:
        super()._apply(*arguments, **options)  # moves or casts parameters, or leaves them as they are
        if self.joined is not None and not self.joined.holds(self):
            self.joined.rows = None
        return self

    def is_plain(self) -> bool:
        """Whether it is what `Group` computes: one LoRA without dropout on a frozen weight, with gradients wanted."""
        return (
            torch.is_grad_enabled()  # what is drawn and measured has the bits of a LoRA that is attached anew
            and not (self.disable_adapters or self.merged)
            and self.active_adapters == [TRAINED]
            and type(self.lora_dropout[TRAINED]) is nn.Identity
            and products.frozen(self.base_layer) is not None
        )

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """down (R, I) and up (O, R)."""
        return self.lora_A[TRAINED].weight, self.lora_B[TRAINED].weight


class Group:
    """Adapted linears that read the same input. `in_place` adds to the base's products, which nobody may have kept."""

    def __init__(self, linears: Sequence[TrainedLinear], in_place: bool = False) -> None:
        self.linears = tuple(linears)
        self.in_place = in_place
        self.rows: products.Frozen | None = None
        """All weights in one."""
        self.bias_O: Tensor | None = None
        self.casts: tuple[Tensor, ...] = ()
        """All downs in one, then each up with its scale, in the dtype that is computed in."""

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The result of each, in the dtype that is computed in."""
        weights = [cast(products.Frozen, products.frozen(linear.base_layer)) for linear in self.linears]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif weights[0].kind == "plain":
            x = x.to(weights[0].tensors[0].dtype)
        biases: list[Tensor | None] = [linear.base_layer.bias for linear in self.linears]
        if self.rows is not None:
            weights, biases = [self.rows], [self.bias_O]
        downs, ups = zip(*(linear.factors for linear in self.linears), strict=True)
        scales = tuple(float(linear.scaling[TRAINED]) for linear in self.linears)
        casts = self.casts if self.casts and self.casts[0].dtype is x.dtype else ()
        outs = _Adapted.apply(  # type: ignore[no-untyped-call]
            x, weights[0].kind, scales, len(weights), len(casts), self.in_place,
            *downs, *ups, *casts, *biases, *chain.from_iterable(weight.tensors for weight in weights),
        )  # fmt: skip
        return cast("tuple[Tensor, ...]", outs)

    def base(self, x: Tensor) -> tuple[Tensor, ...]:
        """The result of each without its LoRA, to the bit as with one that changes nothing."""
        if self.rows is None:
            return tuple(linear(x) for linear in self.linears)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        whole_BO = products.product(self.rows, x.reshape(-1, x.shape[-1]), self.bias_O)
        whole = whole_BO.view(*x.shape[:-1], -1)
        return tuple(whole.split_with_sizes([linear.out_features for linear in self.linears], dim=-1))

    def holds(self, linear: TrainedLinear) -> bool:
        """Whether its weight lies in `rows`."""
        if self.rows is None:
            return False
        own, whole = cast(Tensor, linear.base_layer.weight), self.rows.tensors[0]
        return bool(own.untyped_storage()._cdata == whole.untyped_storage()._cdata)

    def join_rows(self) -> None:
        """Lay the weights one after the other, and let each parameter be a view of its rows; or leave all as it is."""
        bases = [linear.base_layer for linear in self.linears]
        weights = [products.frozen(base) for base in bases]
        first = weights[0]
        if first is None or first.kind not in JOINABLE or any(base.bias is None for base in bases):
            return
        if any(one is None or _layout(one) != _layout(first) for one in weights):
            return
        held = [_joined([weight.tensors[place] for weight in weights if weight]) for place in range(len(first.tensors))]
        self.rows = products.Frozen(first.kind, tuple(held))
        self.bias_O = _joined([base.bias for base in bases])


class _Adapted(torch.autograd.Function):
    """x Wᵀ + bias + scale · (x downᵀ) upᵀ for each linear, with gradients for x and the factors alone.

    After the constants come n downs, n ups, their casts if any, and the weights as tensors, as `products` tells their
    kinds, each after its bias: one for all linears, or one for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kind: str,
        scales: tuple[float, ...],
        bases: int,
        cast_count: int,
        in_place: bool,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        downs, ups = rest[:n], rest[n : 2 * n]
        casts, rest = rest[2 * n : 2 * n + cast_count], rest[2 * n + cast_count :]
        biases, held = rest[:bases], rest[bases:]
        if casts:
            down_SI, ups_OR = casts[0], list(casts[1:])
        else:
            down_SI = (downs[0] if n == 1 else torch.cat(downs)).to(x.dtype)
            ups_OR = [_scaled(up, scale).to(x.dtype) for up, scale in zip(ups, scales, strict=True)]
        x_BI = x.reshape(-1, x.shape[-1])
        inner_BS = x_BI.mm(down_SI.t())
        each = len(held) // bases
        parts: list[Tensor] = []
        for place, bias_O in enumerate(biases):
            weight = products.Frozen(kind, held[place * each : (place + 1) * each])
            parts.append(products.product(weight, x_BI, bias_O))
        if bases < n:
            parts = list(parts[0].split_with_sizes([up.shape[0] for up in ups], dim=1))
        inners = inner_BS.split_with_sizes([down.shape[0] for down in downs], dim=1)
        add = torch.Tensor.addmm_ if in_place else torch.addmm
        outs = [add(part, inner, up.t()) for part, inner, up in zip(parts, inners, ups_OR, strict=True)]
        ctx.shape, ctx.kind, ctx.scales, ctx.bases, ctx.cast_count = x.shape, kind, scales, bases, cast_count
        ctx.ranks, ctx.dtypes = [down.shape[0] for down in downs], (downs[0].dtype, ups[0].dtype)
        ctx.save_for_backward(x_BI, down_SI, inner_BS, *ups_OR, *held)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_BI, down_SI, inner_BS, *saved = ctx.saved_tensors
        n = len(ctx.scales)
        ups_OR, held = saved[:n], saved[n:]
        grads_BO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        inner_grads = [grad_BO.mm(up_OR) for grad_BO, up_OR in zip(grads_BO, ups_OR, strict=True)]
        inner_grad_BS = inner_grads[0] if n == 1 else torch.cat(inner_grads, dim=1)
        inners = inner_BS.split_with_sizes(ctx.ranks, dim=1)
        up_grads = [
            _scaled(grad_BO.t().mm(inner_BR).to(ctx.dtypes[1]), scale)
            for grad_BO, inner_BR, scale in zip(grads_BO, inners, ctx.scales, strict=True)
        ]
        down_grads = inner_grad_BS.t().mm(x_BI).to(ctx.dtypes[0]).split_with_sizes(ctx.ranks)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _back(ctx.kind, held, ctx.bases, grads_BO).addmm_(inner_grad_BS, down_SI).view(ctx.shape)
        nothing = [None] * (ctx.cast_count + ctx.bases + len(held))
        return x_grad, None, None, None, None, None, *down_grads, *up_grads, *nothing


class Casts:
    """The factors in the dtype that is computed in, made anew by each pass of a model that gradients are wanted of.

    They are written over where they lie. For autograd that is no change, and it is none: between a forward pass and its
    backward no factor moves.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype) -> None:
        self.groups, self.dtype = groups, dtype
        self._targets: list[Tensor] = []

    def __call__(self, *_: Any) -> None:
        """To be called before a forward pass."""
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            factors, scales = self._factors()
            if not self._targets or self._targets[0].device != factors[0].device:
                self._lay_out(factors)
            if any(scale != 1 for scale in scales):
                factors = list(torch._foreach_mul(factors, scales))
            torch._foreach_copy_(self._targets, factors)

    def _factors(self) -> tuple[list[Tensor], list[float]]:
        """Of each group the downs, then the ups; and what each is multiplied by."""
        factors: list[Tensor] = []
        scales: list[float] = []
        for group in self.groups:
            pairs = [linear.factors for linear in group.linears]
            factors += [down for down, _ in pairs] + [up for _, up in pairs]
            scales += [1.0] * len(pairs) + [float(linear.scaling[TRAINED]) for linear in group.linears]
        return factors, scales

    def _lay_out(self, factors: Sequence[Tensor]) -> None:
        sizes = [one.numel() for one in factors]
        flat = torch.empty(sum(sizes), dtype=self.dtype, device=factors[0].device)
        # `data` has a count of changes of its own, so that writing there is none to what autograd keeps.
        self._targets, read = (
            [part.view(one.shape) for part, one in zip(whole.split_with_sizes(sizes), factors, strict=True)]
            for whole in (flat.data, flat)
        )
        place = 0
        for group in self.groups:
            n = len(group.linears)
            count, start = sum(sizes[place : place + n]), read[place].storage_offset()
            down_SI = flat[start : start + count].view(-1, factors[place].shape[1])
            group.casts = (down_SI, *read[place + n : place + 2 * n])
            place += 2 * n


def prepare(
    denoiser: nn.Module, same_input: Sequence[Sequence[str]], dtype: torch.dtype, join: bool, in_place: bool
) -> None:
    """Let adapted linears that read the same input run as one where `together` is asked, and cast factors once a pass.

    `same_input` are paths of linears; such a set counts if all of it is adapted and held alike. With `join` their
    weights are laid in one storage: not where parameters are moved about one by one. `dtype` is what is computed in.
    Casts are those of the model's last pass: call the model, not its blocks; load weights into those there are.
    """
    adapted = {path: one for path, one in denoiser.named_modules() if isinstance(one, TrainedLinear)}
    groups: list[Group] = []
    for paths in same_input:
        weights = [products.frozen(adapted[path].base_layer) for path in paths if path in adapted]
        if len(weights) == len(paths) and len({weight and weight.kind for weight in weights}) == 1:
            group = Group([adapted.pop(path) for path in paths], in_place)
            for linear in group.linears:
                linear.joined = group
            groups.append(group)
            if join:
                group.join_rows()
    for linear in adapted.values():
        linear.group = Group((linear,), in_place)
        groups.append(linear.group)
    if groups and dtype is not groups[0].linears[0].factors[0].dtype:
        denoiser.register_forward_pre_hook(Casts(groups, dtype))


def together(linears: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The result of each of these linears for the same input: in one operation if they were prepared for it."""
    first = linears[0]
    group = first.joined if isinstance(first, TrainedLinear) else None
    if group is not None and group.linears[0] is first and len(group.linears) == len(linears):
        if all(linear.is_plain() for linear in group.linears):
            return group(x)
        if not torch.is_grad_enabled() and all(linear.disable_adapters for linear in group.linears):
            return group.base(x)
    return [linear(x) for linear in linears]


def _scaled(up_OR: Tensor, scale: float) -> Tensor:
    return up_OR if scale == 1 else up_OR * scale


def _layout(weight: products.Frozen) -> tuple[Any, ...]:
    """All but the number of rows."""
    return weight.kind, *((one.dtype, one.device, one.shape[1:]) for one in weight.tensors)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; those given become views of it."""
    whole = torch.cat([one.data for one in tensors])
    for one, rows in zip(tensors, whole.split_with_sizes([len(one) for one in tensors]), strict=True):
        one.data = rows
    return whole


def _back(kind: str, held: Sequence[Tensor], bases: int, grads_BO: Sequence[Tensor]) -> Tensor:
    """The gradient of all base products with respect to x (B, I), summed in turn: no gradient is copied."""
    each = len(held) // bases
    weights = [held[place * each : (place + 1) * each] for place in range(bases)]
    if bases < len(grads_BO):
        ends = list(accumulate((grad_BO.shape[1] for grad_BO in grads_BO), initial=0))
        weights = [[one[start:end] for one in held] for start, end in pairwise(ends)]
    total: Tensor | None = None
    for weight, grad_BO in zip(weights, grads_BO, strict=True):
        if total is None:
            total = products.product_back(products.Frozen(kind, tuple(weight)), grad_BO)
        elif kind == "plain":
            total.addmm_(grad_BO, weight[0].to(grad_BO.dtype))
        else:
            total += products.product_back(products.Frozen(kind, tuple(weight)), grad_BO)
    assert total is not None
    return total
