"""LoRA files: the key map between diffusers and BFL names, the flavours on disk, reading, writing, comparing.

Shapes in names: R rank, O out features, I in features.

    AdapterState ─to_diffusers→ `transformer.<path>.lora_A/lora_B.weight`            split modules, no alpha
                 ─to_kohya────→ `lora_unet_<bfl name>.lora_down/lora_up.weight, .alpha`  fused modules, alpha = rank

Everywhere ΔW = (alpha / rank) · up @ down. What we write has that factor multiplied into `up`, so that a tool that
ignores alpha, and one that honours it, see the same weights. The rules and their reasons: docs/lora_files.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flux_ft.adapters.metadata import check_strength, finished_header
from flux_ft.errors import AdapterError
from flux_ft.families.layout import DOUBLE_BLOCK, SINGLE_BLOCK
from flux_ft.files import write_whole
from flux_ft.types import AdapterState, LoraLayer

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What LoRA files are written in, by the names that users give."""

# --- Key map: the parts of each BFL block linear, made from the family's layout tables. ---

_BLOCKS = {  # BFL block list → (diffusers block list, its table)
    "double_blocks": ("transformer_blocks", DOUBLE_BLOCK),
    "single_blocks": ("single_transformer_blocks", SINGLE_BLOCK),
}
_MLP_PART, _MLP_RATIO = "proj_mlp", 4
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PART_OF = {  # (diffusers block list, path inside the block) → (BFL block list, BFL leaf, position in the fused matrix)
    (diffusers, part): (bfl, leaf, position)
    for bfl, (diffusers, table) in _BLOCKS.items()
    for leaf, parts in table.items()
    for position, part in enumerate(parts)
}


def bfl_module(path: str) -> tuple[str, int] | None:
    """`transformer_blocks.3.attn.to_k` → (`double_blocks.3.img_attn.qkv`, 1): BFL module and part; None if unmapped."""
    match = re.fullmatch(r"(\w+)\.(0|[1-9][0-9]*)\.(.+)", path)
    found = _PART_OF.get((match[1], match[3])) if match else None
    return (f"{found[0]}.{match[2]}.{found[1]}", found[2]) if match and found else None


def diffusers_modules(bfl_name: str) -> tuple[str, ...]:
    """The parts of a BFL module (dots, or underscores as in kohya) in row order; empty if no FLUX.1 block linear."""
    match = re.fullmatch(r"(double_blocks|single_blocks)[._](0|[1-9][0-9]*)[._](.+)", bfl_name)
    if match is None:
        return ()
    diffusers, table = _BLOCKS[match[1]]
    parts = next((parts for leaf, parts in table.items() if match[3] in (leaf, leaf.replace(".", "_"))), ())
    return tuple(f"{diffusers}.{match[2]}.{part}" for part in parts)


# --- Writing: AdapterState → tensors. ---


def _scaled_up(layer: LoraLayer) -> Tensor:
    return layer.up_OR.detach().float() * (layer.alpha / layer.rank)


def delta_weight(layer: LoraLayer) -> Tensor:
    """The weight change of one layer, (alpha / rank) · up @ down, in float32, shape (O, I)."""
    return _scaled_up(layer) @ layer.down_RI.detach().float()


