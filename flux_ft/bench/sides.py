"""One side of the training bench, in a process of its own: our step, or the peer's loop.

The peer trains as diffusers' FLUX LoRA example does (examples/dreambooth/train_dreambooth_lora_flux.py): peft's own
layers, whose factors take the base's dtype; accelerate; torch's AdamW; checkpoints of blocks; guidance 1. Side A is
that; B has what a careful user adds: compiled blocks, the fastest attention and the fused optimizer. All sides get the
same weights, LoRA factors, latents, texts, noise and sigmas.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from flux_ft import flow, quickstart
from flux_ft.adapters import lora
from flux_ft.bench.infer import RandomFlux1
from flux_ft.bench.profiling import profiled
from flux_ft.config import SMALLEST_MAX_PIXELS, RunConfig
from flux_ft.data.loader import pinned
from flux_ft.errors import ConfigError, FluxFTError
from flux_ft.families.base import Family
from flux_ft.families.registry import FLUX1_DEV, open_family
from flux_ft.infer.fit import machine_of
from flux_ft.infer.runner import release_memory
from flux_ft.plan import check_run
from flux_ft.runfile import load_run
from flux_ft.train import attention, determinism
from flux_ft.train.estimate import Estimator
from flux_ft.train.fitting import Room, choose, fit_run
from flux_ft.train.loop import TRAIN_GUIDANCE, step_batches, training_step
from flux_ft.train.setup import base_dtype, draw_prior, largest_tokens, make_accelerator, prepare_data, prepare_model
from flux_ft.types import Bucket, CachedExample, TextCond

if TYPE_CHECKING:
    from accelerate import Accelerator

RANK = 16
WARM_UP = 3
"""Steps before the timed ones, the one that is compared among them."""
EXTRA = 4
"""Steps after the timed ones, to count operations and to look where the time goes."""
ITERATIONS = 1000
"""Of the run that the steps are taken from: long enough that compiling is worth it."""
PROJECTIONS = 8
PEER = "peer"
"""Name of the adapter that the peer trains."""
OURS = "ours"
QUICKSTART = "quickstart"
OUT_OF_MEMORY = "out of memory"
NOT_HERE = "not on this machine"
NARROW = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4,
          "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}  # fmt: skip
"""FLUX.1's classes at a size that a CPU trains in a moment."""
Step = Callable[[int], tuple[float, float]]
"""From a step's number to its loss and its gradient's norm before clipping."""
Side = tuple[Step, dict[str, nn.Parameter], Callable[[], dict[str, Any]]]
"""A model that is ready to train, the LoRA's factors by place (none in a full fine-tune), and facts to tell at the
end."""


CELL = re.compile(
    r"(lora|full)-([1-9]\d{1,3})-b([1-9]\d{0,2})-(none|selective|full|auto)"
    r"(?:-(int8|fp8|nf4))?(?:-(fp8compute))?(?:-([1-9]\d{0,2})gb)?"
)


@dataclass(frozen=True)
class Cell:
    """What is trained: a "lora" of rank 16 on all linears of the blocks, or in "full" their weights, by us alone.

    QUICKSTART is the step of `flux-ft quickstart`, on flux-tiny whatever else is measured.
    """

    kind: str
    side_px: int
    batch: int
    recompute: str
    """As `memory.recompute`; the peer has no "selective" and takes "full" there, and for "auto" the first that fits."""
    base: str = ""
    """As `memory.base_precision`, if it is not the machine's own; of ours alone."""
    fp8_compute: bool = False
    cap_gb: int = 0
    """Memory of the card that may be taken, in 10⁹ bytes; 0 is all. Of ours alone."""

    @classmethod
    def parse(cls, name: str) -> Cell:
        """From its name, such as lora-1024-b1-full or lora-512-b1-full-nf4. Raises ConfigError."""
        if name == QUICKSTART:
            return cls(QUICKSTART, 64, 8, "auto")
        found = CELL.fullmatch(name)
        if not found or int(found[2]) % 16:
            raise ConfigError(
                f"`--cells {name}` is no cell",
                hint="write kind, side in pixels (a multiple of 16), batch and recompute policy, such as "
                "lora-1024-b1-full; behind it, if wished, int8, fp8 or nf4 for the base, fp8compute, a cap as 24gb; "
                "or write quickstart or targets",
            )
        base, fp8, cap = found[5] or "", bool(found[6]), int(found[7] or 0)
        return cls(found[1], int(found[2]), int(found[3]), found[4], base, fp8, cap)

    @property
    def problem(self) -> tuple[str, int, int]:
        """What is computed, however that is done: cells with the same must find the same loss and gradients."""
        return self.kind, self.side_px, self.batch

    @property
    def rounds_more(self) -> bool:
        """Whether it computes with a coarser base, so that its loss and gradients may differ."""
        return bool(self.base) or self.fp8_compute

    @property
    def is_ours_alone(self) -> bool:
        """The peer's full fine-tune, AdamW on all weights, takes over 95 GB; the others it has no like of."""
        return self.kind != "lora" or self.rounds_more or bool(self.cap_gb)


