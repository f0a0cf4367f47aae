"""Final captions: tidy text with the trigger word in its place. Loads without torch."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Mode = Literal["character", "product", "style", "general"]

BARE_CAPTIONS: dict[str, str] = {
    "character": "a photo of {trigger}",
    "product": "a photo of {trigger}",
    "style": "in the style of {trigger}",
    "general": "{trigger}",
}

_PLACEHOLDER = re.compile(r"\[trigger\]", re.IGNORECASE)
_JOINERS = "\u200c\u200d"
# Written without spaces between words, so a neighbour of the same script says nothing about where a word ends.
_SPACELESS = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR")
# Words of these end where the script changes, as "TOK" does in "TOK의" or "一张TOK的照片".
_EAST_ASIAN = (*_SPACELESS, "KATAKANA", "HANGUL")


def tidy(text: str) -> str:
    """NFC, one line, single spaces, no byte order mark and no control characters."""
    one_line = " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())
    return "".join(char for char in one_line if unicodedata.category(char) != "Cc")


def has_trigger(caption: str, trigger: str) -> bool:
    """Whether `trigger` stands in `caption` as a word or phrase of its own, in any case; never inside another word."""
    caption, trigger = tidy(caption), tidy(trigger)
    return _contains_word(caption, trigger) or _contains_word(_folded(caption), _folded(trigger))


def place_trigger(caption: str, trigger: str) -> str:
    """The final caption, tidied.

    Every `[trigger]` becomes the trigger. Without one, a caption that already says the trigger stays as it is, and any
    other gets it in front: "TOK, a cat". An empty caption becomes the trigger alone; an empty trigger adds nothing.
    """
    caption, trigger = tidy(caption), tidy(trigger)
    if _PLACEHOLDER.search(caption):
        # A function as the replacement: a trigger may hold backslashes.
        return tidy(_PLACEHOLDER.sub(lambda _: trigger, caption))
    if not caption or not trigger:
        return caption or trigger
    return caption if has_trigger(caption, trigger) else f"{trigger}, {caption}"


def bare_caption(trigger: str, mode: Mode) -> str:
    """The caption of a picture that came without one; empty when there is no trigger to name."""
    trigger = tidy(trigger)
    return BARE_CAPTIONS[mode].format(trigger=trigger) if trigger else ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


def _contains_word(text: str, word: str) -> bool:
    start = text.find(word) if word else -1
    while start >= 0:
        end = start + len(word)
        if not _binds(text[start - 1 : start], word[0]) and not _binds(text[end : end + 1], word[-1], follows=True):
            return True
        start = text.find(word, start + 1)
    return False


def _binds(neighbour: str, edge: str, *, follows: bool = False) -> bool:
    """Whether `neighbour` (one character, or "" at the end of the text) makes one word with the character `edge`."""
    if not neighbour:
        return False
    kind = unicodedata.category(neighbour)
    if neighbour in _JOINERS or (follows and kind[0] == "M"):
        return True
    # Python's \w leaves combining marks out and so cuts Indic words apart.
    if kind[0] not in "LNM" and neighbour != "_":
        return False
    script, edge_script = _script(neighbour), _script(edge)
    if script == edge_script:
        return script not in _SPACELESS
    return script not in _EAST_ASIAN and edge_script not in _EAST_ASIAN


def _script(char: str) -> str:
    """The script's name as Unicode's character names begin: LATIN, CJK, HANGUL, DIGIT …"""
    return re.split(r"[ -]", unicodedata.name(char, ""))[0]
