"""Where data meets family: everything that a run needs before its first step.

The order is what keeps memory small: text encoders come, encode, go; the autoencoder comes, encodes, goes; only then
is the denoiser loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin
from torch import Tensor, nn

from flux_ft import flow, log
from flux_ft.adapters import adapted, lora
from flux_ft.config import RunConfig
from flux_ft.data.cache import Examples, cache_latents, cache_texts, load_examples, load_text
from flux_ft.data.captions import tag_orders
from flux_ft.data.loader import split_holdout
from flux_ft.data.share import Share
from flux_ft.errors import ConfigError
from flux_ft.families import blocks
from flux_ft.families.base import Family
from flux_ft.families.products import held_tensors
from flux_ft.families.quantize import PLAIN
from flux_ft.families.reading import Carrier
from flux_ft.infer.runner import release_memory
from flux_ft.infer.sampler import sample_latents
from flux_ft.train import determinism
from flux_ft.train.attention import prepare_attention
from flux_ft.train.compiled import UPDATE_FACT, prepare_compile, prepare_update
from flux_ft.train.digest import weights_digest
from flux_ft.train.encoders import load_encoders
from flux_ft.train.held import base_storage, keep_from_copying, load_base, require_base
from flux_ft.train.launch import cpu_is_forced
from flux_ft.train.optim import LARGE_PARAMETERS, OPTIMIZERS, Average, Updates, resolve_optimizer
from flux_ft.train.preview import PreviewPlan
from flux_ft.train.recompute import apply_recompute
from flux_ft.train.sharded import load_once, shard, shard_on_cpu, shard_options, shards_wanted
from flux_ft.train.stream import BlockStream, choose_streamed
from flux_ft.types import CachedExample, DatasetReport, TextCond

PRIOR_TOKENS = 4096
"""So many tokens of prior pictures are drawn at once, as many as one picture of 1 MP has."""


@dataclass
class TrainState:
    """The one thing that changes during training; it never leaves this room."""

    accelerator: Accelerator
    denoiser: nn.Module
    """As prepared by accelerate: call this one."""
    bare: nn.Module
    """The same denoiser without a wrapper for several processes: read and draw with this one."""
    trained: dict[str, nn.Parameter]
    """What is moved, by its name in `bare`: a LoRA's factors, or weights of the model itself."""
    updates: Updates
    optimizer: str
    """Its name in the table."""
    average: Average | None = None
    stream: BlockStream | None = None
    kept_velocity: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)
    """What the base model predicts on prior prompts, by (step, slots); empty where it can be asked at any time."""
    norms: list[float] = field(default_factory=list)
    """Of the last steps' gradients, for `optim.spike_factor`."""
    spikes: int = 0
    """Steps in a row that were left out just now."""
    base_digest: str = ""
    """Of the base's weights, in the main process."""
    kernels: dict[str, str] = field(default_factory=dict)
    """What was chosen on this machine and moves last bits: the attention kernel, and what is compiled."""
    step: int = 0
    shards: int = 1
    """Over how many processes each weight is cut; then parameters are DTensors, and all of them are read together."""

    def settle(self) -> None:
        """Bring streamed weights home, so that they can be read or written by name."""
        if self.stream is not None:
            self.stream.flush()


@dataclass(frozen=True)
class TrainData:
    """What is trained and measured on."""

    report: DatasetReport
    examples: Examples
    """Each as often as it is repeated."""
    held_out: Examples
    """All sizes of other pictures, once each."""
    blank: TextCond | None
    """The empty caption's encoding; None without caption dropout."""
    preview: PreviewPlan | None
    prior: tuple[tuple[str, TextCond], ...]
    """Prompts that must be drawn as before, each with its encoding."""


def preview_prompts(config: RunConfig, report: DatasetReport) -> tuple[str, ...]:
    """What previews draw: the run file's prompts, or up to three of the training captions; none if they are off."""
    if not config.preview.every:
        return ()
    if config.preview.prompts:
        return tuple(config.preview.prompts)
    return tuple(dict.fromkeys(sample.caption for sample in report.samples))[:3]


