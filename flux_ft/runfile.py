"""Reads a run file: YAML in, a `RunConfig` out, and every mistake named with its line, its key and the way out.

The text is YAML 1.2 core: only `true` and `false` are booleans, `no` and `on` are words, `1e-4` is a number. A file
is flattened to entries by dotted key, overrides from the command line replace entries, and what is left is validated
once, so that all mistakes are told in one message. Loads without torch.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flux_ft.config import (
    HUB_PREFIX,
    ContradictionError,
    RunConfig,
    SourceConfig,
    ineffective_settings,
    section_classes,
    setting_keys,
    setting_schemas,
)
from flux_ft.errors import ConfigError

COMMAND_LINE = "command line"
LARGEST_FILE_BYTES = 100_000
"""Fifty times a long run file; reading takes seconds where every byte is a token."""
MOST_TOLD = 20
"""Mistakes that are told in words; a hint for each of thousands would take minutes."""
TAG_PREFIX = "tag:yaml.org,2002:"
SOURCE_NAME = re.compile(r"data\.sources\[[0-9]+\]")
SOURCE_PATH = re.compile(r"data(\.sources\[[0-9]+\])?\.path")
SYNTAX_HINT = (
    "each setting is `key: value`, with a space after the colon; put a value with `: `, ` #`, `@` or `[` into quotes"
)
HOSTED_ONLY = ("webhook_url", "webhook_secret")
ALIASES = {
    "adapter_rank": "lora_rank",
    "base_model": "model",
    "batch": "optim.batch_size",
    "batch_size": "optim.batch_size",
    "caption": "captioning",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_model": "captioner.model",
    "clip_grad": "optim.max_grad_norm",
    "comment": "finetune_comment",
    "dataset": "data",
    "datasets": "data.sources",
    "dim": "lora_rank",
    "epochs": "iterations",
    "blocks_to_swap": "memory.stream_blocks",
    "ema": "optim.ema_decay",
    "file_data": "data",
    "fused_backward_pass": "memory.fused_backward",
    "gradient_accumulation": "optim.accumulate",
    "gradient_accumulation_steps": "optim.accumulate",
    "gradient_checkpointing": "memory.recompute",
    "grad_clip": "optim.max_grad_norm",
    "image_dir": "data.path",
    "images": "data",
    "instance_data_dir": "data.path",
    "instance_prompt": "trigger_word",
    "keyword": "trigger_word",
    "lr": "learning_rate",
    "lr_scheduler": "schedule.name",
    "lr_warmup_steps": "schedule.warmup_steps",
    "masked_loss": "data.masks",
    "max_new_tokens": "captioner.max_tokens",
    "max_train_steps": "iterations",
    "name": "finetune_comment",
    "network_alpha": "lora.alpha",
    "network_dim": "lora_rank",
    "num_repeats": "data.repeats",
    "optimizer": "optim",
    "output_dir": "output",
    "precision": "memory.base_precision",
    "pretrained_model_name_or_path": "model",
    "prompts": "preview.prompts",
    "rank": "lora_rank",
    "report_to": "logging.trackers",
    "resolution": "data.resolutions",
    "sample_prompts": "preview.prompts",
    "save_every": "checkpoint.every",
    "scheduler": "schedule",
    "shuffle_caption": "data.tag_orders",
    "steps": "iterations",
    "target_modules": "lora.targets",
    "train_batch_size": "optim.batch_size",
    "train_data_dir": "data.path",
    "train_steps": "iterations",
    "trigger": "trigger_word",
    "warmup": "schedule.warmup_steps",
}
"""What other trainers call our settings; used for hints only."""
BOOLEAN_WORDS = {"no": "false", "off": "false", "n": "false", "yes": "true", "on": "true", "y": "true"}
FIELD_HINTS = {
    "data.background": 'put it into quotes, as `#` starts a comment: `data: {background: "#ffffff"}`',
    "data.max_pixels": "this is an area, not a side: 1024 × 1024 is 1048576",
    "data.resolutions": "these are sides, not areas: `data: {resolutions: [512, 768, 1024]}`",
    "data.sources": "write it as a list: `sources: [pictures, {path: more.zip, repeats: 2}]`",
    "full.train": "patterns are Python regular expressions for names of weights such as proj_out.weight",
    "memory.recompute": "full recomputes most and keeps least, none the other way round, selective lies between",
    "lora.targets": "patterns are Python regular expressions for module paths such as transformer_blocks.0.attn.to_q",
}


@dataclass(frozen=True)
class LoadedRun:
    """A checked run file, with what the user wrote as apart from what is default."""

    config: RunConfig
    given: frozenset[str]
    """Dotted keys that the file or an override set; `data: folder` counts as `data.path`."""
    path: Path

    @property
    def warnings(self) -> list[str]:
        """Settings that were given and have no effect."""
        return ineffective_settings(self.config, self.given)


@dataclass(frozen=True)
class Entry:
    """One setting as it was written."""

    value: Any
    where: str
    """`run.yaml:7`, or `command line`."""
    name: str
    """The key as it was written, dotted."""
    shown: str
    """The value as it was written, cut to one short line."""


@dataclass(frozen=True)
class Problem:
    """One mistake, and how to mend it."""

    where: str
    message: str
    hint: str | None = None


Entries = dict[str, Entry]


def load_run(path: Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """The run that a file and `key.path=value` overrides describe; a later override wins.

    A relative path of pictures in the file is taken from the file's folder if it exists there, else from the current
    directory; one on the command line is always taken from the current directory. Raises ConfigError, which names every
    mistake with its line.
    """
    entries, problems = _read_file(path)
    for text in overrides:
        more, wrong = _read_override(text)
        entries, lost = _overridden(entries, more)
        problems += wrong + lost
    entries = _with_found_data(entries, path)
    config, wrong = _validate(entries, str(path))
    problems += wrong
    if config is None or problems:
        raise _as_error(sorted(problems, key=_reading_order))
    given = frozenset(key for key, entry in entries.items() if entry.value is not None or key not in HOSTED_ONLY)
    return LoadedRun(config, given, path)


def dump_run(config: RunConfig) -> str:
    """The whole config as YAML that loads back to an equal one; the webhook fields, never stored, are left out."""
    content = config.model_dump(mode="json", exclude=set(HOSTED_ONLY))
    return yaml.dump(content, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)


# --- YAML 1.2 core -----------------------------------------------------------------------------------------------


class CoreLoader(yaml.SafeLoader):
    """Composes nodes by the YAML 1.2 core rules."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (`*name`) are not used in run files", mark)
        return super().compose_node(parent, index)


