"""The scene reader: says from pixels alone what a flux-tiny picture shows.

It compares a picture with renders of everything it knows, at every size and place, shifted by a few pixels. For one
shape the best figure colour has a closed form (least squares), so the whole comparison is one matrix product.
What no render explains is read as "none of these".

Shapes of arrays: N candidate renders, P pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from flux_ft.families.tiny.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZE_PX,
    SIZES,
    Part,
    Picture,
    Scene,
    coverage,
    emblem_layer,
)

Array = NDArray[np.float32]

SHIFTS_PX = (-3, -1.5, 0, 1.5, 3)
MAX_UNEXPLAINED = 0.30
"""Largest share of the picture's deviation from its background that a render may leave unexplained."""
MAX_COLOR_DISTANCE = 60.0
"""Largest RGB distance (0..441) to the nearest named colour."""
MIN_DEVIATION = 40.0
"""Smallest root of summed squared deviation per figure pixel that counts as a figure at all."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `shape` is one of SHAPES, "emblem", or None for "none of these"."""

    shape: str | None
    color: str | None
    size: str | None
    position: str | None
    background: str | None
    unexplained: float

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Which of shape, color, size, position and background agree with `scene`."""
        return {
            field: getattr(self, field) == getattr(scene, field)
            for field in ("shape", "color", "size", "position", "background")
        }


class SceneReader:
    """Reads pictures; with `emblem`, also recognises that many-coloured thing."""

    def __init__(self, emblem: tuple[Part, ...] | None = None) -> None:
        self._labels, self._masks_NP, self._norms_N = _shape_bank()
        self._emblem = _emblem_bank(emblem) if emblem else None

    def read(self, picture: Picture) -> Reading:
        """Read one uint8 (64, 64, 3) picture. Raises ValueError for another shape."""
        if picture.shape != (SIZE_PX, SIZE_PX, 3):
            raise ValueError(f"the scene reader takes {SIZE_PX}×{SIZE_PX} RGB, got {picture.shape}")
        pixels_P3 = picture.reshape(-1, 3).astype(np.float32)
        ground = _ground(picture)
        background = _nearest(ground)
        deviation_P3 = pixels_P3 - ground
        total = float((deviation_P3**2).sum())
        smallest_figure_px = float(self._norms_N.min())
        if total < MIN_DEVIATION**2 * smallest_figure_px:
            return Reading(None, None, None, None, background, 1.0)

        projected_N3 = self._masks_NP @ deviation_P3
        left_N = total - (projected_N3**2).sum(1) / self._norms_N
        best = int(left_N.argmin())
        shape, size, position = self._labels[best]
        color = _nearest(ground + projected_N3[best] / self._norms_N[best])
        reading = Reading(shape, color, size, position, background, float(left_N[best]) / total)

        if self._emblem is not None:
            labels, rgb_NP3, alpha_NP = self._emblem
            left_N = ((pixels_P3 - rgb_NP3 - (1 - alpha_NP[..., None]) * ground) ** 2).sum((1, 2))
            best = int(left_N.argmin())
            if left_N[best] / total < reading.unexplained:
                size, position = labels[best]
                reading = Reading("emblem", None, size, position, background, float(left_N[best]) / total)

        if reading.unexplained > MAX_UNEXPLAINED or (reading.shape != "emblem" and reading.color is None):
            return Reading(None, None, None, None, background, reading.unexplained)
        return reading


def _ground(picture: Picture) -> Array:
    """The background colour: the median of a two-pixel frame, which the figures hardly touch."""
    frame = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3),
                            picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)])  # fmt: skip
    return np.asarray(np.median(frame, axis=0), np.float32)


def _nearest(rgb: Array) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.asarray(color))) for name, color in COLORS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else None


@lru_cache(maxsize=1)
def _shape_bank() -> tuple[list[tuple[str, str, str]], Array, Array]:
    labels, masks = [], []
    for shape, (size, radius), (position, (x, y)) in product(SHAPES, SIZES.items(), POSITIONS.items()):
        for dx, dy in product(SHIFTS_PX, SHIFTS_PX):
            labels.append((shape, size, position))
            masks.append(coverage(shape, x + dx, y + dy, radius).ravel())
    masks_NP = np.stack(masks)
    return labels, masks_NP, (masks_NP**2).sum(1)


def _emblem_bank(parts: tuple[Part, ...]) -> tuple[list[tuple[str, str]], Array, Array]:
    labels, colors, alphas = [], [], []
    for size, position in product(SIZES, POSITIONS):
        for dx, dy in product(SHIFTS_PX, SHIFTS_PX):
            rgb, alpha = emblem_layer(parts, size, position, (dx, dy))
            labels.append((size, position))
            colors.append(rgb.reshape(-1, 3))
            alphas.append(alpha.ravel())
    return labels, np.stack(colors), np.stack(alphas)
