"""A checkpoint is read as the LoRA that the run would have exported then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_ft.adapters import lora
from flux_ft.adapters.from_checkpoint import read_checkpoint, read_lora
from flux_ft.errors import AdapterError
from flux_ft.families.base import Family
from flux_ft.train.checkpoint import About, State, save
from flux_ft.types import AdapterState

ALPHA = 6.0


@pytest.fixture(scope="module")
def trained(tiny_family: Family) -> tuple[AdapterState, dict[str, torch.Tensor]]:
    """A LoRA on flux-tiny as training has it: as it would be exported, and its factors by name."""
    denoiser = tiny_family.load_denoiser(torch.device("cpu"), torch.float32)
    parameters = lora.attach_new(denoiser, tiny_family.lora_targets(denoiser), 4, ALPHA, 0.0, 1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    factors = {name: one.detach().clone() for name, one in denoiser.named_parameters() if one.requires_grad}
    return lora.read_trained(denoiser), factors


def saved(
    folder: Path, weights: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None = None, **more: Any
) -> Path:
    settings = {
        "finetune_type": "lora", "model": "flux-tiny", "lora.alpha": ALPHA,
        "optim.ema_decay": None if average is None else 0.9, **more,
    }  # fmt: skip
    state = {"updates": {}} | ({} if average is None else {"average": average})
    return save(folder, About(100, settings), State(weights, state), 2)


def assert_same(found: AdapterState, wanted: AdapterState) -> None:
    assert (found.layout, found.layers.keys()) == (wanted.layout, wanted.layers.keys())
    for path, layer in wanted.layers.items():
        assert torch.equal(found.layers[path].down_RI, layer.down_RI)
        assert torch.equal(found.layers[path].up_OR, layer.up_OR)
        assert found.layers[path].alpha == layer.alpha


def test_it_is_the_lora_that_training_has(tmp_path: Path, trained: Any) -> None:
    state, factors = trained
    found = read_lora(saved(tmp_path, factors))
    assert_same(found, state)
    assert found.metadata["modelspec.architecture"] == "flux-tiny/lora"
    plain = read_checkpoint(saved(tmp_path, factors, **{"lora.alpha": None}))
    assert {layer.alpha for layer in plain.layers.values()} == {4.0}


def test_of_a_run_that_averages_it_is_the_average(tmp_path: Path, trained: Any) -> None:
    state, factors = trained
    now = {name: tensor + 1 for name, tensor in factors.items()}
    assert_same(read_checkpoint(saved(tmp_path, now, factors)), state)


def test_what_is_altered_cut_or_no_lora_is_refused(tmp_path: Path, trained: Any) -> None:
    _, factors = trained
    a, b = list(factors)[:2]
    cases = [
        ("full fine-tune", saved(tmp_path / "full", factors, finetune_type="full")),
        ("no factor of a LoRA", saved(tmp_path / "foreign", {"proj_out.weight": factors[a]})),
        ("are no pair", saved(tmp_path / "half", {a: factors[a]})),
        ("are no pair", saved(tmp_path / "shape", {a: factors[a], b: factors[b].T.contiguous()})),
        ("no average", saved(tmp_path / "average", factors, **{"optim.ema_decay": 0.9})),
        ("unreadable", saved(tmp_path / "alpha", factors, **{"lora.alpha": "6"})),
        ("unreadable", tmp_path),
    ]
    for name, action in (("weights.safetensors", Path.unlink), ("manifest.json", Path.unlink)):
        cases.append(("cannot be read|unreadable", saved(tmp_path / name, factors)))
        action(cases[-1][1] / name)
    cases.append(("weights.safetensors was altered", saved(tmp_path / "bytes", factors)))
    file = cases[-1][1] / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    cases.append(("unreadable", saved(tmp_path / "manifest", factors)))
    manifest = cases[-1][1] / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"files": {}}))
    for words, folder in cases:
        with pytest.raises(AdapterError, match=words) as caught:
            read_checkpoint(folder)
        assert caught.value.hint
        assert str(folder) in caught.value.message
