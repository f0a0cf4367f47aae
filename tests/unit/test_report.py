"""The report: every file once, counts that add up, one page that needs nothing else and that no name can break."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ft.data.captions import has_trigger, tidy
from flux_ft.data.report import CAPTION_CHARS, ROW_CHARS, report_html, report_json, trigger_spans, write_report
from flux_ft.errors import StorageError
from flux_ft.files import write_whole
from flux_ft.types import (
    Bucket,
    DatasetReport,
    Decoding,
    Sample,
    SideFile,
    Signals,
    Skipped,
    SourceFile,
    TokenCount,
)

THUMBNAIL = base64.b64decode("/9j/2wBDAA==")  # the page takes it as it is
HOSTILE = [
    "</script><img src=x onerror=alert(1)>.jpg",
    '"><svg onload="alert(1)',
    "' onload=alert(1) '",
    "<!-- ",
    "]]>",
    "$title ${policy} {0} %s <!-- body -->",
    "&lt;b&gt;&#60;",
    "cat\u202egpj.exe",
    "nul\0 bell\x07 \x1b[31m",
    "lone \udc80 surrogate",
    "line\u2028end",
]


class Named:
    """A source that only has its name."""

    def __init__(self, label):
        self.label = self.identity = label

    def files(self):
        return iter(())

    def read(self, name):
        raise AssertionError("the report reads no file")


PHOTOS, EXTRA = Named("photos"), Named("extra.zip")


def sample(name="cat.jpg", source=PHOTOS, **changes):
    plain = Sample(
        file=SourceFile(source, name),
        caption="TOK, a cat",
        caption_source="txt",
        width_px=200,
        height_px=100,
        digest=name,
        content_digest=name,
        buckets=(Bucket(192, 64), Bucket(128, 64)),
        signals=Signals(0, 1.0, 0.0, 0.0),
        thumbnail=THUMBNAIL,
    )
    return replace(plain, **changes)


def skipped(name, reason, source=PHOTOS, **changes):
    return Skipped(SourceFile(source, name), reason, **changes)


def side_file(name, role, note, source=PHOTOS):
    return SideFile(SourceFile(source, name), role, note)


@pytest.fixture
def report():
    samples = (
        sample(
            "sub/é.png", tokens=(TokenCount("clip", 80, 77), TokenCount("t5", 90, 512)), warnings=("looks blurred",)
        ),
        sample("a.png", mask=SourceFile(PHOTOS, "a_mask.png"), masked=True, buckets=(Bucket(192, 64),)),
        sample(
            "a.png", EXTRA, thumbnail=None, repeats=3, weight=0.5, caption="a photo of TOK", caption_source="trigger"
        ),
    )
    return DatasetReport(
        sources=("photos", "extra.zip"),
        samples=samples,
        side_files=(
            side_file("sub/é.txt", "caption", "caption of é.png"),
            side_file("a_mask.png", "mask", "mask of a.png"),
            side_file("metadata.csv", "metadata", "captions of 1 picture", EXTRA),
        ),
        skipped=(skipped("bad.jpg", "damaged: it ends early"), skipped(".x", "hidden file", EXTRA, ignored=True)),
        warnings=("fewer than 5 pictures",),
        groups=((0, 1),),
        decoding=Decoding((255, 0, 16), alpha_is_mask=False),
    )


# ---- report.json


def test_the_json_tells_every_file_once_and_its_counts_add_up(report):
    told = report_json(report)
    assert [(entry["source"], entry["path"]) for entry in told["files"]] == [
        ("photos", "a.png"),
        ("photos", "a_mask.png"),
        ("photos", "bad.jpg"),
        ("photos", "sub/é.png"),
        ("photos", "sub/é.txt"),
        ("extra.zip", ".x"),
        ("extra.zip", "a.png"),
        ("extra.zip", "metadata.csv"),
    ]
    counts = told["counts"]
    assert counts == {
        "files": 8,
        "used": 6,
        "skipped": 2,
        "pictures": 3,
        "captions": 1,
        "masks": 1,
        "metadata": 1,
        "ignored": 1,
        "examples": 2 + 1 + 2 * 3,
    }
    for status in ("used", "skipped"):
        assert counts[status] == sum(entry["status"] == status for entry in told["files"])
    for role, kind in (("picture", "pictures"), ("caption", "captions"), ("mask", "masks"), ("metadata", "metadata")):
        assert counts[kind] == sum(entry["role"] == role for entry in told["files"])
    assert counts["ignored"] == sum(entry["ignored"] for entry in told["files"])
    assert told["sources"] == ["photos", "extra.zip"]
    assert told["warnings"] == ["fewer than 5 pictures"]
    assert told["groups"] == [["sub/é.png", "a.png"]]
    assert told["settings"] == {"background": "#ff0010", "alpha": "background"}


def test_each_kind_of_file_has_the_same_keys(report):
    by_path = {(entry["source"], entry["path"]): entry for entry in report_json(report)["files"]}
    picture = by_path["photos", "sub/é.png"]
    assert picture == {
        "path": "sub/é.png",
        "source": "photos",
        "status": "used",
        "role": "picture",
        "reason": None,
        "ignored": False,
        "width_px": 200,
        "height_px": 100,
        "bucket": [192, 64],
        "crop_loss": 0.333333,
        "caption": "TOK, a cat",
        "caption_source": "txt",
        "warnings": ["looks blurred"],
        "buckets": [[192, 64], [128, 64]],
        "tokens": {"clip": {"tokens": 80, "limit": 77}, "t5": {"tokens": 90, "limit": 512}},
        "repeats": 1,
        "weight": 1.0,
        "masked": False,
        "digest": "sub/é.png",
    }
    assert by_path["photos", "a.png"]["masked"] is True
    assert (by_path["extra.zip", "a.png"]["repeats"], by_path["extra.zip", "a.png"]["weight"]) == (3, 0.5)
    mask, bad = by_path["photos", "a_mask.png"], by_path["photos", "bad.jpg"]
    assert (mask["status"], mask["role"], mask["reason"]) == ("used", "mask", "mask of a.png")
    assert (bad["status"], bad["role"], bad["reason"]) == ("skipped", None, "damaged: it ends early")
    assert bad["bucket"] is mask["caption"] is bad["digest"] is None
    assert bad["warnings"] == []
    assert all(list(entry) == list(picture) for entry in by_path.values())


def test_what_is_written_is_what_was_told_one_line_a_file(report, tmp_path):
    json_path, html_path = write_report(report, tmp_path / "run" / "new", "TOK")
    assert sorted(json_path.parent.iterdir()) == [html_path, json_path]
    text = json_path.read_text("utf-8")
    assert json.loads(text) == report_json(report)
    assert sum('"path"' in line for line in text.splitlines()) == 8
    assert html_path.read_text("utf-8") == report_html(report, "TOK")


def test_the_json_is_valid_whatever_the_names_are(tmp_path):
    hostile = [skipped(name, f"reason {name}") for name in HOSTILE]
    path, _ = write_report(DatasetReport((HOSTILE[0],), (), (), tuple(hostile), tuple(HOSTILE)), tmp_path)
    told = json.loads(path.read_bytes())
    assert {entry["path"] for entry in told["files"]} == set(HOSTILE)
    assert told["warnings"] == HOSTILE


def test_a_report_on_nothing(tmp_path):
    nothing = DatasetReport((), (), (), ())
    told = json.loads(write_report(nothing, tmp_path)[0].read_text("utf-8"))
    assert told["files"] == []
    assert set(told["counts"].values()) == {0}
    assert "There is no picture to train on" in report_html(nothing)


# ---- report.html


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    VOID = frozenset({"meta", "input", "wbr", "br"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.attributes, self.script, self.text = [], [], [], "", ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif "style" not in self.open:
            self.text += data

    def values(self, name):
        return [value for _, each, value in self.attributes if each == name]


def test_the_page_needs_nothing_else_and_lets_no_other_script_run(report):
    html = report_html(report, "TOK")
    page = Page(html)
    assert page.tags.count("script") == 1
    assert {"link", "iframe", "object", "base", "form", "img"}.isdisjoint(page.tags)
    [policy] = [value for value in page.values("content") if "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert re.search(r"script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"
    links = page.values("href")
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert not re.search(r"url\(|@import|https?:", html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_a_picture_is_shown_whole_with_its_crop_box_its_caption_and_its_faults(report):
    html = report_html(report, "TOK")
    assert html.count("data:image/jpeg;base64," + base64.b64encode(THUMBNAIL).decode()) == 2
    # 200 × 100 at 192 × 64: the full width, and 66.7 rows of the middle.
    assert 'd="M0 0H200V100H0zM0.0 16.7H200.0V83.3H0.0z"' in html
    assert "33.3% cropped" in html
    assert "<mark>TOK</mark>, a cat" in html
    words = Page(html).text.replace("\u00a0", " ")
    assert "3 pictures to train on, 1 left out" in words
    assert "200 × 100 px" in words
    assert "also at 128 × 64" in words
    assert "looks blurred" in words
    assert "masked by a_mask.png" in words
    assert "3 times a pass" in words
    assert "weight 0.5" in words
    assert "fewer than 5 pictures" in words
    assert "no caption of its own" in words


def test_the_filters_find_what_they_name(report):
    kinds = Page(report_html(report)).values("data-kind")
    assert sorted(kinds) == sorted(
        ["used warned look-alikes", "used look-alikes", "used", "look-alikes", "skipped", "ignored", *["beside"] * 3]
    )


def test_every_file_is_on_the_page(report):
    words = Page(report_html(report)).text
    for entry in report_json(report)["files"]:
        assert entry["path"] in words
        assert entry["reason"] is None or entry["reason"] in words


def test_nothing_is_cropped_and_no_box_is_drawn_where_the_shape_fits():
    html = report_html(DatasetReport(("photos",), (sample(buckets=(Bucket(128, 64),)),), (), ()))
    assert "uncropped" in html
    assert 'class="box"' not in html


def hostile_report(text):
    evil = Named(text)
    pictures = (
        sample(text, evil, caption=text, warnings=(text,), tokens=(TokenCount(text, 9, 7),), masked=True),
        sample(text + "2", evil, caption=text, thumbnail=None, masked=True, mask=SourceFile(evil, text)),
    )
    sides = (side_file(text, "caption", text, evil),)
    lost = (skipped(text, text, evil), skipped(text, text, evil, ignored=True))
    return DatasetReport((text, "other"), pictures, sides, lost, (text,), ((0, 1),))


PLAIN = Page(report_html(hostile_report("folder/x"), "x"))


@settings(max_examples=40, deadline=None)
@given(text=st.sampled_from(HOSTILE) | st.text(st.sampled_from("<>&\"'/ =-!x\0\u202e\udc80]`$"), min_size=1))
def test_no_name_caption_or_reason_adds_to_the_page(text):
    html = report_html(hostile_report(text), text)
    page = Page(html.encode("utf-8", "backslashreplace").decode())
    assert set(page.tags) <= set(PLAIN.tags)
    known = {(tag, name) for tag, name, _ in PLAIN.attributes}
    assert {(tag, name) for tag, name, _ in page.attributes} <= known
    assert page.script == PLAIN.script
    unseen = {char for char in html if char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\0\x1b\x07"}
    assert not unseen


def test_what_cannot_be_seen_is_spelt_out():
    words = Page(report_html(DatasetReport(("photos",), (), (), (skipped("cat\u202egpj.exe", "nul\0"),)))).text
    assert "cat\\u202egpj.exe" in words
    assert "nul\\u0000" in words


def test_endless_texts_are_cut_on_the_page_alone():
    caption = "TOK " + "x" * 100_000
    both = (sample(caption=caption), sample("b.jpg", caption=caption, thumbnail=None))
    report = DatasetReport(("photos",), both, (), (skipped("y" * 5000, "z" * 5000),))
    words = Page(report_html(report, "TOK")).text
    assert "x" * (CAPTION_CHARS - 4) + f" … ({100_004 - CAPTION_CHARS:,} more characters)" in words
    assert "x" * (ROW_CHARS - 4) + f" … ({100_004 - ROW_CHARS:,} more characters)" in words
    assert len(words) < 10_000
    assert report_json(report)["files"][0]["caption"] == caption


def test_a_hundred_pictures_stay_under_two_megabytes_and_twenty_thousand_under_fifteen(tmp_path):
    thumbnail = bytes(10_000)
    hundred = tuple(
        sample(f"{index}.jpg", thumbnail=thumbnail, caption="TOK, " + "word " * 100) for index in range(100)
    )
    pairs = tuple((index, index + 1) for index in range(0, 100, 2))
    _, html = write_report(DatasetReport(("photos",), hundred, (), (), (), pairs), tmp_path, "TOK")
    assert html.stat().st_size < 2_000_000
    many = tuple(
        sample(f"{index}.jpg", thumbnail=thumbnail[:6000] if index < 300 else None, caption="TOK, " + "word " * 25)
        for index in range(20_000)
    )
    _, html = write_report(DatasetReport(("photos",), many, (), ()), tmp_path, "TOK")
    assert html.stat().st_size < 15_000_000


# ---- where the trigger stands


@pytest.mark.parametrize(
    ("caption", "trigger", "marked"),
    [
        ("TOK, a cat", "TOK", ["TOK"]),
        ("a tok and a Tok's hat", "TOK", ["tok", "Tok"]),
        ("TOKEN of a sTOK, STOKE", "TOK", []),
        ("TOK의 사진, 一张TOK的照片", "TOK", ["TOK", "TOK"]),
        ("die STRASSE und die Straße", "straße", ["STRASSE", "Straße"]),
        ("Straßen", "straße", []),
        ("un CAFÉ noir", "cafe\u0301", ["CAFÉ"]),
        ("İstanbul at night", "i\u0307stanbul", ["İstanbul"]),
        ("my blue dog, blue dog house", "blue dog", ["blue dog", "blue dog"]),
        ("a.b c+ a.b", "a.b", ["a.b", "a.b"]),
        ("किताब और किताबें", "किताब", ["किताब"]),
        ("a cat", "", []),
        ("", "TOK", []),
    ],
)
def test_each_trigger_is_found_where_it_stands_as_a_word(caption, trigger, marked):
    assert [caption[start:end] for start, end in trigger_spans(caption, trigger)] == marked
    assert bool(marked) == has_trigger(caption, trigger)


@given(
    caption=st.text(st.sampled_from("aAsSßéÉ\u0301 ,_1猫한ΐİ\u200d"), max_size=12).map(tidy),
    trigger=st.text(st.sampled_from("aAsSßéÉ\u0301 猫한ΐİ"), min_size=1, max_size=3),
)
def test_a_trigger_is_marked_if_and_only_if_captions_finds_it(caption, trigger):
    spans = trigger_spans(caption, trigger)
    assert bool(spans) == has_trigger(caption, trigger)
    assert all(has_trigger(caption[start:end], trigger) for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


# ---- files and layers


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_whole(path, b"new")
    assert caught.value.hint
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_loads_without_torch_or_pictures():
    code = "import sys, flux_ft.data.report; print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_long_list_of_look_alikes_is_folded():
    samples = tuple(sample(f"{number}.png") for number in range(60))
    groups = tuple((number, number + 1) for number in range(0, 60, 2))
    html = report_html(
        DatasetReport(sources=("photos",), samples=samples, side_files=(), skipped=(), warnings=(), groups=groups)
    )
    section = html.partition('id="look-alikes"')[2].partition("</section>")[0]
    shown, fold, rest = section.partition("<details>")
    assert shown.count('class="group"') == 12
    assert fold
    assert "18 more groups" in rest
    assert rest.count('class="group"') == 18
    assert section.count("<div") == section.count("</div>")
