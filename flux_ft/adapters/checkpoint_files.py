"""FLUX.1 transformer weights as they lie in files, matrix by matrix; the model is never loaded.

Whatever the layout on disk, a `Checkpoint` speaks in the original layout's names, in which q, k and v (and, in single
blocks, the first MLP matrix) are one matrix: a change has one spectrum there, and kohya files are written so. What is
read: folders in the diffusers layout (the model's or its `transformer/`, sharded or not) and single .safetensors files
in either layout, in fp32, fp16, bf16 or fp8. Scales beside fp8 weights are multiplied in (ComfyUI's `scale_weight` and
`weight_scale`); quantised files of other kinds are refused by name.

Shapes in names: O out features, I in features.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ft.errors import ModelError
from flux_ft.families import layout
from flux_ft.families.layout import FLUX1, SWAPPED

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The safetensors names of the dtypes that a weight may have."""
_CONTAINERS = ("model.diffusion_model.", "diffusion_model.")
_SCALES = (".scale_weight", ".weight_scale")
_NOT_WEIGHTS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")  # of activations, and markers
_QUANTISED = {  # a key's ending → what made the file
    ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes", ".SCB": "bitsandbytes", ".qweight": "GPTQ or nunchaku",
    ".wscales": "nunchaku", ".scale_inv": "blockwise fp8", ".weight_scale_inv": "blockwise fp8",
    ".float8_data": "float8 layers of another tool",
}  # fmt: skip
_LORA = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight")
_UNQUANTISED = "use the bf16, fp16 or fp32 file of the same model"

_STREAMS = {  # original block list → (diffusers block list, its linears, its norms)
    stream.original: (stream.diffusers, stream.linears, stream.norms) for stream in FLUX1.streams
}
_BLOCK = re.compile(r"(\w+)\.(0|[1-9][0-9]*)\.(.+)")


class Place(NamedTuple):
    """Where a tensor of the diffusers layout belongs: the original's name, and which of its row blocks it is."""

    name: str
    position: int
    parts: int
    """How many row blocks there are."""


def _tables() -> tuple[dict[tuple[str, str], Place], dict[str, str]]:
    """Places of a block's tensors by (diffusers block list, rest of the name), and modules outside the blocks."""
    inside = {}
    for original, (diffusers, linears, norms) in _STREAMS.items():
        for leaf, parts in linears.items():
            for position, part in enumerate(parts):
                for kind in ("weight", "bias"):
                    inside[diffusers, f"{part}.{kind}"] = Place(f"{original}.#.{leaf}.{kind}", position, len(parts))
        for leaf, path in norms.items():
            inside[diffusers, path] = Place(f"{original}.#.{leaf}", 0, 1)
    return inside, {diffusers: original for original, diffusers in FLUX1.outside.items()}


_INSIDE, OUTSIDE = _tables()


def place_of(key: str) -> Place | None:
    """`transformer_blocks.3.attn.to_k.weight` → (`double_blocks.3.img_attn.qkv.weight`, 1, 3); None if unmapped."""
    if match := _BLOCK.fullmatch(key):
        found = _INSIDE.get((match[1], match[3]))
        if found:
            return found._replace(name=found.name.replace("#", match[2]))
    module, _, kind = key.rpartition(".")
    return Place(f"{OUTSIDE[module]}.{kind}", 0, 1) if module in OUTSIDE and kind in ("weight", "bias") else None


def _is_original(key: str) -> bool:
    if match := _BLOCK.fullmatch(key):
        if match[1] not in _STREAMS:
            return False
        _, linears, norms = _STREAMS[match[1]]
        module, _, kind = match[3].rpartition(".")
        return match[3] in norms or (module in linears and kind in ("weight", "bias"))
    module, _, kind = key.rpartition(".")
    return module in FLUX1.outside and kind in ("weight", "bias")


# --- What a checkpoint is. ---


