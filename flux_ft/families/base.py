"""The family seam: what the loop and the runner may ask of a model, and the table of the models we know.

Behind it stay packing, position ids, text encoders, guidance embeddings and the latents' shift and scale. In front of
it there are latents_BCHW (always normalised), sigma in [0, 1] and a velocity. This file loads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from flux_ft.families.quantize import Storage
    from flux_ft.types import ImageCond, TextCond

ImageInput = Literal["none", "control", "fill", "reference"]
"""What a denoiser takes besides text: nothing; a control picture's latents as further channels; a picture's latents
with a hole and the mask as further channels; a picture's latents as further tokens."""


@dataclass(frozen=True)
class Variant:
    """One set of published weights and what follows from it."""

    name: str
    family: str
    source: str
    """Hub id, or "builtin:…" for weights inside the package."""
    pixel_multiple: int
    """Both sides of a picture are multiples of this many pixels."""
    latent_channels: int
    max_pixels: int
    """Largest picture area that is trained on."""
    training_sides_px: tuple[int, ...]
    """Sizes that pictures are trained at, largest first, as sides of a square of the same area; which of them is the
    run's `priority`."""
    sample_size_px: int
    """Default side of a generated picture."""
    max_text_tokens: int
    default_steps: int
    default_guidance: float
    guidance_embedded: bool = True
    shifted: bool = True
    """Whether inference shifts sigmas with the resolution; schnell was made without."""
    free_captions: bool = True
    """Whether it understands any sentence; flux-tiny knows the words of its own world alone, so a captioner is of no
    use to it."""
    distilled: bool = False
    """Step-distilled bases lose their speed-up when trained, so they are refused unless the user says so."""
    image_input: ImageInput = "none"
    """Only models that take none are trained."""
    license: str = ""
    architecture: str = ""
    """ModelSpec architecture of a LoRA for it."""
    summary: str = ""


class Family(Protocol):
    """One kind of model. Stateless but for its variant and where the weights are."""

    @property
    def variant(self) -> Variant: ...

    @property
    def source(self) -> str: ...

    @property
    def encoders_identity(self) -> str:
        """What cached latents and texts depend on: where the encoders are and, if that is here, their files."""
        ...

    def load_text(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Tokenizers and encoders; drop the returned object to free them."""
        ...

    def text_encoders(self, stack: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Each encoder with its blocks in the order in which they run, for those that may wait in host memory."""
        ...

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype,
        storage: Storage | None = None,
        stream: bool = False,
        home: torch.device | None = None,
    ) -> nn.Module:
        """The transformer, frozen; held as `storage`, streamed from host memory or left at `home`, if wished."""
        ...

    def encode_text(self, stack: Any, captions: list[str]) -> TextCond: ...

    def encode_image(self, vae: nn.Module, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] to the mean and the standard deviation of their normalised latents, both (B, C, H, W)."""
        ...

    def sample_image(self, vae: nn.Module, pixels_B3HW: Tensor, generator: torch.Generator | None) -> Tensor:
        """Pixels in [-1, 1] to a draw of their normalised latents (B, C, H, W), without generator the likeliest."""
        ...

    def decode_latents(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels_B3HW in [-1, 1]."""
        ...

    def latent_shape(self, width_px: int, height_px: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture of this size."""
        ...

    def shift_mu(self, latent_height: int, latent_width: int) -> float:
        """The family's own resolution-dependent sigma shift."""
        ...

    @property
    def vae_scale(self) -> int:
        """Pixels along a side that become one latent."""
        ...

    def input_features(self, image_input: ImageInput) -> int:
        """Features of the input layer of a model that takes such pictures."""
        ...

    def predict_velocity(
        self,
        denoiser: nn.Module,
        z_BCHW: Tensor,
        sigma_B: Tensor,
        text: TextCond,
        guidance: float,
        image: ImageCond | None = None,
    ) -> Tensor: ...

    def blocks(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The blocks by module path, in the order in which they run."""
        ...

    def lora_targets(self, denoiser: nn.Module) -> list[str]:
        """Module paths of the linears inside the blocks, in a fixed order."""
        ...
