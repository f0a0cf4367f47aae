"""Pictures to control maps: edges by Canny, depth by Depth Anything, depth of flux-tiny's flat world.

Maps are RGB, of the picture's size, and white where there is an edge or something near. Loads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from flux_ft.data.images import load_picture, read_header
from flux_ft.errors import ConfigError, DataError, InputError, ModelError
from flux_ft.files import write_whole
from flux_ft.types import Bucket

if TYPE_CHECKING:
    import torch

CANNY_LOW, CANNY_HIGH = 50, 200
DEPTH_MODELS = {
    "small": "depth-anything/Depth-Anything-V2-Small-hf",
    "base": "depth-anything/Depth-Anything-V2-Base-hf",
    "large": "depth-anything/Depth-Anything-V2-Large-hf",
}
"""Depth Anything V2 by size: 0.1, 0.4 and 1.3 GB. Small is Apache-2.0, the other two CC-BY-NC-4.0."""
MOST_ASPECT = 8
"""Depth Anything brings the shorter side to its own 518 px, so what a longer picture takes has no end."""
LEAST_CONTRAST = 45.0
"""Of flux-tiny's pictures: RGB distance (0..441) from the ground that is taken for a figure; named colours are twice as
far apart."""
FIGURE_SHARE = 0.005
"""Of flux-tiny's pictures: share of the pixels that are in front for certain where there is a figure at all."""

Kind = Literal["canny", "depth"]


