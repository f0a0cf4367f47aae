"""FLUX.1 with random weights, at full size or narrow: no download, the real loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flux_ft.bench.infer import RandomFlux1
from flux_ft.config import RunConfig
from flux_ft.families.registry import FLUX1_DEV
from flux_ft.train.loop import StepResult, step_batches, training_step
from flux_ft.train.setup import TrainState, make_accelerator, prepare_model
from flux_ft.types import Bucket, CachedExample, TextCond

NARROW = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
          "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6)}  # fmt: skip


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
        batches = step_batches(config, [example], [0], state.step)
        results.append(training_step(state, family, config, iter([batches])))
        state.step += 1
    return results, state
