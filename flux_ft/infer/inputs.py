"""The pictures that requests bring: read, upright, brought to a size that the model draws, as pixels.

Shapes in names: H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from flux_ft.data.buckets import bucket_for
from flux_ft.data.images import Header, load_mask, load_picture, read_header
from flux_ft.errors import DataError, InputError
from flux_ft.families.base import Variant
from flux_ft.types import Bucket, Decoding

Given = Path | Image.Image
KONTEXT_SIZES = tuple(
    (width, height)
    for width, height in zip(
        (672, 688, 720, 752, 800, 832, 880, 944, 1024, 1104, 1184, 1248, 1328, 1392, 1456, 1504, 1568),
        (1568, 1504, 1456, 1392, 1328, 1248, 1184, 1104, 1024, 944, 880, 832, 800, 752, 720, 688, 672),
        strict=True,
    )
)
"""Widths and heights that FLUX.1 Kontext was trained at (diffusers, pipeline_flux_kontext.py)."""
T = TypeVar("T")
_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Input:
    """One picture of a request. Every failure is an InputError that names field and file."""

    def __init__(self, given: Given, field: str) -> None:
        self.name = f"`{field}`" + (f" ({given})" if isinstance(given, Path) else "")
        self._data = self._bytes(given)
        self.header: Header = self._tried(lambda: read_header(self._data))
        self.size = (self.header.width_px, self.header.height_px)

    def fitted(self, variant: Variant, say: Callable[[str], None]) -> Bucket:
        """The size it is drawn at: its own if the model draws that, else the nearest below, said aloud."""
        bucket = self._tried(lambda: bucket_for(*self.size, variant.max_pixels, variant.pixel_multiple))
        if (bucket.width_px, bucket.height_px) != self.size:
            say(
                f"{self.name} is {self.size[0]} × {self.size[1]} px; it is cropped and reduced to {bucket.width_px} × "
                f"{bucket.height_px}, which {variant.name} can draw"
            )
        return bucket

    def rgb(self, size: Bucket, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
        """The picture at a size, cropped at its centre where the aspect differs."""
        return Image.fromarray(self._tried(lambda: load_picture(self._data, size, Decoding(background))).rgb_HW3)

    def for_kontext(self, variant: Variant, say: Callable[[str], None]) -> Bucket:
        """The size that a Kontext model sees it at: of those that FLUX.1 Kontext learned the one nearest in aspect."""
        if variant.max_pixels < KONTEXT_SIZES[0][0] * KONTEXT_SIZES[0][1]:
            return self.fitted(variant, say)
        aspect = self.size[0] / self.size[1]
        return Bucket(*min(KONTEXT_SIZES, key=lambda size: abs(aspect - size[0] / size[1])))

    def covering(self, size: Bucket) -> Image.Image:
        """The picture at any size, enlarged if need be."""
        if self.size[0] >= size.width_px and self.size[1] >= size.height_px:
            return self.rgb(size)
        whole = self.rgb(Bucket(*self.size))
        return ImageOps.fit(whole, (size.width_px, size.height_px), Image.Resampling.LANCZOS)

    def repaint_from_alpha(self, size: Bucket) -> tuple[Image.Image, Image.Image]:
        """The picture, and a mask that is white where it is transparent. InputError if that is nowhere."""
        if not self.header.has_alpha:
            raise InputError(
                f"{self.name} has no transparent part, and no `mask` is given",
                hint="give a mask of the same size: white is drawn anew, black stays",
            )
        loaded = self._tried(lambda: load_picture(self._data, size, Decoding(alpha_is_mask=True)))
        assert loaded.mask_HW is not None
        return Image.fromarray(loaded.rgb_HW3), binary(255 - loaded.mask_HW, self.name)

    def mask(self, of: Input, size: Bucket) -> Image.Image:
        """Itself as the mask of another picture, which must be as large."""
        if self.size != of.size:
            raise InputError(
                f"{self.name} is {self.size[0]} × {self.size[1]} px, the picture {of.size[0]} × {of.size[1]}",
                hint="a mask has the size of its picture: white is drawn anew, black stays",
            )
        return binary(self._tried(lambda: load_mask(self._data, of.size, size)), self.name)

    def _bytes(self, given: Given) -> bytes:
        if isinstance(given, Image.Image):
            buffer = BytesIO()
            (given if given.mode in _AS_PNG else given.convert("RGB")).save(buffer, format="PNG")
            return buffer.getvalue()
        try:
            return given.expanduser().read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.name} cannot be read: {error.strerror or error}", hint="give the path of a picture"
            ) from error

    def _tried(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except DataError as error:
            hint = error.hint or "give another picture: JPEG, PNG or WebP, whole, and not too small to draw from"
            raise InputError(f"{self.name}: {error.message}", hint=hint) from error


def pasted(drawn: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what was drawn where the mask is white; the edge is soft towards the inside."""
    soft = ImageChops.darker(mask, mask.filter(ImageFilter.GaussianBlur(max(mask.size) / 128)))
    return Image.composite(drawn, picture, soft)


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as (1, 3, H, W), float32 in [-1, 1]; a mask, which is grey, as (1, 1, H, W) of 0 and 1."""
    array = np.array(image, dtype=np.float32) / 255.0
    if image.mode == "L":
        return torch.from_numpy(array)[None, None]
    # In memory as diffusers has it: the autoencoder's convolutions sum in an order that depends on it.
    return 2.0 * torch.from_numpy(array[None].transpose(0, 3, 1, 2)) - 1.0


def binary(mask_HW: NDArray[np.uint8], name: str) -> Image.Image:
    """A mask of black and white alone, split at half; InputError if it is black everywhere."""
    split = np.where(mask_HW >= 128, np.uint8(255), np.uint8(0))
    if not split.any():
        raise InputError(f"{name} is black everywhere: nothing would be drawn anew", hint="paint that part white")
    return Image.fromarray(split)
