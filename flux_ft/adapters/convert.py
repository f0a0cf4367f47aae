"""What `flux-ft convert` does: a LoRA file of any flavour in, one of the layout that a tool reads best out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_ft.adapters.formats import (
    EXPORT_DTYPES,
    FLAVOURS,
    only_blocks,
    read_adapter,
    require_writable,
    sizes_of,
    verify_written,
    write_adapter,
    written_size,
)
from flux_ft.adapters.metadata import ARCHITECTURES, EXPORT_KEY
from flux_ft.adapters.write_files import require_free, require_new
from flux_ft.errors import ConfigError
from flux_ft.families.layout import LAYOUTS
from flux_ft.files import require_writable as require_writable_folder
from flux_ft.types import AdapterState


@dataclass(frozen=True)
class Converted:
    """What a conversion left behind."""

    output: Path
    family: str
    """For people: FLUX.1 or FLUX.2."""
    format: str
    dtype: str
    modules: int
    """Of diffusers."""
    ranks: tuple[int, int]
    """Smallest and largest of a diffusers module."""
    worst_error: float
    """Largest relative error of a written ΔW against the one that was read."""
    size_bytes: int
    warnings: tuple[str, ...]
    """What was left out, and which tool will drop which part."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "output": str(self.output),
            "family": self.family,
            "format": self.format,
            "dtype": self.dtype,
            "modules": self.modules,
            "ranks": list(self.ranks),
            "worst_delta_weight_error": self.worst_error,
            "size_bytes": self.size_bytes,
            "warnings": list(self.warnings),
        }

    def for_people(self) -> str:
        """For people; the warnings were said before."""
        ranks = f"rank {self.ranks[0]}" + (f" to {self.ranks[1]}" if self.ranks[1] > self.ranks[0] else "")
        return (
            f"wrote {self.output} ({self.size_bytes / 1e6:.1f} MB): {self.format}, {self.dtype}, {self.family}, "
            f"{self.modules} modules of {ranks}; ΔW within {self.worst_error:.0e} of the original"
        )


def convert_file(
    lora: Path, output: Path, *, format: str = "kohya", dtype: str | None = None, blocks_only: bool = False
) -> Converted:
    """Write the LoRA of `lora` to `output` in another layout, read it back and compare.

    `dtype` is that of the file where it is None. `blocks_only` leaves out what lies outside the blocks. Header entries
    are kept, but those that would no longer be true. Raises AdapterError (a layout that cannot hold the LoRA, what
    cannot be read), ConfigError, StorageError.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"`{output}` does not end in .safetensors", hint="LoRA files are written as .safetensors")
    if format not in FLAVOURS or dtype not in (None, *EXPORT_DTYPES):
        raise ConfigError(
            f"cannot write format `{format}` as `{dtype}`",
            hint=f"formats: {', '.join(FLAVOURS)}; dtypes: {', '.join(EXPORT_DTYPES)}",
        )
    require_new(output)
    state = read_adapter(lora)
    state = only_blocks(state) if blocks_only else state
    dtype = dtype or _dtype_of(state)
    warnings = (*state.notes, *map(str, require_writable(state, format)))
    require_writable_folder(output.parent, "output")
    require_free(output.parent, written_size(state, format, EXPORT_DTYPES[dtype]))
    write_adapter(output, state, format, EXPORT_DTYPES[dtype], _metadata(state, format))
    worst = verify_written(output, state, EXPORT_DTYPES[dtype])
    ranks = [layer.rank for layer in state.layers.values()]
    family = LAYOUTS[state.layout].title
    size = output.stat().st_size
    return Converted(output, family, format, dtype, len(ranks), (min(ranks), max(ranks)), worst, size, warnings)


def _dtype_of(state: AdapterState) -> str:
    """That of most factors; fp32 for what is not written."""
    names = {dtype: name for name, dtype in EXPORT_DTYPES.items()}
    found = [names.get(layer.up_OR.dtype, "fp32") for layer in state.layers.values()]
    return max(EXPORT_DTYPES, key=found.count)


def _metadata(state: AdapterState, format: str) -> dict[str, str]:
    """The file's entries; ours says the new layout, and the model is named where it can be told and was not."""
    entries = dict(state.metadata)
    try:
        rank = max(layer.rank for layer in state.layers.values())
        ours = json.loads(entries[EXPORT_KEY]) | {"rank": rank, "flavour": format}
        entries[EXPORT_KEY] = json.dumps(ours, ensure_ascii=False)
    except (KeyError, ValueError, TypeError):
        entries.pop(EXPORT_KEY, None)
    sizes = sizes_of(state)
    if len(sizes) == 1:
        entries.setdefault("modelspec.architecture", sizes[0].architecture)
        entries.setdefault("ss_base_model_version", ARCHITECTURES[sizes[0].architecture][0])
    return entries
