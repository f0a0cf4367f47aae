"""Ultra on flux-tiny: twice the sides, no seam, and one object stays one.

The seam statistic: on bare ground (far from the figure) take the mean absolute difference, in levels of 255, across
each line between two columns or rows of tokens. Of the lines where a tile begins or ends, how far is the mean above the
mean of all other such lines, in standard deviations of these? `seam` gives that number; a seam has several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from flux_ft.families.tiny.reader import SceneReader
from flux_ft.families.tiny.scenes import Scene, caption
from flux_ft.infer import ultra
from flux_ft.infer.grid import to_image
from flux_ft.infer.sampler import Predict, initial_noise, predictor, sample_latents
from flux_ft.infer.tiles import tile_starts, tiled_predict

CPU = torch.device("cpu")
STEPS = 20
TOKEN_PX = 8
SCENES = (
    Scene("circle", "white", "small", "bottom left", "blue"),
    Scene("square", "black", "small", "top", "orange"),
    Scene("star", "yellow", "large", "right", "purple"),
    Scene("heart", "red", "large", "center", "white"),
    Scene("triangle", "green", "large", "top right", "black"),
    Scene("cross", "white", "small", "bottom", "red"),
)
Refine = Callable[..., Tensor]


class Native(NamedTuple):
    """Pictures as the model draws them, and what draws them."""

    pixels_B3HW: Tensor
    predict: Predict
    predict_first: Predict
    seeds: list[int]


@pytest.fixture(scope="module")
def parts(tiny_family) -> dict[str, Any]:
    return {
        "text": tiny_family.load_text(CPU, torch.float32),
        "vae": tiny_family.load_vae(CPU, torch.float32),
        "denoiser": tiny_family.load_denoiser(CPU, torch.float32),
    }


@pytest.fixture(scope="module")
def draw(tiny_family, parts) -> Callable[[float], Native]:
    def drawn(ratio: float) -> Native:
        seeds = list(range(len(SCENES)))
        guidance = tiny_family.variant.default_guidance
        text, first = (
            tiny_family.encode_text(parts["text"], [caption(scene) for scene in scenes])
            for scenes in (SCENES, SCENES[:1])
        )
        shape = tiny_family.latent_shape(*ultra.native_size(ratio, tiny_family.variant))
        latents = sample_latents(
            tiny_family, parts["denoiser"], initial_noise(shape, seeds), text, STEPS, guidance
        )  # fmt: skip
        return Native(
            tiny_family.decode_latents(parts["vae"], latents),
            predictor(tiny_family, parts["denoiser"], text, guidance),
            predictor(tiny_family, parts["denoiser"], first, guidance),
            seeds,
        )

    return drawn


@pytest.fixture(scope="module")
def native(draw) -> Native:
    return draw(1.0)


@pytest.fixture(scope="module")
def refine(tiny_family, parts) -> Refine:
    def refined(native: Native, **options: Any) -> Tensor:
        return ultra.refine(
            tiny_family, parts["vae"], native.predict, native.pixels_B3HW, native.seeds, STEPS, **options
        )

    return refined


@pytest.fixture(scope="module")
def large(native, refine) -> Tensor:
    return refine(native)


def pictures(pixels_B3HW: Tensor) -> list[np.ndarray]:
    return [np.asarray(to_image(pixels)) for pixels in pixels_B3HW]


def from_ground(picture: np.ndarray) -> np.ndarray:
    """RGB distance of each pixel from the background's colour."""
    frame = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3)])
    return np.linalg.norm(picture - np.median(frame, axis=0), axis=-1)


def figures(picture: np.ndarray) -> int:
    """How many connected figures of at least a few pixels stand out from the ground."""
    mask = torch.from_numpy(from_ground(picture) > 50).float()[None, None]
    labels, before = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask, torch.zeros(())
    while not torch.equal(labels, before):
        labels, before = max_pool2d(labels, 3, 1, 1) * mask, labels
    return int((labels[labels > 0].unique(return_counts=True)[1] >= 6).sum())


