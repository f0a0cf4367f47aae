"""What a run will need, before it is started: memory by part, disk and operations, without any weights.

    RunConfig + Family ─Estimator.estimate→ Estimate;  what is done with it: `fitting.py`, `planning.py`

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
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flux_ft import flow
from flux_ft.adapters import lora
from flux_ft.config import PriorConfig, RunConfig
from flux_ft.errors import ModelError, first_line
from flux_ft.families.base import Family
from flux_ft.families.hub import is_hub_id
from flux_ft.families.products import NF4_BLOCK, NF4_SCALES_BLOCK, StoredLinear
from flux_ft.families.quantize import GRIDS, Storage, compute_in_fp8
from flux_ft.infer import fit
from flux_ft.plan import training_areas
from flux_ft.train.attention import set_attention
from flux_ft.train.checkpoint import SPARE_BYTES
from flux_ft.train.encoders import text_bytes
from flux_ft.train.held import base_storage
from flux_ft.train.loop import TRAIN_GUIDANCE
from flux_ft.train.optim import LARGE_PARAMETERS, OPTIMIZERS, ROUNDINGS, Updates, resolve_optimizer
from flux_ft.train.recompute import Policy, apply_recompute
from flux_ft.train.resume import checkpoint_bytes, export_bytes
from flux_ft.train.setup import (
    attach_lora,
    base_dtype,
    choose_weights,
    encoder_dtype,
    fuse,
    fuses_backward,
    streamed_blocks,
)
from flux_ft.train.stream import choose_streamed
from flux_ft.types import TextCond

STORED_BYTES: dict[str, tuple[float, float]] = {
    "int8": (1, 2), "fp8": (1, 2), "nf4": (1 / 2 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_SCALES_BLOCK), 0)
}  # fmt: skip
"""Of a weight, and of a row's scale in bf16; nf4 has 8-bit scales for blocks of weights, and a scale for each 256."""
COPY_BYTES = 2
"""Of a LoRA's factor that is cast once a step."""
DEPTHS = ("num_layers", "num_single_layers")
"""How diffusers names the numbers of double and single blocks."""
MOVING = ("gradients", "activations", "recompute and workspace")
"""The parts of a step's memory that are gone between steps."""
LOADING = "weights while loading"
DeviceType = Literal["cpu", "cuda"]
ATTENTION_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"
IN_PLACE = ("addmm_", "baddbmm_")
"""Matrix products that torch counts no operations of."""


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
    elif name in IN_PLACE:
        packet = getattr(torch.ops.aten, name.removesuffix("_"))
    return flop_registry.get(packet)


def _cuda_norm(widen: bool, norm: Any, given: Tensor) -> Tensor:
    """A norm as CUDA does it: in one kernel, and under autocast in float32, which the CPU's autocast leaves out."""
    weight = norm.weight
    if widen:
        given, weight = given.float(), None if weight is None else weight.float()
    if isinstance(norm, nn.RMSNorm):
        kernel = getattr(torch.ops.aten, "_fused_rms_norm", None)
        if kernel is None:  # a torch in which CUDA has none either
            return F.rms_norm(given, norm.normalized_shape, weight, norm.eps)
        result: Tensor = kernel(given, norm.normalized_shape, weight, norm.eps)[0]
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


def outline(
    family: Family, dtype: torch.dtype, depth: tuple[int, ...] | None = None, storage: Storage | None = None
) -> Any:
    """The family's denoiser on the meta device, frozen, at its own depth or with so many (double, single) blocks.

    With a `storage` its blocks' linears are held in 8 bits, with `nf4` as well: what its weights are spread out to for
    their products is as large. Where its configuration is not on this machine, diffusers' defaults are taken, which are
    FLUX.1-dev's. Raises ModelError for one that describes no such model.
    """
    settings = _settings(family) | (dict(zip(DEPTHS, depth, strict=True)) if depth else {})
    try:
        with torch.device("meta"):
            denoiser = FluxTransformer2DModel.from_config(settings)
    except Exception as error:
        raise ModelError(
            f"{family.source}: its `transformer/config.json` describes no FLUX.1 transformer: {first_line(error)}",
            hint="give a whole model, as `hf download` writes it",
        ) from error
    nn.Module.to(denoiser, dtype).requires_grad_(False)
    for block in family.blocks(denoiser).values() if storage else ():
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                grid_OI = torch.empty_like(linear.weight, dtype=GRIDS.get(storage or "", GRIDS["int8"])[0])
                scale_O = torch.empty(linear.out_features, dtype=torch.bfloat16, device="meta")
                block.set_submodule(name, StoredLinear(grid_OI, scale_O, linear.bias))
    return denoiser


