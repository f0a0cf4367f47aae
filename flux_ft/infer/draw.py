"""Requests to a folder of pictures: what `flux-ft generate` does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from flux_ft import log
from flux_ft.errors import ConfigError, StoppedByUser
from flux_ft.files import require_writable
from flux_ft.infer import records, sweep
from flux_ft.infer.grid import labelled_grid, save_png
from flux_ft.infer.outputs import missing, plan_outputs
from flux_ft.infer.prompts import read_requests
from flux_ft.infer.records import read_recipe, recipe_digest, save_picture
from flux_ft.infer.runner import Runner
from flux_ft.infer.sheet import write_sheet
from flux_ft.infer.sweep import Axis, Table
from flux_ft.infer.tasks import LARGEST_SEED, Request, parse

MOST_PICTURES = 100_000
GRID_CELL_PX = (128, 512)
"""Narrowest and widest cell of a grid."""


@dataclass(frozen=True)
class Drawing:
    """What to draw, and what to make of the pictures."""

    tables: tuple[Table, ...]
    """All pictures, in tables; one that stands in several places is drawn once."""
    suffix: str = ".png"
    grid: bool = False
    sheet: bool = False
    resume: bool = False

    @property
    def requests(self) -> list[Request]:
        """Every picture, table by table and row by row."""
        return [request for table in self.tables for request in table.requests]


@dataclass(frozen=True)
class Drawn:
    """The files that were made, or were there already."""

    folder: Path
    pictures: tuple[Path, ...]
    earlier: int
    """How many of them an earlier call had drawn."""
    grids: tuple[Path, ...]
    sheet: Path | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "pictures": [str(path) for path in self.pictures],
            "earlier": self.earlier,
            "grids": [str(path) for path in self.grids],
            "sheet": str(self.sheet) if self.sheet else None,
        }

    def for_people(self) -> str:
        """For people."""
        new = len(self.pictures) - self.earlier
        words = f"wrote {new} picture{'' if new == 1 else 's'} to {self.folder}"
        if self.earlier:
            words += f"; {self.earlier} {'was' if self.earlier == 1 else 'were'} there already"
        return "\n".join([words, *(f"see {path}" for path in (*self.grids, *([self.sheet] if self.sheet else [])))])


def plan_tables(
    prompts: Sequence[str],
    prompt_file: Path | None,
    fields: Mapping[str, Any],
    seed: int,
    count: int,
    axes: tuple[Axis | None, Axis | None, Sequence[Axis]] = (None, None, ()),
    checkpoints: Path | None = None,
    base: bool = False,
) -> tuple[Table, ...]:
    """What the command line asks for, as tables: prompts down and seeds across where `axes` (x, y, others) leave room.

    `fields` are those of every request; `checkpoints` a run's folder whose LoRAs stand across. Raises ConfigError.
    """
    if prompt_file is not None:
        if prompts:
            raise ConfigError("--prompt and --prompts are both given", hint="put all prompts into the file")
        requests = read_requests(prompt_file, {**fields, "seed": seed})
    else:
        named = {"prompt" for axis in (axes[0], axes[1], *axes[2]) if axis is not None and axis.name == "prompt"}
        given = list(prompts) or ([""] if named or fields.get("task", "text-to-image") != "text-to-image" else [])
        if not given:
            raise ConfigError(
                "there is nothing to draw",
                hint='give --prompt "…", --prompts FILE or --repeat PICTURE; see `flux-ft generate --help`',
            )
        requests = [parse({**fields, "prompt": prompt, "seed": seed}) for prompt in given]
    x, y, rest = axes
    if checkpoints is not None:
        if x is not None:
            raise ConfigError("--checkpoints and --x are both given", hint="sweep the other with --y")
        x = sweep.make_axis("checkpoint", sweep.run_checkpoints(checkpoints))
    pictures = len(requests) * count * math.prod(len(axis.values) for axis in (x, y, *rest) if axis is not None)
    if pictures > MOST_PICTURES:
        raise ConfigError(f"{pictures:,} pictures; at most {MOST_PICTURES:,} are drawn at once", hint="draw in parts")
    if max(one.seed for one in requests) + count - 1 > LARGEST_SEED:
        raise ConfigError(f"the last seed is above {LARGEST_SEED}, the largest", hint="begin with a smaller --seed")
    if x is not None or y is not None or rest:
        tables = _swept(requests, x, y, rest, count)
    else:
        rows = tuple(tuple(one.model_copy(update={"seed": one.seed + i}) for i in range(count)) for one in requests)
        first = rows[0][0].seed
        same = all(row[0].seed == first for row in rows)
        columns = tuple(f"seed {first + i}" if same else "" for i in range(count))
        tables = [Table("", columns, tuple(one.prompt for one in requests), rows)]
    return tuple(sweep.with_base(table) if base else table for table in tables)


def _swept(
    requests: Sequence[Request], x: Axis | None, y: Axis | None, rest: Sequence[Axis], count: int
) -> list[Table]:
    """Every request's tables; of several requests one below the other, where nothing else stands down."""
    if count > 1 and any(axis.name == "seed" for axis in (x, y, *rest) if axis is not None):
        raise ConfigError("--count and an axis `seed` are both given", hint="the axis says how many: seed=1..4")
    groups = [_tables_of(one, x, y, rest, count) for one in requests]
    heads = [[(table.title, table.column_labels) for table in group] for group in groups]
    if y is None and len(requests) > 1 and all(head == heads[0] for head in heads):
        prompts = tuple(one.prompt for one in requests)
        return [
            replace(same[0], row_labels=prompts, rows=tuple(table.rows[0] for table in same))
            for same in zip(*groups, strict=True)
        ]
    return [
        replace(table, title=", ".join(filter(None, [one.prompt if len(requests) > 1 else "", table.title])))
        for one, group in zip(requests, groups, strict=True)
        for table in group
    ]


