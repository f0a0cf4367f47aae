"""`flux-ft train` from run file to LoRA: what the run folder holds, stopping, going on, several processes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from _verbs import (
    Done,
    assert_refused,
    child_env,
    finish,
    hashes,
    metrics,
    run_here,
    run_verb,
    start_verb,
    trained_steps,
    wait_until,
    write_run,
)
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from flux_ft import log
from flux_ft.adapters.formats import compare_adapters, read_adapter
from flux_ft.data import cache
from flux_ft.families.tiny.weights import tiny_folder

pytestmark = pytest.mark.slow

STEPS = 12
PROMPTS = ["a large TOK in the center on a blue background", "a small green square at the top on a white background"]
SETTINGS: dict[str, object] = {
    "finetune_comment": "My Thing",
    "trigger_word": "TOK",
    "iterations": STEPS,
    "optim": {"batch_size": 2, "accumulate": 2},
    "schedule": {"name": "cosine", "warmup_steps": 2},
    "preview": {"every": 6, "steps": 2, "prompts": PROMPTS},
    "validation": {"every": 6, "fraction": 0.3},
    "checkpoint": {"every": 3, "keep": 2},
    "export": {"dtype": "fp32"},
}
FILES = {
    "run.yaml", "report.json", "report.html", "metrics.jsonl", "README.md", "loss.png", "previews.png",
    "my-thing.safetensors", "my-thing-comfyui.safetensors", ".lock",
}  # fmt: skip
FOLDERS = {"cache", "checkpoints", "previews", "flux_ft"}
DIFFUSERS, KOHYA = "my-thing.safetensors", "my-thing-comfyui.safetensors"


@dataclass(frozen=True)
class Run:
    """A finished `train` and its folder."""

    done: Done
    folder: Path
    run_file: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def run_file(place: Path, scenes: Path) -> Path:
    return write_run(place / "run.yaml", scenes, **SETTINGS)


@pytest.fixture(scope="module")
def straight(place: Path, run_file: Path) -> Run:
    """One run from start to end, with a tracker and --json."""
    done = run_verb("train", run_file, "output=straight", "logging.trackers=[tensorboard]", "--json", cwd=place)
    assert done.code == 0, done.stderr
    return Run(done, place / "straight", run_file)


@dataclass(frozen=True)
class Interrupted:
    """The same run, stopped by Ctrl-C, resumed, killed, resumed again to its end."""

    stopped: Done
    steps_when_stopped: list[int]
    checkpoints_when_stopped: list[str]
    steps_when_killed: list[int]
    finished: Done
    folder: Path


@pytest.fixture(scope="module")
def interrupted(place: Path, run_file: Path) -> Interrupted:
    if sys.platform == "win32":
        pytest.skip("Windows has neither signal")
    folder = place / "interrupted"
    words = ("train", run_file, "output=interrupted")
    started = time.monotonic()
    child = start_verb(*words, cwd=place)
    wait_until(lambda: len(trained_steps(folder)) >= 2, child, "step 2")
    child.send_signal(signal.SIGINT)
    stopped = finish(child, started)
    steps_when_stopped = trained_steps(folder)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())

    child = start_verb(*words, "--resume", cwd=place)
    wait_until(lambda: len(trained_steps(folder)) >= 8, child, "step 8")  # before it, step 6 waited for the save of 3
    child.send_signal(signal.SIGKILL)
    child.communicate()
    steps_when_killed = trained_steps(folder)
    finished = run_verb(*words, "--resume", cwd=place)
    return Interrupted(stopped, steps_when_stopped, checkpoints, steps_when_killed, finished, folder)


def same_lora(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    with safe_open(first, framework="pt") as a, safe_open(second, framework="pt") as b:
        keys = set(a.keys())
        return keys == set(b.keys()) and all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in keys)


def gaps(first: Path, second: Path) -> torch.Tensor:
    """How far each weight of one LoRA file is from the other's."""
    with safe_open(first, framework="pt") as a, safe_open(second, framework="pt") as b:
        assert set(a.keys()) == set(b.keys())
        return torch.cat([(a.get_tensor(key) - b.get_tensor(key)).abs().flatten() for key in a.keys()])  # noqa: SIM118


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


