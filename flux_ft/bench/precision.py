"""What a base in fewer bytes costs in quality: its own loss, and what a LoRA learns on it; one process a training."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux_ft import flow, log
from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError, FluxFTError
from flux_ft.families.base import Family
from flux_ft.families.quantize import PLAIN, Storage, compute_in_fp8, why_not, why_not_fp8
from flux_ft.families.registry import open_family
from flux_ft.families.tiny.scenes import all_scenes, caption, is_held_out, render
from flux_ft.files import write_whole
from flux_ft.infer.runner import Runner, pick_device, release_memory
from flux_ft.quickstart import (
    NUM_PROMPTS,
    Trial,
    concept_score,
    concept_trials,
    draw,
    prior_score,
    prior_trials,
    run_settings,
    write_pictures,
)
from flux_ft.runfile import dump_run
from flux_ft.train.loop import VALIDATION_SIGMAS
from flux_ft.train.prove import predictions, targets
from flux_ft.train.run import read_metrics
from flux_ft.types import AppliedAdapter, Bucket, CachedExample

TINY = "flux-tiny"
FP8_COMPUTE = "fp8 compute"
BASES: dict[str, dict[str, Any]] = {
    **{name: {"memory": {"base_precision": name}} for name in ("fp32", "bf16", "int8", "fp8", "nf4")},
    FP8_COMPUTE: {"speed": {"fp8_compute": True}},
}
"""What is compared, each with its settings; the first that works is what the others are held against."""
ITERATIONS = 300
PICTURES = 32
"""Of flux-tiny's own world, none of which it was trained on."""


