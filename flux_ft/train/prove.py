"""How near an extracted LoRA comes to the model that it was taken out of, in what it predicts and draws.

Shapes in names: C latent channels, H W latent grid. A leading B or 1 is the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from flux_ft import flow, log
from flux_ft.data.cache import Examples
from flux_ft.data.loader import collate
from flux_ft.families.base import Family
from flux_ft.families.quantize import compute_dtype
from flux_ft.infer.grid import labelled_grid
from flux_ft.train.loop import TRAIN_GUIDANCE, VALIDATION_SIGMAS
from flux_ft.types import Bucket, CachedExample, TextCond

EXAMPLES_AT_MOST = 16
MODELS = ("base", "lora", "full")


class Target(NamedTuple):
    """What a model should predict for one example, at any sigma."""

    velocity_CHW: Tensor
    weight_HW: Tensor | None
    """Of each place in the loss; None = the same everywhere."""


@dataclass(frozen=True)
class Proof:
    """What an extraction costs, measured on the same pictures with the same noise for all three models."""

    examples: int
    """Pictures, each at one size; a picture at two sizes counts twice."""
    held_out: bool
    """Whether training never saw the pictures; it never saw the noise."""
    loss: dict[str, float]
    """Mean squared velocity error of "base", "lora" and "full"."""
    relative_error: float
    """‖v_lora − v_full‖ / ‖v_base − v_full‖ over all predictions: 0 = the LoRA predicts what the full model does, 1 =
    it comes no nearer than the base; NaN where full model and base predict the same, or nothing finite."""
    relative_error_by_sigma: dict[str, float]
    """The same at each sigma."""

    def as_json(self) -> dict[str, Any]:
        """For programs; null for what is not a finite number."""
        return {
            "examples": self.examples,
            "held_out": self.held_out,
            "loss": {name: _finite(value) for name, value in self.loss.items()},
            "relative_error": _finite(self.relative_error),
            "relative_error_by_sigma": {key: _finite(value) for key, value in self.relative_error_by_sigma.items()},
        }

    def for_people(self) -> str:
        """Two or three lines."""
        which = "held-out" if self.held_out else "training"
        base, lora, full = (self.loss[name] for name in MODELS)
        lines = [f"loss on {self.examples} {which} examples: base {base:.4f}, LoRA {lora:.4f}, full model {full:.4f}"]
        if math.isfinite(self.relative_error):
            each = [f"{100 * error:.1f} % at sigma {sigma}" for sigma, error in self.relative_error_by_sigma.items()]
            lines.append(
                f"the LoRA's predictions are off the full model's by {100 * self.relative_error:.1f} % of what "
                "training changed in them" + (f" ({each[0]}, {each[-1]})" if len(each) > 1 else "")
            )
        elif all(math.isfinite(value) for value in self.loss.values()):
            lines.append(
                "the full model predicts what the base predicts, so there is nothing for a LoRA to come near to"
            )
        else:
            lines.append("some predictions are not finite numbers, so they cannot be compared")
        if not self.held_out:
            lines.append(
                "nothing was held out: these are training pictures, with noise that training never saw; "
                "`validation.fraction` holds some back"
            )
        return "\n".join(lines)


def proof_examples(
    trained: Examples, held_out: Examples, at_most: int = EXAMPLES_AT_MOST
) -> tuple[Sequence[CachedExample], bool]:
    """What to measure on, and whether it was held out: held-out pictures if there are any, else training pictures.

    As many different pictures as there can be, each at its largest size, before any comes at a second one.
    """
    source = held_out if len(held_out) else trained
    positions: dict[tuple[str, Bucket], int] = {}
    for position, row in enumerate(source.rows):
        positions.setdefault((row.digest, row.bucket), position)
    sizes = Counter[str]()
    ranked = []
    for digest, bucket in sorted(positions, key=lambda key: -key[1].width_px * key[1].height_px):
        ranked.append((sizes[digest], positions[digest, bucket]))
        sizes[digest] += 1
    return source.select([position for _, position in sorted(ranked)][:at_most]), len(held_out) > 0


def targets(examples: Sequence[CachedExample], seed: int) -> list[Target]:
    """The velocity that each example asks for, float32: its noise less the mean of its latent."""
    return [
        Target(flow.velocity_target(example.mean_CHW.float(), _noise_CHW(example, seed)), example.weight_HW)
        for example in examples
    ]


@torch.no_grad()
def predictions(
    family: Family,
    denoiser: nn.Module,
    examples: Sequence[CachedExample],
    seed: int,
    device: torch.device,
    sigmas: Sequence[float] = VALIDATION_SIGMAS,
) -> list[Tensor]:
    """The velocity (C, H, W) that `denoiser` predicts at each example and sigma, float32 on the CPU.

    Example by example, and for each sigma by sigma. On the means of the latents and captions as written, at training's
    guidance; the noise is keyed by (seed, the picture's digest). The denoiser keeps its mode.
    """
    dtype = compute_dtype(denoiser)
    was_training = denoiser.training
    denoiser.eval()
    try:
        with log.progress("measure predictions", len(examples) * len(sigmas)) as bar:
            found = []
            for example in examples:
                for velocity_CHW in _of_example(family, denoiser, example, seed, device, dtype, sigmas):
                    found.append(velocity_CHW)
                    bar.advance()
    finally:
        denoiser.train(was_training)
    return found


def _of_example(
    family: Family,
    denoiser: nn.Module,
    example: CachedExample,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    sigmas: Sequence[float],
) -> Iterator[Tensor]:
    batch = collate([example], [0], [0])
    x0_1CHW = batch.mean_BCHW.to(device, torch.float32)
    noise_1CHW = _noise_CHW(example, seed)[None].to(device)
    text = TextCond(batch.text.embeds_BLD.to(device, dtype), batch.text.pooled_BP.to(device, dtype))
    for sigma in sigmas:
        sigma_1 = torch.full((1,), sigma, device=device)
        z_1CHW = flow.interpolate(x0_1CHW, noise_1CHW, sigma_1).to(dtype)
        yield family.predict_velocity(denoiser, z_1CHW, sigma_1, text, TRAIN_GUIDANCE)[0].float().cpu()


def _noise_CHW(example: CachedExample, seed: int) -> Tensor:
    return flow.draw_noise(tuple(example.mean_CHW.shape), flow.keyed_generator(seed, "proof", example.digest))


def prove(
    base: Sequence[Tensor],
    lora: Sequence[Tensor],
    full: Sequence[Tensor],
    targets: Sequence[Target],
    *,
    held_out: bool,
    sigmas: Sequence[float] = VALIDATION_SIGMAS,
) -> Proof:
    """Compare what three models predict for the same examples, in the order of `predictions` at the same `sigmas`."""
    wanted = [target for target in targets for _ in sigmas]
    apart = [_squared_distance(one, other) for one, other in zip(lora, full, strict=True)]
    change = [_squared_distance(one, other) for one, other in zip(base, full, strict=True)]
    return Proof(
        examples=len(targets),
        held_out=held_out,
        loss={name: _mean_loss(found, wanted) for name, found in zip(MODELS, (base, lora, full), strict=True)},
        relative_error=_ratio(apart, change),
        relative_error_by_sigma={
            str(sigma): _ratio(apart[place :: len(sigmas)], change[place :: len(sigmas)])
            for place, sigma in enumerate(sigmas)
        },
    )


def _mean_loss(found: Sequence[Tensor], wanted: Sequence[Target]) -> float:
    losses = [
        float(
            flow.velocity_loss(
                velocity_CHW[None],
                target.velocity_CHW[None],
                None if target.weight_HW is None else target.weight_HW[None],
            )
        )
        for velocity_CHW, target in zip(found, wanted, strict=True)
    ]
    return sum(losses) / len(losses)


def _squared_distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


def _ratio(parts: Sequence[float], wholes: Sequence[float]) -> float:
    whole = sum(wholes)
    return math.sqrt(sum(parts) / whole) if whole else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def comparison_grid(
    prompts: Sequence[str],
    base: Sequence[Image.Image],
    lora: Sequence[Image.Image],
    full: Sequence[Image.Image],
) -> Image.Image:
    """The same prompts and seeds by three models: a row a prompt, the columns base, LoRA and full model."""
    cell = min(512, max(128, base[0].width))
    rows = [list(row) for row in zip(base, lora, full, strict=True)]
    return labelled_grid(rows, prompts, ["base", "LoRA", "full model"], cell)
