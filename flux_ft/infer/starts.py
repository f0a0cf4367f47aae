"""Where each drawing starts, and what the model is shown beside the words, for each way of drawing.

A start draws what it needs from the generator in the order in which the diffusers pipeline of that task does, so that
one seed gives the same picture in both.

Shapes in names: B batch, C latent channels, H W latent grid; pixels are (1, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux_ft.families.base import Family
from flux_ft.infer.sampler import draw_noise
from flux_ft.types import ImageCond

Way = Literal["text", "image", "redux", "control", "fill", "blend", "reference"]
"""From noise alone; from a noised picture; from noise, with a picture's tokens among the words; beside a control
picture; beside a picture with a hole; from noise, what is outside the mask put back after each step; beside a picture's
tokens."""


@dataclass(frozen=True)
class Keep:
    """What `blend` puts back: latents outside the mask, noised alike."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    mask_B1HW: Tensor
    """1 where the picture is drawn anew."""

    def __call__(self, z_BCHW: Tensor, sigma: float) -> Tensor:
        kept = noised(self.latents_BCHW, self.noise_BCHW, sigma)
        return (1 - self.mask_B1HW) * kept + self.mask_B1HW * z_BCHW


@dataclass(frozen=True)
class Start:
    """One picture before its first step."""

    z_BCHW: Tensor
    image: ImageCond | None = None
    keep: Keep | None = None


def start(
    way: Way,
    family: Family,
    vae: nn.Module,
    pictures: Mapping[str, Tensor],
    shape_CHW: tuple[int, int, int],
    generator: torch.Generator,
    sigma: float,
) -> Start:
    """One picture's start at `sigma`, the first of its schedule; `pictures` are pixels and masks by field."""
    device = next(vae.parameters()).device

    def noise() -> Tensor:
        return draw_noise(shape_CHW, generator).to(device)

    if way in ("text", "redux"):
        return Start(noise())
    if way == "control":
        # Contiguous, as the pipeline has it here alone: the autoencoder's convolutions sum in an order of their own.
        control = family.sample_image(vae, pictures["control"].contiguous(), generator)
        return Start(noise(), ImageCond(channels_BCHW=control))
    if way == "reference":
        return Start(noise(), ImageCond(reference_BCHW=family.sample_image(vae, pictures["image"], None)))
    latents = family.sample_image(vae, pictures["image"], generator)
    drawn = noise()
    z = noised(latents, drawn, sigma)
    if way == "image":
        return Start(z)
    mask_11HW = pictures["mask"].to(device)
    if way == "blend":
        mask = F.interpolate(mask_11HW, size=latents.shape[2:])
        return Start(z, keep=Keep(latents, drawn, mask))
    hollow = family.sample_image(vae, pictures["image"] * (1 - pictures["mask"]), generator)
    return Start(z, ImageCond(channels_BCHW=torch.cat([hollow, folded(mask_11HW, family.vae_scale)], dim=1)))


def noised(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma: float) -> Tensor:
    """Latents on their way to noise: sigma · noise + (1 - sigma) · latents."""
    return sigma * noise_BCHW + (1 - sigma) * latents_BCHW


def folded(mask_B1HW: Tensor, scale: int) -> Tensor:
    """A mask of pixels at the latent grid (B, scale², H / scale, W / scale), a channel for each pixel of a latent."""
    return F.pixel_unshuffle(mask_B1HW, scale)


def joined(starts: Sequence[Start]) -> Start:
    """One batch of several starts of one way and size."""
    images = [one.image for one in starts if one.image is not None]
    keeps = [one.keep for one in starts if one.keep is not None]

    def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    image = ImageCond(stacked([one.channels_BCHW for one in images]), stacked([one.reference_BCHW for one in images]))
    keep = None
    if keeps:
        keep = Keep(
            torch.cat([one.latents_BCHW for one in keeps]),
            torch.cat([one.noise_BCHW for one in keeps]),
            torch.cat([one.mask_B1HW for one in keeps]),
        )
    return Start(torch.cat([one.z_BCHW for one in starts]), image if images else None, keep)


def tail(sigmas: Tensor, strength: float) -> Tensor:
    """The last part of a schedule, for a drawing that starts from a picture: all of it at `strength` 1, none at 0.

    Cut where the diffusers image-to-image pipeline cuts it.
    """
    steps = len(sigmas) - 1
    return sigmas[int(max(steps - min(steps * strength, steps), 0)) :]
