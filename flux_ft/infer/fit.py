"""What fits the card: how weights are held, what waits in host memory, how pictures are decoded. Loads without torch.

    ModelSizes + picture + Machine + FitWishes ─choose_fit→ Fit

The ladder, best first; the first rung whose estimate is within what is free is taken:

    1  bf16 (on the CPU fp32)   nothing lost
    2  int8                     half the bytes; the velocity differs by a quarter of a percent
    3  nf4                      a quarter of the bytes; it differs by a few percent
    4  bf16, then int8, streamed: nothing (little) lost, but all weights cross the bus at every step (23.8 GB, 1 s over
       PCIe 4), so where host memory holds them they are the last resort, not the third

Each of 1 to 3 first decodes whole pictures, then, if only that is too much, in tiles. fp8 is as large as int8 and four
times as far off, so it is taken only when asked for. What was measured: `families/quantize.py`.

The estimate, in bytes, of one pass over B pictures, for c bytes of what is computed in:

    weights   held · bytes of the storage + others · c; streamed: of the held, STREAMED_BLOCKS blocks
    drawing   B · tokens · width · ACTIVATIONS · c, and the matrix that is spread out for its matmul
    decoding  pixels · channels · DECODING · c, one picture at a time
    total     (weights + autoencoder + LoRAs + the larger of drawing and decoding) · FRAGMENTATION + WORKSPACE
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flux_ft.errors import ConfigError, FluxFTError
from flux_ft.families.base import Family
from flux_ft.families.registry import safetensors_header

if TYPE_CHECKING:
    import torch

    from flux_ft.families.quantize import Storage

BYTES: dict[str, float] = {"fp32": 4, "bf16": 2, "int8": 1.002, "fp8": 1.002, "nf4": 0.516}
"""Of a held weight, with its share of the scales: float32 a row of 3072; nf4 an 8-bit one for 64 weights and a float32
one for 256 of these."""
ACTIVATIONS = 17.5
"""Live values a token and width at the peak of a pass (where q and k are rotated), by counting the live tensors of
diffusers' blocks at full size: 17.2 to 17.6 at 512² to 2048²."""
LORA_ACTIVATIONS = 28.5
"""The same with LoRAs that compute in float32: 28.2 to 28.6."""
DECODING = 8.0
"""Live values a pixel and channel of the decoder's last level, counted likewise: 6.0; a third more for convolution
workspaces, which the count does not see."""
TILE_PX = 512
STREAMED_BLOCKS = 3
"""The one that computes, the next one on its way, and one that the allocator has not got back yet."""
FRAGMENTATION = 1.04
"""What the allocator keeps beyond what is live."""
WORKSPACE_BYTES = 400_000_000
"""Of the libraries: cuBLAS 32 MB a handle and stream, cuDNN's plans, kernels that are loaded at first use."""
ENCODER_WORK = 1.03
"""Encoders with their activations, over their weights: T5's scores are 64 × 512² a prompt."""
TRIVIAL_PARAMS = 100_000_000
"""Below, nothing has to be chosen."""


@dataclass(frozen=True)
class ModelSizes:
    """Parameters by part, and what else memory follows from."""

    denoiser: int
    held: int
    """Those of the denoiser that are in linears inside the blocks."""
    largest_block: int
    largest_matrix: int
    width: int
    encoders: int
    vae: int
    vae_channels: int
    """Of the decoder's last level."""
    token_px: int
    """A token's side."""
    text_tokens: int


FLUX1_SIZES = ModelSizes(
    denoiser=11_901_408_320, held=11_834_228_736, largest_block=339_831_296, largest_matrix=56_623_104, width=3072,
    encoders=4_762_310_656 + 123_060_480, vae=83_819_683, vae_channels=128, token_px=16, text_tokens=512,
)  # fmt: skip
"""FLUX.1-dev: transformer, T5-XXL and CLIP-L, autoencoder; counted on diffusers' and transformers' own classes."""


@dataclass(frozen=True)
class Machine:
    """What there is to fit into; None where it cannot be asked."""

    device_type: str
    free_bytes: int | None
    """Of the device; on the CPU that is host memory."""
    host_bytes: int | None = None
    """Host memory that is available."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Storages that do not work here, and why."""


@dataclass(frozen=True)
class FitWishes:
    """What the user decided; None leaves it to the ladder."""

    storage: Storage | None = None
    stream: bool | None = None
    vae_tiling: bool | None = None
    compile: bool = False