def _settings(family: Family) -> dict[str, Any]:
    name, known = "transformer/config.json", {"guidance_embeds": family.variant.guidance_embedded}
    if shape := getattr(family, "shape", None):  # random weights
        return known | dict(shape)
    source = family.source
    where = getattr(family, "parts", source) if source.endswith(".safetensors") else source
    folder = Path(where).expanduser()
    on_hub = is_hub_id(where) and not folder.is_dir()
    file = try_to_load_from_cache(where, name) if on_hub else folder / name
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
    denoiser = outline(family, dtype, depth, base_storage(config))
    if config.speed.fp8_compute:
        compute_in_fp8(denoiser)
    names = set(choose_weights(config, family, denoiser) if full else attach_lora(config, family, denoiser))
    apply_recompute(denoiser.train(), policy)
    set_attention(denoiser, "native")  # another, by the user's environment, may not take tensors without numbers
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
            for name, one in module._buffers.items():
                if one is not None:
                    module._buffers[name] = torch.empty(one.shape, dtype=one.dtype)
            if device_type == "cuda" and isinstance(module, nn.LayerNorm | nn.RMSNorm):
                setattr(module, "forward", partial(_cuda_norm, narrow, module))  # noqa: B010 (mypy knows it as a method)
        fuse(config, denoiser, dtype, policy, streams=streamed_blocks(config) > 0)
        for hook in denoiser._forward_pre_hooks.values():
            hook(denoiser, ())  # what a first pass makes, and all keep, counts as weights
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
    """Of the device at the highest moment of drawing a preview that is decoded whole."""
    previews_in_tiles: float
    encoding: float
    """Of the device while texts are encoded, before the model comes, by encoders that are there as a whole."""
    encoding_streamed: float
    """By encoders whose blocks visit it in turn; or while pictures are, if that is more."""
    overhead: float
    """Of the allocator and the libraries at the highest of the moments that cannot be cut; not measured in training."""
    host: dict[str, float]
    disk: dict[str, float]
    flops: float
    """Of one optimizer step at the largest size, on average, what is computed again included."""
    traffic: float
    """A step, over the bus, for streamed blocks."""

    @property
    def training(self) -> float:
        """Of the device, live at the highest moment of a step."""
        return sum(self.device.values())

    @property
    def needs(self) -> float:
        """Of the device, in all. What comes before and between steps is cut to pieces where it would need more."""
        return max(self.training, self.previews_in_tiles, self.encoding_streamed) + self.overhead

    @property
    def host_needs(self) -> float:
        """Of host memory: weights pass through it before anything else is there, one at a time where they may."""
        return max(self.host[LOADING], self.waiting)

    @property
    def waiting(self) -> float:
        """Of host memory, what lies there during training."""
        return sum(self.host.values()) - self.host[LOADING]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"training": self.training, "needs": self.needs, "host_needs": self.host_needs}


