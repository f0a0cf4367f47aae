"""One run, as data: every setting with its unit, its default and its off switch. Loads without torch.

The top level keeps the names and defaults of the hosted fine-tuning API; the rest sits in sections. Reading a run file,
with lines in the messages, is `flux_ft.runfile`'s work.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SMALLEST_MAX_PIXELS = 64 * 64
LARGEST_SIDE = 8192  # far above every model's cap, and far below an area that was meant as a side
LARGEST_SEED = 2**63 - 1
LARGEST_ROW_COUNT = 10**12
HUB_PREFIX = "hf:"
DATASET_KEYS = ("image_column", "split", "streaming", "limit")
"""Settings of a source that only a dataset has a use for."""
SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
"""What `datasets` leaves in a folder that a dataset was saved in."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        shown = pattern if len(pattern) <= 60 else pattern[:57] + "…"
        raise ValueError(f"`{shown}` is not a regular expression: {error}") from None
    return pattern


def _distinct(sides: tuple[int, ...]) -> tuple[int, ...]:
    twice = next((side for index, side in enumerate(sides) if side in sides[:index]), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return sides


def _path_section(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


ModulePattern = Annotated[str, AfterValidator(_compiles)]
Side = Annotated[int, Field(ge=16, le=LARGEST_SIDE)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# The hosted API's webhook fields are dropped at the door: a secret must never reach run.yaml or an adapter's header.
Dropped = Annotated[None, BeforeValidator(lambda _: None, json_schema_input_type=str | None)]


class Section(BaseModel):
    """What all parts of a run's settings share."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class SourceConfig(Section):
    """One source of pictures; a plain text stands for `path`."""

    path: str = Field(min_length=1)
    """Folder, `.zip` or `.parquet` of pictures, or `hf:owner/name` for a dataset on the Hub; a relative one is looked
    for beside the run file and then in the current directory; required."""
    repeats: int = Field(default=1, ge=1, le=1000)
    """How often each of its pictures comes in one pass over all pictures; `1` is the least."""
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    """Weight of its pictures' loss against other sources' pictures, a plain number; `1` changes nothing."""
    caption_column: str | None = Field(default=None, min_length=1)
    """Column that holds the captions, in a dataset or in metadata.jsonl, metadata.csv; `null` = the first there is of
    `text`, `caption` and `prompt`."""
    image_column: str | None = Field(default=None, min_length=1)
    """Column of a dataset that holds the pictures; `null` = its only one."""
    split: str = Field(default="train", min_length=1)
    """Split of a dataset that is read; cannot be switched off."""
    streaming: bool = False
    """Read a dataset row by row from where it is, for sets larger than the disk; `false` downloads it first."""
    limit: int | None = Field(default=None, ge=1, le=LARGEST_ROW_COUNT)
    """Rows of a dataset that are read, from the first one on; `null` reads all."""


def _source_section(value: object) -> object:
    # Lists come from YAML and tuples from a resolved config.
    return tuple(map(_path_section, value)) if isinstance(value, list | tuple) else value


class DataConfig(SourceConfig):
    """Where the pictures are and how they are read; a plain text stands for `path`."""

    path: str | None = Field(default=None, min_length=1)  # type: ignore[assignment]
    """Folder, `.zip` or `.parquet` of pictures, or `hf:owner/name` for a dataset on the Hub; a relative one is looked
    for beside the run file and then in the current directory; `null` if `sources` names all."""
    sources: Annotated[
        tuple[SourceConfig, ...],
        BeforeValidator(_source_section, json_schema_input_type=tuple[str | SourceConfig, ...]),
        Field(strict=False),
    ] = ()
    """Further sources, each a path or a section with the keys `path`, `repeats`, `weight`, …; an empty list adds
    none."""
    max_pixels: int | None = Field(default=None, ge=SMALLEST_MAX_PIXELS)
    """Largest picture area in pixels (width × height), larger pictures are reduced; `null` = the model's own cap."""
    resolutions: Annotated[tuple[Side, ...], Field(min_length=1, strict=False), AfterValidator(_distinct)] | None = None
    """Sizes that each picture is trained at, as sides of a square of the same area in pixels; `null` = by
    `priority`."""
    on_bad: Literal["skip", "stop"] = "skip"
    """What happens at a picture that cannot be read: `skip` leaves it out and reports it, `stop` ends the run before
    training; cannot be switched off."""
    background: str = Field(default="#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", examples=["#ffffff"])
    """Colour behind transparent parts as `#rrggbb`, which YAML wants in quotes; cannot be switched off."""
    alpha: Literal["background", "mask"] = "background"
    """What transparency means: with `background` that colour shows through, with `mask` the loss is weighted by it and
    the colours under it are taken as they are; cannot be switched off."""
    masks: bool = True
    """Weight the loss of `cat.jpg` by `cat_mask.png`, where white counts fully and black not at all; `false` takes
    such files for pictures of their own."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of what a mask leaves black, against 1 where it is white; `0` ignores it."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of examples trained with an empty caption, drawn anew at each step; `0` switches it off."""
    tag_orders: int = Field(default=1, ge=1, le=64)
    """How many different orders of a caption's comma-separated tags are trained, the trigger word staying where it
    is; `1` keeps the order as written."""
    resample_latents: bool = True
    """Draw each latent anew from the autoencoder's distribution at every step; `false` always takes its mean."""
    workers: int = Field(default=2, ge=0, le=64)
    """Threads that read the next steps' batches while this one trains, which changes nothing else; `0` switches them
    off."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`path` with the settings beside it, then `sources`; at least one."""
        return tuple(self.named_sources.values())

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """Every source by where the run file has it: "data" for `path`, then "data.sources[0]" …"""
        named = {f"data.sources[{index}]": source for index, source in enumerate(self.sources)}
        if self.path is None:
            return named
        return {"data": SourceConfig(**{name: getattr(self, name) for name in SourceConfig.model_fields})} | named

    @model_validator(mode="after")
    def _names_pictures(self) -> Self:
        if self.path is None and not self.sources:
            raise ValueError("neither `path` nor `sources` names any pictures")
        return self


class CaptionerConfig(Section):
    """The model that describes pictures without a caption, while `captioning` is on."""

    model: str = Field(default="auto", min_length=1)
    """Hub id or folder of a Florence-2, Qwen3-VL or Qwen2.5-VL model; `auto` = Qwen3-VL-4B on a GPU with room,
    otherwise Florence-2, or none if neither can be had."""
    batch_size: int = Field(default=4, ge=1)
    """Pictures described at once; `1` is the least."""
    max_tokens: int = Field(default=160, ge=8, le=1024)
    """Longest caption in the captioner's tokens; cannot be switched off."""
    beside_pictures: bool = False
    """Also write each caption as a `.txt` beside its picture in a folder source; `false` keeps them in the run
    folder."""


class LoraConfig(Section):
    """The adapter that is trained when `finetune_type` is `lora`; its rank is `lora_rank`."""

    alpha: float | None = Field(default=None, gt=0)
    """Strength is alpha / rank, a plain number; `null` = the rank, which is a strength of 1."""
    targets: (
        Literal["blocks", "attention"] | Annotated[tuple[ModulePattern, ...], Field(min_length=1, strict=False)]
    ) = "blocks"
    """Layers that are trained: all linears of the blocks, those of attention only, or a list of regular expressions
    matched against module paths; cannot be switched off."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero at each step; `0` switches it off."""


class FullConfig(Section):
    """What is trained when `finetune_type` is `full`."""

    train: (
        Literal["blocks", "all", "attention"] | Annotated[tuple[ModulePattern, ...], Field(min_length=1, strict=False)]
    ) = "blocks"
    """Weights that are trained: those of the blocks, which a LoRA can hold, all of the transformer's, those of
    attention only, or a list of regular expressions matched against names of weights; cannot be switched off."""
    rounding: Literal["stochastic", "kahan", "master"] = "stochastic"
    """How bf16 weights take steps smaller than their last place: up or down by chance, with a bf16 remainder beside
    each (2 more bytes), or as a float32 copy (4 more); cannot be switched off."""


class OptimConfig(Section):
    """How the weights are moved."""

    name: Literal["auto", "adamw", "adamw8bit", "paged-adamw8bit", "adafactor"] = "auto"
    """The optimizer; `auto` = AdamW, but Adafactor where more than a billion weights are trained; cannot be switched
    off."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures per forward pass and device; `1` is the least."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; `1` switches accumulation off."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Share of each weight, times the learning rate, taken off at each step; `0` switches it off."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.99)
    """Share of the old gradient mean and of the old squared mean kept at each step; `0` keeps none."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longest gradient, as the norm over all weights (over each weight's own with `memory.fused_backward`), that is not
    scaled down; `null` switches clipping off."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Share of the old average kept at each step, 0.999 being usual: the LoRA and the full weights are then those of
    the average over the run; `null` switches averaging off."""
    ema_every: int = Field(default=10, ge=1)
    """Optimizer steps between two updates of the average, which lies in host memory; `1` is the least."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Leave out a step whose gradient is this many times longer than the median of the last 50 steps', 10 being usual;
    `null` takes every step."""


class ScheduleConfig(Section):
    """How the learning rate goes over the run."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up: flat, or falling to zero along a cosine or a line; `constant` switches it off."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises from zero; `0` switches the warm-up off."""


class MemoryConfig(Section):
    """What is given up to fit."""

    base_precision: Literal["auto", "bf16", "fp32", "int8", "fp8", "nf4"] = "auto"
    """Number format in which the base lies in memory; int8, fp8 and nf4 are for a LoRA's frozen base and compute in
    bf16 on a GPU; `auto` = bf16 on a GPU, fp32 on a CPU."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass computes again in place of keeping it: nothing with `none`, all but matrix products and
    attention with `selective`, everything with `full`; `auto` = the least that fits the device by the estimate."""
    fused_backward: bool | None = None
    """Move each weight as soon as its gradient is there, so that the gradients of the whole model never exist; `false`
    switches it off, `null` = in full fine-tunes on one GPU, without `optim.accumulate` and `optim.spike_factor`."""
    stream_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Blocks of the model that stay in host memory and visit the device in turn, for cards that cannot hold them all;
    `auto` = as few as the device needs by the estimate, none over several processes; `0` keeps all on the device."""


class SpeedConfig(Section):
    """What makes a step faster and changes its result by rounding alone; each can be switched off to compare."""

    fused_lora: bool = True
    """A LoRA on linears that read the same input runs as one operation, from factors that are cast once a step; `false`
    leaves it to peft."""
    fused_attention: bool = True
    """Norms, rotary embeddings and attention in fewer operations, tables made once for each size; `false` leaves them
    to diffusers."""
    attention: Literal["auto", "native", "cudnn", "flash", "efficient", "flash3"] = "auto"
    """Attention kernel; `auto` = on a GPU, the one that is fastest for the run's largest size in a test at the start;
    `native` leaves the choice to torch."""
    compile: Literal["auto", "off", "blocks", "graphs"] = "auto"
    """Compile each kind of block once, and Adafactor's update; `graphs` also replays the blocks as CUDA graphs, which
    takes more memory; `auto` = blocks on a GPU, for long runs of large models; `off` switches it off."""
    fp8_compute: bool = False
    """Multiply by the frozen weights in 8 bits, for GPUs that can (Hopper, Ada and later) at 1 MP and more, of a LoRA;
    `false` switches it off."""


class PreviewConfig(Section):
    """Pictures drawn during the run, always with the same prompts and noise."""

    every: int | None = Field(default=100, ge=1)
    """Optimizer steps between previews; `null` switches them off."""
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """One picture per prompt; an empty list = the first three different captions of the training pictures."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the previews' noise, which does not touch training; cannot be switched off."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps per picture; `null` = the model's default."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale, a plain number; `null` = the model's default."""
    width: int | None = Field(default=None, ge=1)
    """Width in pixels; `null` = the model's default."""
    height: int | None = Field(default=None, ge=1)
    """Height in pixels; `null` = the model's default."""


class PriorConfig(Section):
    """What the model must go on drawing as before: prior preservation."""

    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Prompts without the trigger word whose pictures shall not change; a step that looks at them takes two to three
    times as long; an empty list switches it off."""
    every: int = Field(default=1, ge=1)
    """Steps from one look at these prompts to the next, in which they weigh as much more; with 4 a run takes half the
    time that it takes with `1`, which looks in each."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of staying the same against learning the pictures, a plain number; `0` switches it off."""


class ValidationConfig(Section):
    """Loss on pictures that are held back from training."""

    every: int | None = Field(default=50, ge=1)
    """Optimizer steps between measurements; `null` switches them off."""
    fraction: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the pictures held back, 0 to 0.5; `0` switches validation off."""


class CheckpointConfig(Section):
    """What a stopped run goes on from."""

    every: int | None = Field(default=100, ge=1)
    """Optimizer steps between checkpoints; `null` switches them off."""
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints that stay on disk; older ones are deleted, and `2` is the least: one may turn out damaged."""


class ExportConfig(Section):
    """The files that come out."""

    formats: Annotated[tuple[Literal["diffusers", "kohya"], ...], Field(min_length=1, strict=False)] = (
        "diffusers",
        "kohya",
    )
    """One LoRA file per format, `kohya` being the one for ComfyUI; leave out the one that is not wanted."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the exported weights; cannot be switched off."""
    keep_full: bool = False
    """Also write all weights of a full fine-tune, as one file; `false` keeps the extracted LoRA alone."""


class LoggingConfig(Section):
    """Where the numbers go besides the run folder's metrics.jsonl."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()
    """Services that are also told every number; an empty list switches them off."""


class RunConfig(Section):
    """One run of flux_ft."""

    model: str = Field(default="flux1-dev", min_length=1)
    """Base to train: a variant's name, a local folder, a `.safetensors` file or a Hub id; cannot be switched off."""
    model_parts: str | None = Field(default=None, min_length=1)
    """Variant, folder or Hub id that the autoencoder and the text encoders come from when `model` is a single file;
    `null` = the model that it looks like."""
    data: Annotated[DataConfig, BeforeValidator(_path_section, json_schema_input_type=str | DataConfig)]
    """The pictures: a folder, or a section; required."""
    output: str | None = Field(default=None, min_length=1)
    """The run folder; `null` = `runs/` and a short form of `finetune_comment`, or of the data's name without one."""
    finetune_comment: str = ""
    """Name of the run for people; an empty text switches it off."""
    mode: Literal["character", "product", "style", "general"] = "general"
    """What the pictures have in common; `general` assumes nothing."""
    trigger_word: str = "TOK"
    """Word that stands for the new concept in captions; an empty text switches it off."""
    captioning: bool = True
    """Describe pictures that came without a caption; `false` gives them the plain one of their `mode`."""
    finetune_type: Literal["full", "lora"] = "full"
    """Train every weight and extract a LoRA afterwards, or train a LoRA alone; cannot be switched off."""
    lora_rank: int = Field(default=32, ge=1, le=256)
    """Rank of the LoRA that is trained or extracted, 1 to 256; cannot be switched off."""
    iterations: int = Field(default=300, ge=1, le=999_999)
    """Length of the run in optimizer steps; `1` is the least."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Step size; `null` = 1e-5 for a full fine-tune and 1e-4 for a LoRA."""
    priority: Literal["speed", "quality", "high_res_only"] = "quality"
    """Sizes that each picture is trained at: the largest and smaller ones, the smaller ones alone for `speed`, or the
    largest alone for `high_res_only`; `quality` gives nothing up."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all random draws of the training; cannot be switched off."""
    determinism: Literal["auto", "strict", "fast"] = "auto"
    """Whether a stopped and resumed run ends with the bits of one that was never stopped: always with `strict`, or with
    the same pictures and noise but the GPU's fastest kernels with `fast`; `auto` = strict on a CPU, fast on a GPU."""
    allow_distilled: bool = False
    """Train on a step-distilled base all the same, though it loses its speed; `false` refuses it."""
    webhook_url: Dropped = None
    """Accepted from request bodies of the hosted API and dropped: a local run calls nobody; leave it out or `null`."""
    webhook_secret: Dropped = None
    """Accepted from request bodies of the hosted API and dropped unread; leave it out or `null`."""
    captioner: CaptionerConfig = CaptionerConfig()
    """The captioner; leave it out for the defaults."""
    lora: LoraConfig = LoraConfig()
    """The adapter; leave it out for the defaults."""
    full: FullConfig = FullConfig()
    """The full fine-tune; leave it out for the defaults."""
    optim: OptimConfig = OptimConfig()
    """The optimizer; leave it out for the defaults."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over time; leave it out for a constant one."""
    memory: MemoryConfig = MemoryConfig()
    """Memory against speed; leave it out for the defaults."""
    speed: SpeedConfig = SpeedConfig()
    """Faster ways to the same result; leave it out for all that suit the machine."""
    prior: PriorConfig = PriorConfig()
    """What must not change; leave it out to let everything drift that may."""
    preview: PreviewConfig = PreviewConfig()
    """Pictures during the run; `every: null` in it switches them off."""
    validation: ValidationConfig = ValidationConfig()
    """Loss on held-back pictures; `fraction: 0` in it switches it off."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saved states to go on from; `every: null` in it switches them off."""
    export: ExportConfig = ExportConfig()
    """The LoRA files; leave it out for the defaults."""
    logging: LoggingConfig = LoggingConfig()
    """Trackers; leave it out for none."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        found = contradictions(self)
        if found:
            raise ContradictionError(found)
        return self

    @property
    def resolved_learning_rate(self) -> float:
        """The step size in use: what was given, or the default of the kind of fine-tune."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if self.finetune_type == "full" else 1e-4

    @property
    def slug(self) -> str:
        """A short name that is safe in a file name: from the comment, or from the data's name without one."""
        return slugify(self.finetune_comment) or slugify(data_name(self.data.all_sources[0].path)) or "run"

    @property
    def output_dir(self) -> Path:
        """The run folder; a relative one is below the current directory."""
        return Path(os.path.expanduser(self.output)) if self.output is not None else Path("runs") / self.slug


def slugify(text: str) -> str:
    """Letters and digits of any script in lower case, everything else as single dashes, 60 characters at most."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower())
    return words.strip("-")[:60].rstrip("-")


def data_name(path: str) -> str:
    """The name of a data source: a Hub data set's own name, a folder's name, a file's without its ending."""
    if path.startswith(HUB_PREFIX):
        return re.split("[@:]", path.removeprefix(HUB_PREFIX))[0].rpartition("/")[2]
    name = os.path.basename(os.path.abspath(path))  # absolute, because `.` and `..` have no name of their own
    return re.sub(r"\.(zip|parquet)$", "", name, flags=re.IGNORECASE)


@dataclass(frozen=True)
class Contradiction:
    """Settings that are each fine and cannot both be meant."""

    keys: tuple[str, ...]
    message: str
    hint: str


class ContradictionError(ValueError):
    """Carries contradictions through pydantic, so that a reader can add the lines of the keys."""

    def __init__(self, found: tuple[Contradiction, ...]) -> None:
        super().__init__("; ".join(one.message for one in found))
        self.found = found


def contradictions(config: RunConfig) -> tuple[Contradiction, ...]:
    """Every pair of settings that cannot both be meant; each message names both keys."""
    found = []
    warmup = config.schedule.warmup_steps
    if warmup > config.iterations:
        found.append(
            Contradiction(
                ("schedule.warmup_steps", "iterations"),
                f"`schedule.warmup_steps` is {warmup}, but the run ends after `iterations`, {config.iterations}",
                "make `schedule.warmup_steps` smaller or `iterations` larger",
            )
        )
    if config.optim.ema_decay is not None and config.optim.ema_every > config.iterations:
        found.append(
            Contradiction(
                ("optim.ema_every", "iterations"),
                f"`optim.ema_every` is {config.optim.ema_every}, but the run ends after `iterations`, "
                f"{config.iterations}: the average, which is what is exported, would be the base model",
                "make `optim.ema_every` smaller or `iterations` larger",
            )
        )
    fraction = config.validation.fraction
    if fraction > 0 and config.validation.every is None:
        found.append(
            Contradiction(
                ("validation.fraction", "validation.every"),
                f"`validation.fraction` is {fraction}, but `validation.every` is null: "
                "pictures would be held back and never measured",
                "give `validation.every` a number of steps, or set `validation.fraction` to 0",
            )
        )
    if config.optim.spike_factor is not None and config.prior.every > 1 and config.prior.prompts:
        found.append(
            Contradiction(
                ("prior.every", "optim.spike_factor"),
                f"`prior.every` is {config.prior.every}, so every such step has a longer gradient, and "
                "`optim.spike_factor` would take these for spikes and leave them out",
                "set `prior.every` to 1, or leave `optim.spike_factor` out",
            )
        )
    largest = max(config.data.resolutions or (0,))
    if config.data.max_pixels is not None and largest**2 > config.data.max_pixels:
        found.append(
            Contradiction(
                ("data.resolutions", "data.max_pixels"),
                f"`data.resolutions` has {largest}, an area of {largest**2} pixels, but `data.max_pixels` is "
                f"{config.data.max_pixels}",
                f"remove {largest} from `data.resolutions`, or leave `data.max_pixels` out",
            )
        )
    return (*found, *_impossible_memory(config), *_doubled_sources(config))


SMALL_BASES = ("int8", "fp8", "nf4")
"""Of a LoRA's frozen base: held in fewer bytes than it computes with."""


def _impossible_memory(config: RunConfig) -> Iterator[Contradiction]:
    memory, accumulate = config.memory, config.optim.accumulate
    full = config.finetune_type == "full"
    streams = memory.stream_blocks not in (0, "auto")
    if full and memory.fused_backward and accumulate > 1:
        yield Contradiction(
            ("memory.fused_backward", "optim.accumulate"),
            f"`memory.fused_backward` uses each gradient up at once, but `optim.accumulate` is {accumulate}",
            "set `optim.accumulate` to 1, or leave `memory.fused_backward` out",
        )
    if full and memory.base_precision in SMALL_BASES:
        yield Contradiction(
            ("finetune_type", "memory.base_precision"),
            f"`finetune_type: full` moves the weights themselves, and `memory.base_precision: {memory.base_precision}` "
            "holds them in numbers too coarse to be moved",
            "set `memory.base_precision` to bf16, or `finetune_type` to lora",
        )
    if full and config.speed.fp8_compute:
        yield Contradiction(
            ("finetune_type", "speed.fp8_compute"),
            "`speed.fp8_compute` multiplies by weights that stay as they are, and `finetune_type: full` moves them",
            "leave out `speed.fp8_compute`, or set `finetune_type` to lora",
        )
    if config.speed.fp8_compute and memory.base_precision not in ("auto", "fp8"):
        yield Contradiction(
            ("speed.fp8_compute", "memory.base_precision"),
            f"`speed.fp8_compute` multiplies by weights held as fp8, but `memory.base_precision` is "
            f"{memory.base_precision}",
            "leave `memory.base_precision` out, or set it to fp8",
        )
    if streams and memory.base_precision == "nf4":
        yield Contradiction(
            ("memory.stream_blocks", "memory.base_precision"),
            "`memory.stream_blocks` cannot move weights that `memory.base_precision: nf4` packs",
            "set `memory.base_precision` to int8, or `memory.stream_blocks` to 0",
        )
    spikes = config.optim.spike_factor is not None
    if full and spikes and (memory.fused_backward or streams):
        key = "memory.fused_backward" if memory.fused_backward else "memory.stream_blocks"
        yield Contradiction(
            ("optim.spike_factor", key),
            f"`optim.spike_factor` leaves a step out once all gradients are known; `{key}` has moved weights by then",
            f"leave out `optim.spike_factor` or `{key}`; without the latter all gradients stay in memory",
        )
    if streams and memory.recompute in ("none", "selective"):
        yield Contradiction(
            ("memory.stream_blocks", "memory.recompute"),
            f"`memory.stream_blocks` needs each block computed again in the backward pass, but `memory.recompute` is "
            f"{memory.recompute}",
            "leave `memory.recompute` out, or set it to full",
        )
    if full and streams and accumulate > 1:
        yield Contradiction(
            ("memory.stream_blocks", "optim.accumulate"),
            "`memory.stream_blocks` moves a block's weights before it leaves the device, but `optim.accumulate` is "
            f"{accumulate}",
            "set `optim.accumulate` to 1; a larger `optim.batch_size` averages as well",
        )
    if full and streams and config.full.rounding != "stochastic":
        yield Contradiction(
            ("memory.stream_blocks", "full.rounding"),
            f"`full.rounding: {config.full.rounding}` keeps numbers beside every weight on the device, which "
            "`memory.stream_blocks` is to relieve",
            "set `full.rounding` to stochastic, or `memory.stream_blocks` to 0",
        )
    if full and streams and memory.fused_backward is False:
        yield Contradiction(
            ("memory.stream_blocks", "memory.fused_backward"),
            "`memory.stream_blocks` moves a block's weights before it leaves the device, but `memory.fused_backward` "
            "is false",
            "leave `memory.fused_backward` out",
        )


def _doubled_sources(config: RunConfig) -> Iterator[Contradiction]:
    first: dict[tuple[str | None, ...], str] = {}
    for name, source in config.data.named_sources.items():
        path = source.path if source.path.startswith(HUB_PREFIX) else os.path.normpath(source.path)
        earlier = first.setdefault((path, source.split, source.image_column, source.caption_column), name)
        if earlier != name:
            yield Contradiction(
                (f"{name}.path", f"{earlier}.path"),
                f"`{name}` reads the same pictures as `{earlier}`",
                f"remove `{name}`; to show its pictures more often, set `{earlier}.repeats`",
            )


def _may_be_dataset(path: str) -> bool:
    """Whether a source may have rows and columns; of a folder with parquet files only its reader can tell."""
    if path.startswith(HUB_PREFIX) or path.lower().endswith(".parquet"):
        return True
    endings = (".parquet", *SAVED_DATASET_FILES)
    with suppress(ValueError):  # no path at all
        return any(name.lower().endswith(endings) for _, _, names in os.walk(path) for name in names)
    return False


def _always(_: RunConfig) -> bool:
    return True


INEFFECTIVE: tuple[tuple[tuple[str, ...], Callable[[RunConfig], bool], str], ...] = (
    (
        ("lora.alpha", "lora.targets", "lora.dropout"),
        lambda run: run.finetune_type == "full",
        "`finetune_type` is full, so every weight is trained and the LoRA is extracted afterwards at `lora_rank`",
    ),
    (
        (*(f"full.{name}" for name in FullConfig.model_fields), "memory.fused_backward", "export.keep_full"),
        lambda run: run.finetune_type == "lora",
        "`finetune_type` is lora, so the model's own weights are not trained",
    ),
    (
        ("optim.betas",),
        lambda run: run.optim.name == "adafactor",
        "`optim.name` is adafactor, which keeps no mean of the gradients and has its own rule for their squares",
    ),
    (
        ("optim.ema_every",),
        lambda run: run.optim.ema_decay is None,
        "`optim.ema_decay` is null, so no average is kept",
    ),
    (
        ("schedule.name",),
        lambda run: run.schedule.warmup_steps == run.iterations,
        "`schedule.warmup_steps` equals `iterations`, so the whole run is warm-up",
    ),
    (
        tuple(f"preview.{name}" for name in PreviewConfig.model_fields if name != "every"),
        lambda run: run.preview.every is None,
        "`preview.every` is null, so no previews are drawn",
    ),
    (
        ("validation.every",),
        lambda run: run.validation.fraction == 0 and run.validation.every is not None,
        "`validation.fraction` is 0, so no pictures are held back to measure on",
    ),
    (
        ("checkpoint.keep",),
        lambda run: run.checkpoint.every is None,
        "`checkpoint.every` is null, so no checkpoints are written",
    ),
    (
        tuple(f"captioner.{name}" for name in CaptionerConfig.model_fields),
        lambda run: not run.captioning,
        "`captioning` is false, so no picture is described",
    ),
    (
        ("captioner.beside_pictures",),
        lambda run: run.captioning and not any(os.path.isdir(source.path) for source in run.data.all_sources),
        "no source is a folder that captions could be written into",
    ),
    (
        ("prior.weight", "prior.every"),
        lambda run: not run.prior.prompts,
        "`prior.prompts` is empty, so nothing is held in place",
    ),
    (
        ("priority", "data.max_pixels"),
        lambda run: run.data.resolutions is not None,
        "`data.resolutions` names the sizes that pictures are trained at",
    ),
    (
        tuple(f"data.{name}" for name in SourceConfig.model_fields if name != "path"),
        lambda run: run.data.path is None,
        "it belongs to `data.path`, which is not given; each of `data.sources` has its own",
    ),
    (
        ("data.background",),
        lambda run: run.data.alpha == "mask",
        "`data.alpha` is mask, so the colours under transparency are taken as they are",
    ),
    (
        ("data.unmasked_weight",),
        lambda run: not run.data.masks and run.data.alpha != "mask",
        "`data.masks` is false and `data.alpha` is not mask, so nothing is masked",
    ),
    (
        ("model_parts",),
        lambda run: not run.model.endswith(".safetensors"),
        "`model` is not a single file, so it brings its own parts",
    ),
    (("webhook_url", "webhook_secret"), _always, "a local run calls nobody, and the value is not stored"),
)
"""Keys, when they have no effect, and why. A new rule is a row."""


def ineffective_settings(config: RunConfig, given_keys: Collection[str]) -> list[str]:
    """A warning for each setting that the user gave and that changes nothing in this run."""
    found = [
        f"`{key}` has no effect: {why}"
        for keys, applies, why in INEFFECTIVE
        if applies(config)
        for key in keys
        if key in given_keys
    ]
    return found + [
        f"`{name}.{key}` has no effect: the pictures of `{name}` are not a dataset"
        for name, source in config.data.named_sources.items()
        for key in DATASET_KEYS
        if f"{name}.{key}" in given_keys and not _may_be_dataset(source.path)
    ]


def section_classes() -> dict[str, type[Section]]:
    """The sections by name, `data` first."""
    fields = RunConfig.model_fields.items()
    return {
        name: info.annotation
        for name, info in fields
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }


def setting_keys() -> tuple[str, ...]:
    """Every setting's dotted key, in the order of the classes."""
    sections = section_classes()
    keys: list[str] = []
    for name in RunConfig.model_fields:
        keys += [f"{name}.{inner}" for inner in sections[name].model_fields] if name in sections else [name]
    return tuple(keys)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a run file, for editors."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "flux_ft run file"}


@cache
def setting_schemas() -> dict[str, dict[str, Any]]:
    """Each setting's part of the JSON Schema by dotted key, a source's as `data.sources[].path`; what messages say is
    expected is read off it."""
    schema = json_schema()
    sections = section_classes()
    found: dict[str, dict[str, Any]] = {}
    for key in setting_keys():
        section, _, leaf = key.rpartition(".")
        owner = schema["$defs"][sections[section].__name__] if section else schema
        found[key] = owner["properties"][leaf]
    sources = schema["$defs"][SourceConfig.__name__]["properties"]
    return found | {f"data.sources[].{leaf}": part for leaf, part in sources.items()}
