"""A folder of pictures as one page: `sheet.html`, for any browser, without a network. Loads without torch.

The page is sheet.html beside this module, a style and a script, filled in here. It links the pictures, which stay the
files that they are, and repeats what their recipes say. Prompts and names may come from strangers: each goes through
`_text` on its way into the page, and a policy in the page's head lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from PIL import Image

from flux_ft import log
from flux_ft.errors import InputError, plain
from flux_ft.files import write_whole
from flux_ft.infer.outputs import numbered_pictures
from flux_ft.infer.records import Recipe, read_recipe

PAGE = Path(__file__).with_name("sheet.html")
SHEET = "sheet.html"
TEXT_CHARS = 4000
"""Of a prompt shown whole, more than any text encoder reads; the picture has all of it."""
OPTION_CHARS = 80
"""Of a prompt in a menu."""

FACETS = {"prompt": "prompts", "lora": "LoRAs", "strength": "strengths", "seed": "seeds", "task": "tasks"}
"""What pictures are filtered and grouped by, each with its plural."""
NONE, UNKNOWN = "none", "not known"
_SHOWN = ("steps", "guidance", "true_cfg", "seed")
_LEFT_OUT = {
    "prompt",
    "negative_prompt",
    "task",
    "width",
    "height",
    "width_px",
    "height_px",
    "finetune_strength",
    *_SHOWN,
}
_PLAIN: dict[str, Any] = {"true_cfg": 1.0}
"""Values that are not worth a line."""


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    file: str
    """Its path from the page's folder, POSIX."""
    width_px: int
    height_px: int
    recipe: Recipe | None
    """None for a picture that does not say how it was drawn."""

    @property
    def facets(self) -> dict[str, str]:
        """What it is filed under, by the names of FACETS."""
        if self.recipe is None:
            return dict.fromkeys(FACETS, UNKNOWN)
        request = self.recipe["request"]
        loras, strengths = _loras(self.recipe)
        return {
            "prompt": str(request.get("prompt", "")) or "(empty)",
            "lora": " + ".join(loras) or NONE,
            "strength": ", ".join(f"{one:g}" for one in strengths) or NONE,
            "seed": str(request.get("seed", UNKNOWN)),
            "task": str(request.get("task", "text-to-image")),
        }


def write_sheet(folder: Path, pictures: Sequence[Path] | None = None, title: str = "") -> Path:
    """Write `folder`/sheet.html, which shows `pictures`, or all that are named by numbers there, in their order.

    Pictures lie in `folder` or below it. One that tells nothing of itself is shown all the same; one that cannot be
    read is left out and named in a warning. Raises StorageError.
    """
    shown = []
    for path in numbered_pictures(folder) if pictures is None else pictures:
        try:
            shown.append(read_shown(path, folder))
        except InputError as error:
            log.warn(f"left out of {SHEET}: {error.message}")
    tables = [path.name for path in sorted(folder.glob("grid-*.png"))]
    name = title or folder.resolve().name
    target = folder / SHEET
    write_whole(target, (piece.encode("utf-8", "backslashreplace") for piece in _pieces(shown, name, tables)))
    return target


