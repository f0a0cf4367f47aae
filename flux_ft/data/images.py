"""The bytes of one picture to exact pixels. Every failure is a DataError with the reason alone. Loads without torch.

A JPEG is decoded at 1/2 or 1/4 of its size where that leaves enough for the last step, always Lanczos, to decide the
look. On 30 photographs brought to 12 MP this is 5 times as fast as decoding in full, and 54 dB (median; least 46)
from it. `flux_ft.bench.data` measures it again.

Memory, beside the bytes themselves: at most 20 bytes a pixel of what is decoded, measured over all formats. That is
50 MB for a JPEG of 24 MP and 480 MB for the worst of `LARGE` pixels; larger ones, up to 1.8 GB, come one at a time.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile

from flux_ft.data.buckets import crop_box
from flux_ft.errors import DataError
from flux_ft.types import Bucket, Decoding

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for this machine: Pillow's Lanczos is the same filter, five times slower
    simd = None

MOST_PIXELS = 89_478_485
"""Larger pictures are refused before they are decoded; the number is Pillow's own limit."""
LARGE = 24_000_000
"""Pictures of more pixels than this are decoded one at a time, unless they can be decoded at a reduced size."""
MARGIN = 1.5
"""A JPEG is never decoded to less than this many times the size it is wanted at."""
DENSE = 0.2
"""JPEGs of more bytes a pixel have detail as fine as their pixels, of which 4/8 would lose too much: they take 5/8."""
REDUCING_GAP = 3.0
"""Other pictures may be averaged down to this many times the size they are wanted at before Lanczos."""
MOST_SCANS = 200
"""A progressive JPEG has about ten passes over its pixels; thousands of them are an attack on the reader's time."""

Size: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[float, float, float, float]
Scale: TypeAlias = Callable[[Size, Box], Image.Image]
"""Brings a part (left, top, right, bottom, in pixels of the stored picture) to a size (width, height)."""

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
    AssertionError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
_TOO_MANY = f"more than the {MOST_PIXELS:,} pixels that are read at most: reduce it first"
_ISO_PICTURES = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a ZIP"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches what it stands for)"),
)
_START_OF_SCAN = b"\xff\xda"
_one_large = threading.Lock()
# Of sizes, which are judged here, and of metadata, which do not matter. `catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Header:
    """What a picture says of itself, before it is decoded."""

    width_px: int
    """After EXIF orientation."""
    height_px: int
    format: str
    """JPEG, PNG, WEBP, AVIF or HEIF, by its content."""
    frames: int
    """1, or how many there are in an animation or a file of several pictures."""
    has_alpha: bool
    """Whether parts of it can be transparent."""
    notes: tuple[str, ...] = ()
    """What should be known of how it is read, in words."""


@dataclass(frozen=True)
class Pixels:
    """One picture as it is trained: sRGB, upright, cropped to its bucket."""

    rgb_HW3: NDArray[np.uint8]
    mask_HW: NDArray[np.uint8] | None = None
    """Its opacity, 255 where it is opaque, if `Decoding.alpha_is_mask` and the picture can be transparent."""
    thumbnail: bytes | None = None
    """The whole upright picture as a small JPEG, if that was asked for."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained on: the colours, and the mask if there is one."""
        digest = hashlib.sha256(f"{self.rgb_HW3.shape}".encode())
        digest.update(np.ascontiguousarray(self.rgb_HW3).data)
        if self.mask_HW is not None:
            digest.update(b"mask")
            digest.update(np.ascontiguousarray(self.mask_HW).data)
        return digest.hexdigest()


def read_header(data: bytes) -> Header:
    """What the picture says of itself, without decoding it: it may still be damaged. Raises DataError."""
    with _opened(data) as image:
        width, height = image.size
        if _orientation(image, data) >= 5:
            width, height = height, width
        frames = getattr(image, "n_frames", 1)
        return Header(
            width,
            height,
            "JPEG" if _is_jpeg(image) else image.format or "",
            frames,
            image.has_transparency_data,
            _notes(image, data, frames),
        )


