"""The run file: what is read, what is refused and in which words, and what goes back out."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flux_ft.config import (
    INEFFECTIVE,
    RunConfig,
    Section,
    SourceConfig,
    ineffective_settings,
    json_schema,
    section_classes,
    setting_keys,
    setting_schemas,
    slugify,
)
from flux_ft.errors import ConfigError, InputError
from flux_ft.runfile import ALIASES, MOST_TOLD, LoadedRun, dump_run, load_run, suggestion

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "run.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(text: str | bytes, *overrides: str) -> LoadedRun:
    return load_run(write(text), overrides)


def run_of(**fields: Any) -> RunConfig:
    return RunConfig.model_validate({"data": "pics", **fields})


def refusal(text: str | bytes, *overrides: str) -> tuple[str, str]:
    """(message, hint) of the error that the text meets."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.message, caught.value.hint or ""


# --- defaults and derived values ---------------------------------------------------------------------------------


def test_one_line_is_a_run_and_the_rest_is_the_hosted_apis_default() -> None:
    loaded = load("data: pics\n")
    config = loaded.config
    assert loaded.given == {"data.path"}
    assert config == run_of()
    assert (config.model, config.mode, config.trigger_word, config.captioning) == ("flux1-dev", "general", "TOK", True)
    assert (config.finetune_type, config.lora_rank, config.iterations, config.seed) == ("full", 32, 300, 0)
    assert (config.priority, config.learning_rate, config.finetune_comment) == ("quality", None, "")
    assert config.allow_distilled is False
    assert (config.data.path, config.data.max_pixels) == ("pics", None)


def test_section_defaults() -> None:
    config = run_of()
    assert config.lora.model_dump() == {"alpha": None, "targets": "blocks", "dropout": 0.0}
    assert config.full.model_dump() == {"train": "blocks", "rounding": "stochastic"}
    assert (config.optim.name, config.optim.betas) == ("auto", (0.9, 0.99))
    assert (config.optim.ema_decay, config.optim.ema_every) == (None, 10)
    assert (config.optim.batch_size, config.optim.accumulate, config.optim.max_grad_norm) == (1, 1, 1.0)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("constant", 0)
    assert (config.memory.base_precision, config.memory.recompute) == ("auto", "auto")
    assert (config.memory.fused_backward, config.memory.stream_blocks) == (None, "auto")
    assert (config.speed.fused_lora, config.speed.fused_attention, config.speed.fp8_compute) == (True, True, False)
    assert (config.speed.attention, config.speed.compile) == ("auto", "auto")
    assert (config.preview.every, config.preview.prompts, config.preview.seed) == (100, (), 0)
    assert (config.validation.every, config.validation.fraction) == (50, 0.0)
    assert (config.checkpoint.every, config.checkpoint.keep) == (100, 2)
    assert (config.export.formats, config.export.dtype) == (("diffusers", "kohya"), "bf16")
    assert config.export.keep_full is False
    assert config.logging.trackers == ()
    assert (config.determinism, config.data.workers, config.optim.spike_factor) == ("auto", 2, None)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({"finetune_type": "full"}, 1e-5),
        ({"finetune_type": "lora"}, 1e-4),
        ({"finetune_type": "lora", "learning_rate": 3e-4}, 3e-4),
    ],
)
def test_learning_rate_follows_the_kind_of_fine_tune(fields: dict[str, Any], rate: float) -> None:
    assert run_of(**fields).resolved_learning_rate == rate


@pytest.mark.parametrize(
    ("fields", "folder"),
    [
        ({"finetune_comment": "My Cat, no. 2!"}, "runs/my-cat-no-2"),
        ({"finetune_comment": "Größe 猫"}, "runs/größe-猫"),
        ({"finetune_comment": "../../etc"}, "runs/etc"),
        ({"finetune_comment": "!!!", "data": "a/Cats.zip"}, "runs/cats"),
        ({"data": "hf:owner/My_Cats"}, "runs/my-cats"),
        ({"data": "pics/v1.5"}, "runs/v1-5"),
        ({"data": "hf:owner/My_Cats@refs/pr/1:small"}, "runs/my-cats"),
        ({"data": "a/Cats.Parquet"}, "runs/cats"),
        ({"data": {"sources": ["a/Cats.zip", "b"]}}, "runs/cats"),
        ({"data": "/"}, "runs/run"),
        ({"finetune_comment": "cat", "output": "elsewhere/x"}, "elsewhere/x"),
    ],
)
def test_output_dir(fields: dict[str, Any], folder: str) -> None:
    assert run_of(**fields).output_dir == Path(folder)


def test_output_dir_of_the_current_folder_has_its_name(tmp_path: Path) -> None:
    assert run_of(data=".").output_dir == Path("runs") / slugify(tmp_path.name)


@given(st.text())
def test_a_slug_is_one_plain_path_part(text: str) -> None:
    slug = slugify(text)
    assert len(slug) <= 60
    assert not re.search(r"[/\\.\s\x00]", slug)
    assert slugify(slug) == slug


def test_a_config_is_frozen() -> None:
    config = run_of()
    with pytest.raises(ValidationError):
        config.iterations = 5
    assert hash(config) == hash(run_of())


# --- YAML 1.2 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5", 0.5), ("3", 3), ("+2e0", 2)]
)
def test_numbers_are_numbers(written: str, value: float) -> None:
    assert load(f"data: x\nlearning_rate: {written}\n").config.learning_rate == value


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "N", "1:30", "2024-01-01", "=", "<<", "0b1", "1_000"])
def test_words_that_older_yaml_bends_stay_text(word: str) -> None:
    assert load(f"data: x\ntrigger_word: {word}\n").config.trigger_word == word


def test_words_stay_text_in_lists_too() -> None:
    assert load("data: x\npreview: {prompts: [no, on, a cat]}\n").config.preview.prompts == ("no", "on", "a cat")


def test_a_section_with_everything_commented_out_is_fine() -> None:
    loaded = load("data: x\nlora:\n  # alpha: 3\n")
    assert loaded.config == run_of(data="x")
    assert loaded.given == {"data.path"}


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    assert load(b"\xef\xbb\xbfdata: x\r\nlora_rank: 8\r\n").config.lora_rank == 8