class CoreDumper(yaml.SafeDumper):
    """Quotes what `CoreLoader` would otherwise read as something else than text."""


def _use_core_rules(reader_or_writer: Any) -> None:
    # PyYAML's own table is YAML 1.1: there `no` is false, 1:30 is ninety and 1e-4 is a text.
    reader_or_writer.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]{1,100}|0o[0-7]{1,100}|0x[0-9a-fA-F]{1,100}", list("-+0123456789")),
        (
            "float",
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            list("-+.0123456789"),
        ),
    ):
        reader_or_writer.add_implicit_resolver(TAG_PREFIX + tag, re.compile(f"^(?:{pattern})$"), first)


def _write_text(dumper: CoreDumper, text: str) -> yaml.Node:
    # Only double quotes carry every kind of line break through, U+0085 among them.
    breaks = re.search(r"[\n\r\x85\u2028\u2029]", text)
    return dumper.represent_scalar(TAG_PREFIX + "str", text, style='"' if breaks else None)


_use_core_rules(CoreLoader)
_use_core_rules(CoreDumper)
_RESOLVER = CoreLoader("")
CoreDumper.add_representer(str, _write_text)


def _compose(text: str) -> yaml.Node | None:
    loader = CoreLoader(text)
    try:
        return loader.get_single_node()
    except (ValueError, OverflowError):  # PyYAML leaves it to chr() to refuse "\UFFFFFFFF"
        mark = loader.get_mark()
        raise yaml.scanner.ScannerError(None, None, "an escape names no character", mark) from None
    finally:
        loader.dispose()