def load_picture(
    data: bytes,
    bucket: Bucket,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    thumbnail_px: int | None = None,
) -> Pixels:
    """The picture as sRGB, upright, scaled to cover `bucket` and cropped at its centre.

    With `thumbnail_px` also the whole picture as a JPEG whose longer side is that many pixels, or the picture's own if
    that is less. Raises DataError.
    """
    with _opened(data) as image:
        turn, profile = _orientation(image, data), image.info.get("icc_profile")
        # Scaled before it is turned: turning the small picture costs less, and decoders know the stored axes alone.
        size = (bucket.height_px, bucket.width_px) if turn >= 5 else (bucket.width_px, bucket.height_px)
        box = crop_box(*image.size, Bucket(*size))
        with _scaler(image, data, size, box, alpha_apart=decoding.alpha_is_mask) as scale:
            picture = _turned(scale(size, box), turn)
            mask = None
            if decoding.alpha_is_mask and picture.mode in ("LA", "RGBA"):
                mask = np.array(picture.getchannel("A"))
            thumbnail = None
            if thumbnail_px is not None:
                whole = _turned(scale(_within(image.size, thumbnail_px), (0, 0, *image.size)), turn)
                thumbnail = _jpeg(_to_srgb(whole, profile, decoding))
        return Pixels(np.array(_to_srgb(picture, profile, decoding)), mask, thumbnail)


def load_mask(data: bytes, picture_px: tuple[int, int], bucket: Bucket) -> NDArray[np.uint8]:
    """A picture of its own as weights for another: uint8 (H, W) of `bucket`, 0 where it is black or transparent.

    `picture_px` is the other's upright (width, height). The two may differ in size but not in aspect, and the mask is
    cut exactly where the picture is. Raises DataError.
    """
    with _opened(data) as image:
        turn = _orientation(image, data)
        mask_px = image.size[::-1] if turn >= 5 else image.size
        _require_same_aspect(mask_px, picture_px)
        size, box = (bucket.width_px, bucket.height_px), crop_box(*picture_px, bucket)
        if turn >= 5:
            size, picture_px, box = size[::-1], picture_px[::-1], (box[1], box[0], box[3], box[2])
        across, down = image.width / picture_px[0], image.height / picture_px[1]
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        with _scaler(image, data, size, box, alpha_apart=False) as scale:
            mask = _turned(_eight_bit(scale(size, box)), turn)
        if mask.mode in ("LA", "RGBA"):
            mask = _laid_on(mask.convert("RGB"), mask.getchannel("A"), (0, 0, 0))
        return np.array(mask.convert("RGB").convert("L"))


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile]:
    """The picture, open and not yet decoded; whatever goes wrong inside the block becomes a DataError."""
    formats = _formats(data)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{image.width:,} × {image.height:,} px are {_TOO_MANY}")
            if _is_deep(image, data):
                # One 16-bit colour that stands for transparent: Pillow cannot tell it from others like it.
                image.info.pop("transparency", None)
            yield image
    except UnidentifiedImageError:
        raise DataError("damaged: its header cannot be read") from None
    except Image.DecompressionBombError:
        raise DataError(_TOO_MANY) from None
    except _DAMAGE as error:
        text = str(error) or type(error).__name__
        if re.search("truncated|premature end of jpeg", text, re.IGNORECASE):
            text = "the file ends before the picture does"
        raise DataError(f"damaged: {text}") from error


def _formats(data: bytes) -> tuple[str, ...]:
    """Pillow's names of the formats that `data` may be, by its first bytes. Raises DataError if none can be read."""
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return ("JPEG", "PNG", "WEBP")
    if not data:
        raise DataError("the file is empty")
    if data[4:8] != b"ftyp" or data[8:12] not in _ISO_PICTURES:
        raise DataError(f"{_kind(data)}not a JPEG, PNG or WebP picture")
    if b"avif" in data[8:64] or data[8:12] == b"avis":
        if not features.check("avif"):
            raise DataError("an AVIF picture, which this build of Pillow cannot read: convert it to JPEG or PNG")
        return ("AVIF",)
    if not _reads_heif():
        raise DataError("an HEIC picture: `pip install 'flux_ft[heif]'` to read it, or convert it to JPEG or PNG")
    return ("HEIF",)


@cache
def _reads_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _kind(data: bytes) -> str:
    """What `data` seems to be, in words that end in a comma; nothing if that is not known."""
    for magic, kind in _OTHERS:
        if data.startswith(magic):
            return f"{kind}, "
    if data[4:8] == b"ftyp":
        return "a video, "
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, "
    if start.startswith(b"<") and b"<svg" in start:
        return "an SVG drawing, "
    words = data[:256].split()
    return "text, " if all(word.isascii() and word.decode().isprintable() for word in words) else ""


def _is_jpeg(image: ImageFile) -> bool:
    return image.format in ("JPEG", "MPO")


