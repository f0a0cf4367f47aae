"""What a run will need, before it is started: memory by part, disk, operations and time, without any weights.

    RunConfig + Family ─Estimator.estimate→ Estimate;  several of them ─alternatives, make_plan→ Plan

A step of the real classes, with what the run trains attached and its recompute policy, is done with tensors that have
shapes and no numbers (torch's FakeTensor), and every storage is counted while it is alive. Blocks of a kind are alike,
so two of each are enough: what one more block of a kind would keep, and hold as gradients, is added as often as the
model has more of them, at every moment of the step (forward and backward pass of the first and last block of a kind).

Kernels' own workspaces are not seen: for these, and for the allocator, there are `infer/fit.py`'s WORKSPACE_BYTES and
FRAGMENTATION, which have not been measured in training.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from huggingface_hub import try_to_load_from_cache
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flux_ft import flow
from flux_ft.adapters import lora
from flux_ft.config import RunConfig
from flux_ft.errors import FluxFTError, ModelError
from flux_ft.families.base import Family
from flux_ft.families.hub import is_hub_id
from flux_ft.families.registry import open_family
from flux_ft.infer import fit
from flux_ft.plan import training_areas
from flux_ft.train.checkpoint import SPARE_BYTES
from flux_ft.train.loop import TRAIN_GUIDANCE
from flux_ft.train.optim import LARGE_PARAMETERS, OPTIMIZERS, ROUNDINGS, Updates, resolve_optimizer
from flux_ft.train.recompute import Policy, apply_recompute
from flux_ft.train.resume import checkpoint_bytes, export_bytes
from flux_ft.train.setup import attach_lora, base_dtype, choose_weights, encoder_dtype, fuses_backward
from flux_ft.train.stream import choose_streamed
from flux_ft.types import TextCond

H100_RATE = 798e12
"""FLOP/s of an H100 in a bf16 8192³ matrix product, for times where there is no GPU to measure."""
CARDS_GB = (8, 12, 16, 24, 32, 48, 80, 141)
"""Memory of usual cards, in units of 2³⁰ bytes."""
CARD_SHARE = 0.98
"""Of a card's memory that is free when nothing runs on it: assumed, by what drivers keep of 24 and 80 GB cards."""
DEPTHS = ("num_layers", "num_single_layers")
"""How diffusers names the numbers of double and single blocks."""
WORTH_SAYING = 0.03
"""Share of a step's memory that a change must save to be told of."""

MOVING = ("gradients", "activations", "recompute and workspace")
"""The parts of a step's memory that are gone between steps."""
LOADING = "weights while loading"
DeviceType = Literal["cpu", "cuda"]
ATTENTION_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


# --- One step without numbers. ---


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations made within and that are alive; their most, and the FLOPs, by phase."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.kept = 0
        """All, and what was alive at the end of the forward pass."""
        self.gradients: dict[int, int] = {}
        """Of them, what is held as a parameter's gradient."""
        self.peaks: dict[str, tuple[int, int, int]] = {}
        """All, kept, gradients at each phase's highest moment."""
        self.flops: dict[str, float] = {}
        """Of matrix products and attention, by the formulas of torch's FlopCounterMode."""
        self.kept_of: dict[str, int] = {}
        """What is kept, by the phase that made it."""
        self.phase = ""
        self._alive: dict[int, tuple[int, str]] = {}
        self._kept: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := _formula(func.overloadpacket):
            self.flops[self.phase] = self.flops.get(self.phase, 0.0) + formula(*args, **kwargs, out_val=out)
        made = {one.untyped_storage()._cdata: one for one in tree_leaves(out) if isinstance(one, Tensor)}
        if made.keys() - self._alive.keys():
            given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            for key in made.keys() - self._alive.keys() - given:
                storage = made[key].untyped_storage()
                self._alive[key] = (storage.nbytes(), self.phase)
                self.total += storage.nbytes()
                weakref.finalize(storage, self._gone, key)
        self.look()
        return out

    def _gone(self, key: int) -> None:
        size, _ = self._alive.pop(key)
        self.total -= size
        if key in self._kept:
            self._kept.remove(key)
            self.kept -= size

    def enter(self, phase: str) -> None:
        """From here on it is this phase."""
        self.phase = phase
        self.look()

    def look(self, extra: int = 0) -> None:
        """Note what is alive, and `extra` that is for a moment, if that is the phase's most."""
        if self.total + extra > self.peaks.get(self.phase, (-1,))[0]:
            self.peaks[self.phase] = (self.total + extra, self.kept, sum(self.gradients.values()))

    def forward_is_done(self) -> None:
        """What is alive now, but for gradients, is kept for the backward pass."""
        self._kept = self._alive.keys() - self.gradients.keys()
        self.kept_of = {}
        for key in self._kept:
            size, phase = self._alive[key]
            self.kept_of[phase] = self.kept_of.get(phase, 0) + size
        self.kept = sum(self.kept_of.values())


