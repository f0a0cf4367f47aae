"""Sweeps: tables of requests that differ in what their axes say. Loads without torch.

    --x strength=0..1:5 --y prompt="a red cat|a blue dog" --axis seed=1,2
    → two tables, one a seed; strengths across, prompts down

A sweep is nothing but a list of requests; what draws them need not know.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from flux_ft.errors import ConfigError, plain
from flux_ft.infer.prompts import exists, parse_lora
from flux_ft.infer.tasks import Lora, Request, parse
from flux_ft.runfile import load_run

MOST_CELLS = 10_000
BASE = "base"
"""The model without its LoRAs: the label of its pictures, and a value of the axis `checkpoint`."""
COMFY_SUFFIX = "-comfyui"
"""Ends the name of the second file that a run exports; both hold the same LoRA."""

_FIELDS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "strength": "finetune_strength", "checkpoint": "loras",
    "seed": "seed", "steps": "steps", "guidance": "guidance", "true_cfg": "true_cfg",
    "image_prompt_strength": "image_prompt_strength", "aspect_ratio": "aspect_ratio",
}  # fmt: skip
AXES = tuple(_FIELDS)
"""What can be swept. `checkpoint` is LoRA files, checkpoints' folders or a run's folder, each beside the LoRAs that the
request has; `strength` multiplies all LoRAs."""
_ALIASES = {field: name for name, field in _FIELDS.items()} | {"lora": "checkpoint", "loras": "checkpoint"}
_WHOLE, _TEXTS = ("seed", "steps"), ("prompt", "negative_prompt")
_NUMBERS = (*_WHOLE, "strength", "guidance", "true_cfg", "image_prompt_strength")
_RANGE = re.compile(r"(.+?)\.\.(.+?)(?::(\d{1,6}))?")
_HOW = "write values apart by commas (prompts by |), or a range: strength=0..1:5, seed=1..8"


@dataclass(frozen=True)
class Axis:
    """What varies: a name of AXES and its values; a LoRA or None (the base) for `checkpoint`."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """What stands beside each value's pictures."""
        if self.name == "checkpoint":
            return _lora_labels(self.values)
        if self.name in (*_TEXTS, "aspect_ratio"):
            return tuple(str(value) or "(empty)" for value in self.values)
        return tuple(f"{self.name.replace('_', ' ')} {value:g}" for value in self.values)

    def fields(self, request: Request, value: Any) -> dict[str, Any]:
        """What of the request the value changes."""
        if self.name == "checkpoint":
            return {"loras": (*request.loras, *([value] if value is not None else []))}
        return {_FIELDS[self.name]: value}


@dataclass(frozen=True)
class Table:
    """One grid of pictures."""

    title: str
    """What all of its pictures share and other tables have otherwise; empty for a single table."""
    column_labels: tuple[str, ...]
    row_labels: tuple[str, ...]
    rows: tuple[tuple[Request, ...], ...]

    @property
    def requests(self) -> list[Request]:
        """Row by row."""
        return [request for row in self.rows for request in row]


# --- Axes out of words. ---


def parse_axis(text: str) -> Axis:
    """`NAME=VALUES` of the command line, for example strength=0,0.5,1 or seed=1..8 or prompt=a cat|a dog.

    `a..b:n` are n numbers evenly from a to b; without n the whole numbers from a to b. Raises ConfigError.
    """
    name, equals, words = (part.strip() for part in text.partition("="))
    name = _ALIASES.get(name, name)
    if not equals or name not in _FIELDS:
        near = difflib.get_close_matches(name, (*AXES, *_ALIASES), n=1, cutoff=0.4)
        raise ConfigError(
            f"`{plain(text, 120)}` is no axis" if not equals else f"there is no axis `{plain(name, 60)}`",
            hint=(f"did you mean `{near[0]}`? " if near and equals else "")
            + f"write NAME=VALUES with one of {', '.join(AXES)}; for example strength=0,0.5,1",
        )
    values: list[Any] = []
    if not words:
        raise ConfigError(f"the axis `{name}` has no values", hint=_HOW)
    for part in words.split("|" if name in _TEXTS else ","):
        values += _values(name, part.strip(), text)
        if len(values) > MOST_CELLS:
            raise _too_many(f"{plain(text, 60)}: more than {MOST_CELLS:,} values")
    return make_axis(name, values)


def make_axis(name: str, values: Sequence[Any]) -> Axis:
    """An axis of values that are there. Raises ConfigError when there are none, or one twice."""
    axis = Axis(name, tuple(values))
    if not axis.values:
        raise ConfigError(f"the axis `{name}` has no values", hint=_HOW)
    twice = next((label for value, label in zip(values, axis.labels, strict=True) if values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"the axis `{name}` has a value twice: {plain(twice, 60)}", hint="leave one out")
    return axis


def _values(name: str, part: str, text: str) -> list[Any]:
    if not part and name not in _TEXTS:
        raise ConfigError(f"{plain(text, 120)}: a value is empty", hint=_HOW)
    if name in _NUMBERS:
        return _numbers(name, part, text)
    if name == "checkpoint":
        return _loras(part)
    return [part]


def _numbers(name: str, part: str, text: str) -> list[Any]:
    match = _RANGE.fullmatch(part)
    if match is None:
        return [_number(name, part, text)]
    first, last = (_number(name, end.strip(), text) for end in match.groups()[:2])
    if match[3] is None:
        if name not in _WHOLE:
            raise ConfigError(f"{plain(text, 120)}: how many values from {part}?", hint=f"write {part}:5")
        count = abs(last - first) + 1
    else:
        count = int(match[3])
    if count > MOST_CELLS:
        raise _too_many(f"{plain(text, 60)}: {count:,} values")
    if count < 2 or first == last:
        raise ConfigError(f"{plain(text, 120)}: {part} is no range of two values or more", hint=_HOW)
    if name not in _WHOLE:
        return [round(first + (last - first) * index / (count - 1), 10) for index in range(count)]
    if (last - first) % (count - 1):
        raise ConfigError(
            f"{plain(text, 120)}: {count} even steps from {first} to {last} are no whole numbers",
            hint=f"{name} takes whole numbers; choose another count, or list them",
        )
    return [first + (last - first) // (count - 1) * index for index in range(count)]


def _number(name: str, text: str, whole: str) -> Any:
    convert: Callable[[str], Any] = int if name in _WHOLE else float
    try:
        if not re.fullmatch(r"[-+]?[0-9.]{1,30}(e[-+]?[0-9]{1,3})?", text):
            raise ValueError
        return convert(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise ConfigError(f"{plain(whole, 120)}: {text[:60]!a} is not {kind}", hint=_HOW) from None


def _loras(text: str) -> list[Lora | None]:
    """`base` is none; a run's folder stands for its checkpoints and its LoRA."""
    path = Path(text).expanduser()
    if text == BASE and not exists(path):
        return [None]
    if exists(path / "run.yaml"):
        return list(run_checkpoints(path))
    lora = parse_lora(text, "checkpoint")
    if not exists(lora.file):
        raise ConfigError(
            f"checkpoint: there is no file `{plain(str(lora.file))}`",
            hint="give LoRA files, checkpoints' folders, or a run's folder",
        )
    return [lora]


def _lora_labels(values: Sequence[Lora | None]) -> tuple[str, ...]:
    """File names, or steps of a run; with the folder before them where two would be alike."""
    short = [BASE if one is None else _short(one.file) for one in values]
    full = [
        f"{_home(one.file)}/{name}" if one is not None and short.count(name) > 1 else name
        for one, name in zip(values, short, strict=True)
    ]
    return tuple(
        name if one is None or one.strength == 1 else f"{name}: {one.strength:g}"
        for one, name in zip(values, full, strict=True)
    )


def _short(file: Path) -> str:
    step = re.fullmatch(r"step-(\d+)", file.name)
    return f"step {int(step[1])}" if step else file.stem


def _home(file: Path) -> str:
    folder = file.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder).name


# --- Tables out of axes. ---


def cells(base: Request, x: Axis, y: Axis | None = None, rest: Sequence[Axis] = ()) -> list[Table]:
    """Tables of `base` with every combination of values: x across, y down, a table for each combination of the rest.

    Raises ConfigError: an axis twice, too many cells, a value that the task does not take.
    """
    axes = [x, *([y] if y is not None else []), *rest]
    names = [axis.name for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"the axis `{twice}` is given twice", hint="give its values in one")
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST_CELLS:
        raise _too_many(f"{' × '.join(str(len(axis.values)) for axis in axes)} values are {count:,} pictures")
    tables = []
    for chosen in product(*(_labelled(axis) for axis in rest)):
        shared = base
        for axis, (value, _) in zip(rest, chosen, strict=True):
            shared = with_value(shared, axis, value)
        lines = [with_value(shared, y, value) for value in y.values] if y is not None else [shared]
        rows = tuple(tuple(with_value(line, x, value) for value in x.values) for line in lines)
        title = ", ".join(label for _, label in chosen)
        tables.append(Table(title, x.labels, y.labels if y is not None else ("",), rows))
    return tables


def with_value(request: Request, axis: Axis, value: Any) -> Request:
    """The request with one value of the axis. Raises ConfigError."""
    fields = {name: getattr(request, name) for name in request.model_fields_set | {"task"}}
    return parse(fields | axis.fields(request, value), f"the axis {axis.name}")


def _labelled(axis: Axis) -> list[tuple[Any, str]]:
    return list(zip(axis.values, axis.labels, strict=True))


def _too_many(what: str) -> ConfigError:
    return ConfigError(f"{what}; at most {MOST_CELLS:,} are drawn at once", hint="sweep less, or in parts")


# --- Beside the base. ---


def on_base(request: Request) -> Request:
    """The same drawn by the base model."""
    return request.model_copy(update={"finetune_strength": 0.0})


def with_base(table: Table) -> Table:
    """The table with the base model's pictures beside it, each once where one stands for all.

    That is one column where only LoRAs and strengths vary across, one row where they vary down, or else a column before
    each other. A table without LoRAs has them all the same.
    """
    keys = [[_base_key(one) for one in row] for row in table.rows]
    if all(len(set(row)) == 1 for row in keys):
        rows = tuple((on_base(row[0]), *row) for row in table.rows)
        columns = table.column_labels if any(table.column_labels) else ("with LoRA", *table.column_labels[1:])
        return Table(table.title, (BASE, *columns), table.row_labels, rows)
    if all(len(set(column)) == 1 for column in zip(*keys, strict=True)):
        top = tuple(on_base(one) for one in table.rows[0])
        return Table(table.title, table.column_labels, (BASE, *table.row_labels), (top, *table.rows))
    pairs = tuple(label for name in table.column_labels for label in (f"{BASE}, {name}", name))
    rows = tuple(tuple(each for one in row for each in (on_base(one), one)) for row in table.rows)
    return Table(table.title, pairs, table.row_labels, rows)


def _base_key(request: Request) -> str:
    """Equal for requests that the base model draws alike."""
    kept: Mapping[str, Any] = {
        name: value
        for name, value in ((name, getattr(request, name)) for name in type(request).model_fields)
        if name not in ("loras", "finetune_strength")
    }
    return repr(sorted((name, repr(value)) for name, value in kept.items()))


# --- A run's checkpoints. ---


def run_checkpoints(run_folder: Path) -> list[Lora]:
    """The LoRA of each checkpoint of a run, by step, and then the one that it exported, if it is finished.

    Raises ConfigError for a folder without them, and for a full fine-tune, whose checkpoints are whole models.
    """
    if not (run_folder / "run.yaml").is_file():
        raise ConfigError(f"`{run_folder}` is no run's folder: it has no run.yaml", hint="give the `output` of a run")
    config = load_run(run_folder / "run.yaml").config
    if config.finetune_type != "lora":
        raise ConfigError(
            f"`{run_folder}` is a full fine-tune, whose checkpoints are whole models and no LoRAs",
            hint="draw with the LoRA that it exported: --lora FILE",
        )
    steps = sorted(path.parent for path in run_folder.glob("checkpoints/step-??????/manifest.json"))
    exported = [run_folder / f"{config.slug}{end}.safetensors" for end in ("", COMFY_SUFFIX)]
    final = [path for path in exported if path.is_file()][:1]
    if not steps and not final:
        raise ConfigError(
            f"`{run_folder}` holds no checkpoint and no LoRA yet",
            hint="let the run go on; `checkpoint.every` says how often one is saved, `checkpoint.keep` how many stay",
        )
    if final:  # the last step's checkpoint is the same LoRA
        steps = [path for path in steps if path.name != f"step-{config.iterations:06d}"]
    return [Lora(file=path, strength=1.0) for path in [*steps, *final]]