def _notes(image: ImageFile, data: bytes, frames: int) -> tuple[str, ...]:
    notes = []
    if frames > 1:
        several = "animated" if image.format in ("PNG", "WEBP") else "several pictures in one file"
        notes.append(f"{several}: the first of {frames} is used")
    if _is_deep(image, data):
        notes.append("16 bits a channel, read as 8")
    if image.mode == "CMYK":
        notes.append("CMYK, converted to sRGB")
    return tuple(notes)


def _is_deep(image: ImageFile, data: bytes) -> bool:
    return image.format == "PNG" and data[24] == 16


def _orientation(image: ImageFile, data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it makes no sense."""
    try:
        if image.format == "PNG" and "exif" not in image.info:
            # Pillow would decode all pixels to look behind them.
            exif = Image.Exif()
            exif.load(_png_chunk(data, b"eXIf"))
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_chunk(data: bytes, wanted: bytes) -> bytes:
    """The content of the first chunk of that name, or nothing. PNG specification, section 5.3."""
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == wanted:
            return data[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def _require_same_aspect(mask_px: Size, picture_px: Size) -> None:
    """A pixel is forgiven on the smaller of the two, since a reduced copy has sides that were rounded."""
    if abs(mask_px[0] * picture_px[1] - mask_px[1] * picture_px[0]) > max(*mask_px, *picture_px):
        theirs = f"{picture_px[0]} × {picture_px[1]}"
        raise DataError(f"the mask is {mask_px[0]} × {mask_px[1]} px, its picture {theirs}: not the same aspect")


@contextmanager
def _scaler(image: ImageFile, data: bytes, size: Size, box: Box, *, alpha_apart: bool) -> Iterator[Scale]:
    """What scales parts of the decoded picture; the reduction of `box` to `size` says how much of a JPEG is decoded.

    With `alpha_apart` colours are not weighted by how opaque they are.
    """
    whole_px = image.width * image.height
    if _is_jpeg(image):
        scans = data.count(_START_OF_SCAN) - image.info.get("exif", b"").count(_START_OF_SCAN)
        if scans > MOST_SCANS:
            raise DataError(f"damaged: more than {MOST_SCANS} scans in one JPEG")
    if _is_plain_jpeg(image):
        eighths = _eighths(size[0] / (box[2] - box[0]), len(data) / whole_px)
        # libjpeg keeps all coefficients where there is more than one scan.
        with _one_large if (whole_px * eighths**2 // 64 if scans == 1 else whole_px) > LARGE else nullcontext():
            pixels = _decode_jpeg(image, data, eighths)
            if pixels is not None:
                yield _scale(pixels, eighths / 8)
                return
    with _one_large if whole_px > LARGE else nullcontext():
        yield _pillow_scale(_averageable(image, data), 1.0, alpha_apart=alpha_apart)


def _is_plain_jpeg(image: ImageFile) -> bool:
    return _is_jpeg(image) and image.mode in ("L", "RGB")


def _eighths(reduction: float, bytes_per_pixel: float) -> int:
    """At which part of its size a JPEG is decoded. 3/8 takes libjpeg-turbo longer than 4/8; 1/8 is a mere mean."""
    half = 5 if bytes_per_pixel > DENSE else 4
    return next((eighths for eighths in (2, half) if eighths / 8 >= MARGIN * reduction), 8)


def _decode_jpeg(image: ImageFile, data: bytes, eighths: int) -> NDArray[np.uint8] | None:
    """(H, W) or (H, W, 3), sides rounded up; None where libjpeg-turbo complains of what Pillow may still read.

    Raises ValueError where pixels are lost, of which Pillow would say nothing.
    """
    height, width = (-(-side * eighths // 8) for side in (image.height, image.width))
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
            return None
        colours = "GRAY" if image.mode == "L" else "RGB"
        # Full decoding is told by no smallest size at all. The fast DCT and upsampling save 1 ms of 26, and 6 dB.
        least = (height, width) if eighths < 8 else (0, 0)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colours, fastdct=False, fastupsample=False, min_height=least[0], min_width=least[1]
        )
    except ValueError as error:
        lost = re.search(r"end of data segment|bad \w+ code|instead of RST|\d{3,} extraneous", str(error))
        if lost:
            raise
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return pixels[..., 0] if image.mode == "L" else pixels


def _scale(pixels: NDArray[np.uint8], factor: float) -> Scale:
    """Of (H, W) or (H, W, 3), which are `factor` of the stored picture's size."""
    if simd is None:
        return _pillow_scale(Image.fromarray(pixels), factor, alpha_apart=False)
    height, width = pixels.shape[:2]
    mode, kind = ("L", simd.PixelType.U8) if pixels.ndim == 2 else ("RGB", simd.PixelType.U8x3)
    source = simd.ImageData(width, height, kind, pixels.tobytes())

    def scale(size: Size, box: Box) -> Image.Image:
        left, top, right, bottom = _scaled_box(box, factor, (width, height))
        options = simd.ResizeOptions(simd.ResizeAlg.convolution(simd.FilterType.lanczos3))
        options.crop_box = simd.CropBox(left, top, right - left, bottom - top)
        target = simd.ImageData(*size, kind)
        simd.Resizer().resize(source, target, options)
        return Image.frombytes(mode, size, target.get_buffer())

    return scale


def _pillow_scale(image: Image.Image, factor: float, *, alpha_apart: bool) -> Scale:
    """Of a picture that is `factor` of the stored one's size."""
    alpha = None
    if alpha_apart and image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])

    def fit(layer: Image.Image, size: Size, box: Box) -> Image.Image:
        gap = None if layer.mode == "I;16" else REDUCING_GAP
        return layer.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=gap)

    def scale(size: Size, box: Box) -> Image.Image:
        box = _scaled_box(box, factor, image.size)
        fitted = fit(image, size, box)
        if alpha is not None:
            fitted.putalpha(fit(alpha, size, box))
        return fitted

    return scale