@dataclass(frozen=True)
class Fit:
    """How a model is put on a machine."""

    storage: Storage
    stream: bool
    """Blocks wait in host memory and travel to the device one by one."""
    encoders: Literal["device", "offload"]
    """`device`: text encoders fit beside the denoiser. `offload`: they do not, see `encode_on_device`."""
    vae_tiling: bool
    compile: bool
    peak_bytes: int
    """Estimate of what is live at once."""
    needs_bytes: int
    """The same with the allocator's and the libraries' share."""
    free_bytes: int | None
    encoders_alone: bool
    """Whether the encoders fit on the device while no denoiser is there."""
    reasons: tuple[str, ...] = ()
    """Why not better, and what would come next."""
    quiet: bool = False

    def encode_on_device(self, denoiser_loaded: bool) -> bool:
        """Whether texts are encoded on the device or on the CPU."""
        return self.encoders == "device" or (self.encoders_alone and not denoiser_loaded)

    def compute(self, device_type: str) -> Literal["fp32", "bf16"]:
        """What is computed in: as the weights are held, or for 8 and 4 bits what suits the device."""
        return _compute(self.storage, device_type)

    def for_people(self) -> str:
        """A line of what was chosen and one of why; nothing where there was nothing to choose."""
        if self.quiet:
            return ""
        parts = [
            f"{self.storage} weights" + (", streamed from host memory" if self.stream else ""),
            self._texts(),
            "pictures decoded in tiles" if self.vae_tiling else "",
            "compiled" if self.compile else "",
        ]
        free = "" if self.free_bytes is None else f" of {_gb(self.free_bytes)} free"
        lines = [f"memory    {', '.join(part for part in parts if part)}: about {_gb(self.needs_bytes)}{free}"]
        return "\n".join([*lines, *(["          " + "; ".join(self.reasons)] if self.reasons else [])])

    def _texts(self) -> str:
        if self.encoders == "device":
            return ""
        return "text encoders leave before drawing" if self.encoders_alone else "texts encoded on the CPU"

    def as_json(self) -> dict[str, Any]:
        """For programs and recipes."""
        return asdict(self) | {"reasons": list(self.reasons)}


@dataclass(frozen=True)
class _Rung:
    storage: Storage
    stream: bool = False
    vae_tiling: bool = False

    def __str__(self) -> str:
        return f"{self.storage}{' streamed' if self.stream else ''}{' in tiles' if self.vae_tiling else ''}"


def choose_fit(
    sizes: ModelSizes,
    picture_px: tuple[int, int],
    machine: Machine,
    wishes: FitWishes = FitWishes(),
    *,
    batch: int = 1,
    shown_px: int = 0,
    lora_params: int = 0,
    tile_px: int | None = None,
) -> Fit:
    """The best rung of the ladder that fits and has what was wished for.

    `picture_px` is (width, height), of the largest picture; `shown_px` the pixels of a picture that is shown to the
    model as tokens (Kontext), `tile_px` those that it sees at once where it draws in tiles (ultra). What was wished for
    is done even if the estimate says that it does not fit, with that as a reason. Raises ConfigError for a wish that
    does not work here, FluxFTError when nothing fits.
    """
    rungs = _ladder(machine, wishes)
    load = _Load(sizes, picture_px, machine.device_type, batch, shown_px, lora_params, tile_px)
    free = math.inf if machine.free_bytes is None else machine.free_bytes
    tried: list[tuple[_Rung, int]] = []
    chosen = None
    for rung in rungs:
        needs = load.needs(rung)
        host = load.host(rung)
        if machine.host_bytes is not None and host > machine.host_bytes:
            continue
        if needs <= free:
            chosen = rung
            break
        tried.append((rung, needs))
    forced = wishes.storage is not None or wishes.stream is not None
    reasons = []
    if chosen is None and forced:
        chosen = min(tried, key=lambda one: one[1])[0] if tried else rungs[-1]
        reasons.append("more than there is by this estimate, and done as asked")
    elif chosen is None:
        raise _too_much(tried, load, machine)
    elif tried:
        reasons.append(f"{tried[0][0]} would need {_gb(tried[0][1])}")
    elif machine.free_bytes is None:
        reasons.append("how much is free cannot be asked here")
    reasons += [f"no {name}: {why}" for name, why in machine.missing.items() if name == "nf4" and tried and not forced]
    if lower := next((rung for rung in rungs[rungs.index(chosen) + 1 :] if rung.storage != chosen.storage), None):
        reasons.append(f"next would be {lower} with {_gb(load.needs(lower))}")
    beside = (load.peak(chosen) + load.encoders(chosen)) * FRAGMENTATION + WORKSPACE_BYTES
    return Fit(
        storage=chosen.storage, stream=chosen.stream, vae_tiling=chosen.vae_tiling, compile=wishes.compile,
        encoders="device" if beside <= free or machine.device_type == "cpu" else "offload",
        encoders_alone=load.encoders(chosen) * FRAGMENTATION + WORKSPACE_BYTES <= free,
        peak_bytes=load.peak(chosen), needs_bytes=load.needs(chosen), free_bytes=machine.free_bytes,
        reasons=tuple(reasons), quiet=sizes.denoiser < TRIVIAL_PARAMS and wishes == FitWishes(),
    )  # fmt: skip


