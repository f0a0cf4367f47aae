"""Final captions: tidy text with the trigger word in its place. Loads without torch."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from math import factorial
from pathlib import PurePosixPath
from typing import Literal

from flux_ft.errors import DataError

Mode = Literal["character", "product", "style", "general"]

BARE_CAPTIONS: dict[str, str] = {
    "character": "a photo of {trigger}",
    "product": "a photo of {trigger}",
    "style": "in the style of {trigger}",
    "general": "{trigger}",
}

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Where a dataset or a metadata file has its captions unless told; the first there is."""
LARGEST_METADATA_BYTES = 32 * 2**20
"""Held in memory while it is read, JSON at up to twenty times its length; 20,000 rows of 1.6 kB."""

_JSONL_HINT = 'each line is one object: {"file_name": "cat.jpg", "text": "a cat"}'
_CSV_HINT = 'the first row names the columns, the others are like: cat.jpg,"a cat, asleep"'
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACEHOLDER = re.compile(r"\[trigger\]", re.IGNORECASE)
_JOINERS = "\u200c\u200d"
# Draws with replacement: to meet the last of n orders takes n·ln n of them on average, and there are at most 64.
TRIES_PER_ORDER = 32
# Written without spaces between words, so a neighbour of the same script says nothing about where a word ends.
_SPACELESS = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR")
# Words of these end where the script changes, as "TOK" does in "TOK의" or "一张TOK的照片".
_EAST_ASIAN = (*_SPACELESS, "KATAKANA", "HANGUL")


def tidy(text: str) -> str:
    """NFC, one line, single spaces, no byte order mark and no control characters."""
    shown = [char for char in text.replace("\ufeff", "") if char.isspace() or unicodedata.category(char) != "Cc"]
    return " ".join(unicodedata.normalize("NFC", "".join(shown)).split())


def has_trigger(caption: str, trigger: str) -> bool:
    """Whether `trigger` stands in `caption` as a word or phrase of its own, in any case; never inside another word."""
    caption, trigger = tidy(caption), tidy(trigger)
    return _contains_word(caption, trigger) or _contains_word(_folded(caption), _folded(trigger))


def names_trigger(caption: str, trigger: str) -> bool:
    """Whether a caption says itself where the trigger goes: by `[trigger]`, or by the word."""
    return bool(_PLACEHOLDER.search(caption)) or has_trigger(caption, trigger)


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


def read_metadata(name: str, data: bytes, caption_column: str | None = None) -> dict[str, str]:
    """Captions by picture, from a `metadata.jsonl` (an object a line) or a `metadata.csv` (a header row, commas).

    The column `file_name` has POSIX paths relative to the metadata file's folder, as in `datasets`' imagefolder; the
    captions are in `caption_column`, or in the first there is of CAPTION_COLUMNS. Rows without a caption are left out.
    Raises DataError with file and line.
    """
    if len(data) > LARGEST_METADATA_BYTES:
        raise DataError(
            f"{name}: {len(data):,} bytes; at most {LARGEST_METADATA_BYTES:,} are read", hint="leave out other columns"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name}: not UTF-8 text", hint="save it as UTF-8") from None
    rows = list((_csv_rows if name.lower().endswith(".csv") else _jsonl_rows)(name, text))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    found = "its columns are " + ", ".join(f"`{one[:40]}`" for one in columns[:20])
    column = caption_column or next((one for one in CAPTION_COLUMNS if one in columns), CAPTION_COLUMNS[0])
    if rows and column not in columns:
        expected = f"`{caption_column}`" if caption_column else " or ".join(f"`{one}`" for one in CAPTION_COLUMNS)
        hint = "set `data.caption_column` to the one that holds the captions"
        raise DataError(f"{name}:{rows[0][0]}: no column {expected}; {found}", hint=hint)
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        picture, caption = _cell(name, line, row, "file_name"), _cell(name, line, row, column)
        if not picture:
            raise DataError(f"{name}:{line}: no `file_name`; {found}", hint="every row names its picture there")
        picture = str(PurePosixPath(picture))
        if lines.setdefault(picture, line) != line:
            raise DataError(f"{name}:{line}: `{picture}` is in line {lines[picture]} already", hint="leave one of them")
        if caption.strip():
            captions[picture] = caption
    return captions


def _jsonl_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    # Not splitlines(), which also splits at characters that may stand inside a text.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "a number too long, or too many brackets"
            raise DataError(f"{name}:{line}: not JSON: {why}", hint=_JSONL_HINT) from None
        if not isinstance(row, dict):
            raise DataError(f"{name}:{line}: not an object", hint=_JSONL_HINT)
        yield line, row


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    # Fields longer than the module's own limit are refused; changing that limit would change it for everybody.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = [column.strip() for column in row]
                if len(set(header)) < len(header):
                    raise DataError(f"{name}:{reader.line_num}: two columns of one name", hint="rename one of them")
            elif len(row) > len(header):
                raise DataError(
                    f"{name}:{reader.line_num}: {len(row)} cells under {len(header)} columns",
                    hint='put a caption that has commas in it in double quotes: cat.jpg,"a cat, asleep"',
                )
            else:
                yield reader.line_num, dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: {error}", hint=_CSV_HINT) from None


def _cell(name: str, line: int, row: dict[str, object], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{name}:{line}: `{column}` is not text but {kind}", hint="put it in double quotes")
    if _SURROGATE.search(value):
        raise DataError(f"{name}:{line}: `{column}` has half a character in it", hint="save the file as UTF-8")
    return value


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


def tag_orders(caption: str, trigger: str, count: int, seed: int) -> tuple[str, ...]:
    """The caption as it is, then other orders of its comma-separated tags: `count` in all, or as many as there are.

    Tags that hold the trigger stay in their places. The orders follow from `seed` and the caption, and a larger `count`
    begins with those of a smaller one.
    """
    tags = [tag for part in caption.split(",") if (tag := tidy(part))]
    holds = [has_trigger(tag, trigger) for tag in tags]
    free = [place for place, held in enumerate(holds) if not held]
    if count < 2 or len(set(tags)) < 2 or (has_trigger(caption, trigger) and not any(holds)):
        return (caption,)  # the last: the trigger has a comma itself, and would be torn apart
    rng = random.Random(f"{seed}/tags/{caption}".encode("utf-8", "surrogatepass"))
    written = ", ".join(tags)
    orders = {written: caption}
    wanted = min(count, factorial(len(free)))
    for _ in range(TRIES_PER_ORDER * wanted):
        if len(orders) == wanted:
            break
        shuffled = list(tags)
        for place, source in zip(free, sorted(free, key=lambda _: rng.random()), strict=True):
            shuffled[place] = tags[source]
        orders.setdefault(", ".join(shuffled), ", ".join(shuffled))
    return tuple(orders.values())
