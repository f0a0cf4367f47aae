"""Names for new pictures: the folder's next numbers, or, going on after an interruption, those that are missing.

Loads without torch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_ft.errors import InputError
from flux_ft.infer.records import FORMAT, SUFFIXES, read_recipe, recipe_digest, require_suffix, sidecar


@dataclass(frozen=True)
class Planned:
    """Where one picture goes."""

    path: Path
    done: bool
    """Whether it is there already, whole and drawn from the same."""


def plan_outputs(
    recipes: Sequence[Mapping[str, Any]], folder: Path, suffix: str, *, resume: bool = False
) -> list[Planned]:
    """A file for each recipe's picture: the folder's next free numbers in their order.

    With `resume` a picture that is there already, drawn from the same and of this format, is done, and the others take
    the numbers that they would have had beside it, where those are free. Raises ConfigError for an unknown suffix.
    """
    require_suffix(suffix)
    first = next_number(folder)
    if not resume:
        return [Planned(_path(folder, first + index, suffix), False) for index in range(len(recipes))]
    whole, begun = _earlier(folder, suffix)
    digests = [recipe_digest(recipe) for recipe in recipes]
    done = {index: whole[digest].pop(0) for index, digest in enumerate(digests) if whole[digest]}
    known = done or {index: begun[digest].pop(0) for index, digest in enumerate(digests) if begun[digest]}
    taken = _numbers(folder)
    shifts = Counter(number - index for index, number in known.items())
    shift = shifts.most_common(1)[0][0] if shifts else first
    plan = []
    for index in range(len(recipes)):
        number = done.get(index)
        if number is None:
            number = shift + index
            if number < 0 or number in taken:
                number = max(taken, default=-1) + 1
            taken.add(number)
        plan.append(Planned(_path(folder, number, suffix), index in done))
    return plan


def missing(plan: Sequence[Planned]) -> list[int]:
    """Places in the plan that are still to be drawn."""
    return [index for index, one in enumerate(plan) if not one.done]


def next_number(folder: Path) -> int:
    """One past the highest number that a picture or a sidecar in `folder` has."""
    return max(_numbers(folder, sidecars=True), default=-1) + 1


def numbered_pictures(folder: Path) -> list[Path]:
    """The pictures in `folder` that are named by numbers, in order."""
    found = [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and _number(path) is not None]
    return sorted(found, key=lambda path: (_number(path) or 0, path.name))


def _earlier(folder: Path, suffix: str) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Numbers by the recipe's digest: of pictures, and of sidecars whose picture was never finished.

    A picture is renamed into its place, so what is there is whole.
    """
    whole, begun = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for number in sorted(_numbers(folder, sidecars=True)):
        path = _path(folder, number, suffix)
        try:
            recipe = read_recipe(path if path.is_file() else sidecar(path))
        except InputError:
            continue
        if recipe.get("format") == FORMAT and recipe.get("picture", path.name) == path.name:
            (whole if path.is_file() else begun)[recipe_digest(recipe)].append(number)
    return whole, begun


def _entries(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _numbers(folder: Path, sidecars: bool = False) -> set[int]:
    wanted = {*SUFFIXES, *([".json"] if sidecars else [])}
    numbers = (_number(path) for path in _entries(folder) if path.suffix.lower() in wanted)
    return {number for number in numbers if number is not None}


def _number(path: Path) -> int | None:
    return int(path.stem) if re.fullmatch(r"[0-9]{5,12}", path.stem) else None


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number:05d}{suffix}"
