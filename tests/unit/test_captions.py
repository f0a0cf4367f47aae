"""Captions: the trigger word is put in its place once, and never found inside another word."""

from math import factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ft.data.captions import bare_caption, has_trigger, place_trigger, tag_orders, tidy


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


KNOWN_ORDERS = ("a, b, c, d", "a, b, d, c", "c, b, a, d")
TAGS = "TOK, red hat, blue coat, smiling, outdoors"


def test_orders_begin_with_the_caption_and_differ():
    orders = tag_orders(TAGS, "TOK", 6, seed=1)
    assert orders[0] == TAGS
    assert len(set(orders)) == 6
    for order in orders:
        tags = order.split(", ")
        assert tags[0] == "TOK"
        assert sorted(tags) == sorted(TAGS.split(", "))


def test_orders_depend_on_seed_and_caption_alone():
    assert tag_orders(TAGS, "TOK", 6, seed=1) == tag_orders(TAGS, "TOK", 6, seed=1)
    assert tag_orders(TAGS, "TOK", 6, seed=1) != tag_orders(TAGS, "TOK", 6, seed=2)
    assert tag_orders(TAGS, "TOK", 3, seed=1) == tag_orders(TAGS, "TOK", 6, seed=1)[:3]
    # Fixed for good: a resumed run, on any machine, must find the orders that it began with.
    assert tag_orders("a, b, c, d", "", 3, seed=0) == KNOWN_ORDERS


@pytest.mark.parametrize("count", [2, 6, 24, 64])
def test_all_orders_are_found_where_that_many_are_wanted(count):
    assert len(tag_orders("a, b, c, d", "TOK", count, seed=0)) == min(count, factorial(4))


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a photo of TOK", "TOK", 1),
        ("", "TOK", 1),
        (",,", "TOK", 1),
        ("a, a, a", "TOK", 1),
        ("a, TOK", "TOK", 1),
        ("a, TOK, b", "TOK", 2),
        ("a, a, b", "TOK", 3),
        ("TOK, a tok b, c", "TOK", 1),
        ("TOKEN, b", "TOK", 2),
        ("x, y, z", "x, y", 1),
        ("p, q", "x, y", 2),
        ("a,b,", "", 2),
        ("\ud800, b", "", 2),
    ],
)
def test_there_are_as_many_orders_as_can_be(caption, trigger, expected):
    orders = tag_orders(caption, trigger, 64, seed=0)
    assert orders[0] == caption
    assert len(orders) == len(set(orders)) == expected


def test_tags_with_the_trigger_stay_in_their_places():
    for order in tag_orders("a, a photo of TOK, b, c, the TOK, d", "TOK", 20, seed=0):
        assert order.split(", ")[1] == "a photo of TOK"
        assert order.split(", ")[4] == "the TOK"


def test_one_order_is_the_caption_as_written():
    assert tag_orders("b ,a,,", "TOK", 1, seed=0) == ("b ,a,,",)


@given(st.text(max_size=60), st.text(max_size=5), st.integers(1, 8), st.integers(0, 2**63 - 1))
def test_any_caption_keeps_its_tags(caption, trigger, count, seed):
    caption = tidy(tidy(caption))
    orders = tag_orders(caption, trigger, count, seed)
    assert orders[0] == caption
    assert 1 <= len(orders) <= count
    tags = sorted(filter(None, map(tidy, caption.split(","))))
    assert all(sorted(filter(None, map(tidy, order.split(",")))) == tags for order in orders)
