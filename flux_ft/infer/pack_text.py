"""The words of a parity pack: its draw.py and its README.md."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from flux_ft.families.base import Variant
from flux_ft.infer import comfy


@dataclass(frozen=True)
class ImageRequest:
    """One picture from a prompt alone, which is what a pack can hold. Sides in pixels."""

    prompt: str
    seed: int
    width_px: int
    height_px: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Facts:
    """What the files of a pack tell of its picture."""

    request: ImageRequest
    sigmas: tuple[float, ...]
    """With the last one, 0."""
    model: str | None
    """What diffusers loads: a Hub id or "builtin:…"; None for a folder that only the user has."""
    model_name: str
    transformer: str | None
    """The file that the transformer is in, where it is one of its own."""
    loras: tuple[tuple[str, float], ...]
    """(diffusers file, strength)"""
    comfy_loras: tuple[tuple[str, float], ...]
    """(kohya file, strength); empty where ComfyUI cannot run the model."""
    variant: Variant
    device: str | None
    """The CPU, if it was drawn there; None for the best there is."""
    notes: tuple[str, ...]


def graph(facts: Facts) -> comfy.Graph:
    """What the workflow draws."""
    request, variant = facts.request, facts.variant
    return comfy.Graph(
        models=comfy.models_for(variant, facts.transformer),
        loras=facts.comfy_loras,
        prompt=request.prompt,
        seed=request.seed,
        width_px=request.width_px,
        height_px=request.height_px,
        sigmas=facts.sigmas,
        guidance=request.guidance if variant.guidance_embedded else None,
        text_tokens=variant.max_text_tokens,
    )


# --- draw.py. ---

_BODY = """

def load(model: str, transformer: str | None, device: str) -> FluxPipeline:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    parts = {}
    if transformer:
        parts["transformer"] = FluxTransformer2DModel.from_single_file(
            transformer, config=model, subfolder="transformer", torch_dtype=dtype
        )
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=dtype, **parts)
    # SIGMAS are shifted for this size already.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_dynamic_shifting=False, shift=1.0
    )
    for number, (file, _) in enumerate(LORAS):
        pipe.load_lora_weights(HERE, weight_name=file, adapter_name=f"lora_{number}")
    pipe.set_adapters([f"lora_{number}" for number in range(len(LORAS))], [strength for _, strength in LORAS])
    if device.startswith("cuda"):
        pipe.enable_model_cpu_offload(device=device)  # a part at a time, so that 24 GB are enough
        return pipe
    return pipe.to(device)


def draw(pipe: FluxPipeline) -> Image.Image:
    return pipe(
        PROMPT, width=WIDTH, height=HEIGHT, num_inference_steps=len(SIGMAS), sigmas=SIGMAS, guidance_scale=GUIDANCE,
        max_sequence_length=TEXT_TOKENS, generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]


def compare(image: Image.Image) -> str:
    before, after = (np.asarray(one.convert("RGB")).astype(int) for one in (Image.open(HERE / "preview.png"), image))
    gap = abs(after - before)
    if not gap.any():
        return "equal to preview.png in every pixel"
    share = (gap > 0).any(-1).mean()
    return f"unlike preview.png in {share:.2%} of the pixels: {gap.mean():.4f} of 255 on average, {gap.max()} at most"


def main() -> None:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, required=MODEL is None, help="diffusers folder or Hub id")
    parser.add_argument("--transformer", required=NEEDS_TRANSFORMER, help="transformer in one .safetensors file")
    parser.add_argument("--device", default=DEVICE or best, help="cuda, cuda:1, mps, cpu")
    parser.add_argument("--output", type=Path, default=Path("again.png"))
    args = parser.parse_args()
    image = draw(load(args.model, args.transformer, args.device))
    image.save(args.output)
    print(f"wrote {args.output}: {compare(image)}")


if __name__ == "__main__":
    main()
