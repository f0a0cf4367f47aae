"""The frozen types that flow from stage to stage. Loads without torch.

Shapes in names: B batch, C latent channels, H W latent grid, L text tokens, D text width, P pooled width,
R rank, O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One usable picture with its final caption."""

    path: Path
    caption: str
    width_px: int
    """Width after EXIF orientation."""
    height_px: int
    digest: str
    """SHA-256 of the file's bytes."""
    caption_source: str
    """"txt" or "trigger"."""


@dataclass(frozen=True)
class Skipped:
    """One file that was found and not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, order=True)
class Bucket:
    """One picture size; both sides are multiples of the family's grid."""

    width_px: int
    height_px: int


@dataclass(frozen=True)
class PlacedSample:
    """A sample with the size it is trained at."""

    sample: Sample
    bucket: Bucket


@dataclass(frozen=True)
class DatasetReport:
    """What became of every file that was given."""

    source: str
    placed: tuple[PlacedSample, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextCond:
    """What the text encoders say about a batch of captions."""

    embeds_BLD: Tensor
    pooled_BP: Tensor


@dataclass(frozen=True)
class CachedExample:
    """One encoded picture and caption; the latent is normalised by the family's shift and scale."""

    name: str
    bucket: Bucket
    latent_CHW: Tensor
    text: TextCond
    """With B = 1."""


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket. `slots` are their positions in the global batch, which key their noise."""

    latents_BCHW: Tensor
    text: TextCond
    slots: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class LoraLayer:
    """One adapted linear: ΔW = (alpha / rank) · up @ down."""

    down_RI: Tensor
    up_OR: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down_RI.shape[0]


@dataclass(frozen=True)
class AdapterState:
    """A LoRA in one internal form: layers keyed by diffusers module path ("transformer_blocks.0.attn.to_q", …)."""

    layers: dict[str, LoraLayer]
    metadata: dict[str, str] = field(default_factory=dict)
    """The file's own header entries; all values are strings."""


@dataclass(frozen=True)
class AppliedAdapter:
    """A LoRA file and how strongly it acts (1 = as trained)."""

    path: Path
    strength: float = 1.0
