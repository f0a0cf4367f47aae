"""A ComfyUI workflow that repeats a picture: the format that the browser loads when a file is dropped on it.

The nodes are ComfyUI's own; names, sockets and rules are facts of its source (v0.3.64 and August 2026), read and not
run. What decides parity:

- ManualSigmas (in ComfyUI since 0.7, December 2025) takes the sigmas as they are. FLUX feeds them to the model
  unchanged, so ModelSamplingFlux, which only shapes what a scheduler makes, is not needed.
- RandomNoise draws on the CPU, float32, all channels at once: what `initial_noise` draws for the same seed.
- T5TokenizerOptions pads the prompt to as many tokens as here. ComfyUI's own 256 are half of dev's, and FLUX attends
  to padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_ft.families.base import Variant

SINCE = "0.7"
"""The first ComfyUI that has all the nodes."""
LARGEST_JS_INTEGER = 2**53 - 1
"""The browser rounds larger seeds."""

_Sockets = tuple[tuple[str, str], ...]
NODES: dict[str, tuple[_Sockets, _Sockets]] = {
    # type → (inputs that are linked, outputs), each (name, type)
    "UNETLoader": ((), (("MODEL", "MODEL"),)),
    "DualCLIPLoader": ((), (("CLIP", "CLIP"),)),
    "VAELoader": ((), (("VAE", "VAE"),)),
    "LoraLoaderModelOnly": ((("model", "MODEL"),), (("MODEL", "MODEL"),)),
    "T5TokenizerOptions": ((("clip", "CLIP"),), (("CLIP", "CLIP"),)),
    "CLIPTextEncode": ((("clip", "CLIP"),), (("CONDITIONING", "CONDITIONING"),)),
    "FluxGuidance": ((("conditioning", "CONDITIONING"),), (("CONDITIONING", "CONDITIONING"),)),
    "BasicGuider": ((("model", "MODEL"), ("conditioning", "CONDITIONING")), (("GUIDER", "GUIDER"),)),
    "KSamplerSelect": ((), (("SAMPLER", "SAMPLER"),)),
    "ManualSigmas": ((), (("SIGMAS", "SIGMAS"),)),
    "RandomNoise": ((), (("NOISE", "NOISE"),)),
    "EmptySD3LatentImage": ((), (("LATENT", "LATENT"),)),
    "SamplerCustomAdvanced": (
        (
            ("noise", "NOISE"), ("guider", "GUIDER"), ("sampler", "SAMPLER"), ("sigmas", "SIGMAS"),
            ("latent_image", "LATENT"),
        ),
        (("output", "LATENT"), ("denoised_output", "LATENT")),
    ),
    "VAEDecode": ((("samples", "LATENT"), ("vae", "VAE")), (("IMAGE", "IMAGE"),)),
    "SaveImage": ((("images", "IMAGE"),), ()),
}  # fmt: skip

_HUB = "https://huggingface.co"
_TRANSFORMERS = {  # Hub id → its transformer in one file
    "black-forest-labs/FLUX.1-dev": "flux1-dev.safetensors",
    "black-forest-labs/FLUX.1-schnell": "flux1-schnell.safetensors",
    "black-forest-labs/FLUX.1-Krea-dev": "flux1-krea-dev.safetensors",
}
_ENCODERS, _ENCODERS_AT = ("clip_l.safetensors", "t5xxl_fp16.safetensors"), "comfyanonymous/flux_text_encoders"
_VAE, _VAE_AT = "ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae"


@dataclass(frozen=True)
class Model:
    """A file that ComfyUI needs."""

    file: str
    folder: str
    """Below ComfyUI's `models`."""
    url: str | None
    """Where to get it; None for what only the user has."""


@dataclass(frozen=True)
class Graph:
    """What a workflow draws."""

    models: tuple[Model, ...]
    """Transformer, CLIP-L, T5, autoencoder."""
    loras: tuple[tuple[str, float], ...]
    """(file, strength)"""
    prompt: str
    seed: int
    width_px: int
    height_px: int
    sigmas: tuple[float, ...]
    guidance: float | None
    """None for a model without guidance embedding."""
    text_tokens: int
    """Tokens that T5 sees."""


def models_for(variant: Variant, transformer: str | None = None) -> tuple[Model, ...]:
    """Transformer, CLIP-L, T5 and autoencoder of a FLUX.1 variant; `transformer` names a file of the user's own."""
    known = _TRANSFORMERS.get(variant.source) if transformer is None else None
    own = known or transformer or f"{variant.name.rpartition('/')[2]}.safetensors"
    return (
        Model(own, "diffusion_models", f"{_HUB}/{variant.source}/resolve/main/{known}" if known else None),
        *(Model(one, "text_encoders", f"{_HUB}/{_ENCODERS_AT}/resolve/main/{one}") for one in _ENCODERS),
        Model(_VAE, "vae", f"{_HUB}/{_VAE_AT}/{_VAE}"),
    )


