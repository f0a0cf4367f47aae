"""Pictures: whatever the file's mode, turn or profile, the pixels come out as a person would see them."""

import io
import struct
import threading
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from flux_ft.data import images
from flux_ft.data.buckets import bucket_for, crop_box
from flux_ft.data.images import load_mask, load_picture, read_header
from flux_ft.errors import DataError
from flux_ft.types import Bucket, Decoding

RED, GREEN, BLUE, GREY = (200, 30, 60), (40, 180, 70), (30, 60, 210), (128, 128, 128)
AS_MASK = Decoding(alpha_is_mask=True)
UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(params=["simd", "pillow"])
def either_scaler(request, monkeypatch):
    """A machine with the fast Lanczos, and one that there is no wheel for."""
    if request.param == "pillow":
        monkeypatch.setattr(images, "simd", None)
    elif images.simd is None:
        pytest.skip("cykooz.resizer is not installed")


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quadrants(width=48, height=32):
    """An upright picture without any symmetry."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, GREY
    return Image.fromarray(pixels)


@cache
def scene(width, height):
    """Soft shapes and fine detail, coloured, as a photograph has them."""
    rng = np.random.default_rng(0)
    layers = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 35), (64, 18), (200, 8)):
        noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        for band in range(3):
            layer = Image.fromarray(noise[:, :, band]).resize((width, height), Image.Resampling.BICUBIC)
            layers[:, :, band] += strength * np.asarray(layer)
    return Image.fromarray((128 + layers).clip(0, 255).astype(np.uint8))


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def sizes(data):
    header = read_header(data)
    return header.width_px, header.height_px


def rgb(data, bucket, decoding=Decoding()):  # noqa: B008
    return load_picture(data, bucket, decoding).rgb_HW3


def orientation_exif(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels_HWC, depth=8, kind=None, late=b""):
    """A PNG written by hand: Pillow writes no 16-bit colours, and nothing behind the pixels."""
    height, width, channels = pixels_HWC.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if kind is None else kind
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels_HWC)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunks + late + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation, kind, either_scaler):
    upright = quadrants()
    stored = upright if orientation == 1 else upright.transpose(UNDO[orientation])
    options = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}}[kind]
    data = saved(stored, kind, exif=orientation_exif(orientation), **options)
    assert sizes(data) == (48, 32)
    loaded = load_picture(data, Bucket(48, 32), thumbnail_px=24)
    difference = np.abs(loaded.rgb_HW3.astype(int) - np.asarray(upright).astype(int))
    assert difference.max() <= (6 if kind == "JPEG" else 0)
    with Image.open(io.BytesIO(loaded.thumbnail)) as thumbnail:
        assert thumbnail.size == (24, 16)
        assert psnr(np.asarray(thumbnail), np.asarray(upright.resize((24, 16)))) > 25


def test_orientation_behind_the_pixels_of_a_png_counts():
    stored = quadrants().transpose(UNDO[6])
    exif = orientation_exif(6).tobytes().removeprefix(b"Exif\0\0")
    data = png(np.asarray(stored), late=png_chunk(b"eXIf", exif))
    assert sizes(data) == (48, 32)
    assert (rgb(data, Bucket(48, 32)) == np.asarray(quadrants())).all()


@pytest.mark.parametrize("exif", [orientation_exif(77), b"Exif\0\0nonsense that is not TIFF"])
def test_an_orientation_that_makes_no_sense_is_ignored(exif):
    data = saved(quadrants(), "JPEG", exif=exif)
    assert sizes(data) == (48, 32)
    assert rgb(data, Bucket(48, 32)).shape == (32, 48, 3)


def flat(mode, colour, kind="PNG", decoding=Decoding(), **options):  # noqa: B008
    return one_colour(saved(Image.new(mode, (32, 32), colour), kind, **options), decoding)


def one_colour(data, decoding=Decoding()):  # noqa: B008
    pixels = rgb(data, Bucket(32, 32), decoding)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 32, 3)
    assert (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


def test_flat_pictures_of_every_mode(either_scaler):
    assert flat("RGB", RED) == RED
    assert flat("L", 77) == (77, 77, 77)
    assert flat("L", 77, "JPEG") == (77, 77, 77)
    assert flat("1", 1) == (255, 255, 255)
    assert flat("1", 1, transparency=1) == (255, 255, 255)
    assert flat("RGBA", (0, 0, 0, 0)) == (255, 255, 255)
    assert flat("RGBA", (200, 0, 100, 51), "WEBP", lossless=True, exact=True) == (244, 204, 224)
    assert flat("LA", (0, 51)) == (204, 204, 204)
    assert flat("CMYK", (0, 0, 0, 0), "JPEG", quality=100) == (255, 255, 255)
    assert flat("CMYK", (0, 0, 0, 255), "JPEG", quality=100) == (0, 0, 0)
    assert flat("CMYK", (0, 255, 255, 0), "JPEG", quality=100) == (255, 0, 0)


@pytest.mark.parametrize("value", [0, 127, 128, 129, 255, 256, 0x80FF, 0x8000, 0xFF00, 0xFF7F, 0xFFFF])
def test_sixteen_bits_become_the_nearest_eight(value):
    nearest = round(value / 257)
    for channels in (1, 3, 4):
        pixels = np.full((32, 32, channels), value)
        if channels == 4:
            pixels[:, :, 3] = 0xFFFF
        assert one_colour(png(pixels, depth=16)) == (nearest, nearest, nearest)
    # Of grey with transparency Pillow gives the upper bytes alone.
    pixels = np.dstack([np.full((32, 32), value), np.full((32, 32), 0xFFFF)])
    assert abs(one_colour(png(pixels, depth=16))[0] - value / 257) < 1


def test_sixteen_bits_are_told_of():
    assert read_header(png(np.zeros((32, 32, 3)), depth=16)).notes == ("16 bits a channel, read as 8",)
    assert read_header(png(np.zeros((32, 32, 3)))).notes == ()


def test_cmyk_is_told_of_and_its_profile_less_conversion_is_plain():
    data = saved(Image.new("CMYK", (32, 32)), "JPEG")
    assert read_header(data).notes == ("CMYK, converted to sRGB",)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_palette_with_transparency_lies_on_the_background(background):
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([*RED, *BLUE])
    picture.paste(1, (16, 0, 32, 32))
    data = saved(picture, "PNG", transparency=0)
    assert read_header(data).has_alpha
    pixels = rgb(data, Bucket(32, 32), Decoding(background=background))
    assert (pixels[:, :16] == background).all()
    assert (pixels[:, 16:] == BLUE).all()
    assert load_picture(data, Bucket(32, 32)).mask_HW is None


def test_a_transparent_colour_key_lies_on_white():
    pixels = rgb(saved(quadrants(32, 32), "PNG", transparency=RED), Bucket(32, 32))
    assert (pixels[:16, :16] == 255).all()
    assert (pixels[16:, :16] == BLUE).all()


def test_colours_of_transparent_parts_do_not_bleed():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (*GREEN, 255)
    pixels[:, 32:] = (255, 0, 0, 0)
    edge = rgb(saved(Image.fromarray(pixels), "PNG"), Bucket(16, 16), Decoding(background=GREEN))
    assert np.abs(edge.astype(int) - GREEN).max() <= 3


def test_alpha_as_a_mask_leaves_the_colours_as_they_are():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :, :3] = np.asarray(quadrants(64, 64))
    pixels[:, 32:, 3] = 255
    data = saved(Image.fromarray(pixels).transpose(UNDO[8]), "PNG", exif=orientation_exif(8))
    loaded = load_picture(data, Bucket(32, 32), AS_MASK)
    assert psnr(loaded.rgb_HW3, np.asarray(quadrants(32, 32))) > 25
    assert (loaded.rgb_HW3[4:12, 4:12] == RED).all()
    assert loaded.mask_HW.shape == (32, 32)
    assert (loaded.mask_HW[:, :12] == 0).all()
    assert (loaded.mask_HW[:, 20:] == 255).all()
    assert load_picture(saved(quadrants(), "PNG"), Bucket(32, 32), AS_MASK).mask_HW is None
    key = load_picture(saved(quadrants(32, 32), "PNG", transparency=RED), Bucket(32, 32), AS_MASK)
    assert (key.mask_HW[:16, :16] == 0).all()
    assert (key.rgb_HW3[:16, :16] == RED).all()


def swapped_profile():
    """An ICC profile that is sRGB with the primaries of red and blue changed over."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = bytearray(bytes(data).replace(b"\0s\0R\0G\0B", b"\0x\0R\0G\0B"))
    where = {}
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        entry = 132 + 12 * index
        where[bytes(data[entry : entry + 4])] = entry + 4
    red, blue = where[b"rXYZ"], where[b"bXYZ"]
    data[red : red + 8], data[blue : blue + 8] = data[blue : blue + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize(
    ("mode", "colour", "options"),
    [("RGB", RED, {}), ("RGBA", (*RED, 255), {}), ("RGB", RED, {"kind": "JPEG", "quality": 100, "subsampling": 0})],
)
def test_an_embedded_profile_is_converted_to_srgb(mode, colour, options):
    got = np.array(flat(mode, colour, **options, icc_profile=swapped_profile()))
    assert np.abs(got - np.array(RED[::-1])).max() <= 3


def test_an_srgb_or_unfit_or_broken_profile_leaves_the_pixels_alone():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert flat("RGB", RED, icc_profile=srgb) == RED
    assert flat("RGB", RED, icc_profile=b"not a profile") == RED
    assert flat("L", 90, icc_profile=swapped_profile()) == (90, 90, 90)


def test_the_crop_is_centred(either_scaler):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = RED
    assert (rgb(saved(Image.fromarray(pixels), "PNG"), Bucket(32, 32)) == RED).all()
    jpeg = rgb(saved(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0), Bucket(32, 32))
    assert np.abs(jpeg.astype(int) - RED).max() <= 3


FAST = [
    (1600, 1200, Bucket(128, 96), {}, 2),
    (1601, 1203, Bucket(256, 192), {}, 2),
    (1601, 1203, Bucket(192, 256), {"progressive": True}, 4),
    (1599, 1195, Bucket(512, 320), {"subsampling": 0, "quality": 70}, 4),
    (1599, 1195, Bucket(512, 320), {"quality": 100, "subsampling": 0}, 5),
    (1607, 1201, Bucket(736, 560), {"subsampling": 1}, 8),
    (641, 483, Bucket(640, 480), {}, 8),
]


@pytest.mark.parametrize(("width", "height", "bucket", "options", "eighths"), FAST)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_decoded_at_a_reduced_size_look_as_if_decoded_in_full(
    width, height, bucket, options, eighths, mode, either_scaler, monkeypatch
):
    data = saved(scene(width, height).convert(mode), "JPEG", **{"quality": 92, **options})
    used = []
    decode = images._decode_jpeg
    monkeypatch.setattr(images, "_decode_jpeg", lambda *given: used.append(given[2]) or decode(*given))
    fast = load_picture(data, bucket, thumbnail_px=64)
    assert used == [eighths]
    monkeypatch.setattr(images, "_decode_jpeg", lambda *_: None)
    slow = load_picture(data, bucket, thumbnail_px=64)
    assert psnr(fast.rgb_HW3, slow.rgb_HW3) > 50
    assert psnr(fast.rgb_HW3[:, :16], slow.rgb_HW3[:, :16]) > 48
    assert psnr(fast.rgb_HW3[-16:], slow.rgb_HW3[-16:]) > 48
    with Image.open(io.BytesIO(data)) as image:
        box = crop_box(width, height, bucket)
        full = image.convert("RGB").resize((bucket.width_px, bucket.height_px), Image.Resampling.LANCZOS, box=box)
    assert psnr(fast.rgb_HW3, np.asarray(full)) > 50
    small = [np.asarray(Image.open(io.BytesIO(one.thumbnail))) for one in (fast, slow)]
    assert psnr(*small) > 36


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_are_decoded_at_a_reduced_size_too(orientation):
    upright = scene(1000, 1500)
    stored = upright if orientation == 1 else upright.transpose(UNDO[orientation])
    data = saved(stored, "JPEG", exif=orientation_exif(orientation), quality=95, subsampling=0)
    assert sizes(data) == (1000, 1500)
    plain = upright.resize((160, 240), Image.Resampling.LANCZOS)
    assert psnr(rgb(data, Bucket(160, 240)), np.asarray(plain)) > 45


def test_every_bucket_of_odd_sizes_is_met_exactly(either_scaler):
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, height = rng.integers(16, 400, 2).tolist()
        bucket = bucket_for(width, height, int(rng.integers(1024, 20_000)), 16)
        data = saved(scene(400, 400).crop((0, 0, width, height)), ("JPEG", "PNG")[rng.integers(2)])
        assert rgb(data, bucket).shape == (bucket.height_px, bucket.width_px, 3)


def test_thumbnails_show_the_whole_picture_and_are_small():
    wide = scene(2000, 500)
    data = load_picture(saved(wide, "JPEG"), Bucket(256, 256), thumbnail_px=160).thumbnail
    assert len(data) < 6 * 1024
    with Image.open(io.BytesIO(data)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (160, 40))
        assert psnr(np.asarray(thumbnail), np.asarray(wide.resize((160, 40), Image.Resampling.LANCZOS))) > 23
    small = load_picture(saved(wide.resize((100, 25)), "PNG"), Bucket(16, 16), thumbnail_px=160).thumbnail
    assert Image.open(io.BytesIO(small)).size == (100, 25)
    assert load_picture(data, Bucket(16, 16)).thumbnail is None


def frames(kind, count=3):
    first, *others = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)[:count]]
    options = {} if kind == "MPO" else {"lossless": True, "duration": 50}
    return saved(first, kind, save_all=True, append_images=others, **options)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first_is_used_and_said_so(kind):
    header = read_header(frames(kind))
    said = "several pictures in one file" if kind == "MPO" else "animated"
    assert header.frames == 3
    assert header.notes == (f"{said}: the first of 3 is used",)
    assert header.format == ("JPEG" if kind == "MPO" else kind)
    assert np.abs(np.array(one_colour(frames(kind))) - RED).max() <= 3


