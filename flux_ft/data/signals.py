"""What the pixels say of a picture's quality, and what that means for a run. Advice in words, never a refusal.

Every threshold below was chosen on 40 photographs (desktop wallpapers and the sample pictures of scikit-image and
scikit-learn, at 1 MP or their own smaller size) and 35 drawings, logos and renderings. What they give there is said
beside them. Loads without torch.

Shapes of arrays: H W picture height and width in pixels, 3 channels red, green, blue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux_ft.errors import some_of
from flux_ft.types import Sample, Signals

FEW_PICTURES = 5
SMALL_SHARE = 0.25
"""Of the pixels that are trained on; a picture with fewer is called small."""
BLURRED_BELOW = 0.25
"""In units of `Signals.sharpness`. None of the photographs and drawings is below. Of the photographs blurred with a
Gaussian of 1, 1.5, 2, 3 px 4, 25, 40, 40 of 40 are, of those moved by 9 px 32, of those blurred everywhere but in the
middle 2."""
BLOWN_ABOVE = 0.4
"""Share of almost white pixels. No photograph is above as it is, and one drawing, a logo before a pale gradient; of the
photographs overexposed by 2, 3, 4 stops 12, 16, 20 of 40 are."""
BLACK_ABOVE = 0.4
"""Share of almost black pixels. Nothing is above as it is; few photographs get so dark, 3 of 40 at 4 stops under."""
MANY = 0.25
"""Share of a run's pictures from which on a weakness of single pictures is told of the run."""
SAME_SCENE_BITS = 8
"""Largest distance of two hashes of one scene. The nearest two different scenes of the 75 are 13 apart; within it
are all JPEGs of quality 40 and all pictures of half the size, 99 % of those cropped by 4 %, 83 % of those by 8 %."""

_WHITE, _BLACK = 247, 8
_BACKDROP = 0.8
"""Share of white along the border from which on white is taken for paper or a backdrop."""
_NOTHING_ELSE = 0.97
_LIT = 110
"""Luma that the brightest hundredth of a picture reaches if it was meant to be dark: a stage, a night sky."""
_TILE_PX = 32
_REACH_PX = 7
_CONTRAST = 24
"""Luma levels across `_REACH_PX` below which nothing can be said of an edge."""
_GRAIN_AT_MOST = 10
_HASH_PX = 32
_FLAT = 2.0
"""Standard deviation of the luma, in levels, up to which a picture has no structure to be known by."""
_TINTS = (-40, -24, -12, -4, 4, 12, 24, 40)
_SMALL, _BLURRED = "small: ", "looks blurred"

Gray = NDArray[np.uint8]


def measure(rgb_HW3: NDArray[np.uint8]) -> Signals:
    """The signals of one picture in 8-bit sRGB; some 9 ms for 1 MP."""
    picture = Image.fromarray(rgb_HW3)
    gray = picture.convert("L")
    gray_HW = np.asarray(gray)
    counts = np.asarray(gray.histogram()) / gray_HW.size
    return Signals(
        phash=_phash(picture),
        sharpness=_sharpness(gray_HW),
        dark=_dark(counts),
        bright=_bright(gray_HW, float(counts[_WHITE:].sum())),
    )


def picture_warnings(signals: Signals, width_px: int, height_px: int, max_pixels: int) -> tuple[str, ...]:
    """What is weak about one picture, in words with numbers; empty for most.

    `width_px` and `height_px` are the upright picture's own; `max_pixels` is the largest area that is trained on.
    """
    found = []
    if width_px * height_px < SMALL_SHARE * max_pixels:
        found.append(
            f"{_SMALL}{width_px} × {height_px} px, less than a quarter of the {max_pixels:,} px that is trained on"
        )
    if signals.sharpness < BLURRED_BELOW:
        found.append(_BLURRED)
    if signals.bright > BLOWN_ABOVE:
        found.append(f"{100 * signals.bright:.0f} % of it is blown out to white (fine if that is a backdrop)")
    if signals.dark > BLACK_ABOVE:
        found.append(f"{100 * signals.dark:.0f} % of it is almost black")
    return tuple(found)


def same_scene(hashes: Sequence[int], max_distance: int = SAME_SCENE_BITS) -> list[tuple[int, ...]]:
    """Groups of two and more positions whose hashes differ in at most `max_distance` bits from the group's first.

    A hash is in one group at most, the earliest. Closeness to the first member, not to any, keeps a long row of
    pictures that change little by little from becoming one scene. The hash 0 means no structure and is in no group.
    20,000 hashes take half a second; the time grows with the square.
    """
    known = [index for index, value in enumerate(hashes) if value]
    words = np.array([hashes[index] for index in known], np.uint64)
    # As ±1 vectors, 64 − 2 · distance is a product of matrices: exact in float32, and the fastest that numpy has.
    bits = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32) * 2 - 1
    taken = np.zeros(len(known), bool)
    groups = []
    block = max(1, 2**22 // max(1, len(known)))  # rows at once, so that a block stays within 16 MB
    for start in range(0, len(known), block):
        if taken[start : start + block].all():
            continue
        close = bits[start : start + block] @ bits[start:].T >= 64 - 2 * max_distance
        for row in np.flatnonzero(close.sum(axis=1) > 1):
            first = start + int(row)
            if taken[first]:
                continue
            members = np.flatnonzero(close[row]) + start
            members = members[(members >= first) & ~taken[members]]
            if len(members) > 1:
                taken[members] = True
                groups.append(tuple(known[member] for member in members))
    return groups


def advice(samples: Sequence[Sample], groups: Sequence[tuple[int, ...]]) -> list[str]:
    """What should be known of a run's pictures as a whole, a handful of lines at most.

    `groups` are positions in `samples`, as `same_scene` gives them.
    """
    count = len(samples)
    if not count:
        return []
    lines = []
    if count < FEW_PICTURES:
        lines.append(
            f"{count} {'picture is' if count == 1 else 'pictures are'} few: "
            "add more if there are any, or what surrounds the subject is learned along with it"
        )
    lines += _copies(samples)
    lines += _scenes(samples, groups)
    for mark, what, remedy in (
        (_SMALL, "are small", "take larger originals if there are any; no finer detail is learned than is shown"),
        (_BLURRED, "look blurred", "the model learns blur as part of the look; leave them out if the others suffice"),
    ):  # fmt: skip
        weak = [sample for sample in samples if any(text.startswith(mark) for text in sample.warnings)]
        if count > 1 and len(weak) >= MANY * count:
            lines.append(f"{len(weak):,} of {count:,} pictures {what} ({_names(weak, samples)}): {remedy}")
    captions = {sample.caption for sample in samples}
    if count > 1 and len(captions) == 1 and all(sample.caption_source != "trigger" for sample in samples):
        lines.append(
            f"all {count:,} pictures have the same caption: "
            "say in each what else it shows, or all of it becomes part of the trigger word"
        )
    return lines


def _copies(samples: Sequence[Sample]) -> list[str]:
    alike: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        alike[sample.digest].append(sample)
    sets = sorted((same for same in alike.values() if len(same) > 1), key=len, reverse=True)
    if not sets:
        return []
    more = len(sets) - 1
    others = f"; {more:,} more {'picture is' if more == 1 else 'pictures are'} there more than once" if more else ""
    return [
        f"the same picture is there {len(sets[0]):,} times ({_names(sets[0], samples)}){others}: "
        "keep one of each, or it counts as often as it is there"
    ]


def _scenes(samples: Sequence[Sample], groups: Sequence[tuple[int, ...]]) -> list[str]:
    # Exact copies have been told; of each scene only its different pictures count here.
    scenes = [list({samples[index].digest: samples[index] for index in group}.values()) for group in groups]
    scenes = sorted((scene for scene in scenes if len(scene) > 1), key=len, reverse=True)
    if not scenes:
        return []
    more = len(scenes) - 1
    others = f"; {more:,} more {'scene comes' if more == 1 else 'scenes come'} more than once" if more else ""
    return [
        f"{len(scenes[0]):,} of {len(samples):,} pictures show the same scene ({_names(scenes[0], samples)}){others}: "
        "keep the best one or two of a scene, or it is learned along with the subject"
    ]


def _names(some: Sequence[Sample], samples: Sequence[Sample]) -> str:
    one_source = len({sample.file.source.label for sample in samples}) == 1
    return some_of([sample.file.name if one_source else str(sample.file) for sample in some])


def _sharpness(gray_HW: Gray) -> float:
    """How steep the steepest edges are: 1 = all of an edge's contrast lies between two neighbouring pixels.

    In each tile, the largest difference of neighbours is held against the largest difference over 7 px, so that
    contrast cancels. An edge blurred with a Gaussian of 1, 2, 3 px has 0.38, 0.21, 0.17. Of the tiles with most
    contrast the sharpest twentieth counts, so a sharp face before a soft background is sharp; of four directions the
    worst counts, so motion along one of them is seen. Grain is taken off first: what even the smoothest tiles have.
    A picture without edges has 1: there is nothing to be blurred.
    """
    if min(gray_HW.shape) <= _REACH_PX:
        return 1.0
    mirrored_HW = np.ascontiguousarray(gray_HW[:, ::-1])
    found = 1.0
    # Five steps along a diagonal are 7 px too.
    for image, down, right, reach in (
        (gray_HW, 0, 1, 7),
        (gray_HW, 1, 0, 7),
        (gray_HW, 1, 1, 5),
        (mirrored_HW, 1, 1, 5),
    ):
        before, after = (_moved(image, down, right, steps, reach) for steps in (reach // 2, reach // 2 + 1))
        start, end = (_moved(image, down, right, steps, reach) for steps in (0, reach))
        step, span = _largest_differences(before, after), _largest_differences(start, end)
        telling = span >= max(_CONTRAST, 0.5 * float(np.percentile(span, 95)))
        if telling.any():
            grain = min(_GRAIN_AT_MOST, float(np.percentile(step, 5)))
            steepness = np.maximum(step[telling] - grain, 0.0) / span[telling]
            found = min(found, float(np.percentile(steepness, 95)))
    return found


def _moved(image: Gray, down: int, right: int, steps: int, reach: int) -> Gray:
    """`image` seen `steps` steps further, cut so that all of 0 to `reach` steps have one shape."""
    height, width = image.shape
    rest = reach - steps
    return image[down * steps : height - down * rest, right * steps : width - right * rest]


def _largest_differences(one: Gray, other: Gray) -> Gray:
    """The largest absolute difference in each tile."""
    differences = np.maximum(one, other) - np.minimum(one, other)
    height, width = differences.shape
    whole = np.pad(differences, ((0, -height % _TILE_PX), (0, -width % _TILE_PX)))
    tiles = whole.reshape(whole.shape[0] // _TILE_PX, _TILE_PX, -1, _TILE_PX)
    return np.asarray(tiles.max(axis=1).max(axis=2))


def _bright(gray_HW: Gray, share: float) -> float:
    """`share`, or 0 where white fills the border too, as paper and a studio's backdrop do."""
    border = np.concatenate([gray_HW[0], gray_HW[-1], gray_HW[:, 0], gray_HW[:, -1]])
    backdrop = float((border >= _WHITE).mean()) >= _BACKDROP
    return 0.0 if backdrop and share < _NOTHING_ELSE else share


def _dark(counts: NDArray[np.float64]) -> float:
    """The share of black, or 0 where something is lit, as before a black backdrop."""
    return 0.0 if counts[_LIT:].sum() >= 0.01 else float(counts[: _BLACK + 1].sum())


def _phash(picture: Image.Image) -> int:
    """48 bits from the luma's low frequencies and 16 from the mean tint; 0 for a picture without structure.

    The luma's part is the DCT hash of Zauner, "Implementation and benchmarking of perceptual image hash functions"
    (2010): 32 × 32 pixels, the lowest frequencies without the mean, each above or below their median. The tint is
    there because a red and a green shirt on one hanger are two scenes.
    """
    small = np.asarray(picture.resize((_HASH_PX, _HASH_PX), Image.Resampling.BOX).convert("YCbCr"), np.float64)
    luma = small[..., 0]
    if luma.std() <= _FLAT:
        return 0
    basis, order = _lowest_frequencies()
    # Rounded, so that the zeros of a symmetric picture are zeros on every machine.
    waves = np.round(basis @ luma @ basis.T, 3).ravel()[order]
    bits = [
        *(waves > np.median(waves)),
        *(tint > edge for tint in small[..., 1:].mean((0, 1)) - 128 for edge in _TINTS),
    ]
    return sum(int(bit) << place for place, bit in enumerate(bits))


@cache
def _lowest_frequencies() -> tuple[NDArray[np.float64], list[int]]:
    """The first 8 rows of the 32-point DCT-II, and 48 of the 63 places of its 8 × 8 products, lowest first."""
    frequency, place = np.mgrid[0:8, 0:_HASH_PX]
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * _HASH_PX))
    order = sorted(range(1, 64), key=lambda index: (index // 8 + index % 8, index))[:48]
    return basis, order
