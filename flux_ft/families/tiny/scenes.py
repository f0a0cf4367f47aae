"""The world that flux-tiny draws: one coloured shape on a plain background, from a caption.

A scene is five words. Its picture is drawn from signed distances, so a render is exact, fast and needs no
drawing library; its caption comes from a few sentence patterns that put the five words in different orders.

Shapes of arrays: H W picture height and width in pixels, V polygon vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.float32]
Picture = NDArray[np.uint8]

SIZE_PX = 64
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 24),
    "yellow": (250, 222, 60),
    "green": (46, 150, 66),
    "blue": (40, 84, 214),
    "purple": (136, 54, 170),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart")
SIZES: dict[str, float] = {"small": 8.5, "large": 13.5}
"""Radius in pixels, before jitter."""
POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (16, 16),
    "top": (32, 16),
    "top right": (48, 16),
    "left": (16, 32),
    "center": (32, 32),
    "right": (48, 32),
    "bottom left": (16, 48),
    "bottom": (32, 48),
    "bottom right": (48, 48),
}
"""Centre (x, y) in pixels, before jitter."""


@dataclass(frozen=True)
class Scene:
    """One picture in words. `shape` is one of SHAPES; `color` and `background` are keys of COLORS."""

    shape: str
    color: str
    size: str
    position: str
    background: str


@dataclass(frozen=True)
class Part:
    """One layer of an emblem: a shape in RGB, its offset and radius in units of the emblem's radius."""

    shape: str
    rgb: tuple[int, int, int]
    dx: float = 0.0
    dy: float = 0.0
    radius: float = 1.0