def test_a_request_body_of_the_hosted_api_is_a_run_file() -> None:
    body = {
        "finetune_comment": "cat", "mode": "character", "trigger_word": "😀", "iterations": 300, "priority": "speed",
        "captioning": True, "lora_rank": 16, "learning_rate": None, "finetune_type": "lora",
        "webhook_url": "https://example.org/hook", "webhook_secret": "hush",
    }  # fmt: skip
    loaded = load(json.dumps(body, indent=1), "data=pics")
    assert loaded.config.trigger_word == "😀"
    assert "hush" not in repr(loaded) + dump_run(loaded.config) + " ".join(loaded.warnings)
    assert [warning.split("`")[1] for warning in loaded.warnings] == [
        "webhook_url",
        "webhook_secret",
    ]
    assert load('{"data": "x", "webhook_url": null}').warnings == []


# --- where the pictures are --------------------------------------------------------------------------------------


def test_data_is_looked_for_beside_the_run_file_then_here() -> None:
    path = write("data: pics\n", "jobs/run.yaml")
    assert load_run(path).config.data.path == "pics"
    Path("jobs/pics").mkdir()
    assert load_run(path).config.data.path == str(Path("jobs/pics"))
    assert load_run(path, ["data=pics"]).config.data.path == "pics"
    write("data: {path: ../jobs/pics}\n", "jobs/run.yaml")
    assert load_run(path).config.data.path == str(Path("jobs/pics"))


def test_data_from_the_hub_and_from_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/someone")
    monkeypatch.setenv("USERPROFILE", "/srv/someone")
    assert load("data: hf:owner/name\n").config.data.path == "hf:owner/name"
    assert load("data: ~/pics\n").config.data.path == "/srv/someone/pics"
    assert load("data: /abs/pics\n").config.data.path == "/abs/pics"
    assert load(f"data: {'x' * 5000}\n").config.data.path == "x" * 5000


def test_each_source_is_looked_for_beside_the_run_file_then_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/someone")
    monkeypatch.setenv("USERPROFILE", "/srv/someone")
    Path("jobs").mkdir()
    Path("jobs/a.zip").touch()
    Path("jobs/b").mkdir()
    path = write(
        "data: {path: b, sources: [a.zip, {path: c}, hf:b, ~/d, {path: ./b/../b, limit: 1}]}\n", "jobs/run.yaml"
    )
    assert [source.path for source in load_run(path, ["data.sources[4].split=test"]).config.data.all_sources] == [
        str(Path("jobs/b")), str(Path("jobs/a.zip")), "c", "hf:b", "/srv/someone/d", str(Path("jobs/b")),
    ]  # fmt: skip
    assert load_run(path, ["data.sources=[b]", "data.path=c"]).config.data.sources[0].path == "b"


# --- files that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        ("", "run.yaml: ", "empty"),
        ("# only a comment\n", "run.yaml: ", "empty"),
        ("- a\n- b\n", "run.yaml:1: ", "it is a list"),
        ("\ndata:pics\n", "run.yaml:2: ", "the text `data:pics`"),
        ("data: x\nlora:\n\talpha: 3\n", "run.yaml:3: ", "a tab is used to indent"),
        ("data: x\nmodel: a: b\n", "run.yaml:2: ", "not valid YAML"),
        ("data: x\ntrigger_word: @cat\n", "run.yaml:2: ", "not valid YAML"),
        ("data: x\nlora: {alpha: 3\n", "run.yaml:2: ", "not valid YAML"),
        ("data: x\n---\ndata: y\n", "run.yaml:2: ", "another document"),
        ("data: &a x\nmodel: *a\n", "run.yaml:2: ", "aliases"),
        ("data: x\nmodel: a\x01b\n", "run.yaml:2: ", "U+0001"),
        ('data: x\nmodel: "\\U00110000"\n', "run.yaml:2: ", "an escape names no character"),
        ('data: x\nmodel: "\\UFFFFFFFF"\n', "run.yaml:2: ", "an escape names no character"),
        ("[" * 5000, "run.yaml:1: ", "nested too deeply"),
        (b"model: x\ndata: caf\xe9\n", "run.yaml:2: ", "not UTF-8"),
        ("data: x\n".encode("utf-16"), "run.yaml:1: ", "not UTF-8"),
        ("# " + "x" * 1_000_000, "run.yaml: ", "too large"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message_with_its_line(content: str | bytes, where: str, words: str) -> None:
    message, hint = refusal(content)
    assert message.startswith(where)
    assert words in message
    assert "\n" not in message
    assert hint


def test_a_missing_file_and_a_folder() -> None:
    with pytest.raises(InputError, match=r"^nowhere\.yaml: no such file"):
        load_run(Path("nowhere.yaml"))
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match=r"^folder: this is a folder"):
        load_run(Path("folder"))


def test_tags_build_nothing() -> None:
    message, _ = refusal("data: x\nmodel: !!python/object/apply:os.getcwd []\nseed: !!int 'x'\n")
    assert "run.yaml:2: `model`" in message
    assert "run.yaml:3: `seed` has the tag" in message
    assert all("has the tag" in refusal(f"data: x\nseed: {tag} x\n")[0] for tag in ("!!int", "!!float", "!!null"))
    assert "`captioning` has the tag" in refusal("data: x\ncaptioning: !!bool yes\n")[0]
    assert "`lora` has the tag `!x`" in refusal("data: x\nlora: !x {alpha: 3}\n")[0]
    assert "`preview.prompts` has the tag `!x`" in refusal("data: x\npreview: {prompts: !x [a]}\n")[0]