def _syntax_problem(error: Exception, text: str, source: str, *, numbered: bool = True) -> Problem:
    """One sentence on broken YAML, with the line where the reader stopped."""
    line, what = 1, "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = (error.problem or error.context or "the reader cannot go on").removeprefix("but ")
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        what = f"the character U+{code:04X} is not allowed"
    lines = text.splitlines() or [""]
    line = min(line, len(lines))
    where = f"{source}:{line}" if numbered else source
    indent = re.match(r"\s*", lines[line - 1])
    if indent and "\t" in indent.group():
        return Problem(where, "a tab is used to indent, and YAML allows only spaces", "replace each tab by two spaces")
    return Problem(where, f"not valid YAML: {what}", SYNTAX_HINT)


class _Reader:
    """Turns nodes into entries, collecting every mistake on the way."""

    def __init__(self, text: str, source: str, *, numbered: bool) -> None:
        self.text, self.source, self.numbered = text, source, numbered
        self.problems: list[Problem] = []

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.numbered else self.source

    def shown(self, node: yaml.Node) -> str:
        return _short(self.text[node.start_mark.index : node.end_mark.index])

    def problem(self, where: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(where, message, hint))

    def value(self, node: yaml.Node, name: str) -> Any:
        """The plain value of any node."""
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(inner, f"{name}.{key}") for key, _, inner in self.items(node, name)}
        if isinstance(node, yaml.SequenceNode):
            self.refuse_tag(node, name, TAG_PREFIX + "seq")
            return [self.value(item, name) for item in node.value]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, name)

    def items(self, node: yaml.MappingNode, name: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
        """(key, key's node, value's node), each key once."""
        self.refuse_tag(node, name, TAG_PREFIX + "map")
        seen: dict[str, str] = {}
        found = []
        for key_node, inner in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else self.shown(key_node)
            if key in seen:
                dotted = _short(f"{name}.{key}" if name else key)
                message = f"`{dotted}` is given twice, first at {seen[key]}"
                self.problem(self.where(key_node), message, "remove one of the two")
                continue
            seen[key] = self.where(key_node)
            found.append((key, key_node, inner))
        return found

    def scalar(self, node: yaml.ScalarNode, name: str) -> Any:
        plain = node.style is None
        tag: str = _RESOLVER.resolve(yaml.ScalarNode, node.value, (plain, not plain))  # type: ignore[no-untyped-call]
        self.refuse_tag(node, name, tag)
        if tag != TAG_PREFIX + "str":
            return _plain_value(tag.removeprefix(TAG_PREFIX), node.value)
        text = _joined_surrogates(node.value)
        odd = re.search(r"[\0\ud800-\udfff]", text)
        if odd:
            message = f"`{_short(name)}` holds U+{ord(odd.group()):04X}, which is not a character of any text"
            self.problem(self.where(node), message, "take it out")
        return text

    def refuse_tag(self, node: yaml.Node, name: str, implied: str) -> None:
        if node.tag != implied:
            message = f"`{_short(name)}` has the tag `{_short(node.tag)}`, and tags are not used in run files"
            self.problem(self.where(node), message, "remove the tag")

    def settings(self, node: yaml.MappingNode, section: str) -> Entries:
        """The entries of the whole file (`section` empty), of one section or of one source."""
        entries: Entries = {}
        for key, key_node, inner in self.items(node, section):
            entries |= self.setting(section, key, self.where(key_node), inner)
        return entries

    def setting(self, section: str, key: str, where: str, node: yaml.Node) -> Entries:
        """One `key: value`, as entries by dotted key."""
        dotted = f"{section}.{key}" if section else key
        if dotted in section_classes():
            return self.section(dotted, where, node)
        if key not in _fields(section):
            hint = suggestion(dotted) if len(self.problems) < MOST_TOLD else None
            self.problem(where, f"`{_short(dotted)}` is not a known key", hint)
            return {}
        if dotted == "data.sources" and isinstance(node, yaml.SequenceNode):
            return self.sources(where, node)
        return {dotted: Entry(self.value(node, dotted), where, dotted, self.shown(node))}

    def section(self, name: str, where: str, node: yaml.Node) -> Entries:
        """A section of the run file or one source."""
        if isinstance(node, yaml.MappingNode):
            return self.settings(node, name)
        value = self.value(node, name)
        if value is None:
            return {}  # a section whose settings are all commented out
        if "path" in _fields(name):
            return {f"{name}.path": Entry(value, where, name, self.shown(node))}
        message = f"`{name}` is {_quoted(self.shown(node))}, but it is a section with the keys {_listed(_fields(name))}"
        hint = f"write one of them as `{name}.{next(iter(_fields(name)))}=…`, or indented below `{name}:`"
        self.problem(where, message, hint)
        return {}

    def sources(self, where: str, node: yaml.SequenceNode) -> Entries:
        """The list itself, then each source's place and settings."""
        self.refuse_tag(node, "data.sources", TAG_PREFIX + "seq")
        entries = {"data.sources": Entry([], where, "data.sources", self.shown(node))}
        for index, item in enumerate(node.value):
            name = f"data.sources[{index}]"
            entries[name] = Entry({}, self.where(item), name, self.shown(item))
            entries |= self.section(name, self.where(item), item)
        return entries


def _plain_value(tag: str, text: str) -> Any:
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        return int(text, base)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _joined_surrogates(text: str) -> str:
    # JSON writes an emoji as two \u escapes, and PyYAML leaves them as two halves; a JSON body is a valid run file.
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return text


# --- from text to entries ----------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[Entries, list[Problem]]:
    text = _file_text(path)
    source = str(path)
    try:
        root = _compose(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise _as_error([_syntax_problem(error, text, source)]) from None
    if root is None:
        raise ConfigError(f"{source}: the file is empty", hint="name at least the pictures, as in `data: my-pictures`")
    reader = _Reader(text, source, numbered=True)
    if not isinstance(root, yaml.MappingNode):
        message = f"the file is not a list of `key: value` settings, it is {_kind(root)}"
        raise _as_error([Problem(reader.where(root), message, SYNTAX_HINT)])
    return reader.settings(root, ""), reader.problems


def _file_text(path: Path) -> str:
    hint = "a run file is a text of `key: value` lines, as in configs/"
    if path.is_dir():
        raise ConfigError(f"{path}: this is a folder, not a run file", hint=hint)
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ConfigError(f"{path}: too large for a run file, more than {LARGEST_FILE_BYTES:,} bytes", hint=hint)
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", hint="check the name and the current directory") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="check the file's permissions") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"{path}:{line}: not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ConfigError(message, hint="save the file with the encoding UTF-8") from None


def _read_override(text: str) -> tuple[Entries, list[Problem]]:
    """The entries of one `key.path=value`; the value is read by the same rules as in a file."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        message = f"`{_short(text)}` is not an override"
        return {}, [Problem(COMMAND_LINE, message, "write `key=value`, as in `lora_rank=16`")]
    try:
        node = _compose(value)
    except (yaml.YAMLError, RecursionError) as error:
        wrong = _syntax_problem(error, value, COMMAND_LINE, numbered=False)
        message = f"`{_short(key)}`: the value `{_short(value)}` is {wrong.message}"
        return {}, [Problem(COMMAND_LINE, message, f"put the value into quotes inside quotes: '{_short(key)}=\"…\"'")]
    reader = _Reader(value, COMMAND_LINE, numbered=False)  # an empty value composes to no node, and means null
    node = node or _compose("null")
    assert node is not None
    if SOURCE_NAME.fullmatch(key):
        return reader.section(key, COMMAND_LINE, node), reader.problems
    section, _, leaf = key.rpartition(".")
    if not section or not _fields(section):
        section, leaf = "", key
    return reader.setting(section, leaf, COMMAND_LINE, node), reader.problems


def _overridden(entries: Entries, more: Entries) -> tuple[Entries, list[Problem]]:
    """The entries with those of one override put in their places; a new list of sources takes the old one's."""
    if "data.sources" in more:
        return {key: entry for key, entry in entries.items() if not key.startswith("data.sources[")} | more, []
    lost = next((name[0] for key in more if (name := SOURCE_NAME.match(key)) and name[0] not in entries), None)
    if lost is None:
        return entries | more, []
    count = sum(bool(SOURCE_NAME.fullmatch(key)) for key in entries)
    message = f"`{lost}` is not there: `data.sources` has {count} item{'' if count == 1 else 's'}"
    hint = "sources are counted from 0; give the whole list as `data.sources=[…]`"
    return entries, [Problem(COMMAND_LINE, message, hint)]


def _with_found_data(entries: Entries, run_file: Path) -> Entries:
    """The same entries with the paths of all sources as seen from the current directory."""
    return {key: _found(entry, run_file) if SOURCE_PATH.fullmatch(key) else entry for key, entry in entries.items()}


def _found(entry: Entry, run_file: Path) -> Entry:
    if not isinstance(entry.value, str) or entry.value.startswith(HUB_PREFIX) or not entry.value:
        return entry
    found = os.path.expanduser(entry.value)
    beside_run_file = os.path.normpath(run_file.parent / found)
    if entry.where != COMMAND_LINE and os.path.exists(beside_run_file):
        found = beside_run_file
    return replace(entry, value=found)


# --- from entries to a config ------------------------------------------------------------------------------------


def _validate(entries: Entries, source: str) -> tuple[RunConfig | None, list[Problem]]:
    try:
        return RunConfig.model_validate(_nested(entries)), []
    except ValidationError as error:
        return None, _problems(error, entries, source)


def _nested(entries: Entries) -> dict[str, Any]:
    """The entries as `RunConfig` takes them; a list comes before its items, which come in order."""
    nested: dict[str, Any] = {}
    for key, entry in entries.items():
        *parents, leaf = re.findall(r"[^.\[\]]+", key)
        place: Any = nested
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        value = copy(entry.value)  # a place that is filled here stays empty in the entries
        if isinstance(place, list):
            place.append(value)
        else:
            place[leaf] = value
    return nested


def _problems(error: ValidationError, entries: Entries, source: str) -> list[Problem]:
    """One problem per key, in pydantic's order, which is the order of the classes."""
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ContradictionError):
            for one in cause.found:
                where = next((entries[key].where for key in one.keys if key in entries), source)
                found["+".join(one.keys)] = Problem(where, one.message, one.hint)
            continue
        key = _key_at(detail["loc"], entries)
        if key is None:
            found["data"] = _no_data(entries, source)
        elif SOURCE_NAME.fullmatch(key):  # the one thing that can be wrong with a source as a whole
            hint = "name a folder, a `.zip` or a dataset, as in `path: my-pictures`"
            found[key] = Problem(entries[key].where, f"`{key}.{detail['loc'][-1]}` is missing", hint)
        elif key not in found or isinstance(cause, ValueError):
            found[key] = _wrong_value(key, entries[key], detail)
    return list(found.values())


def _key_at(location: tuple[int | str, ...], entries: Entries) -> str | None:
    """The entry that a place in the config came from: the innermost one, as patterns and prompts are none."""
    key, innermost = "", None
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
        innermost = key if key in entries else innermost
    return innermost


def _no_data(entries: Entries, source: str) -> Problem:
    where = next((entry.where for key, entry in entries.items() if key.startswith("data.")), source)
    message = "`data` is missing" if where == source else "`data` has neither `path` nor any `sources`"
    return Problem(where, message, "name a folder or a .zip of pictures, as in `data: my-pictures`")


def _wrong_value(key: str, entry: Entry, detail: ErrorDetails) -> Problem:
    # A text in the place of a section stands for its path, which is then not optional.
    schema_key = re.sub(r"\[\d+\]", "[]", key) if entry.name == key else "data.sources[].path"
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):
        return Problem(entry.where, f"`{entry.name}`: {cause}", FIELD_HINTS.get(schema_key))
    schema = setting_schemas()[schema_key]
    message = f"`{entry.name}` is {_quoted(entry.shown)}; expected {expected(schema)}"
    return Problem(entry.where, message, _value_hint(schema_key, entry, schema))