def seam(native: Native, large: Tensor, share: float = 0.25) -> float:
    """The seam statistic of this file's head; tiles have the native size and overlap by `share`."""
    found = np.stack(pictures(large)).astype(np.float32)
    figure = torch.from_numpy(np.stack([from_ground(p) > 40 for p in pictures(ultra.enlarge(native.pixels_B3HW))]))
    bare = (max_pool2d(figure.float()[:, None], 9, 1, 4)[:, 0] == 0).numpy()
    at_tiles, elsewhere = [], []
    for axis in (1, 2):
        jump = np.abs(np.diff(found, axis=axis)).mean(-1)
        length, tile = found.shape[axis], native.pixels_B3HW.shape[axis + 1]
        open_ground = bare.take(range(1, length), axis) & bare.take(range(length - 1), axis)
        others = (0, 3 - axis)
        lines = (jump * open_ground).sum(others) / open_ground.sum(others)
        starts = tile_starts(length, tile, int(share * tile))
        borders = {*starts, *(start + tile for start in starts)}
        for line in range(TOKEN_PX, length, TOKEN_PX):
            (at_tiles if line in borders else elsewhere).append(lines[line - 1])
    return float((np.mean(at_tiles) - np.mean(elsewhere)) / np.std(elsewhere, ddof=1))


def hard_tiles(predict: Predict, tile_HW: tuple[int, int]) -> Predict:
    """What tiling is without overlap and blending."""
    return tiled_predict(predict, tile_HW, overlap=0.0)


def test_it_has_twice_the_sides_and_sharper_edges_than_the_enlargement(native, large):
    assert large.shape == (len(SCENES), 3, 128, 128)

    def steepness(pixels: Tensor) -> float:
        return float(pixels.diff(dim=3).abs().flatten(1).topk(100).values.mean())

    assert steepness(large) > 1.3 * steepness(ultra.enlarge(native.pixels_B3HW))


def test_borders_of_tiles_cannot_be_told_from_other_lines(native, large):
    assert seam(native, large) < 1


def test_the_seam_measure_sees_tiles_without_overlap(native, refine, monkeypatch):
    monkeypatch.setattr(ultra, "tiled_predict", hard_tiles)
    assert seam(native, refine(native, sigma_start=0.6), share=0.0) > 5


def test_one_object_stays_one_and_is_read_as_in_the_native_picture(native, large):
    reader = SceneReader()
    assert [figures(picture) for picture in pictures(native.pixels_B3HW)] == [1] * len(SCENES)
    assert [figures(picture) for picture in pictures(large)] == [1] * len(SCENES)
    for scene, small, picture in zip(SCENES, pictures(native.pixels_B3HW), pictures(large), strict=True):
        halved = np.asarray(Image.fromarray(picture).reduce(ultra.SCALE))
        assert reader.read(halved).matches(scene) == reader.read(small).matches(scene), scene


def test_tiles_that_are_not_held_draw_objects_of_their_own(native, refine, monkeypatch):
    monkeypatch.setattr(ultra, "held", lambda predict, x0: predict)
    assert max(figures(picture) for picture in pictures(refine(native, sigma_start=0.7))) > 1


def test_a_wide_picture_has_no_seam_either(draw, refine):
    wide = draw(21 / 9)
    large = refine(wide)
    assert large.shape[2:] == (80, 192)
    assert seam(wide, large) < 1


def test_one_seed_gives_one_picture_whatever_is_drawn_beside_it(tiny_family, parts, native, large, refine):
    assert torch.equal(refine(native), large)
    calls: list[None] = []
    alone = ultra.refine(
        tiny_family, parts["vae"], native.predict_first, native.pixels_B3HW[:1], native.seeds[:1], STEPS,
        on_pass=lambda: calls.append(None),
    )  # fmt: skip
    torch.testing.assert_close(alone, large[:1], atol=1e-3, rtol=0)
    assert len(calls) == ultra.refine_passes(tiny_family, 64, 64, STEPS) == 54
    assert not torch.allclose(refine(native._replace(seeds=[9] * len(SCENES)))[:1], large[:1], atol=1e-2)


def test_an_autoencoder_that_works_in_tiles_leaves_no_seam(parts, native, large, refine):
    parts["vae"].enable_tiling()
    try:
        tiled = refine(native)
    finally:
        parts["vae"].disable_tiling()
    assert seam(native, tiled) < 1
    assert [figures(picture) for picture in pictures(tiled)] == [1] * len(SCENES)
    assert 127.5 * (tiled - large).abs().mean() < 4
