"""What can be asked of the runner: one request type a task. Loads without torch.

Fields, ranges and defaults are those that the hosted API's finetuned endpoints had, where they had them. `None` means
what suits model and task; `resolved` puts it in. Two things differ from the service on purpose: a LoRA acts as it was
trained (`finetune_strength` 1, where the service had 1.1 and 1.2), and sizes follow the model's own grid.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, field_validator, model_validator

from flux_ft.errors import ConfigError, plain
from flux_ft.families.base import Variant

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 100

Picture = Annotated[
    Path | Image.Image,
    PlainSerializer(lambda value: str(value) if isinstance(value, Path) else None, return_type=str | None),
]
"""A picture's file, or a picture in memory, of which a recipe cannot tell where it came from."""


class Lora(BaseModel):
    """A LoRA file and how strongly it acts: 1 as trained, 0 not at all, below 0 away from what it learned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Path
    strength: float = Field(default=1.0, ge=-2, le=2)


class Request(BaseModel):
    """What all tasks share. A wrong field raises pydantic's ValidationError here, ConfigError in `parse`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)

    task: str
    prompt: str = ""
    """What to draw."""
    negative_prompt: str | None = None
    """What to keep away from; takes `true_cfg` above 1, and twice the time."""
    true_cfg: float = Field(default=1.0, ge=1, le=20)
    """Classifier-free guidance against the negative prompt, or against an empty one; 1 switches it off."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """One seed gives one picture, whatever else is drawn beside it."""
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Denoising steps."""
    guidance: float | None = Field(default=None, ge=0, le=100)
    """The guidance that is embedded in the model."""
    loras: tuple[Lora, ...] = ()
    """LoRA files that act, each with a strength."""
    finetune_strength: float = Field(default=1.0, ge=0, le=2)
    """Multiplies the strength of every LoRA: 0 is the base model, to the bit."""

    @model_validator(mode="after")
    def _negative_needs_cfg(self) -> Self:
        if self.negative_prompt and self.true_cfg == 1:
            raise ValueError("`negative_prompt` has no effect at `true_cfg` 1; set `true_cfg` above 1, 2 to 4 is usual")
        return self

    @property
    def pictures(self) -> dict[str, Path | Image.Image]:
        """The pictures that are given, by field."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in given.items() if isinstance(value, (Path, Image.Image))}


class _Sized(Request):
    width: int | None = Field(default=None, ge=16, le=8192)
    """Pixels, a multiple of the model's grid."""
    height: int | None = Field(default=None, ge=16, le=8192)
    """Pixels, a multiple of the model's grid."""


class TextToImage(_Sized):
    """A picture from a prompt."""

    task: Literal["text-to-image"] = "text-to-image"


class Remix(_Sized):
    """A picture from a prompt and another picture.

    With Redux at hand the picture speaks to the model as words do; otherwise it is where the drawing starts from.
    """

    task: Literal["remix"] = "remix"
    image_prompt: Picture
    image_prompt_strength: float = Field(default=0.5, ge=0, le=1)
    """0 leaves the picture out, 1 leaves no room for anything else."""


class Edit(_Sized):
    """A picture changed as the prompt says; takes a Kontext model."""

    task: Literal["edit"] = "edit"
    image: Picture


class Fill(Request):
    """A picture with a part of it drawn anew."""

    task: Literal["fill"] = "fill"
    image: Picture
    mask: Picture | None = None
    """Of the picture's size; white is drawn anew, black stays. Left out: what is transparent in the picture."""
    paste_back: bool = True
    """Put the picture's own pixels back outside the mask, with a soft edge. Else all of it comes out of the
    autoencoder, as in diffusers' pipelines."""


class Canny(Request):
    """A picture along the edges of another."""

    task: Literal["canny"] = "canny"
    control_image: Picture
    preprocessed_image: Picture | None = None
    """The edges themselves, white on black, instead of `control_image`'s."""
    canny_low_threshold: int = Field(default=50, ge=0, le=500)
    canny_high_threshold: int = Field(default=200, ge=0, le=500)

    @model_validator(mode="before")
    @classmethod
    def _one_is_enough(cls, fields: Any) -> Any:
        return _map_or_picture(fields)

    @model_validator(mode="after")
    def _low_below_high(self) -> Self:
        if self.canny_low_threshold > self.canny_high_threshold:
            raise ValueError(
                f"`canny_low_threshold` is {self.canny_low_threshold}, above `canny_high_threshold`, "
                f"{self.canny_high_threshold}; swap them"
            )
        return self


class Depth(Request):
    """A picture in the depths of another."""

    task: Literal["depth"] = "depth"
    control_image: Picture
    preprocessed_image: Picture | None = None
    """The depth map itself, white is near, instead of `control_image`'s."""

    @model_validator(mode="before")
    @classmethod
    def _one_is_enough(cls, fields: Any) -> Any:
        return _map_or_picture(fields)


class Ultra(Request):
    """A picture of four times the model's own area (4 MP with FLUX.1): drawn small, enlarged, refined in tiles."""

    task: Literal["ultra"] = "ultra"
    WIDEST: ClassVar[float] = 21 / 9

    aspect_ratio: str = "16:9"
    """Width to height, 21:9 to 9:21."""
    raw: bool = False
    """Less polish: drawn and refined with little guidance."""
    image_prompt: Picture | None = None
    image_prompt_strength: float = Field(default=0.1, ge=0, le=1)

    @field_validator("aspect_ratio")
    @classmethod
    def _a_ratio(cls, value: str) -> str:
        found = re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", value.strip())
        if found is None:
            raise ValueError("write width:height, for example 16:9")
        ratio = int(found[1]) / int(found[2])
        if not 1 / cls.WIDEST <= ratio <= cls.WIDEST:
            raise ValueError("the widest is 21:9, the tallest 9:21")
        return value.strip()

    @property
    def ratio(self) -> float:
        """Width over height."""
        width, height = map(int, self.aspect_ratio.split(":"))
        return width / height


