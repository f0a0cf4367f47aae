"""The parity pack: a LoRA with everything that draws one picture of it again, in ComfyUI and in diffusers.

    DIR/ <name>-comfyui.safetensors  workflow.json     for ComfyUI
         <name>.safetensors          draw.py           for diffusers
         preview.png                 pack.json         the picture, what it was drawn from
         README.md                                     what to put where, and how equal the pictures can be

No paths and no user names go in; the prompt does. Nothing is drawn here and no model is loaded.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux_ft import __version__, flow
from flux_ft.adapters.formats import TOLERANCE, read_adapter, verify_written, write_adapter
from flux_ft.adapters.metadata import EXPORT_KEY
from flux_ft.config import slugify
from flux_ft.errors import AdapterError, ConfigError, InputError, StorageError
from flux_ft.families.base import Family, Variant
from flux_ft.families.registry import FLUX_TINY, VARIANTS, find_variant, open_family, parts_source, tiny_folder
from flux_ft.files import write_whole
from flux_ft.infer import comfy, pack_text
from flux_ft.infer.grid import save_png
from flux_ft.infer.pack_text import ImageRequest
from flux_ft.infer.runner import file_sha256
from flux_ft.runfile import load_run
from flux_ft.types import AdapterState

PICTURE, WORKFLOW, SCRIPT, PARAMETERS, README = "preview.png", "workflow.json", "draw.py", "pack.json", "README.md"
COMFY_SUFFIX = "-comfyui"
"""Ends the name of the kohya file, as in a run folder."""
MOST_STEPS = 10_000
_REDRAW = "draw one with `flux-ft generate --lora FILE …`, and give that picture"


@dataclass(frozen=True)
class UsedLora:
    """A LoRA as a picture's recipe names it."""

    file: str
    strength: float
    sha256: str | None
    """None where the recipe does not say, as in a run folder."""


@dataclass(frozen=True)
class Preview:
    """A picture, and what it was drawn from."""

    picture: Path
    request: ImageRequest
    model: str
    model_parts: str | None
    loras: tuple[UsedLora, ...]
    device: str | None
    """None where it is not known."""
    drawn_by: Mapping[str, str]
    """Versions."""
    files: tuple[Path, ...] = ()
    """The LoRAs, where the preview knows where they are."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackedLora:
    """One LoRA in the pack."""

    comfy_file: str | None
    diffusers_file: str
    strength: float
    worst_error: float
    """Largest relative error of a written ΔW."""


@dataclass(frozen=True)
class Packed:
    """What a pack holds."""

    folder: Path
    files: tuple[str, ...]
    loras: tuple[PackedLora, ...]
    notes: tuple[str, ...]
    """What a user should know of how equal the pictures can be."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "loras": [asdict(one) for one in self.loras],
            "notes": list(self.notes),
        }

    def for_people(self) -> str:
        """For people."""
        return "\n".join([f"wrote {self.folder}: {', '.join(self.files)}", *(f"note: {one}" for one in self.notes)])


def pack_preview(source: Path, loras: Sequence[Path], folder: Path, *, prompt: int = 0) -> Packed:
    """Write the pack of one picture to `folder`, which is new or empty.

    `source` is a PNG of `flux-ft generate`, with the LoRAs that it was drawn with in any order, or a run folder, whose
    last preview of the prompt with the number `prompt` is taken; its LoRA is found by itself. Raises InputError,
    StorageError.
    """
    preview = preview_of_run(source, prompt) if source.is_dir() else preview_of_picture(source)
    return write_pack(preview, loras, folder)


# --- Where a picture comes from. ---


def preview_of_picture(path: Path) -> Preview:
    """What a PNG of `flux-ft generate` says of itself. Raises InputError when it says nothing, or nothing sensible."""
    text = _opened(path).info.get("flux_ft")
    if text is None:
        raise InputError(f"`{path}` does not say how it was drawn", hint=_REDRAW)
    try:
        preview = _from_recipe(path, json.loads(text))
        preview.request.prompt.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"`{path}` says in a damaged way how it was drawn: {error}", hint=_REDRAW) from error
    return preview


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            return picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"`{path}` cannot be read as a PNG: {error}", hint=f"give a picture; or {_REDRAW}") from error