def _formula(packet: Any) -> Any:
    name = str(packet).removeprefix("aten.")
    if name.startswith(ATTENTION_ON_CPU):  # torch has formulas for GPUs' alone
        packet = getattr(torch.ops.aten, name.replace("_for_cpu", ""))
    return flop_registry.get(packet)


def _cuda_norm(widen: bool, norm: Any, given: Tensor) -> Tensor:
    """A norm as CUDA does it: in one kernel, and under autocast in float32, which the CPU's autocast leaves out."""
    weight = norm.weight
    if widen:
        given, weight = given.float(), None if weight is None else weight.float()
    if isinstance(norm, nn.RMSNorm):
        result: Tensor = torch.ops.aten._fused_rms_norm(given, norm.normalized_shape, weight, norm.eps)[0]
        return result
    return F.layer_norm(given, norm.normalized_shape, weight, norm.bias, norm.eps)


def _mark(live: LiveBytes, kind: str, place: str, block: nn.Module) -> None:
    """Let `live` know when this block begins its passes; being run again is part of the backward pass."""

    def before(*_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            live.enter(f"forward {kind} {place}")

    def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            for one in outputs:
                if one.requires_grad:
                    one.register_hook(lambda gradient: live.enter(f"backward {kind} {place}"))
            live.enter("between")

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def outline(family: Family, dtype: torch.dtype, depth: tuple[int, ...] | None = None) -> Any:
    """The family's denoiser on the meta device, frozen, at its own depth or with so many (double, single) blocks.

    Where its configuration is not on this machine, diffusers' defaults are taken, which are FLUX.1-dev's.
    """
    settings = _settings(family) | (dict(zip(DEPTHS, depth, strict=True)) if depth else {})
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel.from_config(settings)
    return nn.Module.to(denoiser, dtype).requires_grad_(False)


def _settings(family: Family) -> dict[str, Any]:
    name, known = "transformer/config.json", {"guidance_embeds": family.variant.guidance_embedded}
    if shape := getattr(family, "shape", None):  # random weights
        return known | dict(shape)
    source = family.source
    where = getattr(family, "parts", source) if source.endswith(".safetensors") else source
    file = try_to_load_from_cache(where, name) if is_hub_id(where) else Path(where).expanduser() / name
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return known
    return dict(json.loads(Path(file).read_text(encoding="utf-8"))) | known


class Step(NamedTuple):
    """What one optimizer step takes beside weights and states: bytes at its highest moment, and FLOPs."""

    total: float
    kept: float
    gradients: float
    flops: float


def measure_step(
    config: RunConfig,
    family: Family,
    device_type: DeviceType,
    policy: Policy,
    optimizer: str,
    side_px: int,
    own_depth: tuple[int, int],
) -> Step:
    """A step on pictures of side_px². Raises ConfigError for targets that match nothing."""
    dtype, full = base_dtype(config, torch.device(device_type)), config.finetune_type == "full"
    patterns = config.full.train if full else config.lora.targets
    # Patterns may choose single blocks, so they are measured at the model's own depth.
    few = not isinstance(patterns, tuple) and min(own_depth) >= 2 and sum(own_depth) > 4
    depth = (2, 2) if few else own_depth
    denoiser = outline(family, dtype, depth)
    names = set(choose_weights(config, family, denoiser) if full else attach_lora(config, family, denoiser))
    apply_recompute(denoiser.train(), policy)
    narrow = not full and dtype is torch.bfloat16
    live, fused = LiveBytes(), fuses_backward(config, 1)
    kinds: dict[str, list[nn.Module]] = {}
    for path, block in family.blocks(denoiser).items():
        kinds.setdefault(path.rpartition(".")[0], []).append(block)
    for kind, blocks in kinds.items():
        for index, block in enumerate(blocks):
            _mark(live, kind, "last" if index == len(blocks) - 1 else "first" if not index else str(index), block)
    fake = FakeTensorMode()
    with fake:
        for module in denoiser.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(one.shape, dtype=one.dtype), one.requires_grad)
            if device_type == "cuda" and isinstance(module, nn.LayerNorm | nn.RMSNorm):
                setattr(module, "forward", partial(_cuda_norm, narrow, module))  # noqa: B010 (mypy knows it as a method)
        trained = [one for name, one in denoiser.named_parameters() if name in names]
    moving = update_bytes(config, optimizer, trained[0].dtype)

    def took(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if fused:
            live.look(int(moving * parameter.numel()))
            parameter.grad = None
        else:
            live.gradients[parameter.grad.untyped_storage()._cdata] = parameter.grad.nbytes

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(took)
    passes = min(2, config.optim.accumulate)
    with fake, live:
        for _ in range(passes):
            live.enter("start")
            loss = _loss(config, family, denoiser, narrow, dtype, side_px)
            live.forward_is_done()
            torch.autograd.backward([loss])
            del loss
        live.enter("update")
        live.look(0 if fused else int(moving * max(one.numel() for one in trained)))
    step = _at_depth(live, kinds, own_depth, fused, gradients_stay=passes > 1)
    return step._replace(flops=step.flops * config.optim.accumulate / passes)


def _at_depth(
    live: LiveBytes, kinds: Mapping[str, list[nn.Module]], depth: tuple[int, int], fused: bool, gradients_stay: bool
) -> Step:
    """What was measured with these blocks, at another depth."""
    (double, doubles), (single, singles) = kinds.items()
    more = (depth[0] - len(doubles), depth[1] - len(singles))
    # The first double block's inputs have no gradient, so it keeps less; a block's output is the next one's input.
    kept_of = (live.kept_of.get(f"forward {double} last", 0), live.kept_of.get(f"forward {single} first", 0))
    gradients_of = tuple(
        0 if fused else sum(one.nbytes for one in blocks[-1].parameters() if one.requires_grad)
        for blocks in (doubles, singles)
    )
    keeping = {
        f"forward {double} last": (1, 0), f"forward {single} first": (1, 0), f"forward {single} last": (1, 1),
        "between": (1, 1), f"backward {single} last": (1, 1), f"backward {single} first": (1, 0),
        f"backward {double} last": (1, 0),
    }  # fmt: skip
    holding = {
        f"backward {single} first": (0, 1), f"backward {double} last": (0, 1), f"backward {double} first": (1, 1),
        "update": (1, 1),
    }  # fmt: skip

    def grown(there: tuple[int, int], sizes: tuple[int, ...]) -> int:
        return sum(count * is_there * size for count, is_there, size in zip(more, there, sizes, strict=True))

    moments = []
    for phase, (total, kept, gradients) in live.peaks.items():
        if phase == "between":  # after the last block, all is there that will be kept, and not yet counted as such
            kept = min(total, sum(live.kept_of.values()))
        further_kept = grown(keeping.get(phase, (0, 0)), kept_of)
        further = grown((1, 1) if gradients_stay else holding.get(phase, (0, 0)), gradients_of)
        moments.append((total + further_kept + further, kept + further_kept, gradients + further))
    a_block = tuple(live.flops[f"forward {kind} last"] + live.flops[f"backward {kind} last"] for kind in kinds)
    flops = sum(live.flops.values()) + sum(count * one for count, one in zip(more, a_block, strict=True))
    return Step(*max(moments), flops)


def _loss(
    config: RunConfig, family: Family, denoiser: nn.Module, narrow: bool, dtype: torch.dtype, side_px: int
) -> Tensor:
    """What `train/loop.py` takes the gradient of, for one batch; accelerate makes the velocity float32."""

    def prepared(**inputs: Any) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            outputs = denoiser(**inputs)
        return tuple(one.float() for one in outputs)

    batch, settings = config.optim.batch_size, cast(Any, denoiser).config
    x0_BCHW, noise_BCHW = (torch.empty(batch, *family.latent_shape(side_px, side_px)) for _ in range(2))
    sigma_B, model = torch.empty(batch), cast(nn.Module, prepared)
    embeds_BLD = torch.empty(batch, family.variant.max_text_tokens, settings.joint_attention_dim, dtype=dtype)
    text = TextCond(embeds_BLD, torch.empty(batch, settings.pooled_projection_dim, dtype=dtype))
    z_BCHW = flow.interpolate(x0_BCHW, noise_BCHW, sigma_B).to(dtype)
    predict = partial(family.predict_velocity, model, z_BCHW, sigma_B, text, TRAIN_GUIDANCE)
    loss = flow.velocity_loss(predict(), flow.velocity_target(x0_BCHW, noise_BCHW)).mean()
    if not (config.prior.prompts and config.prior.weight):
        return loss
    target_BCHW = noise_BCHW
    if config.finetune_type == "lora":
        with torch.no_grad(), lora.detached(denoiser):
            target_BCHW = predict()
    return loss + config.prior.weight * flow.velocity_loss(predict(), target_BCHW).mean()


def update_bytes(config: RunConfig, optimizer: str, dtype: torch.dtype) -> float:
    """Bytes a weight that are alive for a moment while it is moved, by moving some with the real `Updates`.

    8-bit AdamW is taken to need what AdamW does.
    """
    name = "adamw" if OPTIMIZERS[optimizer].in_blocks else optimizer
    weight, live = nn.Parameter(torch.zeros(256, 256, dtype=dtype)), LiveBytes()
    updates = Updates(
        {"weight": weight},
        lambda parameters: OPTIMIZERS[name].make(parameters, 1e-4, config.optim),
        rounding=config.full.rounding,
    )
    for step in range(2):  # the first makes the state
        weight.grad = torch.ones_like(weight)
        updates.begin(step, 1e-4)
        if step == 0:
            updates.finish()
    with live:
        updates.finish()
    return live.peaks.get("", (0,))[0] / weight.numel()


# --- A run. ---


@dataclass(frozen=True)
class Estimate:
    """What one run needs, in bytes."""

    recompute: Policy
    optimizer: str
    streamed: int
    """Blocks that wait in host memory."""
    device: dict[str, float]
    """Of the device at the highest moment of a training step, by part."""
    previews: float
    """Of the device at the highest moment of drawing a preview."""
    encoding: float
    """Of the device while texts are encoded, before the model comes."""
    overhead: float
    """Of the allocator and the libraries; not measured in training."""
    host: dict[str, float]
    disk: dict[str, float]
    flops: float
    """Of one optimizer step at the largest size, what is computed again included."""
    traffic: float
    """A step, over the bus, for streamed blocks."""

    @property
    def training(self) -> float:
        """Of the device, live at the highest moment of a step."""
        return sum(self.device.values())

    @property
    def needs(self) -> float:
        """Of the device, in all."""
        return max(self.training, self.previews, self.encoding) + self.overhead

    @property
    def host_needs(self) -> float:
        """Of host memory: weights pass through it before anything else is there."""
        return max(self.host[LOADING], sum(self.host.values()) - self.host[LOADING])

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"training": self.training, "needs": self.needs, "host_needs": self.host_needs}


