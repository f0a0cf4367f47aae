"""Holding a transformer in fewer bytes than it computes with, or in host memory.

    fp8, int8   our StoredLinear: 8 bits a weight and one scale a row; the weight is spread out for its own matmul only
    nf4         bitsandbytes' Linear4bit with doubly quantised scales (Dettmers et al. 2023, arXiv 2305.14314)
    stream      diffusers' group offload: each block's weights travel to the device while the block before computes

Linears inside the blocks are held so, modulation too, which is 27 % of FLUX.1; norms, biases and all outside the blocks
(embedders, `x_embedder`, `proj_out`) keep the dtype that is computed in. Weights are quantised one linear at a time
as they are read, so folders, Hub ids and single files go the same way.

What this does to flux-tiny's velocity, relative error over four prompts and sigmas: int8 0.25 %, bf16 throughout
0.56 %, fp8 0.96 %, nf4 3.4 % (FLUX.1's own weights were not at hand). So fp8, as large as int8, is never chosen by
itself. diffusers' layerwise casting, fp8 without scales and of the embedders too, is 2.3 % off. bitsandbytes' int8 has
the same grid; on CUDA it rounds the inputs too, to fp16 and to 8 bits.

Shapes in names: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from diffusers.hooks import group_offloading
from torch import Tensor, nn

from flux_ft.errors import ConfigError, first_line
from flux_ft.families.products import FEW_ROWS, FP8, FP8_LARGEST, NF4_BLOCK, Frozen, StoredLinear, product, product_back
from flux_ft.families.reading import Carrier

Storage = Literal["fp32", "bf16", "int8", "fp8", "nf4"]

PLAIN: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRIDS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (FP8, FP8_LARGEST)}
"""The dtype of 8 bits, and its largest number."""
STREAMING = ("cuda", "xpu")
"""Devices with memory of their own, and queues to copy beside computing."""


def store(weight_OI: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """`fp8` or `int8`: the grid and the scale of each row, bfloat16, with weight ≈ grid · scale."""
    dtype, largest = GRIDS[storage]
    grid_OI = weight_OI.to(torch.float32, copy=True)
    # Rounded before it is divided by: so nothing is lost where it multiplies, and both grids end far enough out.
    scale_O = (torch.linalg.vector_norm(grid_OI, ord=torch.inf, dim=1) / largest).to(torch.bfloat16)
    grid_OI /= scale_O.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return (grid_OI.round_() if dtype == torch.int8 else grid_OI).to(dtype), scale_O


def why_not(storage: Storage, device_type: str, stream: bool = False) -> str | None:
    """Why weights cannot be held so on this kind of device; None where they can."""
    if storage == "nf4" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if storage == "nf4" and stream:
        return "4-bit weights cannot be streamed"  # their statistics are no tensors of the module: they would stay
    if storage in ("fp8", "nf4") and device_type == "mps":
        return "Apple's GPUs cannot"
    return None


def why_not_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this device cannot multiply in 8 bits, with results of this dtype; None where it can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} cannot; Ada and Hopper were the first that could"
    try:  # what a build of torch has for a device is not to be asked for
        ones = torch.ones(FEW_ROWS, FEW_ROWS, device=device)
        weight, inputs = Frozen("fp8", store(ones, "fp8")), ones.to(dtype)
        product_back(weight, product(weight, inputs, bias_O=inputs[0]))
    except (RuntimeError, TypeError, ValueError) as error:
        return first_line(error)
    return None


def compute_in_fp8(denoiser: nn.Module) -> None:
    """Let the linears that are held as `fp8` multiply in 8 bits, with inputs and gradients rounded row by row."""
    for module in denoiser.modules():
        if isinstance(module, StoredLinear):
            module.in_fp8 = module.weight.dtype is FP8


def compute_dtype(denoiser: nn.Module) -> torch.dtype:
    """What a denoiser computes in, however its weights are held."""
    return cast(torch.dtype, getattr(denoiser, "compute_dtype", next(denoiser.parameters()).dtype))


def hold(
    denoiser: nn.Module,
    blocks: Iterable[nn.Module],
    storage: Storage | None,
    device: torch.device,
    dtype: torch.dtype,
    stream: bool = False,
    home: torch.device | None = None,
) -> nn.Module:
    """Hold a plain transformer's blocks as `storage`, to compute in `dtype` on `device`; in place, returned too.

    With `fp32` and `bf16` that is what is computed in, whatever `dtype` says; None is `dtype`. With any of them, and
    streamed, sets `compute_dtype` and `compute_device` on it, since its parameters need tell neither. Weights are moved
    one at a time, each out of a mapped file if it is there. Those of a streamed one stay in host memory; call
    `restream` whenever LoRAs were attached to it or made to act. With `home`, all stay there once `device` has
    quantised them, for a caller who moves them himself. Raises ConfigError where it cannot be done.
    """
    if reason := storage and why_not(storage, device.type, stream):
        raise ConfigError(f"weights cannot be held as {storage} here: {reason}", hint="int8 works everywhere")
    dtype = PLAIN.get(storage or "", dtype)
    home = home or (torch.device("cpu") if stream else device)
    over = Carrier(device)
    back = over if home == device else Carrier(home)
    made: set[nn.Module] = set()
    if storage is not None and storage not in PLAIN:
        for block in blocks:
            for name, linear in list(block.named_modules()):
                if isinstance(linear, nn.Linear):
                    made.add(held := _held(linear, storage, dtype, over, back))
                    block.set_submodule(name, held)
    for module in denoiser.modules():
        if module not in made:
            back.bring(module, dtype)
    told = cast(Any, denoiser.eval().requires_grad_(False))
    if storage is None and not stream and home == device:
        return denoiser
    told.compute_dtype, told.compute_device = dtype, device
    if stream:
        queued = device.type in STREAMING
        told.enable_group_offload(
            onload_device=device, offload_device=home, offload_type="block_level", num_blocks_per_group=1,
            use_stream=queued, record_stream=queued,
        )  # fmt: skip
    return denoiser


def _held(linear: nn.Linear, storage: Storage, dtype: torch.dtype, over: Carrier, back: Carrier) -> nn.Module:
    bias_O = None if linear.bias is None else back.carry(linear.bias.data, dtype)
    if storage in GRIDS:
        grid_OI, scale_O = store(over.carry(linear.weight.data), storage)
        return StoredLinear(back.carry(grid_OI), back.carry(scale_O), bias_O)
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        held = Linear4bit(linear.in_features, linear.out_features, bias_O is not None, dtype, quant_type="nf4")
    held.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
    held.support_avx512bf16_for_cpu = False  # it would lay the weights out anew when drawing, and training not know it
    plain = over.carry(linear.weight.data, dtype)
    held.weight = Params4bit(
        plain, requires_grad=False, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4", module=held
    ).to(over.device)  # quantises
    return cast(nn.Module, held)


def restream(denoiser: nn.Module) -> None:
    """Let a streamed transformer's new parameters travel too, after LoRAs were attached or removed; else nothing."""
    group_offloading._maybe_remove_and_reapply_group_offloading(denoiser)


def compile_blocks(denoiser: nn.Module, dynamic: bool | None = None) -> None:
    """Compile the repeated blocks, once for each of the two kinds: a sixth of the time that the whole would take.

    `dynamic` None compiles for the first size that is drawn, and at the second size for any. Attach LoRAs before: each
    set of them is compiled anew, and so is the change from one strength to another, but only the first such change: it
    leaves the strength open. Streamed blocks break the graph where their weights arrive.
    """
    cast(Any, denoiser).compile_repeated_blocks(fullgraph=not is_streamed(denoiser), dynamic=dynamic)


def is_streamed(denoiser: nn.Module) -> bool:
    """Whether its blocks' weights travel."""
    return bool(group_offloading._is_group_offload_enabled(denoiser))


def tile_vae(vae: nn.Module, side_px: int = 512) -> None:
    """Let the autoencoder work on overlapping tiles of this size; FLUX.1's own setting, 1024, leaves 1 MP whole."""
    tiled = cast(Any, vae)
    tiled.enable_tiling()
    tiled.tile_sample_min_size = side_px
    tiled.tile_latent_min_size = side_px // 2 ** (len(tiled.config.block_out_channels) - 1)