def read_shown(path: Path, folder: Path) -> Shown:
    """What the page shows of a picture. Raises InputError when it cannot be read."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"`{path}` cannot be read as a picture: {plain(str(error), 200)}") from error
    try:
        recipe = read_recipe(path)
    except InputError:
        recipe = None
    return Shown(path.relative_to(folder).as_posix(), width, height, recipe)


def sheet_html(shown: Sequence[Shown], title: str, tables: Sequence[str] = ()) -> str:
    """The page. It refers to the pictures beside it, and `tables` of them, and to nothing else."""
    return "".join(_pieces(shown, title, tables))


# --- The page. ---


def _pieces(shown: Sequence[Shown], title: str, tables: Sequence[str]) -> Iterator[str]:
    page = PAGE.read_text("utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head, _, foot = page.partition("<!-- body -->")
    yield Template(head).substitute(policy=policy, title=_text(title, 200))
    values = {name: _sorted(name, [one.facets[name] for one in shown]) for name in FACETS}
    places = {name: {value: place for place, value in enumerate(found)} for name, found in values.items()}
    count = f"{len(shown):,} picture{'' if len(shown) == 1 else 's'}"
    yield f'<header><p class="kicker">flux-ft contact sheet</p><h1>{_text(title, 200)}</h1><p class="facts">{count}'
    counts = {FACETS[name]: len(set(found) - {NONE, UNKNOWN}) for name, found in values.items()}
    yield "".join(f" · {number:,} {words}" for words, number in counts.items() if number > 1)
    yield "".join(f' · <a href="./{quote(name)}">{_text(name, 100)}</a>' for name in tables)
    yield "</p></header>\n"
    yield _bar(values)
    yield '<main><div class="cards">\n'
    for number, one in enumerate(shown):
        yield _card(number, one, places)
    yield "</div></main>\n"
    yield foot


def _sorted(name: str, values: Sequence[str]) -> list[str]:
    """Each once; numbers by size, words as they come."""
    found = list(dict.fromkeys(values))

    def by_number(value: str) -> float:
        try:
            return float(value)
        except ValueError:
            return math.inf

    return sorted(found, key=by_number) if name in ("strength", "seed") else found


def _bar(values: Mapping[str, Sequence[str]]) -> str:
    """Menus for what differs, the search and the size; without a script there is nothing to press."""
    varied = [name for name, found in values.items() if len(found) > 1]
    menus = "".join(
        f'<select name="{name}" aria-label="{name}"><option value="">all {FACETS[name]}</option>'
        + "".join(
            f'<option value="{place}">{_text(value, OPTION_CHARS)}</option>' for place, value in enumerate(values[name])
        )
        + "</select>"
        for name in varied
    )
    groups = "".join(f'<option value="{name}">by {name}</option>' for name in varied)
    grouping = f'<select id="group" aria-label="group"><option value="">in order</option>{groups}</select>' * bool(
        varied
    )
    return (
        '<div class="bar" role="search" hidden><div><input type="search" placeholder="Search prompts, files, facts" '
        f'aria-label="Search" autocomplete="off" spellcheck="false">{menus}{grouping}'
        '<label>size <input type="range" id="size" min="96" max="512" value="220"></label>'
        '<p class="hint"><span><kbd>/</kbd> search</span><span><kbd>←</kbd> <kbd>→</kbd> next, in large</span>'
        "<span><kbd>Esc</kbd> close, clear</span><output></output></p></div></div>\n"
    )


def _card(number: int, one: Shown, places: Mapping[str, Mapping[str, int]]) -> str:
    link = "./" + quote(one.file)
    filed = "".join(f' data-{name}="{places[name][value]}"' for name, value in one.facets.items())
    prompt = one.facets["prompt"] if one.recipe is not None else one.file
    return (
        f'<article class="card" id="p{number}"{filed}><a class="open" href="{link}">'
        f'<img src="{link}" alt="{_text(prompt, 200)}" width="{one.width_px}" height="{one.height_px}" '
        f'loading="lazy" decoding="async"></a><div class="about">{_about(one)}</div></article>\n'
    )


def _about(one: Shown) -> str:
    name = f'<p class="name"><bdi>{_text(one.file, 300)}</bdi></p>'
    if one.recipe is None:
        return f'<p class="soft">It does not say how it was drawn.</p>{name}'
    rows = "".join(f"<div><dt>{_text(key, 60)}</dt><dd>{_text(value, 600)}</dd></div>" for key, value in _facts(one))
    command = f"flux-ft generate --repeat {shlex.quote(one.file)}"
    return (
        f'<p class="prompt" dir="auto">{_text(one.facets["prompt"], TEXT_CHARS)}</p>{name}'
        f"<details><summary>{_summary(one)}</summary><dl>{rows}</dl></details>"
        f'<p class="repeat"><code>{_text(command, 600)}</code></p>'
    )


def _summary(one: Shown) -> str:
    assert one.recipe is not None
    loras, strengths = _loras(one.recipe)
    words = [f"seed {one.facets['seed']}"]
    words += [f"{name} × {strength:g}" for name, strength in zip(loras, strengths, strict=True)]
    return _text(" · ".join(words), 200)


def _facts(one: Shown) -> list[tuple[str, str]]:
    """The request as lines that can be read, shortest first."""
    recipe = one.recipe or {"request": {}}
    request = recipe["request"]
    loras, strengths = _loras(recipe)
    rows: list[tuple[str, Any]] = [
        ("task", one.facets["task"]),
        ("model", recipe.get("model")),
        ("size", f"{one.width_px} × {one.height_px} px"),
        *((name.replace("_", " "), request.get(name)) for name in _SHOWN if request.get(name) != _PLAIN.get(name)),
        ("negative prompt", request.get("negative_prompt")),
        *(("LoRA", f"{name}, strength {strength:g}") for name, strength in zip(loras, strengths, strict=True)),
        *((name.replace("_", " "), file) for name, file in _pictures(recipe)),
        *((name.replace("_", " "), value) for name, value in request.items() if name not in _LEFT_OUT),
        ("drawn on", " ".join(str(recipe[name]) for name in ("device", "dtype") if name in recipe)),
        ("by", " ".join(f"{name} {recipe[name]}" for name in ("flux_ft", "torch") if name in recipe)),
    ]
    return [(name, _worded(value)) for name, value in rows if value not in (None, "")]


def _worded(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (str, int)):
        return str(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _loras(recipe: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """Names, and strengths as they act: times `finetune_strength`."""
    adapters, times = recipe.get("adapters", []), recipe["request"].get("finetune_strength", 1.0)
    names = [str(one.get("file") or UNKNOWN).removesuffix(".safetensors") for one in adapters]
    return names, [float(one.get("strength", 1.0)) * times for one in adapters]


def _pictures(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, one.get("file") or "a picture in memory") for name, one in recipe.get("pictures", {}).items()]


def _text(text: str, most: int) -> str:
    """Text for the page or for a quoted attribute: what cannot be seen is a space, and past `most` it is cut."""
    return escape(plain(text, most))
