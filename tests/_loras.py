"""Random LoRAs for FLUX.1 and FLUX.2 at any width, and files that are not as they should be.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ft.families.layout import LAYOUTS
from flux_ft.types import AdapterState, LoraLayer

WIDTH = 16
Ranks = int | Callable[[str], int]


def block_paths(layout: str = "flux1", double: Iterable[int] = (0,), single: Iterable[int] = (0,)) -> list[str]:
    """diffusers' paths of all block linears of these blocks."""
    streams = zip(LAYOUTS[layout].streams, (double, single), strict=True)
    return [
        f"{stream.diffusers}.{index}.{part}"
        for stream, indices in streams
        for index in indices
        for parts in stream.linears.values()
        for part in parts
    ]


def shape_of(path: str, layout: str = "flux1", width: int = WIDTH) -> tuple[int, int]:
    """(O, I) of a block linear."""
    table = LAYOUTS[layout]
    place = table.place(path)
    assert place is not None
    units = table.units(place[0])
    assert units is not None
    parts = len(table.parts(place[0]))
    out = units[0] if parts == 1 else (1 if place[1] < 3 else units[0] - 3)
    return out * width, units[1] * width


def random_layer(path: str, rank: int, alpha: float, layout: str, width: int, rng: torch.Generator) -> LoraLayer:
    out, into = shape_of(path, layout, width)
    return LoraLayer(torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng) * 0.1, alpha)


def random_lora(
    paths: Iterable[str] | None = None,
    rank: Ranks = 4,
    alpha: float = 3.0,
    *,
    layout: str = "flux1",
    width: int = WIDTH,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> AdapterState:
    """All block linears of one block of each kind, unless `paths` are given."""
    rng = torch.Generator().manual_seed(seed)
    chosen = block_paths(layout) if paths is None else list(paths)
    ranks = {path: rank if isinstance(rank, int) else rank(path) for path in chosen}
    layers = {path: random_layer(path, ranks[path], alpha, layout, width, rng) for path in chosen}
    return AdapterState(layers, dict(metadata or {}), layout)


def edited(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], object], metadata: Mapping[str, str] | None = None
) -> Path:
    """A copy of a LoRA file whose tensors `change` has altered in place; its header entries are `metadata` alone."""
    tensors = load_file(source)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target, dict(metadata or {}))
    return target


def renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy with other keys; tensors whose new key is None are left out."""
    tensors = {new: tensor for key, tensor in load_file(source).items() if (new := rename(key)) is not None}
    save_file(tensors, target)
    return target


def with_header(source: Path, target: Path, metadata: Mapping[str, str]) -> Path:
    """A copy with these header entries beside its own."""
    blob = source.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    target.write_bytes(struct.pack("<Q", len(raw)) + raw + blob[8 + length :])
    return target


# --- Layouts that we do not write, made from those that we do by renaming. ---


def original(prefix: str, down: str, up: str, keep_alpha: bool = True) -> Callable[[str], str | None]:
    """From kohya's keys to the original's names with dots."""

    def rename(key: str) -> str | None:
        module, _, end = key.removeprefix("lora_unet_").partition(".")
        named = LAYOUTS["flux1"].find(module) or LAYOUTS["flux2"].find(module)
        assert named is not None
        if end == "alpha" and not keep_alpha:
            return None
        return f"{prefix}{named.original}." + {"lora_down.weight": down, "lora_up.weight": up}.get(end, end)

    return rename


AB = ("lora_A.weight", "lora_B.weight")
LAYOUT_CASES: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "kohya": ("kohya", lambda key: key),
    "diffusers": ("diffusers", lambda key: key),
    "comfy": ("comfy", lambda key: key),
    "comfy with alpha": ("kohya", original("diffusion_model.", *AB)),
    "comfy down/up": ("kohya", original("diffusion_model.", "lora_down.weight", "lora_up.weight")),
    "comfy, diffusers names": ("diffusers", lambda key: "diffusion_model." + key.removeprefix("transformer.")),
    "bare diffusers": ("diffusers", lambda key: key.removeprefix("transformer.")),
    "bare original": ("comfy", lambda key: key.removeprefix("diffusion_model.")),
    "wrapped": ("comfy", lambda key: "base_model.model." + key.removeprefix("diffusion_model.")),
    "onetrainer": (
        "diffusers",
        lambda key: (
            "lora_transformer_"
            + key.removeprefix("transformer.").rsplit(".", 2)[0].replace(".", "_")
            + (".lora_down.weight" if "lora_A" in key else ".lora_up.weight")
        ),
    ),
}
"""Layout, as the table of tools names it → the format that it is made from, and its keys."""
