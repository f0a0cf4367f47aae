"""Whether a device computes the same bits each time: FLUX.1's attention, linears and blocks, forwards and backwards.

A flag says what torch means to do; some kernels ignore it. So each pass is made over and over from the same numbers, in
strict and in fast mode by turns, compared bit by bit, and timed, which gives the price of strict as well.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_ft import log
from flux_ft.bench.infer import RandomFlux1
from flux_ft.errors import first_line
from flux_ft.families.registry import FLUX1_DEV
from flux_ft.flow import keyed_generator
from flux_ft.infer.runner import release_memory
from flux_ft.train.determinism import Mode, applied, prepare_environment, same_bits
from flux_ft.types import TextCond

REPEATS = 30
MODES: tuple[Mode, ...] = ("strict", "fast")
KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Pass = Callable[[], tuple[Tensor, ...]]
"""Computes results and gradients from numbers that stay the same."""


@dataclass(frozen=True)
class Sizes:
    """What is computed."""

    attention: tuple[tuple[int, int, int, int], ...]
    """(pictures, heads, tokens, features of a head)."""
    linears: tuple[tuple[int, int, int], ...]
    """(tokens, features in, features out)."""
    blocks: Mapping[str, Any]
    """Configuration of a FluxTransformer2DModel."""
    latent_side: int
    text_tokens: int


FLUX_SIZES = Sizes(
    # 512 tokens of text with those of 1024 × 1024 px, and of 512 × 512 px.
    attention=((1, 24, 512 + 4096, 128), (4, 24, 512 + 1024, 128)),
    # Attention, feed-forward up and down, a single block's last, and both factors of a LoRA.
    linears=tuple(
        (512 + 4096, *shape)
        for shape in ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072), (3072, 32), (32, 3072))
    ),
    blocks={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4},
    latent_side=64,
    text_tokens=512,
)


@dataclass
class Tally:
    """One pass in one mode, repeated."""

    compared: int = 0
    """Repeats that were held against the first."""
    differing: int = 0
    largest: float = 0.0
    """Largest absolute difference of any number."""
    seconds: float = 0.0
    """Median of a pass, forwards and backwards; the first is left out."""
    refused: str = ""
    """Why it does not run."""
    short_of_memory: bool = False

    def for_people(self) -> str:
        """Half a sentence."""
        if self.refused:
            return f"does not run: {self.refused}"
        if self.differing:
            how = f"differs in {self.differing} of {self.compared} (by up to {self.largest:.2g})"
        else:
            how = "repeats exactly"
        return f"{how}, {self.seconds * 1e3:.3g} ms"


@dataclass(frozen=True)
class Row:
    """One pass in the modes that it is made in."""

    what: str
    tallies: dict[Mode, Tally]
    needed: bool = True
    """Whether training takes it; a kernel that one device lacks is no fault."""

    @property
    def ok(self) -> bool:
        """Whether strict mode keeps its promise here. Fast mode makes none."""
        strict = self.tallies.get("strict")
        if strict is None or not self.needed or strict.short_of_memory:
            return strict is None or strict.differing == 0
        return not strict.refused and strict.differing == 0

    @property
    def price(self) -> float | None:
        """Seconds of a strict pass to those of a fast one, taken by turns in this run."""
        strict, fast = (self.tallies.get(mode) for mode in MODES)
        return strict.seconds / fast.seconds if strict and fast and strict.seconds and fast.seconds else None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        modes: dict[str, Any] = {mode: vars(tally) for mode, tally in self.tallies.items()}
        return {"what": self.what, "ok": self.ok, "strict_to_fast": self.price} | modes

    def for_people(self) -> str:
        """One line."""
        if self.tallies and all(tally.refused for tally in self.tallies.values()) and not self.needed:
            return "not offered here"
        told = [f"{mode} {tally.for_people()}" for mode, tally in self.tallies.items()]
        if "strict" not in self.tallies:
            told.append("strict does without it")
        return "; ".join([*told, *([f"strict takes {self.price:.2f} times as long"] if self.price else [])])


@dataclass(frozen=True)
class Probe:
    """A pass to repeat; `make` lays out its numbers on the device."""

    what: str
    make: Callable[[], Pass]
    modes: tuple[Mode, ...] = MODES
    needed: bool = True


def check_repeats(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, sizes: Sizes = FLUX_SIZES, repeats: int = REPEATS
) -> list[Row]:
    """Make every pass that training is made of `repeats` times in each mode. Raises ConfigError as `applied` does."""
    prepare_environment()
    probes = [
        *attention_probes(device, dtype, sizes),
        *linear_probes(device, dtype, sizes),
        _blocks(device, dtype, sizes),
    ]
    rows = []
    with log.progress("repeat", len(probes)) as bar:
        for probe in probes:
            rows.append(measure(probe, device, repeats))
            release_memory()
            bar.advance()
    return rows


def measure(probe: Probe, device: torch.device, repeats: int, clock: Callable[[], float] = time.perf_counter) -> Row:
    """Repeat one pass, the modes by turns, so that a device that warms up does so for both."""
    runs = {mode: _Run(Tally()) for mode in probe.modes}
    made: Pass | None = None
    for _ in range(repeats):
        for mode, run in runs.items():
            if run.tally.refused:
                continue
            with applied(mode, device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's reasons against a kernel: they are told in the row
                try:
                    made = made or probe.make()
                    run.take(*_timed(made, device, clock))
                except RuntimeError as error:
                    run.tally.short_of_memory = isinstance(error, torch.OutOfMemoryError)
                    run.tally.refused = "too little free memory" if run.tally.short_of_memory else first_line(error)
    for run in runs.values():
        run.tally.seconds = statistics.median(run.times) if run.times else 0.0
    return Row(probe.what, {mode: run.tally for mode, run in runs.items()}, probe.needed)


@dataclass
class _Run:
    tally: Tally
    times: list[float] = field(default_factory=list)
    first: tuple[Tensor, ...] | None = None

    def take(self, seconds: float, found: tuple[Tensor, ...]) -> None:
        if self.first is None:  # it warms up, and is what all others are held against
            self.first = found
            return
        self.times.append(seconds)
        self.tally.compared += 1
        odd = [(one, other) for one, other in zip(self.first, found, strict=True) if not same_bits(one, other)]
        self.tally.differing += bool(odd)
        apart = [float((one.float() - other.float()).abs().max()) for one, other in odd]
        self.tally.largest = max([self.tally.largest, *apart])


def _timed(made: Pass, device: torch.device, clock: Callable[[], float]) -> tuple[float, tuple[Tensor, ...]]:
    _wait(device)
    began = clock()
    found = made()
    _wait(device)
    return clock() - began, found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def attention_probes(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Probe]:
    """Each kernel by itself, and the one that torch chooses, which is what training takes."""
    for shape in sizes.attention:
        where = f"{shape[0]} × {shape[2]:,} tokens, {shape[1]} heads × {shape[3]}"
        yield Probe(f"attention, torch's choice, {where}", _attention(device, dtype, shape, None))
        for name, kernel in KERNELS.items():
            modes: tuple[Mode, ...] = ("fast",) if name == "cuDNN" else MODES
            yield Probe(f"attention, {name}, {where}", _attention(device, dtype, shape, kernel), modes, needed=False)


def _attention(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], kernel: SDPBackend | None
) -> Callable[[], Pass]:
    def make() -> Pass:
        query, key, value, grad = _numbers("attention", [shape] * 4, device, dtype)

        def compute() -> tuple[Tensor, ...]:
            with sdpa_kernel([kernel]) if kernel is not None else nullcontext():
                out = F.scaled_dot_product_attention(query, key, value)
                return (out.detach(), *torch.autograd.grad(out, (query, key, value), grad))

        return compute

    return make


def linear_probes(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Probe]:
    """Products of activations with weights, and the gradients of both."""
    for tokens, inputs, outputs in sizes.linears:
        what = f"linear, {tokens:,} tokens, {inputs:,} to {outputs:,} features"
        yield Probe(what, _linear(device, dtype, tokens, inputs, outputs))


def _linear(device: torch.device, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> Callable[[], Pass]:
    def make() -> Pass:
        shapes = [(tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs)]
        features, weight, bias, grad = _numbers("linear", shapes, device, dtype)

        def compute() -> tuple[Tensor, ...]:
            out = F.linear(features, weight, bias)
            return (out.detach(), *torch.autograd.grad(out, (features, weight, bias), grad))

        return compute

    return make


def _blocks(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Probe:
    """A whole narrow model, as the family runs it, with the gradients of all its weights."""

    def make() -> Pass:
        shape = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | dict(sizes.blocks)
        family = RandomFlux1(FLUX1_DEV, "random", "random", tuple(shape.items()))
        denoiser = family.load_denoiser(device, dtype).train().requires_grad_(True)
        channels, side = FLUX1_DEV.latent_channels, sizes.latent_side
        needed = [
            (1, channels, side, side), (1, sizes.text_tokens, shape["joint_attention_dim"]),
            (1, shape["pooled_projection_dim"]), (1, channels, side, side),
        ]  # fmt: skip
        latents, embeds, pooled, grad = (one.detach() for one in _numbers("blocks", needed, device, dtype))
        text, sigma_B = TextCond(embeds, pooled), torch.full((1,), 0.5, device=device)

        def compute() -> tuple[Tensor, ...]:
            velocity = family.predict_velocity(denoiser, latents, sigma_B, text, 1.0)
            wanted = list(denoiser.parameters())
            grads = torch.autograd.grad(velocity, wanted, grad.to(velocity.dtype), allow_unused=True)
            return (velocity.detach(), *(one for one in grads if one is not None))

        return compute

    heads = sizes.blocks["num_attention_heads"]
    return Probe(f"FLUX.1, a block of each kind, {heads} heads", make)


def _numbers(purpose: str, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Normal random numbers, the same on every device."""
    generator = keyed_generator(0, "repeat", purpose)
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return [one.to(device, dtype).requires_grad_(True) for one in drawn]