def _from_recipe(path: Path, recipe: Mapping[str, Any]) -> Preview:
    """ValueError, TypeError, KeyError or AttributeError for what `Runner.recipe` does not write."""
    request, strength = _request_of(recipe)
    whole = (request.seed, request.width_px, request.height_px, request.steps)
    if not isinstance(request.prompt, str) or any(type(number) is not int for number in whole):
        raise TypeError(f"the request is {request}")
    if min(whole[1:]) < 1 or request.steps > MOST_STEPS or request.seed < 0 or not math.isfinite(request.guidance):
        raise ValueError(f"the request is {request}")
    loras = tuple(
        UsedLora(str(one["file"]), float(one["strength"]) * strength, str(one["sha256"])) for one in recipe["adapters"]
    )
    parts = recipe["model_parts"]
    versions = {name: str(recipe[name]) for name in ("flux_ft", "torch", "dtype")}
    model = str(recipe["model"])
    return Preview(path, request, model, parts and str(parts), loras, str(recipe["device"]), versions)


def _request_of(recipe: Mapping[str, Any]) -> tuple[ImageRequest, float]:
    """The request, and what multiplies the LoRAs' strengths; of both formats that `records` knows."""
    fields = dict(recipe["request"])
    if "format" not in recipe:
        return ImageRequest(**fields), 1.0
    if fields.get("task") != "text-to-image" or fields.get("true_cfg", 1) != 1:
        raise InputError("packs hold pictures that were drawn from a prompt alone, without `true_cfg`", hint=_REDRAW)
    names = ("seed", "width", "height", "steps", "guidance")
    return ImageRequest(fields.get("prompt", ""), *(fields[name] for name in names)), fields["finetune_strength"]


def preview_of_run(folder: Path, prompt: int = 0) -> Preview:
    """The last preview of one prompt in a run folder. Raises InputError when there is none, or none with a LoRA."""
    config = load_run(folder / "run.yaml").config
    if config.finetune_type != "lora":
        raise InputError(f"{folder}: its previews were drawn with the full model, not with a LoRA", hint=_REDRAW)
    steps = sorted((folder / "previews").glob("step-??????/prompts.json"))
    try:
        prompts = [str(one) for one in json.loads(steps[-1].read_text(encoding="utf-8"))] if steps else []
    except (OSError, ValueError) as error:
        raise InputError(f"`{steps[-1]}` cannot be read: {error}", hint=_REDRAW) from error
    if not 0 <= prompt < len(prompts):
        raise InputError(f"{folder}: has {len(prompts)} previews, and none with the number {prompt}", hint=_REDRAW)
    names = [f"{config.slug}{end}.safetensors" for end in ("", COMFY_SUFFIX)]
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder}: holds no LoRA yet", hint="let the run finish: flux-ft train RUN.yaml --resume")
    variant, _ = find_variant(config.model, config.model_parts)
    preview = config.preview
    request = ImageRequest(
        prompts[prompt],
        preview.seed + prompt,
        preview.width or variant.sample_size_px,
        preview.height or variant.sample_size_px,
        preview.steps or variant.default_steps,
        variant.default_guidance if preview.guidance is None else preview.guidance,
    )
    step = int(steps[-1].parent.name.removeprefix("step-"))
    note = f"the preview was drawn while training, after {step} steps, and before the LoRA was rounded"
    picture = steps[-1].with_name(f"{prompt:02d}.png")
    used = UsedLora(files[0].name, 1.0, None)
    return Preview(picture, request, config.model, config.model_parts, (used,), None, {}, (files[0],), (note,))


# --- The pack. ---


