"""Sweeps: axes out of words, tables out of axes, the base beside them, a run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.infer.sweep import (
    MOST_CELLS,
    Axis,
    cells,
    make_axis,
    parse_axis,
    run_checkpoints,
    with_base,
)  # fmt: skip
from flux_ft.infer.tasks import Fill, Lora, TextToImage
from flux_ft.runfile import dump_run

BASE = TextToImage(prompt="a cat", seed=3)


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    files = [tmp_path / name for name in ("one.safetensors", "b/one.safetensors", "two.safetensors")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return files


@pytest.mark.parametrize(
    ("text", "name", "values", "labels"),
    [
        ("strength=0,0.5, 1", "strength", (0.0, 0.5, 1.0), ("strength 0", "strength 0.5", "strength 1")),
        ("strength=0..1:5,2", "strength", (0.0, 0.25, 0.5, 0.75, 1.0, 2.0), None),
        ("guidance=1..0.7:4", "guidance", (1.0, 0.9, 0.8, 0.7), None),
        ("finetune_strength=1e-1", "strength", (0.1,), None),
        ("seed=1..3,9", "seed", (1, 2, 3, 9), ("seed 1", "seed 2", "seed 3", "seed 9")),
        ("seed=10..4:3", "seed", (10, 7, 4), None),
        ("steps = 4,28", "steps", (4, 28), ("steps 4", "steps 28")),
        ("prompt=a cat, red| a = b |", "prompt", ("a cat, red", "a = b", ""), ("a cat, red", "a = b", "(empty)")),
    ],
)
def test_an_axis_in_words(text: str, name: str, values: tuple[object, ...], labels: tuple[str, ...] | None) -> None:
    axis = parse_axis(text)
    assert (axis.name, axis.values) == (name, values)
    assert list(map(type, axis.values)) == list(map(type, values))
    assert labels is None or axis.labels == labels


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("strength", "write NAME=VALUES with one of prompt,"),
        ("strenght=1", "did you mean `strength`?"),
        ("lr=1", "there is no axis `lr`"),
        ("strength=", "has no values"),
        ("strength=0,,1", "a value is empty"),
        ("strength=0,1,0.0", "a value twice: strength 0"),
        ("strength=much", "'much' is not a number"),
        ("strength=nan", "'nan' is not a number"),
        ("strength=1_0", "'1_0' is not a number"),
        ("seed=1.5", "'1.5' is not a whole number"),
        ("strength=0..1", "write 0..1:5"),
        ("strength=0..1:1", "no range of two values"),
        ("strength=1..1:3", "no range of two values"),
        ("seed=1..4:3", "no whole numbers"),
        ("seed=0..99999999999", "at most 10,000"),
        ("strength=0..1:999999", "at most 10,000"),
        ("seed=" + ",".join(map(str, range(10_001))), "at most 10,000"),
        ("checkpoint=none.safetensors", "there is no file `none.safetensors`"),
        ("checkpoint=" + "x" * 300, "there is no file"),
        ("checkpoint=a\0b", "there is no file `a b`"),
        ("seed=\x1b[2J", "'\\x1b[2J' is not a whole number"),
    ],
)
def test_a_wrong_axis_is_one_message(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_axis(text)
    words = f"{caught.value.message} | {caught.value.hint}"
    assert told in words
    assert words.isprintable()
    assert len(words) < 500


def test_x_is_across_y_is_down_and_the_rest_are_tables() -> None:
    tables = cells(BASE, Axis("strength", (0.0, 1.0, 2.0)), parse_axis("prompt=a|b"), [parse_axis("seed=1,2")])
    assert [table.title for table in tables] == ["seed 1", "seed 2"]
    for seed, table in enumerate(tables, 1):
        assert table.column_labels == ("strength 0", "strength 1", "strength 2")
        assert table.row_labels == ("a", "b")
        assert [[(one.prompt, one.finetune_strength, one.seed) for one in row] for row in table.rows] == [
            [(prompt, strength, seed) for strength in (0.0, 1.0, 2.0)] for prompt in ("a", "b")
        ]
        assert len(table.requests) == 6
    (alone,) = cells(BASE, parse_axis("seed=1,2"))
    assert (alone.title, alone.row_labels, len(alone.rows)) == ("", ("",), 1)


def test_what_no_axis_names_stays() -> None:
    fill = Fill(prompt="x", image=Path("in.png"), steps=7)
    (table,) = cells(fill, parse_axis("seed=1,2"))
    assert table.requests == [fill.model_copy(update={"seed": seed}) for seed in (1, 2)]


def test_checkpoints_act_beside_the_requests_own_loras(loras: list[Path]) -> None:
    style = Lora(file=Path("style.safetensors"), strength=0.5)
    axis = parse_axis(f"checkpoint=base,{loras[0]},{loras[1]}:0.5,{loras[2]}:-1")
    assert axis.labels == ("base", f"{loras[0].parent.name}/one", "b/one: 0.5", "two: -1")
    (table,) = cells(BASE.model_copy(update={"loras": (style,)}), axis)
    added = [one.loras for one in table.requests]
    assert [found[0] for found in added] == [style] * 4
    assert [[(one.file, one.strength) for one in found[1:]] for found in added] == [
        [], [(loras[0], 1.0)], [(loras[1], 0.5)], [(loras[2], -1.0)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        ("strength=0,3", "seed=1,2", "the axis strength: `finetune_strength` is 3"),
        ("seed=1,2", "seed=3,4", "the axis `seed` is given twice"),
        ("image_prompt_strength=0,1", "seed=1,2", "no `image_prompt_strength`"),
        ("seed=0..999", "strength=0..1:11", "1000 × 11 values are 11,000 pictures; at most 10,000"),
        ("negative_prompt=a,b|c", "seed=1,2", "`true_cfg`"),
    ],
)
def test_what_cannot_be_drawn_is_refused(x: str, y: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cells(BASE, parse_axis(x), parse_axis(y))
    assert told in caught.value.message


def test_the_largest_sweep_is_allowed() -> None:
    (table,) = cells(BASE, parse_axis("seed=1..100"), parse_axis("strength=0..2:100"))
    assert len(table.requests) == MOST_CELLS
    with pytest.raises(ConfigError, match="has no values"):
        make_axis("seed", [])


def test_a_table_gets_the_base_once_where_one_stands_for_all(loras: list[Path]) -> None:
    checkpoints = parse_axis(f"checkpoint={loras[0]},{loras[2]}")
    (across,) = map(with_base, cells(BASE, checkpoints, parse_axis("seed=1,2")))
    assert across.column_labels == ("base", "one", "two")
    assert [(row[0].seed, row[0].finetune_strength) for row in across.rows] == [(1, 0), (2, 0)]
    (down,) = map(with_base, cells(BASE, parse_axis("seed=1,2"), parse_axis("strength=0.5,1")))
    assert down.row_labels == ("base", "strength 0.5", "strength 1")
    assert [(one.seed, one.finetune_strength) for one in down.rows[0]] == [(1, 0), (2, 0)]
    (both,) = map(with_base, cells(BASE, parse_axis("seed=1,2"), parse_axis("prompt=a|b")))
    assert both.column_labels == ("base, seed 1", "seed 1", "base, seed 2", "seed 2")
    assert [[one.finetune_strength for one in row] for row in both.rows] == [[0, 1, 0, 1]] * 2


# --- A run's folder. ---


def run_folder(config: RunConfig, *files: str) -> Path:
    folder = config.output_dir
    for name in ("run.yaml", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dump_run(config) if name == "run.yaml" else "{}")
    return folder


STEPS = [f"checkpoints/step-{step:06d}/manifest.json" for step in (1, 2, 3)]


def test_a_run_is_its_checkpoints_and_its_lora(run_settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_settings(tmp_path)  # 3 steps
    folder = run_folder(config, *STEPS, "checkpoints/step-000004.partial/manifest.json")
    (folder / "checkpoints" / "step-000009").mkdir()
    names = [path.rpartition("/")[0] for path in STEPS]
    assert [one.file for one in run_checkpoints(folder)] == [folder / name for name in names]
    run_folder(config, f"{config.slug}-comfyui.safetensors", f"{config.slug}.safetensors")
    assert [one.file for one in run_checkpoints(folder)] == [
        folder / n for n in [*names[:2], f"{config.slug}.safetensors"]
    ]
    axis = parse_axis(f"checkpoint=base,{folder}")
    assert axis.labels == ("base", "step 1", "step 2", config.slug)


def test_what_is_no_run_of_a_lora_is_told(run_settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run.yaml"):
        run_checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint and no LoRA yet"):
        run_checkpoints(run_folder(run_settings(tmp_path)))
    with pytest.raises(ConfigError, match="full fine-tune"):
        run_checkpoints(run_folder(run_settings(tmp_path, finetune_type="full"), *STEPS))
