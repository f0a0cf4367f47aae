"""What a finished run shows to people: a plot of the loss and a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from flux_ft.adapters.extract import ExtractionReport
from flux_ft.config import RunConfig
from flux_ft.families.base import Variant
from flux_ft.families.registry import VARIANTS
from flux_ft.files import write_whole
from flux_ft.train.prove import MODELS, Proof
from flux_ft.train.setup import TrainData


@dataclass(frozen=True)
class ExtractionFacts:
    """What a full fine-tune leaves besides its LoRA files."""

    report: ExtractionReport
    proof: Proof
    full_weights: Path | None
    """All weights in one file, if they were kept."""
    has_comparison: bool
    """Whether comparison.png was drawn."""


def plot_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss (raw and smoothed) and validation loss where measured, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validated = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*trained, strict=True), color="#b8c4d6", linewidth=0.8, label="loss of each step")
    smooth = smoothed([loss for _, loss in trained])
    axes.plot([step for step, _ in trained], smooth, color="#1f4e9c", label="smoothed")
    if validated:
        axes.plot(*zip(*validated, strict=True), color="#c2410c", marker="o", markersize=3, label="held-out pictures")
    axes.set(xlabel="step", ylabel="mean squared velocity error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_whole(path, buffer.getvalue())


def smoothed(values: Sequence[float], keep: float = 0.97) -> list[float]:
    """Exponential mean without the start's bias (Kingma & Ba 2015, section 3, applied to a curve)."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def model_card(
    config: RunConfig,
    variant: Variant,
    data: TrainData,
    loras: Mapping[str, Path],
    steps: int,
    loss: float,
    has_previews: bool,
    extraction: ExtractionFacts | None = None,
    optimizer: str | None = None,
) -> str:
    """The run folder's README.md, with the front matter that the Hub reads.

    `extraction` is given for full fine-tunes. `optimizer` is the one in use, where the run file leaves it to us.
    """
    is_on_hub = variant.name == variant.source or (variant.name in VARIANTS and "/" in variant.source)
    base = variant.source if is_on_hub else variant.name
    front = ["---", "library_name: diffusers", "tags: [flux, lora, text-to-image, flux_ft]"]
    if is_on_hub:
        front.append(f"base_model: {base}")
    if config.trigger_word:
        front.append(f"instance_prompt: {quoted(config.trigger_word)}")
    title = config.finetune_comment or config.slug
    held_out = f", {data.held_out.pictures} more held out" if data.held_out else ""
    how = f", fully fine-tuned, then extracted at {_rank(extraction.report)}:" if extraction else ","
    lines = [*front, "---", "", f"# {title}", ""]
    lines.append(f"A LoRA for {base}{how} trained on {data.examples.pictures} pictures{held_out} for {steps} steps.")
    if config.trigger_word:
        lines += ["", f"Trigger word: `{config.trigger_word}`"]
    lines += _pictures(has_previews, extraction)
    if extraction:
        lines += _nearness(extraction)
    lines += ["", "## Files", "", "| file | for |", "|---|---|"]
    builtin = variant.source.startswith("builtin:")
    uses = {
        "diffusers": "diffusers, and tools that read PEFT keys",
        "kohya": "ComfyUI, Forge, InvokeAI, sd-scripts" if not builtin else "kohya keys; other tools know FLUX.1 alone",
    }
    lines += [f"| `{path.name}` | {uses[name]} |" for name, path in loras.items()]
    full_weights = extraction.full_weights if extraction else None
    if full_weights:
        use = "`models/diffusion_models` of ComfyUI; diffusers as below" if not builtin else "flux_ft as below"
        lines.append(f"| `{full_weights.name}` | all weights of the fine-tuned transformer: {use} |")
    lines += ["", "## Use", "", "```python", *_snippet(config, variant, base, loras), "```"]
    if full_weights:
        lines += ["", "All weights, with no LoRA:", ""]
        lines += ["```python", *_full_snippet(config, variant, base, full_weights), "```"]
    lines += ["", "## Training", "", "![loss](loss.png)", "", "| setting | value |", "|---|---|"]
    rate = f"{config.resolved_learning_rate:g}, {config.schedule.name}"
    settings = {
        "rank": config.lora_rank, "steps": steps, "learning rate": rate, "optimizer": optimizer or config.optim.name,
        "batch": config.optim.batch_size * config.optim.accumulate, "seed": config.seed,
        "loss, last tenth": f"{loss:.4f}", "licence of the base": variant.license or "see its page",
    }  # fmt: skip
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    lines += ["", "Every setting is in `run.yaml`; what became of each picture is in `report.html`.", ""]
    return "\n".join(lines)


def _rank(report: ExtractionReport) -> str:
    if isinstance(report.options.rank, int):
        return f"rank {report.options.rank}"
    ranks = [layer.rank for layer in report.layers if layer.rank]
    return f"rank {min(ranks)} to {max(ranks)}" if ranks else "rank 0"


def _pictures(has_previews: bool, extraction: ExtractionFacts | None) -> list[str]:
    lines = []
    if has_previews:
        drawn = ", by the full model" if extraction else ""
        lines += ["", f"Same prompts and seeds, before training (base) and along it{drawn}:", ""]
        lines.append("![previews](previews.png)")
    if extraction and extraction.has_comparison:
        lines += ["", "Same prompts and seeds by the base, by the base with the LoRA, and by the full model:", ""]
        lines.append("![base, LoRA and full model](comparison.png)")
    return ["", "## Pictures", *lines] if lines else []


def _nearness(extraction: ExtractionFacts) -> list[str]:
    """How much of the full fine-tune the LoRA holds: in predictions, and in weights."""
    proof, report = extraction.proof, extraction.report
    if proof.held_out:
        measured = f"Measured on {proof.examples} examples that were held out:"
    else:
        measured = (
            f"Measured on {proof.examples} training examples, with noise that training never saw, since nothing was "
            "held out:"
        )
    base, lora, full = (f"{proof.loss[name]:.4f}" for name in MODELS)
    off = f"{100 * proof.relative_error:.1f} %" if math.isfinite(proof.relative_error) else "–"
    lines = ["", "## LoRA and full model", "", measured, ""]
    lines += ["| | base | LoRA | full model |", "|---|---|---|---|"]
    lines.append(f"| loss | {base} | {lora} | {full} |")
    lines.append(f"| off the full model's predictions, in parts of what training changed | 100 % | {off} | 0 % |")
    noise = f" ({100 * report.noise_share:.1f} % of it is rounding noise)" if report.noise_share >= 5e-4 else ""
    kept = (
        f"Of the squared change of all matrices in the blocks{noise}, the LoRA keeps {100 * report.energy_kept:.1f} %."
    )
    shares = report.left_out_shares
    if shares:
        kinds = ", ".join(f"{kind} {100 * share:.2g} %" for kind, share in shares.items())
        kept += f" No LoRA holds {100 * math.fsum(shares.values()):.2g} % of the model's whole change: {kinds}."
    lines += ["", kept, "", "Each layer's figures are in `extraction.json`."]
    return lines


def quoted(text: str) -> str:
    """A YAML string that no reader takes for something else."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _snippet(config: RunConfig, variant: Variant, base: str, loras: Mapping[str, Path]) -> list[str]:
    file = next(iter(loras.values())).name
    prompt = quoted(f"a photo of {config.trigger_word}" if config.trigger_word else "…")
    if variant.source.startswith("builtin:"):
        return [
            "from flux_ft import Runner, TextToImage",
            "",
            f'runner = Runner("{variant.name}", ["{file}"])',
            f"runner.draw([TextToImage(prompt={prompt})])[0].show()",
        ]
    return [
        "import torch",
        "from diffusers import FluxPipeline",
        "",
        f'pipe = FluxPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f'pipe.load_lora_weights("{file}")',
        f"pipe({prompt}, guidance_scale={variant.default_guidance}).images[0]",
    ]


def _full_snippet(config: RunConfig, variant: Variant, base: str, file: Path) -> list[str]:
    prompt = quoted(f"a photo of {config.trigger_word}" if config.trigger_word else "…")
    if variant.source.startswith("builtin:"):
        return [
            "from flux_ft import Runner, TextToImage",
            "",
            f'runner = Runner("{file.name}", parts="{variant.name}")',
            f"runner.draw([TextToImage(prompt={prompt})])[0].show()",
        ]
    return [
        "import torch",
        "from diffusers import FluxPipeline, FluxTransformer2DModel",
        "",
        "transformer = FluxTransformer2DModel.from_single_file(",
        f'    "{file.name}", config="{base}", subfolder="transformer", torch_dtype=torch.bfloat16',
        ")",
        "pipe = FluxPipeline.from_pretrained(",
        f'    "{base}", transformer=transformer, torch_dtype=torch.bfloat16',
        ').to("cuda")',
        f"pipe({prompt}, guidance_scale={variant.default_guidance}).images[0]",
    ]