# --- keys --------------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_file_line_key_and_the_nearest() -> None:
    message, hint = refusal("data: x\n\nlora:\n  alpha: 3\n  dropuot: 0.1\n")
    assert message == "run.yaml:5: `lora.dropuot` is not a known key"
    assert hint == "did you mean `lora.dropout`?"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lora.rnak", "`lora_rank`"),
        ("lora.rank", "`lora_rank`"),
        ("rank", "`lora_rank`"),
        ("lora_rnk", "`lora_rank`"),
        ("--lora-rank", "`lora_rank`"),
        ("LoraRank", "`lora_rank`"),
        ("lr", "`learning_rate`"),
        ("optim.lr", "`learning_rate`"),
        ("steps", "`iterations`"),
        ("preview.step", "`preview.steps`"),
        ("resolution", "`data.resolutions`"),
        ("data.resolution", "`data.resolutions`"),
        ("num_repeats", "`data.repeats`"),
        ("batch_size", "`optim.batch_size`"),
        ("captioner.batchsize", "`captioner.batch_size`"),
        ("data.sources[2].repeat", "`data.sources[2].repeats`"),
        ("data.sources[2].max_pixel", "`data.max_pixels`"),
        ("data.sources[2].xyz", "`data.sources[2]` has the keys `path`, `repeats`"),
        ("seed_", "did you mean `seed`?"),
        ("weight_decay", "`optim.weight_decay`"),
        ("optimiser", "`optim`"),
        ("gradient_checkpointing", "`memory.recompute`"),
        ("blocks_to_swap", "`memory.stream_blocks`"),
        ("fused_backward_pass", "`memory.fused_backward`"),
        ("ema", "`optim.ema_decay`"),
        ("full.targets", "`lora.targets`"),
        ("file_data", "`data`"),
        ("every", "`preview.every`, `validation.every` or `checkpoint.every`"),
        ("checkpoint.xyz", "`checkpoint` has the keys `every`, `keep`"),
        ("xyz", "the keys at the top level are `model`, `model_parts`, `data`"),
        ("lora.alpha", "write it as a section: `lora: {alpha: …}`"),
    ],
)
def test_nearest_key(key: str, nearest: str) -> None:
    assert nearest in suggestion(key)


def test_every_alias_leads_to_a_key_that_exists() -> None:
    assert set(ALIASES.values()) <= {*setting_keys(), *section_classes()}
    assert not set(ALIASES) & set(setting_keys())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\nmode: style\ndata: y\n", "run.yaml:3: `data` is given twice, first at run.yaml:1"),
        ("data: x\nlora:\n  alpha: 1\n  alpha: 2\n", "run.yaml:4: `lora.alpha` is given twice, first at run.yaml:3"),
        ("data: x\nlora: {}\nlora: {}\n", "run.yaml:3: `lora` is given twice, first at run.yaml:2"),
    ],
)
def test_a_key_given_twice_names_both_lines(text: str, message: str) -> None:
    assert refusal(text)[0] == message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: x\n", "run.yaml: `data` is missing"),
        ("data:\n", "run.yaml: `data` is missing"),
        ("data: {}\n", "run.yaml: `data` is missing"),
        ("model: x\ndata: {max_pixels: 5000}\n", "run.yaml:2: `data` has neither `path` nor any `sources`"),
        ("data: {sources: []}\n", "run.yaml:1: `data` has neither `path` nor any `sources`"),
        ("data:\n  sources:\n  path: null\n", "run.yaml:2: `data.sources` is left empty; expected a list"),
    ],
)
def test_data_is_required(text: str, told: str) -> None:
    message, hint = refusal(text)
    assert message.startswith(told)
    assert "data: my-pictures" in hint or "leave it out" in hint