def _scaled_box(box: Box, factor: float, size: Size) -> Box:
    # A reduced side is rounded up: its last pixel reaches past the picture's edge, which is why `factor` is not their
    # quotient. Rounding of floats must not reach past it either.
    left, top, right, bottom = (edge * factor for edge in box)
    return max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])


def _averageable(image: ImageFile, data: bytes) -> Image.Image:
    """The whole picture in a mode whose values can be averaged: L, LA, RGB, RGBA, CMYK or I;16."""
    if _is_deep(image, data):
        return _deep(image, data)
    transparent = image.has_transparency_data  # as `read_header` says it: a PNG may speak of it again behind the pixels
    image.load()
    grey = image.mode in ("1", "L", "LA", "La")
    if transparent:
        wanted = "LA" if grey else "RGBA"
    elif image.mode in ("1", "P", "PA"):
        wanted = "L" if grey else "RGB"
    else:
        wanted = image.mode
    return image if image.mode == wanted else image.convert(wanted)


def _deep(image: ImageFile, data: bytes) -> Image.Image:
    """A 16-bit PNG; with colours as its nearest 8-bit values, since Pillow alone takes their upper bytes."""
    lower_bytes = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
    tiles = [tile._replace(args=lower_bytes[tile.args]) for tile in image.tile if tile.args in lower_bytes]
    image.load()
    if not tiles:
        return image
    with Image.open(io.BytesIO(data), formats=("PNG",)) as low:
        low.tile = tiles
        low.load()
        one = ([0] + [1] * 255) * len(image.mode)
        for top in range(0, image.height, 256):  # in bands, for the memory's sake
            band = (0, top, image.width, min(top + 256, image.height))
            a, b = image.crop(band), low.crop(band)
            # 256 a + b is nearest to 257 (a + 1) where b - a > 128, and to 257 (a - 1) where a - b > 128.
            up, down = ImageChops.subtract(b, a, offset=-128), ImageChops.subtract(a, b, offset=-128)
            image.paste(ImageChops.subtract(ImageChops.add(a, up.point(one)), down.point(one)), band)
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion would clip at 255."""
    if image.mode != "I;16":
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _within(size: Size, longest: int) -> Size:
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70, optimize=True)
    return file.getvalue()


def _to_srgb(image: Image.Image, profile: bytes | None, decoding: Decoding) -> Image.Image:
    """Any averageable mode to RGB: the profile is applied, transparent parts lie on the background."""
    image = _eight_bit(image)
    if image.mode not in ("LA", "RGBA"):
        return _through_profile(image, profile)
    colour = _through_profile(image.convert(image.mode[:-1]), profile)
    return colour if decoding.alpha_is_mask else _laid_on(colour, image.getchannel("A"), decoding.background)


def _laid_on(colour: Image.Image, alpha: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    backdrop = Image.new("RGB", colour.size, background)
    backdrop.paste(colour, mask=alpha)
    return backdrop


def _through_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image` (no alpha) to sRGB. A profile that cannot be read or is for another colour model is left aside."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # Skipped where it would only add rounding, which is nearly every photograph.
            if not (source.profile.profile_description or "").startswith("sRGB"):
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
