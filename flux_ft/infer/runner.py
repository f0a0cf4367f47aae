"""Load a model once, put LoRAs on it, draw pictures of every task.

    requests ─prepare→ jobs ─group→ batches ─start→ latents ─walk→ latents ─decode→ pictures

A picture follows from its request alone: noise comes from the request's own seed, each picture is encoded and decoded
by itself, and on the CPU a batch computes each of its pictures as if it were alone.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from flux_ft import __version__, flow, log
from flux_ft.adapters import lora
from flux_ft.adapters.attached import INPUT, Attachments
from flux_ft.adapters.formats import sizes_of
from flux_ft.adapters.from_checkpoint import read_lora
from flux_ft.errors import AdapterError, ConfigError, InputError
from flux_ft.families.base import Family, Variant
from flux_ft.families.layout import LAYOUTS
from flux_ft.families.quantize import PLAIN, Storage, compile_blocks, restream, tile_vae
from flux_ft.families.redux import load_redux, redux_tokens, with_redux
from flux_ft.families.registry import FLUX_TINY, open_family
from flux_ft.infer import control as control_maps
from flux_ft.infer import records, starts, tiles
from flux_ft.infer.companions import Setup, setup_for
from flux_ft.infer.fit import Fit, FitWishes, choose_fit, machine_of, model_sizes
from flux_ft.infer.grid import to_image
from flux_ft.infer.inputs import Input, pasted, to_pixels
from flux_ft.infer.sampler import VectorsByRow, predictor, walk
from flux_ft.infer.tasks import (
    Canny,
    Depth,
    Edit,
    Fill,
    Lora,
    Remix,
    Request,
    TextToImage,
    Ultra,
    resolved,
)
from flux_ft.infer.ultra import SCALE, native_size, refine, refine_passes
from flux_ft.types import AdapterState, AppliedAdapter, Bucket, TextCond

DEVICE_TYPES = ("cuda", "mps", "xpu", "cpu")
MOST_KEPT = 64
"""Jobs whose pictures stay open from their check to their drawing; of 1 MP each takes 3 to 6 MB."""
BATCHES_READ, MOST_WORDS = 64, 256
"""Batches whose texts are encoded at once, and texts that are remembered; FLUX.1's take 4 MB each."""
MOST_ATTACHED = 8
"""LoRAs that may lie on a model at once, acting or not."""


Pictures = dict[str, Image.Image]


@dataclass(frozen=True)
class Job:
    """A request that is checked."""

    request: Request
    setup: Setup
    size: Bucket
    shown_px: tuple[int, int] | None
    """Size of the picture that the model is shown as tokens."""
    loras: tuple[tuple[Path, float], ...]
    """Those that act, with their strength."""
    strength: float = 1.0
    """How much of the way from noise is walked, of drawings that start from a picture."""
    number: int = 0
    """Of its runner's jobs."""

    @property
    def picture_px(self) -> tuple[int, int]:
        """Width and height of the finished picture."""
        scale = SCALE if isinstance(self.request, Ultra) else 1
        return scale * self.size.width_px, scale * self.size.height_px

    @property
    def negative(self) -> str | None:
        """What is drawn away from."""
        return (self.request.negative_prompt or "") if self.request.true_cfg != 1 else None

    @property
    def key(self) -> tuple[object, ...]:
        """Jobs of one key can share a batch."""
        request = self.request
        return (
            self.setup,
            self.size,
            self.loras,
            request.steps,
            request.guidance,
            request.true_cfg,
            self.strength,
            self.shown_px,
            getattr(request, "image_prompt_strength", 1) == 0,
            self.number if request.task == "ultra" else None,  # refined one at a time
        )


