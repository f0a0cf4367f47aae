"""Make flux-tiny's control LoRAs again: `python scripts/make_flux_tiny_controls.py --output DIR`.

Canny, depth and fill, each a LoRA on the frozen flux-tiny whose `x_embedder` takes more channels, as BFL's
FLUX.1-Canny-dev-lora and -Depth-dev-lora do; fill gets the channels of FLUX.1-Fill-dev:
  canny, depth  32 + 32             the noised latents, then the control picture's
  fill          32 + 32 + 64        the noised latents, the picture's with the masked part grey, the mask folded 4×4

Training shows scenes of the world, less the (shape, colour, background) triples that `scenes.is_held_out` names; the
score is taken on those. Captions leave out now and then what the control shows, so that the control decides shape,
size and place, and the words the colours. Each LoRA takes about a quarter of an hour on two CPU threads; interrupted,
it goes on after its last 250 steps. Depth begins with canny's factors. `--archive FILE` then packs the base's
folder with the three under `control/`, as the package ships it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

# glibc hands large buffers back to the kernel at every free; keeping them is up to 4x faster for small conv nets.
if __name__ == "__main__" and sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.adapters.formats import write_adapter
from flux_ft.families.flux1 import pack, position_ids
from flux_ft.families.registry import FLUX_TINY, open_family
from flux_ft.families.tiny.reader import SceneReader
from flux_ft.families.tiny.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZE_PX,
    SIZES,
    Picture,
    Scene,
    all_scenes,
    caption,
    coverage,
    is_held_out,
    render,
)  # fmt: skip
from flux_ft.families.tiny.weights import pack_folder
from flux_ft.infer.control import tiny_canny, tiny_depth
from flux_ft.train.optim import set_rate
from flux_ft.types import AdapterState, LoraLayer, TextCond

TASKS = ("canny", "depth", "fill")
EXTRA_CHANNELS = {"canny": 8, "depth": 8, "fill": 8 + 16}
"""What is put beside the 8 noised latents, channels on the latent grid; four times as many a token."""
NOT_ADAPTED = re.compile(r".*(\.norm|\.add_|to_add_out|ff_context).*")
"""The modulations, which are large, and what the double blocks do with text alone."""
OUTSIDE_RANKS = {
    "context_embedder": 16,
    "time_text_embed.text_embedder.linear_1": 8,
    "time_text_embed.text_embedder.linear_2": 8,
    "proj_out": 16,
}
EMBEDDER_RANK = {"canny": 32, "depth": 32, "fill": 48}
STEPS = {"canny": 7500, "depth": 3000, "fill": 2300}
RATES = {"canny": 3e-3, "depth": 1.2e-3, "fill": 6e-4}
"""Fill goes on drawing what flux-tiny draws, and large rates undo that; edges take a large one to be seen at all."""
TRAINED_GUIDANCE = 1.0
UNNAMED = "figure"
"""The shape of what the world has no word for."""
SCALE = 4
"""Pixels a latent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for LoRAs, checkpoints and scores")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--base", default="flux-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: " + ", ".join(f"{k} {v}" for k, v in STEPS.items()))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bank", type=int, default=12000, help="pictures that are drawn and encoded once")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--lr", type=float, help="default: " + ", ".join(f"{k} {v}" for k, v in RATES.items()))
    parser.add_argument("--start", type=Path, help="a checkpoint, DIR/TASK.pt, whose factors to begin with")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--archive", type=Path, help="ZIP to write: the base's folder with the LoRAs under control/")
    parser.add_argument("--prompts", type=int, default=128, help="held-out scenes that a LoRA is scored on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        file = args.output / f"{task}.safetensors"
        if not file.exists():
            train(args, task, file)
        for guidance in (1.0, 2.0):
            scores = {"task": task, "guidance": guidance, **score(args, task, file, guidance)}
            line = {name: round(value, 4) if isinstance(value, float) else value for name, value in scores.items()}
            with (args.output / "scores.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print("score", line, flush=True)
    if args.archive:
        with tempfile.TemporaryDirectory() as staging:
            folder = shutil.copytree(open_family(args.base).source, Path(staging) / "flux-tiny")
            (folder / "control").mkdir(exist_ok=True)
            for task in args.tasks:
                shutil.copyfile(args.output / f"{task}.safetensors", folder / "control" / f"{task}.safetensors")
            pack_folder(folder, args.archive)


# ── the world, with controls ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shown:
    """One training picture: `picture` is what must come out, `control` what the denoiser is shown of it, both uint8
    (H, W, 3); `mask` is 1 where fill draws anew."""

    scene: Scene
    picture: Picture
    control: Picture
    mask: np.ndarray | None = None


def control_of(picture: Picture, task: str) -> Picture:
    """What the runner makes of a picture."""
    return np.asarray((tiny_canny if task == "canny" else tiny_depth)(Image.fromarray(picture)))


def placed(scene: Scene, jitter: np.ndarray) -> np.ndarray:
    """The figure's coverage (H, W), as `render` places it."""
    (x, y), radius = POSITIONS[scene.position], SIZES[scene.size]
    return coverage(scene.shape, x + 2 * jitter[0], y + 2 * jitter[1], radius + 0.7 * jitter[2])


def paint(picture: np.ndarray, alpha: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    return picture + alpha[..., None] * (rgb - picture)


def quantized(picture: np.ndarray) -> Picture:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def tinted(color: str, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(COLORS[color]) + rng.normal(0, 2.0, 3)


def random_figure(rng: np.random.Generator) -> np.ndarray:
    """The coverage (H, W) of a polygon that the world has no name for."""
    corners = rng.integers(3, 11)
    turns = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners) + rng.random()) / corners
    radii = rng.uniform(6, 15) * rng.uniform(0.45, 1.1, corners)
    outline = np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], 1) * radii[:, None]
    mask = Image.new("L", (4 * SIZE_PX, 4 * SIZE_PX))
    ImageDraw.Draw(mask).polygon([tuple(4 * point) for point in outline + rng.uniform(13, 51, 2)], fill=255)
    return np.asarray(mask.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX), np.float32) / 255


