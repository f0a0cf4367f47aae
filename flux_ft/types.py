"""The frozen types that flow from stage to stage. Loads without torch.

Shapes in names: B batch, C latent channels, H W latent grid, L text tokens, D text width, P pooled width,
R rank, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from flux_ft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FoundFile:
    """One file, or one row of a dataset, as a source lists it; nothing of it has been decoded."""

    name: str
    """POSIX path inside the source, unique there."""
    stamp: str | None = None
    """Differs whenever the bytes may differ; None when only the bytes themselves can tell."""
    skip: str | None = None
    """Why it can't be used, where the listing shows it already: "hidden file", "a ZIP inside a ZIP" …"""
    caption: str | None = None
    """The caption column of a dataset's row; None where there is none."""
    data: bytes | None = None
    """The bytes, where the listing has them in hand anyway: a streamed row."""


class Source(Protocol):
    """A folder, a ZIP or a dataset. Reading one twice gives the same files in the same order."""

    @property
    def label(self) -> str:
        """As the run file names it; shown in messages and in the report."""
        ...

    @property
    def identity(self) -> str:
        """Where it is, absolutely: with a file's name and stamp it tells what was scanned before."""
        ...

    @property
    def rows(self) -> bool:
        """Whether each file is a picture with its caption, as in a dataset; in folders and ZIPs captions and masks are
        files of their own."""
        ...

    def files(self) -> Iterator[FoundFile]:
        """Every file once, sorted by name (a dataset: in its own order). Raises DataError."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError with the reason alone; the caller adds the name.

        Not for several threads at once. A streamed dataset is read forwards: asking in the order of `files` costs one
        pass, asking backwards starts over.
        """
        ...


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, whose bytes can be asked for again."""

    source: Source
    name: str

    def read(self) -> bytes:
        """The bytes. Raises DataError that names source and file."""
        try:
            return self.source.read(self.name)
        except DataError as error:
            raise DataError(f"{self}: {error.message}", hint=error.hint) from None

    def __str__(self) -> str:
        return f"{self.source.label}: {self.name}"


@dataclass(frozen=True, order=True)
class Bucket:
    """One picture size; both sides are multiples of the family's grid."""

    width_px: int
    height_px: int


@dataclass(frozen=True)
class Decoding:
    """What besides its bytes decides a picture's pixels."""

    background: tuple[int, int, int] = (255, 255, 255)
    """8-bit sRGB behind transparent parts."""
    alpha_is_mask: bool = False
    """Transparency weights the loss; the colours under it are taken as they are."""


@dataclass(frozen=True)
class Signals:
    """What a picture's pixels say of its quality, measured at its largest training size."""

    phash: int
    """64-bit perceptual hash; pictures of one scene differ in few bits. 0 for a picture without structure."""
    sharpness: float
    """How steep its sharpest edges are, 0 to 1; below a threshold of `signals` it looks blurred."""
    dark: float
    """Share of the pixels that are almost black, 0 to 1; 0 where something is properly lit."""
    bright: float
    """Share of the pixels that are almost white, 0 to 1; 0 where white is only the backdrop."""


@dataclass(frozen=True)
class Sample:
    """One usable picture with its final caption."""

    file: SourceFile
    caption: str
    caption_source: CaptionSource
    width_px: int
    """Width after EXIF orientation."""
    height_px: int
    digest: str
    """SHA-256 of the pixels, and of the mask if there is one, at the largest size it is trained at."""
    buckets: tuple[Bucket, ...]
    """The sizes it is trained at, largest first."""
    signals: Signals
    content_digest: str
    """SHA-256 of the file's bytes, whatever sizes and masks are trained: what a caption belongs to."""
    mask: SourceFile | None = None
    """A picture of its own that weights the loss."""
    masked: bool = False
    """Whether its loss is weighted: by `mask`, or by its own transparency."""
    repeats: int = 1
    weight: float = 1.0
    warnings: tuple[str, ...] = ()
    tokens: tuple[TokenCount, ...] = ()
    """The caption's length for each text encoder; empty where the tokenizers are not at hand."""
    thumbnail: bytes | None = None
    """The whole upright picture as a small JPEG; None past the first few hundred pictures."""


