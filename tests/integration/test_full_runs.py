"""`flux-ft train` of a full fine-tune, from run file to extracted LoRA: files, proof, kills, bases, mistakes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from _verbs import (
    Done,
    assert_refused,
    child_env,
    finish,
    has_checkpoint,
    hashes,
    metrics,
    run_here,
    run_verb,
    start_verb,
    trained_steps,
    wait_until,
    write_run,
)
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from flux_ft.adapters.formats import compare_adapters, read_adapter
from flux_ft.families.registry import tiny_folder
from flux_ft.train.checkpoint import find_fault
from flux_ft.train.prove import comparison_grid

pytestmark = pytest.mark.slow

STEPS = 8
SETTINGS: dict[str, Any] = {
    "finetune_comment": "My Thing",
    "finetune_type": "full",
    "iterations": STEPS,
    "learning_rate": 1e-4,
    "optim": {"batch_size": 2, "max_grad_norm": None, "ema_decay": 0.8, "ema_every": 2},
    "preview": {"every": 4, "steps": 2, "prompts": ["a large TOK in the center", "a small green square"]},
    "validation": {"every": 4, "fraction": 0.3},
    "checkpoint": {"every": 2},
    "prior": {"prompts": ["a small green star"]},
    "export": {"dtype": "fp32", "keep_full": True},
}
SHORT: dict[str, Any] = SETTINGS | {
    "iterations": 2, "preview": {"every": None}, "validation": {"fraction": 0.0}, "prior": {},
    "optim": {"batch_size": 1}, "checkpoint": {"every": None},
}  # fmt: skip
DIFFUSERS, KOHYA, FULL = "my-thing.safetensors", "my-thing-comfyui.safetensors", "my-thing-full.safetensors"
FILES = {
    ".lock",
    "run.yaml", "report.json", "report.html", "metrics.jsonl", "README.md", "loss.png", "previews.png",
    "comparison.png", "extraction.json", DIFFUSERS, KOHYA, FULL,
}  # fmt: skip
QUICK = {"OMP_NUM_THREADS": "1"}
"""Models of this size are slower on several threads."""


@dataclass(frozen=True)
class Run:
    """A finished `train` and its folder."""

    done: Done
    folder: Path
    run_file: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def run_file(place: Path, scenes: Path) -> Path:
    return write_run(place / "run.yaml", scenes, **SETTINGS)


@pytest.fixture(scope="module")
def straight(place: Path, run_file: Path) -> Run:
    """One full fine-tune from start to end, with an average, a prior and the full weights kept."""
    done = run_verb("train", run_file, "output=straight", "--json", cwd=place, env=child_env() | QUICK)
    assert done.code == 0, done.stderr
    return Run(done, place / "straight", run_file)


@pytest.fixture
def short_run(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file for two quiet steps, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "run.yaml", scenes, **SHORT, output=str(tmp_path / "out"))


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_same_tensors(first: Path, second: Path) -> None:
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    odd = [key for key in a if not torch.equal(a[key], b[key])]
    assert not odd, f"{len(odd)} of {len(a)} tensors differ, first {odd[0]}"


def base_weights() -> dict[str, Tensor]:
    """flux-tiny's, by the names of the original layout."""
    from flux_ft.adapters.jobs import open_model

    return {name: weight.read().float() for name, weight in open_model("flux-tiny")[0].weights.items()}