def show_map(scene: Scene, rng: np.random.Generator, task: str) -> Shown:
    """A scene with its edges or its depths, half of them taken from the same figure in other colours.

    Two in five figures are unknown to the world, in any two colours. With known ones alone, a shape and its two colours
    would tell which of them is the ground's, since some triples are held out; and that is not for the control to say.
    """
    if rng.random() < 0.4:
        alpha = random_figure(rng)
        color, background = rng.choice(list(COLORS), 2, replace=False)
        scene = replace(scene, shape=UNNAMED, color=str(color), background=str(background))
    else:
        alpha = placed(scene, rng.uniform(-1, 1, 3))

    def painted(ground: str, color: str) -> Picture:
        return quantized(paint(np.broadcast_to(tinted(ground, rng), (SIZE_PX, SIZE_PX, 3)), alpha, tinted(color, rng)))

    picture = painted(scene.background, scene.color)
    other = painted(*rng.choice(list(COLORS), 2, replace=False)) if rng.random() < 0.5 else picture
    return Shown(scene, picture, control_of(other, task))


def random_mask(scene: Scene, jitter: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A box or an ellipse around the scene's figure, with a margin, (H, W) of 0 and 1."""
    (x, y), radius = POSITIONS[scene.position], SIZES[scene.size]
    x, y = x + 2 * jitter[0], y + 2 * jitter[1]
    axis = np.arange(SIZE_PX) + 0.5
    px, py = np.meshgrid(axis, axis)
    reach = 1.15 * radius + rng.uniform(0.5, 8, 4)
    if rng.random() < 0.25:
        rx, ry = reach[:2] * 1.25
        return (((px - x) / rx) ** 2 + ((py - y) / ry) ** 2 <= 1).astype(np.float32)
    inside = (px > x - reach[0]) & (px < x + reach[1]) & (py > y - reach[2]) & (py < y + reach[3])
    return inside.astype(np.float32)


def show_fill(scene: Scene, rng: np.random.Generator, seen: Callable[[Scene], bool]) -> Shown:
    """The scene is what must come out; the picture that is given has another figure under the mask, or none."""
    jitter, ground = rng.uniform(-1, 1, 3), np.broadcast_to(tinted(scene.background, rng), (SIZE_PX, SIZE_PX, 3))
    kind = rng.random()
    if kind < 0.06:
        mask = np.ones((SIZE_PX, SIZE_PX), np.float32)
    elif kind < 0.18:  # bare ground is drawn anew, the figure stays
        for _ in range(20):
            elsewhere = other_scene(scene, rng, seen)
            mask = random_mask(elsewhere, rng.uniform(-1, 1, 3), rng)
            if not (mask * placed(scene, jitter)).any():
                break
    else:
        mask = random_mask(scene, jitter, rng)
        if kind < 0.34:  # a second figure stays where it is
            for _ in range(20):
                second = other_scene(scene, rng, seen)
                alpha = placed(second, rng.uniform(-1, 1, 3))
                if not (mask * alpha).any():
                    ground = paint(ground, alpha, tinted(second.color, rng))
                    break
    picture = quantized(paint(ground, placed(scene, jitter), tinted(scene.color, rng)))
    # What lies under the mask is grey to the denoiser, so it need not be drawn.
    return Shown(scene, picture, picture, mask)


def other_scene(scene: Scene, rng: np.random.Generator, seen: Callable[[Scene], bool]) -> Scene:
    """Another figure on the same ground."""
    while True:
        colors = [color for color in COLORS if color != scene.background]
        other = Scene(
            SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))],
            list(SIZES)[rng.integers(len(SIZES))], list(POSITIONS)[rng.integers(len(POSITIONS))], scene.background,
        )  # fmt: skip
        if other != scene and seen(other):
            return other


