"""One picture file to pixels. Every failure is a DataError that names the file. Loads without torch."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from flux_ft.data.buckets import crop_box
from flux_ft.errors import DataError
from flux_ft.types import Bucket

READABLE = ("JPEG", "PNG", "WEBP")
BACKGROUND = (255, 255, 255)
"""What shows through transparent parts."""
DRAFT_MARGIN = 1.5
"""Scaled JPEG decoding keeps at least this many times the target's side, so that Lanczos still decides the look."""

_NOT_A_PICTURE = "not a JPEG, PNG or WebP picture, or its first bytes are damaged"
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers have been seen to raise on damaged files.
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def probe(path: Path, *, decode: bool = False) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the header alone.

    With `decode` every byte of the picture is also decoded (a JPEG at an eighth of its size), which is the only way to
    find a truncated one. Raises DataError.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
        if decode:
            image.draft(None, (1, 1))
            image.load()
    return (height, width) if turned else (width, height)


def load_rgb(path: Path, bucket: Bucket) -> NDArray[np.uint8]:
    """The picture as sRGB, upright, scaled to cover `bucket` and cropped at its centre: uint8 (H, W, 3).

    Transparent parts become white. Raises DataError.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        # Scaled before it is turned: turning the small picture costs less, and JPEG drafting needs the stored axes.
        stored = Bucket(bucket.height_px, bucket.width_px) if orientation >= 5 else bucket
        _draft(image, stored)
        rgb = to_rgb(image)
        size = (stored.width_px, stored.height_px)
        fitted = rgb.resize(size, Image.Resampling.LANCZOS, box=crop_box(*rgb.size, stored))
    if orientation in _TURNS:
        fitted = fitted.transpose(_TURNS[orientation])
    return np.array(fitted)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit sRGB: the embedded ICC profile is applied, transparency is laid on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return _to_srgb(image.convert("RGB") if image.mode in ("P", "1") else image, profile)
    grey = image.mode in ("L", "LA", "La", "1")
    layered = image.convert("LA" if grey else "RGBA")
    colour = _to_srgb(layered.convert("L" if grey else "RGB"), profile)
    backdrop = Image.new("RGB", image.size, BACKGROUND)
    backdrop.paste(colour, mask=layered.getchannel("A"))
    return backdrop


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, open and not yet decoded; whatever goes wrong inside the block becomes a DataError."""
    try:
        # Pillow's warnings are about sizes and metadata; sizes are judged here and metadata does not matter.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.stat().st_size == 0:
                raise DataError(f"`{path}`: the file is empty")
            with Image.open(path, formats=READABLE) as image:
                _refuse_bomb(path, image.size)
                yield image
    except UnidentifiedImageError:
        raise DataError(f"`{path}`: {_NOT_A_PICTURE}") from None
    except _DAMAGE as error:
        raise DataError(f"`{path}`: {_what_went_wrong(error)}") from error


def _refuse_bomb(path: Path, size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise DataError(f"`{path}`: {size[0]} × {size[1]} px is more than the {limit:,} pixels that are read at most")


def _what_went_wrong(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {Image.MAX_IMAGE_PIXELS:,} pixels that are read at most"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"damaged: {error or type(error).__name__}"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it makes no sense."""
    if image.format == "PNG" and "exif" not in image.info:
        # For a PNG without EXIF ahead of its pixels Pillow would decode all of them to look behind.
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _draft(image: Image.Image, target: Bucket) -> None:
    """Let the JPEG decoder shrink by 2, 4 or 8 where that leaves enough; other formats are not touched."""
    shrink = max(target.width_px / image.width, target.height_px / image.height) * DRAFT_MARGIN
    image.draft(None, (ceil(image.width * shrink), ceil(image.height * shrink)))


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow opens as I;16 or I, to 8-bit grey; converting it directly would clip at 255."""
    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image` (no alpha) to sRGB. A profile that cannot be read or is for another colour model is left aside."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # Skipped where it would only add rounding, which is nearly every photograph.
            if not source.profile.profile_description or not source.profile.profile_description.startswith("sRGB"):
                converted = ImageCms.profileToProfile(
                    image, source, ImageCms.createProfile("sRGB"), outputMode="RGB",
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )  # fmt: skip
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")
