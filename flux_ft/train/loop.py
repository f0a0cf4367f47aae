"""The training loop, and only the loop. One for every family, LoRA or full, one process or many.

Shapes in names: B batch, C latent channels, H W latent grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flux_ft import flow, log
from flux_ft.adapters import lora
from flux_ft.config import RunConfig
from flux_ft.data.loader import BatchPlan, collate, draw_text, made_ahead, on_device, pinned, resampled
from flux_ft.data.share import ALONE, Share
from flux_ft.errors import NonFiniteError, NumbersError, some_of
from flux_ft.families.base import Family
from flux_ft.families.quantize import compute_dtype
from flux_ft.train.optim import rate_factor
from flux_ft.train.setup import TrainData, TrainState, share_of
from flux_ft.types import Batch, CachedExample, TextCond

TRAIN_GUIDANCE = 1.0
"""Guidance-embedded models learn at guidance 1, the value that stands for "no guidance" in their distillation."""
VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
NORMS_KEPT = 50
"""Steps whose gradients a spike is told by."""
NORMS_NEEDED = 20
"""Steps before any is taken for a spike: the first ones differ much."""
SPIKES_AT_MOST = 5
"""In a row; then they are no spikes but how things are."""


class Wish(IntEnum):
    """What is wanted between two steps; of several processes' wishes the strongest holds for all."""

    GO_ON = 0
    SAVE = 1
    STOP = 2
    """After saving."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, measured. `loss` is the mean over the global batch; `grad_norm` is before clipping."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    sigma: float
    prior_loss: float | None
    """How far the model has moved on the prior prompts; None without any, and between the steps that look."""
    seconds: float
    examples: int
    left_out: bool = False
    """A spike, so no weight was moved."""


@dataclass(frozen=True)
class Acts:
    """What happens between steps, each given the number of steps done."""

    log: Callable[[StepResult], None]
    validate: Callable[[int], None]
    preview: Callable[[int], None]
    save: Callable[[int, bool], None]
    """Given as well whether by a wish, and not only because it is due."""
    wish: Callable[[], Wish]


def train_steps(
    state: TrainState,
    family: Family,
    config: RunConfig,
    data: TrainData,
    prior: Sequence[CachedExample],
    acts: Acts,
) -> bool:
    """Go from `state.step` to `config.iterations`. Returns False when asked to stop before the end.

    Raises NonFiniteError, before the update, when a loss or gradient is not finite.
    """
    world = state.accelerator.num_processes
    global_batch = config.optim.batch_size * config.optim.accumulate * world
    plan = BatchPlan([row.bucket for row in data.examples.rows], global_batch, config.iterations, config.seed)
    # At the first step, and at a checkpoint's, after which the run was stopped or killed.
    is_end = state.step in (0, config.iterations)
    if is_end or due(state.step, config.preview.every):
        acts.preview(state.step)
    if is_end or due(state.step, config.validation.every):
        acts.validate(state.step)
    share = share_of(state.accelerator)

    def make(step: int) -> list[Batch]:
        batches = step_batches(config, data.examples, plan.indices(step), step, share, data.blank)
        return [pinned(batch) for batch in batches] if state.accelerator.device.type == "cuda" else batches

    with closing(made_ahead(make, range(state.step, config.iterations), config.data.workers)) as batches:
        while state.step < config.iterations:
            result = training_step(state, family, config, batches, prior)
            state.step += 1
            done = state.step == config.iterations
            acts.log(result)
            wish = Wish.GO_ON if done else strongest(state.accelerator, acts.wish())
            every = config.checkpoint.every
            # Saved before anything that takes long: who stops a run may not wait for its pictures.
            if wish >= Wish.SAVE or (every is not None and (done or due(state.step, every))):
                acts.save(state.step, wish >= Wish.SAVE)
            if wish is Wish.STOP:  # a resumed run measures and draws what is due at its first step
                return False
            if done or due(state.step, config.validation.every):
                acts.validate(state.step)
            if done or due(state.step, config.preview.every):
                acts.preview(state.step)
    return True


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether a flag is up in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


def of_all_processes(accelerator: Accelerator, names: Sequence[str]) -> list[str]:
    """The names that each process has, those of the first process first."""
    every: list[str] = gather_object(list(names))
    return every


def strongest(accelerator: Accelerator, wish: Wish) -> Wish:
    """The strongest wish of any process, so that all of them save or stop at the same step."""
    if accelerator.num_processes == 1:
        return wish
    return Wish(int(accelerator.gather(torch.tensor([int(wish)], device=accelerator.device)).max()))


def due(step: int, every: int | None) -> bool:
    """Whether something that happens `every` so many steps happens now."""
    return every is not None and step % every == 0


def training_step(
    state: TrainState,
    family: Family,
    config: RunConfig,
    batches: Iterator[Sequence[Batch]],
    prior: Sequence[CachedExample] = (),
) -> StepResult:
    """One optimizer step on the next of `batches`: this process's share of a global batch, a batch a micro-step.

    Waiting for it is part of the step's time.
    """
    started = time.perf_counter()
    accelerator = state.accelerator
    rate = config.resolved_learning_rate * rate_factor(
        config.schedule.name, state.step, config.iterations, config.schedule.warmup_steps
    )
    state.updates.begin(state.step, rate)
    losses: list[Tensor] = []
    drifts: list[Tensor] = []
    sigmas: list[Tensor] = []
    names: list[str] = []
    norm, left_out = math.nan, False
    for batch in next(batches):
        with accelerator.accumulate(state.denoiser):
            loss_B, sigma_B = batch_loss(state, family, config, batch)
            total = loss_B.mean()
            if prior and due(state.step, config.prior.every):
                drift = prior_drift(state, family, config, prior, batch.slots).mean()
                total = total + config.prior.every * config.prior.weight * drift
                drifts.append(drift.detach())
            losses.append(loss_B.detach())
            sigmas.append(sigma_B)
            names += batch.names
            if state.updates.fused_backward:  # the last moment at which no weight has moved
                refuse_non_finite(torch.cat(losses), 0.0, names, state.step, accelerator)
            accelerator.backward(total)
            if accelerator.sync_gradients:
                norm = gradient_norm(state, config.optim.max_grad_norm or math.inf)
                every_loss = accelerator.gather(torch.cat(losses))
                refuse_non_finite(every_loss, norm, names, state.step, accelerator)
                left_out = is_spike(state, config.optim.spike_factor, norm, names)
                state.updates.finish(move=not left_out)
    if state.average is not None and state.average.due(state.step + 1):
        state.settle()
        state.average.update(state.step + 1, state.updates.precise)
    return StepResult(
        step=state.step + 1,
        loss=float(every_loss.mean()),
        grad_norm=norm,
        learning_rate=rate,
        sigma=float(torch.cat(sigmas).mean()),
        prior_loss=float(torch.stack(drifts).mean()) if drifts else None,
        seconds=time.perf_counter() - started,
        examples=len(names) * accelerator.num_processes,
        left_out=left_out,
    )


def gradient_norm(state: TrainState, limit: float) -> float:
    """The norm of all gradients, which are then scaled down to `limit`; a fused backward pass has done so already."""
    if state.updates.fused_backward:
        return float(state.updates.norm())
    return float(state.accelerator.clip_grad_norm_(list(state.trained.values()), limit))


def is_spike(state: TrainState, factor: float | None, norm: float, names: Sequence[str]) -> bool:
    """Whether a gradient is `factor` times longer than the median of the last steps', which is said and remembered.

    Raises NumbersError when that has happened too often in a row.
    """
    if factor is None:
        return False
    usual = median(state.norms) if len(state.norms) >= NORMS_NEEDED else math.inf
    if norm <= factor * usual:
        state.norms, state.spikes = [*state.norms, norm][-NORMS_KEPT:], 0
        return False
    state.spikes += 1
    told = f"step {state.step + 1} is left out: its gradient's norm is {norm:.3g}, the usual one {usual:.3g}"
    names = of_all_processes(state.accelerator, names)
    which = f"Pictures: {some_of(list(dict.fromkeys(names)))}"
    if state.spikes > SPIKES_AT_MOST:
        raise NumbersError(
            f"{told}, and so were the {SPIKES_AT_MOST} before it. {which}",
            hint="lower `learning_rate` or raise `optim.spike_factor`, and start a new run with another `output`",
        )
    log.warn(f"{told}. {which}")
    return True


def step_batches(
    config: RunConfig,
    examples: Sequence[CachedExample],
    indices: Sequence[int],
    step: int,
    share: Share = ALONE,
    blank: TextCond | None = None,
) -> list[Batch]:
    """This process's share of the global batch `indices`, a batch a micro-step; keyed by step and slot alone.

    `blank` is the encoding of the empty caption, for caption dropout.
    """
    choose = partial(draw_text, seed=config.seed, step=step, dropout=config.data.caption_dropout, blank=blank)
    return [
        resampled(collate(examples, [indices[slot] for slot in slots], slots, choose), config.seed, step)
        for slots in own_slots(config, share.count, share.index)
    ]


def own_slots(config: RunConfig, world: int, rank: int) -> Iterator[tuple[int, ...]]:
    """This process's slots of the global batch, a tuple a micro-step. Slots key the noise, so they are never shared."""
    size = config.optim.batch_size
    for micro_step in range(config.optim.accumulate):
        first = (micro_step * world + rank) * size
        yield tuple(range(first, first + size))