def write_pack(preview: Preview, loras: Sequence[Path], folder: Path) -> Packed:
    """Write a pack to `folder`, which is new or empty, whole or not at all.

    Raises AdapterError when `loras` are not those of the picture, InputError, StorageError.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`{folder}` exists already", hint="choose a new folder, or empty it first")
    image, request = _opened(preview.picture).convert("RGB"), preview.request
    if image.size != (request.width_px, request.height_px):
        sizes = f"{image.width}×{image.height} px and was drawn with {request.width_px}×{request.height_px}"
        raise InputError(f"`{preview.picture}` is {sizes}", hint=f"give the picture as it was drawn; or {_REDRAW}")
    family = open_family(preview.model, preview.model_parts)
    states = [read_adapter(path) for path in _in_order(preview, loras)]
    names = _names([one.file for one in preview.loras])
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        staging.mkdir(parents=True)
        packed = _write(preview, image, family, list(zip(names, states, strict=True)), staging)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except OSError as error:
        hint = "free space there, or choose another folder"
        raise StorageError(f"cannot write `{folder}`: {error.strerror or error}", hint=hint) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return replace(packed, folder=folder)


def _in_order(preview: Preview, loras: Sequence[Path]) -> list[Path]:
    """The files in the recipe's order. AdapterError unless they are the ones that the picture was drawn with."""
    given = list(loras) or list(preview.files)
    if not preview.loras:
        raise AdapterError(f"`{preview.picture}` was drawn without a LoRA", hint=_REDRAW)
    found = []
    for used in preview.loras:
        path = next((path for path in given if used.sha256 is None or _digest(path) == used.sha256), None)
        if path is None:
            raise AdapterError(
                f"`{preview.picture}` was drawn with {used.file} (SHA-256 {(used.sha256 or '')[:12]}…), "
                f"which is none of {', '.join(path.name for path in given) or 'the files given, for there are none'}",
                hint=f"give that file; or {_REDRAW}",
            )
        found.append(path)
    if extra := [path for path in given if path not in found]:
        raise AdapterError(f"`{preview.picture}` was drawn without {extra[0].name}", hint="leave it out")
    return found


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise AdapterError(
            f"`{path}` cannot be read: {error.strerror or error}", hint="give the LoRA's path"
        ) from error


def _names(files: Sequence[str]) -> list[str]:
    """A name for each LoRA's files: its own, in letters that every system takes, and each once."""
    names: list[str] = []
    for file in files:
        name = slugify(re.sub(rf"({COMFY_SUFFIX})?\.safetensors$", "", file)) or "lora"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def runs_in_comfyui(variant: Variant) -> bool:
    """ComfyUI has no flux-tiny, nor a text encoder or autoencoder of its size."""
    return variant.architecture != FLUX_TINY.architecture


def _write(
    preview: Preview, image: Image.Image, family: Family, loras: Sequence[tuple[str, AdapterState]], folder: Path
) -> Packed:
    variant, request = family.variant, preview.request
    in_comfyui = runs_in_comfyui(variant)
    written = tuple(
        _export(name, state, used.strength, folder, in_comfyui)
        for (name, state), used in zip(loras, preview.loras, strict=True)
    )
    _, height, width = family.latent_shape(request.width_px, request.height_px)
    facts = pack_text.Facts(
        request=request,
        sigmas=tuple(flow.sampling_sigmas(request.steps, family.shift_mu(height, width)).tolist()),
        model=_loadable(preview),
        model_name=_public(preview.model),
        transformer=Path(preview.model).name if preview.model.endswith(".safetensors") else None,
        loras=tuple((one.diffusers_file, one.strength) for one in written),
        comfy_loras=tuple((one.comfy_file, one.strength) for one in written if one.comfy_file),
        variant=variant,
        device="cpu" if preview.device == "cpu" else None,
        notes=(*preview.notes, *_notes(request, in_comfyui)),
    )
    about = {"model": facts.model_name, "model_parts": preview.model_parts and _public(preview.model_parts)}
    info = PngInfo()
    info.add_text("flux_ft", json.dumps(_recipe(preview, about, written, folder), ensure_ascii=True))
    if in_comfyui:
        graph = comfy.workflow(pack_text.graph(facts))
        write_whole(folder / WORKFLOW, json.dumps(graph, indent=2).encode())
        info.add_text("workflow", json.dumps(graph, ensure_ascii=True))  # so that the picture can be dropped as well
    save_png(image, folder / PICTURE, info)
    parameters = {
        "format_version": 1, **about, "request": asdict(request), "sigmas": facts.sigmas,
        "max_text_tokens": variant.max_text_tokens, "loras": [asdict(one) for one in written],
        "device": preview.device, "drawn_by": dict(preview.drawn_by), "packed_by": __version__, "notes": facts.notes,
    }  # fmt: skip
    write_whole(folder / PARAMETERS, json.dumps(parameters, indent=2).encode())
    write_whole(folder / SCRIPT, pack_text.script(facts).encode())
    write_whole(folder / README, pack_text.readme(facts).encode())
    return Packed(folder, tuple(sorted(path.name for path in folder.iterdir())), written, facts.notes)