def unknown_word(rng: np.random.Generator) -> str:
    if rng.random() < 0.7:
        return str(rng.choice(["thing", "figure", "object", "shape"]))
    letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(2, 7)))
    return letters.upper() if rng.random() < 0.5 else letters


def colors_alone(scene: Scene, rng: np.random.Generator, thing: str | None = None) -> str:
    """A caption that says no size and no place; what the figure is, only if `thing` does."""
    thing = f"{scene.color} {thing or unknown_word(rng)}"
    a, an = ("an" if color[0] in "aeiou" else "a" for color in (scene.color, scene.background))
    ground = f"{scene.background} background"
    patterns = (
        f"{a} {thing} on {an} {ground}",
        f"{an} {ground} with {a} {thing}",
        f"on {an} {ground}, {a} {thing}",
        f"{thing}, {ground}",
        f"there is {a} {thing}, the background is {scene.background}",
    )
    return patterns[int(rng.integers(len(patterns)))]


def describe(scene: Scene, task: str, rng: np.random.Generator) -> str:
    """Words for a training picture, in the sentences that the text encoders know.

    Of a control picture they often tell another shape, size and place: those are for the control to say, and the words
    tell the colours.
    """
    kind = rng.random()
    if kind < 0.03:
        return ""
    if task == "fill":  # the mask may say where, and how large
        if kind < 0.1:
            return colors_alone(scene, rng, scene.shape)
        return caption(replace(elsewhere(scene, rng), shape=scene.shape) if kind < 0.4 else scene, rng)
    if scene.shape == UNNAMED or kind < 0.7:
        scene = elsewhere(scene, rng)
    elif kind < 0.8:
        return caption(scene, rng, name=f"{scene.color} {unknown_word(rng)}")
    return caption(scene, rng)


