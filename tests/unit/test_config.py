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
    ineffective_settings,
    json_schema,
    section_classes,
    setting_keys,
    setting_schemas,
    slugify,
)
from flux_ft.errors import ConfigError, InputError
from flux_ft.runfile import ALIASES, LoadedRun, dump_run, load_run, suggestion

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))


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
    assert config.optim.betas == (0.9, 0.99)
    assert (config.optim.batch_size, config.optim.accumulate, config.optim.max_grad_norm) == (1, 1, 1.0)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("constant", 0)
    assert (config.memory.base_precision, config.memory.recompute) == ("auto", None)
    assert (config.preview.every, config.preview.prompts, config.preview.seed) == (100, (), 0)
    assert (config.validation.every, config.validation.fraction) == (50, 0.0)
    assert (config.checkpoint.every, config.checkpoint.keep) == (100, 2)
    assert (config.export.formats, config.export.dtype) == (("diffusers", "kohya"), "bf16")
    assert config.logging.trackers == ()


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
        "captioning",
        "priority",
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
    assert load("data: hf:owner/name\n").config.data.path == "hf:owner/name"
    assert load("data: ~/pics\n").config.data.path == "/srv/someone/pics"
    assert load("data: /abs/pics\n").config.data.path == "/abs/pics"
    assert load(f"data: {'x' * 5000}\n").config.data.path == "x" * 5000


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
        ("resolution", "`data.max_pixels`"),
        ("data.resolution", "`data.max_pixels`"),
        ("weight_decay", "`optim.weight_decay`"),
        ("optimiser", "`optim`"),
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


@pytest.mark.parametrize("text", ["model: x\n", "data:\n", "data: {max_pixels: 5000}\n", "data: {}\n"])
def test_data_is_required(text: str) -> None:
    message, hint = refusal(text)
    assert re.match(r"run\.yaml: `data(\.path)?` is missing", message)
    assert "data: my-pictures" in hint


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
        ("iterations: '300'", "`iterations` is `'300'`; expected a whole number of at least 1", "`iterations: 300`"),
        ("iterations: 1_000", "`iterations` is `1_000`; expected a whole number", "write `iterations: 1000`"),
        ("iterations: null", "`iterations` is `null`; expected a whole number", "to use the default, `300`"),
        (f"seed: {'9' * 5000}", "expected a whole number from 0 to", ""),
        ("learning_rate: 0", "`learning_rate` is `0`; expected a number above 0 or null", ""),
        ("learning_rate: .inf", "`learning_rate` is `.inf`; expected a number above 0 or null", ""),
        ("learning_rate: .nan", "`learning_rate` is `.nan`; expected a number above 0 or null", ""),
        ("mode: Charakter", "expected one of `character`, `product`, `style`, `general`", "did you mean `character`?"),
        ("mode: 3", "`mode` is `3`; expected one of `character`", ""),
        ("schedule: {name: cosin}", "`schedule.name` is `cosin`", "did you mean `cosine`?"),
        ("optim: {name: sgd}", "`optim.name` is `sgd`; expected `adamw`", ""),
        ("optim: {betas: [0.9]}", "`optim.betas` is `[0.9]`; expected a list of 2, each a number from 0", ""),
        ("lora: {dropout: 1.0}", "`lora.dropout` is `1.0`; expected a number from 0 to less than 1", ""),
        ("lora: {targets: all}", "expected one of `blocks`, `attention` or a list", ""),
        ("lora: {targets: []}", "expected one of `blocks`, `attention` or a list of at least one", ""),
        ("lora: {targets: [a, '(']}", "`(` is not a regular expression", "module paths"),
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
    ],
)
def test_a_contradiction_is_one_message_that_names_both_keys(text: str, line: int, keys: tuple[str, ...]) -> None:
    message, hint = refusal(text)
    assert message.startswith(f"run.yaml:{line}: ")
    assert all(f"`{key}`" in message for key in keys)
    assert all(f"`{key}`" in hint for key in keys)
    assert "\n" not in message


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


# --- settings without effect -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("data: x\n", []),
        ("data: x\nlora: {alpha: 3, dropout: 0.1}\n", ["lora.alpha", "lora.dropout"]),
        ("data: x\nfinetune_type: lora\nlora: {alpha: 3, dropout: 0.1}\n", []),
        ("data: x\noptim: {max_grad_norm: 2.0}\n", []),
        ("data: x\npreview: {every: null, prompts: [a], width: 64}\n", ["preview.prompts", "preview.width"]),
        ("data: x\nvalidation: {every: 10}\n", ["validation.every"]),
        ("data: x\nvalidation: {every: null}\n", []),
        ("data: x\nvalidation: {every: 10, fraction: 0.1}\n", []),
        ("data: x\ncheckpoint: {every: null, keep: 3}\n", ["checkpoint.keep"]),
        ("data: x\niterations: 5\nschedule: {name: cosine, warmup_steps: 5}\n", ["schedule.name"]),
        ("data: x\ncaptioning: true\n", ["captioning"]),
        ("data: x\ncaptioning: false\n", []),
        ("data: x\nwebhook_secret: s\n", ["webhook_secret"]),
    ],
)
def test_settings_without_effect_are_warned_about_by_name(text: str, keys: list[str]) -> None:
    warnings = load(text).warnings
    assert [warning.split("`")[1] for warning in warnings] == keys
    assert all(" has no effect: " in warning for warning in warnings)


def test_only_what_was_given_is_warned_about() -> None:
    config = run_of(lora={"alpha": 3.0})
    assert ineffective_settings(config, set()) == []
    assert len(ineffective_settings(config, {"lora.alpha"})) == 1
    assert {key for keys, _, _ in INEFFECTIVE for key in keys} <= set(setting_keys())


# --- out again ---------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_characters="\0"), max_size=20)  # NUL is refused
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
    recompute=st.none() | st.booleans(),
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
        memory={"recompute": drawn["recompute"]},
        preview={"every": drawn["every"], "prompts": drawn["prompts"]},
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    assert load_run(path).config == config


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
    assert loaded.config.finetune_type == "lora"
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
    assert schema["required"] == ["data"]
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))


def test_the_number_of_settings_is_a_decision() -> None:
    assert len(setting_keys()) == 47, "each setting is something to learn, test and keep: is the new one worth it?"


@pytest.mark.parametrize("key", setting_keys())
def test_every_setting_is_one_sentence_that_ends_in_its_off_switch(key: str) -> None:
    said = setting_schemas()[key]["description"]
    assert said.endswith(".")
    assert not re.search(r"\.\s+[A-Z]", said), "one sentence"
    assert re.search(r"`null`|`false`|`0`|`1`|off|required|leave|empty list|least|`general`|`auto`|`quality`", said)


def test_every_field_has_a_docstring() -> None:
    models: list[type[Section]] = [RunConfig, *section_classes().values()]
    assert all(info.description for model in models for info in model.model_fields.values())


def test_no_default_is_outside_its_own_bounds() -> None:
    defaults = {name: info.default for name, info in RunConfig.model_fields.items() if not info.is_required()}
    assert RunConfig.model_validate({**defaults, "data": "pics"}) == run_of()
    assert math.isclose(run_of().resolved_learning_rate, 1e-5)


def test_reading_a_run_file_does_not_load_torch() -> None:
    code = "import sys, flux_ft.config, flux_ft.runfile; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)
