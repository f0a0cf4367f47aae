"""LoRA files of every flavour, made without the code that reads and writes them; the tables are a copy of their own.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_ft.types import LoraLayer

H = 16
"""Width of the small models here."""


@dataclass(frozen=True)
class Model:
    """One family, as its papers' code has it."""

    name: str
    double: str
    single: str
    outside: str
    qkv_mlp: int
    """Rows of linear1 beside q, k and v, in units of the width, where diffusers keeps them apart; 0 where not."""

    def lines(self, double: int, single: int) -> dict[str, tuple[list[str], int, int]]:
        """BFL module → (its diffusers modules, out, in), sizes in units of the width."""
        found = {}
        for table, bfl, diffusers, count in (
            (self.double, "double_blocks", "transformer_blocks", double),
            (self.single, "single_blocks", "single_transformer_blocks", single),
        ):
            for index in range(count):
                for line in table.strip().splitlines():
                    leaf, out, into, *parts = line.split()
                    found[f"{bfl}.{index}.{leaf}"] = (
                        [f"{diffusers}.{index}.{part}" for part in parts], int(out), int(into),
                    )  # fmt: skip
        return found

    def others(self, text: int, channels: int = 4, small: int = 8, width: int = H) -> dict[str, tuple[str, int, int]]:
        """BFL module outside the blocks → (its diffusers module, out, in)."""
        sizes = {"H": width, "text": text, "in": channels, "small": small, "2H": 2 * width, "3H": 3 * width}
        sizes |= {"6H": 6 * width, "pooled": small}
        found = {}
        for line in self.outside.strip().splitlines():
            bfl, diffusers, out, into = line.split()
            found[bfl] = (diffusers, sizes[out], sizes[into])
        return found


FLUX1 = Model(
    "flux1",
    double="""
        img_attn.qkv 3 1 attn.to_q attn.to_k attn.to_v
        txt_attn.qkv 3 1 attn.add_q_proj attn.add_k_proj attn.add_v_proj
        img_attn.proj 1 1 attn.to_out.0
        txt_attn.proj 1 1 attn.to_add_out
        img_mlp.0 4 1 ff.net.0.proj
        img_mlp.2 1 4 ff.net.2
        txt_mlp.0 4 1 ff_context.net.0.proj
        txt_mlp.2 1 4 ff_context.net.2
        img_mod.lin 6 1 norm1.linear
        txt_mod.lin 6 1 norm1_context.linear
    """,
    single="""
        linear1 7 1 attn.to_q attn.to_k attn.to_v proj_mlp
        linear2 1 5 proj_out
        modulation.lin 3 1 norm.linear
    """,
    outside="""
        img_in x_embedder H in
        txt_in context_embedder H text
        time_in.in_layer time_text_embed.timestep_embedder.linear_1 H small
        time_in.out_layer time_text_embed.timestep_embedder.linear_2 H H
        vector_in.in_layer time_text_embed.text_embedder.linear_1 H pooled
        vector_in.out_layer time_text_embed.text_embedder.linear_2 H H
        guidance_in.in_layer time_text_embed.guidance_embedder.linear_1 H small
        guidance_in.out_layer time_text_embed.guidance_embedder.linear_2 H H
        final_layer.linear proj_out in H
        final_layer.adaLN_modulation.1 norm_out.linear 2H H
    """,
    qkv_mlp=4,
)
FLUX2 = Model(
    "flux2",
    double="""
        img_attn.qkv 3 1 attn.to_q attn.to_k attn.to_v
        txt_attn.qkv 3 1 attn.add_q_proj attn.add_k_proj attn.add_v_proj
        img_attn.proj 1 1 attn.to_out.0
        txt_attn.proj 1 1 attn.to_add_out
        img_mlp.0 6 1 ff.linear_in
        img_mlp.2 1 3 ff.linear_out
        txt_mlp.0 6 1 ff_context.linear_in
        txt_mlp.2 1 3 ff_context.linear_out
    """,
    single="""
        linear1 9 1 attn.to_qkv_mlp_proj
        linear2 1 4 attn.to_out
    """,
    outside="""
        img_in x_embedder H in
        txt_in context_embedder H text
        time_in.in_layer time_guidance_embed.timestep_embedder.linear_1 H small
        time_in.out_layer time_guidance_embed.timestep_embedder.linear_2 H H
        guidance_in.in_layer time_guidance_embed.guidance_embedder.linear_1 H small
        guidance_in.out_layer time_guidance_embed.guidance_embedder.linear_2 H H
        double_stream_modulation_img.lin double_stream_modulation_img.linear 6H H
        double_stream_modulation_txt.lin double_stream_modulation_txt.linear 6H H
        single_stream_modulation.lin single_stream_modulation.linear 3H H
        final_layer.linear proj_out in H
        final_layer.adaLN_modulation.1 norm_out.linear 2H H
    """,
    qkv_mlp=0,
)
MODELS = {model.name: model for model in (FLUX1, FLUX2)}
NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
}
Layers = dict[str, LoraLayer]
Tensors = dict[str, Tensor]