def _tables_of(one: Request, x: Axis | None, y: Axis | None, rest: Sequence[Axis], count: int) -> list[Table]:
    seeds = [sweep.make_axis("seed", range(one.seed, one.seed + count))] if count > 1 else []
    rest = [*rest, *seeds]
    if x is None and y is None:
        x, *rest = rest
    elif x is None and seeds:
        x, *rest = rest[-1], *rest[:-1]
    if x is not None:
        return sweep.cells(one, x, y, rest)
    assert y is not None
    lying = sweep.cells(one, y, None, rest)
    return [Table(table.title, ("",), table.column_labels, tuple((cell,) for cell in table.rows[0])) for table in lying]


def draw_to_folder(runner: Runner, drawing: Drawing, output: Path, go_on: str = "") -> Drawn:
    """Draw and write. Earlier pictures in `output` stay: new ones take the next free numbers.

    With `drawing.resume` what is there already is not drawn again. `go_on` is the command to give after a stop. Raises
    StoppedByUser on Ctrl-C, and as Runner.
    """
    requests = drawing.requests
    if {one.finetune_strength for one in requests} != {1.0} and not any(runner.loras_of(one) for one in requests):
        log.warn("no LoRA is given, so strengths change nothing")
    jobs = [runner.prepare(request) for request in requests]
    recipes = [runner.recipe_of(job) for job in jobs]
    digests = [recipe_digest(recipe) for recipe in recipes]
    places = {digest: index for index, digest in reversed(list(enumerate(digests)))}
    once = sorted(places.values())
    existed = output.is_dir()
    require_writable(output, "--output")
    plan = plan_outputs([recipes[index] for index in once], output, drawing.suffix, resume=drawing.resume)
    open_places = missing(plan)
    wanted = [jobs[once[place]] for place in open_places]
    try:
        with log.progress("draw", runner.num_passes(wanted)) as bar:
            for row, image in runner.draw_jobs(wanted, on_step=bar.advance):
                place = open_places[row]
                # Asked anew: how the weights are held is known by now.
                save_picture(image, plan[place].path, runner.recipe_of(jobs[once[place]]))
    except KeyboardInterrupt:
        raise StoppedByUser(
            f"stopped; {sum(one.path.is_file() for one in plan)} of {len(plan)} pictures are in {output}, whole",
            hint=f"go on: {go_on}" if go_on else "call it again with --resume",
        ) from None
    finally:
        if not existed:
            with suppress(OSError):
                output.rmdir()  # which it does if nothing was drawn
    files = {digests[once[place]]: one.path for place, one in enumerate(plan)}
    paths = [files[digest] for digest in digests]
    grids = _write_grids(drawing, paths, output) if drawing.grid else ()
    sheet = write_sheet(output) if drawing.sheet else None
    return Drawn(output, tuple(dict.fromkeys(paths)), len(plan) - len(open_places), grids, sheet)


def _write_grids(drawing: Drawing, paths: Sequence[Path], output: Path) -> tuple[Path, ...]:
    """A PNG a table, numbered as its first picture."""
    grids: list[Path] = []
    start = 0
    for table in drawing.tables:
        width = len(table.rows[0])
        rows = [paths[start + i : start + i + width] for i in range(0, width * len(table.rows), width)]
        start += width * len(table.rows)
        with Image.open(rows[0][0]) as first:
            cell = min(GRID_CELL_PX[1], max(GRID_CELL_PX[0], first.width))
        path = output / f"grid-{rows[0][0].stem}.png"
        if path in grids or (path.exists() and not drawing.resume):
            path = output / f"grid-{rows[0][0].stem}-{len(grids) + 1}.png"
        save_png(labelled_grid(rows, table.row_labels, table.column_labels, cell, table.title), path)
        grids.append(path)
    return tuple(grids)


@dataclass(frozen=True)
class Repeated:
    """A picture that was drawn again."""

    source: Path
    picture: Path
    same: bool | None
    """To the pixel; None where the first one's recipe does not say."""
    words: str

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"source": str(self.source), "picture": str(self.picture), "same": self.same, "told": self.words}

    def for_people(self) -> str:
        """For people."""
        return f"wrote {self.picture}: {self.words}"


def repeat(
    source: Path,
    output: Path,
    suffix: str = ".png",
    device: str | None = None,
    instead: Mapping[str, str | None] = MappingProxyType({}),
    others: Sequence[Path] = (),
    **wishes: Any,
) -> Repeated:
    """Draw a picture again from what it, or its sidecar, says of itself.

    `instead` of what is recorded: `model`, `parts` and `redux`, where given; `others` are files to look for LoRAs and
    pictures in. Raises InputError that names what is missing or has changed.
    """
    recipe = read_recipe(source)
    files = records.require_inputs(recipe, source.parent, others)
    settings = records.runner_settings(recipe, files)
    settings |= {name: value for name, value in instead.items() if value is not None}
    runner = Runner(**settings, device=device, **wishes)
    job = runner.prepare(records.recipe_request(recipe, files))
    require_writable(output, "--output")
    path = plan_outputs([runner.recipe_of(job)], output, suffix)[0].path
    with log.progress("draw", runner.num_passes([job])) as bar:
        ((_, image),) = runner.draw_jobs([job], on_step=bar.advance)
    new = save_picture(image, path, runner.recipe_of(job))
    return Repeated(source, path, *records.tell_repeat(recipe, new))