def _ladder(machine: Machine, wishes: FitWishes) -> list[_Rung]:
    """Every rung that works here and is as wished, best first."""
    if wishes.storage is not None and (why := machine.missing.get(wishes.storage)):
        raise ConfigError(f"`--storage {wishes.storage}` cannot be had: {why}", hint="int8 works everywhere")
    if wishes.storage == "nf4" and wishes.stream:
        raise ConfigError("`--storage nf4` weights cannot be streamed", hint="stream int8 or bf16")
    best: Storage = "fp32" if machine.device_type == "cpu" else "bf16"
    resident: Sequence[Storage] = (best, "int8", "nf4") if wishes.storage is None else (wishes.storage,)
    streamed: Sequence[Storage] = (best, "int8") if wishes.storage is None else (wishes.storage,)
    rungs = []
    if not wishes.stream:
        rungs += [_Rung(name, False, tiled) for name in resident for tiled in (False, True)]
    if wishes.stream or (wishes.stream is None and machine.device_type not in ("cpu", "mps")):
        rungs += [_Rung(name, True, tiled) for name in streamed if name != "nf4" for tiled in (False, True)]
    return [
        rung
        for rung in rungs
        if rung.storage not in machine.missing and wishes.vae_tiling in (None, rung.vae_tiling)
    ]  # fmt: skip


@dataclass(frozen=True)
class _Load:
    """The estimate for one kind of picture."""

    sizes: ModelSizes
    picture_px: tuple[int, int]
    device_type: str
    batch: int
    shown_px: int
    lora_params: int
    tile_px: int | None

    def peak(self, rung: _Rung) -> int:
        """Bytes that are live at once."""
        sizes, c = self.sizes, BYTES[_compute(rung.storage, self.device_type)]
        each = BYTES[rung.storage]
        others = (sizes.denoiser - sizes.held) * c
        held = STREAMED_BLOCKS * sizes.largest_block * each if rung.stream else sizes.held * each
        pixels = self.picture_px[0] * self.picture_px[1]
        tokens = (min(pixels, self.tile_px or pixels) + self.shown_px) / sizes.token_px**2 + sizes.text_tokens
        live = LORA_ACTIVATIONS if self.lora_params and c < 4 else ACTIVATIONS
        spread = sizes.largest_matrix * c if each < c else 0
        drawing = held + self.batch * tokens * sizes.width * live * c + spread
        decoded = min(pixels, TILE_PX**2) if rung.vae_tiling else pixels
        decoding = (0 if rung.stream else held) + decoded * sizes.vae_channels * DECODING * c
        return int(others + sizes.vae * c + self.lora_params * 4 + max(drawing, decoding))

    def needs(self, rung: _Rung) -> int:
        """The same with what the allocator and the libraries take."""
        return int(self.peak(rung) * FRAGMENTATION + WORKSPACE_BYTES)

    def encoders(self, rung: _Rung) -> float:
        return self.sizes.encoders * BYTES[_compute(rung.storage, self.device_type)] * ENCODER_WORK

    def host(self, rung: _Rung) -> float:
        """Host memory that waiting weights take."""
        return self.sizes.denoiser * BYTES[rung.storage] if rung.stream else 0


def _compute(storage: Storage, device_type: str) -> Literal["fp32", "bf16"]:
    if storage in ("fp32", "bf16"):
        return "fp32" if storage == "fp32" else "bf16"
    return "fp32" if device_type == "cpu" else "bf16"


