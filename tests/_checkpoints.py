"""Small FLUX.1 transformers as files of every layout, made without the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_ft.families import layout

H, CONTEXT = 16, 8
"""Width of the model, and of its text states."""
_DOUBLE = {
    f"{stream}_{part}": shape
    for stream in ("img", "txt")
    for part, shape in {
        "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "mod.lin": (6, 1),
    }.items()
}  # fmt: skip
_SINGLE = {"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)}
_DOUBLE_NORMS = [f"{stream}_attn.norm.{part}_norm.scale" for stream in ("img", "txt") for part in ("query", "key")]
_SINGLE_NORMS = ["norm.query_norm.scale", "norm.key_norm.scale"]


def shapes(double: int = 2, single: int = 2, guided: bool = True) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original layout, by its key."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

    for stream, count, linears, norms in (
        ("double_blocks", double, _DOUBLE, _DOUBLE_NORMS),
        ("single_blocks", single, _SINGLE, _SINGLE_NORMS),
    ):
        for index in range(count):
            for leaf, (out, into) in linears.items():
                linear(f"{stream}.{index}.{leaf}", out * H, into * H)
            found |= {f"{stream}.{index}.{norm}": (4,) for norm in norms}
    linear("img_in", H, 4)
    linear("txt_in", H, CONTEXT)
    for name in ("time_in", "vector_in", *(["guidance_in"] if guided else [])):
        linear(f"{name}.in_layer", H, 8)
        linear(f"{name}.out_layer", H, H)
    linear("final_layer.linear", 4, H)
    linear("final_layer.adaLN_modulation.1", 2 * H, H)
    return found


def is_matrix(key: str) -> bool:
    """Whether it is the matrix of a linear inside a block."""
    return "_blocks." in key and key.endswith(".weight")


def model(seed: int = 0, dtype: torch.dtype = torch.float32, double: int = 2, single: int = 2) -> dict[str, Tensor]:
    """Random weights in the original layout."""
    rng = torch.Generator().manual_seed(seed)
    return {key: (0.02 * torch.randn(shape, generator=rng)).to(dtype) for key, shape in shapes(double, single).items()}


def planted(weights: dict[str, Tensor], rank: int, size: float = 1e-3, seed: int = 1) -> dict[str, Tensor]:
    """The same model with a change of this rank, and of this size per entry, in every block matrix; in float32."""
    rng = torch.Generator().manual_seed(seed)
    tuned = {}
    for key, tensor in weights.items():
        tuned[key] = tensor.float().clone()
        if is_matrix(key):
            up = torch.randn(tensor.shape[0], rank, generator=rng)
            tuned[key] += up @ torch.randn(rank, tensor.shape[1], generator=rng) * (size / rank**0.5)
    return tuned


def save_original(path: Path, weights: dict[str, Tensor], prefix: str = "", **extra: Tensor) -> Path:
    """One file in the original layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{prefix}{key}": tensor.contiguous() for key, tensor in weights.items()} | extra, path)
    return path


def to_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in diffusers' names, each tensor with memory of its own."""
    return {key: tensor.clone() for key, tensor in layout.to_diffusers(dict(weights)).items()}


def save_diffusers(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> Path:
    """A folder in the diffusers layout with its config.json; several shards and an index, or one file."""
    folder.mkdir(parents=True)
    tensors = to_diffusers(weights)
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder
    where = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder
