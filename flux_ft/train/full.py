"""The end of a full fine-tune: the LoRA taken out of it, and the proof of how much of it the LoRA holds.

    trained ─ predict, draw ─ extract ─→ LoRA files ──────────────────┐
                                base, put back into the same model ─ predict, draw ─ with the LoRA, read back ─ again

One model is in memory at a time: at the end the base's weights are read from its files into the one that was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from flux_ft import log
from flux_ft.adapters.attached import attach_states
from flux_ft.adapters.checkpoint_files import DTYPES, Checkpoint, Stored, from_stored
from flux_ft.adapters.extract import ExtractionReport, Options, extract
from flux_ft.adapters.formats import EXPORT_DTYPES, read_adapter
from flux_ft.adapters.jobs import open_model
from flux_ft.adapters.write_files import write_single_file
from flux_ft.config import RunConfig
from flux_ft.families import layout
from flux_ft.families.base import Family, Variant
from flux_ft.files import write_whole
from flux_ft.infer.grid import save_png
from flux_ft.infer.runner import release_memory
from flux_ft.train.card import ExtractionFacts
from flux_ft.train.preview import draw_previews
from flux_ft.train.prove import comparison_grid, predictions, proof_examples, prove, targets
from flux_ft.train.setup import TrainData, TrainState
from flux_ft.types import AdapterState

NOTABLE_SHARE = 0.02
"""Of the squared change: docs/full.md has what 5 % of it cost."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shown:
    """What a model predicts and draws."""

    predictions: list[Tensor]
    pictures: list[Image.Image]


def use_average(state: TrainState) -> None:
    """Put the averaged weights, if an average was kept, in the place of the last ones."""
    if state.average is None:
        return
    state.settle()
    with torch.no_grad():
        for name, parameter in state.trained.items():
            parameter.copy_(state.average.weights[name])
    log.say("what is exported is the average of the weights over the run")


def tuned_weights(state: TrainState) -> Checkpoint:
    """The model as trained, each weight as precisely as it is known; read when asked for."""
    state.settle()
    stored = []
    for name, parameter in state.bare.named_parameters():
        precise = name in state.trained and (state.average is not None or state.updates.is_precise(name))
        dtype = torch.float32 if precise else parameter.dtype
        stored.append(Stored(name, tuple(parameter.shape), _NAMES[dtype], partial(_precise, state, name, parameter)))
    return from_stored(stored, "the fine-tuned model")


def _precise(state: TrainState, name: str, parameter: Tensor) -> Tensor:
    if name not in state.trained:
        return parameter.detach()
    return state.updates.precise(name) if state.average is None else state.average.weights[name]


def extract_lora(state: TrainState, config: RunConfig) -> tuple[AdapterState, ExtractionReport]:
    """The LoRA of rank `lora_rank` that is nearest to what the run has changed. Raises AdapterError, ModelError."""
    base, _ = open_model(config.model)
    options = Options(rank=config.lora_rank, dtype=EXPORT_DTYPES[config.export.dtype], seed=config.seed)
    adapter, report = extract(base, tuned_weights(state), options, device=state.accelerator.device)
    for line in report.for_people().splitlines():
        log.say(line)
    if sum(report.left_out_shares.values()) > NOTABLE_SHARE:
        log.warn(
            "what no LoRA holds changes little in size and much in effect: `full.train: blocks` trains what it can hold"
        )
    return adapter, report


def keep_full(state: TrainState, config: RunConfig, variant: Variant) -> Path | None:
    """Write all weights as one file, if they are to be kept. Raises StorageError."""
    if not config.export.keep_full:
        return None
    path = config.output_dir / f"{config.slug}-full.safetensors"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": variant.architecture.removesuffix("/lora"),
        "modelspec.title": config.finetune_comment or config.slug,
        "modelspec.description": f"{variant.name}, fully fine-tuned for {state.step} steps.",
        "modelspec.license": variant.license,
        "modelspec.trigger_phrase": config.trigger_word,
    }
    size = write_single_file(
        tuned_weights(state),
        path,
        EXPORT_DTYPES[config.export.dtype],
        {key: text for key, text in metadata.items() if text},
    )
    log.say(f"wrote {path} (all weights, {size / 1e6:.1f} MB)")
    return path


def prove_extraction(
    state: TrainState,
    config: RunConfig,
    family: Family,
    data: TrainData,
    vae: nn.Module | None,
    report: ExtractionReport,
    loras: Mapping[str, Path],
) -> ExtractionFacts:
    """Compare base, LoRA and full model in what they predict and draw; write extraction.json and comparison.png.

    The LoRA is the first of the written files. Afterwards the model in `state` is the base with that LoRA.
    """
    full_weights = keep_full(state, config, family.variant)
    examples, held_out = proof_examples(data.examples, data.held_out)
    device = state.accelerator.device

    def show() -> Shown:
        found = predictions(family, state.bare, examples, config.seed, device)
        if data.preview is None or vae is None:
            return Shown(found, [])
        with log.progress("draw for comparison", len(data.preview.prompts)) as bar:
            pictures = []
            for picture in draw_previews(data.preview, family, state.bare, vae):
                pictures.append(picture)
                bar.advance()
        return Shown(found, pictures)

    full = show()
    put_back(state, open_model(config.model)[0])
    release_memory()
    base = show()
    file = next(iter(loras.values()))
    attach_states(state.bare, [("extracted", read_adapter(file), 1.0)], device)
    extracted = show()
    proof = prove(
        base.predictions, extracted.predictions, full.predictions, targets(examples, config.seed), held_out=held_out
    )
    for line in proof.for_people().splitlines():
        log.say(line)
    folder = config.output_dir
    if data.preview is not None and full.pictures:
        grid = comparison_grid(data.preview.prompts, base.pictures, extracted.pictures, full.pictures)
        save_png(grid, folder / "comparison.png")
    facts = {**report.as_json(), "proof": proof.as_json()}
    write_whole(folder / "extraction.json", json.dumps(facts, indent=2).encode())
    return ExtractionFacts(report, proof, full_weights, bool(full.pictures))


@torch.no_grad()
def put_back(state: TrainState, base: Checkpoint) -> None:
    """Read the base's weights from its files into the model, matrix by matrix."""
    state.settle()
    parameters = dict(state.bare.named_parameters())
    with log.progress("put the base back", len(base.weights)) as bar:
        for name, weight in base.weights.items():
            for path, values in layout.to_diffusers({name: weight.read().float()}).items():
                parameters[path].copy_(values)
            bar.advance()
