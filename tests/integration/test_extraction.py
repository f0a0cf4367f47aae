"""LoRAs out of models and into models, through the verbs: merge, extract, resize and back, on flux-tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from _verbs import assert_refused, hashes, run_here, run_verb

from flux_ft.adapters.formats import compare_adapters, read_adapter

MakeLora = Callable[..., Path]


@pytest.fixture(scope="module")
def merged(make_lora: MakeLora, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the LoRA, flux-tiny with it merged in)."""
    place = tmp_path_factory.mktemp("merged")
    lora = make_lora(place / "lora.safetensors")
    done = run_verb(
        "merge", "--base", "flux-tiny", "--lora", lora, "--output", "tuned", "--dtype", "fp32", "--json", cwd=place
    )
    assert done.code == 0, done.stderr
    assert done.json["changed"] > 0
    return lora, place / "tuned"


class TestThereAndBack:
    @pytest.mark.parametrize("format", ["kohya", "diffusers"])
    def test_what_was_merged_is_what_is_extracted(self, merged: tuple[Path, Path], format: str, tmp_path: Path) -> None:
        lora, tuned = merged
        words = ("extract", "--base", "flux-tiny", "--tuned", tuned, "--output", "out.safetensors")
        done = run_verb(*words, "--rank", 16, "--format", format, "--dtype", "fp32", "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        told = json.loads((tmp_path / "out.extraction.json").read_text(encoding="utf-8"))
        assert told["energy_kept"] == pytest.approx(1, abs=1e-6)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.extraction.json", "out.safetensors"]
        again = read_adapter(tmp_path / "out.safetensors")
        assert max(compare_adapters(read_adapter(lora), again).values()) < 1e-3

    def test_it_draws_what_the_first_lora_drew(self, merged: tuple[Path, Path], tmp_path: Path) -> None:
        from PIL import Image, ImageChops

        lora, tuned = merged
        words = ("extract", "--base", "flux-tiny", "--tuned", tuned, "--rank", 16, "--dtype", "fp32")
        assert run_verb(*words, "--output", "out.safetensors", "--format", "diffusers", cwd=tmp_path).code == 0
        draw = ("generate", "--model", "flux-tiny", "--prompt", "a small star", "--steps", 4)
        for name, file in (("plain", ()), ("a", ("--lora", lora)), ("b", ("--lora", "out.safetensors"))):
            assert run_verb(*draw, *file, "--output", name, cwd=tmp_path).code == 0
        plain, first, second = (
            Image.open(tmp_path / name / "00000.png").convert("RGB") for name in ("plain", "a", "b")
        )
        assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 2
        assert max(high for _, high in ImageChops.difference(first, plain).getextrema()) > 20

    def test_auto_finds_the_ranks_that_were_merged(self, merged: tuple[Path, Path], tmp_path: Path) -> None:
        """Four for each split module, and as many times that as a fused matrix has parts."""
        words = ("extract", "--base", "flux-tiny", "--tuned", merged[1], "--output", "out.safetensors")
        done = run_verb(*words, "--rank", "auto", "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        parts = {"qkv": 3, "linear1": 4}
        expected = {
            one["name"]: 4 * next((count for part, count in parts.items() if part in one["name"]), 1)
            for one in done.json["layers"]
        }
        assert {one["name"]: one["rank"] for one in done.json["layers"]} == expected

    def test_resized_it_is_smaller(self, merged: tuple[Path, Path], tmp_path: Path) -> None:
        words = ("resize", merged[0], "--output", "small.safetensors", "--rank", 2, "--format", "diffusers", "--json")
        done = run_verb(*words, cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert (done.json["rank_before"], done.json["rank_after"]) == (4, 2)
        assert 0 < done.json["worst_loss"] < 1


class TestRefused:
    def test_nothing_is_overwritten_and_bad_input_is_one_message(
        self, merged: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lora, tuned = merged
        mine = tmp_path / "mine.safetensors"
        mine.write_bytes(b"mine")
        before = hashes(tmp_path)
        pair = ("extract", "--base", "flux-tiny", "--tuned", tuned)
        fresh = ("--output", tmp_path / "new.safetensors")
        for words, told in (
            ((*pair, "--output", mine), "mine.safetensors"),
            ((*pair, *fresh, "--rank", "many"), "--rank many"),
            ((*pair, *fresh, "--rank", "0"), "rank"),
            (("extract", "--base", "flux-tiny", "--tuned", "flux-tiny", *fresh), "flux-tiny"),
            (("extract", "--base", "flux-tiny", "--tuned", tmp_path / "nowhere", *fresh), "nowhere"),
            (("extract", "--base", "flux-tiny", "--tuned", mine, *fresh), "mine.safetensors"),
            (("resize", mine, *fresh, "--rank", 2), "mine.safetensors"),
            (("resize", lora, *fresh), "rank"),
            (("merge", "--base", "flux-tiny", "--lora", mine, "--output", tmp_path / "x"), "mine.safetensors"),
            (("merge", "--base", "flux-tiny", "--lora", lora, "--output", mine), "mine.safetensors"),
        ):
            assert_refused(run_here(capsys, *words), told)
        assert hashes(tmp_path) == before
