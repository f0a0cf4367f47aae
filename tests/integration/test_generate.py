"""`generate` as a user drives it: what it refuses, what an interruption leaves, what --repeat and sweeps draw."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _verbs import assert_refused, child_env, finish, run_here, run_verb, start_verb, wait_until, write_run
from PIL import Image
from safetensors.torch import save_file

from flux_ft.adapters.formats import write_adapter
from flux_ft.families.registry import tiny_folder
from flux_ft.families.tiny.scenes import all_scenes, render
from flux_ft.infer.control import canny, tiny_canny
from flux_ft.infer.records import pixels_sha256, read_recipe
from flux_ft.types import AdapterState, LoraLayer
from tests._loras import random_lora

DRAW = ("generate", "--model", "flux-tiny", "--steps", "2")
FILL = "--task fill --image scene.png"
CANNY = "--task canny --control-image"
HAS_CONTROL = (tiny_folder() / "control").is_dir()
needs_control = pytest.mark.skipif(not HAS_CONTROL, reason="flux-tiny has no control LoRAs yet")
QUICK = {"OMP_NUM_THREADS": "1"}
"""As in this process: sums of several threads are rounded otherwise."""
Verb = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_lora: Callable[..., Path]) -> Path:
    """Pictures, masks, LoRAs and prompt files, good and bad. Do not change them."""
    place = tmp_path_factory.mktemp("generate")
    scene = Image.fromarray(render(all_scenes()[2000]))
    scene.save(place / "scene.png")
    mask = Image.new("L", scene.size)
    mask.save(place / "black.png")
    mask.resize((32, 64)).save(place / "narrow.png")
    mask.paste(255, (20, 12, 52, 48))
    mask.save(place / "mask.png")
    (place / "torn.png").write_bytes((place / "scene.png").read_bytes()[:120])
    (place / "empty.png").touch()
    (place / "text.png").write_text("no picture")
    for seed, name in enumerate(("one", "two")):
        make_lora(place / f"{name}.safetensors", seed)
    for layout in ("flux1", "flux2"):
        lora = random_lora(layout=layout, width=3072, rank=1)
        write_adapter(place / f"{layout}.safetensors", lora, "diffusers", torch.bfloat16, {})
    save_file({"block.weight": torch.zeros(2)}, place / "unknown.safetensors")
    wide = AdapterState({"x_embedder": LoraLayer(torch.zeros(1, 64), torch.zeros(128, 1), 1.0)})
    write_adapter(place / "control.safetensors", wide, "diffusers", torch.bfloat16, {})
    (place / "two.txt").write_text("a red circle\n\n# not this\na blue square\n")
    (place / "two.jsonl").write_text('"a red circle"\n{"prompt": "a blue square"}\n')
    (place / "two.csv").write_text("prompt,seed\na red circle,0\na blue square,0\n")
    (place / "key.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "sed": 3}\n')
    (place / "seed.csv").write_text("prompt,seed\nx,1\nx,one\n")
    (place / "none.txt").write_text("# nothing\n")
    (place / "file.jsonl").write_text('{"task": "remix", "image_prompt": "gone.png"}\n')
    return place


@pytest.fixture
def draw(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """`draw(output, words, *more)` among those files: what --json says, with `folder` and the pictures' paths."""
    monkeypatch.chdir(place)

    def run(output: Path, words: str, *more: object) -> dict[str, Any]:
        base = DRAW[:1] if "--repeat" in words else DRAW
        done = run_here(capsys, *base, *shlex.split(words), *more, "--output", output, "--json")
        assert done.code == 0, done.stderr
        return dict(done.json)

    return run


def pixels(path: Path | str) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def same(first: Path | str, second: Path | str) -> bool:
    return np.array_equal(pixels(first), pixels(second))


