"""Ultra: four times the area that a model draws. A picture of native size is enlarged, noised, and refined in tiles.

What must not happen is that a tile of bare ground draws the prompt's object once more. Two things prevent it: the walk
begins in the last part of the schedule, and every prediction is held to the coarse part of the enlarged picture's
latents (as ILVR does, Choi et al. 2021, arXiv 2108.02938, here in the predicted x0), so that a tile may add what the
native size could not show and nothing larger. The hold also gives all tiles one tone.

Measured on flux-tiny, 64 scenes, by the sigma that refining begins at: of how many the scene reader reads the picture,
halved, as it reads the native one, and of how many there is one connected figure (in 60 of the plain enlargements):

    sigma             0.3  0.4  0.5  0.6  0.7  0.8
    held: same scene   63   63   63   62   62   62
          one figure   62   61   63   63   61   53
    free: same scene   61   54   31    6    1    1
          one figure   62   55   18    2    0    0

Edges come out half as steep again as in the plain enlargement (0.27 of the contrast a pixel, against 0.17; a render at
this size has 0.67), which is what the autoencoder does by itself: a model of flat shapes has no detail to add.

Shapes in names: B batch, C latent channels, H W pixels or latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from flux_ft import flow
from flux_ft.data.buckets import bucket_for
from flux_ft.families.base import Family, Variant
from flux_ft.infer.sampler import Predict, draw_noise, walk
from flux_ft.infer.tiles import decode, encode, tile_count, tiled_predict

SCALE = 2
"""Final side over native side."""
START = 0.3
"""The last share of the schedule, before its shift, that refining walks: sigma 0.57 at FLUX.1's own size, 0.41 at
flux-tiny's. For full-size models this is where people start image-to-image upscaling, not something measured here."""
HOLD_CELLS = 1.0
"""Standard deviation of the blur that says what is coarse, in latent cells of the large grid. Periods below four cells,
which the native picture had no room for, are left to the model."""


def native_size(ratio: float, variant: Variant) -> tuple[int, int]:
    """(width, height) in pixels that is drawn first for width / height = `ratio`; the final picture is twice that.

    The largest size of about this aspect on the model's grid, within the area that the model was made for.
    """
    long = 4096 * variant.pixel_multiple
    bucket = bucket_for(round(long * ratio), long, variant.max_pixels, variant.pixel_multiple)
    return bucket.width_px, bucket.height_px


def refine_steps(steps: int) -> int:
    """How many steps refining takes where drawing from noise takes `steps`: as dense as those."""
    return math.ceil(START * steps)


def refine_passes(family: Family, width_px: int, height_px: int, steps: int) -> int:
    """How often `refine` calls the model for a native picture of this size; drawing that takes `steps` more."""
    _, height, width = family.latent_shape(width_px, height_px)
    return refine_steps(steps) * tile_count(SCALE * height, SCALE * width, (height, width))


def refine_sigmas(sigma_start: float, steps: int, mu: float) -> Tensor:
    """`steps + 1` sigmas from `sigma_start` down to 0, evenly spaced before the shift by `mu`."""
    start = float(flow.shift_sigma(torch.tensor(sigma_start, dtype=torch.float64), -mu))
    return torch.cat([flow.shift_sigma(torch.linspace(start, start / steps, steps), mu), torch.zeros(1)])


def enlarge(pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] at twice the size, bicubic, float32."""
    return interpolate(pixels_B3HW.float(), scale_factor=SCALE, mode="bicubic").clamp(-1, 1)


def refine(
    family: Family,
    vae: nn.Module,
    predict: Predict,
    native_B3HW: Tensor,
    seeds: Sequence[int],
    steps: int,
    sigma_start: float | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> Tensor:
    """Pictures of native size, pixels in [-1, 1], to pictures of twice the sides, (B, 3, 2·H, 2·W) in [-1, 1].

    `predict` is the model's velocity for the pictures' own prompts; it sees tiles of the native size, so as many tokens
    as it knows. `steps` are those of a whole drawing; `sigma_start` replaces what `START` means at this size.
    `on_pass` is called after each of `refine_passes`.
    """
    tile_HW = family.latent_shape(native_B3HW.shape[3], native_B3HW.shape[2])[1:]
    x0_BCHW = encode(family, vae, enlarge(native_B3HW))
    noise = [draw_noise(_chw(x0_BCHW), flow.keyed_generator(seed, "ultra")) for seed in seeds]
    mu = family.shift_mu(*tile_HW)
    if sigma_start is None:
        sigma_start = float(flow.shift_sigma(torch.tensor(START), mu))
    sigmas = refine_sigmas(sigma_start, refine_steps(steps), mu)
    start_B = sigmas[:1].expand(len(seeds)).to(x0_BCHW.device)
    z_BCHW = flow.interpolate(x0_BCHW, torch.cat(noise).to(x0_BCHW.device), start_B)

    def counted(z_BCHW: Tensor, sigma: float) -> Tensor:
        velocity = predict(z_BCHW, sigma)
        on_pass()
        return velocity

    return decode(family, vae, walk(z_BCHW, sigmas, held(tiled_predict(counted, tile_HW), x0_BCHW)))


def held(predict: Predict, x0_BCHW: Tensor, cells: float = HOLD_CELLS) -> Predict:
    """`predict`, its x0 = z - sigma·v having the coarse part of the given x0 in place of its own."""

    def bound(z_BCHW: Tensor, sigma: float) -> Tensor:
        velocity_BCHW = predict(z_BCHW, sigma).to(z_BCHW.device, torch.float32)
        return velocity_BCHW + blur(z_BCHW - sigma * velocity_BCHW - x0_BCHW, cells) / sigma

    return bound


def blur(x_BCHW: Tensor, cells: float) -> Tensor:
    """Gaussian of standard deviation `cells`; beyond the edges the outermost cells go on."""
    reach = math.ceil(3 * cells)
    weight = torch.exp(-torch.arange(-reach, reach + 1, device=x_BCHW.device).square() / (2 * cells**2))
    kernel = (weight / weight.sum()).to(x_BCHW.dtype).expand(x_BCHW.shape[1], 1, 1, -1)
    across = conv2d(pad(x_BCHW, [reach] * 4, mode="replicate"), kernel, groups=len(kernel))
    return conv2d(across, kernel.transpose(2, 3), groups=len(kernel))


def _chw(x_BCHW: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = x_BCHW.shape
    return channels, height, width