class Runner:
    """Draws pictures with one model: any task, any number of LoRAs.

    The text encoders are loaded when words are new and freed before the model draws; what they said is kept. The model
    stays loaded as long as requests share it.

        runner = Runner("flux1-dev", [AppliedAdapter(Path("my-cat.safetensors"))])
        runner.draw([TextToImage(prompt="a photo of TOK", seed=1)])[0].show()
    """

    def __init__(
        self,
        model: str = "flux1-dev",
        adapters: Sequence[AppliedAdapter | str | Path] = (),
        device: str | None = None,
        parts: str | None = None,
        control: Path | None = None,
        redux: str | None = None,
        depth_model: str = "large",
        merge: bool = False,
        storage: Storage | None = None,
        stream: bool | None = None,
        vae_tiling: bool | None = None,
        compile: bool = False,
    ) -> None:
        """Raises ModelError, AdapterError or ConfigError before anything large is loaded.

        model: a variant's name, a folder, a .safetensors file or a Hub id.
        adapters: LoRA files that act on every request, before its own `loras`.
        device: as torch names it; None is the best there is.
        parts: where tokenizers, encoders and autoencoder come from if `model` is a single file.
        control: a control LoRA for fill, canny and depth, instead of the known ones.
        redux: folder or Hub id of Redux.
        depth_model: size of Depth Anything V2 (small, base, large), or a folder or Hub id.
        merge: add LoRAs to the weights. Steps are faster, but the model is read again whenever other LoRAs are to act,
            and the sum is rounded to the weights' dtype.
        storage, stream, vae_tiling: how the model is put on the card, where that should not be chosen by itself.
        compile: compile the blocks; slow to start, faster steps.
        """
        self.model, self.model_parts = model, parts
        self.family = open_family(model, parts)
        self.adapters = tuple(one if isinstance(one, AppliedAdapter) else AppliedAdapter(Path(one)) for one in adapters)
        self.device, self.dtype = pick_device(device)
        self._control, self._redux, self._depth_model = control, redux, depth_model
        self._told: set[str] = set()
        self._states: dict[Path, AdapterState] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._hashes: dict[tuple[Path, tuple[int, int]], str] = {}
        self._numbers = itertools.count()
        self._kept: dict[int, Pictures] = {}
        self._said: dict[str, TextCond] = {}
        self._seen: dict[int, Tensor] = {}
        if storage is not None and storage not in get_args(Storage):
            raise ConfigError(f"`--storage {storage}` is not known", hint="one of " + ", ".join(get_args(Storage)))
        if merge and storage not in (None, "bf16", "fp32"):
            raise ConfigError(f"`--merge` takes plain weights, not {storage}", hint="leave out one of the two")
        self._merge = merge
        self._wishes = FitWishes(storage, stream, vae_tiling, compile)
        self._fits: dict[str, Fit] = {}
        self._loaded: _Loaded | None = None
        self._vae: tuple[str, nn.Module] | None = None
        self._depths: dict[str, Image.Image] = {}
        self._depth: control_maps.DepthEstimator | None = None
        for adapter in self.adapters:
            self._state(adapter.path, self.family.variant)

    def draw(
        self,
        requests: Sequence[Request],
        batch_size: int | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Image.Image]:
        """One picture a request, in order; as `draw_jobs`, all in memory. Raises as `prepare`."""
        jobs = [self.prepare(request) for request in requests]
        pictures = dict(self.draw_jobs(jobs, batch_size, on_step))
        return [pictures[row] for row in range(len(jobs))]

    def draw_jobs(
        self, jobs: Sequence[Job], batch_size: int | None = None, on_step: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Image.Image]]:
        """Each job's place and its picture, as soon as that is finished; what shares a model comes together.

        `on_step` is called after each denoising step of each batch. Jobs that differ in nothing but words, seeds and
        pictures share batches; on the CPU a picture is the same to the bit in any batch.
        """
        if self._depth is not None:
            self._depth = None
            release_memory()
        batches = plan_batches(jobs, batch_size or default_batch(self.family))
        for place in range(0, len(batches), BATCHES_READ):
            coming = batches[place : place + BATCHES_READ]
            fit = self._fit(jobs[coming[0][0]].setup.family, jobs)
            self._look_and_read([jobs[row] for rows in coming for row in rows], fit)
            for rows in coming:
                self._fit(jobs[rows[0]].setup.family, jobs)
                yield from zip(rows, self._draw_batch([jobs[row] for row in rows], on_step), strict=True)

    def num_passes(self, jobs: Sequence[Job], batch_size: int | None = None) -> int:
        """How often `draw_jobs` will call `on_step`."""
        return sum(_passes(jobs[rows[0]]) for rows in plan_batches(jobs, batch_size or default_batch(self.family)))

    def prepare(self, request: Request) -> Job:
        """Check everything about a request that can be checked without a model, its pictures too.

        Raises InputError: a task that the model cannot do, a size off the grid, an unreadable picture, a LoRA of
        another model.
        """
        setup = setup_for(request, self.family, self._control, self._redux, self._say_once)
        variant = setup.family.variant
        request = resolved(request, variant)
        pictures, size = self._pictures(request, setup)
        strength = 1.0
        if setup.way == "image":
            strength = 1 - float(getattr(request, "image_prompt_strength", 0.0))
        width = self._input_width(setup)
        loras = []
        for one in self.loras_of(request):
            require_width(self._state(one.path, variant), width, one.path)
            if one.strength * request.finetune_strength != 0:
                loras.append((one.path, one.strength * request.finetune_strength))
        shown_px = pictures["image"].size if setup.way == "reference" else None
        job = Job(request, setup, size, shown_px, tuple(loras), strength, next(self._numbers))
        if pictures and len(self._kept) < MOST_KEPT:
            self._kept[job.number] = pictures
        return job

    def _input_width(self, setup: Setup) -> int:
        """Features of the input layer, which a control LoRA may have widened. AdapterError if it is none."""
        family = setup.family
        if setup.control is None:
            return family.input_features(family.variant.image_input)
        width = family.input_features("fill" if setup.way == "fill" else "control")
        layer = self._state(setup.control, family.variant).layers.get(INPUT)
        found = layer.down_RI.shape[1] if layer is not None else None
        if found != width:
            takes = "no picture" if found is None else f"{found} channels a token"
            raise AdapterError(
                f"`{setup.control}` takes {takes}; a control LoRA for {setup.way} takes {width} channels a token",
                hint="give control LoRAs with --control-lora, others with --lora",
            )
        return width

    def _take_pictures(self, job: Job) -> Pictures:
        """A job's pictures, which are kept since it was checked or are opened again."""
        if job.setup.way == "text":
            return {}
        kept = self._kept.pop(job.number, None)
        return self._pictures(job.request, job.setup)[0] if kept is None else kept

    def recipe(self, request: Request) -> dict[str, Any]:
        """What to repeat a picture with; see `records.make_recipe`. Raises as `prepare`."""
        return self.recipe_of(self.prepare(request))

    def recipe_of(self, job: Job) -> dict[str, Any]:
        """As `recipe`, for a request that is prepared."""
        loras = self.loras_of(job.request)
        request = job.request.model_copy(
            update={"loras": tuple(Lora(file=one.path, strength=one.strength) for one in loras)}
        )
        return records.make_recipe(
            request,
            self.model,
            self.model_parts,
            [self._sha256(one.path) for one in loras],
            {name: self._sha256(given) for name, given in request.pictures.items()},
            str(self.device),
            str(self.dtype).removeprefix("torch."),
            {"flux_ft": __version__, "torch": torch.__version__, "way": job.setup.way, **self._held_as(job)},
            control=self._control,
            control_sha=self._sha256(self._control) if self._control else None,
            redux=self._redux,
        )

    def _held_as(self, job: Job) -> dict[str, str]:
        """How the weights are held, which moves pixels; known once something was drawn."""
        fit = self._fits.get(job.setup.family.source)
        return {} if fit is None else {"storage": fit.storage, "loras": "merged" if self._merge else "attached"}

    def loras_of(self, request: Request) -> tuple[AppliedAdapter, ...]:
        """All that are asked to act, the runner's own first, before `finetune_strength`."""
        return (*self.adapters, *(AppliedAdapter(one.file, one.strength) for one in request.loras))

    def _say_once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            log.say(words)

    def _sha256(self, given: Path | Image.Image) -> str:
        if isinstance(given, Image.Image):
            return records.pixels_sha256(given)
        key = (given, stamp_of(given))
        if key not in self._hashes:
            self._hashes[key] = records.input_sha256(given)
        return self._hashes[key]

    def _pictures(self, request: Request, setup: Setup) -> tuple[Pictures, Bucket]:
        """What the model is shown, by role (control, image, mask), and the size that is drawn."""
        variant = setup.family.variant

        def opened(field: str) -> Input:
            return Input(getattr(request, field), field)

        if isinstance(request, (Canny, Depth)):
            made = request.preprocessed_image is not None
            given = opened("preprocessed_image" if made else "control_image")
            size = given.fitted(variant, self._say_once)
            picture = given.rgb(size)
            if not made:
                picture = self._control_map(request, picture)
            return {"control": picture}, size
        if isinstance(request, Fill):
            given = opened("image")
            size = given.fitted(variant, self._say_once)
            if request.mask is None:
                picture, mask = given.repaint_from_alpha(size)
                return {"image": picture, "mask": mask}, size
            return {"image": given.rgb(size), "mask": opened("mask").mask(given, size)}, size
        if isinstance(request, Ultra):
            size = Bucket(*native_size(request.ratio, variant))
            if request.image_prompt is None:
                return {}, size
            return {"image": opened("image_prompt").covering(size)}, size
        if isinstance(request, (Remix, Edit)):
            given = opened("image_prompt" if isinstance(request, Remix) else "image")
            own = (
                given.for_kontext(variant, self._say_once)
                if setup.way == "reference"
                else given.fitted(variant, self._say_once)
            )
            size = Bucket(request.width or own.width_px, request.height or own.height_px)
            if setup.way == "image":
                return {"image": given.covering(size)}, size
            return {"image": given.covering(own)}, size
        assert isinstance(request, TextToImage)
        side = variant.sample_size_px
        return {}, Bucket(request.width or side, request.height or side)

    def _control_map(self, request: Canny | Depth, picture: Image.Image) -> Image.Image:
        tiny = self.family.variant.name == FLUX_TINY.name
        if isinstance(request, Canny):
            edges = control_maps.tiny_canny if tiny else control_maps.canny
            return edges(picture, request.canny_low_threshold, request.canny_high_threshold)
        if tiny:
            return control_maps.tiny_depth(picture)
        if self._depth is None:
            self._depth = control_maps.DepthEstimator(self._depth_model, self.device)
        key = hashlib.sha256(picture.tobytes()).hexdigest()
        if key not in self._depths:  # many seeds share one
            self._depths = dict(list(self._depths.items())[-MOST_KEPT:]) | {key: self._depth(picture)}
        return self._depths[key]

    def _state(self, file: Path, variant: Variant) -> AdapterState:
        """A LoRA, read once as long as the file stays the same. Raises AdapterError for one of another model."""
        stamp = stamp_of(file)
        if self._stamps.get(file) != stamp:
            self._states[file] = read_lora(file)
            self._stamps[file] = stamp
        require_made_for(self._states[file], variant, file)
        return self._states[file]

    def _fit(self, family: Family, jobs: Sequence[Job]) -> Fit:
        """How this model is put on the machine, chosen once for the largest of its pictures, and said."""
        if family.source not in self._fits:
            if self._loaded is not None and self._loaded.source != family.source:
                self._loaded = None  # before the next one is read, so that the two never lie in memory together
                release_memory()
            here = [job for job in jobs if job.setup.family == family]
            largest = max(here, key=lambda job: math.prod(job.picture_px))
            files = {file for job in here for file, _ in job.loras}
            fit = choose_fit(
                model_sizes(family),
                largest.picture_px,
                machine_of(self.device),
                self._wishes,
                batch=default_batch(family),
                tile_px=max(job.size.width_px * job.size.height_px for job in here),
                shown_px=max((math.prod(job.shown_px) for job in here if job.shown_px), default=0),
                lora_params=sum(
                    layer.up_OR.numel() + layer.down_RI.numel()
                    for file in files
                    for layer in self._states[file].layers.values()
                ),
            )
            if words := fit.for_people():
                log.say(words)
            self._fits[family.source] = fit
        return self._fits[family.source]

    def _look_and_read(self, jobs: Sequence[Job], fit: Fit) -> None:
        """Encode words, and pictures for Redux, that no earlier request had; the encoders are freed again."""
        if len(self._said) > MOST_WORDS:
            self._said.clear()
        self._seen.clear()
        for source in {job.setup.redux for job in jobs if job.setup.redux is not None}:
            model = load_redux(source, self.device, self.dtype)
            for job in jobs:
                if job.setup.redux == source:
                    self._seen[job.number] = redux_tokens(model, self._take_pictures(job)["image"]).cpu()
            del model
            release_memory()
        words = {words for job in jobs for words in (job.request.prompt, job.negative) if words is not None}
        new = sorted(words - self._said.keys())
        if not new:
            return
        on_device = fit.encode_on_device(denoiser_loaded=self._loaded is not None)
        stack = self.family.load_text(self.device if on_device else torch.device("cpu"), self.dtype)
        for prompt in new:
            cond = self.family.encode_text(stack, [prompt])
            self._said[prompt] = TextCond(cond.embeds_BLD.cpu(), cond.pooled_BP.cpu())
        del stack
        release_memory()

    def _draw_batch(self, jobs: Sequence[Job], on_step: Callable[[], None]) -> list[Image.Image]:
        first, request = jobs[0], jobs[0].request
        assert request.steps is not None
        assert request.guidance is not None
        family, vae = first.setup.family, self._autoencoder(first.setup.family)
        denoiser = self._denoiser(first)
        shape = family.latent_shape(first.size.width_px, first.size.height_px)
        sigmas = starts.tail(flow.sampling_sigmas(request.steps, family.shift_mu(*shape[1:])), first.strength)
        given = [{} if job.setup.redux else self._take_pictures(job) for job in jobs]
        began = starts.joined([
            starts.start(
                job.setup.way, family, vae, {role: to_pixels(image) for role, image in pictures.items()}, shape,
                torch.Generator().manual_seed(job.request.seed), float(sigmas[0]),
            )
            for job, pictures in zip(jobs, given, strict=True)
        ])  # fmt: skip
        text = join_text([self._text(job) for job in jobs])
        against = [self._said[job.negative] for job in jobs if job.negative is not None]
        negative = join_text(against) if against else None
        predict = predictor(family, denoiser, text, request.guidance, began.image, negative, request.true_cfg)
        compiled = self._fits[family.source].compile  # dynamo does not go through a mode
        by_row = VectorsByRow() if self.device.type == "cpu" and len(jobs) > 1 and not compiled else nullcontext()
        with by_row:
            after_step = began.keep or (lambda z, sigma: z)
            latents = walk(began.z_BCHW, sigmas, predict, after_step, on_step)
        pixels = tiles.decode(family, vae, latents)
        if isinstance(request, Ultra):
            pixels = refine(family, vae, predict, pixels, [request.seed], request.steps, on_pass=on_step)
        images = [to_image(one) for one in pixels]
        return [
            pasted(image, pictures["image"], pictures["mask"])
            if isinstance(job.request, Fill) and job.request.paste_back
            else image
            for job, image, pictures in zip(jobs, images, given, strict=True)
        ]

    def _text(self, job: Job) -> TextCond:
        text = self._said[job.request.prompt]
        if job.setup.redux is None:
            return text
        assert isinstance(job.request, Remix)
        return with_redux(text, self._seen[job.number], job.request.image_prompt_strength)

    def _autoencoder(self, family: Family) -> nn.Module:
        if self._vae is None or self._vae[0] != family.encoders_identity:
            self._vae = (family.encoders_identity, family.load_vae(self.device, self.dtype))
            if self._fits[family.source].vae_tiling:
                tile_vae(self._vae[1])
        return self._vae[1]

    def _denoiser(self, job: Job) -> nn.Module:
        """The model of a job with just its LoRAs acting."""
        family = job.setup.family
        merged = job.loras if self._merge else ()
        if self._loaded is None or (self._loaded.source, self._loaded.merged) != (family.source, merged):
            self._loaded = None
            release_memory()
            fit = self._fits[family.source]
            if merged and fit.storage not in PLAIN:
                raise ConfigError(
                    f"`--merge` takes plain weights, and {fit.storage} is what fits the card",
                    hint="leave out --merge, or give --storage bf16 --stream",
                )
            if not fit.quiet:
                log.say(f"loading {family.variant.name}")
            plain = PLAIN.get(fit.storage) is self.dtype and not fit.stream
            denoiser = family.load_denoiser(self.device, self.dtype, None if plain else fit.storage, fit.stream)
            for file, strength in merged:
                lora.merge_state(denoiser, self._states[file], strength, f"`{file}`")
            self._loaded = _Loaded(family.source, merged, denoiser, Attachments(denoiser))
            self._loaded.with_loras(job, self._states, self.dtype)
            if fit.compile:  # after the first LoRAs, which change the blocks
                compile_blocks(denoiser)
        return self._loaded.with_loras(job, self._states, self.dtype)