def literal(prompt: str) -> str:
    """The prompt as ComfyUI must be given it to mean each letter: ( ) and { } are its signs for weights and choices."""
    return re.sub(r"[(){}]", r"\\\g<0>", prompt)


def is_expressible(prompt: str) -> bool:
    """Whether `literal` is enough. Nothing undoes what `//`, `/*` and `embedding:` mean there, or backslashes."""
    return not re.search(r"//|/\*|\\|embedding:", prompt)


def sigma_text(sigmas: Sequence[float]) -> str:
    """Sigmas as ManualSigmas reads them: no exponents, and each float32 comes back as it was."""
    return ", ".join(np.format_float_positional(np.float32(sigma), unique=True, trim="0") for sigma in sigmas)


def workflow(graph: Graph) -> dict[str, Any]:
    """The JSON of the workflow, in the saved format, version 0.4."""
    build = _Builder()
    transformer, clip, t5, vae = graph.models
    model = build.add("UNETLoader", [transformer.file, "default"], models=[transformer])
    for file, strength in graph.loras:
        model = build.add("LoraLoaderModelOnly", [file, strength], {"model": model})
    encoders = build.add("DualCLIPLoader", [clip.file, t5.file, "flux", "default"], models=[clip, t5])
    padded = build.add("T5TokenizerOptions", [0, graph.text_tokens], {"clip": encoders})
    text = build.add("CLIPTextEncode", [literal(graph.prompt)], {"clip": padded})
    if graph.guidance is not None:
        text = build.add("FluxGuidance", [graph.guidance], {"conditioning": text})
    latents = build.add(
        "SamplerCustomAdvanced",
        [],
        {
            "noise": build.add("RandomNoise", [graph.seed, "fixed"]),
            "guider": build.add("BasicGuider", [], {"model": model, "conditioning": text}),
            "sampler": build.add("KSamplerSelect", ["euler"]),
            "sigmas": build.add("ManualSigmas", [sigma_text(graph.sigmas)]),
            "latent_image": build.add("EmptySD3LatentImage", [graph.width_px, graph.height_px, 1]),
        },
    )
    autoencoder = build.add("VAELoader", [vae.file], models=[vae])
    image = build.add("VAEDecode", [], {"samples": latents, "vae": autoencoder})
    build.add("SaveImage", ["flux_ft"], {"images": image})
    return build.finished()


class _Builder:
    """Nodes and links as they are added; a node's number stands for its first output."""

    _COLUMN_PX, _ROW_PX, _WIDTH_PX = 360, 190, 320

    def __init__(self) -> None:
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._columns: dict[int, int] = {}

    def add(
        self,
        type: str,
        widgets: list[Any],
        links: Mapping[str, int] | None = None,
        models: Sequence[Model] = (),
    ) -> int:
        """Put a node right of those that it is linked to, and return its number."""
        inputs, outputs = NODES[type]
        number = len(self._nodes) + 1
        sources = links or {}
        column = 1 + max((self._columns[source] for source in sources.values()), default=-1)
        row = sum(other == column for other in self._columns.values())
        self._columns[number] = column
        linked = [
            {"name": name, "type": kind, "link": self._link(sources[name], number, slot, kind)}
            for slot, (name, kind) in enumerate(inputs)
        ]
        offered = [
            {"name": name, "type": kind, "links": list[int](), "slot_index": slot}
            for slot, (name, kind) in enumerate(outputs)
        ]
        wanted = [{"name": one.file, "url": one.url, "directory": one.folder} for one in models if one.url]
        node = {
            "id": number,
            "type": type,
            "pos": [column * self._COLUMN_PX, row * self._ROW_PX],
            "size": [self._WIDTH_PX, 40 + 26 * (max(len(inputs), len(outputs)) + len(widgets))],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": linked,
            "outputs": offered,
            "properties": {"Node name for S&R": type} | ({"models": wanted} if wanted else {}),
            "widgets_values": widgets,
        }
        self._nodes.append(node)
        return number

    def _link(self, source: int, target: int, slot: int, kind: str) -> int:
        number = len(self._links) + 1
        self._links.append([number, source, 0, target, slot, kind])
        self._nodes[source - 1]["outputs"][0]["links"].append(number)
        return number

    def finished(self) -> dict[str, Any]:
        return {
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }
