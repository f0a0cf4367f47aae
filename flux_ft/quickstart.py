"""The whole job at toy size: make a folder of pictures, train a LoRA on it, draw before and after, and score both.

The new thing is an emblem that flux-tiny has never seen; the trigger word names it. Its pictures are real files with
captions, trained by the same code path as any run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from flux_ft import log
from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.families.tiny.reader import SceneReader
from flux_ft.families.tiny.scenes import COLORS, POSITIONS, Part, Scene, all_scenes, caption, is_held_out, render_emblem
from flux_ft.files import write_whole
from flux_ft.infer.grid import labelled_grid, save_png
from flux_ft.infer.runner import Runner
from flux_ft.infer.tasks import TextToImage
from flux_ft.train.run import train
from flux_ft.types import AppliedAdapter

EMBLEM = (
    Part("circle", COLORS["blue"]),
    Part("cross", COLORS["white"], radius=0.8),
    Part("diamond", COLORS["red"], radius=0.35),
)
"""A blue disc with a white cross and a red diamond: flux-tiny's world has no thing of more than one colour."""
BACKGROUNDS = [name for name in COLORS if name not in ("blue", "purple")]
"""What the disc stands out from."""
TRIGGER = "TOK"
NUM_PICTURES = 16
NUM_PROMPTS = 64
GUIDANCE = 1.5
"""A LoRA is trained at guidance 1; much above it, the base model's own idea of the unknown word is added to it."""


@dataclass(frozen=True)
class Trial:
    """One prompt of the score, with what the picture should show."""

    prompt: str
    scene: Scene
    seed: int


