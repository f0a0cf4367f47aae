"""Seconds a picture, by how the weights are held and whether blocks are compiled, beside diffusers' pipeline.

Both sides start from the same encoded text and seed and end with a picture; the pipeline is timed first and last, so
that drift shows. On flux-tiny, or with random weights at FLUX.1-dev's full size, for which nothing is downloaded.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import nn

from flux_ft import flow
from flux_ft.errors import ConfigError
from flux_ft.families import quantize
from flux_ft.families.base import Family
from flux_ft.families.flux1 import Flux1
from flux_ft.families.quantize import Storage
from flux_ft.families.registry import FLUX1_DEV, open_family
from flux_ft.flow import keyed_generator
from flux_ft.infer.fit import FitWishes, Machine, choose_fit, model_sizes
from flux_ft.infer.grid import to_image
from flux_ft.infer.runner import pick_device
from flux_ft.infer.sampler import initial_noise, predictor, walk
from flux_ft.types import TextCond

PROMPT = "a red circle on a blue background"
GUIDANCE = 3.5
FLUX1_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
STORAGES: tuple[Storage, ...] = ("int8", "fp8", "nf4")


@dataclass(frozen=True)
class RandomFlux1(Flux1):
    """FLUX.1-dev's parts filled with noise on the device itself; `shape` overrides the transformer's configuration."""

    shape: tuple[tuple[str, object], ...] = ()

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype,
        storage: Storage | None = None,
        stream: bool = False,
        home: torch.device | None = None,
    ) -> nn.Module:
        with torch.device("meta"):
            denoiser = FluxTransformer2DModel(guidance_embeds=True, **dict(self.shape))
        denoiser = noise(denoiser, home or device, dtype)
        if storage is not None or stream or home:
            return quantize.hold(denoiser, self.blocks(denoiser).values(), storage, device, dtype, stream, home)
        return denoiser

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            vae = AutoencoderKL(**FLUX1_VAE)
        return noise(vae, device, dtype)


def noise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same numbers on any device; drawn on a GPU if there is one, since a CPU takes minutes for 12 billion."""
    model = nn.Module.to(model, dtype).to_empty(device=device)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            drawn = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
            parameter.data.copy_(drawn.normal_(std=0.02, generator=generator))
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Row:
    """One way to draw the picture."""

    what: str
    seconds: float
    """Median, a picture, decoding and all, the texts encoded before."""
    ratio: float
    """Of diffusers' seconds to these, both of this run: above 1 is faster than diffusers."""
    first_s: float
    """Of the first picture, which compiles and warms up."""
    weights_gb: float
    differs: float
    """From diffusers' picture: mean absolute difference of 8-bit values."""
    peak_gb: float | None = None
    """CUDA: most that was allocated while drawing."""
    predicted_gb: float | None = None
    """What `infer/fit.py` said of that."""


@dataclass(frozen=True)
class InferBench:
    """All rows, diffusers' first."""

    model: str
    device: str
    torch: str
    threads: int
    side_px: int
    steps: int
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def for_people(self) -> str:
        """The table."""
        lines = [
            f"{self.model}, {self.side_px}×{self.side_px}, {self.steps} steps, on {self.device}",
            f"{'':<20} s/picture  × diffusers   first s  weights GB  differs  peak GB  (predicted)",
        ]
        for row in self.rows:
            peak = "" if row.peak_gb is None else f"  {row.peak_gb:7.2f}"
            predicted = "" if row.predicted_gb is None else f"  ({row.predicted_gb:.2f})"
            lines.append(
                f"{row.what:<20} {row.seconds:9.3f}  {row.ratio:11.2f}  {row.first_s:8.2f}  {row.weights_gb:10.4f}  "
                f"{row.differs:7.2f}{peak}{predicted}"
            )
        return "\n".join(lines)


