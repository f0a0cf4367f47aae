"""The other verbs: what loads without torch, what --json prints, `generate`, and the commands that the docs show."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from _verbs import ROOT, Done, child_env, hashes, run_here, run_verb, write_run
from PIL import Image, ImageChops

from flux_ft.infer.records import recipe_request
from flux_ft.infer.runner import Runner

PROMPTS = ["a large red circle in the center on a blue background", "a small star, süß 星"]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("verbs") / "run.yaml", scenes, output="unused")


class TestLightVerbs:
    @pytest.mark.parametrize(
        "line", ["--help", "--version", "train --help", "schema", "models", "check RUN", "check RUN --json"]
    )
    def test_run_without_torch(self, line: str, run_file: Path, tmp_path: Path) -> None:
        words = [str(run_file) if word == "RUN" else word for word in line.split()]
        code = (
            f"import sys; sys.argv = ['flux-ft', *{words!r}]\n"
            "from flux_ft.cli import main\n"
            "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
            f"print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=child_env(), capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1].split() == ["loaded:"]
        assert list(tmp_path.iterdir()) == []

    def test_check_json(self, run_file: Path, tmp_path: Path) -> None:
        done = run_verb("check", run_file, "optim.accumulate=3", "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        told = done.json
        assert told["ok"] is True
        assert told["model"] == "flux-tiny"
        assert told["pictures_per_step"] == 3
        assert told["buckets"] == {"64x64": 6}
        assert told["data"]["counts"]["pictures"] == 6
        assert list(tmp_path.iterdir()) == []

    def test_check_for_people(self, run_file: Path, tmp_path: Path) -> None:
        done = run_verb("check", run_file, cwd=tmp_path)
        assert done.code == 0
        assert done.stdout == ""
        assert "LoRA rank 4" in done.stderr
        assert done.stderr.splitlines()[-1] == "ok"

    def test_settings_without_effect_are_warned_about(self, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        done = run_here(capsys, "check", run_file, "priority=speed")
        assert done.code == 0
        assert "`priority` has no effect: flux-tiny has one training size" in done.stderr

    def test_models_json(self, tmp_path: Path) -> None:
        done = run_verb("models", "--json", cwd=tmp_path)
        rows = {row["name"]: row for row in done.json["models"]}
        assert {"flux-tiny", "flux1-dev", "flux1-krea", "flux1-schnell"} <= set(rows)
        assert rows["flux1-schnell"]["distilled"] is True

    def test_schema_is_the_shipped_one(self, tmp_path: Path) -> None:
        done = run_verb("schema", cwd=tmp_path)
        shipped = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
        assert json.loads(done.stdout) == shipped

    def test_doctor_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        done = run_here(capsys, "doctor", "--json")
        findings = {one["name"]: one for one in done.json["findings"]}
        assert {"python", "torch", "cpu", "flux-tiny", "disk", "hub"} <= set(findings)
        assert findings["flux-tiny"]["ok"] is True
        assert done.code == int(not all(one["ok"] for one in findings.values()))


@dataclass(frozen=True)
class Drawn:
    """What one `generate` left."""

    done: Done
    folder: Path
    loras: list[Path]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, make_lora) -> Drawn:  # type: ignore[no-untyped-def]
    """Two prompts by three seeds, with two LoRAs, in one child process."""
    place = tmp_path_factory.mktemp("draw")
    loras = [make_lora(place / "one.safetensors", 1), make_lora(place / "two.safetensors", 2, format="kohya")]
    done = run_verb(
        "generate", "--model", "flux-tiny", "--prompt", PROMPTS[0], "-p", PROMPTS[1],
        "--lora", f"{loras[0]}:0.3", "--lora", f"{loras[1]}:-0.2", "--count", 3, "--seed", 11,
        "--steps", 3, "--guidance", 2.5, "--width", 64, "--height", 48, "--grid", "--output", "pictures", "--json",
        cwd=place, env=child_env() | {"OMP_NUM_THREADS": "1"},  # another number of threads moves a pixel now and then
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return Drawn(done, place / "pictures", loras)


def recipe(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return dict(json.loads(picture.text["flux_ft"]))  # type: ignore[attr-defined]


def same_pixels(first: Path | Image.Image, second: Path | Image.Image) -> bool:
    a, b = (Image.open(one) if isinstance(one, Path) else one for one in (first, second))
    return a.size == b.size and ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None


class TestGenerate:
    def test_one_picture_a_prompt_and_seed(self, drawn: Drawn) -> None:
        names = [f"{index:05d}.png" for index in range(6)]
        assert [Path(path).name for path in drawn.done.json["pictures"]] == names
        sidecars = {name.replace(".png", ".json") for name in names}
        assert {path.name for path in drawn.folder.iterdir()} == {*names, *sidecars, "grid-00000.png"}
        for name in names:
            with Image.open(drawn.folder / name) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 48))

    def test_grid_shows_all(self, drawn: Drawn) -> None:
        with Image.open(drawn.folder / Path(drawn.done.json["grids"][0]).name) as grid:
            assert grid.format == "PNG"
            assert grid.width > 3 * 128
            assert grid.height > 2 * 96

    def test_pictures_tell_what_they_are(self, drawn: Drawn) -> None:
        recipes = [recipe(drawn.folder / f"{index:05d}.png") for index in range(6)]
        requests = [one["request"] for one in recipes]
        assert [one["prompt"] for one in requests] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
        assert [one["seed"] for one in requests] == [11, 12, 13] * 2
        assert recipes[0]["model"] == "flux-tiny"
        assert [(one["file"], one["strength"]) for one in recipes[0]["adapters"]] == [
            ("one.safetensors", 0.3),
            ("two.safetensors", -0.2),
        ]
        assert all(re.fullmatch("[0-9a-f]{64}", one["sha256"]) for one in recipes[0]["adapters"])
        assert str(drawn.folder.parent) not in json.dumps(recipes)

    def test_metadata_is_enough_to_repeat_a_picture(self, drawn: Drawn) -> None:
        """All by the API, from nothing but what the PNG says."""
        recipes = [recipe(drawn.folder / f"{index:05d}.png") for index in range(6)]
        files = {path.name: path for path in drawn.loras}
        places = {f"loras.{i}": files[one["file"]] for i, one in enumerate(recipes[0]["adapters"])}
        again = Runner(recipes[0]["model"]).draw([recipe_request(one, places) for one in recipes])
        for index, picture in enumerate(again):
            assert same_pixels(drawn.folder / f"{index:05d}.png", picture)

    def test_metadata_is_enough_for_the_command_line(
        self, drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One picture alone, which another batch drew before."""
        told = recipe(drawn.folder / "00004.png")
        request = told["request"]
        loras = [f"--lora={drawn.folder.parent / one['file']}:{one['strength']}" for one in told["adapters"]]
        done = run_here(
            capsys, "generate", "--model", told["model"], *loras, "--prompt", request["prompt"], "--seed",
            request["seed"], "--steps", request["steps"], "--guidance", request["guidance"], "--width",
            request["width"], "--height", request["height"], "--output", tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        assert same_pixels(drawn.folder / "00004.png", tmp_path / "00000.png")

    def test_everything_that_is_told_matters(
        self, drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fixed = ("--model", "flux-tiny", "--prompt", PROMPTS[0], "--steps", 3, "--height", 48, "--output", tmp_path)
        one, two = drawn.loras
        changes = ([], ["--seed", 1], ["--lora", one], ["--lora", f"{one}:0.5"], ["--lora", two], ["--guidance", 1])
        for change in changes:
            assert run_here(capsys, "generate", *fixed, *change).code == 0
        pictures = [Image.open(tmp_path / f"{index:05d}.png") for index in range(len(changes))]
        for index, picture in enumerate(pictures):
            assert not any(same_pixels(picture, other) for other in pictures[:index])

    def test_numbers_go_on_and_nothing_is_overwritten(
        self, drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("generate", "--model", "flux-tiny", "--prompt", "x", "--steps", 1, "--grid", "--output", tmp_path)
        assert run_here(capsys, *words, "--count", 2).code == 0
        (tmp_path / "00007.png").write_bytes(b"a picture of mine")
        (tmp_path / "letter.txt").write_text("something of mine")
        before = hashes(tmp_path)
        assert run_here(capsys, *words, "--seed", 5).code == 0
        after = hashes(tmp_path)
        assert after | before == after
        assert set(after) - set(before) == {"00008.png", "00008.json", "grid-00008.png"}

    def test_without_grid_there_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("generate", "--model", "flux-tiny", "--prompt", "x", "--steps", 1, "--output", tmp_path, "--json")
        assert run_here(capsys, *words).json["grids"] == []


def shown_commands() -> Iterator[tuple[str, str]]:
    """(where, command) of every line of a fenced block that starts with `flux-ft`, continued lines joined."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for block in re.finditer(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", text, re.DOTALL | re.MULTILINE):
            lines = block[1].replace("\\\n", " ").splitlines()
            first = text.count("\n", 0, block.start(1)) + 1
            for number, line in enumerate(lines):
                command = line.strip().removeprefix("$ ")
                if command.startswith("flux-ft "):
                    yield f"{path.name}:{first + number}", command


def parse(command: str) -> None:
    """Read the command line as `main` would, without running the verb. Raises what a wrong one raises."""
    root: Any = typer.main.get_command(__import__("flux_ft.cli", fromlist=["app"]).app)
    verb, *words = shlex.split(command, comments=True)[1:]
    if verb.startswith("-"):
        assert verb in {option for parameter in root.params for option in parameter.opts} | {"--help"}
        return
    assert verb in root.commands, f"no verb `{verb}`"
    if "--help" not in words:
        root.commands[verb].make_context(verb, words)


class TestCommandsInTheDocs:
    @pytest.mark.parametrize(("where", "command"), list(shown_commands()))
    def test_parses(self, where: str, command: str) -> None:
        try:
            parse(command)
        except Exception as error:  # noqa: BLE001 - typer's own copy of click names its errors
            pytest.fail(f"{where}: `{command}`: {error}")

    @pytest.mark.parametrize("command", ["flux-ft tarin x", "flux-ft train x --resum", "flux-ft generate --steps x"])
    def test_a_wrong_one_would_be_found(self, command: str) -> None:
        with pytest.raises(Exception):  # noqa: B017, PT011
            parse(command)
