"""Pictures and tables of pictures."""

import base64
import errno
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

from flux_ft.errors import StorageError
from flux_ft.infer import grid
from flux_ft.infer.grid import data_url, labelled_grid, save_png, to_image, wrap_text

RED, BLUE = (255, 0, 0), (0, 0, 255)


def colour(rgb, size=(64, 64)):
    return Image.new("RGB", size, rgb)


def test_pixels_map_onto_bytes_by_rounding():
    values = torch.tensor([-1.0, 1.0, 0.0, -0.9961, 2.0, -3.0])
    image = to_image(values.view(1, 1, 6).expand(3, 1, 6))
    assert image.size == (6, 1)
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 255, 128, 0, 255, 0]


def test_every_byte_survives_the_way_through_pixels():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = np.stack([levels, levels[::-1], levels.T], axis=2)
    pixels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert np.array_equal(np.asarray(to_image(pixels)), picture)
    assert np.array_equal(np.asarray(to_image(pixels.to(torch.float64))), picture)


def test_width_and_height_are_not_swapped():
    assert to_image(torch.zeros(3, 10, 20)).size == (20, 10)


def test_a_saved_picture_is_the_same_with_its_words(tmp_path):
    info = PngInfo()
    info.add_text("flux_ft", "recipe")
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(colour(RED), path, info)
    with Image.open(path) as back:
        assert back.text == {"flux_ft": "recipe"}
        assert back.getpixel((0, 0)) == RED
    assert [one.name for one in path.parent.iterdir()] == ["a.png"]


def test_a_full_disk_is_told_and_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(colour(RED), path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"a\.png.*No space left"):
        save_png(colour(BLUE), path)
    monkeypatch.undo()
    with Image.open(path) as back:
        assert back.getpixel((0, 0)) == RED


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_png(colour(RED), tmp_path / "file" / "a.png")


def test_the_table_has_a_place_for_every_picture():
    rows = [[colour(RED), colour(BLUE)], [colour(BLUE), colour(RED)]]
    sheet = labelled_grid(rows, ["before", "after"], ["one", "two"], cell_px=32)
    colours = [pixel for _, pixel in sheet.getcolors(sheet.width * sheet.height)]
    assert {RED, BLUE} <= set(colours)
    pixels = np.asarray(sheet).astype(int)
    for rgb in (RED, BLUE):
        assert (pixels == rgb).all(2).sum() == 2 * 32 * 32
    red = np.argwhere((pixels == RED).all(2))
    first, second = red[red[:, 0] < red[:, 0].mean()], red[red[:, 0] > red[:, 0].mean()]
    assert first[:, 1].max() < second[:, 1].min()  # upper left, lower right


def test_tall_pictures_short_rows_and_no_labels():
    sheet = labelled_grid([[colour(RED, (48, 64))], [colour(BLUE, (64, 48)), colour(RED)]], ["", ""], ["", ""], 60)
    pixels = np.asarray(sheet)
    assert (pixels == BLUE).all(2).sum() == 60 * 45
    assert (pixels == RED).all(2).sum() == 60 * 80 + 60 * 60


@pytest.mark.parametrize(
    "text", ["", "   ", "word", "a few words", "averyveryverylongwordindeed and more", "日本語 текст"]
)
def test_wrapping_loses_no_word(text):
    font = ImageFont.load_default(13)
    lines = wrap_text(text, font, 60)
    assert " ".join(lines).split() == text.split()
    assert all(font.getlength(line) <= 60 or " " not in line for line in lines)


def test_long_labels_fit_above_their_column():
    words = "a large purple star in the bottom right on a yellow background"
    sheet = labelled_grid([[colour(RED)]], ["step 100"], [words], 64)
    assert sheet.height > 64 + 16 * 4
    assert np.asarray(sheet.convert("L")).min() < 60  # something was written


def test_endless_labels_are_cut_and_stay_in_their_place():
    word, words = "x" * 5000, "many words " * 500
    sheet = labelled_grid([[colour(RED)], [colour(RED)]], [word, words], [words], 64, title=word)
    assert sheet.width < 64 + 200
    assert sheet.height < 2 * 68 + 400
    pixels = np.asarray(sheet).astype(int)
    assert (pixels == RED).all(2).sum() == 2 * 64 * 64  # nothing is written over a picture
    plain = labelled_grid([[colour(RED)]], ["a"], ["b"], 64)
    assert labelled_grid([[colour(RED)]], ["a"], ["b"], 64, title="seed 3").height > plain.height


def test_a_table_of_files_is_the_table_of_their_pictures(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    save_png(colour(RED), files[0])
    save_png(colour(BLUE, (32, 64)), files[1])
    drawn = labelled_grid([[colour(RED), colour(BLUE, (32, 64))]], ["r"], ["a", "b"], 40)
    assert np.array_equal(np.asarray(labelled_grid([files], ["r"], ["a", "b"], 40)), np.asarray(drawn))


def test_a_large_table_has_smaller_cells(monkeypatch):
    monkeypatch.setattr(grid, "MAX_SHEET_PIXELS", 10 * 10 * 32 * 32)
    sheet = labelled_grid([[colour(RED)] * 10] * 10, [""] * 10, [""] * 10, 512)
    assert (np.asarray(sheet) == RED).all(2).sum() == 10 * 10 * 32 * 32


def test_a_thumbnail_is_a_small_jpeg_in_text():
    head, _, body = data_url(Image.new("RGB", (1024, 512), "red")).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(body))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (256, 128))
        red, green, blue = picture.convert("RGB").getpixel((5, 5))
    assert red > 240
    assert max(green, blue) < 20