def test_formats_go_by_content():
    assert [read_header(saved(quadrants(), kind)).format for kind in ("JPEG", "PNG", "WEBP")] == ["JPEG", "PNG", "WEBP"]
    assert read_header(saved(quadrants(), "PNG")) == images.Header(48, 32, "PNG", 1, has_alpha=False)
    assert read_header(saved(quadrants().convert("RGBA"), "PNG")).has_alpha


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_can(monkeypatch):
    data = saved(quadrants(), "AVIF", quality=100)
    assert read_header(data).format == "AVIF"
    assert psnr(rgb(data, Bucket(48, 32)), np.asarray(quadrants())) > 25
    monkeypatch.setattr(features, "check", lambda _: False)
    assert "AVIF picture, which this build of Pillow cannot read" in refusal(data)


def test_heic_without_the_extra_names_the_extra(monkeypatch):
    monkeypatch.setattr(images, "_reads_heif", lambda: False)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    assert refusal(data) == "an HEIC picture: `pip install 'flux_ft[heif]'` to read it, or convert it to JPEG or PNG"


def refusal(data, bucket=None):
    with pytest.raises(DataError) as caught:
        _ = load_picture(data, bucket) if bucket else read_header(data)
    return caught.value.message


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [Bucket(256, 256), Bucket(32, 32)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True})],
)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_truncated_picture_is_damaged(kind, options, kept, size):
    data = saved(NOISE, kind, **options)
    data = data[: int(len(data) * kept)]
    assert "damaged: " in refusal(data, size)
    if kind in ("JPEG", "PNG"):
        assert sizes(data) == (256, 256)
        assert refusal(data, size) == "damaged: the file ends before the picture does"


