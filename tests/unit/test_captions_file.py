from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_ft.data.captions_file import CAPTIONS_FILE, CaptionRow, appending, read_captions
from flux_ft.errors import DataError, StorageError


def row(digest: str, caption: str = "a cat", model: str = "m", mode: str = "general") -> CaptionRow:
    return CaptionRow(digest, f"{digest}.jpg", caption, model, mode)


def write(folder: Path, *rows: CaptionRow) -> None:
    with appending(folder) as append:
        for one in rows:
            append(one)


def test_no_file_is_no_captions(tmp_path: Path) -> None:
    assert read_captions(tmp_path / "never-made", "m", "general") == {}


def test_rows_come_back_and_the_last_one_wins(tmp_path: Path) -> None:
    write(tmp_path / "run", row("a"), row("b", "ein Hund, 狗 \u2028 “x”"))
    write(tmp_path / "run", row("a", "another cat"))
    assert read_captions(tmp_path / "run", "m", "general") == {"a": "another cat", "b": "ein Hund, 狗 “x”"}


def test_only_rows_of_the_mode_and_the_model(tmp_path: Path) -> None:
    write(tmp_path, row("a", "one"), row("b", "two", model="other"), row("c", "three", mode="style"))
    assert read_captions(tmp_path, "m", "general") == {"a": "one"}
    assert read_captions(tmp_path, "auto", "general") == {"a": "one", "b": "two"}
    assert read_captions(tmp_path, "auto", "style") == {"c": "three"}


def test_a_row_is_on_disk_before_the_next(tmp_path: Path) -> None:
    with appending(tmp_path) as append:
        append(row("a"))
        assert read_captions(tmp_path, "m", "general") == {"a": "a cat"}


def test_a_torn_row_is_ignored_and_then_overwritten_wherever_it_was_cut(tmp_path: Path) -> None:
    write(tmp_path, row("a"), row("b", "ein Käfer"))
    whole = (tmp_path / CAPTIONS_FILE).read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / CAPTIONS_FILE).write_bytes(whole[:cut])
        # Only the line end was lost of the longest one.
        expected = {"a": "a cat"} | ({"b": "ein Käfer"} if cut == len(whole) - 1 else {})
        assert read_captions(folder, "m", "general") == expected, cut
        write(folder, row("c", "third"))
        assert read_captions(folder, "m", "general") == expected | {"c": "third"}, cut
        assert len((folder / CAPTIONS_FILE).read_bytes().splitlines()) == len(expected) + 1


def test_zeros_after_a_power_cut_are_a_torn_row(tmp_path: Path) -> None:
    write(tmp_path, row("a"))
    with (tmp_path / CAPTIONS_FILE).open("ab") as file:
        file.write(bytes(100))
    write(tmp_path, row("b"))
    assert read_captions(tmp_path, "m", "general") == {"a": "a cat", "b": "a cat"}


@pytest.mark.parametrize("saved", [b"\xef\xbb\xbf%s\r\n\r\n%s", b"\n%s\n%s", b"%s\n%s\n  \n"])
def test_what_editors_do_is_read_and_can_be_added_to(tmp_path: Path, saved: bytes) -> None:
    lines = [json.dumps({**vars(row(name)), "note": "mine"}).encode() for name in ("a", "b")]
    (tmp_path / CAPTIONS_FILE).write_bytes(saved % tuple(lines))
    write(tmp_path, row("c"))
    assert read_captions(tmp_path, "m", "general").keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'digest': 1}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"digest": "a"}', "no text for `name`"),
        (json.dumps(vars(row("a")) | {"caption": None}).encode(), "no text for `caption`"),
        (b'{"digest": "\xff"}', "not UTF-8"),
        (json.dumps(vars(row("a", "half \ud83d"))).encode(), "not UTF-8"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, line: bytes, reason: str) -> None:
    write(tmp_path, row("a"))
    with (tmp_path / CAPTIONS_FILE).open("ab") as file:
        file.write(line + b"\n")
    write(tmp_path, row("b"))
    with pytest.raises(DataError) as caught:
        read_captions(tmp_path, "m", "general")
    assert f"{CAPTIONS_FILE}:2: " in caught.value.message
    assert reason in caught.value.message
    assert "delete" in (caught.value.hint or "")


def test_a_mistake_in_an_edited_last_line_is_told_and_not_dropped(tmp_path: Path) -> None:
    (tmp_path / CAPTIONS_FILE).write_text('{"digest": "a", "caption": "my words}', encoding="utf-8")
    with pytest.raises(DataError):
        read_captions(tmp_path, "m", "general")


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    write(tmp_path, CaptionRow("a", "caf\udce9.jpg", "a cat", "m", "general"))
    assert read_captions(tmp_path, "m", "general") == {"a": "a cat"}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"), appending(tmp_path / "file"):
        pass


def test_the_callers_own_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError), appending(tmp_path):
        raise TimeoutError("somebody else's")


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with appending(tmp_path) as append:
            append(row("a"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
            with pytest.raises(StorageError, match=CAPTIONS_FILE):
                append(row("b", "long" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_captions(tmp_path, "m", "general") == {"a": "a cat"}


def test_of_several_processes_one_describes_and_the_others_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_ft.train import captions

    checked = SimpleNamespace(variant=None, report=None)
    monkeypatch.setattr(captions, "uncaptioned", lambda *_: ["a picture"])
    monkeypatch.setattr(captions, "describe", lambda *_, **__: pytest.fail("described a second time"))
    monkeypatch.setattr(captions, "check_run", lambda _: "read again")
    assert captions.with_captions(None, checked, describes=False) == "read again"  # type: ignore[arg-type]