@pytest.mark.parametrize(
    ("item", "line", "told", "hint"),
    [
        ("path: b\n      repaets: 2", 5, ".repaets` is not a known key", "[1].repeats`"),
        ("path: b\n      max_pixels: 9", 5, ".max_pixels` is not a known", "`data.max_pixels`"),
        ("path: b\n      repeats: 0", 5, ".repeats` is `0`; expected a whole number from 1 to 1000", ""),
        ("path: b\n      weight: '2'", 5, ".weight` is `'2'`; expected a number from 0.001 to 1000", "[1].weight: 2`"),
        ("path: b\n      limit: 1.5", 5, ".limit` is `1.5`; expected a whole number from 1", ""),
        ("path: b\n      streaming: yes", 5, ".streaming` is `yes`; expected true", "[1].streaming: true`"),
        ("path: b\n      split: null", 5, ".split` is `null`; expected text", '`"train"`'),
        ("path: b\n      path: c", 5, ".path` is given twice, first at run.yaml:4", "remove one"),
        ("path: null", 4, ".path` is `null`; expected text that is not empty", "no default"),
        ("path: [b]", 4, ".path` is `[b]`; expected text that is not empty", ""),
        ("path: ''", 4, ".path` is `''`; expected text that is not empty", ""),
        ("repeats: 2", 4, ".path` is missing", "path: my-pictures"),
        ("{}", 4, ".path` is missing", "path: my-pictures"),
        ("", 4, ".path` is missing", "path: my-pictures"),
        ("2024", 4, "` is `2024`; expected text that is not empty", '`data.sources[1]: "2024"`'),
        ("[b, c]", 4, "` is `[b, c]`; expected text", "an item of its own"),
        ("!x b", 4, "` has the tag `!x`", "remove the tag"),
        ("./a", 4, "` reads the same pictures as `data.sources[0]`", "`data.sources[0].repeats`"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_source_is_told_with_its_own_line_and_name(item: str, line: int, told: str, hint: str) -> None:
    message, way_out = refusal(f"data:\n  sources:\n    - a\n    - {item}\n    - c\n")
    assert message.startswith(f"run.yaml:{line}: `data.sources[1]{told}")
    assert "\n" not in message
    assert hint in way_out


def test_mistakes_in_several_sources_are_told_in_reading_order() -> None:
    message, _ = refusal(
        "data:\n  sources:\n    - {path: a, repeats: 0}\n    - 3\n    - {rows: 2}\n  path: ''\nmode: x\n"
    )
    assert [line.split("`")[:2] for line in message.splitlines()[1:]] == [
        ["run.yaml:3: ", "data.sources[0].repeats"],
        ["run.yaml:4: ", "data.sources[1]"],
        ["run.yaml:5: ", "data.sources[2].rows"],
        ["run.yaml:5: ", "data.sources[2].path"],
        ["run.yaml:6: ", "data.path"],
        ["run.yaml:7: ", "mode"],
    ]


def test_of_very_many_mistakes_the_first_are_told() -> None:
    message, _ = refusal("data: x\n" + "".join(f"key{index}: 1\n" for index in range(5000)))
    first, *lines, last = message.splitlines()
    assert (first, last, len(lines)) == ("5000 mistakes", f"and {5000 - MOST_TOLD} more", MOST_TOLD)
    assert lines[0].startswith("run.yaml:2: ")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('data: x\n"\\e[31mred": 1\n', "`U+001B[31mred`"),
        ('"\\e]0;title\\a"\n', "the text `U+001B]0;titleU+0007`"),
        ("data: x\nmode: \u202egnp.tac\n", "`U+202Egnp.tac`"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_its_number(text: str, shown: str) -> None:
    message, hint = refusal(text)
    assert shown in message
    assert (message + hint).isprintable()


@pytest.mark.parametrize("escape", ["\\0", "\\ud83d", "\\uDC00 b"])
def test_what_no_file_can_hold_is_refused(escape: str) -> None:
    assert "is not a character of any text" in refusal(f'data: x\ntrigger_word: "{escape}"\n')[0]


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("trigger_word: 007", "`trigger_word` is `007`; expected text", '`trigger_word: "007"`'),
        ("trigger_word: true", "`trigger_word` is `true`; expected text", '`trigger_word: "true"`'),
        ("trigger_word: null", "`trigger_word` is `null`; expected text", '`trigger_word: "null"`'),
        ("trigger_word:", "`trigger_word` is left empty; expected text", '`"TOK"`'),
        ("trigger_word: [V]", "`trigger_word` is `[V]`; expected text", '`trigger_word: "[V]"`'),
        ("output: 2024", "`output` is `2024`; expected text", '`output: "2024"`'),
        ("model: ''", "`model` is `''`; expected text that is not empty", ""),
        ("captioning: no", "`captioning` is `no`; expected true or false", "write `captioning: false`"),
        ("captioning: Off", "`captioning` is `Off`; expected true or false", "write `captioning: false`"),
        ("captioning: 'yes'", "`captioning` is `'yes'`; expected true or false", "write `captioning: true`"),
        ("captioning: 1", "`captioning` is `1`; expected true or false", ""),
        ("lora_rank: 0", "`lora_rank` is `0`; expected a whole number from 1 to 256", ""),
        ("lora_rank: 257", "`lora_rank` is `257`; expected a whole number from 1 to 256", ""),
        ("lora_rank: 16.0", "`lora_rank` is `16.0`; expected a whole number", ""),
        ("lora_rank: true", "`lora_rank` is `true`; expected a whole number", ""),
        ("iterations: '300'", "`iterations` is `'300'`; expected a whole number from 1 to 999999", "`iterations: 300`"),
        ("iterations: 1_000", "`iterations` is `1_000`; expected a whole number", "write `iterations: 1000`"),
        ("iterations: null", "`iterations` is `null`; expected a whole number", "to use the default, `300`"),
        (f"seed: {'9' * 5000}", "expected a whole number from 0 to", ""),
        ("learning_rate: 0", "`learning_rate` is `0`; expected a number above 0 or null", ""),
        ("learning_rate: .inf", "`learning_rate` is `.inf`; expected a number above 0 or null", ""),
        ("learning_rate: .nan", "`learning_rate` is `.nan`; expected a number above 0 or null", ""),
        ("mode: Charakter", "expected one of `character`, `product`, `style`, `general`", "did you mean `character`?"),
        ("mode: 3", "`mode` is `3`; expected one of `character`", ""),
        ("schedule: {name: cosin}", "`schedule.name` is `cosin`", "did you mean `cosine`?"),
        ("optim: {name: sgd}", "`optim.name` is `sgd`; expected one of `auto`, `adamw`, `adamw8bit`", ""),
        ("optim: {name: adafacto}", "`optim.name` is `adafacto`", "did you mean `adafactor`?"),
        ("optim: {ema_decay: 1}", "`optim.ema_decay` is `1`; expected a number", ""),
        ("optim: {ema_decay: 0}", "`optim.ema_decay` is `0`; expected a number above 0", ""),
        ("optim: {ema_every: 0}", "`optim.ema_every` is `0`; expected a whole number of at least 1", ""),
        ("full: {train: some}", "`full.train` is `some`; expected one of `blocks`, `all`, `attention` or a list", ""),
        ("full: {train: []}", "expected one of `blocks`, `all`, `attention` or a list of at least one", ""),
        ("full: {train: [a, '(']}", "`full.train`: `(` is not a regular expression", ""),
        ("full: {rounding: nearest}", "expected one of `stochastic`, `kahan`, `master`", ""),
        ("full: {trian: all}", "`full.trian` is not a known key", "did you mean `full.train`?"),
        ("full: all", "`full` is `all`, but it is a section with the keys `train`, `rounding`", "full.train=…"),
        ("memory: {recompute: true}", "`memory.recompute` is `true`; expected one of `auto`, `none`, `selective`", ""),
        ("memory: {recompute: null}", "`memory.recompute` is `null`; expected one of `auto`, `none`", "`\"auto\"`"),
        ("memory: {recompute: ful}", "`memory.recompute` is `ful`", "did you mean `full`?"),
        ("memory: {fused_backward: 1}", "`memory.fused_backward` is `1`; expected true or false or null", ""),
        ("memory: {stream_blocks: -1}", "`memory.stream_blocks` is `-1`; expected a whole number of at least 0", ""),
        ("memory: {stream_blocks: all}", "`memory.stream_blocks` is `all`; expected a whole number", ""),
        ("export: {keep_full: yes}", "`export.keep_full` is `yes`; expected true or false", "`export.keep_full: true`"),
        ("optim: {betas: [0.9]}", "`optim.betas` is `[0.9]`; expected a list of 2, each a number from 0", ""),
        ("lora: {dropout: 1.0}", "`lora.dropout` is `1.0`; expected a number from 0 to less than 1", ""),
        ("lora: {targets: all}", "expected one of `blocks`, `attention` or a list", ""),
        ("lora: {targets: []}", "expected one of `blocks`, `attention` or a list of at least one", ""),
        ("lora: {targets: [a, '(']}", "`(` is not a regular expression", "module paths"),
        (f"lora: {{targets: ['{'(' * 5000}']}}", "is not a regular expression", "module paths"),
        ("lora: {targets: ['a{1,99999999999}']}", "is not a regular expression", "module paths"),
        ("captioner: {max_tokens: 7}", "expected a whole number from 8 to 1024", ""),
        ("captioner: {batch_size: 0}", "expected a whole number of at least 1", ""),
        ("captioner: {model: ''}", "`captioner.model` is `''`; expected text that is not empty", ""),
        ("captioner: {beside_pictures: on}", "expected true or false", "`captioner.beside_pictures: true`"),
        ("captioner: {modle: a}", "`captioner.modle` is not a known key", "did you mean `captioner.model`?"),
        ("lora: 16", "`lora` is `16`, but it is a section with the keys `alpha`, `targets`, `dropout`", "lora.alpha=…"),
        ("validation: {fraction: 0.6}", "expected a number from 0 to 0.5", ""),
        ("preview: {every: 0}", "`preview.every` is `0`; expected a whole number of at least 1 or null", ""),
        ("preview: {prompts: a cat}", "`preview.prompts` is `a cat`; expected a list", '`preview.prompts: ["a cat"]`'),
        ("preview: {prompts: [3]}", "`preview.prompts` is `[3]`; expected a list, each text", ""),
        ("export: {formats: []}", "expected a list of at least one, each one of `diffusers`, `kohya`", ""),
        ("logging: {trackers: [mlflow]}", "each one of `tensorboard`, `wandb`", ""),
        ("model: {name: x}", "`model` is `{name: x}`; expected text", ""),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_was_given_and_what_is_expected(line: str, message: str, hint: str) -> None:
    told, way_out = refusal(f"data: x\n\n{line}\n")
    assert told.startswith("run.yaml:3: ")
    assert message in told
    assert hint in way_out
    assert "\n" not in told


def test_a_side_given_as_an_area_is_caught() -> None:
    message, hint = refusal("data:\n  path: x\n  max_pixels: 1024\n")
    assert message.startswith("run.yaml:3: `data.max_pixels` is `1024`")
    assert "1048576" in hint


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("repeats: 1001", "expected a whole number from 1 to 1000", ""),
        ("weight: 0", "expected a number from 0.001 to 1000", ""),
        ("caption_column: 3", "expected text that is not empty or null", '`data.caption_column: "3"`'),
        ("image_column: ''", "expected text that is not empty or null", ""),
        ("split: [train]", "expected text that is not empty", ""),
        ("streaming: 1", "expected true or false", ""),
        ("limit: 0", "expected a whole number from 1 to 1000000000000 or null", ""),
        ("sources: more.zip", "expected a list, each text or a section", '`data.sources: ["more.zip"]`'),
        ("sources: {path: more}", "expected a list, each text or a section", "sources: [pictures, {path: more.zip"),
        ("sources: null", "expected a list, each text or a section", "the default, `[]`"),
        ("resolutions: 512", "a list of at least one, each a whole number from 16 to 8192 or null", "[512, 768"),
        ("resolutions: []", "expected a list of at least one", "not areas"),
        ("resolutions: [1048576]", "each a whole number from 16 to 8192 or null", "these are sides, not areas"),
        ("resolutions: [512, 768, 512]", "`data.resolutions`: 512 is given twice", "sides"),
        ("on_bad: ignore", "expected one of `skip`, `stop`", ""),
        ("background: #000000", "is left empty; expected text such as `#ffffff`", "put it into quotes"),
        ("background: white", "`data.background` is `white`; expected text such as `#ffffff`", "`#` starts a comment"),
        ("background: 0", "`data.background` is `0`; expected text such as `#ffffff`", "`#` starts a comment"),
        ("alpha: masks", "expected one of `background`, `mask`", "did you mean `mask`?"),
        ("masks: no", "expected true or false", "write `data.masks: false`"),
        ("unmasked_weight: 1.5", "expected a number from 0 to 1", ""),
        ("caption_dropout: 1", "expected a number from 0 to less than 1", ""),
        ("tag_orders: 0", "expected a whole number from 1 to 64", ""),
        ("resample_latents: null", "expected true or false", "the default, `true`"),
    ],
)  # fmt: skip
def test_a_wrong_data_setting_says_what_is_expected(line: str, message: str, hint: str) -> None:
    told, way_out = refusal(f"data:\n  path: x\n  {line}\n")
    assert told.startswith(f"run.yaml:3: `data.{line.partition(':')[0]}`")
    assert message in told
    assert hint in way_out


def test_several_sources_in_the_place_of_one() -> None:
    message, hint = refusal("data: [a.zip, b.zip]\n")
    assert message == "run.yaml:1: `data` is `[a.zip, b.zip]`; expected text that is not empty"
    assert hint == "write each source as an item of its own: `data: {sources: [pictures, more.zip]}`"


def test_data_as_a_number_is_named_as_it_was_written() -> None:
    assert refusal("data: 2024\n") == (
        "run.yaml:1: `data` is `2024`; expected text that is not empty",
        'put it into quotes to make it text: `data: "2024"`',
    )


def test_a_long_value_is_cut() -> None:
    assert len(refusal(f"data: x\nmode: {'m' * 500}\n")[0]) < 200


def test_all_mistakes_are_told_at_once_in_reading_order() -> None:
    message, hint = refusal("data: x\nlora_rank: 0\nlr: 1\nmode: stile\nseed: 1\nseed: 2\n", "every=3")
    lines = message.splitlines()
    assert lines[0] == "5 mistakes"
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        "run.yaml:2", "run.yaml:3", "run.yaml:4", "run.yaml:6", "command line",
    ]  # fmt: skip
    assert "(did you mean `learning_rate`?)" in lines[2]
    assert "(did you mean `style`?)" in lines[3]
    assert hint == ""


@pytest.mark.parametrize(
    ("text", "line", "keys"),
    [
        ("data: x\nschedule: {warmup_steps: 6}\niterations: 5\n", 2, ("schedule.warmup_steps", "iterations")),
        ("data: x\nvalidation: {fraction: 0.1, every: null}\n", 2, ("validation.fraction", "validation.every")),
        ("data: x\niterations: 9\noptim: {ema_decay: 0.9}\n", 2, ("optim.ema_every", "iterations")),
        (
            "data: x\nfinetune_type: full\noptim: {spike_factor: 9}\nmemory: {fused_backward: true}\n",
            3,
            ("optim.spike_factor", "memory.fused_backward"),
        ),
        (
            "data: x\noptim: {spike_factor: 9}\nprior: {prompts: [a], every: 2}\n",
            3,
            ("prior.every", "optim.spike_factor"),
        ),
        ("data:\n  path: x\n  max_pixels: 9000\n  resolutions: [64, 95]\n", 4, ("data.resolutions", "data.max_pixels")),
    ],
)
def test_a_contradiction_is_one_message_that_names_both_keys(text: str, line: int, keys: tuple[str, ...]) -> None:
    message, hint = refusal(text)
    assert message.startswith(f"run.yaml:{line}: ")
    assert all(f"`{key}`" in message for key in keys)
    assert all(f"`{key}`" in hint for key in keys)
    assert "\n" not in message


FUSED, STREAMED = "memory.fused_backward", "memory.stream_blocks"


@pytest.mark.parametrize(
    ("text", "line", "keys", "way_out"),
    [
        ("optim: {accumulate: 2}\nmemory: {fused_backward: true}", 3, (FUSED, "optim.accumulate"), "accumulate` to 1"),
        ("memory: {stream_blocks: 2, recompute: none}", 2, (STREAMED, "memory.recompute"), "set it to full"),
        ("memory: {stream_blocks: 2, recompute: selective}", 2, (STREAMED, "memory.recompute"), "set it to full"),
        (
            "finetune_type: lora\nmemory: {stream_blocks: 2, recompute: none}", 3,
            (STREAMED, "memory.recompute"), "set it to full",
        ),
        (
            "memory: {stream_blocks: 2}\noptim: {accumulate: 4}", 2,
            (STREAMED, "optim.accumulate"), "`optim.batch_size`",
        ),
        ("memory: {stream_blocks: 2, fused_backward: false}", 2, (STREAMED, FUSED), "`memory.fused_backward` out"),
        ("memory: {stream_blocks: 2}\nfull: {rounding: kahan}", 2, (STREAMED, "full.rounding"), "`full.rounding`"),
        ("full: {rounding: master}\nmemory: {stream_blocks: 2}", 3, (STREAMED, "full.rounding"), "`full.rounding`"),
    ],
)  # fmt: skip
def test_memory_that_cannot_be_saved_together(text: str, line: int, keys: tuple[str, ...], way_out: str) -> None:
    message, hint = refusal(f"data: x\n{text}\n")
    assert message.startswith(f"run.yaml:{line}: ")
    assert all(re.search(f"`{re.escape(key)}[`:]", message) for key in keys)
    assert way_out in hint
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "finetune_type: lora\noptim: {accumulate: 2}\nmemory: {stream_blocks: 2}\n",
        "finetune_type: lora\noptim: {accumulate: 2}\nmemory: {fused_backward: true}\n",
        "finetune_type: lora\nmemory: {stream_blocks: 2, fused_backward: false}\n",
        "optim: {accumulate: 2}\n",
        "optim: {accumulate: 2}\nmemory: {fused_backward: false}\n",
        "memory: {stream_blocks: 2, recompute: full}\n",
        "memory: {stream_blocks: 2, fused_backward: true}\n",
        "memory: {recompute: selective, fused_backward: true}\n",
        "full: {rounding: master}\nmemory: {recompute: full}\n",
    ],
)
def test_what_can_be_meant_together_is_taken(text: str) -> None:
    """Factors of a LoRA stay on the device and are moved after the backward pass, so they may be accumulated."""
    load(f"data: x\n{text}")