class TestRunFolder:
    def test_holds_what_the_design_names_and_nothing_else(self, straight: Run) -> None:
        assert {path.name for path in straight.folder.iterdir() if path.is_file()} == FILES
        assert {path.name for path in straight.folder.iterdir() if path.is_dir()} == FOLDERS
        assert not list(straight.folder.rglob("*.partial"))

    def test_json_is_one_object(self, straight: Run) -> None:
        told = straight.done.json
        assert told["steps"] == STEPS
        assert Path(told["loras"]["diffusers"]).name == DIFFUSERS
        assert Path(told["loras"]["kohya"]).name == KOHYA
        assert told["worst_delta_weight_error"] < 1e-6
        assert told["train_seconds"] > 0

    def test_people_are_told_on_stderr(self, straight: Run) -> None:
        assert f"train {STEPS}/{STEPS}" in straight.done.stderr
        assert "ETA" in straight.done.stderr

    def test_run_yaml_is_the_resolved_config(self, straight: Run) -> None:
        from flux_ft.runfile import load_run

        config = load_run(straight.folder / "run.yaml").config
        assert config.iterations == STEPS
        assert config.logging.trackers == ("tensorboard",)
        assert config.lora_rank == 4
        assert config.seed == 0

    def test_metrics_have_one_line_a_step(self, straight: Run) -> None:
        rows = metrics(straight.folder)
        assert trained_steps(straight.folder) == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows if "validation_loss" in row] == [0, 6, 12]
        for row in rows:
            values = [value for value in row.values() if isinstance(value, float)]
            assert all(value == value and abs(value) < 1e6 for value in values)
        rates = [row["learning_rate"] for row in rows if "loss" in row]
        assert max(rates) <= 1e-3
        assert rates[-1] < rates[2]

    def test_report_tells_every_picture(self, straight: Run) -> None:
        report = json.loads((straight.folder / "report.json").read_text(encoding="utf-8"))
        counts = report["counts"]
        assert (counts["files"], counts["pictures"], counts["captions"], counts["skipped"]) == (12, 6, 6, 0)
        assert all("TOK" in file["caption"] for file in report["files"] if file["role"] == "picture")
        assert "<html" in (straight.folder / "report.html").read_text(encoding="utf-8")

    def test_previews_begin_with_the_base(self, straight: Run) -> None:
        steps = sorted(path.name for path in (straight.folder / "previews").iterdir())
        assert steps == ["step-000000", "step-000006", "step-000012"]
        for step in steps:
            names = sorted(path.name for path in (straight.folder / "previews" / step).iterdir())
            assert names == ["00.png", "01.png", "prompts.json"]
            with Image.open(straight.folder / "previews" / step / "00.png") as picture:
                assert picture.size == (64, 64)

    def test_checkpoints_are_whole_and_the_newest_two(self, straight: Run) -> None:
        from flux_ft.train.checkpoint import find_fault

        folder = straight.folder / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["step-000009", "step-000012"]
        for one in folder.iterdir():
            manifest = json.loads((one / "manifest.json").read_text(encoding="utf-8"))
            assert set(manifest["files"]) == {path.name for path in one.iterdir()} - {"manifest.json"}
            assert find_fault(one) is None

    def test_tensorboard_was_told(self, straight: Run) -> None:
        assert list((straight.folder / "flux_ft").rglob("events.out.tfevents.*"))

    def test_card_shows_its_pictures(self, straight: Run) -> None:
        card = (straight.folder / "README.md").read_text(encoding="utf-8")
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["instance_prompt"] == "TOK"
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", body)
        assert shown == ["previews.png", "loss.png"]
        for name in shown:
            with Image.open(straight.folder / name) as picture:
                picture.load()
                assert picture.format == "PNG"
                assert min(picture.size) > 64
        assert DIFFUSERS in body
        assert KOHYA in body

    def test_python_of_the_card_works(self, straight: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        card = (straight.folder / "README.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert code
        monkeypatch.chdir(straight.folder)
        monkeypatch.setattr(Image.Image, "show", lambda self: None)
        exec(compile(code[1], "README.md", "exec"), {})


class TestLoraFiles:
    def test_both_files_are_the_same_lora(self, straight: Run) -> None:
        ours, comfy = read_adapter(straight.folder / DIFFUSERS), read_adapter(straight.folder / KOHYA)
        assert len(ours.layers) == 52
        assert max(compare_adapters(ours, comfy).values()) < 1e-6

    def test_something_was_learned(self, straight: Run) -> None:
        layers = read_adapter(straight.folder / DIFFUSERS).layers.values()
        assert all(float(layer.up_OR.abs().max()) > 0 for layer in layers)

    def test_diffusers_loads_it(self, straight: Run) -> None:
        from diffusers import FluxPipeline

        from flux_ft.families.registry import tiny_folder

        pipe = FluxPipeline.from_pretrained(tiny_folder())
        pipe.load_lora_weights(straight.folder / DIFFUSERS)
        layers = read_adapter(straight.folder / DIFFUSERS).layers
        found = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")}
        assert found == set(layers)
        module = pipe.transformer.get_submodule("transformer_blocks.0.attn.to_q")
        (name,) = module.lora_A
        assert module.scaling[name] == 1.0
        assert torch.equal(module.lora_A[name].weight, layers["transformer_blocks.0.attn.to_q"].down_RI)

    @pytest.mark.parametrize("name", [DIFFUSERS, KOHYA])
    def test_header_tells_trigger_word_and_config_and_no_paths(self, straight: Run, name: str, scenes: Path) -> None:
        entries = header(straight.folder / name)
        assert entries["modelspec.trigger_phrase"] == "TOK"
        assert entries["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
        config = json.loads(entries["flux_ft.export"])["config"]
        assert config["iterations"] == STEPS
        assert config["lora_rank"] == 4
        text = json.dumps(entries)
        for private in (str(scenes), scenes.name + '"', str(straight.folder), PROMPTS[0], "straight"):
            assert private not in text


class TestSecondStart:
    def test_is_refused_and_touches_nothing(self, straight: Run, capsys: pytest.CaptureFixture[str]) -> None:
        before = hashes(straight.folder)
        done = run_here(capsys, "train", straight.run_file, f"output={straight.folder}")
        assert_refused(done, "holds something already", "--resume", straight.folder.name)
        assert hashes(straight.folder) == before

    def test_resume_with_other_settings_names_them(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        before = hashes(folder)
        words = (f"output={folder}", "lora_rank=8", "seed=7", "--resume")
        assert_refused(run_here(capsys, "train", straight.run_file, *words), "`lora_rank` was 4", "`seed` was 0")
        done = run_here(capsys, "train", straight.run_file, *words, "--allow-drift")
        assert_refused(done, "`lora_rank` was 4")
        assert hashes(folder) == before

    def test_allow_drift_goes_on_and_the_checkpoints_tell(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        shutil.rmtree(folder / "checkpoints" / "step-000012")
        words = ("train", straight.run_file, f"output={folder}", "learning_rate=5e-4", "--resume")
        assert_refused(run_here(capsys, *words), "`learning rate` was", "--allow-drift")
        done = run_here(capsys, *words, "--allow-drift")
        assert done.code == 0, done.stderr
        assert "changed since step 9: `learning rate` was" in done.stderr
        manifest = json.loads((folder / "checkpoints" / "step-000012" / "manifest.json").read_text(encoding="utf-8"))
        (told,) = manifest["drift"]
        assert told.startswith("after step 9: `learning rate` was")
        assert torch.__version__ in manifest["circumstances"].values()
        assert not same_lora(folder / DIFFUSERS, straight.folder / DIFFUSERS)

    def test_another_base_under_the_same_name_is_refused(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = shutil.copytree(tiny_folder(), tmp_path / "base")
        words = ("train", straight.run_file, f"output={tmp_path / 'run'}", f"model={base}", "preview.every=null")
        assert run_here(capsys, *words, "iterations=3", "schedule.name=constant").code == 0
        (weights,) = (base / "transformer").glob("*.safetensors")
        with safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors["proj_out.bias"][0] += 0.5
        save_file(tensors, weights, metadata={"format": "pt"})
        done = run_here(capsys, *words, "iterations=4", "schedule.name=constant", "--resume")
        assert_refused(done, "`base model` was")

    def test_encoded_anew_by_other_encoders_is_refused(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The cache was made anew, and the numbers are others: nothing else would tell."""
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        for latent in (folder / "cache" / "latents").iterdir():
            entry = cache.read_entry(latent)
            cache._store(latent, entry | {"mean_CHW": entry["mean_CHW"] + 1e-3}, "a latent")
        done = run_here(capsys, "train", straight.run_file, f"output={folder}", "--resume")
        assert_refused(done, "`encoded pictures and captions` was")

    def test_a_second_run_in_the_same_folder_is_refused(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        with FileLock(folder / ".lock"):
            before = hashes(folder)
            done = run_here(capsys, "train", straight.run_file, f"output={folder}", "--resume")
            assert_refused(done, "another process trains in it")
            assert hashes(folder) == before

    def test_resume_with_other_pictures_is_refused(
        self, straight: Run, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        data = shutil.copytree(scenes, tmp_path / "data")
        (data / "00.txt").write_text("another caption of [trigger]", encoding="utf-8")
        before = hashes(folder)
        words = (f"output={folder}", f"data={data}", "--resume")
        assert_refused(run_here(capsys, "train", straight.run_file, *words), "digest of all pictures, captions")
        assert hashes(folder) == before

    def test_a_torn_checkpoint_is_passed_over(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(straight.folder, tmp_path / "copy")
        torn = folder / "checkpoints" / "step-000012" / "optimizer.pt"
        torn.write_bytes(torn.read_bytes()[:-100])
        done = run_here(capsys, "train", straight.run_file, f"output={folder}", "--resume")
        assert done.code == 0, done.stderr
        assert "step-000012 is not whole" in done.stderr
        assert "resumed from step 9" in done.stderr
        assert same_lora(folder / DIFFUSERS, straight.folder / DIFFUSERS)


class TestInterrupted:
    def test_ctrl_c_saves_and_says_how_to_go_on(self, interrupted: Interrupted, run_file: Path) -> None:
        stopped = interrupted.stopped
        assert stopped.code == 130, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert log.command("train", str(run_file), "output=interrupted", "--resume") in stopped.stderr
        last = interrupted.steps_when_stopped[-1]
        assert 2 <= last < STEPS
        assert f"step-{last:06d}" in interrupted.checkpoints_when_stopped

    def test_was_killed_on_the_way(self, interrupted: Interrupted) -> None:
        assert 8 <= interrupted.steps_when_killed[-1] < STEPS

    def test_resumed_run_ends_with_the_same_bits(self, interrupted: Interrupted, straight: Run) -> None:
        assert interrupted.finished.code == 0, interrupted.finished.stderr
        assert "resumed from step" in interrupted.finished.stderr
        for name in (DIFFUSERS, KOHYA):
            assert same_lora(interrupted.folder / name, straight.folder / name)

    def test_metrics_tell_every_step_once_and_alike(self, interrupted: Interrupted, straight: Run) -> None:
        def essence(folder: Path) -> list[dict[str, object]]:
            timed = ("step_s", "examples_per_s", "peak_gib")
            return [{key: value for key, value in row.items() if key not in timed} for row in metrics(folder)]

        assert essence(interrupted.folder) == essence(straight.folder)

    def test_pictures_on_the_way_are_the_same(self, interrupted: Interrupted, straight: Run) -> None:
        assert hashes(interrupted.folder / "previews") == hashes(straight.folder / "previews")


class TestTimeLimit:
    def test_it_saves_and_stops_in_time_and_the_resumed_run_ends_alike(
        self, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("train", straight.run_file, f"output={tmp_path / 'run'}")
        done = run_here(capsys, *words, "--max-time", "1s")  # up before the first step is done
        assert done.code == 130, done.stderr
        assert "everything up to it is saved" in done.stderr
        assert 1 <= trained_steps(tmp_path / "run")[-1] < STEPS
        assert run_here(capsys, *words, "--resume").code == 0
        assert same_lora(tmp_path / "run" / DIFFUSERS, straight.folder / DIFFUSERS)

    def test_what_is_no_time_is_refused(self, straight: Run, capsys: pytest.CaptureFixture[str]) -> None:
        done = run_here(capsys, "train", straight.run_file, "output=never", "--max-time", "soon")
        assert_refused(done, "--max-time soon", "3h50m")


class TestLaunchers:
    def test_accelerate_launch(self, straight: Run, place: Path) -> None:
        launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
        done = run_verb("train", straight.run_file, "output=launched", "--json", cwd=place, launcher=launcher)
        assert done.code == 0, done.stderr
        assert done.json["steps"] == STEPS
        assert same_lora(place / "launched" / DIFFUSERS, straight.folder / DIFFUSERS)

    @pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes is tested on Linux")
    def test_two_processes_learn_what_one_does(self, straight: Run, place: Path) -> None:
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            pytest.skip("this torch has no gloo")
        importlib.import_module("torch.distributed.run")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
        words = ("train", straight.run_file, "output=pair", "optim.batch_size=1", "--json")
        env = child_env() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = run_verb(*words, cwd=place, launcher=launcher, env=env)
        assert done.code == 0, done.stderr
        assert done.json["steps"] == STEPS
        assert trained_steps(place / "pair") == list(range(1, STEPS + 1))
        apart = gaps(place / "pair" / DIFFUSERS, straight.folder / DIFFUSERS)
        # A step is up to 1e-3 long, and AdamW's first ones blow the rounding of very small gradients up.
        assert float((apart > 1e-6).float().mean()) < 1e-3
        assert float(apart.max()) <= 3e-5
