"""metadata.jsonl and metadata.csv: captions by picture, and mistakes told with file and line."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ft.data.captions import LARGEST_METADATA_BYTES, read_metadata
from flux_ft.errors import DataError


def jsonl(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def refusal(name, data, column=None):
    with pytest.raises(DataError) as caught:
        read_metadata(name, data.encode() if isinstance(data, str) else data, column)
    assert caught.value.hint
    return caught.value.message


class TestJsonl:
    def test_rows_become_captions(self):
        rows = jsonl(
            {"file_name": "a.png", "text": "a cat", "extra": [1, {"x": None}]},
            "",
            {"file_name": "./sub//b.png", "text": "line\u2028break, \x85 and \u732b"},
            {"file_name": "none.png", "text": None},
            {"file_name": "empty.png", "text": " "},
            {"file_name": "missing.png"},
            "",
        )
        expected = {"a.png": "a cat", "sub/b.png": "line\u2028break, \x85 and 猫"}
        assert read_metadata("metadata.jsonl", rows) == expected
        assert read_metadata("metadata.jsonl", b"\xef\xbb\xbf" + rows.replace(b"\n", b"\r\n")) == expected
        raw = json.dumps({"file_name": "a", "text": "x\u2028y"}, ensure_ascii=False).encode()
        assert read_metadata("m.jsonl", raw) == {"a": "x\u2028y"}
        assert read_metadata("m.jsonl", b"") == read_metadata("m.jsonl", b"\n \n") == {}

    def test_the_column_is_the_first_there_is_or_the_one_named(self):
        row = {"file_name": "a", "prompt": "3", "caption": "2", "text": "1", "mine": "0"}
        assert read_metadata("m.jsonl", jsonl(row)) == {"a": "1"}
        assert read_metadata("m.jsonl", jsonl({**row, "file_name": "b"}, row), "mine") == {"b": "0", "a": "0"}
        del row["text"]
        assert read_metadata("m.jsonl", jsonl(row)) == {"a": "2"}
        # One column for the whole file, not one for each row.
        assert read_metadata("m.jsonl", jsonl(row, {"file_name": "b", "text": "1"})) == {"b": "1"}

    @pytest.mark.parametrize(
        ("row", "wrong"),
        [
            ("{", "not JSON: Expecting property name enclosed in double quotes"),
            ("[" * 100_000, "not JSON: a number too long, or too many brackets"),
            ('{"file_name": ' + "9" * 5000 + "}", "not JSON: a number too long, or too many brackets"),
            ("[1]", "not an object"),
            ({"file_name": 3, "text": "x"}, "`file_name` is not text but int"),
            ({"file_name": "x", "text": ["x"]}, "`text` is not text but list"),
            ({"file_name": "x", "text": True}, "`text` is not text but bool"),
            ({"text": "x"}, "no `file_name`; its columns are `file_name`, `text`"),
            ({"file_name": "", "text": "x"}, "no `file_name`; its columns are `file_name`, `text`"),
            ({"file_name": "./a.png", "text": "y"}, "`a.png` is in line 1 already"),
            ('{"file_name": "x", "text": "\\ud83d"}', "`text` has half a character in it"),
        ],
    )
    def test_mistakes_name_their_line(self, row, wrong):
        data = jsonl({"file_name": "a.png", "text": "x"}, "", row)
        assert refusal("sub/metadata.jsonl", data) == f"sub/metadata.jsonl:3: {wrong}"

    def test_a_missing_column_lists_the_columns(self):
        data = jsonl({"file_name": "a", "words": "x"})
        expected = "m.jsonl:1: no column `text` or `caption` or `prompt`; its columns are `file_name`, `words`"
        assert refusal("m.jsonl", data) == expected
        assert refusal("m.jsonl", data, "word") == "m.jsonl:1: no column `word`; its columns are `file_name`, `words`"

    def test_not_utf8_and_too_large(self):
        assert refusal("m.jsonl", "{}".encode("utf-16")) == "m.jsonl: not UTF-8 text"
        assert refusal("m.jsonl", bytes(LARGEST_METADATA_BYTES + 1)).startswith("m.jsonl: 33,554,433 bytes")

    @given(st.dictionaries(st.from_regex(r"[a-z]{1,8}\.png", fullmatch=True), st.text().filter(str.strip)))
    def test_any_text_comes_back(self, captions):
        rows = [{"file_name": name, "text": caption} for name, caption in captions.items()]
        data = "\n".join(json.dumps(row, ensure_ascii=True) for row in rows).encode()
        assert read_metadata("m.jsonl", data) == captions


class TestCsv:
    def test_rows_become_captions(self):
        data = 'file_name, text ,extra\r\na.png,"a cat, ""asleep""\r\non a mat",1\r\n\r\nb.png,plain\r\nc.png,\r\nd\r\n'
        expected = {"a.png": 'a cat, "asleep"\r\non a mat', "b.png": "plain"}
        assert read_metadata("metadata.csv", data.encode()) == expected
        assert read_metadata("METADATA.CSV", b"\xef\xbb\xbf" + data.encode()) == expected
        assert read_metadata("m.csv", b"") == read_metadata("m.csv", b"file_name,text\n") == {}

    @pytest.mark.parametrize(
        ("data", "wrong"),
        [
            (
                "file_name;text\na;b",
                "m.csv:2: no column `text` or `caption` or `prompt`; its columns are `file_name;text`",
            ),
            ("name,text\na,b", "m.csv:2: no `file_name`; its columns are `name`, `text`"),
            ("file_name,text\na,b\n\nc,d,e", "m.csv:4: 3 cells under 2 columns"),
            ("file_name,text\na,b\na,c", "m.csv:3: `a` is in line 2 already"),
            ("text,text\na,b", "m.csv:1: two columns of one name"),
            ('file_name,text\na,"b', "m.csv:2: unexpected end of data"),
            ('file_name,text\na,"b"c', "m.csv:2: ',' expected after '\"'"),
            ("file_name,text\na," + "x" * 200_000, "m.csv:2: field larger than field limit (131072)"),
        ],
    )
    def test_mistakes_name_their_line(self, data, wrong):
        assert refusal("m.csv", data) == wrong

    def test_the_limit_of_others_is_left_alone(self):
        before = csv.field_size_limit()
        read_metadata("m.csv", b"file_name,text\na,b")
        assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
@given(data=st.binary() | st.text().map(lambda text: ("file_name,text\n" + text).encode("utf-8", "replace")))
def test_any_bytes_are_read_or_refused(name, data):
    message = name
    try:
        captions = read_metadata(name, data)
    except DataError as error:
        captions, message = {}, error.message
    assert message.startswith(name)
    assert all(caption.strip() for caption in captions.values())