def part_rows(model: Model, bfl: str, parts: list[str], out: int, width: int) -> list[int]:
    if bfl.endswith("linear1") and len(parts) == 4:
        return [width, width, width, model.qkv_mlp * width]
    return [out * width // len(parts)] * len(parts)


def paths(model: Model, double: int = 2, single: int = 2) -> list[str]:
    """The diffusers paths of all block linears."""
    return [path for parts, _, _ in model.lines(double, single).values() for path in parts]


def random_layers(
    model: Model, ranks: Mapping[str, int], alpha: float = 2.5, double: int = 13, single: int = 13, width: int = H
) -> Layers:
    """Factors of random numbers for these diffusers paths, drawn path by path."""
    rng = torch.Generator().manual_seed(sum(ranks.values()))
    layers = {}
    for bfl, (parts, out, into) in model.lines(double, single).items():
        for path, rows in zip(parts, part_rows(model, bfl, parts, out, width), strict=True):
            if path in ranks:
                down = torch.randn(ranks[path], into * width, generator=rng)
                layers[path] = LoraLayer(down, torch.randn(rows, ranks[path], generator=rng), alpha)
    assert layers.keys() == ranks.keys()
    return layers


def outside_layers(model: Model, rank: int = 3, alpha: float = 2.5, text: int = 12) -> Layers:
    rng = torch.Generator().manual_seed(5)
    return {
        path: LoraLayer(torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng), alpha)
        for path, out, into in model.others(text).values()
    }


def delta(layer: LoraLayer) -> Tensor:
    """ΔW in float64."""
    return layer.up_OR.double() @ layer.down_RI.double() * (layer.alpha / layer.down_RI.shape[0])


def worst(a: Layers, b: Layers) -> float:
    """The largest ‖ΔWa − ΔWb‖ / ‖ΔWa‖; infinite where one has a module that the other has not."""
    if a.keys() != b.keys():
        return float("inf")
    return max(float((delta(a[path]) - delta(b[path])).norm() / delta(a[path]).norm()) for path in a)


# --- Files. ---


