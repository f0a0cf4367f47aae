"""Prompt files: what to draw, a picture a row. Loads without torch.

    .txt    one prompt a line; blank lines and lines that start with # are left out
    .jsonl  one object of a request's fields a line, or a string, which is a prompt; null is the field's own default
    .csv    the first row names the fields; an empty cell is not given

Pictures and LoRAs in a file are relative to the file. Every mistake is a ConfigError that begins with FILE:LINE.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from flux_ft.errors import ConfigError, plain
from flux_ft.infer.tasks import TASKS, Lora, Request, parse

MOST_ROWS = 100_000
LARGEST_FILE_BYTES = 100_000_000

Row = tuple[int, dict[str, Any]]
"""Its line, and the fields as they stand there."""


def read_requests(path: Path, defaults: Mapping[str, Any]) -> list[Request]:
    """The requests of a prompt file, in its order.

    `defaults` are fields for all rows; a row's own value wins, and a row whose task lacks the field goes without it.
    Raises ConfigError with file and line: what is wrong, what was expected, what to do; also where a picture or LoRA is
    missing, and when no row takes one of `defaults`.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path}: is no prompt file that is known by its name",
            hint=f"name it {', '.join(_READERS)}: a prompt a line, a JSON object a line, or a table with named columns",
        )
    requests: list[Request] = []
    taken: set[str] = set()
    for line, fields in reader(_text_of(path), path):
        where = f"{path}:{line}"
        if len(requests) == MOST_ROWS:
            raise ConfigError(f"{where}: more than {MOST_ROWS:,} rows", hint="split the file")
        given = {name: value for name, value in _placed(fields, path.parent, where).items() if value is not None}
        kind = _task_of(fields, defaults, where)
        usable = {name: value for name, value in defaults.items() if name in kind.model_fields}
        taken |= usable.keys()
        requests.append(parse({name: usable[name] for name in usable.keys() - fields.keys()} | given, where))
    if not requests:
        raise ConfigError(f"{path}: holds no prompt", hint="write at least one")
    if unused := sorted(defaults.keys() - taken):
        tasks = sorted({request.task for request in requests})
        raise ConfigError(
            f"`{unused[0]}` is of no use to {path}: its rows are of the task {' and '.join(tasks)}",
            hint="leave it out, or give rows another `task`",
        )
    return requests


def parse_lora(value: Any, where: str = "", folder: Path = Path()) -> Lora:
    """A LoRA from FILE, FILE:STRENGTH, or an object with `file` and `strength`; relative paths start at `folder`.

    A drive letter's colon is no strength. Raises ConfigError.
    """
    return parse({"loras": [_lora_fields(value, where, folder)]}, where).loras[0]


def _lora_fields(value: Any, where: str, folder: Path) -> dict[str, Any]:
    at = f"{where}: " if where else ""
    if isinstance(value, str):
        value = _file_and_strength(value.strip(), folder, at)
    if not isinstance(value, Mapping) or not isinstance(value.get("file"), (str, Path)) or not str(value["file"]):
        raise ConfigError(
            f"{at}`loras`: {_shown(value)} is no LoRA", hint='write "FILE", "FILE:0.8" or {"file": …, "strength": 0.8}'
        )
    return dict(value) | {"file": folder / Path(value["file"]).expanduser()}


def _file_and_strength(text: str, folder: Path, at: str) -> dict[str, Any]:
    file, colon, strength = text.rpartition(":")
    if not colon or len(file) == 1 or exists(folder / text):
        return {"file": text}
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"{at}`loras`: {_shown(strength)} is not a strength", hint="write FILE:0.8, or FILE alone for 1"
        )
    return {"file": file, "strength": number}


# --- A row's fields. ---


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_holds_path, get_args(annotation)))


PICTURES = {
    name for kind in TASKS.values() for name, field in kind.model_fields.items() if _holds_path(field.annotation)
}
"""Fields of any task that name a picture's file."""


def _task_of(fields: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> type[Request]:
    task = fields.get("task") or defaults.get("task", "text-to-image")
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError(f"{where}: `task` is {_shown(task)}", hint="one of " + ", ".join(TASKS))
    return TASKS[task]


def _placed(fields: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The fields with paths that start at the file's folder and lead somewhere. Raises ConfigError."""
    placed = dict(fields)
    if odd := next((name for name in fields if not name.isprintable()), None):
        raise ConfigError(f"{where}: {_shown(odd)} is no field", hint="field names are words such as `prompt`")
    for name in PICTURES & fields.keys():
        if isinstance(fields[name], str):
            placed[name] = _existing(folder / Path(fields[name]).expanduser(), name, where)
    if fields.get("loras") is not None:
        listed = fields["loras"] if isinstance(fields["loras"], list) else [fields["loras"]]
        placed["loras"] = [_lora_fields(one, where, folder) for one in listed]
        for lora in placed["loras"]:
            _existing(lora["file"], "loras", where)
    return placed


def _existing(path: Path, name: str, where: str) -> Path:
    if not exists(path) or (name != "loras" and path.is_dir()):  # a training's checkpoint is a folder
        raise ConfigError(
            f"{where}: `{name}`: there is no file `{plain(str(path))}`",
            hint="paths in a prompt file are relative to that file",
        )
    return path


def exists(path: Path) -> bool:
    """Whether there is a file or a folder; False for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _shown(value: Any) -> str:
    return plain(ascii(value), 80)


# --- Files to rows. ---


def _text_of(path: Path) -> str:
    """Raises ConfigError for what is no UTF-8 text."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ConfigError(f"{path}: is larger than {LARGEST_FILE_BYTES / 1e6:.0f} MB", hint="split the file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"{path}: cannot be read: {reason}", hint="give the path of a prompt file") from error
    try:
        text = data.decode("utf-8-sig")
        place = text.find("\0")
        if place < 0:
            return text
        line = text.count("\n", 0, place) + 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    raise ConfigError(f"{path}:{line}: is not UTF-8 text", hint="save the file again as UTF-8")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with something on them, numbered from 1. Not `splitlines`, which breaks at characters within a prompt."""
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            yield number, line.strip()


def _plain_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in _lines(text):
        if not line.startswith("#"):
            yield number, {"prompt": line}


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in _lines(text):
        where = f"{path}:{number}"
        value = _json(line, where, 'each line is an object, {"prompt": "…"}, or a string, "…", whole on its line')
        if not isinstance(value, (dict, str)):
            raise ConfigError(f"{where}: is {_shown(value)}", hint='expected an object, {"prompt": "…"}, or a string')
        yield number, {"prompt": value} if isinstance(value, str) else value


def _json(text: str, where: str, hint: str) -> Any:
    """Strict JSON: no key twice, no NaN, no half of a surrogate pair. Raises ConfigError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        column = f", at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        words = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(f"{where}: is not JSON{column}: {plain(str(words), 120)}", hint=hint) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(next(name for name in names if names.count(name) > 1))} is there twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _table_rows(text: str, path: Path) -> Iterator[Row]:
    first = next((line for _, line in _lines(text)), "")
    # Spreadsheets separate by what their country's decimal comma leaves free.
    separator = max(",;\t", key=lambda one: (first.count(one), -",;\t".index(one)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not names:
                names = cells
                _check_header(names, f"{path}:{line}")
                continue
            yield line, _fields_of(cells, names, f"{path}:{line}")
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{start}: is no row of a table: {error}",
            hint='put a text that holds separators or line ends into quotes, "…", and double the quotes inside',
        ) from None


def _check_header(names: list[str], where: str) -> None:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: the column {_shown(twice)} is there twice", hint="remove one")
    fields = {name for kind in TASKS.values() for name in kind.model_fields}
    if not fields & set(names):
        raise ConfigError(
            f"{where}: names no field of a request: {plain(', '.join(names), 120)}",
            hint="the first row names the columns: prompt, seed, task, …",
        )


def _fields_of(cells: list[str], names: list[str], where: str) -> dict[str, Any]:
    if any(cells[len(names) :]):
        raise ConfigError(
            f"{where}: has {len(cells)} cells, the first row names {len(names)} columns",
            hint='put a text that holds separators into quotes, "…"',
        )
    fields: dict[str, Any] = {}
    for number, (name, cell) in enumerate(zip(names, cells, strict=False), 1):
        if cell and not name:
            raise ConfigError(f"{where}: column {number} has no name", hint="name it in the first row")
        if cell:
            fields[name] = _loras_in(cell, where) if name == "loras" else cell
    return fields


def _loras_in(cell: str, where: str) -> Any:
    """FILE:STRENGTH, several apart by ; or |, or JSON."""
    if cell.startswith(("[", "{")):
        return _json(cell, f"{where}: `loras`", "write FILE:0.8;OTHER:0.5, or a JSON list of such strings")
    return [part.strip() for part in re.split("[;|]", cell) if part.strip()]


_READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".txt": _plain_rows,
    ".jsonl": _json_rows,
    ".csv": _table_rows,
}