def bench_infer(
    full: bool = False,
    *,
    steps: int | None = None,
    repeats: int = 3,
    compiled: bool = True,
    device: str | None = None,
    family: Family | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> InferBench:
    """Draw one picture every way that works here, `repeats` times after a first one that is told apart.

    With `full` on a CUDA card of 40 GB or more; `family` is another one to draw with. Raises ConfigError.
    """
    place, dtype = pick_device(device)
    if full and (place.type != "cuda" or torch.cuda.get_device_properties(place).total_memory < 40e9):
        raise ConfigError("`--full` needs a CUDA card of 40 GB or more", hint="leave it out to measure on flux-tiny")
    if repeats < 1:
        raise ConfigError(f"`--repeats` is {repeats}; at least 1 is needed")
    family = family or (RandomFlux1(FLUX1_DEV, "random", "random") if full else open_family("flux-tiny"))
    bench = _Bench(family, place, dtype, steps or family.variant.default_steps, repeats, clock)
    return InferBench(
        model="FLUX.1-dev's size, random weights" if full else family.variant.name,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        torch=torch.__version__, threads=torch.get_num_threads(), side_px=bench.side, steps=bench.steps,
        rows=tuple(bench.rows(compiled)),
    )  # fmt: skip


class _Bench:
    def __init__(
        self, family: Family, device: torch.device, dtype: torch.dtype, steps: int, repeats: int,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.family, self.device, self.dtype = family, device, dtype
        self.steps, self.repeats, self.clock = steps, repeats, clock
        self.side = family.variant.sample_size_px
        self.text = _text(family)
        self.vae = family.load_vae(device, dtype)
        self.reference: Image.Image | None = None
        self.base_s = 0.0

    def rows(self, compiled: bool) -> Iterator[Row]:
        plain: Storage = "fp32" if self.dtype == torch.float32 else "bf16"
        yield from self._plain(plain, compiled)
        for storage in STORAGES:
            if quantize.why_not(storage, self.device.type) is None:
                yield from self._held(storage, False, compiled and storage == "int8")
        yield from self._held(plain, True, False)

    def _plain(self, plain: Storage, compiled: bool) -> Iterator[Row]:
        denoiser = self._load(plain)
        pipe = self._pipeline(denoiser)
        yield self._row("diffusers", denoiser, pipe, plain)
        yield self._row(plain, denoiser, self._ours(denoiser), plain)
        yield self._row("diffusers again", denoiser, pipe, plain)
        if compiled:
            quantize.compile_blocks(denoiser)
            yield self._row(f"{plain} compiled", denoiser, self._ours(denoiser), plain)

    def _held(self, storage: Storage, stream: bool, compiled: bool) -> Iterator[Row]:
        denoiser = self._load(storage, stream)
        name = f"{storage} streamed" if stream else storage
        yield self._row(name, denoiser, self._ours(denoiser), storage, stream)
        if compiled:
            quantize.compile_blocks(denoiser)
            yield self._row(f"{name} compiled", denoiser, self._ours(denoiser), storage, stream)

    def _load(self, storage: Storage, stream: bool = False) -> nn.Module:
        """After the one before is gone: two do not fit."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        loaded: nn.Module = cast(Any, self.family).load_denoiser(self.device, self.dtype, storage, stream)
        return loaded

    def _row(
        self, what: str, denoiser: nn.Module, draw: Callable[[], Image.Image], storage: Storage, stream: bool = False
    ) -> Row:
        first_s, image = self._timed(draw)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = [self._timed(draw)[0] for _ in range(self.repeats)]
        seconds = statistics.median(times)
        peak = predicted = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 1e9
            fit = choose_fit(
                model_sizes(self.family), (self.side, self.side), Machine("cuda", None),
                FitWishes(storage, stream, vae_tiling=False),
            )  # fmt: skip
            predicted = fit.peak_bytes / 1e9
        if self.reference is None:
            self.reference, self.base_s = image, seconds
        drawn, reference = (np.asarray(one, dtype=np.float32) for one in (image, self.reference))
        weights = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
        return Row(
            what, seconds, self.base_s / seconds, first_s, weights / 1e9, float(np.abs(drawn - reference).mean()),
            peak, predicted,
        )  # fmt: skip

    def _timed(self, draw: Callable[[], Image.Image]) -> tuple[float, Image.Image]:
        began = self.clock()
        image = draw()  # on the host, so nothing is left to wait for
        return self.clock() - began, image

    def _ours(self, denoiser: nn.Module) -> Callable[[], Image.Image]:
        shape = self.family.latent_shape(self.side, self.side)
        sigmas = flow.sampling_sigmas(self.steps, self.family.shift_mu(*shape[1:]))

        def draw() -> Image.Image:
            predict = predictor(self.family, denoiser, self.text, GUIDANCE)
            latents = walk(initial_noise(shape, [0]).to(self.device), sigmas, predict)
            return to_image(self.family.decode_latents(self.vae, latents)[0])

        return draw

    def _pipeline(self, denoiser: nn.Module) -> Callable[[], Image.Image]:
        variant = self.family.variant
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=variant.shifted, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        )  # fmt: skip
        pipe: Any = FluxPipeline(
            scheduler=scheduler, vae=self.vae, transformer=denoiser, text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        embeds, pooled = (one.to(self.device, self.dtype) for one in (self.text.embeds_BLD, self.text.pooled_BP))

        def draw() -> Image.Image:
            found: Image.Image = pipe(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=self.side, width=self.side,
                num_inference_steps=self.steps, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0),
            ).images[0]  # fmt: skip
            return found

        return draw


def _text(family: Family) -> TextCond:
    """What flux-tiny's encoders say of the prompt; noise of FLUX.1's shape for random weights."""
    if not isinstance(family, RandomFlux1):
        stack = family.load_text(torch.device("cpu"), torch.float32)
        return family.encode_text(stack, [PROMPT])
    shape: dict[str, Any] = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | dict(family.shape)
    generator = keyed_generator(0, "bench", "text")
    tokens = family.variant.max_text_tokens
    return TextCond(
        torch.randn(1, tokens, shape["joint_attention_dim"], generator=generator),
        torch.randn(1, shape["pooled_projection_dim"], generator=generator),
    )