def prior_prompts(config: RunConfig) -> tuple[str, ...]:
    """The prompts that are held in place, if any."""
    return config.prior.prompts if config.prior.weight else ()


def draw_prior(config: RunConfig, family: Family, data: TrainData, state: TrainState) -> tuple[CachedExample, ...]:
    """The base model's own pictures of the prior prompts, one each, as latents of the commonest training size.

    The LoRA must not have moved yet. Drawn anew at every start: the same noise gives the same pictures. Small ones are
    drawn several at once, always the same together, since that moves their last bits.
    """
    if not data.prior:
        return ()
    bucket = Counter(row.bucket for row in data.examples.rows).most_common(1)[0][0]
    shape = family.latent_shape(bucket.width_px, bucket.height_px)
    variant, examples = family.variant, []
    count = max(1, PRIOR_TOKENS // (shape[1] * shape[2] // 4 + data.prior[0][1].embeds_BLD.shape[1]))
    with log.progress("draw prior", len(data.prior)) as bar:
        for start in range(0, len(data.prior), count):
            part = data.prior[start : start + count]
            keys = [flow.keyed_generator(config.seed, "prior picture", prompt) for prompt, _ in part]
            noise = torch.cat([flow.draw_noise((1, *shape), key) for key in keys])
            texts = [text for _, text in part]
            both = TextCond(
                torch.cat([text.embeds_BLD for text in texts]), torch.cat([text.pooled_BP for text in texts])
            )
            drawn = sample_latents(family, state.bare, noise, both, variant.default_steps, variant.default_guidance)
            for (prompt, text), latents in zip(part, drawn.cpu(), strict=True):
                examples.append(CachedExample(f"prior: {prompt}", bucket, latents, None, (text,)))
                bar.advance()
    return tuple(examples)


def caption_orders(config: RunConfig, report: DatasetReport) -> dict[str, tuple[str, ...]]:
    """For each training caption, itself and then the other orders of its tags that are trained."""
    captions = dict.fromkeys(sample.caption for sample in report.samples)
    return {
        caption: tag_orders(caption, config.trigger_word, config.data.tag_orders, config.seed) for caption in captions
    }


def encoders_fingerprint(family: Family, device: torch.device) -> str:
    """What cached entries depend on besides pictures and captions."""
    return f"{family.encoders_identity}|{encoder_dtype(device)}"


def prepare_data(
    config: RunConfig, report: DatasetReport, family: Family, accelerator: Accelerator, cache: Path
) -> TrainData:
    """Encode what is not in `cache` yet, each process its share, and lay out what is read from it.

    No encoder is left in memory on return.
    """
    fingerprint = encoders_fingerprint(family, accelerator.device)
    orders = caption_orders(config, report)
    _fill_cache(config, report, orders, family, accelerator, cache)
    examples = load_examples(
        report.placed,
        report.decoding,
        cache,
        fingerprint,
        fingerprint,
        orders=orders,
        unmasked_weight=config.data.unmasked_weight,
        resample=config.data.resample_latents,
    )
    rows = examples.rows
    trained, held_out = split_holdout([row.digest for row in rows], config.validation.fraction, config.seed)
    prompts = preview_prompts(config, report)
    return TrainData(
        report=report,
        examples=examples.select(i for i in trained for _ in range(rows[i].repeats)),
        held_out=examples.select(held_out),
        blank=load_text("", cache, fingerprint) if config.data.caption_dropout else None,
        preview=_preview_plan(config, prompts, family, cache, fingerprint) if prompts else None,
        prior=tuple((prompt, load_text(prompt, cache, fingerprint)) for prompt in prior_prompts(config)),
    )


def prepare_model(
    config: RunConfig, family: Family, accelerator: Accelerator, tokens: int | None = None, attention: str | None = None
) -> TrainState:
    """Load the denoiser, choose or attach what is trained, hand it to accelerate. Raises ModelError or ConfigError.

    `tokens` are those of the largest size, on which attention is tried; None leaves it as it is. `attention` is the
    kernel that a resumed run began with.
    """
    streams = streamed_blocks(config) > 0
    if streams and accelerator.num_processes > 1:
        raise ConfigError(
            f"`memory.stream_blocks` works in one process, and this run has {accelerator.num_processes}",
            hint="set it to 0, or start the run without --gpus and `accelerate launch`",
        )
    device, shards = accelerator.device, shards_wanted(config, accelerator.num_processes)
    dtype = base_dtype(config, device)
    if shards > 1:
        denoiser = load_once(family, accelerator, dtype)
    else:
        denoiser = load_base(config, family, torch.device("cpu") if streams else device, device, dtype)
    base_digest = weights_digest(held_tensors(denoiser).items()) if accelerator.is_main_process else ""
    full = config.finetune_type == "full"
    trained = choose_weights(config, family, denoiser) if full else attach_lora(config, family, denoiser)
    size = count_weights(denoiser)
    count = sum(parameter.numel() for parameter in trained.values())
    name = resolve_optimizer(config.optim.name, count, shards)
    recompute = config.memory.recompute
    if recompute == "auto":
        recompute = "full" if streams or size >= LARGE_PARAMETERS else "none"
    fuse(config, denoiser, dtype, recompute, streams)
    release_memory()  # what was laid in one storage leaves its former places in torch's cache
    apply_recompute(denoiser, recompute)
    denoiser.train()
    stream = _stream(config, family, denoiser, device) if streams else None
    if shards > 1:
        shard(denoiser, family.blocks(denoiser).values(), accelerator, dtype)
        trained = {key: parameter for key, parameter in denoiser.named_parameters() if key in trained}
    mode, kernels = determinism.resolve(config.determinism, device.type), dict[str, str]()
    if tokens is not None:
        pictures, setting = config.optim.batch_size, config.speed.attention
        kernels |= prepare_attention(denoiser, setting, pictures, tokens, device, dtype, mode, attention)
    kernels |= prepare_compile(
        denoiser, config, recompute, device, mode, streams=streams, processes=accelerator.num_processes, shards=shards
    )
    update = prepare_update(config, name, size, device, mode)
    kernels |= {UPDATE_FACT: name} if update else {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what is measured from here on is the training
    fused = fuses_backward(config, accelerator.num_processes)
    updates = Updates(
        trained,
        lambda parameters: OPTIMIZERS[name].make(parameters, config.resolved_learning_rate, config.optim),
        rounding=config.full.rounding,
        fused_backward=fused,
        max_norm=config.optim.max_grad_norm or math.inf,
        seed=config.seed,
        device=device,
        update=update,
    )
    average = None
    if config.optim.ema_decay is not None:
        average = Average(trained, config.optim.ema_decay, config.optim.ema_every)
    what = f"LoRA rank {config.lora_rank} on {len(trained) // 2} linears" if not full else "full fine-tune"
    rounded = any(parameter.dtype is torch.bfloat16 for parameter in trained.values())
    facts = [
        f"{what}: {count:,} of {size:,} weights are trained by {name}",
        f"bf16, {config.full.rounding} rounding" if rounded else "float32, which needs no rounding" if full else "",
        "each is moved in the backward pass" if fused else "",
        {"selective": "activations are recomputed in part", "full": "activations are recomputed"}.get(recompute, ""),
        f"each of {shards} processes holds a share of every weight" if shards > 1 else "",
        f"the base is held as {storage}" if (storage := base_storage(config)) else "",
        "multiplied by in 8 bits" if config.speed.fp8_compute else "",
        f"{stream.streamed} blocks stay in host memory ({stream.host_bytes / 1e9:.1f} GB)" if stream else "",
    ]
    log.say("; ".join(fact for fact in facts if fact))
    if storage and accelerator.num_processes > 1:
        keep_from_copying(denoiser)
    prepared = denoiser if shards > 1 else accelerator.prepare(denoiser, device_placement=[not streams])
    return TrainState(
        accelerator, prepared, denoiser, trained, updates, name, average, stream, shards=shards,
        base_digest=base_digest, kernels=kernels,
    )  # fmt: skip


def count_weights(denoiser: nn.Module) -> int:
    """How many numbers a model has, also where several lie in one byte."""
    states = (getattr(parameter, "quant_state", None) for parameter in denoiser.parameters())
    counts = (None if state is None else math.prod(state.shape) for state in states)
    return sum(count or parameter.numel() for count, parameter in zip(counts, denoiser.parameters(), strict=True))


def largest_tokens(family: Family, examples: Examples) -> int:
    """Tokens of text and picture in the largest training size."""
    grid = family.variant.pixel_multiple
    sizes = [(row.bucket.width_px // grid) * (row.bucket.height_px // grid) for row in examples.rows]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    return int(sizes[largest] + examples[largest].texts[0].embeds_BLD.shape[1])


def attach_lora(config: RunConfig, family: Family, denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """A LoRA that changes nothing yet, on the linears that the run file names; returns its factors by name."""
    targets = lora.choose_targets(family.lora_targets(denoiser), config.lora.targets)
    alpha = float(config.lora_rank if config.lora.alpha is None else config.lora.alpha)
    linear = adapted.TrainedLinear if config.speed.fused_lora else None
    lora.attach_new(denoiser, targets, config.lora_rank, alpha, config.lora.dropout, config.seed, linear)
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def fuse(config: RunConfig, denoiser: nn.Module, dtype: torch.dtype, recompute: str, streams: bool) -> None:
    """Let blocks, and the linears that a LoRA is trained on, run in fewer operations, as `speed` says."""
    if config.speed.fused_attention:
        blocks.fuse(denoiser, adapted.together)
    if config.finetune_type == "lora" and config.speed.fused_lora:
        kept = recompute == "selective"
        adapted.prepare(denoiser, blocks.same_input(denoiser), dtype, join=not streams, in_place=not kept)


def choose_weights(config: RunConfig, family: Family, denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own weights that are trained, by name. Raises ConfigError when a pattern matches none."""
    everything = dict(denoiser.named_parameters())
    inside = [name for name in everything if name.startswith(tuple(f"{path}." for path in family.blocks(denoiser)))]
    names = list(everything)
    if config.full.train != "all":
        among = names if isinstance(config.full.train, tuple) else inside
        names = lora.choose_targets(among, config.full.train, "full.train", "weights of the model")
    for name in names:
        everything[name].requires_grad_(True)
    return {name: everything[name] for name in names}


def fuses_backward(config: RunConfig, world: int) -> bool:
    """Whether weights are moved in the backward pass. Over several processes gradients have to be averaged first."""
    if config.finetune_type != "full" or config.memory.fused_backward is False:
        return False
    return config.optim.accumulate == 1 and config.optim.spike_factor is None and world == 1


def streamed_blocks(config: RunConfig) -> int:
    """How many blocks stay in host memory; "auto" has been made a number where the device is known, else it is none."""
    count = config.memory.stream_blocks
    return 0 if count == "auto" else count


def _stream(config: RunConfig, family: Family, denoiser: nn.Module, device: torch.device) -> BlockStream:
    blocks = list(family.blocks(denoiser).values())
    stream = BlockStream(blocks, choose_streamed(len(blocks), min(len(blocks), streamed_blocks(config))), device)
    carrier = Carrier(device)
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if not stream.holds(tensor):
            tensor.data = carrier.carry(tensor.data)
    return stream


def make_accelerator(config: RunConfig, folder: Path) -> Accelerator:
    """accelerate's own defaults for device and processes; bfloat16 arithmetic wherever the base is bfloat16.

    Autocast is for the float32 factors of a LoRA. A full fine-tune has one dtype throughout, and autocast would keep
    its norms' results in float32: 42 GiB of activations in place of 30 at 1 MP without recompute (computed). Over
    several processes a LoRA is copied (DDP), and a full fine-tune cut into shards (FSDP2).
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shards = shards_wanted(config, world)
    sharding = shard_options(shards, world) if shards > 1 else {}
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # what the user's accelerate was set to; options come first
    on_cpu = cpu_is_forced() or not torch.cuda.is_available()
    accelerator = Accelerator(
        # accelerate would widen sharded bfloat16 weights to float32 for the optimizer; `Updates` does so one at a time.
        mixed_precision="bf16" if _wants_bf16(config) and not sharding else "no",
        # Gradients that are not shared out at once would be whole, and as large as the model.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.optim.accumulate, sync_each_batch=bool(sharding)
        ),
        log_with=list(config.logging.trackers) or None,
        project_dir=str(folder),
        # The first process encodes and draws while the others wait: ten minutes, the default, is too short for that.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
            AutocastKwargs(enabled=config.finetune_type == "lora"),
        ],
        **({} if on_cpu else sharding),
    )
    if sharding and on_cpu and accelerator.num_processes == world:
        shard_on_cpu(accelerator, **sharding)
    require_base(config, accelerator.device, base_dtype(config, accelerator.device))
    return accelerator


def share_of(accelerator: Accelerator) -> Share:
    """What this process does of work that is shared out."""
    return Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)


def base_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What the base computes in: as `memory.base_precision` says, or bfloat16 on a GPU and float32 on a CPU."""
    natural = torch.float32 if device.type == "cpu" else torch.bfloat16
    return PLAIN.get(config.memory.base_precision, natural)


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Encoders run once, so they take the device's natural dtype."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def data_digest(report: DatasetReport) -> str:
    """SHA-256 over what is trained on: pictures, sizes, captions, repeats and weights, wherever they came from."""
    lines = sorted(
        json.dumps(
            [
                sample.digest,
                [[bucket.width_px, bucket.height_px] for bucket in sample.buckets],
                sample.caption,
                sample.repeats,
                sample.weight,
            ]
        )
        for sample in report.samples
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _fill_cache(
    config: RunConfig,
    report: DatasetReport,
    orders: Mapping[str, Sequence[str]],
    family: Family,
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Encode what is not in the cache `folder` yet: text encoders come, encode and go before the autoencoder comes."""
    device, share = accelerator.device, share_of(accelerator)
    dtype, fingerprint = encoder_dtype(device), encoders_fingerprint(family, device)

    @functools.cache
    def open_text_encoder() -> Any:
        stack = load_encoders(family, device, dtype)
        return lambda texts: family.encode_text(stack, texts)

    def open_image_encoder() -> Any:
        vae = family.load_vae(device, dtype)
        return lambda pixels: family.encode_image(vae, pixels)

    # One call each: a caption's encoding must not depend on which previews, say, share its batch.
    groups: tuple[Sequence[str], ...] = (
        list(orders),
        [text for texts in orders.values() for text in texts[1:]],
        [""] if config.data.caption_dropout else [],
        preview_prompts(config, report),
        prior_prompts(config),
    )
    for group in groups:
        cache_texts(group, folder, fingerprint, open_text_encoder, share)
    open_text_encoder.cache_clear()
    release_memory()
    cache_latents(report.placed, report.decoding, folder, fingerprint, open_image_encoder, share)
    release_memory()


def _wants_bf16(config: RunConfig) -> bool:
    if config.memory.base_precision in PLAIN:
        return config.memory.base_precision == "bf16"
    return torch.cuda.is_available() and not cpu_is_forced()


def _preview_plan(
    config: RunConfig, prompts: Sequence[str], family: Family, cache: Path, fingerprint: str
) -> PreviewPlan:
    variant, preview = family.variant, config.preview
    return PreviewPlan(
        prompts=tuple(prompts),
        conds=tuple(load_text(prompt, cache, fingerprint) for prompt in prompts),
        seed=preview.seed,
        width_px=preview.width or variant.sample_size_px,
        height_px=preview.height or variant.sample_size_px,
        steps=preview.steps or variant.default_steps,
        guidance=variant.default_guidance if preview.guidance is None else preview.guidance,
    )
