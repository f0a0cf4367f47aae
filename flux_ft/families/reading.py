"""A model's weights on their way from safetensors files to where they belong, one at a time.

    files ─ mapped ─→ pages of the files ─ fill ─→ a model that has read nothing yet ─ Carrier ─→ device, dtype

A mapped tensor takes no memory of its own: the system reads a page when it is first used, and may forget it again. So
nothing but the tensor that is just cast, quantised or copied is in host memory besides the files, and weights that stay
in host memory as they are in the file are never copied at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux_ft.errors import ModelError, first_line

ModelT = TypeVar("ModelT", bound=nn.Module)
STAGE_BYTES = 32 * 2**20
"""Of pinned memory, twice: large beside what a copy costs, small beside a model; powers of two are not rounded up."""


def mapped(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files by name, as pages of the files. Raises ModelError, naming the file."""
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}", hint="download it again") from error
        except (RuntimeError, MemoryError) as error:
            raise ModelError(
                f"{path}: cannot be mapped: {first_line(error)}",
                hint="most systems map no file that is larger than memory and swap: add swap, or give the model as a "
                "folder in the diffusers layout, whose files are smaller",
            ) from error
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str, hint: str) -> None:
    """Make mapped tensors the weights of a model on the meta device; each keeps its dtype, and nothing is read yet.

    Raises ModelError, in which `where` comes first, unless they are exactly what the model has.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ModelError(
            f"{where}: tensors are missing, extra or of another shape, {len(odd)} in all; first: "
            f"{odd[0]} is {found.get(odd[0], 'missing')}, expected {wanted.get(odd[0], 'no such tensor')}",
            hint=hint,
        )
    if whole := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise ModelError(f"{where}: {whole[0]} is {tensors[whole[0]].dtype}, expected fractions", hint=hint)
    model.load_state_dict(tensors, assign=True)


class Carrier:
    """Brings tensors to a device. To a GPU through pinned memory, so that one part is read while another is copied.

    Without, the driver would copy from mapped pages by one thread, and wait for the disk and the GPU in turn. What is
    computed on the current stream afterwards waits for the copies; the host does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stages: list[tuple[Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            with torch.cuda.device(device):  # pinning opens the current one
                self._stages = [_stage() for _ in range(2)]

    def carry(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the device, in `dtype` unless None; itself where it is both already."""
        if self._stages and tensor.device.type == "cpu" and tensor.nbytes:
            tensor = self._staged(tensor.contiguous())
        return tensor.to(self.device, dtype)

    def bring(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Carry a module's own weights and buffers, not its children's, in place; fractions become `dtype` if given."""
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = self.carry(tensor.data, dtype if tensor.is_floating_point() else None)

    def bring_all(self, model: ModelT) -> ModelT:
        """Carry a whole model, in place, returned too."""
        for module in model.modules():
            self.bring(module)
        return model

    def _staged(self, tensor: Tensor) -> Tensor:
        arrived = torch.empty_like(tensor, device=self.device)
        source, target = (one.view(-1).view(torch.uint8) for one in (tensor, arrived))
        for start in range(0, len(source), STAGE_BYTES):
            part = source[start : start + STAGE_BYTES]
            stage, copied = self._stages[0]
            copied.synchronize()  # at once, unless it was recorded
            stage[: len(part)].copy_(part)
            target[start : start + len(part)].copy_(stage[: len(part)], non_blocking=True)
            copied.record(torch.cuda.current_stream(self.device))
            self._stages.reverse()
        return arrived


def _stage() -> tuple[Tensor, torch.cuda.Event]:
    """Pinned memory, and the mark of the last copy out of it."""
    return torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
