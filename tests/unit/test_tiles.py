"""Tiles: they cover, their weights sum to one, and what acts cell by cell comes out as if done whole."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.families.registry import FLUX1_DEV, FLUX1_SCHNELL, FLUX_TINY
from flux_ft.infer import tiles, ultra
from flux_ft.infer.tasks import Ultra
from flux_ft.infer.tiles import tile_count, tile_starts, tiled_predict, window

CPU = torch.device("cpu")
RATIOS = ("21:9", "16:9", "3:2", "4:3", "5:4", "1:1", "4:5", "3:4", "2:3", "9:16", "9:21")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(length, tile, overlap), odd ones among them."""
    tile = draw(st.integers(1, 40))
    return draw(st.integers(1, 150)), tile, draw(st.integers(0, tile - 1))


@settings(deadline=None)
@given(layouts())
def test_as_few_tiles_as_possible_cover_everything_and_the_last_ends_at_the_edge(layout):
    length, tile, overlap = layout
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + min(tile, length) == length
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(starts))
    assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) + tile < length


@settings(deadline=None)
@given(layouts())
def test_tiles_are_spread_evenly(layout):
    starts = tile_starts(*layout)
    gaps = [b - a for a, b in pairwise(starts)]
    assert not gaps or max(gaps) - min(gaps) <= 2
    assert len(gaps) < 2 or abs(gaps[0] - gaps[-1]) <= 1


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_an_overlap_that_a_tile_has_no_room_for_is_refused(overlap):
    with pytest.raises(ValueError, match="does not fit"):
        tile_starts(10, 4, overlap)


@settings(deadline=None)
@given(layouts())
def test_weights_sum_to_one_at_every_cell_and_are_never_zero(layout):
    length, tile, overlap = layout
    starts = tile_starts(length, tile, overlap)
    weights = window(length, tile, starts)
    assert weights.min() > 0
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones(length), atol=1e-6, rtol=0)


def test_weights_fall_off_smoothly_towards_a_border_inside():
    weights = window(32, 16, (0, 8, 16))
    assert weights[1, 0] < 0.02
    assert weights[1].diff().abs().max() < 0.25
    torch.testing.assert_close(weights[0], weights[2].flip(0))


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 33), st.integers(1, 33)), st.tuples(st.integers(2, 12), st.integers(2, 12)),
       st.floats(0, 0.5))  # fmt: skip
def test_a_pointwise_prediction_is_the_same_tiled_and_whole(sides, tile, overlap):
    z = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))

    def predict(z: Tensor, sigma: float) -> Tensor:
        return z.sin() * sigma + z

    torch.testing.assert_close(tiled_predict(predict, tile, overlap)(z, 0.4), predict(z, 0.4), atol=1e-6, rtol=0)


def test_the_model_sees_tiles_of_one_size_as_often_as_counted():
    seen = []

    def predict(z: Tensor, sigma: float) -> Tensor:
        seen.append((z.shape[2:], sigma, z.is_contiguous()))
        return z.bfloat16()

    out = tiled_predict(predict, (10, 24))(torch.zeros(1, 8, 20, 48), 0.5)
    assert out.dtype == torch.float32
    assert seen == [((10, 24), 0.5, True)] * tile_count(20, 48, (10, 24))
    assert len(seen) == 9


def test_latents_of_one_tile_are_predicted_as_they_are():
    z = torch.zeros(1, 8, 16, 16)
    assert tiled_predict(lambda z, sigma: z, (16, 16))(z, 0.5) is z


# -- the autoencoder --------------------------------------------------------------------------------------------------


@pytest.fixture
def vae(tiny_family):
    return tiny_family.load_vae(CPU, torch.float32)