def _rounded(tensor: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """A contiguous CPU copy in `dtype`. AdapterError when a finite value does not fit."""
    # A clone: safetensors refuses tensors that share memory, and layers with one shared `down` do.
    rounded = tensor.detach().to(device="cpu", dtype=dtype).clone(memory_format=torch.contiguous_format)
    if not torch.isfinite(rounded).all():
        hint = "export as bf16 or fp32; if that fails too, the training diverged: use an earlier checkpoint"
        raise AdapterError(f"`{path}` holds NaN, or values that {dtype} cannot store", hint=hint)
    return rounded


def to_diffusers(state: AdapterState, dtype: torch.dtype) -> dict[str, Tensor]:
    """The PEFT layout: `transformer.<path>.lora_A.weight` (R, I) and `.lora_B.weight` (O, R), scale folded into B.

    Every layer is padded with zeros to the largest rank: diffusers before mid-2026 scales mixed ranks wrongly.
    """
    rank = max((layer.rank for layer in state.layers.values()), default=0)
    tensors = {}
    for path, layer in state.layers.items():
        missing = rank - layer.rank
        down_RI = torch.nn.functional.pad(layer.down_RI, (0, 0, 0, missing))
        up_OR = torch.nn.functional.pad(_scaled_up(layer), (0, missing))
        tensors[f"{_DIFFUSERS.prefix}{path}{_DIFFUSERS.down}"] = _rounded(down_RI, dtype, path)
        tensors[f"{_DIFFUSERS.prefix}{path}{_DIFFUSERS.up}"] = _rounded(up_OR, dtype, path)
    return tensors


def to_kohya(state: AdapterState, dtype: torch.dtype) -> dict[str, Tensor]:
    """The kohya layout, BFL modules fused: `.lora_down.weight` (R, I), `.lora_up.weight` (O, R), `.alpha` = R.

    AdapterError when a layer is no FLUX.1 block linear, or the parts of a fused module do not fit together.
    """
    fused: dict[str, dict[int, LoraLayer]] = {}
    for path, layer in state.layers.items():
        place = bfl_module(path)
        if place is None:
            raise AdapterError(f"`{path}` is no FLUX.1 block linear, so kohya has no name for it", hint="use diffusers")
        fused.setdefault(place[0], {})[place[1]] = layer
    tensors = {}
    for name, parts in fused.items():
        down_RI, up_OR = _fuse(name, parts)
        key = _KOHYA.prefix + name.replace(".", "_")
        tensors[key + _KOHYA.down] = _rounded(down_RI, dtype, name)
        tensors[key + _KOHYA.up] = _rounded(up_OR, dtype, name)
        # float32: bf16 holds whole numbers exactly only up to 256, and a fused rank can be larger.
        tensors[key + ".alpha"] = torch.tensor(float(down_RI.shape[0]), dtype=torch.float32)
    return tensors


def _fuse(name: str, parts: Mapping[int, LoraLayer]) -> tuple[Tensor, Tensor]:
    """One fused pair (down_RI, up_OR) of scale 1: parts that share one `down` keep its rank, else the ranks add up.

    Where they add up, `up` is block-diagonal. Its zeros stay exact: readers recognise the blocks by them.
    """
    rows = _fused_rows(name, parts)
    downs = [parts[position].down_RI.float() for position in sorted(parts)]
    shared = all(torch.equal(down, downs[0]) for down in downs)
    down_RI = downs[0] if shared else torch.cat(downs)
    up_OR = torch.zeros(sum(rows), down_RI.shape[0])
    column = 0
    for position in sorted(parts):
        up_part = _scaled_up(parts[position])
        first = sum(rows[:position])
        up_OR[first : first + rows[position], column : column + up_part.shape[1]] = up_part
        column += 0 if shared else up_part.shape[1]
    return down_RI, up_OR


def _fused_rows(name: str, parts: Mapping[int, LoraLayer]) -> tuple[int, ...]:
    """Rows of each part: q, k, v are as wide as the input; the MLP as the state has it, else 4 times that."""
    paths = diffusers_modules(name)
    width = next(iter(parts.values())).down_RI.shape[1]
    rows = []
    for position, path in enumerate(paths):
        layer, is_mlp = parts.get(position), path.endswith(_MLP_PART)
        rows.append(layer.up_OR.shape[0] if layer else width * (_MLP_RATIO if is_mlp else 1))
        if layer and (layer.down_RI.shape[1] != width or (len(paths) > 1 and not is_mlp and rows[-1] != width)):
            shape = (rows[-1], layer.down_RI.shape[1])
            raise AdapterError(f"`{path}` of shape {shape} does not fit into `{name}`", hint="is it a FLUX.1 LoRA?")
    return tuple(rows)


# --- Reading: tensors → AdapterState. ---


def detect_format(keys: Iterable[str]) -> str:
    """The flavour's name. AdapterError names the first key that is of none, or of another flavour than the rest."""
    names = sorted(keys)
    if not names:
        raise AdapterError("no tensors in the file", hint=_SUPPORTED)
    flavour = next((one for one in FLAVOURS.values() if names[0].startswith(one.prefix)), None)
    foreign = names[0] if flavour is None else next((key for key in names if not key.startswith(flavour.prefix)), None)
    if flavour is None or foreign is not None:
        raise AdapterError(f"key `{foreign}` is of no supported LoRA flavour, or not of the others'", hint=_SUPPORTED)
    return flavour.name


def from_diffusers(tensors: Mapping[str, Tensor]) -> AdapterState:
    """Reads the PEFT layout. A missing `.alpha` means scale 1. Trailing all-zero ranks, our padding, are taken off."""
    return AdapterState({path: _without_padding(layer) for path, layer in _pair_up(tensors, _DIFFUSERS).items()})


def from_kohya(tensors: Mapping[str, Tensor]) -> AdapterState:
    """Reads the kohya layout and splits fused modules. A missing `.alpha` means scale 1."""
    layers = {}
    for name, layer in _pair_up(tensors, _KOHYA).items():
        layers.update(_split(name, layer))
    return AdapterState(layers)


def _pair_up(tensors: Mapping[str, Tensor], flavour: Flavour) -> dict[str, LoraLayer]:
    """Module name → layer, names sorted. AdapterError on a foreign key, a missing partner or a broken tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        suffix = next((one for one in (flavour.down, flavour.up, ".alpha") if key.endswith(one)), None)
        if suffix is None or not key.startswith(flavour.prefix) or len(key) <= len(flavour.prefix + suffix):
            raise AdapterError(f"key `{key}` does not belong in a {flavour.name} LoRA", hint=_SUPPORTED)
        found.setdefault(key[len(flavour.prefix) : -len(suffix)], {})[suffix] = _checked(key, tensors[key])
    layers = {}
    for name, roles in found.items():
        for suffix in (flavour.down, flavour.up):
            if suffix not in roles:
                raise AdapterError(f"`{flavour.prefix}{name}{suffix}` is missing", hint="export it again")
        layers[name] = _layer(flavour.prefix + name, roles[flavour.down], roles[flavour.up], roles.get(".alpha"))
    return layers


def _checked(key: str, tensor: Tensor) -> Tensor:
    known = (*_FLOATS, torch.int64) if key.endswith(".alpha") else _FLOATS  # kohya's extractor writes int64 alphas
    if tensor.dtype not in known or not torch.isfinite(tensor).all():
        what = "NaN or infinity" if tensor.dtype in known else f"{tensor.dtype}"
        raise AdapterError(f"`{key}` holds {what}", hint="expected finite fp16, bf16, fp32 or fp64 values")
    return tensor


def _layer(name: str, down_RI: Tensor, up_OR: Tensor, alpha: Tensor | None) -> LoraLayer:
    down, up = tuple(down_RI.shape), tuple(up_OR.shape)
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
        raise AdapterError(f"`{name}` has factors {down} and {up}", hint="expected (rank, in) and (out, rank)")
    if alpha is not None and alpha.numel() != 1:
        raise AdapterError(f"`{name}.alpha` has shape {tuple(alpha.shape)}", hint="expected one number")
    return LoraLayer(down_RI, up_OR, float(down_RI.shape[0] if alpha is None else alpha.item()))


def _without_padding(layer: LoraLayer) -> LoraLayer:
    """The same ΔW without the trailing ranks whose `down` row and `up` column are both exactly zero."""
    used = torch.nonzero((layer.down_RI != 0).any(1) | (layer.up_OR != 0).any(0))
    rank = int(used[-1]) + 1 if len(used) else 1
    return LoraLayer(layer.down_RI[:rank], layer.up_OR[:, :rank], layer.alpha * rank / layer.rank)


def _split(name: str, layer: LoraLayer) -> dict[str, LoraLayer]:
    """The diffusers layers of BFL module `name`: `down` copied to each part, `up` cut by rows. Exact.

    Where no column of `up` serves two parts it is block-diagonal, and each part keeps its own columns. Parts whose rows
    are all zero were not trained and are left out, unless all are (a LoRA at its first step).
    """
    paths = diffusers_modules(name)
    if not paths:
        hint = "only block linears are supported; embedders, the final layer, norms and text encoders are not"
        raise AdapterError(f"`{_KOHYA.prefix}{name}` is not a linear inside a FLUX.1 block", hint=hint)
    if len(paths) == 1:
        return {paths[0]: layer}
    out, width = layer.up_OR.shape[0], layer.down_RI.shape[1]
    mlp = [out - 3 * width] if paths[-1].endswith(_MLP_PART) else []
    if (mlp and mlp[0] <= 0) or (not mlp and out != 3 * width):
        raise AdapterError(f"`{name}` has shape ({out}, {width}), which fits no FLUX.1 block", hint="is it FLUX.1?")
    ups = torch.split(layer.up_OR, [width] * 3 + mlp)
    used_PR = torch.stack([(up != 0).any(0) for up in ups])
    if not used_PR.any():
        return {path: replace(layer, up_OR=up) for path, up in zip(paths, ups, strict=True)}
    if (used_PR.sum(0) > 1).any():
        used_PR = used_PR.any(1, keepdim=True).expand_as(used_PR)
    split = {}
    for path, up, used_R in zip(paths, ups, used_PR, strict=True):
        if used_R.any():
            alpha = layer.alpha * int(used_R.sum()) / layer.rank
            split[path] = LoraLayer(layer.down_RI[used_R], up[:, used_R], alpha)
    return split


# --- The flavours. A further one is a row here and its two functions. ---


@dataclass(frozen=True)
class Flavour:
    """One layout on disk: how its keys begin and end, and the two ways across."""

    name: str
    prefix: str
    down: str
    up: str
    read: Callable[[Mapping[str, Tensor]], AdapterState]
    write: Callable[[AdapterState, torch.dtype], dict[str, Tensor]]


_DIFFUSERS = Flavour("diffusers", "transformer.", ".lora_A.weight", ".lora_B.weight", from_diffusers, to_diffusers)
_KOHYA = Flavour("kohya", "lora_unet_", ".lora_down.weight", ".lora_up.weight", from_kohya, to_kohya)
FLAVOURS = {flavour.name: flavour for flavour in (_DIFFUSERS, _KOHYA)}
_SUPPORTED = "supported: " + " and ".join(f"{f.name} (`{f.prefix}…{f.down}`, `…{f.up}`)" for f in FLAVOURS.values())
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}
"""The dtypes that are written, and the relative error in ΔW that rounding both factors to them explains."""


# --- Files: reading, writing, comparing. ---


def read_adapter(path: Path) -> AdapterState:
    """Reads a file of any supported flavour, header entries too. AdapterError names the file and the first bad key."""
    tensors, metadata = _load(path)
    try:
        flavour = FLAVOURS[detect_format(tensors)]
        if flavour is _DIFFUSERS:
            check_strength(metadata)
        return replace(flavour.read(tensors), metadata=metadata)
    except AdapterError as error:
        raise AdapterError(f"`{path}`: {error.message}", hint=error.hint) from error


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        if not path.is_file():
            what = "is a folder, not a LoRA file" if path.is_dir() else "does not exist"
            raise AdapterError(f"`{path}` {what}", hint="give the path of a .safetensors file")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        hint = "copy or download it again; pickle files (.pt, .ckpt, .bin) are not read, since they can run code"
        raise AdapterError(f"`{path}` cannot be read as .safetensors: {error}", hint=hint) from error


def write_adapter(
    path: Path, state: AdapterState, format: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Writes one file, whole or not at all. Its header gets `metadata`, hashes and rank: see `finished_header`.

    AdapterError: unknown flavour or dtype, nothing to write, a value that is no string. StorageError: the disk.
    """
    if format not in FLAVOURS or dtype not in TOLERANCE:
        hint = f"flavours: {', '.join(FLAVOURS)}; dtypes: {', '.join(map(str, TOLERANCE))}"
        raise AdapterError(f"cannot write flavour `{format}` as {dtype}", hint=hint)
    if not state.layers:
        raise AdapterError("the LoRA has no layers", hint="check the training targets")
    flavour = FLAVOURS[format]
    tensors = flavour.write(state, dtype)
    rank = max(tensor.shape[0] for key, tensor in tensors.items() if key.endswith(flavour.down))
    blob = save(tensors)
    write_whole(path, finished_header(blob, metadata, rank), mode=0o644)


def compare_adapters(a: AdapterState, b: AdapterState) -> dict[str, float]:
    """Module path → ‖ΔWa − ΔWb‖ / ‖ΔWa‖ (Frobenius) over all modules of either; one that is absent counts as ΔW = 0.

    0 where both are zero, inf where only `a` is. ΔW is never formed; cancellation in the Gram matrices leaves a floor
    near 1e-8. AdapterError when a module has two shapes.
    """
    errors = {}
    for path in sorted(a.layers.keys() | b.layers.keys()):
        first, second = a.layers.get(path), b.layers.get(path)
        size = _norm([(first, 1.0)], path)
        gap = _norm([(first, 1.0), (second, -1.0)], path)
        errors[path] = gap / size if size else (0.0 if gap == 0 else float("inf"))
    return errors


def _norm(terms: list[tuple[LoraLayer | None, float]], path: str) -> float:
    """‖Σ sign · ΔW‖ in float64, by ‖UV‖² = ⟨UᵀU, VVᵀ⟩ with the factors side by side in U (O, ΣR) and V (ΣR, I)."""
    layers = [(layer, sign) for layer, sign in terms if layer is not None]
    if not layers:
        return 0.0
    if len({(layer.up_OR.shape[0], layer.down_RI.shape[1]) for layer, _ in layers}) > 1:
        raise AdapterError(f"`{path}` has different shapes in the two LoRAs", hint="they belong to different models")
    U_OR = torch.cat([one.up_OR.detach().cpu().double() * (sign * one.alpha / one.rank) for one, sign in layers], 1)
    V_RI = torch.cat([one.down_RI.detach().cpu().double() for one, _ in layers])
    return float(((U_OR.T @ U_OR) * (V_RI @ V_RI.T)).sum().clamp_min(0).sqrt())


def verify_written(path: Path, state: AdapterState, dtype: torch.dtype) -> float:
    """Reads a written file back: the worst relative error of its ΔW. AdapterError when rounding does not explain it."""
    written = read_adapter(path)
    errors = compare_adapters(state, written)
    worst = max(errors, key=lambda module: errors[module])
    if errors[worst] <= TOLERANCE[dtype]:
        return errors[worst]
    hint = "do not use this file; please report this, with the file's metadata"
    for where, what in ((written, "missing"), (state, "extra")):
        if worst not in where.layers:
            raise AdapterError(f"`{path}`: `{worst}` is {what} in the file", hint=hint)
    if dtype is torch.float16:
        hint = "its values are too small for fp16; export as bf16 or fp32"
    raise AdapterError(f"`{path}`: `{worst}` is off by {errors[worst]:.1e}, more than {dtype} explains", hint=hint)
