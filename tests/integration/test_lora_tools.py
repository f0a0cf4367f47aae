"""LoRA files through the verbs: convert, inspect, verify, diff, merge and export, on flux-tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from _verbs import Done, assert_refused, run_here, run_verb
from PIL import Image, ImageChops

MakeLora = Callable[..., Path]
Here = Callable[..., Done]


@pytest.fixture(scope="module")
def lora(make_lora: MakeLora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """A verb in this process."""
    return lambda *words: run_here(capsys, *words)


def draw(lora: Path, name: str, cwd: Path) -> Image.Image:
    words = ("generate", "--model", "flux-tiny", "--prompt", "a small star", "--steps", 4, "--output", name)
    done = run_verb(*words, "--lora", lora, cwd=cwd)
    assert done.code == 0, done.stderr
    return Image.open(cwd / name / "00000.png").convert("RGB")


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
def test_a_converted_lora_draws_the_same_picture_to_the_pixel(lora: Path, format: str, tmp_path: Path) -> None:
    done = run_verb("convert", lora, "there.safetensors", "--format", format, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (done.json["format"], done.json["worst_delta_weight_error"]) == (format, pytest.approx(0, abs=1e-6))
    back = run_verb("convert", "there.safetensors", "back.safetensors", "--format", "diffusers", cwd=tmp_path)
    assert back.code == 0, back.stderr
    assert (
        ImageChops.difference(draw(lora, "a", tmp_path), draw(tmp_path / "back.safetensors", "b", tmp_path)).getbbox()
        is None
    )


def test_diff_knows_a_converted_lora_and_a_weaker_one(here: Here, lora: Path, tmp_path: Path) -> None:
    assert here("convert", lora, tmp_path / "kohya.safetensors").code == 0
    half = tmp_path / "half.safetensors"
    assert here("merge", "--lora", f"{lora}:0.5", "--output", half, "--dtype", "fp32").code == 0
    same = here("diff", lora, tmp_path / "kohya.safetensors", "--json")
    weaker = here("diff", lora, half)
    assert (same.code, weaker.code) == (0, 0)
    assert "the same LoRA" in here("diff", lora, tmp_path / "kohya.safetensors").stdout
    assert "0.5" in weaker.stdout
    assert isinstance(same.json, dict)


def test_inspect_names_what_matters(here: Here, lora: Path) -> None:
    done = here("inspect", lora)
    assert done.code == 0
    for word in ("FLUX.1 LoRA", "diffusers", "rank", "single  3"):
        assert word in done.stdout
    assert isinstance(here("inspect", lora, "--json").json, dict)


def test_verify_says_what_diffusers_makes_of_it(here: Here, lora: Path, tmp_path: Path) -> None:
    done = run_verb("verify", lora, "--json", cwd=tmp_path)
    assert (done.code, done.json["ok"]) == (0, True)
    assert here("merge", "--lora", f"{lora}:0.5", "--output", tmp_path / "half.safetensors",
                    "--format", "diffusers").code == 0  # fmt: skip
    weaker = run_verb("verify", tmp_path / "half.safetensors", "--against", lora, cwd=tmp_path)
    assert weaker.code == 1
    assert "0.5" in weaker.stdout


def test_several_become_one(here: Here, make_lora: MakeLora, lora: Path, tmp_path: Path) -> None:
    other = make_lora(tmp_path / "other.safetensors", seed=5)
    words = ("merge", "--lora", lora, "--lora", f"{other}:0.5", "--output", tmp_path / "one.safetensors")
    done = here(*words, "--dtype", "fp32", "--json")
    assert done.code == 0, done.stderr
    small = here(*words[:-1], tmp_path / "small.safetensors", "--rank", 2, "--json")
    assert small.json["error"] > done.json["error"] == 0
    assert_refused(here(*words), "one.safetensors", "exists already")
    refused = here("merge", "--base", "flux-tiny", "--lora", lora, "--rank", 4, "--output", tmp_path / "model")
    assert_refused(refused, "--rank", "--base")


def test_a_pack_repeats_the_picture(here: Here, lora: Path, tmp_path: Path) -> None:
    picture = draw(lora, "drawn", tmp_path)
    done = here("export", lora, "--preview", tmp_path / "drawn" / "00000.png", "--pack", tmp_path / "pack", "--json")
    assert done.code == 0, done.stderr
    names = {path.name for path in (tmp_path / "pack").iterdir()}
    assert names >= {"draw.py", "preview.png", "pack.json", "README.md"}
    assert (
        ImageChops.difference(Image.open(tmp_path / "pack" / "preview.png").convert("RGB"), picture).getbbox() is None
    )
    assert json.loads((tmp_path / "pack" / "pack.json").read_text(encoding="utf-8"))
    again = here("export", lora, "--preview", tmp_path / "drawn" / "00000.png", "--pack", tmp_path / "pack")
    assert_refused(again, "pack")


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "FILE", "out.safetensors"),
        ("inspect", "FILE"),
        ("verify", "FILE"),
        ("diff", "FILE", "FILE"),
        ("merge", "--lora", "FILE", "--output", "out.safetensors"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in a zip", b'\x08\x00\x00\x00\x00\x00\x00\x00{"a":1} '])
def test_what_is_no_lora_is_one_message(here: Here, words: tuple[str, ...], content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    done = here(*(str(file) if word == "FILE" else word for word in words))
    assert_refused(done, "bad.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors"]