class Estimator:
    """Estimates for runs of one model on one kind of device; steps are remembered, since runs share them."""

    def __init__(self, family: Family, device_type: DeviceType, most_px: int | None = None) -> None:
        """`most_px` is the area of the largest picture, where that is known."""
        self.family, self.device_type, self.most_px = family, device_type, most_px
        self.outline = outline(family, torch.float32)
        self.size = sum(one.numel() for one in self.outline.parameters())
        self._steps: dict[Any, Step] = {}

    def estimate(self, config: RunConfig, side_px: int | None = None) -> Estimate:
        """For pictures of side_px², or as large as they come in the run. Raises ConfigError."""
        family, device = self.family, torch.device(self.device_type)
        dtype, full = base_dtype(config, device), config.finetune_type == "full"
        trained = self._trained(config, dtype)
        (numbers,) = trained.values()
        count, stored = numbers.numel(), numbers.nbytes
        optimizer = resolve_optimizer(config.optim.name, count)
        policy = config.memory.recompute
        if policy == "auto":
            policy = "full" if streamed_blocks(config) or self.size >= LARGE_PARAMETERS else "none"
        side_px = side_px or self._largest(config)
        step = self._step(config, policy, optimizer, side_px)
        flops, prior = step.flops, config.prior
        if prior.prompts and prior.weight and prior.every > 1:  # the other steps do not look at its prompts
            without = self._step(config.model_copy(update={"prior": PriorConfig()}), policy, optimizer, side_px).flops
            flops = without + (flops - without) / prior.every
        storage = base_storage(config)
        blocks = [_held(block, dtype, storage) for block in family.blocks(self.outline).values()]
        inside = sum(sum(one.numel() for one in block.parameters()) for block in family.blocks(self.outline).values())
        weights = sum(blocks) + (self.size - inside) * dtype.itemsize
        streamed = choose_streamed(len(blocks), min(len(blocks), streamed_blocks(config)))
        away = [blocks[index] for index in streamed]
        extra = ROUNDINGS[config.full.rounding].extra_bytes if full and dtype is torch.bfloat16 else 0
        copies = COPY_BYTES if not full and config.speed.fused_lora and dtype is torch.bfloat16 else 0
        held = {
            "weights as stored": weights - sum(away) + max(away, default=0) * min(2, len(away)),
            "trained copies": 0.0 if full else float(stored + copies * count),
            "optimizer state": count * OPTIMIZERS[optimizer].state_bytes,
            "rounding extras": float(count * extra),
        }
        beside = (step.gradients, step.kept, step.total - step.kept - step.gradients)
        moving = dict(zip(MOVING, beside, strict=True))
        sizes = fit.model_sizes(family)
        whole, tiles = (
            sum(held.values()) + self._drawing(config, sizes, dtype, most) if config.preview.every else 0.0
            for most in (math.inf, fit.TILE_PX**2)
        )
        encoders = encoder_dtype(device)
        pictures = (sizes.vae + side_px**2 * sizes.vae_channels * fit.DECODING) * encoders.itemsize
        texts, in_turn = (max(text_bytes(sizes, encoders, in_turn=in_turn), pictures) for in_turn in (False, True))
        least = max(sum((held | moving).values()), tiles, in_turn)
        average = config.optim.ema_decay
        # What is streamed as it is in its files stays pages of them; else all is made anew in host memory.
        made = bool(away) and (storage is not None or dtype is not torch.bfloat16)
        state = cast(Any, SimpleNamespace(trained=trained, average=average, optimizer=optimizer, bare=self.outline))
        saved = checkpoint_bytes(state, config) if config.checkpoint.every else 0.0
        return Estimate(
            recompute=policy, optimizer=optimizer, streamed=len(streamed), device=held | moving, previews=whole,
            previews_in_tiles=tiles, encoding=texts, encoding_streamed=in_turn,
            overhead=self.reserved(least) - least,
            host={LOADING: weights if made else 4.0 * sizes.largest_matrix, "streamed blocks": float(sum(away)),
                  "average": 0.0 if average is None else 4.0 * count, "copy that is saved": saved},
            disk={"checkpoints": saved * (config.checkpoint.keep + 1), "exported files": export_bytes(state, config),
                  "spare": float(SPARE_BYTES)},
            flops=flops, traffic=float(sum(away) * (3 if full else 2)),
        )  # fmt: skip

    def reserved(self, live: float) -> float:
        """With what the allocator and the libraries take beside what is live."""
        return live * fit.FRAGMENTATION + fit.WORKSPACE_BYTES if self.device_type == "cuda" else live

    def sides(self, config: RunConfig) -> list[int]:
        """The run's training sizes as sides of squares in pixels, largest first."""
        grid, areas = self.family.variant.pixel_multiple, training_areas(config, self.family.variant)
        return [max(1, math.isqrt(area) // grid) * grid for area in areas]

    def _largest(self, config: RunConfig) -> int:
        grid, side = self.family.variant.pixel_multiple, self.sides(config)[0]
        return side if self.most_px is None else min(side, math.ceil(math.sqrt(self.most_px) / grid) * grid)

    def flops(self, config: RunConfig) -> float:
        """Of an optimizer step, the mean over the run's training sizes."""
        each = [self.estimate(config, side).flops for side in self.sides(config)]
        return sum(each) / len(each)

    def _step(self, config: RunConfig, policy: Policy, optimizer: str, side_px: int) -> Step:
        key = (
            policy, optimizer, side_px, config.finetune_type, config.lora_rank, config.lora, config.full.train,
            config.full.rounding, config.optim.batch_size, config.optim.accumulate, config.optim.spike_factor,
            base_storage(config), base_dtype(config, torch.device(self.device_type)), config.speed.fp8_compute,
            config.speed.fused_lora, config.speed.fused_attention, config.memory.fused_backward, config.prior,
            streamed_blocks(config) > 0,
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

    def _drawing(self, config: RunConfig, sizes: fit.ModelSizes, dtype: torch.dtype, most_px: float) -> float:
        """Of a preview beside what is there anyway, by the figures that `generate` goes by.

        No more than `most_px` pixels are decoded at once.
        """
        variant, preview = self.family.variant, config.preview
        pixels = (preview.width or variant.sample_size_px) * (preview.height or variant.sample_size_px)
        wide = config.finetune_type == "lora" and dtype is torch.bfloat16
        values = sizes.width * (pixels / sizes.token_px**2 + sizes.text_tokens)
        values *= fit.LORA_ACTIVATIONS if wide else fit.ACTIVATIONS
        return (sizes.vae + max(values, min(pixels, most_px) * sizes.vae_channels * fit.DECODING)) * dtype.itemsize


def _held(module: nn.Module, dtype: torch.dtype, storage: Storage | None) -> float:
    """Bytes of a block's weights as they lie in memory."""
    everything = sum(one.numel() for one in module.parameters()) * dtype.itemsize
    a_weight, a_row = STORED_BYTES.get(storage or "", (dtype.itemsize, 0))
    linears = [one.weight.shape for one in module.modules() if isinstance(one, nn.Linear)]
    return everything + sum(rows * (columns * (a_weight - dtype.itemsize) + a_row) for rows, columns in linears)


def gb(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.2f} GB" if size >= 5e7 else f"{size / 1e6:.2f} MB"