def _passes(job: Job) -> int:
    assert job.request.steps is not None
    steps = len(starts.tail(torch.zeros(job.request.steps + 1), job.strength)) - 1
    if isinstance(job.request, Ultra):
        steps += refine_passes(job.setup.family, job.size.width_px, job.size.height_px, job.request.steps)
    return steps


@dataclass
class _Loaded:
    """A denoiser and what is on it."""

    source: str
    merged: tuple[tuple[Path, float], ...]
    """The LoRAs that are part of its weights, with their strengths."""
    denoiser: nn.Module
    attachments: Attachments

    def with_loras(self, job: Job, states: Mapping[Path, AdapterState], dtype: torch.dtype) -> nn.Module:
        strengths: dict[str, float] = {}
        width = None
        if job.setup.control is not None:
            control = states[job.setup.control]
            width = control.layers[INPUT].down_RI.shape[1]
            strengths[self._attached(job.setup.control, control, None, dtype)] = 1.0
        for file, strength in job.loras if not self.merged else ():
            name = self._attached(file, states[file], width if INPUT in states[file].layers else None, dtype)
            strengths[name] = strengths.get(name, 0.0) + strength
        for name in self.attachments.names[:-MOST_ATTACHED]:
            if name not in strengths:
                self.attachments.detach(name)
        self.attachments.activate(strengths)
        restream(self.denoiser)
        return self.denoiser

    def _attached(self, file: Path, state: AdapterState, width: int | None, dtype: torch.dtype) -> str:
        key = f"{file}:{stamp_of(file)}:{width}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]  # peft takes no dots in names
        if name not in self.attachments.names:
            self.attachments.attach(name, state, width=width, dtype=dtype, label=f"`{file}`")
        return name