def bench_precision(
    output: Path,
    *,
    model: str = TINY,
    data: Path | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
    bases: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure and train on each of `bases`, all if none is named, into `output`, a new or empty folder.

    On flux-tiny the data are the quickstart's new thing, and the LoRAs are scored by what they draw on the plain model;
    for others `data` is a folder of pictures with captions. Returns what is also written to precision.json. Raises
    ConfigError for a base that is not known, or if none works here, FluxFTError when a training fails.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"`--output {output}` holds something already", hint="choose another folder")
    if unknown := [name for name in bases if name not in BASES]:
        raise ConfigError(f"`--base {unknown[0]}` is not known", hint=f"one of: {', '.join(BASES)}")
    if model != TINY and data is None:
        raise ConfigError(f"`--model {model}` needs pictures to train on", hint="name a folder of them by `--data`")
    device, dtype = pick_device()
    left_out = {name: reason for name in BASES if (reason := _why_not(name, device, dtype))}
    chosen = [name for name in BASES if name in (bases or BASES) and name not in left_out]
    if not chosen:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items() if name in bases)
        raise ConfigError(f"none of these bases works here: {told}", hint="name another by `--base`, or none for all")
    if model != TINY and not bases:
        chosen.remove("fp32")
    trials = (concept_trials(write_pictures(output / "pictures", seed), seed), prior_trials(seed)) if not data else None
    own = _own_losses(open_family(TINY), chosen, device, dtype, seed) if trials else {}
    rows: list[dict[str, Any]] = []
    for name in chosen:
        log.say(f"{name} ({len(rows) + 1} of {len(chosen)})")
        row = own.get(name, {"base": name}) | _trained(output, name, model, data, trials, iterations, seed)
        rows.append(row)
    figures = {
        "model": model, "device": str(device), "torch": torch.__version__, "iterations": iterations, "seed": seed,
        "rows": rows, "left_out": left_out,
    }  # fmt: skip
    write_whole(output / "precision.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == FP8_COMPUTE:
        return why_not_fp8(device, dtype)
    return why_not(_storage(name), device.type)


def _storage(name: str) -> Storage:
    return "fp8" if name == FP8_COMPUTE else name  # type: ignore[return-value]


def _own_losses(
    family: Family, names: Sequence[str], device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, dict[str, Any]]:
    """The model's loss on pictures of its own world, and how far its velocity is off the first's, relative."""
    examples = _own_examples(family, device, seed)
    wanted = [target.velocity_CHW for target in targets(examples, seed) for _ in VALIDATION_SIGMAS]
    found: dict[str, list[Tensor]] = {}
    for name in names:
        denoiser = family.load_denoiser(device, PLAIN.get(name, dtype), _storage(name))
        if name == FP8_COMPUTE:
            compute_in_fp8(denoiser)
        found[name] = predictions(family, denoiser, examples, seed, device)
        del denoiser
        release_memory()
    reference = torch.stack(found[names[0]])
    return {
        name: {
            "base": name,
            "own_loss": float(flow.velocity_loss(torch.stack(velocities), torch.stack(wanted)).mean()),
            "velocity_off": float((torch.stack(velocities) - reference).norm() / reference.norm()),
        }
        for name, velocities in found.items()
    }


def _own_examples(family: Family, device: torch.device, seed: int) -> list[CachedExample]:
    rng = np.random.default_rng((seed, 5))
    known = [scene for scene in all_scenes() if is_held_out(scene)]
    scenes = [known[i] for i in rng.choice(len(known), PICTURES, replace=False)]
    pixels = np.stack([render(scene, rng) for scene in scenes])
    pixels_B3HW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    means, _ = family.encode_image(family.load_vae(device, torch.float32), pixels_B3HW)
    stack = family.load_text(device, torch.float32)
    side = pixels.shape[1]
    return [
        CachedExample(
            "", Bucket(side, side), mean.cpu(), None, (family.encode_text(stack, [words]),), digest=f"{index}"
        )
        for index, (mean, words) in enumerate(zip(means, [caption(scene, rng) for scene in scenes], strict=True))
    ]


def _trained(
    output: Path,
    name: str,
    model: str,
    data: Path | None,
    trials: tuple[Sequence[Trial], Sequence[Trial]] | None,
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """A LoRA trained on this base: losses, time, and on flux-tiny its scores on the plain model."""
    folder = output / name.replace(" ", "-")
    settings: dict[str, Any] = {
        "model": model, "data": {"path": str(data)}, "finetune_type": "lora", "finetune_comment": name, "seed": seed,
        "iterations": iterations,
    }  # fmt: skip
    if trials is not None:
        settings = run_settings(output, output / "pictures", *trials, iterations, seed) | {"prior": {}}
    settings |= {
        "output": str(folder), "preview": {"every": None}, "checkpoint": {"every": None},
        "validation": {"fraction": 0.25, "every": iterations}, "export": {"formats": ["diffusers"]},
    } | BASES[name]  # fmt: skip
    file = output / f"{folder.name}.yaml"
    write_whole(file, dump_run(RunConfig.model_validate(settings)).encode())
    result = _in_a_child([sys.executable, "-m", "flux_ft", "train", str(file), "--json"])
    rows = read_metrics(folder)
    measured = [row["validation_loss"] for row in rows if "validation_loss" in row]
    if not measured:
        raise ConfigError(f"`--data {data}` holds one picture only", hint="at least two are needed: one is measured on")
    row = {
        "train_loss": result["loss"], "validation_before": measured[0], "validation_after": measured[-1],
        "step_s": round(statistics.median(one["step_s"] for one in rows if "loss" in one), 4),
    }  # fmt: skip
    if trials is not None:
        runner = Runner(TINY, [AppliedAdapter(Path(result["loras"]["diffusers"]))])
        pictures = draw(runner, [*trials[0], *trials[1]], f"draw: {name}")
        row["concept"] = concept_score(trials[0], pictures[:NUM_PROMPTS])
        row["prior"] = prior_score(trials[1], pictures[NUM_PROMPTS:])
    return row


def _in_a_child(command: Sequence[str]) -> dict[str, Any]:
    """A process can compute in one precision only, since accelerate remembers the first."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise FluxFTError(f"a training failed: {done.stderr.strip()[-600:]}", hint=f"try it alone: {' '.join(command)}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


COLUMNS: tuple[tuple[str, str], ...] = (
    ("own_loss", "own loss"), ("train_loss", "trained: loss"), ("validation_before", "held out, before"),
    ("validation_after", "after"),
)  # fmt: skip
"""Losses of the table, each told with its difference from the first row's."""


def summary_for_people(figures: Mapping[str, Any]) -> str:
    """The table."""
    rows = figures["rows"]
    losses = [(key, title) for key, title in COLUMNS if key in rows[0]]
    shares = [(key, title) for key, title in (("concept", "concept"), ("prior", "other prompts")) if key in rows[0]]
    own = "velocity_off" in rows[0]
    lines = [
        f"{figures['model']} on {figures['device']}, torch {figures['torch']}, LoRAs of {figures['iterations']} steps",
        f"{'base':<12}"
        + ("velocity off" if own else "")
        + "".join(f"{title:>20}" for _, title in losses)
        + "".join(f"{title:>15}" for _, title in shares)
        + f"{'s/step':>9}",
    ]
    for row in rows:
        told = f"{row['base']:<12}" + (f"{row['velocity_off']:12.2%}" if own else "")
        told += "".join(f"{row[key]:11.5f} {row[key] / rows[0][key] - 1:+8.2%}" for key, _ in losses)
        told += "".join(f"{row[key]:15.1%}" for key, _ in shares)
        lines.append(told + f"{row['step_s']:9.3f}")
    return "\n".join([*lines, *(f"{name} is left out: {why}" for name, why in figures["left_out"].items())])
