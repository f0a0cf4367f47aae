"""Pictures during training: fixed prompts and seeds, so that only the LoRA differs from one row to the next.

Nothing here may touch the training: no global random state, no gradients, the denoiser back in its mode.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from flux_ft import log
from flux_ft.data.share import ALONE, Share
from flux_ft.errors import StorageError
from flux_ft.families.base import Family
from flux_ft.files import write_whole
from flux_ft.infer.grid import labelled_grid, save_png, to_image
from flux_ft.infer.sampler import initial_noise, sample_latents
from flux_ft.types import TextCond

PROMPTS_FILE = "prompts.json"
"""Written last into a step's folder: without it, or a picture, the step's previews are not whole."""


@dataclass(frozen=True)
class PreviewPlan:
    """What every preview draws."""

    prompts: tuple[str, ...]
    conds: tuple[TextCond, ...]
    """One single-prompt encoding a prompt."""
    seed: int
    """The i-th prompt uses seed + i."""
    width_px: int
    height_px: int
    steps: int
    guidance: float


def draw_previews(
    plan: PreviewPlan, family: Family, denoiser: nn.Module, vae: nn.Module, which: Sequence[int] | None = None
) -> Generator[Image.Image, None, None]:
    """The pictures of the prompts at positions `which`, or of every prompt: one by one needs little memory.

    When it ends or is closed, the denoiser is back in its mode and the autoencoder on the CPU.
    """
    was_training = denoiser.training
    denoiser.eval()
    vae.to(next(denoiser.parameters()).device)
    try:
        for index in range(len(plan.conds)) if which is None else which:
            noise = initial_noise(family.latent_shape(plan.width_px, plan.height_px), [plan.seed + index])
            latents = sample_latents(family, denoiser, noise, plan.conds[index], plan.steps, plan.guidance)
            yield to_image(family.decode_latents(vae, latents)[0])
    finally:
        denoiser.train(was_training)
        vae.to("cpu")


def write_previews(
    plan: PreviewPlan,
    family: Family,
    denoiser: nn.Module,
    vae: nn.Module,
    folder: Path,
    step: int,
    share: Share = ALONE,
) -> list[Path]:
    """Draw every prompt and write `folder/step-…/00.png`, … and, when all are there, the prompts.

    Every process has to call this, draws its share, and returns the paths of what it has written. What the disk refuses
    is told and left out: training does not end for a picture.
    """
    folder = folder / f"step-{step:06d}"
    turns = share.turns(len(plan.conds))
    paths = []
    with closing(draw_previews(plan, family, denoiser, vae, [index for index, _ in turns])) as images:
        for (index, counts), image in zip(turns, images, strict=True):
            path = folder / f"{index:02d}.png"
            with _disk_may_refuse():
                if counts:
                    save_png(image, path)
                    paths.append(path)
    share.wait()
    if share.index == 0 and all((folder / f"{index:02d}.png").is_file() for index in range(len(plan.conds))):
        with _disk_may_refuse():
            write_whole(folder / PROMPTS_FILE, json.dumps(plan.prompts).encode())
    return paths


@contextmanager
def _disk_may_refuse() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        log.warn(f"{error.message}; the preview is left out")


def has_previews(folder: Path, step: int, plan: PreviewPlan) -> bool:
    """Whether these prompts' previews of a step are whole, from before a stop."""
    return _prompts_of(folder / f"step-{step:06d}") == list(plan.prompts)


def preview_grid(folder: Path, prompts: tuple[str, ...], max_rows: int = 8) -> Image.Image | None:
    """The previews of these prompts in one picture: a row a step (evenly chosen), a column a prompt. None if none."""
    steps = sorted(path for path in folder.glob("step-??????") if _prompts_of(path) == list(prompts))
    if not steps:
        return None
    if len(steps) > max_rows:
        steps = [steps[round(i * (len(steps) - 1) / (max_rows - 1))] for i in range(max_rows)]
    rows = [[Image.open(step / f"{i:02d}.png").convert("RGB") for i in range(len(prompts))] for step in steps]
    labels = ["base" if int(step.name[5:]) == 0 else f"step {int(step.name[5:])}" for step in steps]
    return labelled_grid(rows, labels, prompts)


def _prompts_of(folder: Path) -> list[str] | None:
    """What a step's previews were asked for, if all are there; a resumed run may have other prompts than before."""
    try:
        prompts: list[str] = json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
        return prompts if all((folder / f"{i:02d}.png").is_file() for i in range(len(prompts))) else None
    except (OSError, ValueError):
        return None
