"""A large grid through a model or an autoencoder that knows a smaller one: overlapping tiles, blended smoothly.

The model: at every step the velocity of each tile is predicted from that tile alone, then averaged where tiles overlap
(MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113), with weights that fall off smoothly towards a tile's edge. With
these the borders cannot be told from other lines (on flux-tiny; equal weights leave lines of four standard deviations),
so tiles stay where they are from step to step.

The autoencoder: its group norms would see one tile alone and give each its own tone, so they take mean and variance
from a run over the whole picture reduced to the size of a tile.

Shapes in names: B batch, C channels, H W grid, N tiles along an axis, T cells of a tile, G groups of a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from flux_ft.families.base import Family
from flux_ft.infer.sampler import Predict

OVERLAP = 0.25
"""Least share of a tile that its neighbour covers too."""
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance (B, G, 1) by group norm."""


def tile_starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Where tiles of `tile` cells start, as few as cover `length` with neighbours sharing at least `overlap` cells.

    They are spread evenly, the first starts at 0, the last ends at `length`; where one tile suffices it starts at 0.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} does not fit into a tile of {tile}")
    if length <= tile:
        return (0,)
    gaps = math.ceil((length - tile) / (tile - overlap))
    return tuple(round(i * (length - tile) / gaps) for i in range(gaps + 1))


def window(length: int, tile: int, starts: tuple[int, ...]) -> Tensor:
    """How much each tile counts at each of its own cells, float32 (N, T): a raised cosine, smooth and never zero.

    Over the tiles that cover a cell the weights sum to 1, so at the outer edges, where there is one tile, they are 1.
    """
    tile = min(length, tile)
    bump_T = torch.sin((torch.arange(tile, dtype=torch.float64) + 0.5) * (math.pi / tile)).square()
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += bump_T
    return torch.stack([bump_T / total[start : start + tile] for start in starts]).float()


def tile_count(height: int, width: int, tile_HW: tuple[int, int], overlap: float = OVERLAP) -> int:
    """How many tiles cover a grid, and so how often `tiled_predict` calls the model at each step."""
    sides = zip((height, width), tile_HW, strict=True)
    return math.prod(len(tile_starts(side, tile, math.ceil(overlap * tile))) for side, tile in sides)


def tiled_predict(predict: Predict, tile_HW: tuple[int, int], overlap: float = OVERLAP) -> Predict:
    """`predict` for latents of any size, though it sees no more than a tile of `tile_HW` cells at a time.

    `overlap` is a share of the tile. Latents that fit into one tile go through as they are.
    """

    def blended(z_BCHW: Tensor, sigma: float) -> Tensor:
        return _blend(z_BCHW, lambda tile_BCHW: predict(tile_BCHW, sigma), tile_HW, overlap)

    return blended


def encode(family: Family, vae: nn.Module, pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] to the mean of their normalised latents; in tiles where `vae.use_tiling` is set."""
    return _whole_or_tiled(vae, "encoder", lambda x: family.encode_image(vae, x)[0], pixels_B3HW, _scale(vae), 1)


def decode(family: Family, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
    """Normalised latents to pixels_B3HW in [-1, 1]; in tiles where `vae.use_tiling` is set.

    Done whole, it is `family.decode_latents` of one picture after the other. Done in tiles of the autoencoder's own
    setting, it differs from that by less than encoding and decoding costs (flux-tiny: 1.7 levels of 255, against 2.1;
    diffusers' tiling: 4.6, with visible patches).
    """
    return _whole_or_tiled(vae, "decoder", lambda z: family.decode_latents(vae, z), latents_BCHW, 1, _scale(vae))


def _whole_or_tiled(
    vae: Any, part: str, run: Callable[[Tensor], Tensor], x_BCHW: Tensor, cell_in: int, cell_out: int
) -> Tensor:
    pictures = torch.split(x_BCHW, 1)  # a convolution's rounding depends on the batch
    tile = vae.tile_latent_min_size * cell_in
    if not vae.use_tiling or max(x_BCHW.shape[2:]) <= tile:
        return torch.cat([run(x) for x in pictures])
    return torch.cat([_with_shared_norms(vae.get_submodule(part), run, x, tile, cell_in, cell_out) for x in pictures])


def _with_shared_norms(
    part: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, tile: int, cell_in: int, cell_out: int
) -> Tensor:
    reduce = tile / max(x.shape[2:])
    sides = [max(1, int(side * reduce) // cell_in) * cell_in for side in x.shape[2:]]
    known: Statistics = {}
    with _norms(part, known, record=True):
        run(interpolate(x.float(), size=sides, mode="bicubic", antialias=True))
    with _norms(part, known, record=False):
        return _blend(x, run, (tile, tile), OVERLAP, cell_in, cell_out)


@contextmanager
def _norms(part: nn.Module, known: Statistics, record: bool) -> Iterator[None]:
    """Within, the group norms of `part` write their statistics into `known`, or use those that stand there."""

    def hooked(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            x = args[0].float()
            grouped = x.reshape(len(x), norm.num_groups, -1)
            if record:
                known[name] = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
                return None
            mean_BG1, var_BG1 = known[name]
            normed = ((grouped - mean_BG1) * (var_BG1 + norm.eps).rsqrt()).view_as(x)
            channels = (1, -1, *[1] * (x.ndim - 2))
            scaled: Tensor = normed * norm.weight.view(channels) + norm.bias.view(channels)
            return scaled.to(output.dtype)

        return hook

    norms = [(name, module) for name, module in part.named_modules() if isinstance(module, nn.GroupNorm)]
    hooks = [module.register_forward_hook(hooked(name)) for name, module in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blend(
    x_BCHW: Tensor,
    run: Callable[[Tensor], Tensor],
    tile_HW: tuple[int, int],
    overlap: float,
    cell_in: int = 1,
    cell_out: int = 1,
) -> Tensor:
    """`run` on overlapping tiles of x, put together; `cell_in` cells of x become `cell_out` cells of the result."""
    axes = []
    for side, tile in zip(x_BCHW.shape[2:], tile_HW, strict=True):
        starts = tile_starts(side // cell_in, tile // cell_in, math.ceil(overlap * tile / cell_in))
        length, cells = side // cell_in * cell_out, tile // cell_in * cell_out
        weights = window(length, cells, tuple(start * cell_out for start in starts)).to(x_BCHW.device)
        axes.append([
            (slice(start * cell_in, start * cell_in + tile), slice(start * cell_out, start * cell_out + cells), weight)
            for start, weight in zip(starts, weights, strict=True)
        ])  # fmt: skip
    if all(len(axis) == 1 for axis in axes):
        return run(x_BCHW)
    height, width = (side // cell_in * cell_out for side in x_BCHW.shape[2:])
    whole: Tensor | None = None
    for (rows, rows_out, weight_H), (columns, columns_out, weight_W) in product(*axes):
        part = run(x_BCHW[..., rows, columns].contiguous()).to(x_BCHW.device, torch.float32)
        if whole is None:
            whole = part.new_zeros(*part.shape[:2], height, width)
        whole[..., rows_out, columns_out] += weight_H[:, None] * weight_W * part
    assert whole is not None
    return whole


def _scale(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))