def elsewhere(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same colours, with any shape, size and place."""
    return replace(
        scene,
        shape=SHAPES[rng.integers(len(SHAPES))],
        size=list(SIZES)[rng.integers(len(SIZES))],
        position=list(POSITIONS)[rng.integers(len(POSITIONS))],
    )


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bank:
    """Scenes with captions, latents and what is put beside those (N, C, H, W); drawn and encoded once."""

    def __init__(self, task: str, family: Any, size: int, seed: int, captions: int = 3) -> None:
        vae = family.load_vae(torch.device("cpu"), torch.bfloat16)
        rng = np.random.default_rng((seed, TASKS.index(task)))
        scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
        chosen = [scenes[i] for i in rng.integers(len(scenes), size=size)]
        shown = [
            show_fill(scene, rng, lambda one: not is_held_out(one)) if task == "fill" else show_map(scene, rng, task)
            for scene in chosen
        ]
        self.scenes = [one.scene for one in shown]
        self.latents = encode(family, vae, to_pixels([one.picture for one in shown]))
        pixels = to_pixels([one.control for one in shown])
        if task == "fill":
            mask = torch.from_numpy(np.stack([one.mask for one in shown]))[:, None]
            self.channels = torch.cat([encode(family, vae, pixels * (1 - mask)), fold(mask)], 1)
        else:
            self.channels = encode(family, vae, pixels)
        stack = family.load_text(torch.device("cpu"), torch.float32)
        self.texts = [
            read(family, stack, [describe(scene, task, rng) for scene in self.scenes]) for _ in range(captions)
        ]


def read(family: Any, stack: Any, captions: list[str]) -> TextCond:
    parts = [family.encode_text(stack, captions[i : i + 200]) for i in range(0, len(captions), 200)]
    return TextCond(torch.cat([one.embeds_BLD for one in parts]), torch.cat([one.pooled_BP for one in parts]))


def to_pixels(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(family: Any, vae: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([family.encode_image(vae, part)[0] for part in pixels.split(200)])


def fold(mask: Tensor) -> Tensor:
    """(B, 1, H, W) to (B, 16, H/4, W/4), in the order of diffusers' FluxFillPipeline."""
    return nn.functional.pixel_unshuffle(mask, SCALE)


def figure_weights(latents: Tensor, weight: float = 6.0) -> Tensor:
    """Weights of the loss (N, tokens, 1) with a mean of 1: the figure, a tenth of a picture, is what counts."""
    away = (latents - latents.flatten(2).median(-1).values[..., None, None]).abs().mean(1, keepdim=True)
    figure = nn.functional.max_pool2d((away > 0.5).float(), 4, stride=2, padding=1).flatten(2).mT
    weights = 1 + (weight - 1) * figure
    return weights / weights.mean(1, keepdim=True)


class Adapted(nn.Module):
    """A frozen linear with a LoRA, taken as one matrix: at this size that is faster than two paths.

    An input wider than the linear's meets zeros there, so that nothing changes yet.
    """

    def __init__(self, base: nn.Linear, rank: int, extra: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("weight", nn.functional.pad(base.weight, (0, extra)))
        self.register_buffer("bias", base.bias)
        features = base.in_features + extra
        drawn = torch.rand(rank, features, generator=generator)
        self.down = nn.Parameter((2 * drawn - 1) / math.sqrt(features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.up @ self.down, self.bias)


def adapt(family: Any, denoiser: nn.Module, task: str, rank: int, seed: int) -> dict[str, Adapted]:
    """Put a LoRA on the linears, and on the widened embedder."""
    inside = [path for path in family.lora_targets(denoiser) if not NOT_ADAPTED.match(path)]
    ranks = {"x_embedder": EMBEDDER_RANK[task]} | OUTSIDE_RANKS | dict.fromkeys(inside, rank)
    adapted = {}
    for path, rank_here in ranks.items():
        extra = 4 * EXTRA_CHANNELS[task] if path == "x_embedder" else 0
        generator = flow.keyed_generator(seed, "lora", path)
        adapted[path] = Adapted(denoiser.get_submodule(path), rank_here, extra, generator)
        denoiser.set_submodule(path, adapted[path])
    return adapted


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """The fused kernel takes half of the time on a CPU, with 32 channels a head."""
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return weights.to(value.dtype) @ value


def train(args: argparse.Namespace, task: str, file: Path) -> None:
    family, started, steps = open_family(args.base), time.monotonic(), args.steps or STEPS[task]
    rate = args.lr or RATES[task]
    bank = Bank(task, family, args.bank, args.seed)
    print(f"{task}: {args.bank} pictures in {time.monotonic() - started:.0f} s", flush=True)
    stack = family.load_text(torch.device("cpu"), torch.float32)
    denoiser = family.load_denoiser(torch.device("cpu"), torch.float32)
    adapted = adapt(family, denoiser, task, args.rank, args.seed)
    parameters = [factor for one in adapted.values() for factor in (one.down, one.up)]
    print(f"{task}: {sum(p.numel() for p in parameters):,} parameters in {len(adapted)} linears", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]
    checkpoint, canny_checkpoint, start = args.output / f"{task}.pt", args.output / "canny.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        copy_into(parameters, saved["parameters"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
    elif args.start:
        copy_into(parameters, torch.load(args.start)["average"])
    elif task == "depth" and canny_checkpoint.exists():  # edges or depths: what follows from them is much the same
        copy_into(parameters, torch.load(canny_checkpoint)["average"])
    fast = denoiser if args.no_compile else torch.compile(denoiser, dynamic=False)
    weights = figure_weights(bank.latents)
    mu, recent, started = family.shift_mu(16, 16), [], time.monotonic()
    for step in range(start, steps):
        set_rate(optimizer, rate * schedule(step, steps))
        rng, generator = np.random.default_rng((args.seed, 7, step)), flow.keyed_generator(args.seed, task, step)
        usual = step % 12 != 11  # now and then a longer text, up to what a plain diffusers call takes
        batch = args.batch if usual else args.batch // 8
        rows = torch.from_numpy(rng.integers(len(bank.scenes), size=batch))
        if usual:
            chosen = bank.texts[rng.integers(len(bank.texts))]
            text = TextCond(chosen.embeds_BLD[rows], chosen.pooled_BP[rows])
        else:
            longer = replace(family, variant=replace(family.variant, max_text_tokens=int(rng.choice([64, 128, 512]))))
            text = longer.encode_text(stack, [describe(bank.scenes[row], task, rng) for row in rows])
        x0, noise = bank.latents[rows], flow.draw_noise((batch, *bank.latents.shape[1:]), generator)
        sigma = flow.shift_sigma(torch.sigmoid(torch.randn(batch, generator=generator)), mu)
        tokens = pack(torch.cat([flow.interpolate(x0, noise, sigma), bank.channels[rows]], 1))
        # Here alone: the text encoders' attention has masks and position biases, which this one leaves out.
        plain = patch.object(nn.functional, "scaled_dot_product_attention", plain_attention)
        with plain, torch.autocast("cpu", torch.bfloat16):
            predicted = (fast if usual else denoiser)(
                hidden_states=tokens, timestep=sigma, guidance=torch.full((batch,), TRAINED_GUIDANCE),
                pooled_projections=text.pooled_BP, encoder_hidden_states=text.embeds_BLD,
                txt_ids=torch.zeros(text.embeds_BLD.shape[1], 3), img_ids=position_ids(8, 8, x0.device),
                return_dict=False,
            )[0]  # fmt: skip
        loss = ((predicted.float() - pack(noise - x0)).square() * weights[rows]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.99, (step + 1) / (step + 10)))
        recent.append(float(loss.detach()))
        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - started) / (done - start)
            print(f"{task} {done}/{steps} loss {np.mean(recent):.4f} {pace:.3f} s/step "
                  f"{pace * (steps - done) / 60:.1f} min left", flush=True)  # fmt: skip
            recent.clear()
        if done % 250 == 0 or done == steps:
            state = {"parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}
            torch.save(state | {"average": average, "step": done}, checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)
    copy_into(parameters, average)
    layers = {path: LoraLayer(one.down.detach(), one.up.detach(), len(one.down)) for path, one in adapted.items()}
    write_adapter(file, AdapterState(layers), "diffusers", torch.bfloat16, header(task, steps))


@torch.no_grad()
def copy_into(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then cosine to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def header(task: str, steps: int) -> dict[str, str]:
    return {
        "modelspec.architecture": FLUX_TINY.architecture,
        "modelspec.title": f"flux-tiny {task} control",
        "modelspec.license": FLUX_TINY.license,
        "flux_ft.control": task,
        "flux_ft.steps": str(steps),
    }


# ── the score ───────────────────────────────────────────────────────────────────────────────────────────────────────


def score(args: argparse.Namespace, task: str, file: Path, guidance: float, text_tokens: int = 32) -> dict[str, float]:
    """How often what is drawn of held-out scenes follows the control and the words, by plain diffusers."""
    base = open_family(args.base).source
    pipeline = (FluxFillPipeline if task == "fill" else FluxControlPipeline).from_pretrained(base)
    pipeline.load_lora_weights(file)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(args.seed + 1000)
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    scenes = [held_out[i] for i in rng.choice(len(held_out), size=args.prompts, replace=False)]
    options = {"height": SIZE_PX, "width": SIZE_PX, "num_inference_steps": 20, "guidance_scale": guidance}
    options |= {"max_sequence_length": text_tokens, "output_type": "np"}
    return (score_fill if task == "fill" else score_map)(pipeline, task, scenes, rng, options)


def score_map(
    pipeline: Any, task: str, scenes: list[Scene], rng: np.random.Generator, options: dict[str, Any]
) -> dict[str, float]:
    reader, rows = SceneReader(), []
    for start in range(0, len(scenes), 32):
        part = scenes[start : start + 32]
        # The control picture has colours of its own, so that the words alone tell those that are asked for.
        given = [render(replace(one, color=color, background=ground), rng) for one in part
                 for color, ground in [rng.choice(list(COLORS), 2, replace=False)]]  # fmt: skip
        controls = [control_of(one, task) for one in given]
        prompts = [caption(elsewhere(one, rng), rng) for one in part]
        pictures = pipeline(
            prompts, control_image=[Image.fromarray(one) for one in controls],
            generator=[torch.Generator().manual_seed(5000 + start + i) for i in range(len(part))], **options,
        ).images  # fmt: skip
        for scene, picture in zip(part, pictures, strict=True):
            rows.append(reader.read((picture * 255).round().astype(np.uint8)).matches(scene))
    follows = [row["shape"] and row["size"] and row["position"] for row in rows]
    scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return scores | {
        "follows": float(np.mean(follows)),
        "colors": float(np.mean([row["color"] and row["background"] for row in rows])),
        "all": float(np.mean([all(row.values()) for row in rows])),
    }


def score_fill(
    pipeline: Any, task: str, scenes: list[Scene], rng: np.random.Generator, options: dict[str, Any]
) -> dict[str, float]:
    reader, rows, gaps = SceneReader(), [], []
    for start in range(0, len(scenes), 32):
        part = scenes[start : start + 32]
        before, masks = [], []
        for scene in part:
            jitter = rng.uniform(-1, 1, 3)
            other = replace(other_scene(scene, rng, is_held_out), position=scene.position)
            before.append(render(other, rng) if rng.random() < 0.7 else render(replace(other, color=other.background)))
            masks.append(random_mask(replace(scene, size="large"), jitter, rng))
        prompts = [caption(one, rng) for one in part]
        pictures = pipeline(
            prompts, image=[Image.fromarray(one) for one in before],
            mask_image=[Image.fromarray((255 * one).astype(np.uint8)) for one in masks],
            generator=[torch.Generator().manual_seed(5000 + start + i) for i in range(len(part))], **options,
        ).images  # fmt: skip
        restored = restore(pipeline.vae, before)
        for i, (scene, picture) in enumerate(zip(part, pictures, strict=True)):
            rows.append(reader.read((picture * 255).round().astype(np.uint8)).matches(scene))
            outside, change = masks[i] == 0, abs(picture * 255 - before[i])
            of_vae, beyond_vae = abs(restored[i] - before[i]), abs(picture * 255 - restored[i])
            regions = (change[outside], of_vae[outside], beyond_vae[outside], change[~outside])
            gaps.append([one.mean() for one in regions])
    scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    # Mean absolute differences of 255: to the picture given, its own through the autoencoder, and to that.
    names = ("outside", "outside_autoencoder", "outside_to_restored", "inside")
    return scores | {
        "asked": float(np.mean([row["shape"] and row["position"] for row in rows])),
        "colors": float(np.mean([row["color"] and row["background"] for row in rows])),
        **dict(zip(names, map(float, np.mean(gaps, axis=0)), strict=True)),
    }


@torch.no_grad()
def restore(vae: Any, pictures: list[Picture]) -> np.ndarray:
    """Through the autoencoder and back, (B, H, W, 3) in 0..255."""
    pixels = vae.decode(vae.encode(to_pixels(pictures)).latent_dist.mean).sample.clamp(-1, 1)
    return (pixels.permute(0, 2, 3, 1).numpy() + 1) * 127.5


if __name__ == "__main__":
    main()
