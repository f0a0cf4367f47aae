"""The size that each picture is trained at. Integer arithmetic throughout, so the pixel cap is exact."""

from __future__ import annotations

from math import isqrt

from flux_ft.errors import DataError
from flux_ft.types import Bucket


def bucket_for(width: int, height: int, max_pixels: int, multiple: int) -> Bucket:
    """The largest size of about this aspect that keeps `width * height <= max_pixels` and enlarges neither side.

    All in pixels. Both sides are multiples of `multiple`; of the sizes around the ideal one the one that crops least
    is taken, and of equals the largest. Raises DataError for a side shorter than `multiple`.
    """
    if min(width, height) < multiple:
        raise DataError(f"the picture is {width} × {height} px; {multiple} px is the smallest side")
    cap = max_pixels // (multiple * multiple)
    assert cap >= 1, "max_pixels is smaller than one grid cell"
    sizes = _candidates(width, height, max_pixels, multiple, cap)
    return min(sizes, key=lambda size: (crop_loss(width, height, size), -size.width_px * size.height_px, size))


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """(left, top, right, bottom), in pixels of the picture, of the centred part that has the bucket's aspect."""
    scale = min(width / bucket.width_px, height / bucket.height_px)
    kept_width, kept_height = min(width, bucket.width_px * scale), min(height, bucket.height_px * scale)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def crop_loss(width: int, height: int, bucket: Bucket) -> float:
    """The fraction of the picture's area that the bucket cuts off, in [0, 1)."""
    across, down = width * bucket.height_px, height * bucket.width_px
    return 1 - min(across, down) / max(across, down)


def _candidates(width: int, height: int, max_pixels: int, multiple: int, cap: int) -> list[Bucket]:
    """Sizes around the ideal one, each within the cap of `cap` grid cells and within the picture."""
    most_across, most_down = width // multiple, height // multiple
    # isqrt gives the floor of the irrational ideal side, in grid cells, without rounding error.
    across = min(most_across, isqrt(width * max_pixels // (height * multiple * multiple)))
    down = min(most_down, isqrt(height * max_pixels // (width * multiple * multiple)))
    cells = set()
    for a in (max(1, across), min(across + 1, most_across)):
        for d in (max(1, down), min(down + 1, most_down)):
            # Cutting one side to fit keeps a candidate for extreme aspects, whose short side must be rounded up.
            cells.add((a, min(d, cap // a)))
            cells.add((min(a, cap // d), d))
    return [Bucket(a * multiple, d * multiple) for a, d in cells if a and d]