"""


def script(facts: Facts) -> str:
    """The text of draw.py, which needs torch, diffusers, transformers, accelerate, peft and nothing of ours.

    Only for flux-tiny, whose weights are in this package, it imports flux_ft.
    """
    request = facts.request
    tiny = facts.model is not None and facts.model.startswith("builtin:")
    model = "str(tiny_folder())" if tiny else repr(facts.model)
    file = f"  # {facts.transformer}" if facts.transformer else ""
    sigmas = comfy.sigma_text(facts.sigmas[:-1])  # the pipeline adds the last one itself
    lines = [
        '"""Draws preview.png again with diffusers, and says how equal it is: python draw.py"""',
        "",
        "import argparse",
        "from pathlib import Path",
        "",
        "import numpy as np",
        "import torch",
        "from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel",
        *(["from flux_ft.families.registry import tiny_folder"] if tiny else []),
        "from PIL import Image",
        "",
        "HERE = Path(__file__).resolve().parent",
        f"MODEL = {model}  # {facts.model_name}",
        f"NEEDS_TRANSFORMER = {facts.transformer is not None}{file}",
        f"LORAS = {list(facts.loras)!r}",
        f"PROMPT = {request.prompt!r}",
        f"SEED = {request.seed}",
        f"WIDTH, HEIGHT = {request.width_px}, {request.height_px}",
        f"GUIDANCE = {float(request.guidance)!r}",
        f"TEXT_TOKENS = {facts.variant.max_text_tokens}",
        f"DEVICE = {facts.device!r}",
        "SIGMAS = [",
        *textwrap.wrap(f"{sigmas},", 116, initial_indent="    ", subsequent_indent="    "),
        "]",
    ]
    return "\n".join(lines) + "\n" + _BODY


# --- README.md. ---

_README = """\
# preview.png, drawn again

{model}; {loras}; {size}.
All parameters and the sigmas are in `pack.json`.{license}

{comfy}## diffusers

    python draw.py{arguments}

It needs `diffusers` 0.38 or newer with `transformers`, `accelerate` and `peft`. It writes `again.png` and says how
equal that is to `preview.png`.

## How equal

| drawn by | equal to preview.png |
|---|---|
| `flux-ft generate` | {ours} |
| `draw.py` on the CPU | {on_cpu} |
| `draw.py` on a GPU | to the eye: it keeps latents in bfloat16 between steps, and each GPU rounds in its own way |
{comfy_row}
{notes}"""
_COMFY = """\
## ComfyUI

Version {since} or newer. Put the files where they belong, then drop `workflow.json`, or `preview.png`, on the page and
press Run.

| file | folder | from |
|---|---|---|
{rows}

All nodes are ComfyUI's own. Older versions lack `ManualSigmas`: put `BasicScheduler` (simple, {steps} steps) in its
place, with `ModelSamplingFlux` (max_shift {max_shift}, base_shift {base_shift}, the picture's size) behind the LoRA.
The sigmas then differ by less than 0.0005.

"""
_COMFY_ROW = (
    "| ComfyUI | to the eye. By its source the noise (drawn on the CPU from the seed), the sigmas, the padding of the "
    "prompt and ΔW are the same; but it adds the LoRA to the weights before it draws, computes in other orders, does "
    "not cut long prompts, and rounds pixels down. Read there, not run |"
)


def readme(facts: Facts) -> str:
    """The text of README.md."""
    request, variant = facts.request, facts.variant
    size = f"{request.width_px}×{request.height_px} px, {request.steps} Euler steps, seed {request.seed}"
    arguments = "" if facts.model else " --model FOLDER"
    arguments += f" --transformer {facts.transformer}" if facts.transformer else ""
    near, rounding = "to the eye, since it was drawn on a GPU or while training", "a few pixels off by 1 of 255"
    same = facts.device == "cpu"
    return _README.format(
        model=facts.model_name,
        loras=", ".join(f"{file} at strength {strength:g}" for file, strength in facts.loras),
        size=size + (f", guidance {request.guidance:g}" if variant.guidance_embedded else ""),
        license=f" The base model's licence holds for the LoRA too: {variant.license}." if variant.license else "",
        comfy=_comfy_part(facts),
        arguments=arguments,
        ours=f"yes; {rounding} if it was drawn in a batch, or on a machine of another kind" if same else near,
        on_cpu=f"yes; {rounding} for the same reasons" if same else near,
        comfy_row=_COMFY_ROW if facts.comfy_loras else "\nComfyUI cannot run this model, so there is no workflow.",
        notes="".join(f"\n- {note}" for note in facts.notes),
    ).rstrip() + "\n"  # fmt: skip


def _comfy_part(facts: Facts) -> str:
    if not facts.comfy_loras:
        return ""
    rows = [f"| `{file}` | `models/loras` | here |" for file, _ in facts.comfy_loras]
    for one in comfy.models_for(facts.variant, facts.transformer):
        rows.append(f"| `{one.file}` | `models/{one.folder}` | {one.url or 'yours'} |")
    max_shift, base_shift = ("1.15", "0.5") if facts.variant.shifted else ("0", "0")
    return _COMFY.format(
        since=comfy.SINCE, rows="\n".join(rows), steps=facts.request.steps, max_shift=max_shift, base_shift=base_shift
    )
