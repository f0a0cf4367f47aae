"""One run, as data: every setting with its unit, its default and its off switch. Loads without torch.

The top level keeps the names and defaults of the hosted fine-tuning API; the rest sits in sections. Reading a run file,
with lines in the messages, is `flux_ft.runfile`'s work.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SMALLEST_MAX_PIXELS = 64 * 64
LARGEST_SEED = 2**63 - 1
HUB_PREFIX = "hf:"


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{pattern}` is not a regular expression: {error}") from None
    return pattern


def _path_section(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


ModulePattern = Annotated[str, AfterValidator(_compiles)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# The hosted API's webhook fields are dropped at the door: a secret must never reach run.yaml or an adapter's header.
Dropped = Annotated[None, BeforeValidator(lambda _: None, json_schema_input_type=str | None)]


class Section(BaseModel):
    """What all parts of a run's settings share."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """Where the pictures are; a plain text stands for `path`."""

    path: str = Field(min_length=1)
    """Folder of pictures (`.zip` and `hf:` are not read yet), looked for beside the run file and then in the current
    directory; required."""
    max_pixels: int | None = Field(default=None, ge=SMALLEST_MAX_PIXELS)
    """Largest picture area in pixels (width × height), larger pictures are reduced; `null` = the model's own cap."""


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


class OptimConfig(Section):
    """How the weights are moved."""

    name: Literal["adamw"] = "adamw"
    """The optimizer; cannot be switched off."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures per forward pass and device; `1` is the least."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; `1` switches accumulation off."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Share of each weight, times the learning rate, taken off at each step; `0` switches it off."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.99)
    """Share of the old gradient mean and of the old squared mean kept at each step; `0` keeps none."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longest gradient, as the norm over all weights, that is not scaled down; `null` switches clipping off."""


class ScheduleConfig(Section):
    """How the learning rate goes over the run."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up: flat, or falling to zero along a cosine or a line; `constant` switches it off."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises from zero; `0` switches the warm-up off."""


class MemoryConfig(Section):
    """What is given up to fit."""

    base_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the frozen or tuned base; `auto` = bf16 on a GPU, fp32 on a CPU."""
    recompute: bool | None = None
    """Recompute activations in the backward pass, slower and far smaller; `false` switches it off, `null` lets the
    size of the model decide."""


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
    """Prompts without the trigger word whose pictures shall not change; each step takes twice as long; an empty list
    switches it off."""
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
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk; older ones are deleted, and `1` is the least."""


class ExportConfig(Section):
    """The files that come out."""

    formats: Annotated[tuple[Literal["diffusers", "kohya"], ...], Field(min_length=1, strict=False)] = (
        "diffusers",
        "kohya",
    )
    """One LoRA file per format, `kohya` being the one for ComfyUI; leave out the one that is not wanted."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the exported weights; cannot be switched off."""


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
    """Caption pictures that have no `.txt` file beside them; `false` switches it off."""
    finetune_type: Literal["full", "lora"] = "full"
    """Train every weight and extract a LoRA afterwards, or train a LoRA alone; cannot be switched off."""
    lora_rank: int = Field(default=32, ge=1, le=256)
    """Rank of the LoRA that is trained or extracted, 1 to 256; cannot be switched off."""
    iterations: int = Field(default=300, ge=1)
    """Length of the run in optimizer steps; `1` is the least."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Step size; `null` = 1e-5 for a full fine-tune and 1e-4 for a LoRA."""
    priority: Literal["speed", "quality", "high_res_only"] = "quality"
    """What the plan of resolution, precision and batch favours; `quality` gives nothing up."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all random draws of the training; cannot be switched off."""
    allow_distilled: bool = False
    """Train on a step-distilled base all the same, though it loses its speed; `false` refuses it."""
    webhook_url: Dropped = None
    """Accepted from request bodies of the hosted API and dropped: a local run calls nobody; leave it out or `null`."""
    webhook_secret: Dropped = None
    """Accepted from request bodies of the hosted API and dropped unread; leave it out or `null`."""
    lora: LoraConfig = LoraConfig()
    """The adapter; leave it out for the defaults."""
    optim: OptimConfig = OptimConfig()
    """The optimizer; leave it out for the defaults."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over time; leave it out for a constant one."""
    memory: MemoryConfig = MemoryConfig()
    """Memory against speed; leave it out for the defaults."""
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
        return slugify(self.finetune_comment) or slugify(data_name(self.data.path)) or "run"

    @property
    def output_dir(self) -> Path:
        """The run folder; a relative one is below the current directory."""
        return Path(os.path.expanduser(self.output)) if self.output is not None else Path("runs") / self.slug


def slugify(text: str) -> str:
    """Letters and digits of any script in lower case, everything else as single dashes, 60 characters at most."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower())
    return words.strip("-")[:60].rstrip("-")


def data_name(path: str) -> str:
    """The name of a data source: a Hub data set's own name, a folder's name, a `.zip` without its ending."""
    if path.startswith(HUB_PREFIX):
        return path.rpartition("/")[2].removeprefix(HUB_PREFIX)
    name = os.path.basename(os.path.abspath(path))  # absolute, because `.` and `..` have no name of their own
    return name[: -len(".zip")] if name.lower().endswith(".zip") else name


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
    return tuple(found)


def _always(_: RunConfig) -> bool:
    return True


INEFFECTIVE: tuple[tuple[tuple[str, ...], Callable[[RunConfig], bool], str], ...] = (
    (
        ("lora.alpha", "lora.targets", "lora.dropout"),
        lambda run: run.finetune_type == "full",
        "`finetune_type` is full, so every weight is trained and the LoRA is extracted afterwards at `lora_rank`",
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
        ("captioning",),
        lambda run: run.captioning,
        "there is no captioner yet, so a picture without a `.txt` gets the plain caption of its `mode`",
    ),
    (
        ("prior.weight",),
        lambda run: not run.prior.prompts,
        "`prior.prompts` is empty, so nothing is held in place",
    ),
    (
        ("priority",),
        lambda run: run.priority != "quality",
        "plans other than `quality` are not built yet",
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
    return [
        f"`{key}` has no effect: {why}"
        for keys, applies, why in INEFFECTIVE
        if applies(config)
        for key in keys
        if key in given_keys
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
    """Each setting's part of the JSON Schema by dotted key; what messages say is expected is read off it."""
    schema = json_schema()
    sections = section_classes()
    found: dict[str, dict[str, Any]] = {}
    for key in setting_keys():
        section, _, leaf = key.rpartition(".")
        owner = schema["$defs"][sections[section].__name__] if section else schema
        found[key] = owner["properties"][leaf]
    return found
