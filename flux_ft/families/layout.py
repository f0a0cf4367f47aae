"""FLUX.1's two names for the same weights: the original layout of BFL's single files, and diffusers' folders.

The original fuses q, k and v (and, in single blocks, the first MLP matrix) into one matrix; diffusers keeps them apart.
The last modulation yields (shift, scale) in the original and (scale, shift) in diffusers, so its halves swap.

Facts: black-forest-labs/flux model.py and diffusers' transformer_flux.py.
Shapes in names: O out features, I in features. Loads without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DOUBLE_BLOCK: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE_BLOCK: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
"""Original name of a block's linear to the diffusers linears it is made of, in row order."""

NORMS = {
    "double": {
        "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
        "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
        "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
        "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    },
    "single": {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
}
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def is_original(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a FLUX.1 transformer in the original layout."""
    return any(_unprefixed(key).startswith(("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")) for key in keys)


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's weights from the original layout to diffusers'. Parts of fused matrices are views, not copies.

    Raises KeyError, naming it, for a tensor that FLUX.1 does not have.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        result.update(_one_to_diffusers(_unprefixed(key), tensor))
    return result


def _one_to_diffusers(key: str, tensor: Tensor) -> dict[str, Tensor]:
    match = _BLOCK.fullmatch(key)
    if match is None:
        module, _, kind = key.rpartition(".")
        if module == "final_layer.adaLN_modulation.1":
            tensor = tensor.roll(tensor.shape[0] // 2, dims=0)
        return {f"{OUTSIDE[module]}.{kind}": tensor}
    stream, index, rest = match.groups()
    prefix = f"{'transformer_blocks' if stream == 'double' else 'single_transformer_blocks'}.{index}."
    if rest in NORMS[stream]:
        return {prefix + NORMS[stream][rest]: tensor}
    module, _, kind = rest.rpartition(".")
    parts = (DOUBLE_BLOCK if stream == "double" else SINGLE_BLOCK)[module]
    return {f"{prefix}{part}.{kind}": rows for part, rows in zip(parts, _split(tensor, parts), strict=True)}


def _split(tensor: Tensor, parts: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Rows of a fused matrix or bias: equal parts, but linear1, whose MLP part takes what q, k and v leave."""
    if len(parts) < 4:
        return tensor.chunk(len(parts), dim=0)
    width = tensor.shape[0] // 7  # 3 parts of one width and an MLP of four
    q, k, v = (tensor[i * width : (i + 1) * width] for i in range(3))
    return q, k, v, tensor[3 * width :]


def _unprefixed(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key
