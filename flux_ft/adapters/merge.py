"""LoRAs merged into a checkpoint, tensor by tensor: what is in memory is one matrix, not the model.

The result is laid out as the base is: a folder gives a folder in the diffusers layout, in shards with an index; a
single file gives a single file with the same keys. Only fp8 becomes another type, since its scales no longer fit.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ft import log
from flux_ft.adapters.checkpoint_files import DTYPES, Checkpoint, Stored, Weight
from flux_ft.adapters.write_files import (
    DTYPE_NAMES,
    SHARD_BYTES,
    Entry,
    file_pieces,
    require_free,
    require_new,
    write_folder,
)
from flux_ft.errors import AdapterError
from flux_ft.families import layout
from flux_ft.files import write_whole
from flux_ft.types import AdapterState


@dataclass(frozen=True)
class MergeReport:
    """What was written."""

    files: tuple[Path, ...]
    size_bytes: int
    changed: int
    """Tensors of the base's file that a LoRA acted on."""
    tensors: int

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "files": [str(path) for path in self.files],
            "size_bytes": self.size_bytes,
            "changed": self.changed,
            "tensors": self.tensors,
        }

    def for_people(self) -> str:
        """For people."""
        places = ", ".join(str(path) for path in self.files if path.suffix == ".safetensors")
        return f"wrote {places} ({self.size_bytes / 1e6:.1f} MB); {self.changed} of {self.tensors} tensors were changed"


def merge(
    base: Checkpoint,
    adapters: Sequence[tuple[str, AdapterState, float]],
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Write W + Σ strength · (alpha / rank) · up @ down to `output`, a new folder or file, whole or not at all.

    `adapters` are (name, LoRA, strength); sums are in float32, rounded once. `dtype` is that of all tensors of the
    transformer; each keeps its own (fp8: bf16) if it is None. Raises AdapterError when a LoRA does not fit,
    StorageError when `output` exists or the disk cannot hold it, ModelError when the base cannot be read.
    """
    _require_fit(base, adapters)
    require_new(output)
    parts = [(weight, part) for weight in base.weights.values() for part in weight.parts]
    entries = [Entry(part.key, _written_as(part, dtype), part.shape) for _, part in parts]
    entries += [Entry(one.key, one.dtype, one.shape) for one in base.others]
    require_free(output.parent, sum(entry.size for entry in entries))
    changed: set[str] = set()

    def tensors() -> Iterator[Tensor]:
        with log.progress("merge", len(entries)) as bar:
            for weight in base.weights.values():
                merged, acted = _merged(weight, adapters)
                for part, rows in zip(
                    weight.parts, torch.split(merged, [p.shape[0] for p in weight.parts]), strict=True
                ):
                    changed.update([part.key] * acted)
                    yield rows.to(DTYPES[_written_as(part, dtype)])
                    bar.advance()
            for one in base.others:
                yield one.read()
                bar.advance()

    if base.config is None:
        write_whole(output, file_pieces(entries, tensors()))
        files = [output]
    else:
        files = write_folder(base.config, output, entries, tensors(), shard_bytes)
    size = sum(file.stat().st_size for file in files)
    return MergeReport(tuple(files), size, len(changed), len(entries))


def _written_as(part: Stored, dtype: torch.dtype | None) -> str:
    kept = "BF16" if DTYPES[part.dtype].itemsize == 1 else part.dtype
    return kept if dtype is None else DTYPE_NAMES[dtype]


def _linears(weight: Weight) -> dict[str, tuple[int, ...]]:
    """The diffusers linears that a weight is made of, with their shapes; none for biases and norms."""
    if not weight.name.endswith(".weight") or len(weight.shape) != 2:
        return {}
    made = layout.to_diffusers({weight.name: torch.empty(weight.shape, device="meta")})
    return {key.removesuffix(".weight"): tuple(tensor.shape) for key, tensor in made.items()}


def _require_fit(base: Checkpoint, adapters: Sequence[tuple[str, AdapterState, float]]) -> None:
    linears = {path: shape for weight in base.weights.values() for path, shape in _linears(weight).items()}
    for name, state, strength in adapters:
        if not math.isfinite(strength):
            raise AdapterError(f"{name}: strength {strength} is not a number", hint="1 is as trained")
        for path, layer in state.layers.items():
            got, want = (layer.up_OR.shape[0], layer.down_RI.shape[1]), linears.get(path)
            if got != want:
                raise AdapterError(
                    f"{name}: changes `{path}` of {got[0]}×{got[1]}, which in {base.label} is "
                    + (f"{want[0]}×{want[1]}" if want else "not there"),
                    hint="the LoRA was made for another model",
                )


def _merged(weight: Weight, adapters: Sequence[tuple[str, AdapterState, float]]) -> tuple[Tensor, bool]:
    """The weight as the file lays it out, and whether a LoRA acted on it; as stored if none did."""
    acting = [
        (path, state.layers[path], strength)
        for path in _linears(weight)
        for _, state, strength in adapters
        if path in state.layers
    ]
    values = weight.read()
    half = weight.shape[0] // 2
    if not acting:
        merged = values.grid if values.scale is None else values.float()
        return (merged.roll(half, 0) if weight.swapped else merged), False
    total_OI = values.float()
    parts = layout.to_diffusers({weight.name: total_OI})  # views, but of the one weight whose halves swap
    for path, layer, strength in acting:
        scale = strength * layer.alpha / layer.rank
        parts[f"{path}.weight"].addmm_(layer.up_OR.float() * scale, layer.down_RI.float())
    if weight.name == "final_layer.adaLN_modulation.1.weight":
        swapped = parts["norm_out.linear.weight"]
        return (swapped if weight.swapped else swapped.roll(half, 0)), True
    return total_OI, True