def test_two_contradictions_are_both_told() -> None:
    message, _ = refusal(
        "data: x\niterations: 5\nschedule: {warmup_steps: 6}\nvalidation: {fraction: 0.1, every: null}\n"
    )
    assert message.startswith("2 mistakes\nrun.yaml:3: ")
    assert "\nrun.yaml:4: " in message


def test_contradictions_hold_without_a_file_too() -> None:
    with pytest.raises(ValidationError, match="`iterations`"):
        run_of(iterations=5, schedule={"warmup_steps": 6})


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_later_one_last() -> None:
    text = "data: {path: pics, max_pixels: 5000}\nlora: {alpha: 1, dropout: 0.1}\n"
    overrides = ["data=other", "learning_rate=1e-4", "lora.alpha=2", "lora={alpha: 3}", "preview.prompts=[no, b]"]
    loaded = load(text, *overrides, "finetune_type=lora", "finetune_comment=a = b", "preview.every=")
    config = loaded.config
    assert (config.data.path, config.data.max_pixels) == ("other", 5000)
    assert (config.learning_rate, config.lora.alpha, config.lora.dropout) == (1e-4, 3, 0.1)
    assert (config.preview.prompts, config.preview.every) == (("no", "b"), None)
    assert config.finetune_comment == "a = b"
    assert {"learning_rate", "preview.prompts", "data.path", "data.max_pixels"} <= loaded.given


