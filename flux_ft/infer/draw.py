"""Prompts to a folder of pictures: what `flux-ft generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_ft import log
from flux_ft.files import require_writable
from flux_ft.infer.grid import labelled_grid, save_png
from flux_ft.infer.runner import Runner
from flux_ft.types import AppliedAdapter


@dataclass(frozen=True)
class Drawing:
    """What to draw: every prompt `count` times, with seeds `seed`, `seed` + 1, … shared by all prompts."""

    prompts: tuple[str, ...]
    seed: int = 0
    count: int = 1
    width_px: int | None = None
    height_px: int | None = None
    steps: int | None = None
    guidance: float | None = None
    grid: bool = False


@dataclass(frozen=True)
class Drawn:
    """The files that were made."""

    pictures: tuple[Path, ...]
    grid: Path | None


def draw_to_folder(
    model: str,
    adapters: Sequence[AppliedAdapter],
    drawing: Drawing,
    output: Path,
    device: str | None,
    parts: str | None,
) -> Drawn:
    """Draw and write. Earlier pictures in `output` stay: new ones take the next free numbers. Raises as Runner."""
    runner = Runner(model, adapters, device, parts)
    seeds = range(drawing.seed, drawing.seed + drawing.count)
    requests = [
        runner.request(prompt, seed, drawing.width_px, drawing.height_px, drawing.steps, drawing.guidance)
        for prompt in drawing.prompts
        for seed in seeds
    ]
    require_writable(output, "--output")
    first = next_number(output)
    paths = [output / f"{first + index:05d}.png" for index in range(len(requests))]
    with log.progress("draw", runner.num_passes(requests)) as bar:
        images = runner.generate(
            requests,
            on_step=bar.advance,
            on_picture=lambda row, image: runner.save(image, requests[row], paths[row]),
        )
    sheet: Path | None = None
    if drawing.grid:
        rows = [images[i : i + drawing.count] for i in range(0, len(images), drawing.count)]
        sheet = output / f"grid-{first:05d}.png"
        cell = min(512, max(128, requests[0].width_px))
        save_png(labelled_grid(rows, drawing.prompts, [f"seed {seed}" for seed in seeds], cell), sheet)
    return Drawn(tuple(paths), sheet)


def next_number(folder: Path) -> int:
    """One past the highest number that a picture in `folder` has."""
    numbers = [int(path.stem) for path in folder.glob("?????.png") if path.stem.isdigit()]
    return max(numbers, default=-1) + 1
