"""FLUX.1 with random weights, at full size or narrow: no download, the real loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from flux_ft.config import RunConfig
from flux_ft.families.flux1 import Flux1
from flux_ft.families.registry import FLUX1_DEV
from flux_ft.train.loop import StepResult, training_step
from flux_ft.train.setup import TrainState, make_accelerator, prepare_model
from flux_ft.types import Bucket, CachedExample, TextCond

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


FULL_SIZE = RandomFlux1(FLUX1_DEV, "random", "random")
SMALL = RandomFlux1(FLUX1_DEV, "random", "random", tuple(NARROW.items()))


def run_steps(
    family: RandomFlux1, side_px: int, steps: int, folder: Path, settings: Mapping[str, Any]
) -> tuple[list[StepResult], TrainState]:
    """Train for `steps` on one random cached example of side_px × side_px."""
    config = RunConfig.model_validate({"data": str(folder), "output": str(folder), "iterations": steps, **settings})
    accelerator = make_accelerator(config, folder)
    state = prepare_model(config, family, accelerator)
    shape = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | dict(family.shape)
    tokens = 512 if family is FULL_SIZE else 8
    generator = torch.Generator().manual_seed(1)
    cond = TextCond(
        torch.randn(1, tokens, shape["joint_attention_dim"], generator=generator),
        torch.randn(1, shape["pooled_projection_dim"], generator=generator),
    )
    latent = torch.randn(family.latent_shape(side_px, side_px), generator=generator)
    example = CachedExample("random", Bucket(side_px, side_px), latent, None, (cond,))
    results = []
    for _ in range(steps):
        results.append(training_step(state, family, config, [example], [0]))
        state.step += 1
    return results, state