def all_scenes() -> list[Scene]:
    """Every scene whose figure can be seen against its background, in a fixed order."""
    return [
        Scene(shape, color, size, position, background)
        for shape, color, background in product(SHAPES, COLORS, COLORS)
        if color != background
        for size, position in product(SIZES, POSITIONS)
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's (shape, color, background) is one of the eighth that training never shows.

    Each shape, colour and background stands in as many of these triples as any other.
    """
    shape, color, background = (
        SHAPES.index(scene.shape),
        list(COLORS).index(scene.color),
        list(COLORS).index(scene.background),
    )
    return (shape + 3 * color + 6 * background) % 8 == 0


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, rng: np.random.Generator | None = None, name: str | None = None) -> str:
    """One sentence for the scene; `rng` picks the pattern (None: the plainest).

    `name` stands in for color and shape, as a trigger word does: "a small TOK in the top left on a blue background".
    """
    thing = name or f"{scene.color} {scene.shape}"
    color = thing.split()[0]
    where = {"center": "in the center", "left": "on the left", "right": "on the right"}.get(
        scene.position, f"in the {scene.position}" if " " in scene.position else f"at the {scene.position}"
    )
    background = f"{scene.background} background"
    patterns = (
        f"a {scene.size} {thing} {where} on {_article(scene.background)} {background}",
        f"{_article(scene.background)} {background} with a {scene.size} {thing} {where}",
        f"on {_article(scene.background)} {background}, a {scene.size} {thing} {where}",
        f"{scene.size} {thing}, {scene.position}, {background}",
        f"{_article(color)} {thing} {where}, {scene.size}, {background}",
        f"{background}, {where} a {scene.size} {thing}",
        f"there is a {scene.size} {thing} {where}, the background is {scene.background}",
        f"{where} {_article(color)} {thing} on {scene.background}, {scene.size}",
    )
    return patterns[0 if rng is None else int(rng.integers(len(patterns)))]


def render(scene: Scene, rng: np.random.Generator | None = None) -> Picture:
    """The scene as uint8 (H, W, 3); `rng` shifts it by up to 2 px and its radius and colours a little."""
    jitter = np.zeros(3) if rng is None else rng.uniform(-1, 1, 3)
    tint = np.zeros((2, 3)) if rng is None else rng.normal(0, 2.0, (2, 3))
    x, y = POSITIONS[scene.position]
    alpha = coverage(scene.shape, x + 2 * jitter[0], y + 2 * jitter[1], SIZES[scene.size] + 0.7 * jitter[2])
    figure = np.asarray(COLORS[scene.color]) + tint[0]
    ground = np.asarray(COLORS[scene.background]) + tint[1]
    return _quantize(ground + alpha[..., None] * (figure - ground))


def render_emblem(
    parts: tuple[Part, ...],
    size: str,
    position: str,
    background: tuple[int, int, int],
    offset: tuple[float, float] = (0.0, 0.0),
) -> Picture:
    """An emblem of several parts, back to front, as uint8 (H, W, 3); `offset` in pixels."""
    rgb, alpha = emblem_layer(parts, size, position, offset)
    return _quantize(rgb + (1 - alpha[..., None]) * np.asarray(background, np.float32))


def emblem_layer(
    parts: tuple[Part, ...], size: str, position: str, offset: tuple[float, float] = (0.0, 0.0)
) -> tuple[NDArray[np.float32], Mask]:
    """Premultiplied colour (H, W, 3) in 0..255 and coverage (H, W) of an emblem."""
    rgb = np.zeros((SIZE_PX, SIZE_PX, 3), np.float32)
    alpha = np.zeros((SIZE_PX, SIZE_PX), np.float32)
    (x, y), radius = POSITIONS[position], SIZES[size]
    for part in parts:
        over = coverage(
            part.shape, x + offset[0] + part.dx * radius, y + offset[1] + part.dy * radius, part.radius * radius
        )
        rgb = rgb * (1 - over[..., None]) + over[..., None] * np.asarray(part.rgb, np.float32)
        alpha = alpha * (1 - over) + over
    return rgb, alpha


def coverage(shape: str, x: float, y: float, radius: float, size_px: int = SIZE_PX) -> Mask:
    """How much of each pixel the shape covers, (H, W) in 0..1, from its signed distance."""
    axis = np.arange(size_px, dtype=np.float32) + 0.5
    px, py = np.meshgrid(axis - x, axis - y)
    if shape == "circle":
        distance = np.hypot(px, py) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(px, py) - 0.75 * radius) - 0.25 * radius
    else:
        distance = _polygon_distance(px, py, _OUTLINES[shape] * radius)
    return np.asarray(np.clip(0.5 - distance, 0, 1), np.float32)


def _polygon_distance(px: Mask, py: Mask, outline_V2: NDArray[np.float64]) -> Mask:
    """Signed distance to a closed polygon, negative inside (even-odd rule)."""
    squared = np.full_like(px, np.inf)
    inside = np.zeros(px.shape, bool)
    for (ax, ay), (bx, by) in zip(outline_V2, np.roll(outline_V2, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, px - ax, py - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        if ey != 0:
            crosses = (ay <= py) != (by <= py)
            inside ^= crosses & (px < ax + (py - ay) * ex / ey)
    return np.asarray(np.where(inside, -1, 1) * np.sqrt(squared), np.float32)


def _around(turns: NDArray[np.float64], radii: float | NDArray[np.float64] = 1.0) -> NDArray[np.float64]:
    return np.stack([np.sin(2 * np.pi * turns) * radii, -np.cos(2 * np.pi * turns) * radii], 1)


def _cross(arm: float) -> NDArray[np.float64]:
    quarter = np.array([[-arm, -arm], [-arm, -1.0], [arm, -1.0]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # row vectors, clockwise on the screen
    return np.concatenate([quarter, quarter @ turn, quarter @ turn @ turn, quarter @ turn @ turn @ turn])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y + 2.5], 1) / 15.5


_OUTLINES: dict[str, NDArray[np.float64]] = {
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.86,
    "triangle": np.array([[0, -1], [1, 0.85], [-1, 0.85]], float),
    "diamond": np.array([[0, -1.1], [0.8, 0], [0, 1.1], [-0.8, 0]]),
    "cross": _cross(arm=0.34),
    "star": _around(np.arange(10) / 10, np.where(np.arange(10) % 2 == 0, 1.12, 0.46)),
    "heart": _heart(),
}


def _quantize(pixels: NDArray[np.floating]) -> Picture:
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)