@pytest.fixture
def pixels():
    """A disc and a slope on 96×128 px, twice as wide and high as the autoencoder's tiles."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 128), indexing="ij")
    disc = torch.sigmoid(40 * (0.3 - (x + 0.4) ** 2 - y**2))
    return torch.stack([disc, 0.5 * x, -disc])[None].repeat(2, 1, 1, 1)


def test_without_tiling_it_is_the_plain_autoencoder_picture_by_picture(tiny_family, vae, pixels):
    latents = tiles.encode(tiny_family, vae, pixels)
    assert torch.equal(latents[:1], tiny_family.encode_image(vae, pixels[:1])[0])
    assert torch.equal(tiles.decode(tiny_family, vae, latents)[1:], tiny_family.decode_latents(vae, latents[1:]))


def test_norms_that_look_at_the_whole_keep_tiles_nearer_to_the_plain_result_than_diffusers_does(
    tiny_family, vae, pixels
):
    plain = tiles.encode(tiny_family, vae, pixels)
    whole = tiles.decode(tiny_family, vae, plain)
    vae.enable_tiling()

    def off(found: Tensor, wanted: Tensor) -> float:
        assert found.shape == wanted.shape
        return float((found - wanted).abs().mean())

    assert off(tiles.encode(tiny_family, vae, pixels), plain) < 0.75 * off(
        tiny_family.encode_image(vae, pixels)[0], plain
    )
    assert off(tiles.decode(tiny_family, vae, plain), whole) < 0.75 * off(tiny_family.decode_latents(vae, plain), whole)


def test_recorded_norms_repeat_what_they_were_recorded_on_and_leave_nothing_behind():
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    part = nn.Sequential(norm)
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(2)) * 3 + 1
    plain, known = part(x), {}
    with tiles._norms(part, known, record=True):
        part(x)
    with tiles._norms(part, known, record=False):
        torch.testing.assert_close(part(x), plain)
        torch.testing.assert_close(part(x[..., :2]), plain[..., :2])
        torch.testing.assert_close(part(x.flatten(2)), plain.flatten(2))
    assert not torch.allclose(part(x[..., :2]), plain[..., :2], atol=1e-2)


# -- sizes and schedule of ultra --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("variant", [FLUX1_DEV, FLUX_TINY], ids=lambda variant: variant.name)
def test_native_sizes_are_on_the_grid_within_the_area_and_near_the_ratio(variant, ratio):
    wanted = Ultra(aspect_ratio=ratio).ratio
    width, height = ultra.native_size(wanted, variant)
    assert width % variant.pixel_multiple == height % variant.pixel_multiple == 0
    assert 0.84 * variant.max_pixels <= width * height <= variant.max_pixels
    cells = min(width, height) / variant.pixel_multiple
    assert abs(math.log(width / height / wanted)) < 0.5 / cells


def test_native_sizes_of_flux1():
    found = {ratio: ultra.native_size(Ultra(aspect_ratio=ratio).ratio, FLUX1_DEV) for ratio in ("1:1", "16:9", "9:21")}
    assert found == {"1:1": (1024, 1024), "16:9": (1360, 768), "9:21": (672, 1552)}


@pytest.mark.parametrize("variant", [FLUX1_DEV, FLUX1_SCHNELL, replace(FLUX1_DEV, default_steps=50)])
def test_refining_walks_the_end_of_the_schedule_that_draws(variant):
    steps = round(variant.default_steps / 10) * 10 or 10
    mu = 1.15 if variant.shifted else 0.0
    begin = float(flow.shift_sigma(torch.tensor(ultra.START), mu))
    sigmas = ultra.refine_sigmas(begin, ultra.refine_steps(steps), mu)
    torch.testing.assert_close(sigmas, flow.sampling_sigmas(steps, mu)[-len(sigmas) :])
    assert ultra.refine_steps(variant.default_steps) >= 1


def test_held_takes_the_coarse_part_from_the_picture_and_the_fine_part_from_the_model():
    x0, sigma = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(3)), 0.5
    z = x0 + sigma
    coarse = torch.linspace(-1, 1, 24).expand(1, 4, 24, 24) + 2
    fine = (-1.0) ** torch.arange(24).expand(1, 4, 24, 24)

    def predict(z: Tensor, sigma: float) -> Tensor:
        return (z - (x0 + coarse + fine)) / sigma

    kept = z - sigma * ultra.held(predict, x0)(z, sigma) - x0
    torch.testing.assert_close(kept[..., 5:-5], fine[..., 5:-5], atol=0.03, rtol=0)