def require_made_for(state: AdapterState, variant: Variant, file: Path) -> None:
    """Raise AdapterError, naming both models, for a LoRA of another family or size."""
    tiny = variant.architecture == FLUX_TINY.architecture
    sizes = sizes_of(state)
    fits = state.layout == variant.family and (
        not sizes or any((size.architecture == FLUX_TINY.architecture) == tiny for size in sizes)
    )
    if not fits:
        names = " or ".join(size.architecture.removesuffix("/lora").replace("flux.", "flux") for size in sizes)
        raise AdapterError(
            f"`{file}` was trained on {names or LAYOUTS[state.layout].title}, this is {variant.name}",
            hint="draw with the model that it was trained on; `flux-ft inspect` tells more",
        )


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


def require_width(state: AdapterState, width: int, file: Path) -> None:
    """Raise AdapterError for a control LoRA of another task, whose input layer takes more than there is."""
    layer = state.layers.get(INPUT)
    if layer is not None and layer.down_RI.shape[1] > width:
        raise AdapterError(
            f"`{file}` is a control LoRA: it takes {layer.down_RI.shape[1]} channels a token, this task gives {width}",
            hint="give it with --control-lora, and the --task that it is for",
        )


def stamp_of(path: Path) -> tuple[int, int]:
    """What tells that a file, or a checkpoint's folder, is another one: time and size. Zeros where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def plan_batches(jobs: Sequence[Job], batch_size: int) -> list[list[int]]:
    """Places of jobs that can share a pass; setups one after the other, since changing the model takes long."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, job in enumerate(jobs):
        groups.setdefault(job.key, []).append(row)
    setups = list(dict.fromkeys(job.setup for job in jobs))
    ordered = sorted(groups.values(), key=lambda rows: setups.index(jobs[rows[0]].setup))
    return [rows[i : i + batch_size] for rows in ordered for i in range(0, len(rows), batch_size)]


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