def test_an_override_mends_the_file() -> None:
    assert load("data: x\nlora_rank: 0\n", "lora_rank=8").config.lora_rank == 8


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("lora.rnak=3", "`lora.rnak` is not a known key", "did you mean `lora_rank`?"),
        ("lora={rnak: 3}", "`lora.rnak` is not a known key", "did you mean `lora_rank`?"),
        ("--lora_rank=3", "`--lora_rank` is not a known key", "did you mean `lora_rank`?"),
        ("lora_rank", "`lora_rank` is not an override", "key=value"),
        ("=3", "`=3` is not an override", "key=value"),
        (".lora_rank=3", "`.lora_rank` is not a known key", "did you mean `lora_rank`?"),
        ("lora.=3", "`lora.` is not a known key", ""),
        ("lora_rank=abc", "`lora_rank` is `abc`; expected a whole number from 1 to 256", ""),
        ("captioning=no", "`captioning` is `no`", "captioning: false"),
        ("trigger_word=@cat", "`trigger_word`: the value `@cat` is not valid YAML", "quotes"),
        ("trigger_word=", "`trigger_word` is left empty", "TOK"),
        ("schedule.warmup_steps=999", "`schedule.warmup_steps` is 999", "`iterations`"),
    ],
)
def test_a_wrong_override_is_told_like_a_wrong_line(override: str, message: str, hint: str) -> None:
    told, way_out = refusal("data: x\n", override)
    assert told.startswith("command line: ")
    assert message in told
    assert hint in way_out


