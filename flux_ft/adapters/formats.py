"""LoRA files: reading those of every tool, writing those that others read best, comparing.

    file ─flavours→ AdapterState ─fused→ modules of the original ─writers→ tensors ─write_adapter→ file
                         └──────────── split, as diffusers has them ──────┘

Everywhere ΔW = (alpha / rank) · up @ down. The rules and their reasons: docs/lora_files.md.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from flux_ft import log
from flux_ft.adapters.flavours import READABLE, block_keys, detect_format, read_tensors, sizes_of
from flux_ft.adapters.fused import bfl_module, converted, delta_weight, diffusers_modules, fuse, scale_of, unfuse
from flux_ft.adapters.metadata import finished_header
from flux_ft.adapters.safe_file import open_safely
from flux_ft.adapters.support import (
    BLOCK_FORMATS,
    DROPPED_BY,
    Loss,
    losses,
    only_blocks,
    require_writable,
    support_table,
)
from flux_ft.adapters.writers import Piece, bfl_pieces, comfy_pieces, diffusers_pieces, kohya_pieces, tensors_of
from flux_ft.data.parallel import ordered_map
from flux_ft.errors import AdapterError
from flux_ft.files import write_whole
from flux_ft.types import AdapterState, LoraLayer

__all__ = [
    "BLOCK_FORMATS",
    "DROPPED_BY",
    "EXPORT_DTYPES",
    "FLAVOURS",
    "READABLE",
    "TOLERANCE",
    "Flavour",
    "Loss",
    "bfl_module",
    "compare_adapters",
    "delta_weight",
    "detect_format",
    "diffusers_modules",
    "fuse",
    "losses",
    "only_blocks",
    "read_adapter",
    "read_tensors",
    "require_writable",
    "sizes_of",
    "support_table",
    "to_diffusers",
    "to_kohya",
    "unfuse",
    "verify_written",
    "write_adapter",
    "written_size",
]  # fmt: skip

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What LoRA files are written in, by the names that users give."""
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}
"""The dtypes that are written, and the relative error in ΔW that rounding both factors to them explains."""
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Flavour:
    """One layout that is written: how its keys begin and end, and how its tensors are made."""

    name: str
    prefix: str
    down: str
    up: str
    pieces: Callable[[AdapterState, torch.dtype], list[Piece]]

    def write(self, state: AdapterState, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors of a file at once. AdapterError when the layout cannot hold the LoRA."""
        return tensors_of(self.pieces(state, dtype))


_AB = (".lora_A.weight", ".lora_B.weight")
FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour("diffusers", "transformer.", *_AB, diffusers_pieces),
        Flavour("kohya", "lora_unet_", ".lora_down.weight", ".lora_up.weight", kohya_pieces),
        Flavour("comfy", "diffusion_model.", *_AB, comfy_pieces),
        Flavour("bfl", "", *_AB, bfl_pieces),
    )
}
"""The layouts that are written. Those that are read besides: READABLE."""


def to_diffusers(state: AdapterState, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a diffusers file; see `diffusers_pieces`."""
    return FLAVOURS["diffusers"].write(state, dtype)


def to_kohya(state: AdapterState, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a kohya file; see `kohya_pieces`."""
    return FLAVOURS["kohya"].write(state, dtype)


# --- Reading. ---


def read_adapter(path: Path) -> AdapterState:
    """Reads a file of any flavour in READABLE, header entries too; its notes are said aloud.

    AdapterError names the file and the first bad key.
    """
    file = open_safely(path)
    tensors = file.read_all()
    try:
        state = read_tensors(tensors, file.metadata)
    except AdapterError as error:
        raise AdapterError(f"`{path}`: {error.message}", hint=error.hint) from error
    for note in state.notes:
        log.warn(f"{path.name}: {note}")
    return state


# --- Writing. ---


def _pieces(state: AdapterState, format: str, dtype: torch.dtype) -> list[Piece]:
    """In the order of the file: by size of the dtype, as alignment wants it, then by key, as safetensors has it."""
    if format not in FLAVOURS or dtype not in TOLERANCE:
        hint = f"flavours: {', '.join(FLAVOURS)}; dtypes: {', '.join(map(str, TOLERANCE))}"
        raise AdapterError(f"cannot write flavour `{format}` as {dtype}", hint=hint)
    if not state.layers:
        raise AdapterError("the LoRA has no layers", hint="check the training targets")
    return sorted(FLAVOURS[format].pieces(state, dtype), key=lambda one: (-one.dtype.itemsize, one.key))


def write_adapter(
    path: Path, state: AdapterState, format: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Writes one file, whole or not at all. Its header gets `metadata`, hashes and rank: see `finished_header`.

    Each tensor is made twice, once for the hash that the header begins with and once for the file, so that few are in
    memory at a time. What some tool will drop of it is warned about.

    AdapterError: unknown flavour or dtype, nothing to write, what the flavour cannot hold, a value that is no string.
    StorageError: the disk.
    """
    pieces = _pieces(state, format, dtype)
    for loss in losses(state, format):
        log.warn(f"{path.name}: {loss}")
    rank = max(one.shape[0] for one in pieces if one.key.endswith(FLAVOURS[format].down))
    digest = hashlib.sha256()
    header = finished_header(_table(pieces), metadata, rank, "0" * 64)  # fails now if it will
    for data in ordered_map(_checked_bytes, pieces, workers=1, window=2):  # the next is made meanwhile
        digest.update(data)
    header = finished_header(_table(pieces), metadata, rank, digest.hexdigest())
    write_whole(path, chain((header,), ordered_map(_bytes, pieces, workers=1, window=2)), mode=0o644)


def written_size(state: AdapterState, format: str, dtype: torch.dtype) -> int:
    """Bytes of the tensors of a file, less its header. AdapterError as `write_adapter`."""
    return sum(one.size for one in _pieces(state, format, dtype))


def _table(pieces: Sequence[Piece]) -> dict[str, dict[str, object]]:
    """Where each tensor lies, as the safetensors header has it."""
    table: dict[str, dict[str, object]] = {}
    start = 0
    for one in pieces:
        place = [start, start + one.size]
        table[one.key] = {"dtype": _DTYPE_NAMES[one.dtype], "shape": list(one.shape), "data_offsets": place}
        start += one.size
    return table


def _checked_bytes(piece: Piece) -> memoryview:
    return _as_bytes(piece.checked(), piece)


def _bytes(piece: Piece) -> memoryview:
    return _as_bytes(piece.make(), piece)


def _as_bytes(tensor: Tensor, piece: Piece) -> memoryview:
    assert (tuple(tensor.shape), tensor.dtype) == (piece.shape, piece.dtype), piece.key
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


# --- Comparing. ---


def compare_adapters(a: AdapterState, b: AdapterState) -> dict[str, float]:
    """Module path → ‖ΔWa − ΔWb‖ / ‖ΔWa‖ (Frobenius) over all modules of either; one that is absent counts as ΔW = 0.

    0 where both are zero, inf where only `a` is. ΔW is never formed; cancellation in the Gram matrices leaves a floor
    near 1e-8, but equal factors give 0. AdapterError when a module has two shapes.
    """
    paths = sorted(a.layers.keys() | b.layers.keys())
    return {path: _error(a.layers.get(path), b.layers.get(path), path) for path in paths}


def _error(a: LoraLayer | None, b: LoraLayer | None, path: str) -> float:
    """‖ΔWa − ΔWb‖ / ‖ΔWa‖ by ‖UV‖² = ⟨UᵀU, VVᵀ⟩ in float64, with the factors side by side in U (O, ΣR), V (ΣR, I)."""
    layers = [one for one in (a, b) if one is not None]
    if len({(one.up_OR.shape[0], one.down_RI.shape[1]) for one in layers}) > 1:
        raise AdapterError(f"`{path}` has different shapes in the two LoRAs", hint="they belong to different models")
    if a is not None and b is not None and a.rank == b.rank:
        if _same_factors(a, b):
            return 0.0
        rounding = _rounding_error(a, b)
        if rounding is not None:
            return rounding
    signs = [1 if one is a else -1 for one in layers]
    ups = [one.up_OR.detach().cpu().double() * (sign * scale_of(one)) for one, sign in zip(layers, signs, strict=True)]
    U_OR, V_RI = torch.cat(ups, 1), torch.cat([one.down_RI.detach().cpu().double() for one in layers])
    products_RR = (U_OR.T @ U_OR) * (V_RI @ V_RI.T)
    rank = a.rank if a is not None else 0
    size, gap = (float(part.sum().clamp_min(0).sqrt()) for part in (products_RR[:rank, :rank], products_RR))
    return gap / size if size else (0.0 if gap == 0 else float("inf"))


def _same_factors(a: LoraLayer, b: LoraLayer) -> bool:
    pairs = ((a.up_OR, b.up_OR), (a.down_RI, b.down_RI))
    return scale_of(a) == scale_of(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def _rounding_error(a: LoraLayer, b: LoraLayer) -> float | None:
    """The same where factors differ by rounding alone, else None; several times faster, since float32 is enough.

    UᵇVᵇ − UᵃVᵃ = (Uᵇ − Uᵃ) Vᵇ + Uᵃ (Vᵇ − Vᵃ), whose terms are as small as the error: nothing is lost to cancellation.
    """
    Ua_OR, Ub_OR = (converted(one.up_OR, torch.float32) * scale_of(one) for one in (a, b))
    Va_RI, Vb_RI = (converted(one.down_RI, torch.float32) for one in (a, b))
    largest_u, largest_v = (float(one.abs().max()) for one in (Ua_OR, Va_RI))
    if not largest_u or not largest_v:
        return None
    U_OR = torch.cat([Ub_OR - Ua_OR, Ua_OR], 1) / largest_u  # so that no square overflows or vanishes
    V_RI = torch.cat([Vb_RI, Vb_RI - Va_RI]) / largest_v
    rank = a.rank
    if U_OR[:, :rank].norm() > 0.01 * U_OR[:, rank:].norm() or V_RI[rank:].norm() > 0.01 * V_RI[:rank].norm():
        return None
    gap = ((U_OR.T @ U_OR) * (V_RI @ V_RI.T)).sum().clamp_min(0).sqrt()
    V_RI[:rank] -= V_RI[rank:]
    size = ((U_OR[:, rank:].T @ U_OR[:, rank:]) * (V_RI[:rank] @ V_RI[:rank].T)).sum().clamp_min(0).sqrt()
    return float(gap / size) if size > 0 else None


def verify_written(path: Path, state: AdapterState, dtype: torch.dtype) -> float:
    """Reads a written file back, block by block: the worst relative error of its ΔW.

    AdapterError when rounding to `dtype` does not explain it.
    """
    hint = "do not use this file; please report this, with the file's metadata"
    file = open_safely(path)
    errors: dict[str, float] = {}
    extras: set[str] = set()
    for keys in block_keys(file.entries, state.layout):
        written = read_tensors({key: file.read(key) for key in keys}, file.metadata, layout=state.layout)
        for name, layer in written.layers.items():
            errors[name] = _error(state.layers.get(name), layer, name)
        for name, tensor in written.extras.items():
            extras.add(name)
            if name in state.extras and not _near(tensor, state.extras[name], TOLERANCE[dtype]):
                raise AdapterError(f"`{path}`: `{name}` is not what it was", hint=hint)
    found = set(errors)
    errors |= {name: _error(layer, None, name) for name, layer in state.layers.items() if name not in found}
    worst = max(sorted(errors), key=lambda name: errors[name])
    ours, theirs = {*state.layers, *state.extras}, found | extras
    odd = {name for name in ours ^ theirs if errors.get(name, 1) > TOLERANCE[dtype]}
    if odd:
        name = worst if worst in odd else min(odd)
        what = "missing" if name in ours else "extra"
        raise AdapterError(f"`{path}`: `{name}` is {what} in the file", hint=hint)
    if errors[worst] <= TOLERANCE[dtype]:
        return errors[worst]
    if dtype is torch.float16:
        hint = "its values are too small for fp16; export as bf16 or fp32"
    raise AdapterError(f"`{path}`: `{worst}` is off by {errors[worst]:.1e}, more than {dtype} explains", hint=hint)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
