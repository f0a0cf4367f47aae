"""Load a model once, put LoRAs on it, draw pictures."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from flux_ft import __version__
from flux_ft.adapters import lora
from flux_ft.adapters.formats import read_adapter
from flux_ft.errors import ConfigError, InputError
from flux_ft.families.base import Family
from flux_ft.families.registry import open_family
from flux_ft.infer.grid import save_png, to_image
from flux_ft.infer.sampler import initial_noise, sample_latents
from flux_ft.types import AppliedAdapter, TextCond

DEVICE_TYPES = ("cuda", "mps", "xpu", "cpu")


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw. Sides in pixels, multiples of the family's grid; `guidance` is the embedded one."""

    prompt: str
    seed: int
    width_px: int
    height_px: int
    steps: int
    guidance: float


class Runner:
    """Draws pictures with one model and any number of LoRAs.

    The text encoders are loaded for each call of `generate` and freed before it draws; in the first call that is before
    the denoiser is loaded.
    """

    def __init__(
        self, model: str, adapters: Sequence[AppliedAdapter] = (), device: str | None = None, parts: str | None = None
    ) -> None:
        """Raises ModelError or AdapterError before anything large is loaded where it can."""
        self.model, self.model_parts = model, parts
        self.family = open_family(model, parts)
        self.adapters = tuple(adapters)
        self._states = [(adapter, read_adapter(adapter.path)) for adapter in adapters]
        self.device, self.dtype = pick_device(device)
        self._denoiser: nn.Module | None = None
        self._vae: nn.Module | None = None

    def request(
        self,
        prompt: str,
        seed: int,
        width_px: int | None = None,
        height_px: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> ImageRequest:
        """A request with the variant's defaults filled in. Raises ConfigError for a size off the grid."""
        variant = self.family.variant
        width, height = width_px or variant.sample_size_px, height_px or variant.sample_size_px
        for name, side in (("width", width), ("height", height)):
            if side <= 0 or side % variant.pixel_multiple:
                down = max(1, side // variant.pixel_multiple) * variant.pixel_multiple
                raise ConfigError(
                    f"`{name}` is {side} px; {variant.name} draws multiples of {variant.pixel_multiple} px",
                    hint=f"use {down} or {down + variant.pixel_multiple}",
                )
        steps = variant.default_steps if steps is None else steps
        if steps < 1:
            raise ConfigError(f"`steps` is {steps}; at least 1 is needed")
        return ImageRequest(
            prompt, seed, width, height, steps, variant.default_guidance if guidance is None else guidance
        )

    def generate(
        self,
        requests: Sequence[ImageRequest],
        batch_size: int | None = None,
        on_step: Callable[[], None] = lambda: None,
        on_picture: Callable[[int, Image.Image], None] = lambda row, image: None,
    ) -> list[Image.Image]:
        """One picture a request, in order.

        `on_step` is called after each denoising step of each batch; `on_picture` with a request's place and its picture
        as soon as that is finished.

        Requests of equal size, steps and guidance share a batch; a picture does not depend on its batch (but for
        rounding).
        """
        text = self._encode(sorted({request.prompt for request in requests}))
        denoiser, vae = self._load()
        pictures: dict[int, Image.Image] = {}
        for rows in plan_batches(requests, batch_size or default_batch(self.family)):
            first = requests[rows[0]]
            cond = join_text([text[requests[row].prompt] for row in rows])
            shape = self.family.latent_shape(first.width_px, first.height_px)
            latents = sample_latents(
                self.family, denoiser, initial_noise(shape, [requests[row].seed for row in rows]), cond,
                first.steps, first.guidance, on_step,
            )  # fmt: skip
            for row, pixels in zip(rows, self.family.decode_latents(vae, latents), strict=True):
                pictures[row] = to_image(pixels)
                on_picture(row, pictures[row])
        return [pictures[row] for row in range(len(requests))]

    def num_passes(self, requests: Sequence[ImageRequest], batch_size: int | None = None) -> int:
        """How often `generate` will call `on_step` for these requests."""
        batches = plan_batches(requests, batch_size or default_batch(self.family))
        return sum(requests[rows[0]].steps for rows in batches)

    def save(self, image: Image.Image, request: ImageRequest, path: Path) -> None:
        """Write a PNG that carries everything needed to draw it again. Raises StorageError."""
        info = PngInfo()
        info.add_text("flux_ft", json.dumps(self.recipe(request), ensure_ascii=True))
        info.add_text("Description", request.prompt.encode("ascii", "backslashreplace").decode())
        save_png(image, path, info)

    def recipe(self, request: ImageRequest) -> dict[str, Any]:
        """What to repeat a picture with: request, model, LoRAs by file name and hash, versions."""
        return {
            "request": asdict(request),
            "model": self.model,
            "model_parts": self.model_parts,
            "adapters": [
                {"file": adapter.path.name, "strength": adapter.strength, "sha256": file_sha256(adapter.path)}
                for adapter in self.adapters
            ],
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "flux_ft": __version__,
            "torch": torch.__version__,
        }  # fmt: skip

    def _encode(self, prompts: Sequence[str]) -> dict[str, TextCond]:
        stack = self.family.load_text(self.device, self.dtype)
        encoded = {}
        for prompt in prompts:
            cond = self.family.encode_text(stack, [prompt])
            encoded[prompt] = TextCond(cond.embeds_BLD.cpu(), cond.pooled_BP.cpu())
        del stack
        release_memory()
        return encoded

    def _load(self) -> tuple[nn.Module, nn.Module]:
        if self._denoiser is None or self._vae is None:
            self._denoiser = self.family.load_denoiser(self.device, self.dtype)
            lora.attach_states(
                self._denoiser,
                [(f"lora_{i}", state, adapter.strength) for i, (adapter, state) in enumerate(self._states)],
            )
            self._vae = self.family.load_vae(self.device, self.dtype)
        return self._denoiser, self._vae


def pick_device(name: str | None = None) -> tuple[torch.device, torch.dtype]:
    """The device to draw on and its dtype: CUDA in bfloat16, then Apple's GPU, then the CPU in float32."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if name is None:
        has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cpu" if forced else "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        if device.type not in DEVICE_TYPES:
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"`--device {name}` cannot be used here", hint="`flux-ft doctor` lists what can") from error
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def default_batch(family: Family) -> int:
    """Small models are drawn many at a time; a 12B one at 1 MP fills a card by itself."""
    return 32 if family.variant.max_pixels <= 128 * 128 else 1


@cache
def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_batches(requests: Sequence[ImageRequest], batch_size: int) -> list[list[int]]:
    """Indices of requests that can share a pass: same size, steps and guidance; in order of first appearance."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, request in enumerate(requests):
        key = (request.width_px, request.height_px, request.steps, request.guidance)
        groups.setdefault(key, []).append(row)
    return [rows[i : i + batch_size] for rows in groups.values() for i in range(0, len(rows), batch_size)]


def join_text(conds: Sequence[TextCond]) -> TextCond:
    """One batch out of single encodings of equal length."""
    return TextCond(torch.cat([c.embeds_BLD for c in conds]), torch.cat([c.pooled_BP for c in conds]))


def release_memory() -> None:
    """Drop what nothing refers to any more, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
