"""Pictures: whatever the file's mode, turn or profile, the pixels come out as a person would see them."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux_ft.data import images
from flux_ft.data.images import load_rgb, probe
from flux_ft.errors import DataError
from flux_ft.types import Bucket

RED, GREEN, BLUE, GREY = (200, 30, 60), (40, 180, 70), (30, 60, 210), (128, 128, 128)
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


def quadrants(width=48, height=32):
    """An upright picture without any symmetry."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, GREY
    return Image.fromarray(pixels)


def orientation_exif(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, ending):
    upright, path = quadrants(), tmp_path / f"a.{ending}"
    stored = upright if orientation == 1 else upright.transpose(UNDO[orientation])
    options = {"webp": {"lossless": True, "exact": True}, "jpg": {"quality": 95, "subsampling": 0}, "png": {}}[ending]
    stored.save(path, exif=orientation_exif(orientation), **options)
    assert probe(path) == probe(path, decode=True) == (48, 32)
    difference = np.abs(load_rgb(path, Bucket(48, 32)).astype(int) - np.asarray(upright).astype(int))
    assert difference.max() <= (6 if ending == "jpg" else 0)


def test_an_orientation_that_makes_no_sense_is_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    quadrants().save(path, exif=orientation_exif(77))
    assert probe(path) == (48, 32)
    quadrants().save(path, exif=b"Exif\0\0nonsense that is not TIFF")
    assert probe(path) == (48, 32)
    assert load_rgb(path, Bucket(48, 32)).shape == (32, 48, 3)


def flat(path, mode, colour, **options):
    Image.new(mode, (32, 32), colour).save(path, **options)
    pixels = load_rgb(path, Bucket(32, 32))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 32, 3)
    assert (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


def test_flat_pictures_of_every_mode(tmp_path):
    assert flat(tmp_path / "rgb.png", "RGB", RED) == RED
    assert flat(tmp_path / "grey.png", "L", 77) == (77, 77, 77)
    assert flat(tmp_path / "grey.jpg", "L", 77) == (77, 77, 77)
    assert flat(tmp_path / "bits.png", "1", 1) == (255, 255, 255)
    assert flat(tmp_path / "half.png", "RGBA", (0, 0, 0, 0)) == (255, 255, 255)
    assert flat(tmp_path / "half.webp", "RGBA", (200, 0, 100, 51), lossless=True, exact=True) == (244, 204, 224)
    assert flat(tmp_path / "grey_alpha.png", "LA", (0, 51)) == (204, 204, 204)
    assert flat(tmp_path / "deep.png", "I;16", 257 * 200) == (200, 200, 200)
    assert flat(tmp_path / "cmyk.jpg", "CMYK", (0, 0, 0, 0), quality=100) == (255, 255, 255)
    assert flat(tmp_path / "black.jpg", "CMYK", (0, 0, 0, 255), quality=100) == (0, 0, 0)


def test_palette_with_transparency_lies_on_white(tmp_path):
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([*RED, *BLUE])
    picture.paste(1, (16, 0, 32, 32))
    picture.save(tmp_path / "p.png", transparency=0)
    pixels = load_rgb(tmp_path / "p.png", Bucket(32, 32))
    assert (pixels[:, :16] == 255).all()
    assert (pixels[:, 16:] == BLUE).all()


def test_a_transparent_colour_key_lies_on_white(tmp_path):
    quadrants(32, 32).save(tmp_path / "key.png", transparency=RED)
    pixels = load_rgb(tmp_path / "key.png", Bucket(32, 32))
    assert (pixels[:16, :16] == 255).all()
    assert (pixels[16:, :16] == BLUE).all()


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


def test_an_embedded_profile_is_converted_to_srgb(tmp_path):
    got = np.array(flat(tmp_path / "icc.png", "RGB", RED, icc_profile=swapped_profile()))
    assert np.abs(got - np.array(RED[::-1])).max() <= 2
    got = np.array(flat(tmp_path / "icc_alpha.png", "RGBA", (*RED, 255), icc_profile=swapped_profile()))
    assert np.abs(got - np.array(RED[::-1])).max() <= 2


def test_an_srgb_or_unfit_or_broken_profile_leaves_the_pixels_alone(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert flat(tmp_path / "srgb.png", "RGB", RED, icc_profile=srgb) == RED
    assert flat(tmp_path / "broken.png", "RGB", RED, icc_profile=b"not a profile") == RED
    assert flat(tmp_path / "unfit.png", "L", 90, icc_profile=swapped_profile()) == (90, 90, 90)


def test_the_crop_is_centred(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = RED
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (load_rgb(tmp_path / "a.png", Bucket(32, 32)) == RED).all()


def test_scaled_jpeg_decoding_is_used_and_close_to_full_decoding(tmp_path, monkeypatch):
    path, bucket = tmp_path / "big.jpg", Bucket(256, 192)
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
    rough.resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=92)
    with Image.open(path) as image:
        full = np.asarray(image.resize((256, 192), Image.Resampling.LANCZOS)).astype(float)
    decoded = []
    to_rgb = images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    error = np.mean((load_rgb(path, bucket) - full) ** 2)
    assert decoded == [(400, 300)]
    assert 10 * np.log10(255**2 / error) > 45


def test_draft_margin_holds_for_turned_pictures(tmp_path):
    quadrants(320, 1600).save(tmp_path / "a.jpg", exif=orientation_exif(6), quality=95)
    assert probe(tmp_path / "a.jpg") == (1600, 320)
    assert load_rgb(tmp_path / "a.jpg", Bucket(160, 32)).shape == (32, 160, 3)


def test_a_png_named_jpg_is_read_by_its_content(tmp_path):
    quadrants().save(tmp_path / "a.jpg", "PNG")
    assert probe(tmp_path / "a.jpg", decode=True) == (48, 32)


def refusal(path, *, decode=True):
    with pytest.raises(DataError) as caught:
        probe(path, decode=decode)
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_truncated_file_is_found_by_decoding(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert probe(path) == (64, 64)
    assert "damaged: " in refusal(path)
    with pytest.raises(DataError, match=f"a.{ending}"):
        load_rgb(path, Bucket(64, 64))


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    assert "not a JPEG, PNG or WebP picture" in refusal(tmp_path / "text.jpg", decode=False)
    quadrants().save(tmp_path / "b.png", "GIF")
    assert "not a JPEG, PNG or WebP picture" in refusal(tmp_path / "b.png", decode=False)
    (tmp_path / "empty.png").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.png")
    assert "cannot be read: No such file" in refusal(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    quadrants().save(path)
    for limit in (48 * 32 - 1, 100):  # Pillow itself warns at the first and raises at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert f"more than the {limit:,} pixels" in refusal(path, decode=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32)
    assert probe(path) == (48, 32)