def _too_much(tried: Sequence[tuple[_Rung, int]], load: _Load, machine: Machine) -> FluxFTError:
    free = _gb(machine.free_bytes or 0)
    width, height = load.picture_px
    if not tried:
        return FluxFTError("host memory is too small for this model", hint="close other programs")
    rung, needs = min(tried, key=lambda one: one[1])
    smaller = replace(load, picture_px=(width // 2, height // 2)).needs(rung)
    lower = f"at {width // 2}×{height // 2} it would be {_gb(smaller)}; " if smaller < 0.9 * needs else ""
    batch = "draw fewer at a time; " if load.batch > 1 else ""
    where = "host memory" if machine.device_type == "cpu" else "the card"
    return FluxFTError(
        f"{width}×{height} pixels need about {_gb(needs)} at the least ({rung}), {where} has {free} free",
        hint=f"{batch}{lower}close what else uses {where}"
        + ("" if machine.device_type == "cpu" else ", free host memory so that weights can wait there, or "
           "`--device cpu`"),
    )  # fmt: skip


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


# --- What there is. ---

_IN_BLOCK = re.compile(r"(?:^|\.)((?:single_)?transformer_blocks\.\d+|(?:double|single)_blocks\.\d+)\.")


def model_sizes(family: Family) -> ModelSizes:
    """Sizes from the headers of local files, without loading; what is not here is taken to be FLUX.1-dev's."""
    source = Path(family.source)
    parts = Path(getattr(family, "parts", family.source))
    variant, known = family.variant, FLUX1_SIZES
    sizes = replace(known, text_tokens=variant.max_text_tokens, token_px=variant.pixel_multiple)
    shapes = dict(_shapes(source if source.suffix == ".safetensors" else source / "transformer"))
    if shapes:
        blocks: dict[str, int] = {}
        held = []
        for name, shape in shapes.items():
            if match := _IN_BLOCK.search(name):
                blocks[match[1]] = blocks.get(match[1], 0) + math.prod(shape)
                held += [math.prod(shape)] if len(shape) == 2 else []
        width = next((shape[0] for name, shape in shapes.items() if _ends(name, "x_embedder", "img_in")), known.width)
        sizes = replace(
            sizes, denoiser=sum(map(math.prod, shapes.values())), held=sum(held), largest_matrix=max(held, default=0),
            largest_block=max(blocks.values(), default=0), width=width,
        )  # fmt: skip
    encoders = [shape for name in ("text_encoder", "text_encoder_2") for _, shape in _shapes(parts / name)]
    if encoders:
        sizes = replace(sizes, encoders=sum(map(math.prod, encoders)))
    if vae := dict(_shapes(parts / "vae")):
        channels = vae.get("decoder.conv_norm_out.weight", (known.vae_channels,))[0]
        sizes = replace(sizes, vae=sum(map(math.prod, vae.values())), vae_channels=channels)
    return sizes


def _ends(name: str, *modules: str) -> bool:
    return name.endswith(tuple(f"{module}.weight" for module in modules))


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape in a safetensors file, or in those of a folder: once, where there is an index."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if index := next(iter(sorted(path.glob("*.index.json"))) if path.is_dir() else iter(()), None):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [file for file in files if file.name in named]
    for file in files[: None if index else 1]:
        for name, entry in safetensors_header(file).items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def machine_of(device: torch.device) -> Machine:
    """What is free on `device` and in host memory now, and which storages do not work there."""
    import torch

    from flux_ft.families.quantize import why_not

    host = host_bytes()
    free = host if device.type == "cpu" else None
    if device.type == "cuda":
        # What this process's allocator keeps and does not use is as good as free.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    elif device.type == "mps":
        free = max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    storages: tuple[Storage, ...] = ("int8", "fp8", "nf4")
    return Machine(device.type, free, host, {name: why for name in storages if (why := why_not(name, device.type))})


def host_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that can be had without swapping, less what a container forbids; None where it cannot be asked."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    counts = [int(found[1]) * 1024] if found else []
    try:
        limit, used = ((root / "sys/fs/cgroup" / name).read_text("ascii") for name in ("memory.max", "memory.current"))
        counts += [max(0, int(limit) - int(used))] if limit.strip() != "max" else []
    except (OSError, ValueError):
        pass
    return min(counts, default=None)
