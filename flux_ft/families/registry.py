"""Which models we know, and how a `model:` in a run file becomes a family. Loads without torch."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ft.errors import ModelError
from flux_ft.families.base import ImageInput, Variant
from flux_ft.families.tiny.weights import tiny_folder as tiny_folder

if TYPE_CHECKING:
    from flux_ft.families.base import Family

FLUX1_DEV = Variant(
    name="flux1-dev",
    family="flux1",
    source="black-forest-labs/FLUX.1-dev",
    pixel_multiple=16,
    latent_channels=16,
    max_pixels=1_048_576,
    training_sides_px=(1024, 768, 512),
    sample_size_px=1024,
    max_text_tokens=512,
    default_steps=28,
    default_guidance=3.5,
    license="FLUX.1 [dev] Non-Commercial License",
    architecture="flux-1-dev/lora",
    summary="12B, guidance-distilled; the base of most FLUX LoRAs",
)
FLUX1_KREA = replace(
    FLUX1_DEV,
    name="flux1-krea",
    source="black-forest-labs/FLUX.1-Krea-dev",
    default_guidance=4.5,
    summary="12B, as dev, tuned for photographic looks",
)
FLUX1_SCHNELL = replace(
    FLUX1_DEV,
    name="flux1-schnell",
    source="black-forest-labs/FLUX.1-schnell",
    max_text_tokens=256,
    default_steps=4,
    default_guidance=0.0,
    guidance_embedded=False,
    shifted=False,
    distilled=True,
    license="Apache-2.0",
    architecture="flux-1-schnell/lora",
    summary="12B, distilled to 4 steps; a poor base to train on",
)
FLUX1_FILL = replace(
    FLUX1_DEV,
    name="flux1-fill",
    source="black-forest-labs/FLUX.1-Fill-dev",
    image_input="fill",
    default_steps=50,
    default_guidance=30.0,
    summary="12B, repaints the masked part of a picture; draws, is not trained",
)
FLUX1_CANNY = replace(
    FLUX1_DEV,
    name="flux1-canny",
    source="black-forest-labs/FLUX.1-Canny-dev",
    image_input="control",
    default_steps=50,
    default_guidance=30.0,
    summary="12B, follows the edges of a picture; draws, is not trained",
)
FLUX1_DEPTH = replace(
    FLUX1_CANNY,
    name="flux1-depth",
    source="black-forest-labs/FLUX.1-Depth-dev",
    default_guidance=15.0,
    summary="12B, follows the depths of a picture; draws, is not trained",
)
FLUX1_KONTEXT = replace(
    FLUX1_DEV,
    name="flux1-kontext",
    source="black-forest-labs/FLUX.1-Kontext-dev",
    image_input="reference",
    default_guidance=2.5,
    summary="12B, changes a picture as told; draws, is not trained",
)
FLUX_TINY = replace(
    FLUX1_DEV,
    name="flux-tiny",
    source="builtin:flux-tiny",
    pixel_multiple=8,
    latent_channels=8,
    max_pixels=4096,
    training_sides_px=(64,),
    free_captions=False,
    sample_size_px=64,
    max_text_tokens=32,
    default_steps=20,
    default_guidance=2.0,
    license="Apache-2.0",
    architecture="flux-tiny/lora",
    summary="the real FLUX.1 classes at toy size, shipped with flux_ft; needs no GPU",
)
VARIANTS = {
    variant.name: variant
    for variant in (
        FLUX_TINY, FLUX1_DEV, FLUX1_KREA, FLUX1_SCHNELL, FLUX1_FILL, FLUX1_CANNY, FLUX1_DEPTH, FLUX1_KONTEXT,
    )
}  # fmt: skip


def find_variant(model: str, parts: str | None = None) -> tuple[Variant, str]:
    """The variant of a `model:` entry and where its weights are: a folder, a single file, or a Hub id.

    Raises ModelError, naming the nearest known variant, when `model` is none of these.
    """
    if model in VARIANTS:
        variant = VARIANTS[model]
        return variant, str(tiny_folder()) if variant.source.startswith("builtin:") else variant.source
    path = Path(model).expanduser()
    if path.is_dir():
        return _variant_of_folder(path), str(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"{model}: no such file", hint="give the path of a FLUX.1 checkpoint")
        return _variant_of_file(path, parts), str(path)
    known = [variant for variant in VARIANTS.values() if variant.source == model]
    if known:
        return known[0], model
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        # Any other Hub repository is taken to be built as FLUX.1-dev is; loading refuses it if it is not.
        return replace(FLUX1_DEV, name=model, source=model, license="see the model's page"), model
    near = difflib.get_close_matches(model, VARIANTS, n=1, cutoff=0.4)
    raise ModelError(
        f"`model: {model}` is not a known variant, a folder, a .safetensors file or a Hub id",
        hint=(f"did you mean `{near[0]}`? " if near else "") + "known variants: " + ", ".join(VARIANTS),
    )


def open_family(model: str, parts: str | None = None) -> Family:
    """The family that can load `model`; nothing is loaded yet. `parts` as in `Flux1`."""
    variant, source = find_variant(model, parts)
    from flux_ft.families.flux1 import Flux1  # torch and diffusers, only now

    return Flux1(variant, source, parts_source(model, parts))


def parts_source(model: str, parts: str | None = None) -> str:
    """Where the tokenizers, text encoders and autoencoder of `model` come from: a folder or a Hub id."""
    variant, source = find_variant(model, parts)
    if source.endswith(".safetensors"):
        return find_variant(parts)[1] if parts else variant.source
    return source


def _variant_of_folder(folder: Path) -> Variant:
    transformer = _json(folder / "transformer" / "config.json")
    if transformer.get("_class_name", "FluxTransformer2DModel") != "FluxTransformer2DModel":
        raise ModelError(
            f"{folder}: holds a {transformer['_class_name']}, not FLUX.1",
            hint="known variants: " + ", ".join(VARIANTS),
        )
    vae = _json(folder / "vae" / "config.json")
    guided = bool(transformer.get("guidance_embeds", False))
    base = FLUX1_DEV if guided else FLUX1_SCHNELL
    multiple = 2 ** len(vae.get("block_out_channels", (1, 1, 1, 1)))
    latents = int(vae.get("latent_channels", 16))
    image_input = _image_input(folder, int(transformer.get("in_channels", 64)), latents, multiple // 2)
    index = folder / "model_index.json"
    if image_input == "none" and index.is_file() and "Kontext" in str(_json(index).get("_class_name")):
        image_input = "reference"
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = _json(scheduler_file) if scheduler_file.is_file() else {}
    variant = replace(
        base, name=folder.name, source=str(folder), pixel_multiple=multiple,
        shifted=bool(scheduler.get("use_dynamic_shifting", guided)),
        latent_channels=latents, license="see the model's own", image_input=image_input,
    )  # fmt: skip
    if int(transformer.get("num_attention_heads", 24)) * int(transformer.get("attention_head_dim", 128)) == 3072:
        return variant
    # A small model of the same classes: sizes come from what it was made for.
    side = int(vae.get("sample_size", 64))
    return replace(
        variant,
        architecture=FLUX_TINY.architecture,
        max_pixels=side * side,
        training_sides_px=(side,),
        sample_size_px=side,
        max_text_tokens=FLUX_TINY.max_text_tokens,
        default_steps=FLUX_TINY.default_steps,
    )


def _image_input(where: Path, takes: int, latents: int, scale: int) -> ImageInput:
    """What a transformer of `takes` channels a token takes besides text; Kontext has as many as text-to-image."""
    known: dict[int, ImageInput] = {
        4 * latents: "none",
        8 * latents: "control",
        4 * (2 * latents + scale**2): "fill",
    }
    if takes not in known:
        raise ModelError(
            f"{where}: takes {takes} channels a token; models with this autoencoder take {', '.join(map(str, known))}",
            hint="these are text-to-image and Kontext, Canny and Depth, and Fill; is it a model of another kind?",
        )
    return known[takes]


def _variant_of_file(path: Path, parts: str | None) -> Variant:
    """dev or schnell, told apart by the guidance embedder, from the file's header alone; sizes are those of `parts`."""
    header = safetensors_header(path)
    if any(".lora_" in key or "_lora." in key or ".alpha" in key for key in header):
        raise ModelError(f"{path}: is a LoRA, not a model", hint=f"--lora {path}, with the --model it was made for")
    guided = any("guidance" in key for key in header)
    variant = replace(FLUX1_DEV if guided else FLUX1_SCHNELL, name=path.stem, license="see the model's own")
    sizes = find_variant(parts)[0] if parts else variant
    inputs = [entry for key, entry in header.items() if key.endswith(("img_in.weight", "x_embedder.weight"))]
    if inputs and len(inputs[0].get("shape", ())) == 2:
        image_input = _image_input(path, inputs[0]["shape"][1], sizes.latent_channels, sizes.pixel_multiple // 2)
        if image_input == "none" and "kontext" in path.stem.lower():  # of dev's shapes, so nothing else tells
            image_input = "reference"
        variant = replace(variant, image_input=image_input)
    if sizes.architecture != FLUX_TINY.architecture:
        return variant
    return replace(
        variant,
        architecture=sizes.architecture,
        pixel_multiple=sizes.pixel_multiple,
        latent_channels=sizes.latent_channels,
        max_pixels=sizes.max_pixels,
        training_sides_px=sizes.training_sides_px,
        sample_size_px=sizes.sample_size_px,
        max_text_tokens=sizes.max_text_tokens,
        free_captions=sizes.free_captions,
        default_steps=sizes.default_steps,
    )


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ModelError when there is none."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 100_000_000:
                raise ValueError(f"its header claims {size:,} bytes")
            header = json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}", hint="download it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: not a safetensors file", hint="download it again")
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: missing, so {path.parents[1]} is not a FLUX.1 model in the diffusers layout",
            hint="expected model_index.json, transformer/, vae/, text_encoder/, text_encoder_2/ and the tokenizers",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {error}") from error
    return content if isinstance(content, dict) else {}