def expected(schema: Mapping[str, Any]) -> str:
    """What a setting takes, in words, read off its JSON Schema."""
    if "anyOf" in schema:
        return " or ".join(expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + _listed(schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "a section"
    if "pattern" in schema:
        return f"text such as `{schema['examples'][0]}`"
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {expected(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"a list{' of at least one' if schema.get('minItems') else ''}, each {expected(schema['items'])}"
    word = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    if schema["type"] == "string":
        return "text that is not empty" if schema.get("minLength") else "text"
    return word[schema["type"]] + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    words = []
    if low is not None:
        words.append(f"from {low}" if high is not None or below is not None else f"of at least {low}")
    if above is not None:
        words.append(f"above {above}")
    if high is not None:
        words.append(f"to {high}")
    if below is not None:
        words.append(f"to less than {below}")
    return "".join(f" {word}" for word in words)


def _value_hint(key: str, entry: Entry, schema: Mapping[str, Any]) -> str | None:
    """The likely slip behind a wrong value, and what to write instead."""
    options = schema.get("anyOf", [schema])
    kinds = {option.get("type") for option in options}
    choices = [choice for option in options for choice in option.get("enum", [])]
    takes_any_text = kinds <= {"string", "null"} and not choices and not {"const", "pattern"} & set(schema)
    if entry.value is None and "pattern" not in schema:
        return _null_hint(entry.name, schema, takes_any_text=takes_any_text)
    if entry.name != key and isinstance(entry.value, list):
        return "write each source as an item of its own: `data: {sources: [pictures, more.zip]}`"
    if isinstance(entry.value, str) and not takes_any_text:
        return _text_hint(entry, kinds, choices) or FIELD_HINTS.get(key)
    if takes_any_text and entry.value != "":
        return f"put it into quotes to make it text: `{entry.name}: {json.dumps(entry.shown, ensure_ascii=False)}`"
    return FIELD_HINTS.get(key)


def _null_hint(name: str, schema: Mapping[str, Any], *, takes_any_text: bool) -> str:
    quoting = f'; if the word is meant, write `{name}: "null"`' if takes_any_text else ""
    if "default" not in schema:
        return f"`{name}` has no default{quoting}"
    return f"leave it out to use the default, `{json.dumps(schema['default'], ensure_ascii=False)}`{quoting}"


def _text_hint(entry: Entry, kinds: set[str | None], choices: list[str]) -> str | None:
    """For a text where something else is expected."""
    name, text = entry.name, str(entry.value).strip()
    if "boolean" in kinds:
        meant = BOOLEAN_WORDS.get(text.lower(), text.lower())
        return f"write `{name}: {meant}`" if meant in ("true", "false") else None
    if kinds & {"integer", "number"} and _number_in(text):
        return f"write `{name}: {_number_in(text)}`"
    if choices:
        close = difflib.get_close_matches(text.lower(), choices, n=1)
        if close:
            return f"did you mean `{close[0]}`?"
    if "array" in kinds and text:
        return f"write it as a list: `{name}: [{json.dumps(_short(text), ensure_ascii=False)}]`"
    return None


def _number_in(text: str) -> str | None:
    """The number that a text spells, with thousands separated or in quotes."""
    bare = re.sub(r"(?<=\d)[_,](?=\d{3}(?:\D|$))", "", text.strip())
    return bare if re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", bare) else None


# --- the nearest good key ----------------------------------------------------------------------------------------


def _fields(section: str) -> Collection[str]:
    """The keys at the top level (""), in a section or in a source; none for any other name."""
    if SOURCE_NAME.fullmatch(section):
        return SourceConfig.model_fields
    if not section:
        return RunConfig.model_fields
    return section_classes()[section].model_fields if section in section_classes() else ()


@cache
def _names() -> dict[str, tuple[str, ...]]:
    """What a key may have been meant as: its own name, its name without the section, and other trainers' names."""
    found: dict[str, tuple[str, ...]] = {}
    for key in (*setting_keys(), *section_classes()):
        for name in {key, key.rpartition(".")[2]}:
            found[name] = (*found.get(name, ()), key)
    whole = {key: (key,) for key in setting_keys()}
    return found | {name: (key,) for name, key in ALIASES.items()} | whole


def suggestion(key: str) -> str:
    """A hint for an unknown key: the nearest one of its own section, then of the whole file."""
    section, _, leaf = key.lower().replace("-", "_").strip("_").rpartition(".")
    if key in setting_keys():
        section, _, leaf = key.partition(".")
        return f"write it as a section: `{section}: {{{leaf}: …}}`"
    nearest = _nearest_in_section(section, leaf) or _nearest_anywhere(leaf)
    if nearest:
        return f"did you mean {_listed(nearest, last=' or ')}?"
    if section and _fields(section):
        return f"`{section}` has the keys {_listed(_fields(section))}"
    return f"the keys at the top level are {_listed(RunConfig.model_fields)}"


def _nearest_in_section(section: str, leaf: str) -> tuple[str, ...]:
    close = difflib.get_close_matches(leaf, _fields(section) if section else (), n=1, cutoff=0.7)
    return (f"{section}.{close[0]}",) if close else ()


def _nearest_anywhere(leaf: str) -> tuple[str, ...]:
    if leaf in _names():
        return _names()[leaf]
    close = difflib.get_close_matches(leaf, _names(), n=1, cutoff=0.7)
    return _names()[close[0]] if close else ()


# --- words -------------------------------------------------------------------------------------------------------


def _as_error(problems: Sequence[Problem]) -> ConfigError:
    """One error for all problems; a single one keeps its hint apart."""
    problems = [replace(one, message=_printable(one.message), hint=_printable(one.hint or "")) for one in problems]
    if len(problems) == 1:
        return ConfigError(f"{problems[0].where}: {problems[0].message}", hint=problems[0].hint or None)
    lines = [f"{one.where}: {one.message}" + (f" ({one.hint})" if one.hint else "") for one in problems[:MOST_TOLD]]
    more = [f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
    return ConfigError("\n".join([f"{len(problems)} mistakes", *lines, *more]))


def _reading_order(problem: Problem) -> tuple[bool, int]:
    line = problem.where.rpartition(":")[2]
    return problem.where == COMMAND_LINE, int(line) if line.isdigit() else 0


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the text {_quoted(_short(str(node.value)))}"


def _printable(text: str) -> str:
    # An escape sequence or a change of writing direction must not reach the terminal.
    return "".join(letter if letter.isprintable() else f"U+{ord(letter):04X}" for letter in text)


def _short(text: str) -> str:
    """One line of at most 60 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "…"


def _quoted(shown: str) -> str:
    return f"`{shown}`" if shown else "left empty"


def _listed(names: Iterable[str], last: str = ", ") -> str:
    quoted = [f"`{name}`" for name in names]
    return last.join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]
