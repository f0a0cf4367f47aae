"""What a task takes besides the model that was asked for: a control LoRA, a Fill model, Redux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from flux_ft import log
from flux_ft.errors import ConfigError, ModelError, first_line
from flux_ft.families.base import Family
from flux_ft.families.redux import REDUX, redux_at_hand
from flux_ft.families.registry import FLUX1_FILL, FLUX_TINY, open_family, tiny_folder
from flux_ft.infer.starts import Way
from flux_ft.infer.tasks import Canny, Depth, Edit, Fill, Remix, Request, Ultra

CONTROL_LORAS = {
    "canny": ("black-forest-labs/FLUX.1-Canny-dev-lora", "flux1-canny-dev-lora.safetensors"),
    "depth": ("black-forest-labs/FLUX.1-Depth-dev-lora", "flux1-depth-dev-lora.safetensors"),
}
"""Where FLUX.1-dev's are: Hub repository and file."""


@dataclass(frozen=True)
class Setup:
    """What a picture is drawn with."""

    family: Family
    way: Way
    control: Path | None = None
    """The control LoRA that makes the model take a picture."""
    redux: str | None = None


def setup_for(
    request: Request,
    family: Family,
    control: Path | None = None,
    redux: str | None = None,
    say: Callable[[str], None] = log.say,
) -> Setup:
    """How `family` can carry out a task; `control` and `redux` are what the user named.

    `say` is told where it is not done in the way that comes to mind first.

    Raises ConfigError for a task that the model cannot do, ModelError for a control LoRA that cannot be had.
    """
    variant, task = family.variant, request.task
    takes = variant.image_input
    if isinstance(request, Edit):
        if takes != "reference":
            raise _cannot(task, variant.name, "a Kontext model", "--model flux1-kontext")
        return Setup(family, "reference")
    if isinstance(request, (Canny, Depth)):
        if takes == "control":
            other = {"flux1-canny": "depth", "flux1-depth": "canny"}.get(variant.name)
            if task == other:
                raise _cannot(task, variant.name, "a model made for it", f"--model flux1-{task}")
            return Setup(family, "control")
        if takes == "none":
            return Setup(family, "control", control or _control_lora(task, family))
        raise _cannot(task, variant.name, "a text-to-image or a control model", f"--model flux1-dev or flux1-{task}")
    if isinstance(request, Fill):
        return _fill(family, control, say)
    if takes in ("control", "fill"):
        tasks = "fill" if takes == "fill" else "canny or depth"
        raise _cannot(task, variant.name, "a text-to-image model", f"--task {tasks}, or --model flux1-dev")
    if isinstance(request, Remix) or (isinstance(request, Ultra) and request.image_prompt is not None):
        source = redux or REDUX
        if isinstance(request, Remix) and (redux or (_is_full_size(family) and redux_at_hand(source))):
            return Setup(family, "redux", redux=source)
        return Setup(family, "image")
    return Setup(family, "text")


def _fill(family: Family, control: Path | None, say: Callable[[str], None]) -> Setup:
    """With a Fill model, a fill LoRA, or neither: then what is outside the mask is put back after each step."""
    variant = family.variant
    if variant.image_input == "fill":
        return Setup(family, "fill")
    if variant.image_input != "none":
        raise _cannot("fill", variant.name, "a text-to-image or a Fill model", "--model flux1-dev or flux1-fill")
    if control is not None:
        return Setup(family, "fill", control)
    if _is_tiny(family):
        return Setup(family, "fill", _control_lora("fill", family))
    if _is_full_size(family) and _cached(FLUX1_FILL.source, "transformer/config.json"):
        say(f"fill is drawn with {FLUX1_FILL.name}, which is on this machine")
        return Setup(open_family(FLUX1_FILL.name), "fill")
    say(
        f"fill is drawn with {variant.name} itself, by putting back what is outside the mask after each step; "
        "`--model flux1-fill` sees the picture around the hole and does better"
    )
    return Setup(family, "blend")


def _control_lora(task: str, family: Family) -> Path:
    if _is_tiny(family):
        return tiny_folder() / "control" / f"{task}.safetensors"
    if not _is_full_size(family) or not family.variant.guidance_embedded:
        raise ModelError(
            f"no control LoRA for {task} is known for {family.variant.name}",
            hint="name one with --control-lora FILE, or use --model flux1-dev",
        )
    repository, name = CONTROL_LORAS[task]
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{repository}: {name} could not be fetched from the Hub: {first_line(error)}",
            hint=f"accept the licence at https://huggingface.co/{repository}, run `hf auth login`, and try again; or "
            "download the file and give it with --control-lora FILE",
        ) from error


def _is_tiny(family: Family) -> bool:
    return family.variant.name == FLUX_TINY.name


def _is_full_size(family: Family) -> bool:
    return family.variant.architecture != FLUX_TINY.architecture


def _cached(repository: str, file: str) -> bool:
    return isinstance(try_to_load_from_cache(repository, file), str)


def _cannot(task: str, model: str, needed: str, hint: str) -> ConfigError:
    return ConfigError(f"the task {task} takes {needed}; {model} is none", hint=hint)
