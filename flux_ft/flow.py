"""Flow matching as pure functions: what is noised, what is predicted, and when.

Conventions: `sigma` in [0, 1], 1 is pure noise. z = (1 - sigma)·x0 + sigma·noise; velocity = noise - x0.
Randomness is an argument everywhere, keyed by (seed, step, slot) and never by history, so that a resumed run, a
different batch split or a different number of workers sees the same noise.

Shapes in names: B batch, C channels, H W latent grid.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` alone. CPU: one key gives one noise on every device."""
    return torch.Generator().manual_seed(key_seed(seed, *key))


def key_seed(seed: int, *key: int | str) -> int:
    """63 bits that depend on `seed` and `key` alone."""
    digest = blake2b("/".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal float32 of `shape`, on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def draw_sigma(generator: torch.Generator, mu: float) -> Tensor:
    """One training sigma (scalar float32): logit-normal, then shifted for the resolution by `mu`.

    Logit-normal timesteps: Esser et al. 2024 (arXiv 2403.03206), section 3.1; shift: section 5.3.2.
    """
    return shift_sigma(torch.sigmoid(torch.randn((), generator=generator)), mu)


def shift_sigma(sigma: Tensor, mu: float) -> Tensor:
    """Move sigmas towards noise as inference does: e^mu / (e^mu + 1/sigma - 1). Identity at mu = 0."""
    scale = math.exp(mu)
    return scale * sigma / (scale * sigma + (1 - sigma))


def resolution_mu(tokens: int, base: tuple[int, float] = (256, 0.5), top: tuple[int, float] = (4096, 1.15)) -> float:
    """FLUX.1's shift for `tokens` image tokens: a line through two (tokens, mu) points (BFL flux, sampling.py)."""
    slope = (top[1] - base[1]) / (top[0] - base[0])
    return base[1] + slope * (tokens - base[0])


def sampling_sigmas(steps: int, mu: float) -> Tensor:
    """The `steps + 1` sigmas of an Euler sampler, float32, from 1 down to 0, shifted by `mu`.

    Before the shift they fall evenly from 1 to 1/steps, then end at 0. Rounded as the diffusers FLUX pipelines do, so
    that the numbers are theirs to the bit.
    """
    sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if mu != 0:
        sigmas = np.asarray(math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1)), np.float32)
    return torch.cat([torch.from_numpy(sigmas), torch.zeros(1)])


def interpolate(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The noised latents z at each example's sigma."""
    sigma_B111 = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma_B111) * x0_BCHW + sigma_B111 * noise_BCHW


def velocity_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity that carries x0 to noise."""
    return noise_BCHW - x0_BCHW


def velocity_loss(predicted_BCHW: Tensor, target_BCHW: Tensor, weight_BHW: Tensor | None = None) -> Tensor:
    """Mean squared velocity error, one float32 value per example (B,); `weight_BHW` weights the places of the grid."""
    error_BCHW = (predicted_BCHW.float() - target_BCHW.float()).square()
    if weight_BHW is not None:
        error_BCHW = error_BCHW * weight_BHW[:, None]
    return error_BCHW.flatten(1).mean(1)


def mask_weights(mask_HW: Tensor, unmasked_weight: float) -> Tensor:
    """Weights of the loss from a mask of 0 to 1, float32 (H, W): 1 where it is white, `unmasked_weight` where black.

    Then scaled to a mean of 1, so that a small mask does not make a small loss. The mask is not black everywhere.
    """
    weight_HW = unmasked_weight + (1 - unmasked_weight) * mask_HW.double()
    return (weight_HW / weight_HW.mean()).float()
