"""The two names of the same weights: the original layout of BFL's single files, and diffusers' folders.

    Layout ─ double, single: Stream, a list of blocks: its linears, their sizes, its norms
           ├ outside: the modules that are there once
           └ sizes: the published models, by which their LoRAs are told

The original fuses q, k and v (in FLUX.1's single blocks, the first MLP matrix too) into one matrix; diffusers keeps
them apart. FLUX.2 leaves the first matrix of its single blocks fused in both, and shares its modulation among blocks.
The last modulation yields (shift, scale) in the original and (scale, shift) in diffusers, so its halves swap.

Facts: black-forest-labs/flux and flux2, model.py; diffusers' transformer_flux.py and transformer_flux2.py.
Shapes in names: O out features, I in features. Loads without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SWAPPED, SWAPPED_PATH = "final_layer.adaLN_modulation.1", "norm_out.linear"
"""The module whose halves swap, in the original and in diffusers."""
_BLOCK = re.compile(r"([a-z_]+)([._])(0|[1-9][0-9]{0,5})\2(.+)")


@dataclass(frozen=True)
class Stream:
    """One of the two lists of blocks."""

    original: str
    diffusers: str
    linears: dict[str, tuple[str, ...]]
    """Original name of a block's linear to the diffusers linears it is made of, in row order."""
    units: dict[str, tuple[int, int]]
    """(out, in) of each of them, in units of the model's width."""
    norms: dict[str, str]
    """Original name of a norm's scale to diffusers' name of it."""


@dataclass(frozen=True)
class Size:
    """A published model."""

    architecture: str
    """As ModelSpec names a LoRA for it."""
    width: int
    double: int
    """Blocks of that kind."""
    single: int
    text: int
    """Features of a text token."""


class Named(NamedTuple):
    """The module that a name means."""

    original: str
    """The original module, with dots."""
    paths: tuple[str, ...]
    """The diffusers modules that the name covers, in row order."""
    fused: bool
    """Whether it is a name of the original, whose rows are those of all parts, or of one part."""


@dataclass(frozen=True)
class Layout:
    """The names of one family's modules."""

    name: str
    """As `AdapterState.layout` has it."""
    title: str
    """For people."""
    double: Stream
    single: Stream
    outside: dict[str, str]
    """Modules outside the blocks: original name to diffusers' path."""
    sizes: tuple[Size, ...]

    @property
    def streams(self) -> tuple[Stream, Stream]:
        return self.double, self.single

    @cached_property
    def _inside(self) -> dict[tuple[str, str, str], tuple[Stream, str, int | None]]:
        """(block list, separator, name in the block) → (stream, original leaf, part; None for all of a fused one)."""
        found: dict[tuple[str, str, str], tuple[Stream, str, int | None]] = {}
        for stream in self.streams:
            for leaf, parts in stream.linears.items():
                for separator in "._":
                    found[stream.original, separator, leaf.replace(".", separator)] = stream, leaf, None
                    for position, part in enumerate(parts):
                        found[stream.diffusers, separator, part.replace(".", separator)] = stream, leaf, position
        return found

    @cached_property
    def _outside(self) -> dict[str, tuple[str, bool]]:
        """Any name of a module outside the blocks → (original name, whether the name is an original one)."""
        spelt = {name.replace(".", separator): (name, True) for name in self.outside for separator in "._"}
        paths = {path.replace(".", s): (name, False) for name, path in self.outside.items() for s in "._"}
        return paths | spelt

    def find(self, name: str) -> Named | None:
        """The linear that `name` means: original or diffusers, with dots, or underscores throughout; None if none."""
        if name in self._outside:
            original, fused = self._outside[name]
            return Named(original, (self.outside[original],), fused)
        match = _BLOCK.fullmatch(name)
        found = self._inside.get((match[1], match[2], match[4])) if match else None
        if match is None or found is None:
            return None
        stream, leaf, position = found
        parts = stream.linears[leaf] if position is None else (stream.linears[leaf][position],)
        paths = tuple(f"{stream.diffusers}.{match[3]}.{part}" for part in parts)
        return Named(f"{stream.original}.{match[3]}.{leaf}", paths, position is None)

    def place(self, path: str) -> tuple[str, int] | None:
        """`transformer_blocks.3.attn.to_k` → (`double_blocks.3.img_attn.qkv`, 1): original module and part."""
        named = self.find(path)
        if named is None or named.fused or named.paths != (path,):
            return None
        return named.original, self.parts(named.original).index(path)

    def parts(self, original: str) -> tuple[str, ...]:
        """The diffusers modules of an original module, in row order; empty if there is none of that name."""
        named = self.find(original)
        return named.paths if named and named.fused else ()

    def find_norm(self, name: str) -> tuple[str, str] | None:
        """(original name, diffusers path) of the scale of a block's norm, by either name."""
        match = _BLOCK.fullmatch(name)
        for stream in self.streams:
            for leaf, part in stream.norms.items():
                if match and (match[1], match[4]) in ((stream.original, leaf), (stream.diffusers, part)):
                    return f"{stream.original}.{match[3]}.{leaf}", f"{stream.diffusers}.{match[3]}.{part}"
        return None

    def units(self, original: str) -> tuple[int, int] | None:
        """(out, in) of a block's linear, in units of the model's width; None outside the blocks."""
        match = _BLOCK.fullmatch(original)
        streams = [stream for stream in self.streams if match and match[1] == stream.original]
        return streams[0].units.get(match[4]) if match and streams else None