def test_a_jpeg_whose_pixels_are_lost_inside_is_damaged():
    data = bytearray(saved(NOISE, "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd9" * 20
    assert refusal(bytes(data), Bucket(256, 256)).startswith("damaged: ")
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd3" * 20
    assert refusal(bytes(data), Bucket(32, 32)).startswith("damaged: ")


def test_what_libjpeg_only_grumbles_at_is_read():
    data = saved(quadrants(), "JPEG", quality=95, subsampling=0)
    plain = rgb(data, Bucket(48, 32))
    for odd in (data + b"trailing bytes", data[:-2] + b"\1\2" + data[-2:]):
        assert psnr(rgb(odd, Bucket(48, 32)), plain) > 60


def test_a_jpeg_of_very_many_scans_is_refused():
    data = saved(quadrants(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    assert rgb(data[:-2] + scan * 3 + data[-2:], Bucket(32, 32)).shape == (32, 32, 3)
    assert refusal(data[:-2] + scan * 300 + data[-2:], Bucket(32, 32)) == "damaged: more than 200 scans in one JPEG"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"\0\1\2\3 nothing known", "not a JPEG, PNG or WebP picture"),
        (b"a photo of a cat,\r\nsitting\n", "text, not a JPEG, PNG or WebP picture"),
        (b"<!DOCTYPE html><title>404", "a web page, not a JPEG, PNG or WebP picture"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "an SVG drawing, not a JPEG, PNG or WebP picture"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video, not a JPEG, PNG or WebP picture"),
        (saved(quadrants(), "GIF"), "a GIF, not a JPEG, PNG or WebP picture"),
        (saved(quadrants(), "BMP"), "a BMP, not a JPEG, PNG or WebP picture"),
        (saved(quadrants(), "TIFF"), "a TIFF, not a JPEG, PNG or WebP picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer (`git lfs pull` fetches what it stands "),
        (b"\xff\xd8\xff", "damaged: its header cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "damaged: "),
        (b"RIFF\0\0\0\0WEBP", "damaged: "),
    ],
)
def test_what_is_no_picture_is_named(data, said):
    assert refusal(data).startswith(said)
    assert refusal(data, Bucket(16, 16)).startswith(said)


def test_a_decompression_bomb_is_refused_before_decoding():
    for side in (9_460, 60_000):  # Pillow itself would warn of the first and raise at the second
        lying = bytearray(saved(quadrants(), "PNG"))
        header = b"IHDR" + struct.pack(">II", side, side) + lying[24:29]
        lying[12:33] = header + struct.pack(">I", zlib.crc32(header))
        assert "more than the 89,478,485 pixels that are read at most: reduce it first" in refusal(bytes(lying))


def test_only_one_large_picture_is_decoded_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 100_000)
    data = saved(scene(512, 512), "PNG")
    inside, most = [], []
    decode = images._averageable

    def watched(*given):
        inside.append(1)
        most.append(len(inside))
        decoded = decode(*given)
        inside.pop()
        return decoded

    monkeypatch.setattr(images, "_averageable", watched)
    threads = [threading.Thread(target=load_picture, args=(data, Bucket(64, 64))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    # A JPEG that is decoded at a reduced size is not large, unless Pillow must read it after all.
    jpeg = saved(scene(512, 512), "JPEG", quality=95)
    with images._one_large:
        assert rgb(jpeg, Bucket(64, 64)).shape == (64, 64, 3)
        grumbling = threading.Thread(target=load_picture, args=(jpeg, Bucket(64, 64)))
        monkeypatch.setattr(images, "_decode_jpeg", lambda *_: None)
        grumbling.start()
        grumbling.join(0.1)
        assert grumbling.is_alive()
    grumbling.join(10)
    assert not grumbling.is_alive()
    # One that fails lets the next one in.
    assert "damaged" in refusal(data[:-900], Bucket(64, 64))
    assert rgb(data, Bucket(64, 64)).shape == (64, 64, 3)


def halves(width, height):
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "I;16"])
@pytest.mark.parametrize("width", [64, 96, 192])
def test_a_mask_of_any_mode_and_size_is_cut_as_its_picture_is(mode, width):
    image = halves(width, width // 3)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    mask = load_mask(saved(image, "PNG"), (96, 32), Bucket(32, 32))
    assert mask.shape == (32, 32)
    assert mask.dtype == np.uint8
    assert (mask[:, :13] >= 254).all()
    assert (mask[:, 19:] <= 1).all()


def test_mask_and_picture_are_cut_alike():
    grey = scene(500, 300).convert("L")
    bucket = Bucket(128, 96)
    picture = rgb(saved(grey, "PNG"), bucket)[:, :, 0]
    assert (load_mask(saved(grey, "PNG"), (500, 300), bucket) == picture).all()
    assert psnr(load_mask(saved(grey.resize((1000, 600)), "PNG"), (500, 300), bucket), picture) > 40
    turned = grey.transpose(UNDO[6])
    mask = load_mask(saved(turned, "PNG", exif=orientation_exif(6)), (500, 300), bucket)
    assert np.abs(mask.astype(int) - picture).max() <= 1


def test_a_mask_counts_nothing_where_it_is_transparent():
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:, 16:, 3] = 0
    mask = load_mask(saved(Image.fromarray(pixels), "PNG"), (32, 32), Bucket(32, 32))
    assert (mask[:, :16] == 255).all()
    assert (mask[:, 16:] == 0).all()


@pytest.mark.parametrize("size", [(320, 240), (160, 120), (213, 160), (53, 40), (1921, 1440)])
def test_a_mask_of_rounded_sides_is_taken(size):
    assert load_mask(saved(Image.new("L", size, 255), "PNG"), (640, 480), Bucket(64, 48)).min() == 255


def test_a_mask_of_another_aspect_is_refused():
    with pytest.raises(DataError, match=r"^the mask is 512 × 512 px, its picture 640 × 480: not the same aspect$"):
        load_mask(saved(Image.new("L", (512, 512)), "PNG"), (640, 480), Bucket(64, 48))
    with pytest.raises(DataError, match="the mask is 480 × 640 px"):
        load_mask(saved(Image.new("L", (480, 640)), "PNG"), (640, 480), Bucket(64, 48))
    with pytest.raises(DataError, match="damaged: "):
        load_mask(saved(NOISE, "PNG")[:2000], (256, 256), Bucket(64, 64))
