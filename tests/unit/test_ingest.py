"""Ingest: every file is used, skipped with its reason, or ignored by rule."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_ft.data.ingest import ingest
from flux_ft.errors import DataError
from flux_ft.types import Bucket


def picture(path, seed=0, size=(48, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def read(source, trigger="TOK", mode="general"):
    return ingest(source, trigger, mode, max_pixels=1_048_576, multiple=16)


def test_one_of_each_kind_is_accounted_for(tmp_path):
    picture(tmp_path / "b.png", 1)
    picture(tmp_path / "a" / "deep" / "c.webp", 2)
    picture(tmp_path / "a.jpeg", 3, size=(70, 40))
    picture(tmp_path / "really_png.JPG", 4, format="PNG")
    (tmp_path / "a.txt").write_bytes("\ufeffa [trigger] in\r\n the sun\n".encode())
    (tmp_path / "b.TXT").write_text("a cat")
    (tmp_path / "z_copy.png").write_bytes((tmp_path / "b.png").read_bytes())
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "orphan.txt").write_text("nobody's")
    picture(tmp_path / "latin.png", 5)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    picture(tmp_path / "thin.png", 6, size=(100, 9))
    broken = picture(tmp_path / "torn.png", 7)
    broken.write_bytes(broken.read_bytes()[:1500])
    picture(tmp_path / ".hidden.png", 8)
    picture(tmp_path / "__MACOSX" / "x.png", 9)
    picture(tmp_path / ".git" / "x.png", 10)

    report = read(tmp_path)
    used = [(one.sample.path.relative_to(tmp_path).as_posix(), one.sample.caption, one.bucket) for one in report.placed]
    assert used == [
        ("a.jpeg", "a TOK in the sun", Bucket(64, 32)),
        ("a/deep/c.webp", "TOK", Bucket(48, 32)),
        ("b.png", "TOK, a cat", Bucket(48, 32)),
        ("really_png.JPG", "TOK", Bucket(48, 32)),
    ]
    assert [one.sample.caption_source for one in report.placed] == ["txt", "trigger", "txt", "trigger"]
    assert (report.placed[0].sample.width_px, report.placed[0].sample.height_px) == (70, 40)
    reasons = {one.path.relative_to(tmp_path).as_posix(): one.reason for one in report.skipped}
    assert list(reasons) == sorted(reasons)
    assert reasons.pop("torn.png").startswith("damaged: ")
    assert reasons == {
        "empty.png": "the file is empty",
        "latin.png": "its caption `latin.txt` is not UTF-8 text; save it as UTF-8",
        "notes.md": "not a JPEG, PNG or WebP picture, or its first bytes are damaged",
        "orphan.txt": "caption without a picture of the same name",
        "text.jpg": "not a JPEG, PNG or WebP picture, or its first bytes are damaged",
        "thin.png": "the picture is 100 × 9 px; 16 px is the smallest side",
        "z_copy.png": "same picture as `b.png`",
    }
    assert report.warnings == (
        '2 of 4 pictures have no caption; theirs is "TOK"',
        "captions without a picture of the same name: orphan.txt",
    )
    assert report.source == str(tmp_path)


def test_two_reads_are_equal_and_a_changed_picture_changes_its_digest(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    first = read(tmp_path)
    assert read(str(tmp_path)) == first
    picture(tmp_path / "b.png", 3)
    assert [one.sample.digest for one in read(tmp_path).placed] != [one.sample.digest for one in first.placed]


def test_pictures_without_caption_follow_the_mode(tmp_path):
    picture(tmp_path / "a.png")
    assert read(tmp_path, mode="style").placed[0].sample.caption == "in the style of TOK"
    assert read(tmp_path, mode="character").placed[0].sample.caption == "a photo of TOK"


def test_an_empty_caption_file_is_a_given_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    sample = read(tmp_path, mode="style").placed[0].sample
    assert (sample.caption, sample.caption_source) == ("TOK", "txt")


def test_a_trigger_that_no_caption_names_is_told(tmp_path):
    picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("a TOKEN")
    told = "no given caption names the trigger word `TOK`; it is put in front of each"
    assert read(tmp_path).warnings == (told,)
    (tmp_path / "a.txt").write_text("a [Trigger]")
    assert read(tmp_path).warnings == ()


def test_links_and_pipes_are_told_and_never_opened(tmp_path):
    inside = tmp_path / "in"
    picture(inside / "a.png")
    (inside / "loop").symlink_to(inside, target_is_directory=True)
    (inside / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(inside / "pipe.png")
    assert {one.path.name: one.reason for one in read(inside).skipped} == {
        "gone.png": "cannot be read: No such file or directory",
        "loop": "link to a folder, not followed",
        "pipe.png": "not a regular file",
    }


def refusal(source):
    with pytest.raises(DataError) as caught:
        read(source)
    assert caught.value.hint
    return caught.value


def test_what_is_not_a_folder_is_refused_with_a_way_out(tmp_path):
    assert refusal(tmp_path / "gone").message.endswith("no such folder")
    (tmp_path / "a.zip").touch()
    assert refusal(tmp_path / "a.zip").hint == "unpack it first and give the folder"
    assert "is a file, not a folder" in refusal(picture(tmp_path / "a.png")).message
    assert "Hub cannot be read yet" in refusal("hf:owner/name").message
    assert "Hub cannot be read yet" in refusal(Path("hf:owner/name")).message


def test_a_folder_without_usable_pictures_lists_the_first_reasons(tmp_path):
    assert refusal(tmp_path).message == f"`{tmp_path}` holds no pictures"
    for index in range(7):
        (tmp_path / f"{index}.jpg").touch()
    lines = refusal(tmp_path).message.splitlines()
    assert lines[0] == f"`{tmp_path}` holds no usable picture:"
    assert lines[1] == "  0.jpg: the file is empty"
    assert lines[5:] == ["  4.jpg: the file is empty", "  and 2 more"]