def block_of(name: str) -> tuple[str, int] | None:
    """(`double_blocks`, 3) of a module inside a block, by the name that it has; None outside."""
    match = _BLOCK.fullmatch(name)
    return (match[1], int(match[3])) if match else None


_ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_ATTENTION_UNITS = {"img_attn.qkv": (3, 1), "txt_attn.qkv": (3, 1), "img_attn.proj": (1, 1), "txt_attn.proj": (1, 1)}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}

FLUX1 = Layout(
    name="flux1",
    title="FLUX.1",
    double=Stream(
        "double_blocks",
        "transformer_blocks",
        linears=_ATTENTION
        | {
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
        units=_ATTENTION_UNITS
        | {"img_mlp.0": (4, 1), "img_mlp.2": (1, 4), "txt_mlp.0": (4, 1), "txt_mlp.2": (1, 4)}
        | {"img_mod.lin": (6, 1), "txt_mod.lin": (6, 1)},
        norms=_DOUBLE_NORMS,
    ),
    single=Stream(
        "single_blocks",
        "single_transformer_blocks",
        linears={
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
        units={"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)},
        norms=_SINGLE_NORMS,
    ),
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        SWAPPED: SWAPPED_PATH,
    },
    # dev, schnell and those made from them are of one size; ModelSpec has a name for "one of these".
    sizes=(Size("flux-1/lora", 3072, 19, 38, 4096), Size("flux-tiny/lora", 128, 2, 4, 64)),
)
FLUX2 = Layout(
    name="flux2",
    title="FLUX.2",
    double=Stream(
        "double_blocks",
        "transformer_blocks",
        linears=_ATTENTION
        | {
            "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",),
            "txt_mlp.0": ("ff_context.linear_in",),
            "txt_mlp.2": ("ff_context.linear_out",),
        },
        # The MLP is gated: its first matrix is twice as wide as its second takes.
        units=_ATTENTION_UNITS | {"img_mlp.0": (6, 1), "img_mlp.2": (1, 3), "txt_mlp.0": (6, 1), "txt_mlp.2": (1, 3)},
        norms=_DOUBLE_NORMS,
    ),
    single=Stream(
        "single_blocks",
        "single_transformer_blocks",
        linears={"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        units={"linear1": (9, 1), "linear2": (1, 4)},
        norms=_SINGLE_NORMS,
    ),
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        SWAPPED: SWAPPED_PATH,
    },
    sizes=(
        Size("flux.2-dev/lora", 6144, 8, 48, 15360),
        Size("flux.2-klein-9b/lora", 4096, 8, 24, 12288),
        Size("flux.2-klein-4b/lora", 3072, 5, 20, 7680),
    ),
)
LAYOUTS = {layout.name: layout for layout in (FLUX1, FLUX2)}

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def is_original(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a transformer in the original layout."""
    return any(_unprefixed(key).startswith(("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")) for key in keys)


def to_diffusers(tensors: dict[str, Tensor], layout: Layout = FLUX1) -> dict[str, Tensor]:
    """A transformer's weights from the original layout to diffusers'. Parts of fused matrices are views, not copies.

    Raises KeyError, naming it, for a tensor that the family does not have.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        result.update(_one_to_diffusers(_unprefixed(key), tensor, layout))
    return result


def _one_to_diffusers(key: str, tensor: Tensor, layout: Layout) -> dict[str, Tensor]:
    if norm := layout.find_norm(key):
        return {norm[1]: tensor}
    module, _, kind = key.rpartition(".")
    parts = layout.parts(module)
    if not parts:
        raise KeyError(key)
    if module == SWAPPED:
        tensor = tensor.roll(tensor.shape[0] // 2, dims=0)
    return {f"{part}.{kind}": rows for part, rows in zip(parts, _split(tensor, parts), strict=True)}


def _split(tensor: Tensor, parts: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Rows of a fused matrix or bias: equal parts, but FLUX.1's linear1, whose MLP part takes what q, k, v leave."""
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
