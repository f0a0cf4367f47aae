"""What is lost on the way from a full fine-tune to a LoRA: the quickstart's concept learned in full, extracted, scored.

Beside it a LoRA that was trained as such, on the same pictures in the same run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux_ft.adapters.jobs import extract_files
from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.files import write_whole
from flux_ft.infer.grid import labelled_grid, save_png
from flux_ft.infer.runner import Runner
from flux_ft.quickstart import (
    NUM_PROMPTS,
    Trial,
    concept_score,
    concept_trials,
    draw,
    prior_prompts,
    prior_score,
    prior_trials,
    run_settings,
    write_pictures,
)
from flux_ft.train.run import train
from flux_ft.types import AppliedAdapter

RANKS = (32, 16)
ITERATIONS = 600
FULL_RATE = 5e-4
"""flux-tiny learns at fifty times the rate of a 12B model."""


def bench_full(output: Path, seed: int = 0) -> dict[str, Any]:
    """Train, extract, draw and score into `output`, a new or empty folder; returns what is also written to full.json.

    Scores as the quickstart's: shares of NUM_PROMPTS unseen prompts.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"`--output {output}` holds something already", hint="choose another folder")
    pictures = output / "pictures"
    seen = write_pictures(pictures, seed)
    trials = (concept_trials(seen, seed), prior_trials(seed))
    full = train(_config(output, "full", pictures, trials, seed))
    direct = train(_config(output, "lora", pictures, trials, seed))
    weights = next(full.folder.glob("*-full.safetensors"))
    extracted = {rank: output / f"extracted-{rank}.safetensors" for rank in RANKS}
    kept = {rank: extract_files("flux-tiny", str(weights), rank, path).report for rank, path in extracted.items()}
    runners = {
        "base": Runner("flux-tiny"),
        "full": Runner(str(weights), parts="flux-tiny"),
        **{f"extracted, rank {rank}": _with_lora(path) for rank, path in extracted.items()},
        f"trained LoRA, rank {RANKS[0]}": _with_lora(direct.loras["diffusers"]),
    }
    drawn = {name: draw(runner, [*trials[0], *trials[1]], f"draw: {name}") for name, runner in runners.items()}
    rows = [_row(name, trials, images) for name, images in drawn.items()]
    save_png(_grid(trials, drawn), output / "full.png")
    figures: dict[str, Any] = {
        "seed": seed,
        "rows": rows,
        "energy_kept": {str(rank): round(report.energy_kept, 4) for rank, report in kept.items()},
        "proof": json.loads((full.folder / "extraction.json").read_text(encoding="utf-8"))["proof"],
        "train_seconds": {"full": round(full.train_seconds, 1), "lora": round(direct.train_seconds, 1)},
        "steps": {"full": full.steps, "lora": direct.steps},
        "grid": str(output / "full.png"),
    }
    write_whole(output / "full.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _config(
    output: Path, kind: str, pictures: Path, trials: tuple[Sequence[Trial], Sequence[Trial]], seed: int
) -> RunConfig:
    settings = run_settings(output, pictures, *trials, ITERATIONS, seed)
    settings |= {"output": str(output / kind), "finetune_type": kind, "lora_rank": RANKS[0]}
    settings |= {"prior": {"prompts": prior_prompts(seed)}}  # in each step, as the figures in docs/full.md were
    if kind == "full":
        settings |= {"learning_rate": FULL_RATE, "export": {"keep_full": True}}
    return RunConfig.model_validate(settings)


def _with_lora(path: Path) -> Runner:
    return Runner("flux-tiny", [AppliedAdapter(path)])


def _row(name: str, trials: tuple[Sequence[Trial], Sequence[Trial]], images: Sequence[Image.Image]) -> dict[str, Any]:
    concept, prior = trials
    return {
        "model": name,
        "concept": concept_score(concept, images[:NUM_PROMPTS]),
        "prior": prior_score(prior, images[NUM_PROMPTS:]),
    }


def _grid(
    trials: tuple[Sequence[Trial], Sequence[Trial]], drawn: Mapping[str, Sequence[Image.Image]], columns: int = 4
) -> Image.Image:
    picked = [*range(columns), *(NUM_PROMPTS + i for i in range(columns))]
    every = [*trials[0], *trials[1]]
    rows = [[images[i] for i in picked] for images in drawn.values()]
    return labelled_grid(rows, list(drawn), [every[i].prompt for i in picked])


def summary_for_people(figures: Mapping[str, Any]) -> str:
    """The table."""
    full = next(row["concept"] for row in figures["rows"] if row["model"] == "full")
    lines = ["model                   concept   of full   other prompts"]
    for row in figures["rows"]:
        share = f"{row['concept'] / full:7.0%}" if full else "      –"
        lines.append(f"{row['model']:<22} {row['concept']:8.1%}  {share:>8}  {row['prior']:14.1%}")
    kept = ", ".join(f"{share:.1%} at rank {rank}" for rank, share in figures["energy_kept"].items())
    error = figures["proof"]["relative_error"]
    lines += [
        f"squared change kept: {kept}",
        f"what the LoRA of rank {RANKS[0]} predicts is {error:.1%} of the way from the full model to the base",
        f"pictures: {figures['grid']}",
    ]
    return "\n".join(lines)