@dataclass(frozen=True)
class TokenCount:
    """How long a caption is for one text encoder, the encoder's own marks counted in."""

    encoder: str
    tokens: int
    limit: int
    """What is past this many is not read."""


CaptionCounter = Callable[[Sequence[str]], list[tuple[TokenCount, ...]]]
"""Captions to the lengths of each for every text encoder."""
CaptionSource = Literal["txt", "caption", "metadata", "captioner", "trigger"]


@dataclass(frozen=True)
class SideFile:
    """A used file that is no picture of its own."""

    file: SourceFile
    role: Literal["caption", "mask", "metadata"]
    note: str
    """What it was used for: "caption of cat.jpg"."""


@dataclass(frozen=True)
class Skipped:
    """One file that was found and not used, and why."""

    file: SourceFile
    reason: str
    ignored: bool = False
    """Never meant as a picture (hidden files, __MACOSX): reported, but not told on the console."""


@dataclass(frozen=True)
class PlacedSample:
    """A sample at one of its sizes."""

    sample: Sample
    bucket: Bucket


@dataclass(frozen=True)
class DatasetReport:
    """What became of every file that was given."""

    sources: tuple[str, ...]
    samples: tuple[Sample, ...]
    """In the order of the sources, then of their files."""
    side_files: tuple[SideFile, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...] = ()
    """What should be known of the run as a whole, in words."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Positions in `samples` of pictures that show the same scene; exact duplicates too."""
    decoding: Decoding = Decoding()

    @property
    def placed(self) -> tuple[PlacedSample, ...]:
        """Every picture at every size it is trained at."""
        return tuple(PlacedSample(sample, bucket) for sample in self.samples for bucket in sample.buckets)


@dataclass(frozen=True)
class TextCond:
    """What the text encoders say about a batch of captions."""

    embeds_BLD: Tensor
    pooled_BP: Tensor


@dataclass(frozen=True)
class ImageCond:
    """What a denoiser is shown besides text, as normalised latents."""

    channels_BCHW: Tensor | None = None
    """Put beside the noised latents, channel by channel: what Fill, Canny and Depth models take."""
    reference_BCHW: Tensor | None = None
    """A picture of any size whose tokens follow those of the noised latents: what Kontext models take."""


@dataclass(frozen=True)
class CachedExample:
    """One encoded picture and caption; the latent is normalised by the family's shift and scale."""

    name: str
    bucket: Bucket
    mean_CHW: Tensor
    """Mean of the autoencoder's distribution."""
    std_CHW: Tensor | None
    """Its standard deviation; None where the mean alone is wanted."""
    texts: Sequence[TextCond]
    """With B = 1: the caption, and then the other orders of its tags if there are any."""
    digest: str = ""
    """The picture's, which keys what must not depend on names."""
    weight_HW: Tensor | None = None
    """Weight of the loss at each place of the latent grid, with a mean of 1; None = the same everywhere."""
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket. `slots` are their positions in the global batch, which key their noise."""

    mean_BCHW: Tensor
    std_BCHW: Tensor | None
    text: TextCond
    slots: tuple[int, ...]
    names: tuple[str, ...]
    weight_BHW: Tensor | None = None
    loss_weight_B: Tensor | None = None


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
    layout: str = "flux1"
    """The family whose paths these are: a key of `families.layout.LAYOUTS`."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What no factors hold, by diffusers parameter: what is added to biases ("transformer_blocks.0.attn.to_q.bias"),
    norms that are replaced ("transformer_blocks.0.attn.norm_q.weight"). Only BFL's control LoRAs have them."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it was read."""


@dataclass(frozen=True)
class AppliedAdapter:
    """A LoRA file and how strongly it acts (1 = as trained)."""

    path: Path
    strength: float = 1.0