@dataclass(frozen=True)
class Preprocessed:
    """A control map that was written."""

    kind: Kind
    source: Path
    output: Path
    width_px: int
    height_px: int
    settings: dict[str, Any]
    """What besides the picture it depends on."""
    mean: float
    """0 if it is black, 1 if it is white; of edges, the share of the pixels that are one."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": self.kind, "source": str(self.source), "output": str(self.output), "width": self.width_px,
            "height": self.height_px, **self.settings, "mean": self.mean,
        }  # fmt: skip

    def for_people(self) -> str:
        """For people."""
        if self.kind == "depth":
            what = f"depth by {self.settings['model']}, white is near"
        elif self.mean:
            what = f"edges on {self.mean:.1%} of the pixels"
        else:
            what = "no edge at all; lower --low and --high"
        return f"wrote {self.output} ({self.width_px} × {self.height_px} px): {what}"


def preprocess_file(
    kind: Kind,
    source: Path,
    output: Path,
    *,
    low: int = CANNY_LOW,
    high: int = CANNY_HIGH,
    model: str = "large",
    device: torch.device | None = None,
) -> Preprocessed:
    """Write the map of a picture's file as PNG or lossless WebP.

    `low` and `high` are of canny, `model` and `device` of depth, as `DepthEstimator` takes them. Raises ConfigError
    (an output of another kind or that exists, thresholds), DataError (the picture), ModelError, StorageError.
    """
    from flux_ft.adapters.write_files import require_new

    if output.suffix.lower() not in (".png", ".webp"):
        raise ConfigError(f"`{output}` does not end in .png or .webp", hint="JPEG would blur what the map says")
    require_new(output)
    picture = read_picture(source)
    settings: dict[str, Any] = {"low": low, "high": high}
    if kind == "canny":
        control = canny(picture, low, high)
    else:
        estimate = DepthEstimator(model, device)
        control, settings = estimate(picture), {"model": estimate.source, "device": str(estimate.device)}
    file = BytesIO()
    control.save(file, "PNG" if output.suffix.lower() == ".png" else "WEBP", lossless=True)
    write_whole(output, file.getvalue())
    mean = float(np.asarray(control).mean()) / 255
    return Preprocessed(kind, source, output, *control.size, settings, mean)


def canny(image: Image.Image, low: int = CANNY_LOW, high: int = CANNY_HIGH) -> Image.Image:
    """Edges, white on black: those steeper than `high`, and what goes on from them and is steeper than `low`.

    Of each pixel the channel with the steepest gradient counts, as BFL made the maps for FLUX.1 Canny: two colours
    can be equally bright. Edges depend on the size; bring the picture to the size of the drawing first. Raises
    ConfigError for thresholds out of order, InputError without OpenCV.
    """
    if not 0 <= low <= high:
        raise ConfigError(f"canny's thresholds are {low} and {high}", hint="0 ≤ low ≤ high; 50 and 200 are usual")
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            "edges need OpenCV, which is not installed", hint="pip install opencv-python-headless"
        ) from error
    edges: NDArray[np.uint8] = cv2.Canny(np.array(as_rgb(image)), low, high)
    return Image.fromarray(edges).convert("RGB")


def tiny_canny(image: Image.Image, low: int = CANNY_LOW, high: int = CANNY_HIGH) -> Image.Image:
    """Edges for flux-tiny, three pixels wide: of single pixels its autoencoder, four to a latent, sees little."""
    return canny(image, low, high).filter(ImageFilter.MaxFilter(3))


class DepthEstimator:
    """Depth Anything, kept loaded: `estimate(image)` is its depth map, white where near."""

    def __init__(self, source: str = "large", device: torch.device | None = None) -> None:
        """`source` is a size of `DEPTH_MODELS`, another Hub id or a folder; `device` None is the first GPU, or the CPU.

        float32 everywhere: bfloat16 has no more than 256 steps between 1 and 2, and they show. Raises ModelError.
        """
        import torch
        from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

        from flux_ft.families.hub import load_part

        self.source = DEPTH_MODELS.get(source, source)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        expected = f"a size ({', '.join(DEPTH_MODELS)}), or a Depth Anything model in the format of transformers"
        # Pillow's processor: the other one needs torchvision.
        self._processor = load_part(DPTImageProcessorPil, self.source, "", expected)
        model = load_part(DepthAnythingForDepthEstimation, self.source, "", expected, torch.float32)
        self._model = model.to(self.device).eval().requires_grad_(False)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Nearness from black, the picture's farthest, to white, its nearest; flat pictures are black.

        Raises DataError for a picture longer than `MOST_ASPECT` to 1, ModelError where the model gives no numbers.
        """
        import torch

        width, height = image.size
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise DataError(f"{width} × {height} px is longer than {MOST_ASPECT} : 1, too long for a depth map")
        pixels = self._processor(images=as_rgb(image), return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            found_1HW = self._model(pixel_values=pixels).predicted_depth.float().cpu()
        if not torch.isfinite(found_1HW).all():
            raise ModelError(f"{self.source}: gives no numbers for this picture", hint="download it again")
        if self._model.config.depth_estimation_type == "metric":  # metres; the relative models give 1 / distance
            found_1HW = 1 / found_1HW.clamp(min=1e-3)
        near_HW = torch.nn.functional.interpolate(
            found_1HW[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )[0, 0]
        farthest, nearest = float(near_HW.min()), float(near_HW.max())
        flat = nearest - farthest <= 1e-5 * abs(nearest)  # resizing leaves rounding
        return _grey(((near_HW - farthest) / (1.0 if flat else nearest - farthest)).numpy())


def tiny_depth(image: Image.Image) -> Image.Image:
    """Depth of one of flux-tiny's pictures, whose figure stands in front of its ground: black is the ground.

    How far a pixel's colour is from the ground's, the median of a two-pixel frame, as a share of the figure's own
    distance. A picture without a figure is black.
    """
    pixels_HW3 = np.asarray(as_rgb(image), np.float32)
    frame_HW = np.ones(pixels_HW3.shape[:2], bool)
    frame_HW[2:-2, 2:-2] = False
    away_HW = np.linalg.norm(pixels_HW3 - np.median(pixels_HW3[frame_HW], axis=0), axis=-1)
    inside = away_HW[away_HW > np.quantile(away_HW, 1 - FIGURE_SHARE) / 2]
    figure = float(np.quantile(inside, 0.7)) if inside.size else 0.0  # its edges are below, what a model overdrew above
    return _grey(away_HW / figure if figure >= LEAST_CONTRAST else np.zeros_like(away_HW))


def read_picture(path: Path) -> Image.Image:
    """A picture's file as RGB: upright, sRGB, transparent parts on white. Raises DataError that names it."""
    try:
        data = path.expanduser().read_bytes()
        header = read_header(data)
        return Image.fromarray(load_picture(data, Bucket(header.width_px, header.height_px)).rgb_HW3)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint="give the path of a picture") from error
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in memory as RGB: upright, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(level_HW: NDArray[Any]) -> Image.Image:
    """0..1 and beyond to black..white."""
    return Image.fromarray((level_HW * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