def _export(name: str, state: AdapterState, strength: float, folder: Path, in_comfyui: bool) -> PackedLora:
    """The LoRA in both layouts, with its own header entries, in the smallest dtype that changes nothing."""
    dtype = _exact_dtype(state)
    worst = 0.0
    for flavour, end in (("kohya", COMFY_SUFFIX), ("diffusers", ""))[0 if in_comfyui else 1 :]:
        path = folder / f"{name}{end}.safetensors"
        write_adapter(path, state, flavour, dtype, _header(state.metadata, flavour))
        worst = max(worst, verify_written(path, state, dtype))
    comfy_file = f"{name}{COMFY_SUFFIX}.safetensors" if in_comfyui else None
    return PackedLora(comfy_file, f"{name}.safetensors", strength, worst)


def _exact_dtype(state: AdapterState) -> torch.dtype:
    """The dtype that the factors have, if no scale must be multiplied in; else float32."""
    dtypes = {factor.dtype for layer in state.layers.values() for factor in (layer.down_RI, layer.up_OR)}
    unscaled = all(layer.alpha == layer.rank for layer in state.layers.values())
    return dtypes.pop() if unscaled and len(dtypes) == 1 and dtypes <= TOLERANCE.keys() else torch.float32


def _header(metadata: Mapping[str, str], flavour: str) -> dict[str, str]:
    entries = dict(metadata)
    try:
        entries[EXPORT_KEY] = json.dumps(json.loads(entries[EXPORT_KEY]) | {"flavour": flavour}, ensure_ascii=False)
    except (KeyError, ValueError, TypeError):
        entries.pop(EXPORT_KEY, None)
    return entries


def _public(model: str) -> str:
    """A variant's name or a Hub id as it is; of a path the last part alone."""
    return model if model in VARIANTS or _is_hub_id(model) else Path(model).name


def _is_hub_id(model: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)) and not Path(model).exists()


def _loadable(preview: Preview) -> str | None:
    """What the diffusers pipeline is loaded from: a Hub id, "builtin:…"; None for a folder that only the user has."""
    source = parts_source(preview.model, preview.model_parts)
    if source == str(tiny_folder()):
        return FLUX_TINY.source
    return source if _is_hub_id(source) else None


def _recipe(preview: Preview, about: Mapping[str, Any], loras: Sequence[PackedLora], folder: Path) -> dict[str, Any]:
    """As `Runner.recipe` writes it, for the files of the pack."""
    adapters = [
        {"file": one.diffusers_file, "strength": one.strength, "sha256": file_sha256(folder / one.diffusers_file)}
        for one in loras
    ]
    known = {"device": preview.device or "unknown", "dtype": "unknown", "flux_ft": "unknown", "torch": "unknown"}
    return {"request": asdict(preview.request), **about, "adapters": adapters, **known, **preview.drawn_by}


def _notes(request: ImageRequest, in_comfyui: bool) -> list[str]:
    notes = []
    if in_comfyui and request.seed > comfy.LARGEST_JS_INTEGER:
        notes.append(f"ComfyUI's page rounds seeds above 2^53, so {request.seed} draws another picture there")
    if in_comfyui and not comfy.is_expressible(request.prompt):
        notes.append("ComfyUI reads //, /*, backslashes and embedding: in its own way: check the prompt there")
    return notes
