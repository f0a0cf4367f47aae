"""Noise to pictures: an Euler walk along the predicted velocity.

Shapes in names: B batch, C latent channels, H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from flux_ft import flow
from flux_ft.families.base import Family
from flux_ft.types import ImageCond, TextCond

Predict = Callable[[Tensor, float], Tensor]
"""(z_BCHW, sigma) to velocity_BCHW."""


def initial_noise(shape_CHW: tuple[int, int, int], seeds: list[int]) -> Tensor:
    """One noise a seed (B, C, H, W), drawn on the CPU: the one that the diffusers pipeline draws for that seed."""
    return torch.cat([draw_noise(shape_CHW, torch.Generator().manual_seed(seed)) for seed in seeds])


def draw_noise(shape_CHW: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Noise for one picture (1, C, H, W), float32 on the CPU."""
    return flow.draw_noise((1, *shape_CHW), generator)


@torch.no_grad()
def walk(
    z_BCHW: Tensor,
    sigmas: Tensor,
    predict: Predict,
    after_step: Callable[[Tensor, float], Tensor] = lambda z, sigma: z,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Euler steps from the first of `sigmas` to the last; latents stay float32 between steps.

    `after_step` may replace what each step arrives at, (z, sigma) to z.
    """
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        z_BCHW = z_BCHW + (next_sigma - sigma) * predict(z_BCHW, sigma).float()
        z_BCHW = after_step(z_BCHW, next_sigma)
        on_step()
    return z_BCHW


def predictor(
    family: Family,
    denoiser: nn.Module,
    text: TextCond,
    guidance: float,
    image: ImageCond | None = None,
    negative: TextCond | None = None,
    true_cfg: float = 1.0,
) -> Predict:
    """The model's velocity for these conditions; with `negative`, classifier-free guidance by `true_cfg`.

    v = v_negative + true_cfg · (v - v_negative): Ho and Salimans 2022 (arXiv 2207.12598), as diffusers writes it.
    """
    weight = next(denoiser.parameters())
    # Of one that is held in few bits or streamed, the parameters tell neither.
    dtype = getattr(denoiser, "compute_dtype", weight.dtype)
    device = getattr(denoiser, "compute_device", weight.device)

    def to_model(cond: TextCond) -> TextCond:
        return TextCond(cond.embeds_BLD.to(device, dtype), cond.pooled_BP.to(device, dtype))

    text = to_model(text)
    negative = to_model(negative) if negative is not None and true_cfg != 1 else None

    def predict(z_BCHW: Tensor, sigma: float) -> Tensor:
        z = z_BCHW.to(device, dtype)
        # A thousand times and back, as the diffusers pipelines hand it on: the last bit may differ from sigma's.
        sigma_B = torch.full((len(z),), sigma, device=z.device) * 1000 / 1000
        velocity = family.predict_velocity(denoiser, z, sigma_B, text, guidance, image)
        if negative is not None:
            away = family.predict_velocity(denoiser, z, sigma_B, negative, guidance, image)
            velocity = away + true_cfg * (velocity - away)
        return velocity

    return predict


def sample_latents(
    family: Family,
    denoiser: nn.Module,
    noise_BCHW: Tensor,
    text: TextCond,
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Walk from noise (sigma 1) to latents (sigma 0) in `steps` Euler steps."""
    sigmas = flow.sampling_sigmas(steps, family.shift_mu(noise_BCHW.shape[2], noise_BCHW.shape[3]))
    z_BCHW = noise_BCHW.to(getattr(denoiser, "compute_device", next(denoiser.parameters()).device))
    return walk(z_BCHW, sigmas, predictor(family, denoiser, text, guidance), on_step=on_step)


class VectorsByRow(TorchFunctionMode):
    """Within, linears take vectors (B, I) one at a time.

    A matrix product of one row is summed in another order than one of several, and that alone lets the members of a
    batch into each other's last bits: on the CPU all else that FLUX computes is the same for any batch.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear and args[0].ndim == 2 and len(args[0]) > 1:
            return torch.cat([func(row, *args[1:], **kwargs) for row in args[0].split(1)])
        return func(*args, **kwargs)