def fused(model: Model, layers: Layers, width: int = H) -> dict[str, tuple[Tensor, Tensor]]:
    """BFL module → (down, up) of scale 1, block-diagonal where there are several parts."""
    found = {}
    for bfl, (parts, out, _) in model.lines(20, 48).items():
        here = [part for part in parts if part in layers]
        if not here:
            continue
        rows = part_rows(model, bfl, parts, out, width)
        up = torch.zeros(sum(rows), sum(layers[part].rank for part in here))
        column = 0
        for position, part in enumerate(parts):
            if part in layers:
                layer = layers[part]
                start = sum(rows[:position])
                up[start : start + rows[position], column : column + layer.rank] = (
                    layer.up_OR * layer.alpha / layer.rank
                )
                column += layer.rank
        found[bfl] = torch.cat([layers[part].down_RI for part in here]), up
    for bfl, (path, _, _) in model.others(12).items():
        if path in layers:
            up = layers[path].up_OR * layers[path].alpha / layers[path].rank
            if bfl == "final_layer.adaLN_modulation.1":
                up = torch.cat([up[len(up) // 2 :], up[: len(up) // 2]])
            found[bfl] = layers[path].down_RI, up
    return found


def _pairs(named: Mapping[str, tuple[Tensor, Tensor]], ends: tuple[str, str], alpha: float | None = None) -> Tensors:
    """Tensors of a file; with `alpha`, the strength is taken out of up and into `.alpha`."""
    tensors = {}
    for name, (down, up) in named.items():
        rank = down.shape[0]
        tensors[name + ends[0]] = down.clone()
        tensors[name + ends[1]] = up.clone() if alpha is None else up * (rank / alpha)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


AB, DEFAULT, DOWN_UP = (
    (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)  # fmt: skip


def _split(layers: Layers) -> dict[str, tuple[Tensor, Tensor]]:
    return {path: (one.down_RI, one.up_OR * one.alpha / one.rank) for path, one in layers.items()}


def _prefixed(prefix: str, named: Mapping[str, tuple[Tensor, Tensor]], flat: bool = False) -> dict:
    return {prefix + (name.replace(".", "_") if flat else name): pair for name, pair in named.items()}


def header_of(layers: Layers) -> dict[str, str]:
    """diffusers' header entry for these strengths, in patterns by module."""
    entry = {
        "transformer.r": 77,
        "transformer.lora_alpha": 13.0,
        "transformer.rank_pattern": {f"^{path}": one.rank for path, one in layers.items()},
        "transformer.alpha_pattern": {path.replace(".", r"\."): one.alpha for path, one in layers.items()},
    }
    return {"lora_adapter_metadata": json.dumps(entry)}


def _raw(layers: Layers) -> dict[str, tuple[Tensor, Tensor]]:
    return {path: (one.down_RI, one.up_OR) for path, one in layers.items()}


Maker = Callable[[Model, Layers], tuple[Tensors, dict[str, str]]]
FILES: dict[str, tuple[str, Maker]] = {
    # what → (flavour that it is read as, tensors and header entries)
    "diffusers, baked": ("diffusers", lambda m, x: (_pairs(_prefixed("transformer.", _split(x)), AB), {})),
    "diffusers, alpha": ("diffusers", lambda m, x: (_pairs(_prefixed("transformer.", _split(x)), AB, 3.0), {})),
    "diffusers, header": (
        "diffusers", lambda m, x: (_pairs(_prefixed("transformer.", _raw(x)), AB), header_of(x)),
    ),
    "kohya": ("kohya", lambda m, x: (_pairs(_prefixed("lora_unet_", fused(m, x), True), DOWN_UP, 2.0), {})),
    "kohya, no alpha": ("kohya", lambda m, x: (_pairs(_prefixed("lora_unet_", fused(m, x), True), DOWN_UP), {})),
    "comfy, A/B": ("comfy", lambda m, x: (_pairs(_prefixed("diffusion_model.", fused(m, x)), AB), {})),
    "comfy, down/up": ("comfy", lambda m, x: (_pairs(_prefixed("diffusion_model.", fused(m, x)), DOWN_UP, 7.0), {})),
    "comfy, checkpoint's prefix": (
        "comfy", lambda m, x: (_pairs(_prefixed("model.diffusion_model.", fused(m, x)), AB, 4.0), {}),
    ),
    "comfy, diffusers names": ("comfy", lambda m, x: (_pairs(_prefixed("diffusion_model.", _split(x)), AB), {})),
    "bfl": ("bfl", lambda m, x: (_pairs(fused(m, x), AB), {})),
    "OneTrainer original": ("bfl", lambda m, x: (_pairs(fused(m, x), AB, 1.0), {})),
    "OneTrainer legacy": (
        "onetrainer", lambda m, x: (_pairs(_prefixed("lora_transformer_", _split(x), True), DOWN_UP, 1.5), {}),
    ),
    "LyCORIS": ("lycoris", lambda m, x: (_pairs(_prefixed("lycoris_", _split(x), True), DOWN_UP, 1.5), {})),
    "peft, BFL names": ("peft", lambda m, x: (_pairs(_prefixed("base_model.model.", fused(m, x)), AB), {})),
    "peft, diffusers names": ("peft", lambda m, x: (_pairs(_prefixed("base_model.model.", _split(x)), AB), {})),
    "bare": ("bare", lambda m, x: (_pairs(_split(x), AB), {})),
    "bare, default": ("bare", lambda m, x: (_pairs(_split(x), DEFAULT), {})),
}  # fmt: skip


def xlabs(layers: Layers) -> Tensors:
    """XLabs' names for attention: single blocks have no MLP part."""
    names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1"}
    names |= {"txt_attn.proj": "proj_lora2", "linear1": "qkv_lora", "linear2": "proj_lora"}
    tensors = {}
    for bfl, (down, up) in fused(FLUX1, layers).items():
        blocks, index, leaf = bfl.split(".", 2)
        key = f"{blocks}.{index}.processor.{names[leaf]}"
        tensors[f"{key}.down.weight"] = down
        tensors[f"{key}.up.weight"] = up[: 3 * H].clone() if leaf == "linear1" else up
    return tensors


def control(double: int = 2, single: int = 2, rank: int = 3, width: int = H, text: int = 12) -> Tensors:
    """A complete control LoRA as BFL writes them: dense factors, biases, norms."""
    rng = torch.Generator().manual_seed(9)
    tensors = {}

    def add(name: str, out: int, into: int) -> None:
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=rng)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=rng)
        tensors[f"{name}.lora_B.bias"] = torch.randn(out, generator=rng)

    for bfl, (_, out, into) in FLUX1.lines(double, single).items():
        add(bfl, out * width, into * width)
    for bfl, (_, out, into) in FLUX1.others(text, width=width).items():
        add(bfl, out, into)
    for bfl in NORMS:
        for index in range(double if bfl.startswith("double") else single):
            tensors[bfl.format(index)] = torch.randn(4, generator=rng)
    return tensors