class Estimator:
    """Estimates for runs of one model on one kind of device; steps are remembered, since runs share them."""

    def __init__(self, family: Family, device_type: DeviceType) -> None:
        self.family, self.device_type = family, device_type
        self.outline = outline(family, torch.float32)
        self.size = sum(one.numel() for one in self.outline.parameters())
        self._steps: dict[Any, Step] = {}

    def estimate(self, config: RunConfig, side_px: int | None = None) -> Estimate:
        """For pictures of side_px², or of the run's largest size. Raises ConfigError."""
        family, device = self.family, torch.device(self.device_type)
        dtype, full = base_dtype(config, device), config.finetune_type == "full"
        trained = self._trained(config, dtype)
        (numbers,) = trained.values()
        count, stored = numbers.numel(), numbers.nbytes
        optimizer = resolve_optimizer(config.optim.name, count)
        policy = config.memory.recompute
        if policy == "auto":
            policy = "full" if config.memory.stream_blocks or self.size >= LARGE_PARAMETERS else "none"
        step = self._step(config, policy, optimizer, side_px or self.sides(config)[0])
        blocks = [
            sum(one.numel() for one in block.parameters()) * dtype.itemsize
            for block in family.blocks(self.outline).values()
        ]
        streamed = choose_streamed(len(blocks), min(len(blocks), config.memory.stream_blocks))
        away = [blocks[index] for index in streamed]
        weights = self.size * dtype.itemsize
        extra = ROUNDINGS[config.full.rounding].extra_bytes if full and dtype is torch.bfloat16 else 0
        held = {
            "weights as stored": weights - sum(away) + max(away, default=0) * min(2, len(away)),
            "trained copies": 0.0 if full else float(stored),
            "optimizer state": count * OPTIMIZERS[optimizer].state_bytes,
            "rounding extras": float(count * extra),
        }
        beside = (step.gradients, step.kept, step.total - step.kept - step.gradients)
        moving = dict(zip(MOVING, beside, strict=True))
        sizes = fit.model_sizes(family)
        previews = sum(held.values()) + self._drawing(config, sizes, dtype) if config.preview.every else 0.0
        encoding = sizes.encoders * encoder_dtype(device).itemsize * fit.ENCODER_WORK
        highest = max(sum((held | moving).values()), previews, encoding)
        average = config.optim.ema_decay
        state = cast(Any, SimpleNamespace(trained=trained, average=average, optimizer=optimizer, bare=self.outline))
        saved = checkpoint_bytes(state, config) if config.checkpoint.every else 0.0
        return Estimate(
            recompute=policy, optimizer=optimizer, streamed=len(streamed), device=held | moving, previews=previews,
            encoding=encoding,
            overhead=highest * (fit.FRAGMENTATION - 1) + fit.WORKSPACE_BYTES if self.device_type == "cuda" else 0.0,
            host={LOADING: weights, "streamed blocks": float(sum(away)),
                  "average": 0.0 if average is None else 4.0 * count, "copy that is saved": saved},
            disk={"checkpoints": saved * (config.checkpoint.keep + 1), "exported files": export_bytes(state, config),
                  "spare": float(SPARE_BYTES)},
            flops=step.flops, traffic=float(sum(away) * (3 if full else 2)),
        )  # fmt: skip

    def sides(self, config: RunConfig) -> list[int]:
        """The run's training sizes as sides of squares in pixels, largest first."""
        grid, areas = self.family.variant.pixel_multiple, training_areas(config, self.family.variant)
        return [max(1, math.isqrt(area) // grid) * grid for area in areas]

    def flops(self, config: RunConfig) -> float:
        """Of an optimizer step, the mean over the run's training sizes."""
        each = [self.estimate(config, side).flops for side in self.sides(config)]
        return sum(each) / len(each)

    def _step(self, config: RunConfig, policy: Policy, optimizer: str, side_px: int) -> Step:
        key = (
            policy, optimizer, side_px, config.finetune_type, config.lora_rank, config.lora, config.full.train,
            config.full.rounding, config.optim.batch_size, config.optim.accumulate, config.optim.spike_factor,
            config.memory.base_precision, config.memory.fused_backward, config.prior,
        )  # fmt: skip
        if key not in self._steps:
            settings = self.outline.config
            depth = tuple(int(settings[name]) for name in DEPTHS)
            self._steps[key] = measure_step(
                config, self.family, self.device_type, policy, optimizer, side_px, cast(Any, depth)
            )
        return self._steps[key]

    def _trained(self, config: RunConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is trained, on the meta device, as one tensor of all its numbers."""
        if config.finetune_type == "full":
            count = sum(one.numel() for one in choose_weights(config, self.family, self.outline).values())
            return {"weights": torch.empty(count, dtype=dtype, device="meta")}
        targets = lora.choose_targets(self.family.lora_targets(self.outline), config.lora.targets)
        count = config.lora_rank * sum(sum(self.outline.get_submodule(path).weight.shape) for path in targets)
        return {"factors": torch.empty(count, device="meta")}

    def _drawing(self, config: RunConfig, sizes: fit.ModelSizes, dtype: torch.dtype) -> float:
        """Of a preview beside what is there anyway, by the figures that `generate` goes by."""
        variant, preview = self.family.variant, config.preview
        pixels = (preview.width or variant.sample_size_px) * (preview.height or variant.sample_size_px)
        wide = config.finetune_type == "lora" and dtype is torch.bfloat16
        values = sizes.width * (pixels / sizes.token_px**2 + sizes.text_tokens)
        values *= fit.LORA_ACTIVATIONS if wide else fit.ACTIVATIONS
        return (sizes.vae + max(values, pixels * sizes.vae_channels * fit.DECODING)) * dtype.itemsize


# --- What else could be done, and what it costs. ---


@dataclass(frozen=True)
class Alternative:
    """The same run with other settings."""

    settings: dict[str, Any]
    """By dotted name, as on the command line."""
    estimate: Estimate
    flops: float
    """A picture, as a share of the run's own."""

    def __str__(self) -> str:
        return " ".join(f"{name}={_as_word(value)}" for name, value in self.settings.items())

    def costs(self) -> str:
        """In operations and over the bus, in words."""
        change = f"{self.flops - 1:+.0%} operations a picture" if abs(self.flops - 1) > 0.005 else ""
        bus = f"{_gb(self.estimate.traffic).strip()} a step over the bus" if self.estimate.traffic else ""
        return "; ".join(one for one in (change, bus) if one)


def _as_word(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)


def alternatives(estimator: Estimator, config: RunConfig) -> Iterator[Alternative]:
    """Other recompute policies, batches, optimizers, streamed blocks and sizes; what a result feels least comes first.

    Those that contradict the run's other settings are left out.
    """
    now = estimator.estimate(config)
    for settings in _options(estimator, config, now):
        other = changed(config, settings)
        if other is not None:
            sizes_change = "data.resolutions" in settings
            before, after = (
                estimator.flops(run) if sizes_change else estimator.estimate(run).flops for run in (config, other)
            )
            share = after * _pictures(config) / (before * _pictures(other))
            yield Alternative(settings, estimator.estimate(other), share)


def _pictures(config: RunConfig) -> int:
    return config.optim.batch_size * config.optim.accumulate


def _options(estimator: Estimator, config: RunConfig, now: Estimate) -> Iterator[dict[str, Any]]:
    batch, sides = config.optim.batch_size, estimator.sides(config)
    if batch > 1:
        yield {"optim.batch_size": 1, "optim.accumulate": batch * config.optim.accumulate}
    yield from ({"memory.recompute": one} for one in ("none", "selective", "full") if one != now.recompute)
    if config.finetune_type == "full":
        yield from ({"optim.name": one} for one in ("adamw", "adamw8bit", "adafactor") if one != now.optimizer)
    total = len(estimator.family.blocks(estimator.outline))
    for count in (total // 2, total):
        if count != now.streamed:
            yield {"memory.stream_blocks": count, "memory.recompute": "full"}
    yield from ({"optim.batch_size": one} for one in (2, 4) if one != batch)
    smaller = [side for side in estimator.family.variant.training_sides_px if side < sides[0]]
    if smaller:
        yield {"data.resolutions": smaller}


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig | None:
    """The run with other settings, by dotted name; None where they contradict others."""
    tree = config.model_dump()
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[key] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError:
        return None


def savings(estimator: Estimator, config: RunConfig, most: int = 3) -> str:
    """The first changes that save a step memory worth the while, each with what it saves and costs, in a sentence."""
    now = estimator.estimate(config).training
    saved = ((one, now - one.estimate.training) for one in alternatives(estimator, config))
    worth = ((one, size) for one, size in saved if size > WORTH_SAYING * now)
    told = (f"`{one}` saves {_gb(size).strip()}" + (f" ({one.costs()})" if one.costs() else "") for one, size in worth)
    return "; ".join(islice(told, most))


def out_of_memory(error: BaseException, config: RunConfig, family: Family) -> FluxFTError:
    """What to tell of a GPU whose memory a run has filled: what to change, and what that saves by the estimate."""
    estimator = Estimator(family, "cuda")
    told = savings(estimator, config)
    return FluxFTError(
        f"the GPU's memory is full: {str(error).split('. ')[0]}; "
        f"by the estimate this run needs {_gb(estimator.estimate(config).needs).strip()}",
        hint=(f"{told}; or " if told else "") + "end other programs that use the GPU",
    )


# --- The plan. ---


@dataclass(frozen=True)
class Plan:
    """What `flux-ft plan` tells."""

    config: RunConfig
    model: str
    weights: int
    device: str
    """Its name; empty where there is no such device here."""
    free: float | None
    """Bytes of it; None where it cannot be asked."""
    free_disk: float
    sides_px: list[int]
    estimate: Estimate
    others: list[Alternative]
    flops: float
    """Of an optimizer step, the mean over all sizes."""
    rate: float
    """FLOP/s of a large matrix product."""
    rate_is_measured: bool

    @property
    def least_seconds(self) -> float:
        """Of all steps, if nothing but matrix products and attention took time, at the rate of the fastest."""
        return self.flops * self.config.iterations / self.rate

    @property
    def card_gb(self) -> int | None:
        """The smallest usual card that this fits; None if there is none."""
        return next((one for one in CARDS_GB if self.estimate.needs <= one * 2**30 * CARD_SHARE), None)

    @property
    def fits(self) -> bool | None:
        """Whether what is free is enough; None where that is not known."""
        return None if self.free is None else self.estimate.needs <= self.free

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        own = {one.name: getattr(self, one.name) for one in fields(self)[1:]}  # all but the run file
        others = [{"settings": one.settings, "needs": one.estimate.needs, "flops": one.flops} for one in self.others]
        facts = {"fits": self.fits, "card_gb": self.card_gb, "least_seconds": self.least_seconds}
        return own | facts | {"estimate": self.estimate.as_json(), "others": others}

    def for_people(self) -> str:
        """For people."""
        config, now = self.config, self.estimate
        auto = {name: " (auto)" if value == "auto" else "" for name, value in
                (("recompute", config.memory.recompute), ("optimizer", config.optim.name))}  # fmt: skip
        what = f"LoRA rank {config.lora_rank}" if config.finetune_type == "lora" else "full fine-tune"
        kind = "GPU" if now.overhead else "memory"
        sizes = ", ".join(f"{side}²" for side in self.sides_px)
        lines = [
            f"run       {self.model}, {self.weights:,} weights; {what}; sizes {sizes} pixels, "
            f"batch {config.optim.batch_size}",
            f"chosen    recompute {now.recompute}{auto['recompute']}, {now.optimizer}{auto['optimizer']}, "
            f"{now.streamed} blocks streamed",
            f"{kind:<9} at {self.sides_px[0]}², at the highest moment of a step:",
            *(f"          {_gb(size)}  {part}" for part, size in now.device.items() if size),
            f"          {_gb(now.training)}  in all",
            *([f"          {_gb(now.previews)}  while a preview is drawn"] if now.previews else []),
            f"          {_gb(now.encoding)}  while captions are encoded, before the model comes",
            *([f"          {_gb(now.overhead)}  for allocator and libraries: assumed, not measured"]
              if now.overhead else []),
            f"          {_gb(now.needs)}  needed: the highest of these" + (" and that" if now.overhead else ""),
            *_listed("host", now.host),
            *_listed("disk", now.disk, f"; {_gb(self.free_disk).strip()} are free" + (
                "" if sum(now.disk.values()) <= self.free_disk else ": too little")),
            f"time      {_flops(self.flops)} a step{' on average' if len(self.sides_px) > 1 else ''}: "
            f"{config.iterations:,} steps take at least {_duration(self.least_seconds)} at {_flops(self.rate)}/s, "
            + ("what a matrix product reached here just now" if self.rate_is_measured else
               "an H100's in a matrix product"),
            "          (no step reaches that; loading, encoding and previews come on top)",
            f"{'else':<9} {'needs':>9}  fits  what it costs",
            *(f"          {_gb(one.estimate.needs)}  {self._mark(one.estimate.needs):<4}  {one}"
              + (f": {one.costs()}" if one.costs() else "") for one in self.others),
            self._verdict(),
        ]  # fmt: skip
        return "\n".join(lines)

    def _mark(self, needs: float) -> str:
        return "?" if self.free is None else "yes" if needs <= self.free else "no"

    def _verdict(self) -> str:
        needs = _gb(self.estimate.needs).strip()
        if self.free is None:
            card = f"a card of {self.card_gb} GB" if self.card_gb else "more than any single card has"
            return f"there is no GPU here: this needs {needs}, so {card}"
        if self.fits:
            return f"fits {self.device}: needs {needs} of {_gb(self.free).strip()} that are free"
        fitting = next((one for one in self.others if one.estimate.needs <= self.free), None)
        return f"does not fit {self.device}: needs {needs}, {_gb(self.free).strip()} are free; " + (
            f"`{fitting}` would fit with {_gb(fitting.estimate.needs).strip()}"
            if fitting
            else "no change above would fit"
        )


def make_plan(config: RunConfig, family: Family | None = None) -> Plan:
    """The plan for this machine, or where it has no GPU and the model asks for one, for such a machine.

    Reads no pictures and no weights. Raises InputError.
    """
    family = family or open_family(config.model, config.model_parts)
    if family.variant.image_input != "none":
        raise ModelError(f"`model: {config.model}` takes pictures besides text, and such models are not trained yet")
    estimator = Estimator(family, "cuda")
    here = torch.cuda.is_available()
    if not here and estimator.size < LARGE_PARAMETERS:
        estimator = Estimator(family, "cpu")
    device = torch.device(estimator.device_type)
    is_here = here or device.type == "cpu"
    folder = config.output_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return Plan(
        config=config, model=family.variant.name, weights=estimator.size,
        device=torch.cuda.get_device_name(device) if here else "this CPU" if is_here else "",
        free=fit.machine_of(device).free_bytes if is_here else None,
        free_disk=shutil.disk_usage(existing).free, sides_px=estimator.sides(config),
        estimate=estimator.estimate(config), others=list(alternatives(estimator, config)),
        flops=estimator.flops(config),
        rate=matmul_rate(device) if is_here else H100_RATE, rate_is_measured=is_here,
    )  # fmt: skip


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product: the best of five, in bf16 on a GPU and float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    one, best = torch.randn(side, side, device=device, dtype=dtype), math.inf
    for _ in range(5):
        began = time.perf_counter()
        _ = one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _gb(size: float) -> str:
    return f"{size / 1e9:6.2f} GB" if size >= 5e7 else f"{size / 1e6:6.2f} MB"


def _flops(count: float) -> str:
    return f"{count / 1e12:.1f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else (
        f"{seconds:.1f} s"
    )  # fmt: skip


def _listed(name: str, parts: Mapping[str, float], after: str = "") -> list[str]:
    told = ", ".join(f"{_gb(size).strip()} {part}" for part, size in parts.items() if size)
    return [f"{name:<9} {told}{after}"]