def batch_loss(state: TrainState, family: Family, config: RunConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted loss and sigma of each example (B,), with noise keyed by (seed, step, slot)."""
    batch = on_device(batch, state.accelerator.device)
    noise_BCHW, sigma_B = keyed_draws(state, family, config, batch, state.step)
    if config.lora.dropout:
        # Dropout takes its draws from the global state: tie that to the step as well.
        torch.manual_seed(flow.keyed_generator(config.seed, "dropout", state.step, batch.slots[0]).initial_seed())
    loss_B = flow_loss(state, family, batch, noise_BCHW, sigma_B)
    if batch.loss_weight_B is not None:
        loss_B = loss_B * batch.loss_weight_B.to(loss_B.device)
    return loss_B, sigma_B


def prior_drift(
    state: TrainState, family: Family, config: RunConfig, prior: Sequence[CachedExample], slots: Sequence[int]
) -> Tensor:
    """How far the velocity has moved from the base model's on prior prompts (B,): mean squared difference.

    Prior preservation as in DreamBooth (Ruiz et al. 2023, arXiv 2208.12242), with the base model's prediction as the
    target in place of the noise, which asks for no change at all rather than for another fit. With `prior.every` it is
    asked for in some steps only, and weighs as much more (lazy regularisation, Karras et al. 2020, arXiv 1912.04958).
    """
    batch, noise_BCHW, sigma_B = prior_batch(state, family, config, prior, state.step, slots)
    if state.kept_velocity:
        target = state.kept_velocity[state.step, tuple(slots)].to(noise_BCHW.device)
    else:
        with torch.no_grad(), lora.detached(state.bare):
            target = predict(state, family, batch, noise_BCHW, sigma_B)
    return flow.velocity_loss(predict(state, family, batch, noise_BCHW, sigma_B), target)


def prior_batch(
    state: TrainState,
    family: Family,
    config: RunConfig,
    prior: Sequence[CachedExample],
    step: int,
    slots: Sequence[int],
) -> tuple[Batch, Tensor, Tensor]:
    """The prior prompts of a step, with noise and sigma: they follow from (seed, step, slot) alone."""
    picks = [flow.keyed_generator(config.seed, "prior", step, slot) for slot in slots]
    indices = [int(torch.randint(len(prior), (), generator=generator)) for generator in picks]
    batch = collate(prior, indices, slots)
    return batch, *keyed_draws(state, family, config, batch, step, "prior noise")


@torch.no_grad()
def keep_base_velocity(
    state: TrainState, family: Family, config: RunConfig, prior: Sequence[CachedExample], first_step: int
) -> None:
    """Ask the base model all that a full fine-tune will ask it on prior prompts, while there still is one.

    The noise of a step follows from its number, so this can be known before. About 0.5 MB a picture and step at 1 MP.
    """
    if not prior or config.finetune_type != "full":
        return
    accelerator = state.accelerator
    steps = [step for step in range(first_step, config.iterations) if due(step, config.prior.every)]
    with log.progress("ask the base", len(steps)) as bar:
        for step in steps:
            for slots in own_slots(config, accelerator.num_processes, accelerator.process_index):
                batch, noise_BCHW, sigma_B = prior_batch(state, family, config, prior, step, slots)
                state.kept_velocity[step, slots] = predict(state, family, batch, noise_BCHW, sigma_B).cpu()
            bar.advance()


def keyed_draws(
    state: TrainState, family: Family, config: RunConfig, batch: Batch, step: int, *purpose: str
) -> tuple[Tensor, Tensor]:
    """Noise (B, C, H, W) and sigma (B,) of a batch, on the device, keyed by (seed, purpose, step, slot)."""
    device, shape = state.accelerator.device, tuple(batch.mean_BCHW.shape[1:])
    mu = family.shift_mu(shape[1], shape[2])
    draws = [flow.keyed_generator(config.seed, *purpose, step, slot) for slot in batch.slots]
    sigma_B = torch.stack([flow.draw_sigma(generator, mu) for generator in draws])
    noise_BCHW = torch.stack([flow.draw_noise(shape, generator) for generator in draws])
    return noise_BCHW.to(device), sigma_B.to(device)


def flow_loss(state: TrainState, family: Family, batch: Batch, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Mean squared velocity error of each example (B,); a pure function of weights, batch, noise and sigma.

    The latents are the batch's means; masks weight the places, `loss_weight_B` is left to the caller.
    """
    predicted = predict(state, family, batch, noise_BCHW, sigma_B)
    device = noise_BCHW.device
    target_BCHW = flow.velocity_target(batch.mean_BCHW.to(device, torch.float32), noise_BCHW)
    weight_BHW = None if batch.weight_BHW is None else batch.weight_BHW.to(device)
    return flow.velocity_loss(predicted, target_BCHW, weight_BHW)


def predict(state: TrainState, family: Family, batch: Batch, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The denoiser's velocity for a batch noised to `sigma_B`, at the guidance of training."""
    dtype, device = compute_dtype(state.bare), noise_BCHW.device
    x0_BCHW = batch.mean_BCHW.to(device, torch.float32)
    z_BCHW = flow.interpolate(x0_BCHW, noise_BCHW, sigma_B).to(dtype)
    text = TextCond(batch.text.embeds_BLD.to(device, dtype), batch.text.pooled_BP.to(device, dtype))
    return family.predict_velocity(state.denoiser, z_BCHW, sigma_B, text, TRAIN_GUIDANCE)


def refuse_non_finite(losses: Tensor, norm: float, names: Sequence[str], step: int, accelerator: Accelerator) -> None:
    """Raise NonFiniteError, naming the pictures, unless every loss of all processes and the norm are finite.

    `names` are this process's pictures; `losses` and `norm` the same in every process, so that all raise or none does.
    """
    if math.isfinite(norm) and bool(torch.isfinite(losses).all()):
        return
    names = of_all_processes(accelerator, names)
    bad = [name for name, loss in zip(names, losses.tolist(), strict=True) if not math.isfinite(loss)]
    what, which = ("loss", bad) if bad else ("gradient", names)
    raise NonFiniteError(
        f"the {what} of step {step + 1} is not a finite number; nothing of that step is saved. "
        f"Pictures: {', '.join(dict.fromkeys(which))}",
        hint="look at these pictures, lower `learning_rate` or set `memory.base_precision: fp32`, and start a new run "
        "with another `output`; going on unchanged would meet the same numbers again",
    )


@torch.no_grad()
def validation_loss(
    state: TrainState, family: Family, config: RunConfig, examples: Sequence[CachedExample]
) -> dict[str, float]:
    """Mean loss on held-out examples at fixed sigmas and fixed noise: "validation_loss" and one value a sigma.

    On the means of the latents and on captions as written; the noise is keyed by the pictures' digests. Every process
    measures its share and gets the whole result.
    """
    was_training = state.denoiser.training
    state.denoiser.eval()
    share = share_of(state.accelerator)
    own: list[Tensor] = []
    for index, _ in share.turns(len(examples)):
        example = examples[index]
        batch = collate([example], [0], [0])
        generator = flow.keyed_generator(config.seed, "validation", example.digest)
        noise = flow.draw_noise(tuple(batch.mean_BCHW.shape), generator).to(state.accelerator.device)
        sigmas = (torch.full((1,), sigma, device=noise.device) for sigma in VALIDATION_SIGMAS)
        own.append(torch.cat([flow_loss(state, family, batch, noise, sigma_B) for sigma_B in sigmas]))
    state.denoiser.train(was_training)
    # A row of sigmas for each turn, first all of one process; put back into the pictures' order, so that the sum is
    # the same for any number of processes.
    every = state.accelerator.gather(torch.stack(own)).unflatten(0, (share.count, -1)).transpose(0, 1).flatten(0, 1)
    columns = zip(*every[: len(examples)].tolist(), strict=True)
    means = {sigma: sum(values) / len(values) for sigma, values in zip(VALIDATION_SIGMAS, columns, strict=True)}
    row: dict[str, Any] = {"validation_loss": sum(means.values()) / len(means)}
    return row | {f"validation_loss_sigma_{sigma}": value for sigma, value in means.items()}