TASKS: dict[str, type[Request]] = {
    kind.model_fields["task"].default: kind for kind in (TextToImage, Remix, Fill, Canny, Depth, Ultra, Edit)
}

# Steps and guidance of models of FLUX.1's own size; for fill the open model's own guidance, not the service's 60.
_FULL_SIZE = {"fill": (50, 30.0), "canny": (50, 30.0), "depth": (50, 15.0), "edit": (28, 2.5)}
TINY_FILL_GUIDANCE = 4.0
"""What flux-tiny's fill LoRA draws best at, of 2, 3 and 4: docs/flux_tiny.md."""
RAW_GUIDANCE = 0.6
"""Share of the usual guidance that `raw` leaves."""


def parse(fields: Mapping[str, Any], where: str = "") -> Request:
    """A request out of plain data; `task` says which, text-to-image unless given.

    Raises ConfigError that names `where`, the first wrong field, what was expected, and the nearest field there is.
    """
    task = fields.get("task", "text-to-image")
    at = f"{where}: " if where else ""
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError(f"{at}`task` is {plain(repr(task), 80)}", hint="one of " + ", ".join(TASKS))
    try:
        return TASKS[task].model_validate(dict(fields))
    except ValidationError as error:
        raise _as_config_error(error, TASKS[task], at) from None


def resolved(request: Request, variant: Variant) -> Request:
    """The request with steps, guidance and size filled in as suits the model.

    The size of tasks that follow a picture is the runner's to say. Raises ConfigError for a size off the grid.
    """
    steps, guidance = variant.default_steps, variant.default_guidance
    full_size = variant.sample_size_px >= 512 and not variant.distilled
    if variant.name == "flux-tiny" and request.task == "fill":
        guidance = TINY_FILL_GUIDANCE
    # Fill by a model that is not made for it is text-to-image with the rest put back.
    if full_size and not (request.task == "fill" and variant.image_input != "fill"):
        steps, guidance = _FULL_SIZE.get(request.task, (steps, guidance))
    if isinstance(request, Ultra) and request.raw:
        guidance = max(1.0, guidance * RAW_GUIDANCE)
    filled: dict[str, Any] = {
        "steps": steps if request.steps is None else request.steps,
        "guidance": guidance if request.guidance is None else request.guidance,
    }
    if isinstance(request, _Sized):
        sides = {"width": request.width, "height": request.height}
        if isinstance(request, TextToImage):
            sides = {name: side or variant.sample_size_px for name, side in sides.items()}
            filled |= sides
        for name, side in sides.items():
            if side is not None:
                require_on_grid(side, name, variant)
    return request.model_copy(update=filled)


def require_on_grid(side_px: int, name: str, variant: Variant) -> None:
    """Raise ConfigError unless the side is one that the model can draw."""
    if side_px % variant.pixel_multiple:
        down = max(1, side_px // variant.pixel_multiple) * variant.pixel_multiple
        raise ConfigError(
            f"`{name}` is {side_px} px; {variant.name} draws multiples of {variant.pixel_multiple} px",
            hint=f"use {down} or {down + variant.pixel_multiple}",
        )


def _map_or_picture(fields: Any) -> Any:
    """With the map given, the picture it was made from is not needed: the map stands in for it."""
    if (
        isinstance(fields, dict)
        and fields.get("control_image") is None
        and fields.get("preprocessed_image") is not None
    ):
        return fields | {"control_image": fields["preprocessed_image"]}
    return fields


def _as_config_error(error: ValidationError, kind: type[Request], at: str) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("is-instance", "function")))
    name = key.split(".")[0]
    task = kind.model_fields["task"].default
    if first["type"] == "extra_forbidden":
        others = [other for other, its in TASKS.items() if name in its.model_fields]
        near = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.6)
        if others:
            hint = f"`{name}` belongs to {' and '.join(others)}"
        else:
            hint = f"did you mean `{near[0]}`?" if near else "it takes " + ", ".join(sorted(kind.model_fields))
        return ConfigError(f"{at}the task {task} has no `{plain(key, 80)}`", hint=hint)
    if first["type"] == "missing":
        return ConfigError(f"{at}the task {task} needs `{key}`", hint="give it, or choose another task")
    if first["type"] == "value_error":
        words, _, hint = first["msg"].removeprefix("Value error, ").partition("; ")
    else:
        words, hint = _expected(first), ""
    shown = f"`{key}` is {plain(repr(first['input']), 120)}: " if key else ""
    described = _HINTS.get(key.split(".")[-1]) or getattr(kind.model_fields.get(name), "description", None)
    return ConfigError(f"{at}{shown}{words}", hint=hint or described or None)


_HINTS = {"strength": "1 acts as trained, 0 not at all, below 0 away from what was learned"}
_LIMITS = {"less_than_equal": ("at most", "le"), "greater_than_equal": ("at least", "ge")}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "path": "a path"}


def _expected(error: Any) -> str:
    """pydantic's finding, in words like our own."""
    if limit := _LIMITS.get(error["type"]):
        return f"expected {limit[0]} {error['ctx'][limit[1]]}"
    kind = error["type"].split("_")[0]
    if error["type"].startswith("is_instance"):
        kind = "path"
    return f"expected {_KINDS[kind]}" if kind in _KINDS else error["msg"]
