"""A LoRA's frozen base in fewer bytes than it computes with: in what, whether that works here, and how it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.families.base import Family
from flux_ft.families.quantize import PLAIN, Storage, compute_in_fp8, why_not, why_not_fp8


def base_storage(config: RunConfig) -> Storage | None:
    """How the linears inside the blocks are held; None where that is the dtype that is computed in."""
    precision = config.memory.base_precision
    if precision == "auto":
        return "fp8" if config.speed.fp8_compute else None
    return None if precision in PLAIN else precision


def require_base(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError, before anything takes long, where the base cannot be held or multiplied by as wished."""
    storage = base_storage(config)
    if config.speed.fp8_compute and (reason := why_not_fp8(device, dtype)):
        raise ConfigError(
            f"`speed.fp8_compute` needs a device that multiplies in 8 bits: {reason}",
            hint="leave it out; `memory.base_precision: fp8` keeps weights in 8 bits all the same",
        )
    if storage and (reason := why_not(storage, device.type)):
        raise ConfigError(
            f"`memory.base_precision: {storage}` does not work here: {reason}",
            hint="int8 works everywhere" if storage != "int8" else None,
        )


def load_base(config: RunConfig, family: Family, home: torch.device, device: torch.device, dtype: torch.dtype) -> Any:
    """The denoiser, frozen, held as wished with its weights at `home`, to compute in `dtype` on `device`."""
    denoiser = family.load_denoiser(device, dtype, base_storage(config), home=home)
    if config.speed.fp8_compute:
        compute_in_fp8(denoiser)
    return denoiser


def keep_from_copying(denoiser: nn.Module) -> None:
    """Have DistributedDataParallel leave all that is frozen as each process has read it.

    It would send the first one's to the others, which gloo cannot with 8-bit floats, and buffers before every pass.
    """
    frozen = [name for name, one in denoiser.named_parameters() if not one.requires_grad]
    names = [*frozen, *(name for name, _ in denoiser.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, names)  # type: ignore[no-untyped-call]