@dataclass(frozen=True)
class Stored:
    """One tensor where it lies."""

    key: str
    """As the file has it."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""
    read: Callable[[], Tensor]
    """Its values as they are stored, on the CPU unless they were handed over in memory elsewhere."""
    scale: Callable[[], Tensor] | None = None
    """What an fp8 weight is multiplied by."""


class Values(NamedTuple):
    """A weight as stored: `grid` holds numbers of `dtype`, to be multiplied by `scale` where there is one."""

    grid: Tensor
    dtype: torch.dtype
    scale: Tensor | None

    def to(self, device: torch.device) -> Values:
        return Values(self.grid.to(device), self.dtype, None if self.scale is None else self.scale.to(device))

    def float(self) -> Tensor:
        """The weight itself in float32; a new tensor."""
        values = self.grid.to(torch.float32, copy=True)
        return values if self.scale is None else values.mul_(self.scale)


@dataclass(frozen=True)
class Weight:
    """One tensor under its original name; `parts` are its row blocks, in order."""

    name: str
    parts: tuple[Stored, ...]
    swapped: bool = False
    """Whether the file has the halves of its rows the other way round."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the coarsest part."""
        return max((DTYPES[part.dtype] for part in self.parts), key=lambda dtype: torch.finfo(dtype).eps)

    def read(self) -> Values:
        """Reads all parts. ModelError when the file has changed or went away."""
        grids = [part.read() for part in self.parts]
        if len({grid.dtype for grid in grids}) > 1:
            grids = [grid.float() for grid in grids]
        grid = torch.cat(grids) if len(grids) > 1 else grids[0]
        scale = _row_scales(self.parts) if any(part.scale for part in self.parts) else None
        if self.swapped:
            grid = grid.roll(grid.shape[0] // 2, 0)
            scale = scale if scale is None else scale.roll(scale.shape[0] // 2, 0)
        return Values(grid, self.dtype, scale)


def _row_scales(parts: Sequence[Stored]) -> Tensor:
    """Factors of the rows, float32 of shape (O, 1), or (O,) for a vector."""
    scales = [part.scale().float().flatten() if part.scale else torch.ones(1) for part in parts]
    joined = torch.cat([scale.expand(part.shape[0]) for scale, part in zip(scales, parts, strict=True)])
    return joined if len(parts[0].shape) == 1 else joined[:, None]


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's weights by original name, blocks first, in the model's order."""

    label: str
    """The name of the file or folder, without its path."""
    weights: dict[str, Weight]
    original: bool
    """Whether the files are in the original layout."""
    files: tuple[Path, ...] = ()
    """Empty for weights in memory."""
    others: tuple[Stored, ...] = ()
    """What else is in the file: other parts of an all-in-one checkpoint."""
    config: Path | None = None
    """The folder's config.json."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know of how it was read."""

    @property
    def matrices(self) -> list[str]:
        """The linears inside the blocks, by original module name: what a LoRA can change."""
        return [name.removesuffix(".weight") for name in self.weights if is_block_linear(name)]

    @property
    def width(self) -> int:
        return self.weights["double_blocks.0.img_attn.proj.weight"].shape[0]

    @property
    def guided(self) -> bool:
        """Whether it has a guidance embedding, as dev has and schnell has not."""
        return any(name.startswith("guidance_in.") for name in self.weights)


def is_block_linear(name: str) -> bool:
    """Whether this original tensor name is the matrix of a linear inside a block."""
    match = _BLOCK.fullmatch(name)
    return bool(match and match[1] in _STREAMS and match[3].removesuffix(".weight") in _STREAMS[match[1]][1])


# --- Opening. ---


def open_checkpoint(path: Path) -> Checkpoint:
    """The transformer in a folder or a .safetensors file; only headers are read. ModelError says what does not fit."""
    files, shards = _files_of(path)
    stored: dict[str, Stored] = {}
    for file in files:
        for one in stored_in(file):
            if shards is None or shards.get(one.key) == file.name:
                stored[one.key] = one
    if shards is not None and (lost := sorted(shards.keys() - stored.keys())):
        raise ModelError(
            f"{path}: `{lost[0]}` is not in {shards[lost[0]]}, where the index has it"
            + (f"; nor are {len(lost) - 1} others in theirs" if len(lost) > 1 else ""),
            hint="download it again",
        )
    made = from_stored(stored.values(), str(path))
    config = files[0].with_name("config.json")
    config_of_folder = config if path.is_dir() and config.is_file() else None
    return replace(made, label=path.resolve().name, files=files, config=config_of_folder)


def from_tensors(tensors: Mapping[str, Tensor], label: str) -> Checkpoint:
    """A transformer's weights that are in memory, in either layout's names. ModelError as for files."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    stored = []
    for key, tensor in tensors.items():
        held = tensor.detach()
        stored.append(Stored(key, tuple(held.shape), names.get(held.dtype, str(held.dtype)), partial(_same, held)))
    return from_stored(stored, label)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def from_stored(stored: Iterable[Stored], label: str) -> Checkpoint:
    """Sorts tensors into the original layout and makes sure that the model is whole. `label` names it in errors."""
    everything = {one.key: one for one in stored}
    prefix = next((one for one in _CONTAINERS if any(key.startswith(one) for key in everything)), "")
    others = tuple(one for key, one in everything.items() if not key.startswith(prefix))
    inner = {key.removeprefix(prefix): one for key, one in everything.items() if key.startswith(prefix)}
    _refuse_foreign(inner, label)
    inner, scaled = _with_scales(inner, label)
    original = layout.is_original(inner)
    if not original and not any(key.startswith("transformer_blocks.0.attn.to_q") for key in inner):
        raise ModelError(
            f"{label}: no FLUX.1 transformer inside; its first tensor is `{min(inner, default='nothing')}`",
            hint="expected a transformer in the original layout (double_blocks…, single_blocks…) or in diffusers'",
        )
    weights = _in_order(_original(inner, label) if original else _fused(inner, label))
    _require_whole(weights, label)
    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in weights.values() if one.dtype.itemsize == 1})
    notes = []
    if kinds:
        how = f"with the scales of {scaled} tensors" if scaled else "without scales"
        notes.append(f"{' and '.join(kinds)} weights were dequantised, {how}; their rounding counts as noise")
    if others:
        notes.append(f"{len(others)} tensors of other parts are not the transformer's and are left alone")
    return Checkpoint(label, weights, original, others=others, notes=tuple(notes))


def require_pair(base: Checkpoint, tuned: Checkpoint) -> None:
    """ModelError unless both hold the same tensors in the same shapes, in different files."""
    if base.files and len(base.files) == len(tuned.files):
        pairs = zip(sorted(base.files), sorted(tuned.files), strict=True)
        if all(os.path.samefile(a, b) for a, b in pairs):
            raise ModelError(f"base and tuned are the same file: {base.label}", hint="give two different checkpoints")
    for name in [*base.weights, *tuned.weights]:
        a, b = base.weights.get(name), tuned.weights.get(name)
        if a is None or b is None:
            has, lacks = (tuned, base) if a is None else (base, tuned)
            raise ModelError(
                f"{lacks.label} lacks `{name}`, which {has.label} has",
                hint="both must be the same model; a guidance embedding tells dev from schnell",
            )
        if a.shape != b.shape:
            raise ModelError(
                f"`{name}` is {_times(a.shape)} in {base.label} and {_times(b.shape)} in {tuned.label}",
                hint="both must be the same model",
            )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _files_of(path: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The files that hold the transformer and, where they are shards, which tensor is in which."""
    if path.is_file():
        return (path,), None
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such file or folder", hint="give a checkpoint's path, a variant's name or a Hub id"
        )
    inner = path / "transformer"
    folder = inner if inner.is_dir() else path
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _shards(indexes[0])
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        what = f"{len(found)} .safetensors files and no index" if found else "no .safetensors file"
        raise ModelError(
            f"{folder}: holds {what}", hint="give the one file that is meant, or download the folder again"
        )
    return (found[0],), None


def _shards(index: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
        if not names or not plain:
            raise ValueError("`weight_map` must name files of the same folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index: {error}", hint="download it again") from error
    for name in names:
        if not index.with_name(name).is_file():
            raise ModelError(
                f"{index.with_name(name)}: missing, though {index.name} lists it", hint="download it again"
            )
    return tuple(index.with_name(name) for name in names), shards


def stored_in(path: Path) -> list[Stored]:
    """The tensors of one safetensors file, by its header alone. Raises ModelError."""
    try:
        with path.open("rb") as raw:
            if raw.read(4) == b"GGUF":
                raise ModelError(f"{path}: is a quantised GGUF file", hint=_UNQUANTISED)
        with safe_open(path, framework="pt") as file:
            found = []
            for key in file.keys():  # noqa: SIM118 (not a dict)
                about = file.get_slice(key)
                found.append(Stored(key, tuple(about.get_shape()), about.get_dtype(), partial(_read, path, key)))
            return found
    except (SafetensorError, OSError) as error:
        hint = "copy or download it again; pickle files (.pt, .ckpt, .bin) are not read, since they can run code"
        raise ModelError(f"{path}: not a readable safetensors file: {error}", hint=hint) from error


def _read(path: Path, key: str) -> Tensor:
    """One tensor, in memory of its own. The file is mapped for this moment only, so that its pages can go at once."""
    try:
        with safe_open(path, framework="pt") as file:
            return cast(Tensor, file.get_tensor(key)).clone()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: `{key}` cannot be read any more: {error}", hint="has the file changed?") from error


def _refuse_foreign(inner: Mapping[str, Stored], label: str) -> None:
    """ModelError for a LoRA, and for weights whose numbers cannot be read off."""
    for key, one in inner.items():
        if key.endswith(_LORA):
            raise ModelError(f"{label}: is a LoRA, not a checkpoint: `{key}`", hint="give the whole model's weights")
        maker = next((maker for ending, maker in _QUANTISED.items() if key.endswith(ending)), None)
        if maker is None and ".quant_state." in key:
            maker = "bitsandbytes"
        if maker or (one.dtype not in DTYPES and not key.endswith(_NOT_WEIGHTS)):
            what = f"as {maker} writes them" if maker else f"of type {one.dtype}"
            raise ModelError(f"{label}: holds quantised weights: `{key}`, {what}", hint=_UNQUANTISED)


def _with_scales(inner: Mapping[str, Stored], label: str) -> tuple[dict[str, Stored], int]:
    """The weights alone, each with the scale that lay beside it, and how many had one. ModelError if one misfits."""
    weights = {key: one for key, one in inner.items() if not key.endswith((*_SCALES, *_NOT_WEIGHTS))}
    scales = {key: one for key, one in inner.items() if key.endswith(_SCALES)}
    for key, scale in scales.items():
        target = f"{key.rpartition('.')[0]}.weight"
        weight = weights.get(target)
        if weight is None or DTYPES[weight.dtype].itemsize > 1 or math.prod(scale.shape) not in (1, *weight.shape[:1]):
            where = "which is missing" if weight is None else f"{_times(weight.shape)} of type {weight.dtype}"
            raise ModelError(
                f"{label}: `{key}` of {_times(scale.shape) or 'one number'} is no scale for `{target}`, {where}",
                hint=f"fp8 weights have one scale, or one for each row; {_UNQUANTISED}",
            )
        weights[target] = replace(weight, scale=scale.read)
    return weights, len(scales)


def _original(inner: Mapping[str, Stored], label: str) -> dict[str, Weight]:
    for key in inner:
        if not _is_original(key):
            raise ModelError(f"{label}: has a tensor that FLUX.1 does not: `{key}`", hint="is it another model's?")
    return {key: Weight(key, (one,)) for key, one in inner.items()}


def _fused(inner: Mapping[str, Stored], label: str) -> dict[str, Weight]:
    groups: dict[str, dict[int, Stored]] = {}
    counts: dict[str, int] = {}
    for key, one in inner.items():
        place = place_of(key)
        if place is None:
            raise ModelError(f"{label}: has a tensor that FLUX.1 does not: `{key}`", hint="is it another model's?")
        groups.setdefault(place.name, {})[place.position] = one
        counts[place.name] = place.parts
    weights = {}
    for name, group in groups.items():
        if len(group) < counts[name]:
            key = next(iter(group.values())).key
            raise ModelError(f"{label}: has `{key}`, but not all parts of `{name}`", hint="the file is not whole")
        parts = tuple(group[position] for position in range(counts[name]))
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(_times(part.shape) for part in parts)
            raise ModelError(f"{label}: the parts of `{name}` do not fit together: {shapes}", hint="is it FLUX.1?")
        weights[name] = Weight(name, parts, swapped=name.rpartition(".")[0] == SWAPPED)
    return weights


def _block_names(stream: str, index: int) -> list[str]:
    _, linears, norms = _STREAMS[stream]
    leaves = [f"{leaf}.{kind}" for leaf in linears for kind in ("weight", "bias")]
    return [f"{stream}.{index}.{leaf}" for leaf in (*leaves, *norms)]


def _in_order(weights: dict[str, Weight]) -> dict[str, Weight]:
    blocks = sorted({(match[1], int(match[2])) for name in weights if (match := _BLOCK.fullmatch(name))})
    order = [name for stream, index in blocks for name in _block_names(stream, index)]
    order += [f"{module}.{kind}" for module in FLUX1.outside for kind in ("weight", "bias")]
    return {name: weights[name] for name in order if name in weights}


def _require_whole(weights: Mapping[str, Weight], label: str) -> None:
    """Every block up to the last, every tensor of each, all layers outside but the guidance embedding."""
    wanted = []
    for stream in _STREAMS:
        found = [int(match[2]) for name in weights if (match := _BLOCK.fullmatch(name)) and match[1] == stream]
        wanted += [name for index in range(max(found, default=0) + 1) for name in _block_names(stream, index)]
    guided = any(name.startswith("guidance_in.") for name in weights)
    outside = [module for module in FLUX1.outside if guided or not module.startswith("guidance_in.")]
    wanted += [f"{module}.{kind}" for module in outside for kind in ("weight", "bias")]
    for name in wanted:
        if name not in weights:
            raise ModelError(f"{label}: lacks `{name}`", hint="the file is not whole; download it again")
        dims = 2 if name.endswith(".weight") else 1
        if len(weights[name].parts[0].shape) != dims or 0 in weights[name].shape:
            shape = _times(weights[name].parts[0].shape) or "a single number"
            raise ModelError(f"{label}: `{name}` is {shape}, expected {dims} dimensions", hint="is it FLUX.1?")
