"""A LoRA as the tensors of a file, each made when it is asked for: what is in memory is one module, not the file.

    diffusers  `transformer.<path>.lora_A/lora_B.weight`                     split, no alpha, one rank for all
    kohya      `lora_unet_<bfl name>.lora_down/lora_up.weight, .alpha`       fused, alpha = rank
    comfy      `diffusion_model.<bfl name>.lora_A/lora_B.weight`             fused, no alpha
    bfl        `<bfl name>.lora_A/lora_B.weight, .lora_B.bias`, norms        fused, no alpha; control LoRAs alone

Everywhere alpha / rank is multiplied into `up`, so that a tool that ignores alpha, and one that honours it, see the
same weights. The rules and their reasons: docs/lora_files.md.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_ft.adapters.fused import FusedModule, converted, fuse, is_finite, layout_of, scale_of, scaled_up, width_of
from flux_ft.adapters.support import BLOCK_FORMATS, require_writable
from flux_ft.errors import AdapterError, some_of
from flux_ft.families.layout import SWAPPED, Layout, block_of
from flux_ft.types import AdapterState, LoraLayer


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str
    """Whose it is, for messages."""
    source: Callable[[], Tensor]
    """Its values, in any dtype."""

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        """The tensor, on the CPU."""
        return converted(self.source(), self.dtype)

    def checked(self) -> Tensor:
        """As `make`. AdapterError when a value is not finite in `dtype`."""
        made = self.make()
        if not is_finite(made):
            hint = "export as bf16 or fp32; if that fails too, the training diverged: use an earlier checkpoint"
            raise AdapterError(f"`{self.name}` holds NaN, or values that {self.dtype} cannot store", hint=hint)
        return made


def tensors_of(pieces: list[Piece]) -> dict[str, Tensor]:
    """All at once, each with memory of its own, as safetensors wants them."""
    return {one.key: one.checked().clone(memory_format=torch.contiguous_format) for one in pieces}


# --- Split. ---


def diffusers_pieces(state: AdapterState, dtype: torch.dtype) -> list[Piece]:
    """The PEFT layout: `transformer.<path>.lora_A.weight` (R, I) and `.lora_B.weight` (O, R), scale folded into B.

    Every layer is padded with zeros to the largest rank: diffusers before mid-2026 scales mixed ranks wrongly.
    AdapterError where `require_writable` has it.
    """
    require_writable(state, "diffusers")
    rank = max((layer.rank for layer in state.layers.values()), default=0)
    return [piece for path, layer in state.layers.items() for piece in _split_pieces(path, layer, rank, dtype)]


def _split_pieces(path: str, layer: LoraLayer, rank: int, dtype: torch.dtype) -> list[Piece]:
    missing = rank - layer.rank

    def down() -> Tensor:
        return torch.nn.functional.pad(layer.down_RI.detach(), (0, 0, 0, missing))

    def up() -> Tensor:
        up_OR = layer.up_OR.detach() if scale_of(layer) == 1 else scaled_up(layer)
        return torch.nn.functional.pad(up_OR, (0, missing))

    return [
        Piece(f"transformer.{path}.lora_A.weight", dtype, (rank, layer.down_RI.shape[1]), path, down),
        Piece(f"transformer.{path}.lora_B.weight", dtype, (layer.up_OR.shape[0], rank), path, up),
    ]


# --- Fused. ---


def _fused_pieces(module: FusedModule, down: str, up: str, dtype: torch.dtype) -> list[Piece]:
    out, into = module.shape
    return [
        Piece(down, dtype, (module.rank, into), module.name, module.down),
        Piece(up, dtype, (out, module.rank), module.name, lambda: module.up(dtype)),
    ]


def kohya_pieces(state: AdapterState, dtype: torch.dtype) -> list[Piece]:
    """The kohya layout, BFL modules fused: `.lora_down.weight` (R, I), `.lora_up.weight` (O, R), `.alpha` = R.

    AdapterError when a layer has no name there, the parts of a fused module do not fit together, or a tool would drop
    one (see `require_writable`).
    """
    modules = fuse(state)
    require_writable(state, "kohya")
    pieces = []
    for name, module in modules.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        pieces += _fused_pieces(module, f"{key}.lora_down.weight", f"{key}.lora_up.weight", dtype)
        # float32: bf16 holds whole numbers exactly only up to 256, and a fused rank can be larger.
        pieces.append(Piece(f"{key}.alpha", torch.float32, (), name, _Constant(torch.tensor(float(module.rank)))))
    return pieces


@dataclass(frozen=True)
class _Constant:
    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


def comfy_pieces(state: AdapterState, dtype: torch.dtype) -> list[Piece]:
    """ai-toolkit's layout for FLUX.2: `diffusion_model.<bfl name>.lora_A.weight` (R, I), `.lora_B.weight` (O, R).

    AdapterError as `kohya_pieces`; modules outside the blocks are written.
    """
    modules = fuse(state)
    require_writable(state, "comfy")
    return [piece for name, module in modules.items() for piece in _ab_pieces(f"diffusion_model.{name}", module, dtype)]


def _ab_pieces(key: str, module: FusedModule, dtype: torch.dtype) -> list[Piece]:
    return _fused_pieces(module, f"{key}.lora_A.weight", f"{key}.lora_B.weight", dtype)


def bfl_pieces(state: AdapterState, dtype: torch.dtype) -> list[Piece]:
    """BFL's own layout of control LoRAs (Depth, Canny): factors of all linears, added biases, replaced norms.

    AdapterError when it is not complete: its readers take all or nothing.
    """
    layout = layout_of(state)
    modules = fuse(state)
    _require_complete(state, modules, layout)
    pieces = []
    for name, module in modules.items():
        pieces += _ab_pieces(name, module, dtype)
        if biases := {one: state.extras[f"{one}.bias"] for one in layout.parts(name) if f"{one}.bias" in state.extras}:
            pieces.append(_bias_piece(name, module, biases, layout, dtype))
    for key, tensor in state.extras.items():
        if norm := layout.find_norm(key):
            pieces.append(Piece(norm[0], dtype, tuple(tensor.shape), key, _Constant(tensor)))
    return pieces


def _bias_piece(
    name: str, module: FusedModule, biases: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype
) -> Piece:
    def make() -> Tensor:
        rows = zip(layout.parts(name), module.rows, strict=True)
        bias_O = torch.cat([biases.get(part, torch.zeros(count)) for part, count in rows])
        return bias_O.roll(len(bias_O) // 2) if name == SWAPPED else bias_O

    return Piece(f"{name}.lora_B.bias", dtype, (module.shape[0],), f"{name}.lora_B.bias", make)


def _require_complete(state: AdapterState, modules: Mapping[str, FusedModule], layout: Layout) -> None:
    """Every linear and norm of every block, and every module outside but the guidance embedding."""
    hint = f"write {', '.join(BLOCK_FORMATS)}, which hold any LoRA"
    if layout.name != "flux1":
        raise AdapterError(f"no tool reads bfl files for {layout.title}", hint=hint)
    have = {*modules, *(norm[0] for key in state.extras if (norm := layout.find_norm(key)))}
    width = width_of(state)
    size = next((one for one in layout.sizes if one.width == width), None)
    wanted = [name for name in layout.outside if not name.startswith("guidance_in")]
    for stream, published in zip(layout.streams, (size.double, size.single) if size else (0, 0), strict=True):
        found = [block[1] for name in have if (block := block_of(name)) and block[0] == stream.original]
        for index in range(published or max(found, default=0) + 1):
            wanted += [f"{stream.original}.{index}.{leaf}" for leaf in (*stream.linears, *stream.norms)]
    missing = [name for name in wanted if name not in have]
    if missing:
        raise AdapterError(
            "bfl files are for complete control LoRAs (Depth, Canny), since their readers take all or nothing; "
            f"this one lacks {some_of(missing, 3)}",
            hint=hint,
        )