BAD = {
    f"{FILL} --mask narrow.png": ("32 × 64", "64 × 64", "narrow.png"),
    f"{FILL} --mask black.png": ("black everywhere",),
    FILL: ("no transparent part", "`mask`"),
    "--task fill": ("fill needs `image`",),
    "--width 65": ("65 px", "use 64 or 72"),
    f"{CANNY} gone.png": ("`control_image` (gone.png)",),
    f"{CANNY} empty.png": ("`control_image` (empty.png)", "empty"),
    f"{CANNY} text.png": ("`control_image` (text.png)", "not a JPEG"),
    f"{CANNY} scene.png --canny-low-threshold 300": ("300", "above", "200"),
    f"{CANNY} scene.png --control-lora flux1.safetensors": ("trained on flux-1", "this is flux-tiny"),
    "--task remix --image-prompt torn.png": ("`image_prompt` (torn.png)", "damaged"),
    "--strength 3": ("finetune_strength", "3"),
    "--lora one.safetensors:3": ("--lora", "strength", "3"),
    "--lora unknown.safetensors": ("block.weight", "unknown.safetensors"),
    "--lora flux2.safetensors": ("trained on flux2-klein-4b, this is flux-tiny",),
    "--lora control.safetensors": ("is a control LoRA", "--control-lora"),
    f"{CANNY} scene.png --control-lora one.safetensors": ("takes no picture", "--lora"),
    "--lora flux1.safetensors": ("trained on flux-1", "this is flux-tiny"),
    "--task paint": ("'paint'", "remix"),
    "--mask mask.png": ("text-to-image has no `mask`",),
    "--task edit --image scene.png": ("edit takes a Kontext model", "flux-tiny"),
    "--task ultra --aspect-ratio 30:1": ("'30:1'", "21:9"),
    "--compare nothing": ("--compare base",),
    "--format gif": (".gif", ".webp"),
    "--x strenth=0,1": ("strenth", "did you mean `strength`"),
    "--x strength=0..3:4": ("the axis strength",),
    "--x seed=1,2 --count 2": ("--count", "seed"),
    "--checkpoints .": ("run.yaml",),
    "--negative-prompt red": ("`true_cfg`",),
    "--storage int3": ("int3", "nf4"),
    "--prompts two.txt": ("--prompt and --prompts",),
    "--count 1000000000": ("1,000,000,000 pictures",),
    f"--count 2 --seed {2**63 - 1}": ("the last seed",),
}
BAD_FILES = {"key.jsonl": (":2", "sed"), "seed.csv": (":3", "one"), "none.txt": ("no prompt",),
             "file.jsonl": (":1", "gone.png"), "gone.txt": ("cannot be read",), "scene.png": (".jsonl",)}  # fmt: skip


@pytest.fixture
def refuse(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Verb]:
    """`refuse(words, *said)`: one message, exit code 2, and no file or folder is made or touched."""
    monkeypatch.chdir(place)

    def listed() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in place.rglob("*")}

    before = listed()

    def run(words: str, *said: str) -> None:
        done = run_here(capsys, *DRAW, *shlex.split(words))
        assert (done.code, done.stdout, done.stderr.count("error: ")) == (2, "", 1), done.stderr
        assert [word for word in said if word not in done.stderr] == [], done.stderr

    yield run
    assert listed() == before


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused(words: str, refuse: Verb) -> None:
    refuse(f"--prompt x {words}", *BAD[words])


def test_bad_prompt_files_are_refused_by_file_and_line(refuse: Verb) -> None:
    for file, (first, *more) in BAD_FILES.items():
        refuse(f"--prompts {file}", file + first if first[0] == ":" else first, *more)


def test_nothing_to_draw_is_refused(refuse: Verb) -> None:
    refuse("", "nothing to draw", "--prompt")


def test_repeat_refuses_what_it_cannot_draw_again(
    place: Path, draw: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(picture: Path, *said: str, words: tuple[str, ...] = ()) -> None:
        assert_refused(run_here(capsys, "generate", "--repeat", picture, "--output", tmp_path / "r", *words), *said)
        assert not (tmp_path / "r").exists()

    for name in ("one.safetensors", "scene.png"):
        shutil.copy(place / name, tmp_path)
    draw(tmp_path / "a", "--task remix --image-prompt", tmp_path / "scene.png", "--lora", tmp_path / "one.safetensors")
    picture = tmp_path / "a" / "00000.png"
    refused(picture, "--seed", words=("--seed", "0"))
    refused(place / "scene.png", "does not say how it was drawn")
    refused(place / "gone.png", "does not exist")
    shutil.copy(place / "two.safetensors", tmp_path / "one.safetensors")
    refused(picture, "one.safetensors is not the file that was used")
    (tmp_path / "one.safetensors").unlink()
    shutil.copy(place / "mask.png", tmp_path / "scene.png")
    refused(picture, "one.safetensors is missing", "scene.png is not the file that was used")
    words = "--lora one.safetensors --image-prompt scene.png --repeat"
    assert draw(tmp_path / "r", words, picture)["same"] is True


REPEATED = {
    "text png": "--prompt x --lora one.safetensors:0.4 --lora two.safetensors:-0.3",
    "text jpg": "--prompt 'a “red” 猫' --negative-prompt blue --true-cfg 2",
    "text webp": "--prompt x --width 72 --height 48",
    "remix png": "--task remix --image-prompt scene.png --lora one.safetensors --strength 0.5",
    "fill webp": f"{FILL} --mask mask.png",
    "ultra jpg": "--task ultra --aspect-ratio 3:2 --raw --image-prompt scene.png",
    "canny png": f"{CANNY} scene.png --lora two.safetensors",
    "depth png": "--task depth --control-image scene.png",
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=needs_control if one[:5] in ("canny", "depth") else ()) for one in REPEATED]
)
def test_repeat_draws_the_same_pixels(name: str, draw: Verb, tmp_path: Path) -> None:
    task, suffix = name.split()
    words = f"{REPEATED[name]} --count 2 --format {suffix}"  # the first one's batch does not come again
    model = ()
    if task == "fill":  # without a Fill of its own, so that it is drawn by putting back
        model = ("--model", shutil.copytree(tiny_folder(), tmp_path / "copy"))
    (_, source) = draw(tmp_path / "a", words, *model)["pictures"]
    again = draw(tmp_path / "b", f"--format {suffix} --repeat", source)
    assert again["same"] is True
    assert same(source, again["picture"])
    assert Path(source).suffix == f".{suffix}"
    if task == "text" and suffix != "png":  # all from the picture itself
        Path(source).with_suffix(".json").unlink()
        assert draw(tmp_path / "c", "--repeat", source)["same"] is True


