"""Captions: the trigger word is put in its place once, and never found inside another word."""

import pytest

from flux_ft.data.captions import bare_caption, has_trigger, place_trigger, tidy


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("[trigger] and [trigger]'s hat", "TOK", "TOK and TOK's hat"),
        ("a photo of [Trigger], TOK", "TOK", "a photo of TOK, TOK"),
        ("[trigger] here", r"\1 \g<0>", r"\1 \g<0> here"),
        ("a photo of TOK", "TOK", "a photo of TOK"),
        ("a photo of tok, smiling", "TOK", "a photo of tok, smiling"),
        ("TOK's cat", "TOK", "TOK's cat"),
        ("a TOK-like cat", "TOK", "a TOK-like cat"),
        ("a TOKEN on a STOK", "TOK", "TOK, a TOKEN on a STOK"),
        ("TOK2 and TOK_3", "TOK", "TOK, TOK2 and TOK_3"),
        ("STOK then TOK", "TOK", "STOK then TOK"),
        ("a  big\nred cat ", "TOK", "TOK, a big red cat"),
        ("", "TOK", "TOK"),
        ("\ufeff \n", "TOK", "TOK"),
        ("a cat", "", "a cat"),
        ("[trigger] a cat", "", "a cat"),
        ("a red\n cat", "red  cat", "a red cat"),
        ("a Cafe\u0301 chair", "caf\u00e9", "a Caf\u00e9 chair"),
        ("cafés", "café", "café, cafés"),
        ("eine STRASSE", "straße", "eine STRASSE"),
        ("C++ code", "C++", "C++ code"),
        ("C++11 code", "C++", "C++, C++11 code"),
        ("<s1> cat", "<s1>", "<s1> cat"),
        ("a\U0001f431 hat", "\U0001f431", "\U0001f431, a\U0001f431 hat"),
    ],
)
def test_the_trigger_is_placed_once(caption, trigger, expected):
    assert place_trigger(caption, trigger) == expected


@pytest.mark.parametrize(
    ("caption", "trigger", "present"),
    [
        ("一张TOK的照片", "TOK", True),
        ("一张托克猫的照片", "托克猫", True),
        ("TOK가 앉아 있다", "TOK", True),
        ("토크나이저", "토크", False),
        ("トクホン", "トク", False),
        ("トクの猫", "トク", True),
        ("คนโทกยืน", "โทก", True),
        ("โทกียืน", "โทก", False),  # a vowel sign goes on with the last letter
        ("किताब", "क", False),
        ("किताबें", "किताब", False),
        ("एक किताब।", "किताब", True),
        ("собака", "бак", False),
        ("БАК стоит", "бак", True),
    ],
)
def test_words_end_as_their_script_says(caption, trigger, present):
    assert has_trigger(caption, trigger) is present
    assert place_trigger(caption, trigger) == (caption if present else f"{trigger}, {caption}")


def test_placing_twice_changes_nothing():
    for caption in ("", "a cat", "[trigger] cat", "a TOK", "TOKEN"):
        once = place_trigger(caption, "TOK")
        assert place_trigger(once, "TOK") == once


def test_pictures_without_a_caption_get_the_one_of_the_mode():
    assert bare_caption("TOK", "character") == "a photo of TOK"
    assert bare_caption("TOK", "product") == "a photo of TOK"
    assert bare_caption("TOK", "style") == "in the style of TOK"
    assert bare_caption(" TOK ", "general") == "TOK"
    assert bare_caption("", "style") == ""


def test_tidy_drops_control_characters_and_keeps_one_line():
    assert tidy("\ufeffa\t b\r\n\x00c\u3000d") == "a b c d"
