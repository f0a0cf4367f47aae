"""LoRA training at FLUX.1-dev's full size with random weights: no download, the real loop, time and peak memory.

`pytest tests/gpu -s` on a machine with a CUDA card of 40 GB or more prints the figures. Without one, the same code
runs on the CPU with a few narrow blocks, so that it cannot rot.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from flux_ft.config import RunConfig
from flux_ft.families.flux1 import Flux1
from flux_ft.families.registry import FLUX1_DEV
from flux_ft.train.loop import StepResult, training_step
from flux_ft.train.setup import make_accelerator, prepare_model
from flux_ft.types import Bucket, CachedExample, TextCond

FULL_SIZE_BYTES = 40e9
NARROW = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
          "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RandomFlux1(Flux1):
    """FLUX.1-dev's transformer filled with noise on the device itself; `shape` overrides its configuration."""

    shape: tuple[tuple[str, object], ...] = ()

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            denoiser = FluxTransformer2DModel(guidance_embeds=True, **dict(self.shape))
        denoiser = denoiser.to(dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        for name, parameter in denoiser.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return denoiser.eval().requires_grad_(False)


def run_steps(family: RandomFlux1, side_px: int, steps: int, text: tuple[int, int, int], tmp: Path) -> list[StepResult]:
    """Train for `steps` on one random cached example; `text` = (tokens, width, pooled width)."""
    config = RunConfig.model_validate(
        {"data": str(tmp), "output": str(tmp), "finetune_type": "lora", "lora_rank": 16, "iterations": steps}
    )
    accelerator = make_accelerator(config, tmp)
    state = prepare_model(config, family, accelerator)
    generator = torch.Generator().manual_seed(1)
    cond = TextCond(torch.randn(1, *text[:2], generator=generator), torch.randn(1, text[2], generator=generator))
    latent = torch.randn(family.latent_shape(side_px, side_px), generator=generator)
    example = CachedExample("random", Bucket(side_px, side_px), latent, None, (cond,))
    results = []
    for _ in range(steps):
        results.append(training_step(state, family, config, [example], [0]))
        state.step += 1
    return results


def test_the_loop_runs_with_random_weights(tmp_path: Path) -> None:
    family = RandomFlux1(FLUX1_DEV, "random", "random", tuple(NARROW.items()))
    results = run_steps(family, 64, 3, (8, 32, 24), tmp_path)
    assert [result.step for result in results] == [1, 2, 3]
    assert all(result.grad_norm > 0 for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("side_px", [512, 1024])
def test_fifty_steps_at_full_size(tmp_path: Path, side_px: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < FULL_SIZE_BYTES:
        pytest.skip("needs a CUDA card of 40 GB or more")
    torch.cuda.reset_peak_memory_stats()
    results = run_steps(RandomFlux1(FLUX1_DEV, "random", "random"), side_px, 50, (512, 4096, 768), tmp_path)
    seconds = [result.seconds for result in results[5:]]
    figures = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "side_px": side_px, "batch": 1, "rank": 16,
        "step_s_median": round(statistics.median(seconds), 4), "step_s_max": round(max(seconds), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "recompute": True,
    }  # fmt: skip
    print(json.dumps(figures))
    assert all(result.grad_norm > 0 for result in results)
    torch.cuda.empty_cache()
