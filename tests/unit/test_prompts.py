"""Prompt files: three forms, one list of requests, and every mistake with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flux_ft.errors import ConfigError
from flux_ft.infer import prompts
from flux_ft.infer.prompts import parse_lora, read_requests
from flux_ft.infer.tasks import Fill, TextToImage, Ultra


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a picture, a mask, two LoRAs and a checkpoint."""
    for name in ("in.png", "mask.png", "a.safetensors", "b:0.5.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step-000100").mkdir()
    return tmp_path


def read(folder: Path, name: str, content: str | bytes, **defaults: Any) -> list[Any]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_requests(path, defaults)


def refused(folder: Path, name: str, content: str | bytes, **defaults: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, name, content, **defaults)
    assert caught.value.hint or "strength" in caught.value.message
    told = f"{caught.value.message} | {caught.value.hint}"
    assert told.isprintable()
    return told.replace(f"{folder}/", "")


def test_plain_text_is_a_prompt_a_line(folder: Path) -> None:
    made = read(folder, "p.txt", "\ufeff a cat, red\r\n\r\n# not this\rein Stern \u2028 日本\n", seed=7)
    assert [one.prompt for one in made] == ["a cat, red", "ein Stern \u2028 日本"]
    assert {one.seed for one in made} == {7}


def test_the_three_forms_say_the_same(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": 'a "big", red cat', "seed": 3, "guidance": 2.5},
        {"task": "fill", "prompt": "x", "image": "in.png", "mask": "mask.png", "loras": ["a.safetensors:-0.5"]},
        {"task": "ultra", "raw": True, "aspect_ratio": "21:9"},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    table = (
        "prompt,seed,guidance,task,image,mask,loras,raw,aspect_ratio,\r\n"
        '"a ""big"", red cat",3,2.5,,,,,,\r\n,,,,,,,,\r\n'
        "x,,,fill,in.png, mask.png ,a.safetensors:-0.5\r\n,,,ultra,,,,true,21:9,\r\n"
    )
    made = read(folder, "p.jsonl", lines)
    assert made == read(folder, "p.csv", table) == read(folder, "p.CSV", "\ufeff" + table)
    assert [type(one) for one in made] == [TextToImage, Fill, Ultra]
    assert made[1].image == folder / "in.png"
    assert (made[1].loras[0].file, made[1].loras[0].strength) == (folder / "a.safetensors", -0.5)


def test_a_row_wins_over_the_command_line_and_null_gives_the_fields_own_default(folder: Path) -> None:
    lines = '{"seed": 1, "loras": []}\n{"seed": null}\n"words"\n'
    made = read(folder, "p.jsonl", lines, seed=9, steps=4, loras=[{"file": Path("z")}])
    assert [one.seed for one in made] == [1, 0, 9]
    assert [len(one.loras) for one in made] == [0, 1, 1]
    assert {one.steps for one in made} == {4}


def test_a_default_acts_where_the_task_has_it_and_must_act_somewhere(folder: Path) -> None:
    lines = '{"task": "fill", "image": "in.png"}\n"a cat"\n'
    assert read(folder, "p.jsonl", lines, width=64)[1].width == 64
    assert "`width` is of no use" in refused(folder, "p.jsonl", lines.splitlines()[0], width=64)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_spreadsheets_of_every_country(folder: Path, separator: str) -> None:
    made = read(folder, "p.csv", f"prompt{separator}seed{separator}steps\n\ncat{separator}5{separator}28.0\n")
    assert (made[0].prompt, made[0].seed, made[0].steps) == ("cat", 5, 28)


@pytest.mark.parametrize(
    ("value", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        ({"file": "step-000100", "strength": -2}, "step-000100", -2.0),
        ("b:0.5.safetensors", "b:0.5.safetensors", 1.0),
    ],
)
def test_a_lora_in_every_spelling(folder: Path, value: Any, file: str, strength: float) -> None:
    found = parse_lora(value, "", folder)
    assert (found.file, found.strength) == (folder / file, strength)


def test_several_loras_in_a_cell(folder: Path) -> None:
    for cell in (
        "a.safetensors:0.8; step-000100",
        "a.safetensors:0.8|step-000100",
        '"[{""file"": ""a.safetensors"", ""strength"": 0.8}, ""step-000100""]"',
    ):
        made = read(folder, "p.csv", f"prompt,loras\nx,{cell}\n")
        assert [(one.file.name, one.strength) for one in made[0].loras] == [("a.safetensors", 0.8), ("step-000100", 1)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.md", "x", ["p.md", ".txt, .jsonl, .csv"]),
        ("p.txt", "", ["p.txt: holds no prompt"]),
        ("p.txt", "\n# all\n", ["p.txt: holds no prompt"]),
        ("p.txt", b"ok\n\xff\xfeno\n", ["p.txt:2", "UTF-8"]),
        ("p.txt", "cat\n".encode("utf-16"), ["p.txt:1", "UTF-8"]),
        ("p.txt", "ok\na\0b", ["p.txt:2", "UTF-8"]),
        ("p.jsonl", '"a"\n{"prompt": "x",}\n', ["p.jsonl:2", "not JSON, at character"]),
        ("p.jsonl", '\n{"prompt": "x"\n}', ["p.jsonl:2", "whole on its line"]),
        ("p.jsonl", "[1]", ["p.jsonl:1", "is [1]", "expected an object"]),
        ("p.jsonl", '{"sed": 3}', ["p.jsonl:1", "no `sed`", "did you mean `seed`?"]),
        ("p.jsonl", '{"seed": 1, "seed": 2}', ["p.jsonl:1", "'seed' is there twice"]),
        ("p.jsonl", '{"guidance": NaN}', ["p.jsonl:1", "NaN"]),
        ("p.jsonl", '{"seed": "many"}', ["p.jsonl:1", "`seed` is 'many'", "whole number"]),
        ("p.jsonl", '{"finetune_strength": 3}', ["p.jsonl:1", "`finetune_strength` is 3"]),
        ("p.jsonl", '{"prompt": "\\ud800"}', ["p.jsonl:1", "not JSON"]),
        ("p.jsonl", '{"\\u001b[2J": 1}', ["p.jsonl:1", "\\x1b[2J"]),
        ("p.jsonl", "[" * 100_000, ["p.jsonl:1", "not JSON"]),
        ("p.jsonl", "9" * 5000, ["p.jsonl:1", "not JSON"]),
        ("p.jsonl", '{"task": ["fill"]}', ["p.jsonl:1", "`task` is ['fill']", "text-to-image, remix"]),
        ("p.jsonl", '{"task": "fill", "image": "no.png"}', ["p.jsonl:1", "`image`", "no.png", "relative to that"]),
        ("p.jsonl", '{"task": "fill", "image": "a\\u0000b"}', ["p.jsonl:1", "`image`"]),
        ("p.jsonl", '{"task": "fill"}', ["p.jsonl:1", "fill needs `image`"]),
        ("p.jsonl", '{"loras": [3]}', ["p.jsonl:1", "3 is no LoRA", "FILE:0.8"]),
        ("p.jsonl", '{"loras": ["a.safetensors", "a.safetensors:9"]}', ["p.jsonl:1", "`loras.1.strength` is 9"]),
        ("p.jsonl", '{"loras": "a.safetensors:much"}', ["p.jsonl:1", "'much' is not a strength"]),
        ("p.jsonl", '{"loras": "none.safetensors"}', ["p.jsonl:1", "`loras`", "none.safetensors"]),
        ("p.jsonl", json.dumps({"task": "remix", "image_prompt": "x" * 300}), ["p.jsonl:1", "`image_prompt`"]),
        ("p.csv", "prompt,seed\nx,1\nx,1.5\n", ["p.csv:3", "`seed` is '1.5'"]),
        ("p.csv", 'prompt,seed\n"two\nlines",1\nx,y\n', ["p.csv:4", "`seed` is 'y'"]),
        ("p.csv", "prompt,steps\nx,101\n", ["p.csv:2", "`steps` is '101'"]),
        ("p.csv", "prompt,guidence\nx,1\n", ["p.csv:2", "`guidence`", "did you mean `guidance`?"]),
        ("p.csv", "prompt,seed,seed\n", ["p.csv:1", "'seed' is there twice"]),
        ("p.csv", "a red cat\na blue dog\n", ["p.csv:1", "names no field", "prompt, seed"]),
        ("p.csv", "prompt,seed\na cat, red,1\n", ["p.csv:2", "3 cells", "2 columns", "quotes"]),
        ("p.csv", "prompt,,seed\nx,y,1\n", ["p.csv:2", "column 2 has no name"]),
        ("p.csv", 'prompt,seed\n"open,1\n', ["p.csv:2", "quotes"]),
        ("p.csv", "prompt,seed\n", ["p.csv: holds no prompt"]),
        ("p.csv", 'prompt,loras\nx,"[1"\n', ["p.csv:2: `loras`", "not JSON"]),
        ("p.csv", "prompt,guidance\nx," + "9" * 200_000 + "\n", ["p.csv:2", "field limit"]),
    ],
)
def test_every_mistake_has_its_line_and_a_way_out(
    folder: Path, name: str, content: str | bytes, told: list[str]
) -> None:
    words = refused(folder, name, content)
    assert [one for one in told if one not in words] == []
    assert len(words) < 600


def test_what_is_no_file_is_told(folder: Path) -> None:
    for path in (folder / "none.txt", folder / "nul\0.txt", folder):
        with pytest.raises(ConfigError):
            read_requests(path, {})
    (folder / "dir.txt").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requests(folder / "dir.txt", {})


def test_too_many_rows_and_too_large_a_file_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST_ROWS", 2)
    assert len(read(folder, "p.txt", "a\nb\n")) == 2
    assert "p.txt:3: more than 2 rows" in refused(folder, "p.txt", "a\nb\nc\n")
    monkeypatch.setattr(prompts, "LARGEST_FILE_BYTES", 3)
    assert "p.txt: is larger" in refused(folder, "p.txt", "a\nb\n")