BATCH = ("--prompt", "a large red heart", "--x", "guidance=1..4:150")
"""Pictures that do not share a batch, so that they come one by one, and enough of them to be stopped on the way."""


@pytest.fixture(scope="module")
def straight(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "p"
    done = run_verb(*DRAW, *BATCH, "--output", folder, cwd=place, env=child_env() | QUICK)
    assert done.code == 0, done.stderr
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_batch_is_whole_and_goes_on(
    name: str, place: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, words, started = tmp_path / "p", (*DRAW, *BATCH, "--output", tmp_path / "p"), time.monotonic()
    # What starts these tests in the background may have had Ctrl-C ignored, and children inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} if os.name == "posix" else {}
    child = start_verb(*words, cwd=place, env=child_env() | QUICK, **heard)
    wait_until(lambda: len(list(folder.glob("?????.png"))) >= 4, child, "four pictures")
    child.send_signal(signal.Signals[name])
    stopped = finish(child, started)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("?????.png"))}
    assert 4 <= len(before) < 150
    for path in before:
        recipe = read_recipe(path)
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            assert pixels_sha256(picture) == recipe["pixels_sha256"]
    go_on = [*map(str, words), "--resume"]
    if name == "SIGINT":
        assert stopped.code == 130, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert f"{len(before)} of 150 pictures" in stopped.stderr
        assert shlex.split(stopped.stderr.partition("go on: ")[2])[1:] == go_on
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
    monkeypatch.chdir(place)
    finished = run_here(capsys, *go_on, "--json")
    assert finished.code == 0, finished.stderr
    assert finished.json["earlier"] == len(before)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    names = [path.name for path in sorted(straight.glob("?????.png"))]
    assert [Path(path).name for path in finished.json["pictures"]] == names
    assert all(same(folder / name, straight / name) for name in names)
    assert run_here(capsys, *go_on, "--json").json["earlier"] == 150


def test_a_sweep_beside_the_base(draw: Verb, tmp_path: Path) -> None:
    sweep = "--x strength=0..1:3 --y 'prompt=a red heart|a blue square' --compare base --grid --sheet"
    done = draw(tmp_path / "a", f"--lora one.safetensors {sweep}")
    told = [read_recipe(Path(path))["request"] for path in done["pictures"]]
    assert [(one["prompt"], one["finetune_strength"]) for one in told] == [
        (prompt, strength) for prompt in ("a red heart", "a blue square") for strength in (0, 0.5, 1)
    ]
    base = draw(tmp_path / "b", "-p 'a red heart' -p 'a blue square'")["pictures"]
    assert same(done["pictures"][0], base[0])
    assert same(done["pictures"][3], base[1])
    assert len({pixels(path).tobytes() for path in done["pictures"]}) == 6
    grid = pixels(done["grids"][0])[-128:, -4 * 132 :]
    columns = [grid[:, 132 * i : 132 * i + 128] for i in range(4)]
    assert np.array_equal(columns[0], columns[1])
    assert not any(np.array_equal(columns[0], other) for other in columns[2:])
    page = Path(done["sheet"]).read_text("utf-8")
    names = [Path(path).name for path in (*done["pictures"], *done["grids"])]
    assert [name for name in names if f"./{name}" not in page] == []


