"""The two views of a LoRA: split, in diffusers' modules, and fused, in the original's; exact both ways.

    split  to_q, to_k, to_v     ─fuse→  qkv   one shared down: ranks stay; else up is block-diagonal and ranks add up
    fused  qkv                  ─split→ to_q, to_k, to_v     block-diagonal: each part its own rank; else down is copied

Nothing is computed before it is asked for, so that a LoRA of any size is converted module by module.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_ft.errors import AdapterError
from flux_ft.families.layout import LAYOUTS, SWAPPED, Layout
from flux_ft.types import AdapterState, LoraLayer


def layout_of(state: AdapterState) -> Layout:
    """The family whose paths `state` has."""
    return LAYOUTS[state.layout]


def bfl_module(path: str, layout: str = "flux1") -> tuple[str, int] | None:
    """`transformer_blocks.3.attn.to_k` → (`double_blocks.3.img_attn.qkv`, 1): BFL module and part.

    None for what is no linear inside a block.
    """
    place = LAYOUTS[layout].place(path)
    return place if place and LAYOUTS[layout].units(place[0]) else None


def diffusers_modules(bfl_name: str, layout: str = "flux1") -> tuple[str, ...]:
    """The parts of a BFL module (dots, or underscores as in kohya) in row order; empty if it is no block linear."""
    named = LAYOUTS[layout].find(bfl_name)
    return named.paths if named and named.fused and LAYOUTS[layout].units(named.original) else ()


def scale_of(layer: LoraLayer) -> float:
    """What `up @ down` is multiplied by."""
    return layer.alpha / layer.rank


def scaled_up(layer: LoraLayer) -> Tensor:
    """`up` with the scale multiplied in, in float32."""
    return layer.up_OR.detach().float() * scale_of(layer)


def delta_weight(layer: LoraLayer) -> Tensor:
    """The weight change of one layer, (alpha / rank) · up @ down, in float32, shape (O, I)."""
    return scaled_up(layer) @ layer.down_RI.detach().float()


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU in another dtype; between bf16 and fp16 by way of float32, which takes a third of the time."""
    here = tensor.detach().cpu()
    return here if here.dtype == dtype else here.float().to(dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass and no mask, so a tenth of the time of isfinite()."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN comes through
    return math.isfinite(low.item()) and math.isfinite(high.item())


def width_of(state: AdapterState) -> int | None:
    """The model's width, as the first block linear has it; None where there is none."""
    layout = layout_of(state)
    for path, layer in state.layers.items():
        place = layout.place(path)
        units = layout.units(place[0]) if place else None
        if units:
            return layer.down_RI.shape[1] // units[1]
    return None


# --- Split → fused. ---


@dataclass(frozen=True)
class FusedModule:
    """One BFL module, put together from the diffusers layers that were trained; of scale 1."""

    name: str
    """As the original has it, with dots."""
    parts: Mapping[int, LoraLayer]
    """By position; what was not trained is not there."""
    rows: tuple[int, ...]
    """Out features of every part, trained or not."""
    shared: bool
    """Whether the parts have one `down`."""

    @property
    def rank(self) -> int:
        ranks = [layer.rank for layer in self.parts.values()]
        return ranks[0] if self.shared else sum(ranks)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return sum(self.rows), next(iter(self.parts.values())).down_RI.shape[1]

    def down(self) -> Tensor:
        """(R, I), as the parts have it."""
        downs = [self.parts[position].down_RI.detach() for position in sorted(self.parts)]
        return downs[0] if self.shared else torch.cat(downs)

    def up(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(O, R), scales multiplied in before they are rounded to `dtype`.

        Where ranks add up it is block-diagonal. Its zeros are exact: readers recognise the blocks by them.
        """
        columns = [(0 if self.shared else self.parts[position].rank) for position in sorted(self.parts)]
        up_OR = torch.zeros(sum(self.rows), self.rank, dtype=dtype)
        for number, position in enumerate(sorted(self.parts)):
            layer = self.parts[position]
            first_row, first_column = sum(self.rows[:position]), sum(columns[:number])
            block = up_OR[first_row : first_row + self.rows[position], first_column : first_column + layer.rank]
            block.copy_(converted(layer.up_OR if scale_of(layer) == 1 else scaled_up(layer), dtype))
        return up_OR.roll(len(up_OR) // 2, 0) if self.name == SWAPPED else up_OR

    def layer(self) -> LoraLayer:
        """In float32."""
        return LoraLayer(self.down().float(), self.up(), float(self.rank))


def fuse(state: AdapterState) -> dict[str, FusedModule]:
    """The modules of the original, by name. AdapterError when a path is none of the family's, or parts do not fit."""
    layout = layout_of(state)
    groups: dict[str, dict[int, LoraLayer]] = {}
    for path, layer in state.layers.items():
        place = layout.place(path)
        if place is None:
            raise AdapterError(
                f"`{path}` is no linear of {layout.title}, so the original layout has no name for it",
                hint="use diffusers",
            )
        groups.setdefault(place[0], {})[place[1]] = layer
    return {name: _fused(name, parts, layout) for name, parts in groups.items()}


def _fused(name: str, parts: Mapping[int, LoraLayer], layout: Layout) -> FusedModule:
    rows = _rows(name, parts, layout)
    downs = [layer.down_RI for layer in parts.values()]
    return FusedModule(name, parts, rows, shared=all(_same(down, downs[0]) for down in downs[1:]))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


def _rows(name: str, parts: Mapping[int, LoraLayer], layout: Layout) -> tuple[int, ...]:
    """Rows of each part: q, k, v are as wide as the input; an MLP part as the state has it, else as the family does."""
    paths, units = layout.parts(name), layout.units(name)
    if len(paths) == 1 or units is None:
        return (parts[0].up_OR.shape[0],)
    width = next(iter(parts.values())).down_RI.shape[1]
    usual = [width] * 3 + [width * (units[0] - 3)] * (len(paths) - 3)
    rows = []
    for position, path in enumerate(paths):
        layer = parts.get(position)
        rows.append(layer.up_OR.shape[0] if layer else usual[position])
        if layer and (layer.down_RI.shape[1] != width or (position < 3 and rows[-1] != width)):
            raise AdapterError(
                f"`{path}` of shape {(rows[-1], layer.down_RI.shape[1])} does not fit into `{name}`",
                hint=f"is it a {layout.title} LoRA?",
            )
    return tuple(rows)


# --- Fused → split. ---


def rows_of(name: str, out: int, width: int, layout: Layout, label: str = "") -> tuple[int, ...]:
    """Rows of each part of a BFL module of shape (out, width). AdapterError, with `label`, when they cannot be told."""
    paths = layout.parts(name)
    if len(paths) == 1:
        return (out,)
    mlp = (out - 3 * width,) * (len(paths) - 3)
    if (mlp and mlp[0] <= 0) or (not mlp and out != 3 * width):
        raise AdapterError(
            f"`{label or name}` has shape ({out}, {width}), which fits no {layout.title} block",
            hint="is it FLUX.1?" if layout.name == "flux1" else "is it FLUX.2?",
        )
    return (*[width] * 3, *mlp)


def split(name: str, layer: LoraLayer, layout: Layout, label: str = "") -> dict[str, LoraLayer]:
    """The diffusers layers of BFL module `name`: `down` copied to each part, `up` cut by rows. Exact.

    Where no column of `up` serves two parts it is block-diagonal, and each part keeps its own columns. Parts whose rows
    are all zero were not trained and are left out, unless all are (a LoRA at its first step). AdapterError, with
    `label`, when the shape is no block's.
    """
    paths = layout.parts(name)
    if name == SWAPPED:
        return {paths[0]: LoraLayer(layer.down_RI, layer.up_OR.roll(len(layer.up_OR) // 2, 0), layer.alpha)}
    rows = rows_of(name, layer.up_OR.shape[0], layer.down_RI.shape[1], layout, label)
    return split_rows(paths, rows, layer)


def split_rows(paths: tuple[str, ...], rows: tuple[int, ...], layer: LoraLayer) -> dict[str, LoraLayer]:
    """As `split`, for parts of these rows."""
    if len(paths) == 1:
        return {paths[0]: layer}
    ups = torch.split(layer.up_OR, list(rows))
    used_PR = torch.stack([(up != 0).any(0) for up in ups])
    if not used_PR.any():
        used_PR = torch.ones_like(used_PR)
    elif (used_PR.sum(0) > 1).any():
        used_PR = used_PR.any(1, keepdim=True).expand_as(used_PR)
    parts = {}
    for path, up, used_R in zip(paths, ups, used_PR, strict=True):
        kept = int(used_R.sum())
        if kept == layer.rank:
            parts[path] = LoraLayer(layer.down_RI, up, layer.alpha)
        elif kept:
            columns = _columns(used_R)
            parts[path] = LoraLayer(layer.down_RI[columns], up[:, columns], layer.alpha * kept / layer.rank)
    return parts


def _columns(used_R: Tensor) -> slice | Tensor:
    """A slice where the columns lie side by side, since that takes a view and not a copy."""
    found = used_R.nonzero().flatten()
    first, last = int(found[0]), int(found[-1])
    return slice(first, last + 1) if last - first + 1 == len(found) else found


def unfuse(modules: Mapping[str, LoraLayer], layout: str = "flux1") -> dict[str, LoraLayer]:
    """The diffusers layers of BFL modules, by their names with dots. AdapterError: a name or shape that is not its."""
    layers = {}
    for name, layer in modules.items():
        if not LAYOUTS[layout].parts(name):
            raise AdapterError(f"`{name}` is no linear of {LAYOUTS[layout].title}", hint="expected the original's name")
        layers.update(split(name, layer, LAYOUTS[layout]))
    return layers