def test_overrides_of_sources() -> None:
    text = "data:\n  path: pics\n  sources: [a, {path: b, repeats: 2}]\n"
    written = [("pics", 1), ("a", 1), ("b", 2)]

    def sources(*overrides: str) -> list[tuple[str, int]]:
        return [(source.path, source.repeats) for source in load(text, *overrides).config.data.all_sources]

    assert sources() == written
    assert sources("data.path=c") == sources("data=c") == [("c", 1), *written[1:]]
    assert sources("data.sources=[c, {path: d, repeats: 3}, e]") == [written[0], ("c", 1), ("d", 3), ("e", 1)]
    assert sources("data.sources=[c]") == sources("data={sources: [c]}") == [written[0], ("c", 1)]
    assert sources("data.sources=[]") == written[:1]
    assert sources("data.sources[1].repeats=5") == [*written[:2], ("b", 5)]
    assert sources("data.sources[0]=c", "data.sources[1]={repeats: 4}") == [written[0], ("c", 1), ("b", 4)]
    assert sources("data.sources=[c]", "data.sources[0].repeats=7") == [written[0], ("c", 7)]


def test_an_override_mends_a_source() -> None:
    config = load("data: {sources: [{repeats: 2}, 3]}\n", "data.sources[0].path=a", "data.sources[1]=b").config
    assert [source.path for source in config.data.sources] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("data.sources[2].repeats=3", "`data.sources[2]` is not there: `data.sources` has 2 items", "from 0"),
        ("data.sources[2]=c", "`data.sources[2]` is not there: `data.sources` has 2 items", "data.sources=[…]"),
        ("data.sources[1].repeat=3", "`data.sources[1].repeat` is not a known key", "`data.sources[1].repeats`"),
        ("data.sources[1].repeats=x", "`data.sources[1].repeats` is `x`; expected a whole number from 1", ""),
        ("data.sources[-1].repeats=3", "`data.sources[-1].repeats` is not a known key", ""),
        ("data.sources=[a, {path: c, repeats: 0}]", "`data.sources[1].repeats` is `0`; expected a whole number", ""),
        ("data.sources=c.zip", "`data.sources` is `c.zip`; expected a list, each text or a section", '["c.zip"]'),
    ],
)
def test_a_wrong_override_of_a_source(override: str, message: str, hint: str) -> None:
    told, way_out = refusal("data: {sources: [a, b]}\n", override)
    assert told.startswith(f"command line: {message}")
    assert hint in way_out


# --- settings without effect -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("data: x\n", []),
        ("data: x\nlora: {alpha: 3, dropout: 0.1}\n", ["lora.alpha", "lora.dropout"]),
        ("data: x\nfinetune_type: lora\nlora: {alpha: 3, dropout: 0.1}\n", []),
        (
            "data: x\nfull: {train: all, rounding: kahan}\nmemory: {fused_backward: true}\nexport: {keep_full: true}\n",
            [],
        ),
        (
            "data: x\nfinetune_type: lora\nfull: {train: all, rounding: kahan}\nmemory: {fused_backward: true}\n"
            "export: {keep_full: true}\n",
            ["full.train", "full.rounding", "memory.fused_backward", "export.keep_full"],
        ),
        ("data: x\nfinetune_type: lora\nmemory: {stream_blocks: 2, recompute: full}\n", []),
        ("data: x\noptim: {name: adafactor, betas: [0.9, 0.9], weight_decay: 0.1}\n", ["optim.betas"]),
        ("data: x\noptim: {name: adamw8bit, betas: [0.9, 0.9]}\n", []),
        ("data: x\noptim: {ema_every: 5}\n", ["optim.ema_every"]),
        ("data: x\noptim: {ema_every: 5, ema_decay: 0.99}\n", []),
        ("data: x\noptim: {max_grad_norm: 2.0}\n", []),
        ("data: x\npreview: {every: null, prompts: [a], width: 64}\n", ["preview.prompts", "preview.width"]),
        ("data: x\nvalidation: {every: 10}\n", ["validation.every"]),
        ("data: x\nvalidation: {every: null}\n", []),
        ("data: x\nvalidation: {every: 10, fraction: 0.1}\n", []),
        ("data: x\ncheckpoint: {every: null, keep: 3}\n", ["checkpoint.keep"]),
        ("data: x\niterations: 5\nschedule: {name: cosine, warmup_steps: 5}\n", ["schedule.name"]),
        ("data: x\ncaptioning: false\n", []),
        ("data: x\ncaptioner: {model: a, batch_size: 2, max_tokens: 99}\n", []),
        (
            "data: x\ncaptioning: false\ncaptioner: {model: a, max_tokens: 9}\n",
            ["captioner.model", "captioner.max_tokens"],
        ),
        ("data: .\ncaptioner: {beside_pictures: true}\n", []),
        ("data: hf:a/b\ncaptioner: {beside_pictures: true}\n", ["captioner.beside_pictures"]),
        ("data: {sources: [hf:a/b, .]}\ncaptioner: {beside_pictures: true}\n", []),
        ("data: x\npriority: speed\n", []),
        (
            "data: {path: x, resolutions: [512], max_pixels: 300000}\npriority: speed\n",
            ["priority", "data.max_pixels"],
        ),
        ("data: {path: x, background: '#000000', unmasked_weight: 0.1}\n", []),
        ("data: {path: x, alpha: mask, masks: false, unmasked_weight: 0.1}\n", []),
        ("data: {path: x, alpha: mask, background: '#000000'}\n", ["data.background"]),
        ("data: {path: x, masks: false, unmasked_weight: 0.1}\n", ["data.unmasked_weight"]),
        ("data: {path: x, repeats: 2, weight: 0.5, caption_column: b}\n", []),
        ("data: {sources: [x], repeats: 2, split: b}\n", ["data.repeats", "data.split"]),
        (
            "data: {path: a.zip, image_column: a, split: b, streaming: true, limit: 3, caption_column: c}\n",
            ["data.image_column", "data.split", "data.streaming", "data.limit"],
        ),
        ("data: {path: hf:a/b, image_column: a, split: b, streaming: true, limit: 3}\n", []),
        ("data: {path: a/b.PARQUET, split: b}\n", []),
        (
            "data: {sources: [{path: ., limit: 3}, {path: hf:a/b, limit: 3}, {path: b, split: c}]}\n",
            ["data.sources[0].limit", "data.sources[2].split"],
        ),
        ("data: x\nwebhook_secret: s\n", ["webhook_secret"]),
    ],
)
def test_settings_without_effect_are_warned_about_by_name(text: str, keys: list[str]) -> None:
    warnings = load(text).warnings
    assert [warning.split("`")[1] for warning in warnings] == keys
    assert all(" has no effect: " in warning for warning in warnings)