SHAPES = {
    "--prompts two.txt --x guidance=1..3:3": (2, 3),
    "--prompt x --y guidance=1..3:3": (3, 1),
    "--prompt x --y guidance=1,2 --count 3": (2, 3),
    "--prompt x --axis guidance=1..4:4": (1, 4),
}


@pytest.mark.parametrize("words", SHAPES)
def test_a_grid_lies_as_it_was_asked_for(words: str, draw: Verb, tmp_path: Path) -> None:
    (grid,) = draw(tmp_path, f"{words} --grid")["grids"]
    height, width, _ = pixels(grid).shape
    rows, columns = SHAPES[words]
    assert rows * 132 <= height < rows * 132 + 132
    assert columns * 132 <= width < (columns + 1) * 132 + 60


def test_checkpoints_of_a_run_are_swept(scenes: Path, draw: Verb, tmp_path: Path) -> None:
    settings = {"output": str(tmp_path / "run"), "iterations": 4, "checkpoint": {"every": 2, "keep": 5}}
    trained = run_verb("train", write_run(tmp_path / "run.yaml", scenes, **settings), cwd=tmp_path)
    assert trained.code == 0, trained.stderr
    done = draw(tmp_path / "a", "-p x --compare base --grid --checkpoints", tmp_path / "run")
    base, early, last = done["pictures"]
    assert same(base, draw(tmp_path / "b", "-p x")["pictures"][0])
    assert read_recipe(Path(early))["adapters"][0]["file"] == "step-000002"
    assert not same(early, last)
    assert draw(tmp_path / "c", "--repeat", early)["same"] is True
    exported = next((tmp_path / "run").glob("*[!i].safetensors"))
    assert same(last, draw(tmp_path / "d", "-p x --lora", exported)["pictures"][0])


def test_prompt_files_of_every_kind_draw_alike(draw: Verb, tmp_path: Path) -> None:
    drawn = [draw(tmp_path / kind, f"--prompts two.{kind}")["pictures"] for kind in ("txt", "jsonl", "csv")]
    for other in drawn[1:]:
        assert all(same(a, b) for a, b in zip(drawn[0], other, strict=True))


def test_paths_in_a_prompt_file_begin_at_the_file(
    place: Path, draw: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"task": "remix", "prompt": "x", "image_prompt": "scene.png", "loras": ["one.safetensors:0.5"]}
    (place / "remix.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    (from_file,) = draw(tmp_path / "a", "--prompts", place / "remix.jsonl")["pictures"]
    monkeypatch.chdir(place)
    words = "--prompt x --task remix --image-prompt scene.png --lora one.safetensors:0.5"
    assert same(from_file, draw(tmp_path / "b", words)["pictures"][0])


def test_a_picture_is_the_same_in_any_batch(draw: Verb, tmp_path: Path) -> None:
    (alone,) = draw(tmp_path / "a", "-p 'a blue square' --seed 5")["pictures"]
    for number, words in enumerate((
        "-p 'a blue square' --seed 3 --count 4",
        "-p 'a red heart' -p 'a blue square' --seed 5 --lora one.safetensors:0",
        "-p 'a blue square' --x seed=9,5,7 --y guidance=1,2 --lora one.safetensors:0",
    )):  # fmt: skip
        drawn = draw(tmp_path / str(number), words)["pictures"]
        assert sum(same(alone, path) for path in drawn) == 1


def test_canny_writes_what_the_task_sees(
    place: Path, draw: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(capsys, "canny", place / "scene.png", tmp_path / "edges.png").code == 0
    with Image.open(place / "scene.png") as scene:
        assert np.array_equal(pixels(tmp_path / "edges.png"), np.asarray(canny(scene)))
    if HAS_CONTROL:
        with Image.open(place / "scene.png") as scene:
            tiny_canny(scene).save(tmp_path / "wide.png")
        (by_map,) = draw(tmp_path / "a", "--task canny --preprocessed-image", tmp_path / "wide.png")["pictures"]
        assert same(by_map, draw(tmp_path / "b", f"{CANNY} scene.png")["pictures"][0])


def test_depth_without_weights_is_one_message(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_here(capsys, "depth", place / "scene.png", tmp_path / "depth.png")
    assert_refused(done, "depth-anything/Depth-Anything-V2-Large-hf", "hf download")
    assert list(tmp_path.iterdir()) == []