@dataclass(frozen=True)
class Job:
    """What one side is told."""

    side: str
    """Its name in SIDES, and behind ours, if wished, settings that this turn alone has: "ours speed.compile=off"."""
    cells: tuple[str, ...]
    full: bool
    """FLUX.1-dev's size; else NARROW."""
    steps: int
    seed: int = 0
    """Of noise and sigmas."""
    settings: tuple[str, ...] = ()
    """Of ours, as `key=value`; `memory.base_precision` holds for all sides."""
    profile: bool = False
    """Look where the time goes, in ours."""

    @property
    def count(self) -> int:
        """Steps of all kinds."""
        return WARM_UP + self.steps + EXTRA


def family_of(full: bool) -> RandomFlux1:
    """FLUX.1-dev with random weights, at full size or narrow."""
    return RandomFlux1(FLUX1_DEV, "random", "random", () if full else tuple(NARROW.items()))


def run_config(job: Job, cell: Cell, folder: Path) -> RunConfig:
    """Our run of a cell. Raises ConfigError for wrong settings."""
    memory = {"recompute": cell.recompute, "stream_blocks": "auto" if cell.cap_gb else 0}
    run: dict[str, Any] = {
        "data": {"path": ".", "max_pixels": max(SMALLEST_MAX_PIXELS, cell.side_px**2)}, "output": str(folder),
        "iterations": ITERATIONS, "finetune_type": cell.kind, "lora_rank": RANK, "seed": job.seed,
        "optim": {"batch_size": cell.batch} | ({"name": "adafactor"} if cell.kind == "full" else {}),
        "memory": memory | ({"base_precision": cell.base} if cell.base else {}),
        "speed": {"fp8_compute": cell.fp8_compute}, "preview": {"every": None},
    }  # fmt: skip
    if cell.kind == QUICKSTART:
        run = quickstart_settings(folder, job.seed)
    (folder / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    return load_run(folder / "run.yaml", [*job.settings, *job.side.split()[1:]]).config


def quickstart_settings(folder: Path, seed: int) -> dict[str, Any]:
    """The quickstart's run, its pictures written into `folder`."""
    seen = quickstart.write_pictures(folder / "pictures", seed)
    trials = quickstart.concept_trials(seen, seed), quickstart.prior_trials(seed)
    settings = quickstart.run_settings(folder, folder / "pictures", *trials, ITERATIONS, seed)
    # A step takes a few of the prior prompts; the base model draws each of them before the first.
    return settings | {"preview": {"every": None}, "prior": {"prompts": quickstart.prior_prompts(seed)[:8]}}


def examples_of(family: RandomFlux1, cell: Cell) -> list[CachedExample]:
    """Noise in place of encoded pictures and texts."""
    shape: dict[str, Any] = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | dict(family.shape)
    tokens, found = 16 if family.shape else family.variant.max_text_tokens, []
    for index in range(cell.batch):
        draw = partial(torch.randn, generator=flow.keyed_generator(0, "bench", index))
        text = TextCond(draw(1, tokens, shape["joint_attention_dim"]), draw(1, shape["pooled_projection_dim"]))
        latent = draw(family.latent_shape(cell.side_px, cell.side_px))
        found.append(CachedExample(str(index), Bucket(cell.side_px, cell.side_px), latent, None, (text,)))
    return found


def ours(job: Job, cell: Cell, folder: Path) -> Side:
    """What `flux-ft train` does in a step, on batches that were made ahead, as its threads do."""
    config, small = run_config(job, cell, folder), cell.kind == QUICKSTART
    family: Family = open_family("flux-tiny") if small else family_of(job.full)
    accelerator = make_accelerator(config, folder)
    config = _fitted(config, family, accelerator, cell.cap_gb * 1e9)
    examples: Sequence[CachedExample]
    prior: Sequence[CachedExample] = ()
    if small:
        data = prepare_data(config, check_run(config).report, family, accelerator, folder / "cache")
        state = prepare_model(config, family, accelerator, largest_tokens(family, data.examples))
        examples, prior = data.examples, draw_prior(config, family, data, state)
    else:
        examples = examples_of(family_of(job.full), cell)
        tokens = examples[0].texts[0].embeds_BLD.shape[1] + (cell.side_px // family.variant.pixel_multiple) ** 2
        state = prepare_model(config, family, accelerator, tokens)
    made = [step_batches(config, examples, range(cell.batch), step) for step in range(job.count)]
    if accelerator.device.type == "cuda":
        made = [[pinned(batch) for batch in batches] for batches in made]

    def step(index: int) -> tuple[float, float]:
        result = training_step(state, family, config, iter([made[index]]), prior)
        state.step += 1
        return result.loss, result.grad_norm

    factors = _factors(state.bare, lora.TRAINED) if cell.kind != "full" else {}

    def facts() -> dict[str, Any]:
        told = config.memory.model_dump() | config.speed.model_dump() | {"optimizer": state.optimizer} | state.kernels
        if accelerator.device.type == "cuda":
            told["planned_gb"] = Estimator(family, "cuda").estimate(config).training / 1e9
        return told

    return step, factors, facts


def _fitted(config: RunConfig, family: Family, accelerator: Accelerator, cap: float) -> RunConfig:
    """Our run with values in place of "auto", as `flux-ft train` fits it."""
    if not cap:
        return fit_run(config, family, accelerator).config
    host = machine_of(accelerator.device).host_bytes or math.inf
    return choose(Estimator(family, "cuda"), config, Room(cap, host)).config


def peer(job: Job, cell: Cell, folder: Path, careful: bool) -> Side:
    """The example's loop, or a `careful` user's."""
    config, family = run_config(job, cell, folder), family_of(job.full)
    accelerator = make_accelerator(config, folder)  # accelerate's own, with autocast to bfloat16 for such a base
    device, dtype = accelerator.device, base_dtype(config, accelerator.device)
    model: Any = family.load_denoiser(device, dtype)
    if cell.recompute != "none":
        model.enable_gradient_checkpointing()
    ranks = dict.fromkeys(family.lora_targets(model), RANK)
    lora.inject(model, PEER, ranks, {path: float(rank) for path, rank in ranks.items()})
    model.train()
    factors, facts = _factors(model, PEER), {"recompute": "none" if cell.recompute == "none" else "full"}
    batch = step_batches(config, examples_of(family, cell), range(cell.batch), 0)[0]
    latents, embeds, pooled = (one.to(device) for one in (batch.mean_BCHW, batch.text.embeds_BLD, batch.text.pooled_BP))
    draws = [_draws(family, cell, job.seed, index, device) for index in range(job.count)]
    if careful and device.type == "cuda":  # compiling for a CPU takes longer than the bench
        tokens = embeds.shape[1] + (cell.side_px // 16) ** 2
        heads, features = model.config.num_attention_heads, model.config.attention_head_dim
        shape = (cell.batch, tokens, heads, features)
        facts["attention"] = attention.KERNELS[attention.choose_attention("auto", shape, device, dtype)]
        model.set_attention_backend(facts["attention"])
        model.compile_repeated_blocks(fullgraph=True)
    optimizer = torch.optim.AdamW(
        list(factors.values()), lr=config.resolved_learning_rate, betas=(0.9, 0.999), weight_decay=1e-4,
        fused=careful or None,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(model, optimizer)
    channels, height, width = family.latent_shape(cell.side_px, cell.side_px)
    pipeline: Any = FluxPipeline

    def step(index: int) -> tuple[float, float]:
        noise, sigma = draws[index]
        with accelerator.accumulate(model):
            noised = flow.interpolate(latents, noise, sigma).to(dtype)
            predicted = model(
                hidden_states=pipeline._pack_latents(noised, cell.batch, channels, height, width),
                timestep=sigma.to(dtype),
                guidance=torch.full((cell.batch,), TRAIN_GUIDANCE, device=device),
                pooled_projections=pooled.to(dtype),
                encoder_hidden_states=embeds.to(dtype),
                txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
                img_ids=pipeline._prepare_latent_image_ids(cell.batch, height // 2, width // 2, device, dtype),
                return_dict=False,
            )[0]
            velocity = pipeline._unpack_latents(predicted, cell.side_px, cell.side_px, family.vae_scale)
            loss = (velocity.float() - (noise - latents)).square().flatten(1).mean(1).mean()
            accelerator.backward(loss)
            norm = cast(Tensor, accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    return step, factors, lambda: facts


SIDES: dict[str, Callable[[Job, Cell, Path], Side]] = {
    "A": partial(peer, careful=False),
    "B": partial(peer, careful=True),
    OURS: ours,
}


def _draws(family: RandomFlux1, cell: Cell, seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise and sigmas of our step with this number."""
    shape = family.latent_shape(cell.side_px, cell.side_px)
    draws = [flow.keyed_generator(seed, step, slot) for slot in range(cell.batch)]
    sigma = torch.stack([flow.draw_sigma(draw, family.shift_mu(*shape[1:])) for draw in draws])
    return torch.stack([flow.draw_noise(shape, draw) for draw in draws]).to(device), sigma.to(device)


def _factors(denoiser: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{kind}": factors[adapter].weight
        for path, layer in lora.layers_of(denoiser, adapter)
        for kind, factors in (("down", layer.lora_A), ("up", layer.lora_B))
    }


@torch.no_grad()
def fill(factors: Mapping[str, nn.Parameter]) -> None:
    """Give LoRA factors numbers that bf16 holds; with zeros, half of the gradients were zero."""
    for place, factor in factors.items():
        drawn = 0.02 * torch.randn(factor.shape, generator=flow.keyed_generator(0, "bench", place))
        factor.copy_(drawn.to(torch.bfloat16))


def digest(gradients: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Each gradient's products with PROJECTIONS vectors of random signs, the same in every process.

    The mean square of two digests' difference is the gradients' own (Johnson and Lindenstrauss 1984).
    """
    found = {}
    for place, gradient in gradients.items():
        generator = torch.Generator(gradient.device).manual_seed(flow.key_seed(0, place))
        signs = torch.randint(0, 2, (PROJECTIONS, gradient.numel()), generator=generator, device=gradient.device)
        found[place] = ((2.0 * signs - 1).double() @ gradient.double().flatten()).tolist()
    return found


def machine_rates(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a square product (8192³ in bf16; 1024³ in float32 on a CPU); GB/s of a copy, read and written."""
    on_gpu = device.type == "cuda"
    size, times = (8192, 10) if on_gpu else (1024, 1)
    square = torch.randn(size, size, device=device).to(torch.bfloat16 if on_gpu else torch.float32)
    product, source = torch.empty_like(square), torch.ones(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def rate(act: Callable[[], object], amount: float) -> float:
        def several() -> None:
            for _ in range(times):
                act()

        return amount * times / statistics.median([_timed(several, device) for _ in range(6)][1:])

    return {
        "matmul_tflops": rate(lambda: torch.mm(square, square, out=product), 2 * size**3) / 1e12,
        "copy_gbps": rate(lambda: target.copy_(source), 2 * source.numel()) / 1e9,
    }


def _timed(act: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    act()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts torch's operations, less those that only look at memory in another way."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _measure(job: Job, cell: Cell, device: torch.device, ask: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    began, on_gpu = time.perf_counter(), device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        step, factors, facts = SIDES[job.side.split()[0]](job, cell, Path(folder))
        config = run_config(job, cell, Path(folder))
    began += _timed(partial(fill, factors), device)  # no run has to
    gradients: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        gradients.update({place: one.grad.detach().clone() for place, one in factors.items() if one.grad is not None})

    mode = determinism.resolve(config.determinism, device.type) if job.side.startswith(OURS) else "fast"
    with determinism.applied(mode, device):
        handle = register_optimizer_step_pre_hook(look)
        loss, norm = step(0)
        first_s = time.perf_counter() - began
        handle.remove()
        dtype = str(base_dtype(config, device)).removeprefix("torch.")
        probe = {"loss": loss, "norm": norm, "dtype": dtype, "gradients": digest(gradients)}
        gradients.clear()
        if not ask({"probe": probe}):
            return {"why_not": "refused"}
        for index in range(1, WARM_UP):
            step(index)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        cpu_began = time.process_time()
        seconds = [_timed(partial(step, WARM_UP + index), device) for index in range(job.steps)]
        cpu_s = (time.process_time() - cpu_began) / job.steps
        found: dict[str, Any] = {"seconds": seconds, "cpu_s": cpu_s, "first_s": first_s, "facts": facts()}
        found["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None
        further = iter(range(job.count - EXTRA, job.count))
        if not on_gpu:  # compiled blocks have none that could be counted
            with Operations() as operations:  # type: ignore[no-untyped-call]
                step(next(further))
            found["operations"] = operations.count
        if job.profile and job.side.startswith(OURS):
            found["profile"] = profiled(lambda: step(next(further)), EXTRA - 1, device, statistics.median(seconds))
    return found


def _measured(job: Job, name: str, device: torch.device, ask: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What there is to say of a cell: its figures, or "why_not"."""
    cell, is_ours = Cell.parse(name), job.side.startswith(OURS)
    if cell.cap_gb and device.type != "cuda":
        return {"why_not": f"{NOT_HERE}: only the memory of a CUDA card can be capped"}
    if device.type == "cuda":
        all_of_it = torch.cuda.get_device_properties(device).total_memory
        share = cell.cap_gb * 1e9 / all_of_it if cell.cap_gb else 1.0
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    policies = ("none", "full") if cell.recompute == "auto" and not is_ours else (cell.recompute,)
    for policy in policies:
        try:
            return _measure(job, replace(cell, recompute=policy), device, lambda probe: ask({"cell": name} | probe))
        except torch.OutOfMemoryError:
            found = {"why_not": OUT_OF_MEMORY}
        except FluxFTError as error:
            found = {"why_not": f"{NOT_HERE}: {error.message}" if cell.rounds_more else error.message}
        release_memory()
        torch.compiler.reset()
    return found


def main() -> None:
    """Do the job that stdin tells and write JSON lines: what this runs on; and for each cell what its first step
    computed, whereupon the answer "go" or "leave out" is waited for, and its times."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is none of the parent's business

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    def ask(message: dict[str, Any]) -> bool:
        say(message)
        answer = sys.stdin.readline()
        return answer == "go\n" if answer else sys.exit(1)  # nobody is listening any more

    job = Job(**json.loads(sys.stdin.readline()))
    if job.side.startswith(OURS):
        determinism.prepare_environment()
    else:
        os.environ.pop(determinism.CUBLAS_VARIABLE, None)  # the peer leaves cuBLAS as it is
    with tempfile.TemporaryDirectory() as folder:
        plain = replace(Cell.parse(job.cells[0]), base="", fp8_compute=False)  # what it has no like of comes later
        device = make_accelerator(run_config(job, plain, Path(folder)), Path(folder)).device
    versions = {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say({"device": name, "versions": versions, "rates": machine_rates(device)})
    for cell in job.cells:
        say({"cell": cell, "run": _measured(job, cell, device, ask)})
        release_memory()
        torch.compiler.reset()
