"""Ingest: every file is used, or skipped with its reason; told once; remembered."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_ft.config import DataConfig
from flux_ft.data import ingest as ingest_module
from flux_ft.data.index import ScanIndex
from flux_ft.data.ingest import Rules, Wording, ingest
from flux_ft.errors import DataError
from flux_ft.types import Bucket, Decoding, TokenCount

LATER = 4_000_000_000 * 10**9
"""A clock at which no file is fresh."""


def pixels(seed, size=(48, 32)):
    """Coarse blocks with fine grain: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8)
    grain = rng.integers(0, 56, (size[1], size[0], 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)) + grain


def picture(path, seed=0, size=(48, 32), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(path, **options)
    return path


def mask(path, values, size=(48, 32)):
    Image.fromarray(np.resize(np.array(values, np.uint8), (size[1], size[0]))).save(path)


def read(source, trigger="TOK", mode="general", *, areas=(1_048_576,), index=None, captioned=(), tokens=None, **data):
    settings = {"path": str(source)} if isinstance(source, str | Path) else {"sources": list(source)}
    rules = Rules(areas, 16, Decoding(alpha_is_mask=data.get("alpha") == "mask"))
    wording = Wording(trigger, mode, dict(captioned), tokens)
    return ingest(DataConfig(**settings, **data), rules, wording, index, lambda: LATER)


def reasons(report):
    return {one.file.name: one.reason for one in report.skipped}


def all_names(report):
    return sorted(one.file.name for one in (*report.samples, *report.side_files, *report.skipped))


def test_one_of_each_kind_is_accounted_for(tmp_path):
    picture(tmp_path / "b.png", 1)
    picture(tmp_path / "a" / "deep" / "c.webp", 2)
    picture(tmp_path / "a.jpeg", 3, size=(70, 40))
    picture(tmp_path / "really_png.JPG", 4, format="PNG")
    (tmp_path / "a.txt").write_bytes("\ufeffa [trigger] in\r\n the sun\n".encode())
    (tmp_path / "a.caption").write_text("the .txt wins")
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
    (tmp_path / "torn.caption").write_text("of a torn picture")
    picture(tmp_path / "masked.png", 8)
    mask(tmp_path / "masked_mask.png", [0, 255])
    picture(tmp_path / "dark.png", 9)
    mask(tmp_path / "dark_mask.png", [0])
    picture(tmp_path / "lone_mask.png", 10)
    (tmp_path / "metadata.csv").write_text("file_name,text\na/deep/c.webp,from the table\ngone.png,nobody's\n")
    picture(tmp_path / ".hidden.png", 11)
    (tmp_path / ".DS_Store").write_bytes(b"Bud1")
    picture(tmp_path / "__MACOSX" / "x.png", 12)
    picture(tmp_path / ".git" / "x.png", 13)

    report = read(tmp_path)
    used = [(one.file.name, one.caption, one.caption_source, one.buckets) for one in report.samples]
    assert used == [
        ("a.jpeg", "a TOK in the sun", "txt", (Bucket(64, 32),)),
        ("a/deep/c.webp", "TOK, from the table", "metadata", (Bucket(48, 32),)),
        ("b.png", "TOK, a cat", "txt", (Bucket(48, 32),)),
        ("lone_mask.png", "TOK", "trigger", (Bucket(48, 32),)),
        ("masked.png", "TOK", "trigger", (Bucket(48, 32),)),
        ("really_png.JPG", "TOK", "trigger", (Bucket(48, 32),)),
        ("z_copy.png", "TOK", "trigger", (Bucket(48, 32),)),
    ]
    assert [(one.file.name, one.role, one.note) for one in report.side_files] == [
        ("a.txt", "caption", "caption of a.jpeg"),
        ("b.TXT", "caption", "caption of b.png"),
        ("masked_mask.png", "mask", "mask of masked.png"),
        ("metadata.csv", "metadata", "captions of 1 picture"),
    ]
    told = reasons(report)
    assert list(told) == sorted(told)
    assert told.pop("torn.png").startswith("damaged: ")
    assert "empty" in told.pop("empty.png")
    for name in ("notes.md", "text.jpg"):
        assert "text" in told.pop(name)
    hidden = {name: told.pop(name) for name in (".hidden.png", ".DS_Store", ".git/", "__MACOSX/")}
    assert all(hidden.values())
    assert {one.file.name for one in report.skipped if one.ignored} == hidden.keys()
    assert told == {
        "a.caption": "a .txt of the same name wins",
        "dark.png": "its mask is black everywhere, so nothing of it would be learned",
        "dark_mask.png": "mask of a picture that is skipped",
        "latin.png": "its caption `latin.txt` is not UTF-8 text; save it as UTF-8",
        "latin.txt": "caption of a picture that is skipped",
        "orphan.txt": "caption without a picture of the same name",
        "thin.png": "the picture is 100 × 9 px; 16 px is the smallest side",
        "torn.caption": "caption of a picture that is skipped",
    }
    on_disk = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    folders = {"__MACOSX/x.png": "__MACOSX/", ".git/x.png": ".git/"}
    assert all_names(report) == sorted(folders.get(name, name) for name in on_disk)

    warned = {one.file.name: one.warnings for one in report.samples}
    assert "the same picture as b.png" in warned["z_copy.png"]
    assert any("is a PNG" in text for text in warned["really_png.JPG"])
    assert '4 of 7 pictures have no caption; theirs is "TOK"' in report.warnings
    assert "captions without a picture of the same name: orphan.txt" in report.warnings
    assert any(text.startswith("metadata.csv has captions for files") for text in report.warnings)
    assert [one.masked for one in report.samples] == [False, False, False, False, True, False, False]
    assert report.sources == (str(tmp_path),)


def test_two_reads_are_equal_and_a_changed_picture_changes_its_digest(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    first = read(tmp_path)
    again = read(str(tmp_path))
    assert [(one.digest, one.caption, one.buckets) for one in again.samples] == [
        (one.digest, one.caption, one.buckets) for one in first.samples
    ]
    picture(tmp_path / "b.png", 3)
    changed = read(tmp_path)
    assert changed.samples[0].digest == first.samples[0].digest
    assert changed.samples[1].digest != first.samples[1].digest


def test_the_digest_is_of_the_pixels_not_of_the_file(tmp_path):
    one = picture(tmp_path / "a.png", 1)
    Image.open(one).save(tmp_path / "b.webp", lossless=True)
    first, second = read(tmp_path).samples
    assert first.digest == second.digest
    assert "the same picture as a.png" in second.warnings


def test_a_mask_is_part_of_the_digest(tmp_path):
    picture(tmp_path / "a.png", 1)
    plain = read(tmp_path).samples[0].digest
    mask(tmp_path / "a_mask.png", [0, 255])
    masked = read(tmp_path).samples[0]
    assert masked.digest != plain
    assert masked.mask is not None
    off = read(tmp_path, masks=False)
    assert [one.file.name for one in off.samples] == ["a.png", "a_mask.png"]
    assert off.samples[0].digest == plain


def test_transparency_is_background_or_mask(tmp_path):
    rgba = np.dstack([pixels(1), np.resize(np.array([0, 255], np.uint8), (32, 48))])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    shown, weighted = read(tmp_path).samples[0], read(tmp_path, alpha="mask").samples[0]
    assert (shown.masked, weighted.masked) == (False, True)
    assert shown.digest != weighted.digest


def test_of_two_masks_and_a_mask_of_a_mask_each_is_told(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("a_mask.png", "a_mask.webp", "a_mask_mask.png"):
        mask(tmp_path / name, [0, 255])
    report = read(tmp_path)
    assert [(one.file.name, one.mask.name) for one in report.samples] == [("a.png", "a_mask.png")]
    assert reasons(report) == {
        "a_mask.webp": "a_mask.png is the mask already",
        "a_mask_mask.png": "mask of a mask",
    }
    assert not any("captions without" in warning for warning in report.warnings)


def test_a_mask_that_a_smaller_size_loses_is_told_before_training(tmp_path):
    picture(tmp_path / "a.png", size=(512, 512))
    values = np.zeros((512, 512), np.uint8)
    values[256, 256] = 30
    Image.fromarray(values).save(tmp_path / "a_mask.png")
    picture(tmp_path / "b.png", 1)
    assert [one.file.name for one in read(tmp_path, areas=(512 * 512,)).samples] == ["a.png", "b.png"]
    told = reasons(read(tmp_path, areas=(512 * 512, 16 * 16)))
    assert told["a.png"] == "its mask is black everywhere at 16 × 16 px, so nothing of it would be learned"


def test_captions_whose_names_differ_in_case_alone_are_both_told(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.TXT").write_text("upper")
    (tmp_path / "a.txt").write_text("lower")
    if len(os.listdir(tmp_path)) < 3:
        pytest.skip("this file system does not tell them apart")
    report = read(tmp_path)
    assert all_names(report) == ["a.TXT", "a.png", "a.txt"]
    assert reasons(report) == {"a.TXT": "a.txt wins"}
    assert report.samples[0].caption == "TOK, lower"


def test_a_trigger_of_spaces_is_none(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    report = read(tmp_path, trigger=" \n")
    assert report.samples[0].caption == "a cat"
    assert not any("trigger word" in warning for warning in report.warnings)


def test_what_another_decoder_told_is_not_taken_over(tmp_path, monkeypatch):
    picture(tmp_path / "in" / "a.png")
    index = ScanIndex(tmp_path / "index")
    read(tmp_path / "in", index=index)
    scans = []
    scan = ingest_module._scan
    monkeypatch.setattr(ingest_module, "_scan", lambda *words: scans.append(1) or scan(*words))
    read(tmp_path / "in", index=index)
    assert not scans
    monkeypatch.setattr(ingest_module, "version", lambda name: "99")
    read(tmp_path / "in", index=index)
    assert scans


def test_a_mask_of_another_shape_is_told(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    mask(tmp_path / "a_mask.png", [255], size=(64, 64))
    told = reasons(read(tmp_path))
    assert told["a.png"].startswith("its mask can't be used: ")
    assert "64 × 64" in told["a.png"]


def test_every_size_is_a_bucket_and_none_is_enlarged(tmp_path):
    picture(tmp_path / "large.png", 1, size=(256, 256))
    picture(tmp_path / "small.png", 2, size=(80, 80))
    large, small = read(tmp_path, areas=(128 * 128, 96 * 96, 64 * 64)).samples
    assert large.buckets == (Bucket(128, 128), Bucket(96, 96), Bucket(64, 64))
    assert small.buckets == (Bucket(80, 80), Bucket(64, 64))
    assert len(read(tmp_path, areas=(128 * 128, 64 * 64)).placed) == 4


def test_several_sources_with_repeats_and_weights(tmp_path):
    picture(tmp_path / "one" / "a.png", 1)
    picture(tmp_path / "two" / "a.png", 2)
    with zipfile.ZipFile(tmp_path / "three.zip", "w") as archive:
        archive.write(tmp_path / "two" / "a.png", "inner/b.png")
        archive.writestr("inner/b.txt", "a [trigger]")
    report = read(
        [
            str(tmp_path / "one"),
            {"path": str(tmp_path / "two"), "repeats": 3},
            {"path": str(tmp_path / "three.zip"), "weight": 0.5},
        ]
    )
    assert [(one.file.name, one.caption, one.repeats, one.weight) for one in report.samples] == [
        ("a.png", "TOK", 1, 1.0),
        ("a.png", "TOK", 3, 1.0),
        ("b.png", "a TOK", 1, 0.5),
    ]
    assert report.samples[1].digest == report.samples[2].digest
    assert [os.path.basename(label) for label in report.sources] == ["one", "two", "three.zip"]


def test_a_bad_picture_stops_the_run_where_that_is_asked_for(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "readme.md").write_text("not meant as a picture")
    read(tmp_path, on_bad="stop")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match=r"torn\.jpg") as caught:
        read(tmp_path, on_bad="stop")
    assert "data.on_bad: skip" in caught.value.hint


def test_pictures_without_caption_follow_the_mode(tmp_path):
    picture(tmp_path / "a.png")
    assert read(tmp_path, mode="style").samples[0].caption == "in the style of TOK"
    assert read(tmp_path, mode="character").samples[0].caption == "a photo of TOK"


def test_what_the_captioner_said_comes_after_what_was_given(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    (tmp_path / "b.caption").write_text("mine")
    said = {one.content_digest: "a model's words" for one in read(tmp_path).samples}
    first, second = read(tmp_path, captioned=said).samples
    assert (first.caption, first.caption_source) == ("TOK, a model's words", "captioner")
    assert (second.caption, second.caption_source) == ("TOK, mine", "caption")


def test_an_empty_caption_file_is_a_given_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    sample = read(tmp_path, mode="style").samples[0]
    assert (sample.caption, sample.caption_source) == ("TOK", "txt")
    assert "its caption file is empty" in sample.warnings


def test_a_trigger_that_no_caption_names_is_told(tmp_path):
    picture(tmp_path / "a.png", 1)
    told = "no given caption names the trigger word `TOK`; it is put in front of each"
    for words, warned in (("a TOKEN", True), ("a [Trigger]", False), ("TOK, a cat", False)):
        (tmp_path / "a.txt").write_text(words)
        assert (told in read(tmp_path).warnings) == warned


def test_a_caption_that_is_too_long_is_told(tmp_path):
    picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("word " * 80)

    def count(captions):
        return [(TokenCount("clip", 2 + len(c.split()), 77), TokenCount("t5", len(c.split()), 512)) for c in captions]

    sample = read(tmp_path, tokens=count).samples[0]
    assert sample.tokens[0].tokens == 83
    assert "its caption has 83 CLIP tokens, of which the first 77 are read; T5 reads all of it" in sample.warnings


def test_a_huge_caption_and_broken_metadata_are_told(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    (tmp_path / "a.txt").write_text("x" * 200_000)
    assert "200,000 bytes" in reasons(read(tmp_path))["a.png"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "fine"}\n{"file_name": \n')
    with pytest.raises(DataError, match=r"metadata\.jsonl.*2"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_links_and_pipes_are_told_and_never_opened(tmp_path):
    inside = tmp_path / "in"
    picture(inside / "a.png")
    (inside / "loop").symlink_to(inside, target_is_directory=True)
    (inside / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(inside / "pipe.png")
    told = reasons(read(inside))
    assert sorted(told) == ["gone.png", "loop/", "pipe.png"]
    assert told["loop/"] == "link to a folder, not followed"
    assert told["pipe.png"] == "not a regular file"


class TestMemory:
    """The index: what has not changed is not decoded again, and what has is."""

    @pytest.fixture
    def scanned(self, monkeypatch):
        """Counts the pictures that are decoded."""
        calls = []

        def counted(*arguments, scan=ingest_module._scan):
            calls.append(arguments)
            return scan(*arguments)

        monkeypatch.setattr(ingest_module, "_scan", counted)
        return calls

    def test_a_second_look_decodes_nothing(self, tmp_path, scanned):
        for seed in range(6):
            picture(tmp_path / "in" / f"{seed}.png", seed)
        (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
        with ScanIndex(tmp_path / "index.sqlite") as index:
            first = read(tmp_path / "in", index=index)
        assert len(scanned) == 7
        with ScanIndex(tmp_path / "index.sqlite") as index:
            second = read(tmp_path / "in", index=index)
        assert len(scanned) == 7
        assert reasons(second) == reasons(first)
        facts = [(one.digest, one.buckets, one.signals, one.thumbnail, one.warnings) for one in first.samples]
        assert [(one.digest, one.buckets, one.signals, one.thumbnail, one.warnings) for one in second.samples] == facts

    def test_a_changed_picture_mask_or_rule_is_seen(self, tmp_path, scanned):
        for seed in range(3):
            picture(tmp_path / "in" / f"{seed}.png", seed)
        mask(tmp_path / "in" / "2_mask.png", [0, 255])

        def decoded(**options):
            before = len(scanned)
            with ScanIndex(tmp_path / "index.sqlite") as index:
                read(tmp_path / "in", index=index, **options)
            return len(scanned) - before

        assert [decoded(), decoded()] == [3, 0]
        picture(tmp_path / "in" / "1.png", 9)
        assert [decoded(), decoded()] == [1, 0]
        mask(tmp_path / "in" / "2_mask.png", [255, 0])
        assert [decoded(), decoded()] == [1, 0]
        assert [decoded(areas=(16 * 16,)), decoded(areas=(16 * 16,)), decoded()] == [3, 0, 0]
        (tmp_path / "in" / "0.txt").write_text("a caption is read anew every time")
        assert decoded() == 0

    def test_a_file_that_may_still_change_is_not_remembered(self, tmp_path, scanned):
        path = picture(tmp_path / "in" / "a.png")
        written = path.stat().st_mtime_ns
        for _ in range(2):
            with ScanIndex(tmp_path / "index.sqlite") as index:
                rules, wording = Rules((4096,), 16), Wording("TOK", "general")
                ingest(DataConfig(path=str(tmp_path / "in")), rules, wording, index, lambda: written + 10**6)
        assert len(scanned) == 2


def refusal(source):
    with pytest.raises(DataError) as caught:
        read(source)
    assert caught.value.hint
    return caught.value


def test_a_source_that_cannot_be_read_is_refused_with_a_way_out(tmp_path):
    assert "gone" in refusal(tmp_path / "gone").message
    (tmp_path / "a.zip").touch()
    assert "a.zip" in refusal(tmp_path / "a.zip").message
    assert "a.png" in refusal(picture(tmp_path / "a.png")).message


def test_a_folder_without_usable_pictures_lists_the_first_reasons(tmp_path):
    assert refusal(tmp_path).message == f"`{tmp_path}` is empty"
    (tmp_path / ".hidden.png").touch()
    assert refusal(tmp_path).message == f"`{tmp_path}` holds no pictures"
    for index in range(7):
        (tmp_path / f"{index}.jpg").touch()
    lines = refusal(tmp_path).message.splitlines()
    assert lines[0] == f"`{tmp_path}` holds no usable picture:"
    assert lines[1].startswith("  0.jpg: ")
    assert lines[6] == "  and 2 more"