class TestRunFolder:
    def test_holds_the_files_that_the_design_names_and_nothing_else(self, straight: Run) -> None:
        assert {path.name for path in straight.folder.iterdir() if path.is_file()} == FILES
        assert {path.name for path in straight.folder.iterdir() if path.is_dir()} == {
            "cache", "checkpoints", "previews",
        }  # fmt: skip
        assert not list(straight.folder.rglob("*.partial"))

    def test_json_is_one_object(self, straight: Run) -> None:
        told = straight.done.json
        assert told["steps"] == STEPS
        assert Path(told["loras"]["diffusers"]).name == DIFFUSERS
        assert Path(told["loras"]["kohya"]).name == KOHYA
        assert told["worst_delta_weight_error"] < 1e-6

    def test_the_need_of_disk_is_said_before_the_first_step(self, straight: Run) -> None:
        said = straight.done.stderr
        need = said.index("disk: this run needs about ")
        assert need < said.index(f"/{STEPS}  ")
        figures = re.search(r"needs about ([\d.]+) GB, of which checkpoints ([\d.]+) GB \(2 kept", said[need:])
        assert figures
        written = sum(path.stat().st_size for path in straight.folder.rglob("*.*") if "cache" not in path.parts)
        assert written < 1e9 * float(figures[1])
        one = straight.folder / "checkpoints" / f"step-{STEPS:06d}"
        assert 3e-9 * sum(path.stat().st_size for path in one.iterdir()) == pytest.approx(float(figures[2]), abs=0.01)

    def test_people_are_told_what_is_trained_kept_and_lost(self, straight: Run) -> None:
        said = straight.done.stderr
        assert "full fine-tune: 2,176,512 of 2,349,856 weights are trained by adamw" in said
        assert "each is moved in the backward pass" in said
        assert "the average of the weights over the run" in said
        assert re.search(r"32 of 32 matrices, .*[\d.]+ % of their squared change is kept", said)
        assert re.search(r"loss on \d held-out examples: base [\d.]+, LoRA [\d.]+, full model [\d.]+", said)

    def test_metrics_have_one_line_a_step_and_the_drift(self, straight: Run) -> None:
        rows = [row for row in metrics(straight.folder) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert rows[0]["prior_loss"] == 0.0
        assert all(row["prior_loss"] > 0 for row in rows[1:])
        assert all(row["grad_norm"] > 0 for row in rows)

    def test_extraction_tells_energy_and_proof(self, straight: Run) -> None:
        told = json.loads((straight.folder / "extraction.json").read_text(encoding="utf-8"))
        assert 0.3 < told["energy_kept"] < 1
        assert len(told["layers"]) == 32
        assert {layer["rank"] for layer in told["layers"]} == {4}
        assert all(0 < layer["energy_kept"] <= 1 for layer in told["layers"])
        assert 0 < told["left_out_share"] < 0.1
        proof = told["proof"]
        assert proof["held_out"] is True
        assert proof["examples"] > 0
        assert set(proof["loss"]) == {"base", "lora", "full"}
        assert 0 < proof["relative_error"] < 1
        assert len(proof["relative_error_by_sigma"]) == 5

    def test_checkpoints_hold_weights_moments_and_average(self, straight: Run) -> None:
        folder = straight.folder / "checkpoints" / f"step-{STEPS:06d}"
        weights = tensors(folder / "weights.safetensors")
        kept = torch.load(folder / "optimizer.pt", weights_only=True)
        assert set(kept) == {"name", "updates", "average", "norms", "spikes"}
        assert kept["average"].keys() == weights.keys()
        assert kept["updates"]["state"].keys() == weights.keys()
        assert {tuple(one.shape) for one in weights.values()} == {tuple(one.shape) for one in kept["average"].values()}

    def test_card_shows_and_tells(self, straight: Run) -> None:
        card = (straight.folder / "README.md").read_text(encoding="utf-8")
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["instance_prompt"] == "TOK"
        assert re.findall(r"!\[[^\]]*\]\(([^)]+)\)", body) == ["previews.png", "comparison.png", "loss.png"]
        for name in ("comparison.png", "previews.png", "loss.png"):
            with Image.open(straight.folder / name) as picture:
                picture.load()
                assert min(picture.size) > 64
        for name in (DIFFUSERS, KOHYA, FULL):
            assert f"`{name}`" in body
        told = json.loads((straight.folder / "extraction.json").read_text(encoding="utf-8"))
        assert f"keeps {100 * told['energy_kept']:.1f} %" in body
        assert "| optimizer | adamw |" in body

    def test_python_of_the_card_works(self, straight: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        card = (straight.folder / "README.md").read_text(encoding="utf-8")
        snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(snippets) == 2
        monkeypatch.chdir(straight.folder)
        shown: list[Image.Image] = []
        monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
        for code in snippets:
            exec(compile(code, "README.md", "exec"), {})
        assert shown[0].tobytes() != shown[1].tobytes()

    def test_comparison_shows_base_lora_and_full_model(self, straight: Run) -> None:
        """The base's column is what the first previews show, and the three columns differ."""
        prompts = SETTINGS["preview"]["prompts"]
        colours = ("#ff0000", "#00ff00", "#0000ff")
        plain = [[Image.new("RGB", (64, 64), colour)] * len(prompts) for colour in colours]
        places = np.asarray(comparison_grid(prompts, *plain))
        first = [Image.open(straight.folder / "previews" / "step-000000" / f"{one:02d}.png") for one in range(2)]
        expected = np.asarray(comparison_grid(prompts, first, first, first))
        shown = np.asarray(Image.open(straight.folder / "comparison.png").convert("RGB"))
        assert shown.shape == places.shape
        pixels = []
        for colour in colours:
            column = (places == np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)).all(axis=2)
            assert column.sum() == len(prompts) * 128 * 128
            pixels.append((shown[column], expected[column]))
        assert np.array_equal(*pixels[0])
        columns = [column.reshape(2, 128, 128, 3) for column, _ in pixels]
        assert not np.array_equal(columns[0], columns[1])
        assert not np.array_equal(columns[0], columns[2])
        assert not np.array_equal(columns[1], columns[2])


class TestFiles:
    def test_both_loras_are_the_same_lora(self, straight: Run) -> None:
        ours, comfy = read_adapter(straight.folder / DIFFUSERS), read_adapter(straight.folder / KOHYA)
        assert len(ours.layers) == 52
        assert max(compare_adapters(ours, comfy).values()) < 1e-5

    def test_full_weights_less_the_base_are_what_the_lora_comes_from(self, straight: Run) -> None:
        """The rank-4 LoRA that `extract` takes out of the two checkpoints is the run's own."""
        full, base = tensors(straight.folder / FULL), base_weights()
        assert full.keys() == base.keys()
        changed = {name for name in full if not torch.equal(full[name], base[name])}
        assert changed == {name for name in full if name.startswith(("double_blocks.", "single_blocks."))}

    def test_extract_of_the_two_checkpoints_gives_the_runs_lora(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("--base", "flux-tiny", "--tuned", straight.folder / FULL, "--rank", 4, "--output", tmp_path / "a")
        out = tmp_path / "again.safetensors"
        done = run_here(capsys, "extract", *words[:-1], out, "--format", "diffusers")
        assert done.code == 0, done.stderr
        gaps = compare_adapters(read_adapter(straight.folder / DIFFUSERS), read_adapter(out))
        assert max(gaps.values()) < 0.01  # the verb writes bf16

    def test_full_weights_draw(self, straight: Run, tmp_path: Path) -> None:
        words = ("--prompt", "a large TOK", "--steps", 2, "--seed", 3, "--output", tmp_path / "pictures")
        model = ("--model", straight.folder / FULL, "--model-parts", "flux-tiny")
        done = run_verb("generate", *model, *words, cwd=tmp_path, env=child_env() | QUICK)
        assert done.code == 0, done.stderr
        (drawn,) = (tmp_path / "pictures").glob("*.png")
        with Image.open(drawn) as picture:
            assert picture.size == (64, 64)

    def test_headers_tell_trigger_word_and_no_paths(self, straight: Run, scenes: Path) -> None:
        for name in (DIFFUSERS, KOHYA, FULL):
            with safe_open(straight.folder / name, framework="pt") as file:
                text = json.dumps(file.metadata())
            assert "TOK" in text
            for private in (str(scenes), str(straight.folder), "small green square"):
                assert private not in text

    def test_first_previews_are_the_bases(self, straight: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The same prompts and seeds drawn by a LoRA run that has not learned anything yet."""
        words = ("finetune_type=lora", "iterations=1", "optim.ema_every=1", "validation.fraction=0")
        done = run_here(capsys, "train", straight.run_file, *words, f"output={place / 'lora'}")
        assert done.code == 0, done.stderr
        assert "`export.keep_full` has no effect" in done.stderr
        for name in ("00.png", "01.png"):
            path = Path("previews") / "step-000000" / name
            assert (straight.folder / path).read_bytes() == (place / "lora" / path).read_bytes()
        assert not (place / "lora" / FULL).exists()
        assert not (place / "lora" / "extraction.json").exists()


class TestKilled:
    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
    def test_killed_and_resumed_is_straight_to_the_bit(self, straight: Run, place: Path, run_file: Path) -> None:
        folder, env = place / "killed", child_env() | QUICK
        words = ("train", run_file, "output=killed")
        child = start_verb(*words, cwd=place, env=env)
        wait_until(lambda: len(trained_steps(folder)) >= 3 and has_checkpoint(folder), child, "step 3 and a checkpoint")
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert 3 <= trained_steps(folder)[-1] < STEPS
        assert not list(folder.glob("*.safetensors"))
        started = time.monotonic()
        done = finish(start_verb(*words, "--resume", cwd=place, env=env), started)
        assert done.code == 0, done.stderr
        assert "resumed from step" in done.stderr
        for name in (DIFFUSERS, KOHYA, FULL):
            assert_same_tensors(folder / name, straight.folder / name)
        timed = {"step_s", "examples_per_s", "peak_gib"}
        rows = [
            [{key: value for key, value in row.items() if key not in timed} for row in metrics(one)]
            for one in (folder, straight.folder)
        ]
        assert rows[0] == rows[1]
        for name in ("comparison.png", "previews.png"):
            assert (folder / name).read_bytes() == (straight.folder / name).read_bytes()
        facts = [json.loads((one / "extraction.json").read_text(encoding="utf-8")) for one in (folder, straight.folder)]
        assert facts[0] == facts[1]

    def test_a_run_that_ended_before_its_lora_was_out_gets_it_on_resume(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        for name in ("extraction.json", "comparison.png", "README.md", KOHYA, FULL):
            (folder / name).unlink()
        done = run_here(capsys, "train", straight.run_file, f"output={folder}", "--resume")
        assert done.code == 0, done.stderr
        assert f"resumed from step {STEPS}" in done.stderr
        assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
        for name in (DIFFUSERS, KOHYA, FULL):
            assert_same_tensors(folder / name, straight.folder / name)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("full.rounding=kahan", "`full.rounding` was 'stochastic', is now 'kahan'"),
            ("full.train=all", "`full.train` was 'blocks', is now 'all'"),
            ("optim.ema_decay=0.9", "`optim.ema_decay` was 0.8, is now 0.9"),
            ("optim.name=adafactor", "the checkpoint was made by adamw"),
            ("memory.fused_backward=false", "`weights moved in the backward pass` was True, is now False"),
            ("finetune_type=lora", "`finetune_type` was 'full', is now 'lora'"),
        ],
    )
    def test_resume_with_what_would_learn_something_else_is_refused(
        self, straight: Run, place: Path, capsys: pytest.CaptureFixture[str], change: str, told: str
    ) -> None:
        words = (f"output={straight.folder}", change, "--resume")
        assert_refused(run_here(capsys, "train", straight.run_file, *words), told)


class TestBases:
    def test_a_folder_is_a_base_as_its_name_is(
        self, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(tiny_folder(), tmp_path / "base")
        for output, model in (("named", "flux-tiny"), ("folder", folder)):
            done = run_here(capsys, "train", short_run, f"model={model}", f"output={output}")
            assert done.code == 0, done.stderr
        for name in (DIFFUSERS, KOHYA, FULL):
            assert_same_tensors(tmp_path / "named" / name, tmp_path / "folder" / name)
        assert (tmp_path / "named" / "extraction.json").is_file()

    def test_a_kept_file_is_the_base_of_the_next_run(
        self, straight: Run, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = (f"model={straight.folder / FULL}", "model_parts=flux-tiny", "full.train=attention")
        done = run_here(capsys, "train", short_run, *words)
        assert done.code == 0, done.stderr
        first, second = tensors(straight.folder / FULL), tensors(tmp_path / "out" / FULL)
        changed = {name for name in first if not torch.equal(first[name], second[name])}
        assert changed
        assert all(re.search(r"attn|linear[12]|\.norm\.", name) for name in changed)

    def test_the_base_is_not_touched(self, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = shutil.copytree(tiny_folder(), tmp_path / "base")
        before = hashes(folder)
        assert run_here(capsys, "train", short_run, f"model={folder}", "export.keep_full=false").code == 0
        assert hashes(folder) == before
        assert not (tmp_path / "out" / FULL).exists()
        assert "-full.safetensors" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes is tested on Linux")
class TestProcesses:
    """The same global batch, in two parts whose gradients are averaged after the backward pass: sums in another order,
    of which AdamW makes steps where a gradient is nearly zero. 1e-3 of what the run has changed."""

    @staticmethod
    def train_on_two(place: Path, *words: str) -> Done:
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            pytest.skip("this torch has no gloo")
        env = child_env() | QUICK | {"ACCELERATE_USE_CPU": "true"}
        return run_verb("train", *words, "optim.batch_size=1", "--gpus", "2", "--json", cwd=place, env=env)

    @staticmethod
    def distance(folder: Path, straight: Run) -> float:
        """How far the full weights are from those of one process, in units of what the run has changed."""
        ours, alone, base = tensors(folder / FULL), tensors(straight.folder / FULL), base_weights()
        apart = sum(float((ours[name] - alone[name]).double().square().sum()) for name in base)
        change = sum(float((alone[name] - base[name]).double().square().sum()) for name in base)
        assert change > 0
        return float((apart / change) ** 0.5)

    def test_two_processes_learn_what_one_does(self, straight: Run, place: Path) -> None:
        done = self.train_on_two(place, str(straight.run_file), "output=pair")
        assert done.code == 0, done.stderr
        assert done.json["steps"] == STEPS
        assert "each of 2 processes holds a share of every weight" in done.stderr
        assert trained_steps(place / "pair") == list(range(1, STEPS + 1))
        assert self.distance(place / "pair", straight) < 1e-3
        assert set(done.json["loras"]) == {"diffusers", "kohya"}
        assert sorted(path.name for path in (place / "pair" / "previews").iterdir()) == [
            f"step-{step:06d}" for step in (0, 4, 8)
        ]

    def test_a_sharded_checkpoint_goes_on_in_one_process_and_back(self, straight: Run, place: Path) -> None:
        folder = place / "moved"
        words = (str(straight.run_file), "output=moved")
        done = self.train_on_two(place, *words, "--max-time", "1s")
        assert done.code == 130, done.stderr
        (first,) = (folder / "checkpoints").iterdir()
        assert find_fault(first) is None
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"} == {one.name for one in first.iterdir()}
        alone = run_verb("train", *words, "--resume", cwd=place, env=child_env() | QUICK)
        assert_refused(alone, "`processes` was 2, is now 1", "--allow-drift")
        done = run_verb(
            "train", *words, "--resume", "--allow-drift", "--max-time", "1s", cwd=place, env=child_env() | QUICK
        )
        assert done.code == 130, done.stderr
        assert f"resumed from step {int(first.name[5:])}" in done.stderr
        assert (max((folder / "checkpoints").iterdir()) / "weights.safetensors").is_file()
        done = self.train_on_two(place, *words, "--resume", "--allow-drift")
        assert done.code == 0, done.stderr
        assert trained_steps(folder) == list(range(1, STEPS + 1))
        assert self.distance(folder, straight) < 1e-3
        newest = json.loads((folder / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").read_text("utf-8"))
        assert sum("`processes` was" in one for one in newest["drift"]) == 2

    def test_adafactor_is_refused_for_shards(self, straight: Run, place: Path) -> None:
        done = self.train_on_two(place, str(straight.run_file), "output=ada", "optim.name=adafactor")
        assert_refused(done, "`optim.name", "adamw8bit")


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["memory.fused_backward=true", "optim.accumulate=2"], ["`memory.fused_backward`", "`optim.accumulate`"]),
            (["memory.stream_blocks=2", "memory.recompute=none"], ["`memory.stream_blocks`", "`memory.recompute`"]),
            (["memory.stream_blocks=2", "optim.accumulate=2"], ["`memory.stream_blocks`", "`optim.accumulate`"]),
            (["full.train=[(]"], ["`full.train`", "not a regular expression"]),
            (["full.train=heads"], ["`full.train`", "`blocks`", "`attention`"]),
            (["optim.name=lion"], ["`optim.name`", "`adafactor`"]),
            (["memory.recompute=true"], ["`memory.recompute`", "`selective`"]),
        ],
    )
    def test_settings_that_cannot_be_meant(
        self, capsys: pytest.CaptureFixture[str], short_run: Path, overrides: list[str], words: list[str]
    ) -> None:
        for verb in ("check", "train"):
            done = run_here(capsys, verb, short_run, *overrides)
            assert done.code == 2
            assert done.stdout == ""
            assert done.stderr.count("error: ") == 1
            assert "Traceback" not in done.stderr
            assert all(word in done.stderr for word in words), done.stderr
        assert not (short_run.parent / "out").exists()

    def test_a_pattern_that_matches_no_weight_and_the_mended_run(
        self, capsys: pytest.CaptureFixture[str], short_run: Path
    ) -> None:
        done = run_here(capsys, "train", short_run, "full.train=[to_q]")
        assert_refused(done, "`full.train`", "'to_q'", "weights of the model", "whole path")
        mended = run_here(capsys, "train", short_run, "full.train=['.*to_q.*']", "iterations=1")
        assert mended.code == 0, mended.stderr

    def test_an_optimizer_whose_package_is_not_there(
        self, capsys: pytest.CaptureFixture[str], short_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flux_ft import plan

        inner = plan.find_spec
        monkeypatch.setattr(plan, "find_spec", lambda name: None if name == "bitsandbytes" else inner(name))
        for name in ("adamw8bit", "paged-adamw8bit"):
            done = run_here(capsys, "check", short_run, f"optim.name={name}")
            assert_refused(done, f"`optim.name: {name}`", "pip install bitsandbytes")
        assert run_here(capsys, "check", short_run, "optim.name=adafactor").code == 0

    def test_more_streamed_blocks_than_there_are_is_all_of_them(
        self, capsys: pytest.CaptureFixture[str], short_run: Path
    ) -> None:
        done = run_here(capsys, "train", short_run, "memory.stream_blocks=1000", "iterations=1")
        assert done.code == 0, done.stderr
        assert "6 blocks stay in host memory" in done.stderr


class TestCheck:
    @pytest.mark.parametrize(
        ("override", "told"),
        [
            ("full.train=blocks", "training  weights of the blocks, then a LoRA of rank 4 extracted"),
            ("full.train=attention", "training  weights of the attention, then a LoRA of rank 4 extracted"),
            ("full.train=all", "training  all weights, then a LoRA of rank 4 extracted"),
            ("full.train=['.*norm.*']", "training  some weights, then a LoRA of rank 4 extracted"),
            ("finetune_type=lora", "training  LoRA rank 4,"),
        ],
    )
    def test_says_what_is_trained(
        self, capsys: pytest.CaptureFixture[str], short_run: Path, override: str, told: str
    ) -> None:
        done = run_here(capsys, "check", short_run, override)
        assert done.code == 0, done.stderr
        assert told in done.stderr

    def test_in_a_child_process(self, short_run: Path, tmp_path: Path) -> None:
        done = run_verb("check", short_run, cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert "weights of the blocks, then a LoRA of rank 4 extracted, 2 steps of 1 picture" in done.stderr
        assert "learning rate 0.0001" in done.stderr
        assert not (tmp_path / "out").exists()
