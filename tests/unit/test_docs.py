"""What docs say that code knows too is what the code says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from annotated_types import Ge, Le
from PIL import Image

from flux_ft.adapters.formats import support_table
from flux_ft.cli import generate
from flux_ft.errors import ConfigError
from flux_ft.families import quantize
from flux_ft.families.registry import FLUX1_DEV, VARIANTS
from flux_ft.infer.companions import CONTROL_LORAS, setup_for
from flux_ft.infer.control import DEPTH_MODELS
from flux_ft.infer.fit import BYTES, FLUX1_SIZES, FitWishes, Machine, choose_fit
from flux_ft.infer.runner import Runner
from flux_ft.infer.sweep import AXES
from flux_ft.infer.tasks import LARGEST_SEED, TASKS, Lora, Request, Ultra, resolved
from flux_ft.infer.ultra import SCALE, native_size

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = Image.new("RGB", (64, 64))
OPTIONS = {"finetune_strength": "strength", "loras": "lora"}
"""Of the command line, where a field's is not its own name."""
WORDS = {"prompt": "text", "negative_prompt": "text; needs `true_cfg` above 1"}
"""Values of fields without a range."""
UNLESS_GIVEN = {
    "steps": "by model and task", "guidance": "by model and task", "width": "see Sizes", "height": "see Sizes",
    "mask": "what is transparent in `image`", "preprocessed_image": "made from `control_image`",
}  # fmt: skip
"""What None stands for."""


def bounds_of(field: Any) -> str:
    least, most = (next(one for one in field.metadata if isinstance(one, kind)) for kind in (Ge, Le))
    return f"{least.ge} to {'2⁶³ - 1' if most.le == LARGEST_SEED else most.le}"


def values_of(name: str, field: Any) -> str:
    if name == "loras":
        return f"files, each with a strength of {bounds_of(Lora.model_fields['strength'])}"
    if field.annotation is bool:
        return "yes or no"
    if name == "aspect_ratio":
        return f"{Ultra.WIDEST * 9:.0f}:9 to 9:{Ultra.WIDEST * 9:.0f}"
    if Path in get_args(field.annotation) or "Image" in str(field.annotation):
        return "picture"
    return WORDS.get(name) or bounds_of(field)


def default_of(name: str, field: Any) -> str:
    if field.is_required():
        return "needed, or `preprocessed_image`" if name == "control_image" else "needed"
    if field.default is None:
        return UNLESS_GIVEN.get(name, "none")
    if isinstance(field.default, float):
        return f"{field.default:g}"
    return {"": "empty", "()": "none", "False": "no", "True": "yes"}.get(str(field.default), str(field.default))


def fields_table() -> str:
    """Every field of the request types, with its values, its default and the tasks that take it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for task, kind in TASKS.items():
        for name, field in kind.model_fields.items():
            if name != "task":
                rows.setdefault((name, values_of(name, field), default_of(name, field)), []).append(task)
    lines = ["| field | tasks | values | default |", "|---|---|---|---|"]
    for (name, values, default), tasks in rows.items():
        lines.append(f"| `{name}` | {'all' if len(tasks) == len(TASKS) else ', '.join(tasks)} | {values} | {default} |")
    return "\n".join(lines)


def steps_table() -> str:
    """Steps and guidance of each task that a model can do."""
    lines = ["| model | steps, guidance |", "|---|---|"]
    for variant in VARIANTS.values():
        settings: dict[str, list[str]] = {}
        for task, kind in TASKS.items():
            given = dict.fromkeys((name for name, field in kind.model_fields.items() if field.is_required()), PICTURE)
            request = resolved(kind.model_validate(given), variant)
            family: Any = SimpleNamespace(variant=variant)
            try:
                setup_for(request, family, control=Path("any"), say=lambda words: None)
            except ConfigError:
                continue
            settings.setdefault(f"{request.steps}, {request.guidance:g}", []).append(task)
        told = [f"{', '.join(tasks)} {pair}" if len(settings) > 1 else pair for pair, tasks in settings.items()]
        lines.append(f"| {variant.name} | {'; '.join(told)} |")
    return "\n".join(lines)


def fit_table() -> str:
    """What FLUX.1-dev takes on a card, by the estimate, rung by rung, and how far off the velocity is."""
    off = dict(re.findall(r"(int8|fp8|nf4)\s+([\d.]+ %)", quantize.__doc__ or ""))
    lines = [
        "| weights | 1024² | decoded in tiles | host memory | velocity off by |",
        "|---|---|---|---|---|",
    ]
    rungs = [("bf16", False), ("int8", False), ("nf4", False), ("bf16", True), ("int8", True), ("fp8", False)]
    for storage, stream in rungs:
        gb = [
            choose_fit(
                FLUX1_SIZES, (1024, 1024), Machine("cuda", None),
                FitWishes(cast(quantize.Storage, storage), stream, vae_tiling=tiled),
            ).needs_bytes / 1e9
            for tiled in (False, True)
        ]  # fmt: skip
        name = f"{storage}, streamed" if stream else storage
        host = f"{FLUX1_SIZES.denoiser * BYTES[storage] / 1e9:.1f} GB" if stream else "–"
        lines.append(f"| {name} | {gb[0]:.1f} GB | {gb[1]:.1f} GB | {host} | {off.get(storage, '–')} |")
    return "\n".join(lines)


def written(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def python_in(text: str) -> Iterator[str]:
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield block[1]


def test_the_table_of_what_tools_drop_is_current() -> None:
    assert support_table().strip() in written("lora_files.md"), "write support_table() into docs/lora_files.md again"


@pytest.mark.parametrize("table", [fields_table, steps_table, fit_table])
def test_the_tables_of_drawing_are_current(table: Callable[[], str]) -> None:
    assert table() in written("drawing.md"), f"write this into docs/drawing.md:\n{table()}"


def test_every_field_is_an_option_of_generate() -> None:
    options = inspect.signature(generate).parameters.keys()
    fields = {OPTIONS.get(name, name) for kind in TASKS.values() for name in kind.model_fields}
    assert fields <= options


def test_drawing_names_every_axis_and_all_that_is_fetched() -> None:
    words = [*AXES, *DEPTH_MODELS, *(repository for repository, _ in CONTROL_LORAS.values())]
    assert [word for word in words if f"`{word}`" not in written("drawing.md")] == []


def test_the_sizes_of_ultra_are_current() -> None:
    told = re.findall(r"(\d+:\d+)\s+(?:is\s+)?(\d{4}) × (\d{4})", written("drawing.md"))
    assert len(told) == 3
    for ratio, *sides in told:
        assert [SCALE * side for side in native_size(Ultra(aspect_ratio=ratio).ratio, FLUX1_DEV)] == [*map(int, sides)]


def test_the_python_in_drawing_makes_requests_of_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []
    started = Request.__init__

    def noted(self: Request, **fields: Any) -> None:
        started(self, **fields)
        made.append(self.task)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Request, "__init__", noted)
    monkeypatch.setattr(Runner, "draw", lambda runner, requests: [PICTURE for _ in requests])
    names: dict[str, Any] = {}
    for code in python_in(written("drawing.md")):
        exec(code, names)
    assert set(made) == set(TASKS)