@pytest.mark.parametrize("name", ["0000.parquet", "data/train-0000.parquet", "dataset_info.json", "dataset_dict.json"])
def test_a_folder_that_may_be_a_dataset_is_not_warned_about(name: str) -> None:
    Path("set").mkdir()
    text = "data: {path: set, split: test}\n"
    assert load(text).warnings == ["`data.split` has no effect: the pictures of `data` are not a dataset"]
    Path("set", name).parent.mkdir(exist_ok=True)
    Path("set", name).touch()
    assert load(text).warnings == []


def test_only_what_was_given_is_warned_about() -> None:
    config = run_of(lora={"alpha": 3.0})
    assert ineffective_settings(config, set()) == []
    assert len(ineffective_settings(config, {"lora.alpha"})) == 1
    assert {key for keys, _, _ in INEFFECTIVE for key in keys} <= set(setting_keys())


# --- out again ---------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)  # these are refused
odd_words = st.sampled_from(
    [
        "a\x85",
        "\u2028",
        "a\r\nb",
        "no",
        "1e-4",
        "1e5",
        "007",
        "0o7",
        "null",
        "~",
        "",
        "true",
        "1:30",
        "- a",
        "a: b",
        "#",
        "<<",
    ]
)
words = texts | odd_words


@given(
    comment=words,
    trigger=words,
    prompts=st.lists(words, max_size=3),
    rate=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    alpha=st.none() | st.floats(min_value=1e-3, max_value=1e3) | st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    recompute=st.sampled_from(["auto", "none", "selective", "full"]),
    fused=st.none() | st.booleans(),
    train=st.sampled_from(["blocks", "all", "attention"]) | st.just([r".*\.norm.*", "no"]),
    every=st.none() | st.integers(1, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_a_dump_loads_back_to_an_equal_config(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    config = run_of(
        finetune_comment=drawn["comment"],
        trigger_word=drawn["trigger"],
        learning_rate=drawn["rate"],
        seed=drawn["seed"],
        lora={"alpha": drawn["alpha"], "targets": [r"attn\.to_[qkv]$"]},
        full={"train": drawn["train"]},
        memory={"recompute": drawn["recompute"], "fused_backward": drawn["fused"]},
        preview={"every": drawn["every"], "prompts": drawn["prompts"]},
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    assert load_run(path).config == config


def test_a_dump_with_sources_loads_back() -> None:
    config = load(
        "data:\n  repeats: 2\n  path: no\n  resolutions: [512, 1024]\n  background: '#102030'\n"
        "  sources: [hf:a/b, '1e5', {path: c.zip, repeats: 3, weight: .5, caption_column: on, split: '07', limit: 9}]\n"
    ).config
    assert [source.repeats for source in config.data.all_sources] == [2, 1, 1, 3]
    assert load(dump_run(config)).config == config
    sources_alone = run_of(data={"sources": ["a"]})
    assert load(dump_run(sources_alone)).config == sources_alone
    assert RunConfig.model_validate(sources_alone.model_dump()) == sources_alone


def test_a_dump_is_complete_and_in_order() -> None:
    content = yaml.safe_load(dump_run(run_of()))
    assert list(content) == [key for key in RunConfig.model_fields if not key.startswith("webhook")]
    assert list(content["preview"]) == list(section_classes()["preview"].model_fields)


# --- recipes and schema ------------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert {"flux_tiny_lora.yaml", "flux1_dev_lora.yaml", "flux1_dev_lora_character.yaml"} <= {p.name for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_without_a_warning_and_says_what_it_needs(path: Path) -> None:
    loaded = load_run(path)
    assert loaded.warnings == []
    assert loaded.config.finetune_type in path.stem.split("_")
    purpose, editor = path.read_text(encoding="utf-8").splitlines()[:2]
    assert re.match(r"# .+ Estimated need: \d+ GB of (GPU )?memory", purpose)
    schema = editor.removeprefix("# yaml-language-server: $schema=")
    assert schema != editor
    assert (path.parent / schema).is_file()


def test_the_shipped_schema_is_current() -> None:
    shipped = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(json.dumps(json_schema())), "write json_schema() to configs/schema.json again"


def test_the_schema_takes_data_as_text_or_section_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    assert {"type": "string"} in schema["properties"]["data"]["anyOf"]
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["sources"]["items"]["anyOf"]
    assert {"$ref": "#/$defs/SourceConfig"} in schema["$defs"]["DataConfig"]["properties"]["sources"]["items"]["anyOf"]
    assert schema["$defs"]["SourceConfig"]["required"] == ["path"]
    assert schema["required"] == ["data"]
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))


def test_the_number_of_settings_is_a_decision() -> None:
    assert len(setting_keys()) == 84, "each setting is something to learn, test and keep: is the new one worth it?"


@pytest.mark.parametrize("key", setting_schemas())
def test_every_setting_is_one_sentence_that_ends_in_its_off_switch(key: str) -> None:
    said = setting_schemas()[key]["description"]
    assert said.endswith(".")
    assert not re.search(r"\.\s+[A-Z]", said), "one sentence"
    assert re.search(r"`null`|`false`|`0`|`1`|off|required|leave|empty list|least|`general`|`auto`|`quality`", said)


def test_every_field_has_a_docstring() -> None:
    models: list[type[Section]] = [RunConfig, SourceConfig, *section_classes().values()]
    assert all(info.description for model in models for info in model.model_fields.values())


def test_no_default_is_outside_its_own_bounds() -> None:
    defaults = {name: info.default for name, info in RunConfig.model_fields.items() if not info.is_required()}
    assert RunConfig.model_validate({**defaults, "data": "pics"}) == run_of()
    assert math.isclose(run_of().resolved_learning_rate, 1e-5)


def test_reading_a_run_file_does_not_load_torch() -> None:
    code = "import sys, flux_ft.config, flux_ft.runfile; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)