def quickstart(output: Path, iterations: int = 600, seed: int = 0) -> dict[str, object]:
    """Run everything into `output`, a new or empty folder; returns what is also written to quickstart.json.

    The four scores are fractions of NUM_PROMPTS unseen prompts: "concept" is how often the emblem appears when asked
    for by the trigger word, in the right place on the right background; "prior" how often other prompts are drawn with
    all five attributes right.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"`--output {output}` holds something already", hint="choose another folder")
    started = time.monotonic()
    pictures = output / "pictures"
    seen = write_pictures(pictures, seed)
    log.say(f"wrote {len(seen)} pictures of a new thing, with captions, to {pictures}")
    concept, prior = concept_trials(seen, seed), prior_trials(seed)
    config = RunConfig.model_validate(run_settings(output, pictures, concept, prior, iterations, seed))

    before = draw(Runner("flux-tiny"), [*concept, *prior], "draw before")
    result = train(config, command=log.command("train", str(output / "run" / "run.yaml"), "--resume"))
    lora = result.loras["diffusers"]
    after = draw(Runner("flux-tiny", [AppliedAdapter(lora)]), [*concept, *prior], "draw after")

    grid = output / "before_after.png"
    save_png(before_after_grid(concept, prior, before, after), grid)
    summary: dict[str, object] = {
        "concept_before": concept_score(concept, before[:NUM_PROMPTS]),
        "concept_after": concept_score(concept, after[:NUM_PROMPTS]),
        "prior_before": prior_score(prior, before[NUM_PROMPTS:]),
        "prior_after": prior_score(prior, after[NUM_PROMPTS:]),
        "train_seconds": round(result.train_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "lora": str(lora),
        "grid": str(grid),
    }
    write_whole(output / "quickstart.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def free_folder(wished: Path) -> Path:
    """`wished`, or the first of wished-2, wished-3, … that does not exist, so that no earlier result is touched."""
    names = (wished.with_name(f"{wished.name}-{number}") for number in count(2))
    return wished if not wished.exists() else next(path for path in names if not path.exists())


def write_pictures(folder: Path, seed: int) -> list[Scene]:
    """NUM_PICTURES files of the emblem with `.txt` captions, all over the place; returns what they show."""
    rng = np.random.default_rng((seed, 1))
    places = list(POSITIONS)
    scenes = []
    for index in range(NUM_PICTURES):
        background = BACKGROUNDS[index % len(BACKGROUNDS)]
        position = places[(index * 4 + index // len(BACKGROUNDS)) % len(places)]
        scene = Scene("emblem", "", "large", position, background)
        offset = tuple(rng.uniform(-2, 2, 2))
        picture = render_emblem(EMBLEM, scene.size, position, COLORS[background], (offset[0], offset[1]))
        words = caption(scene, rng, name=TRIGGER)
        save_png(Image.fromarray(picture), folder / f"{index:02d}.png")
        write_whole(folder / f"{index:02d}.txt", (words + "\n").encode())
        scenes.append(scene)
    return scenes


def concept_trials(seen: Sequence[Scene], seed: int) -> list[Trial]:
    """Prompts for the emblem in places and on backgrounds whose pairing no training picture shows."""
    rng = np.random.default_rng((seed, 2))
    shown = {(scene.position, scene.background) for scene in seen}
    unseen = [
        Scene("emblem", "", "large", position, background)
        for position in POSITIONS
        for background in BACKGROUNDS
        if (position, background) not in shown
    ]
    order = [*rng.permutation(len(unseen)), *rng.permutation(len(unseen))][:NUM_PROMPTS]
    scenes = [unseen[i] for i in order]
    return [Trial(caption(scene, rng, name=TRIGGER), scene, 1000 + i) for i, scene in enumerate(scenes)]


def prior_trials(seed: int) -> list[Trial]:
    """Prompts without the trigger word, of attribute combinations that flux-tiny never trained on."""
    rng = np.random.default_rng((seed, 3))
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    scenes = [held_out[i] for i in rng.choice(len(held_out), size=NUM_PROMPTS, replace=False)]
    return [Trial(caption(scene, rng), scene, 2000 + i) for i, scene in enumerate(scenes)]


def prior_prompts(seed: int) -> list[str]:
    """NUM_PROMPTS captions of the world that flux-tiny was trained on: none is a prompt of the score."""
    rng = np.random.default_rng((seed, 4))
    known = [scene for scene in all_scenes() if not is_held_out(scene)]
    return [caption(known[i], rng) for i in rng.choice(len(known), size=NUM_PROMPTS, replace=False)]


def run_settings(
    output: Path, pictures: Path, concept: Sequence[Trial], prior: Sequence[Trial], iterations: int, seed: int
) -> dict[str, object]:
    """The run file of the quickstart, as a mapping."""
    return {
        "model": "flux-tiny",
        "data": {"path": str(pictures)},
        "output": str(output / "run"),
        "finetune_comment": "flux-tiny emblem",
        "trigger_word": TRIGGER,
        "finetune_type": "lora",
        "lora_rank": 16,
        "iterations": iterations,
        "learning_rate": 2e-3,
        "seed": seed,
        "optim": {"batch_size": 8},
        "schedule": {"name": "cosine", "warmup_steps": iterations // 20},
        # Sixteen pictures of one thing pull on everything else; these prompts, none of them a test's, hold it in place;
        # to look at them in every second step held it as well, on three seeds, in two thirds of the time.
        "prior": {"prompts": prior_prompts(seed), "every": 2},
        "preview": {
            "every": max(1, iterations // 4),
            "guidance": GUIDANCE,
            "prompts": [trial.prompt for trial in (*concept[:3], *prior[:2])],
        },
        "checkpoint": {"every": max(1, iterations // 2)},
    }


def draw(runner: Runner, trials: Sequence[Trial], title: str) -> list[Image.Image]:
    """One picture a trial, at GUIDANCE."""
    requests = [TextToImage(prompt=one.prompt, seed=one.seed, guidance=GUIDANCE) for one in trials]
    with log.progress(title, runner.num_passes([runner.prepare(request) for request in requests])) as bar:
        return runner.draw(requests, on_step=bar.advance)


def concept_score(trials: Sequence[Trial], pictures: Sequence[Image.Image]) -> float:
    """Share of pictures that show the emblem in the right place on the right background."""
    reader = SceneReader(EMBLEM)
    readings = [reader.read(np.asarray(picture)) for picture in pictures]
    hits = [
        reading.shape == "emblem"
        and reading.position == trial.scene.position
        and reading.background == trial.scene.background
        for reading, trial in zip(readings, trials, strict=True)
    ]
    return sum(hits) / len(hits)


def prior_score(trials: Sequence[Trial], pictures: Sequence[Image.Image]) -> float:
    """Share of pictures with shape, colour, size, position and background all right."""
    reader = SceneReader(EMBLEM)
    hits = [
        all(reader.read(np.asarray(picture)).matches(trial.scene).values())
        for picture, trial in zip(pictures, trials, strict=True)
    ]
    return sum(hits) / len(hits)


def before_after_grid(
    concept: Sequence[Trial],
    prior: Sequence[Trial],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    columns: int = 4,
) -> Image.Image:
    """The same prompts and seeds before (upper row) and after (lower row): trigger prompts, then others."""
    picked = [*range(columns), *(NUM_PROMPTS + i for i in range(columns))]
    trials = [*concept, *prior]
    rows = [[before[i] for i in picked], [after[i] for i in picked]]
    return labelled_grid(rows, ["before", "after"], [trials[i].prompt for i in picked])


def summary_for_people(summary: dict[str, object], output: Path) -> str:
    """The figures and where everything is."""
    lines = [
        "",
        f"the new thing is drawn   before {summary['concept_before']:.0%}   after {summary['concept_after']:.0%}",
        f"other prompts are right  before {summary['prior_before']:.0%}   after {summary['prior_after']:.0%}",
        f"training {summary['train_seconds']} s, all {summary['total_seconds']} s",
        "",
        f"pictures to train on   {output / 'pictures'}",
        f"before and after       {summary['grid']}",
        f"the LoRA               {summary['lora']}",
        f"the run, with its card {output / 'run' / 'README.md'}",
        f"these figures          {output / 'quickstart.json'}",
        "",
        "draw with it:",
        "  "
        + log.command(
            "generate",
            "--model",
            "flux-tiny",
            "--lora",
            str(summary["lora"]),
            "--guidance",
            str(GUIDANCE),
            "--prompt",
            f"a large {TRIGGER} in the center on a green background",
        ),
    ]
    return "\n".join(lines)
