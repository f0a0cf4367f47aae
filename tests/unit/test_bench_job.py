"""The job bench: a real `flux-ft train` on a small model in a folder, from its start to its LoRA; and again."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from flux_ft.bench import job
from flux_ft.bench.job import FULL, SMALL, bench_job, summary_for_people, write_model
from flux_ft.errors import ConfigError, FluxFTError


def test_times_of_a_run(tmp_path: Path) -> None:
    output = tmp_path / "out"
    figures = bench_job(output=output, iterations=3, pictures=2, settings=["checkpoint.every=null"])
    assert json.loads((output / "job.json").read_text()) == figures
    parts = [figures[name] for name in ("first_step_s", "steps_s", "export_s")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(figures["total_s"])
    assert 0 < figures["step_s"] < figures["total_s"]
    assert len(list((output / "cold").glob("*.safetensors"))) == 2
    assert not list((output / "again").glob("*.safetensors"))  # it is ended at its first step
    assert not list(output.glob("model-*"))
    assert "2 pictures" in summary_for_people(figures)
    assert "LoRA rank 32 on 52 linears" in (output / "cold.log").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="holds something already"):
        bench_job(output=output)


def test_a_run_that_fails_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(FluxFTError, match=r"ended with code 2: error: .* matches none of the") as failed:
        bench_job(output=tmp_path / "a", pictures=1, settings=["lora.targets=['.*nothing.*']"])
    assert "cold.log" in str(failed.value.hint)
    with pytest.raises(ConfigError, match="learning_rates"):
        bench_job(output=tmp_path / "b", pictures=1, settings=["learning_rates=1"])
    assert not (tmp_path / "b").exists()


def test_full_size_wants_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA card"):
        bench_job(True, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []

    def weigh(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Mock:
        sizes.append(sum(one.numel() for one in model.parameters()) / 1e9)
        return Mock()

    monkeypatch.setattr(job, "noise", weigh)
    write_model(tmp_path, FULL)
    # Published: 11.90, 0.084, 0.123 and 4.762 billion; the encoders' tables of 49,408 and 32,128 words are small here.
    assert sizes == pytest.approx([11.90, 0.084, 0.123 - 49_408 * 768e-9, 4.762 - 32_128 * 4096e-9], rel=0.01)


def test_the_small_model_is_a_whole_one(tmp_path: Path) -> None:
    write_model(tmp_path, SMALL)
    pipe = FluxPipeline.from_pretrained(tmp_path)
    assert pipe.transformer.config.num_attention_heads == 4
    assert pipe.vae.config.latent_channels == 16
    assert pipe("a cloud", height=64, width=64, num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)
