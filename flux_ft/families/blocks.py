"""FLUX.1's two kinds of blocks in fewer operations than diffusers', for training.

    norm · (1 + scale) + shift    one operation for autograd, which keeps the norm's input, in its own dtype
    residual + gate · result      one operation, rounded once
    RMSNorm and rotary embedding  one operation for autograd, which keeps their input and one number a head
    q, k, v (and the MLP's input) asked for together, so that a LoRA can make one product of them

The modules, their names and parameters stay diffusers'; so does all that is computed outside of training.

Shapes in names: B pictures, N tokens, D width, H heads, E features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux as theirs
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Together = Callable[[Sequence[nn.Module], Tensor], Sequence[Tensor]]
"""Gives the result of each of several linears for the same input."""
Tables = tuple[Tensor, Tensor]
"""Cosines and sines (N, E) of the rotary embedding; both numbers of a pair have the same."""
TABLES_KEPT = 16
"""Sizes whose tables are kept."""


def each(linears: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """One after the other."""
    return [linear(x) for linear in linears]


# Under diffusers' names: by these it finds the blocks that are compiled, and accelerate those that are sharded.


class FluxTransformerBlock(theirs.FluxTransformerBlock):  # type: ignore[misc]
    """A double block: text and picture have weights of their own and attend to each other."""

    together: Together

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tables | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The text's and the picture's tokens, in this order, as diffusers' own."""
        if not self.training or joint_attention_kwargs or image_rotary_emb is None:
            given = hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            return cast("tuple[Tensor, Tensor]", super().forward(*given))
        attn = self.attn
        picture, text = hidden_states, encoder_hidden_states
        shift, scale, gate, *of_picture = _modulation(self.norm1, temb, 6)
        query, key, value = self.together(
            (attn.to_q, attn.to_k, attn.to_v), _modulated(self.norm1, picture, shift, scale)
        )
        shift, scale, text_gate, *of_text = _modulation(self.norm1_context, temb, 6)
        text_query, text_key, text_value = self.together(
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), _modulated(self.norm1_context, text, shift, scale)
        )
        count = text.shape[1]
        attended = _attend(
            attn,
            torch.cat([text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            torch.cat([text_value, value], dim=1),
            _by_row(attn.norm_added_q.weight, attn.norm_q.weight, count, query.shape[1]),
            _by_row(attn.norm_added_k.weight, attn.norm_k.weight, count, query.shape[1]),
            image_rotary_emb,
        )
        # In one piece, as its product needs it: else a linear without a LoRA would add its bias apart, rounded twice.
        of_text_tokens, of_picture_tokens = (
            one.contiguous() for one in attended.split_with_sizes([count, attended.shape[1] - count], dim=1)
        )
        picture = scale_and_add(picture, gate, attn.to_out[1](attn.to_out[0](of_picture_tokens)))
        text = scale_and_add(text, text_gate, attn.to_add_out(of_text_tokens))
        picture = _fed_forward(self.norm2, self.ff, picture, *of_picture)
        return _fed_forward(self.norm2_context, self.ff_context, text, *of_text), picture


class FluxSingleTransformerBlock(theirs.FluxSingleTransformerBlock):  # type: ignore[misc]
    """A single block: text and picture are one sequence, and attention and MLP read the same numbers."""

    together: Together

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tables | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The text's and the picture's tokens, in this order, as diffusers' own."""
        if not self.training or joint_attention_kwargs or image_rotary_emb is None:
            given = hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            return cast("tuple[Tensor, Tensor]", super().forward(*given))
        attn, count = self.attn, encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = _modulation(self.norm, temb, 3)
        query, key, value, wide = self.together(
            (attn.to_q, attn.to_k, attn.to_v, self.proj_mlp), _modulated(self.norm, tokens, shift, scale)
        )
        attended = _attend(attn, query, key, value, attn.norm_q.weight, attn.norm_k.weight, image_rotary_emb)
        result = self.proj_out(torch.cat([attended, self.act_mlp(wide)], dim=2))
        tokens = scale_and_add(tokens, gate, result)
        text, picture = tokens.split_with_sizes([count, tokens.shape[1] - count], dim=1)
        return text, picture


class FluxPosEmbed(theirs.FluxPosEmbed):  # type: ignore[misc]
    """Makes the tables of each size once on a CPU. On a GPU, comparing positions would have to wait for it."""

    known: list[tuple[Tensor, Tables]]

    def forward(self, ids: Tensor) -> Tables:
        """The tables of positions (N, 3)."""
        if type(ids) is not Tensor or ids.device.type != "cpu":
            return cast(Tables, super().forward(ids))
        for seen, tables in self.known:
            if torch.equal(seen, ids):
                return tables
        tables = cast(Tables, super().forward(ids))
        self.known = [(ids, tables), *self.known][:TABLES_KEPT]
        return tables


def fuse(denoiser: nn.Module, together: Together = each) -> None:
    """Let a FLUX.1 transformer's blocks run in fewer operations while it trains, in place.

    `together` is what linears that read the same input are run by. Attention goes where diffusers' own would.
    """
    mine: dict[type, type] = {
        theirs.FluxTransformerBlock: FluxTransformerBlock,
        theirs.FluxSingleTransformerBlock: FluxSingleTransformerBlock,
        theirs.FluxPosEmbed: FluxPosEmbed,
    }
    for module in denoiser.modules():
        if type(module) in mine:
            changed = cast(Any, module)
            changed.__class__ = mine[type(module)]
            changed.known = []
            changed.together = together


def same_input(denoiser: nn.Module) -> list[tuple[str, ...]]:
    """Paths of linears that read the same input, as `fuse` runs them."""
    found: list[tuple[str, ...]] = []
    for path, module in denoiser.named_modules():
        if isinstance(module, theirs.FluxTransformerBlock):
            found.append((f"{path}.attn.to_q", f"{path}.attn.to_k", f"{path}.attn.to_v"))
            found.append((f"{path}.attn.add_q_proj", f"{path}.attn.add_k_proj", f"{path}.attn.add_v_proj"))
        elif isinstance(module, theirs.FluxSingleTransformerBlock):
            found.append((f"{path}.attn.to_q", f"{path}.attn.to_k", f"{path}.attn.to_v", f"{path}.proj_mlp"))
    return found


def _modulation(norm: Any, temb_BD: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates (B, 1, D), one vector a picture."""
    return cast("tuple[Tensor, ...]", norm.linear(norm.silu(temb_BD))[:, None].chunk(parts, dim=-1))


def _modulated(norm: Any, x_BND: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm_and_modulate(x_BND, shift, scale, getattr(norm, "norm", norm).eps)


def _fed_forward(norm: Any, ff: Any, x_BND: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return scale_and_add(x_BND, gate, ff(_modulated(norm, x_BND, shift, scale)))


def _by_row(first_E: Tensor, second_E: Tensor, first: int, second: int) -> Tensor:
    """The norm's weights of each token: so many of one kind, then so many of another."""
    return torch.cat([first_E.expand(first, -1), second_E.expand(second, -1)])


def _attend(
    attn: Any,
    query_BND: Tensor,
    key_BND: Tensor,
    value_BND: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    tables: Tables,
) -> Tensor:
    """Attention (B, N, D) of what the linears gave, with their norms' weights (E,) or (N, E)."""
    query, key, value = (one.view(*one.shape[:2], -1, attn.head_dim) for one in (query_BND, key_BND, value_BND))
    processor = attn.processor
    attended = dispatch_attention_fn(
        norm_and_rotate(query, query_weight, *tables, attn.norm_q.eps),
        norm_and_rotate(key, key_weight, *tables, attn.norm_k.eps),
        value,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return cast(Tensor, attended.flatten(2, 3))


def norm_and_modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights · (1 + scale) + shift; in float32, the result in x's dtype."""
    return cast(Tensor, _NormAndModulate.apply(x_BND, shift_B1D, scale_B1D, eps))  # type: ignore[no-untyped-call]


def scale_and_add(summand_BND: Tensor, scale_B1D: Tensor, x_BND: Tensor) -> Tensor:
    """summand + scale · x, rounded once."""
    return cast(Tensor, _ScaleAndAdd.apply(summand_BND, scale_B1D, x_BND))  # type: ignore[no-untyped-call]


def norm_and_rotate(x_BNHE: Tensor, weight: Tensor, cos_NE: Tensor, sin_NE: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) with weights (E,) or (N, E), then the rotary embedding (Su et
    al. 2021, arXiv 2104.09864) of pairs of neighbours; in float32, the result in x's dtype."""
    return cast(Tensor, _NormAndRotate.apply(x_BNHE, weight, cos_NE, sin_NE, eps))  # type: ignore[no-untyped-call]


class _NormAndModulate(torch.autograd.Function):
    """Autocast would keep the input and the norm's result of it for the backward, both in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        normed, mean, rate = torch.native_layer_norm(_wide(x), x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, mean, rate, scale)
        return torch.addcmul(_wide(shift), normed, 1 + _wide(scale)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rate, scale = ctx.saved_tensors
        needs_x, needs_shift, needs_scale, _ = ctx.needs_input_grad
        wide, grad = _wide(x), _wide(grad)
        x_grad = shift_grad = scale_grad = None
        if needs_shift:
            shift_grad = grad.sum(1, keepdim=True).to(scale.dtype)
        if needs_scale:
            normed = torch.addcmul(-mean * rate, wide, rate)
            scale_grad = normed.mul_(grad).sum(1, keepdim=True).to(scale.dtype)
        if needs_x:
            given = grad * (1 + _wide(scale)), wide, x.shape[-1:], mean, rate, None, None, [True, False, False]
            x_grad = torch.ops.aten.native_layer_norm_backward(*given)[0].to(x.dtype)
        return x_grad, shift_grad, scale_grad, None


class _ScaleAndAdd(torch.autograd.Function):
    """As `torch.addcmul`, whose own backward goes over x once more."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(scale, x if ctx.needs_input_grad[1] else None)
        return torch.addcmul(summand, scale, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, x = ctx.saved_tensors
        needs_summand, needs_scale, needs_x = ctx.needs_input_grad
        scale_grad = (grad * x).sum(1, keepdim=True).to(scale.dtype) if needs_scale else None
        return grad if needs_summand else None, scale_grad, (grad * scale).to(ctx.dtype) if needs_x else None


class _NormAndRotate(torch.autograd.Function):
    """y = weight · r · x with r = 1 / rms(x), and each pair of y's numbers turned by its angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rate = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rate, weight, cos, sin)
        return _turned((wide * rate).mul_(_by_token(weight)), cos, sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rate, weight, cos, sin = ctx.saved_tensors
        wide, y_grad = _wide(x), _turned(_wide(grad), cos, -sin)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (y_grad * wide).mul_(rate).sum(2).sum_to_size(weight.shape).to(weight.dtype)
        # With u = weight · y's gradient: r · u − r³ · mean(u · x) · x.
        u = y_grad.mul_(_by_token(weight))
        share = (u * wide).mean(-1, keepdim=True).mul_(rate.pow(3))
        return u.mul_(rate).addcmul_(wide, share, value=-1).to(x.dtype), weight_grad, None, None, None


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype is torch.float64 else x.float()


def _by_token(weight: Tensor) -> Tensor:
    """(E,) or (N, E), to multiply (B, N, H, E)."""
    return _wide(weight if weight.ndim == 1 else weight[:, None])


def _turned(x_BNHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Each pair of neighbours, taken as a complex number, times cos + i sin; another tensor."""
    cos, sin = cos_NE[:, None, ::2], sin_NE[:, None, ::2]
    shape = (*x_BNHE.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # which has no code for complex numbers, and makes one loop of this
        real, imaginary = x_BNHE.view(*shape).unbind(-1)
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)
    pairs = torch.view_as_complex(x_BNHE.view(*shape))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
