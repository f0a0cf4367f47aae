"""Noise to pictures: an Euler walk along the predicted velocity.

Shapes in names: B batch, C latent channels, H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.families.base import Family
from flux_ft.types import TextCond


def initial_noise(shape_CHW: tuple[int, int, int], seeds: list[int]) -> Tensor:
    """One noise a seed (B, C, H, W), drawn on the CPU: the one that the diffusers pipeline draws for that seed."""
    return torch.cat(
        [
            torch.randn((1, *shape_CHW), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            for seed in seeds
        ]
    )


@torch.no_grad()
def sample_latents(
    family: Family,
    denoiser: nn.Module,
    noise_BCHW: Tensor,
    text: TextCond,
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Walk from noise (sigma 1) to latents (sigma 0) in `steps` Euler steps; latents stay float32 between steps."""
    weight = next(denoiser.parameters())
    z = noise_BCHW.to(weight.device)
    sigmas = flow.sampling_sigmas(steps, family.shift_mu(z.shape[2], z.shape[3]))
    text = TextCond(text.embeds_BLD.to(weight.device, weight.dtype), text.pooled_BP.to(weight.device, weight.dtype))
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        sigma_B = torch.full((len(z),), sigma, device=z.device)
        velocity = family.predict_velocity(denoiser, z.to(weight.dtype), sigma_B, text, guidance)
        z = z + (next_sigma - sigma) * velocity.float()
        on_step()
    return z
