"""Pictures on the disk: written whole, read back with all that repeats them, and found again after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_ft.errors import ConfigError, InputError, StorageError
from flux_ft.infer import records
from flux_ft.infer.outputs import Planned, missing, next_number, numbered_pictures, plan_outputs
from flux_ft.infer.records import (
    check_inputs,
    input_sha256,
    make_recipe,
    pixels_sha256,
    read_recipe,
    recipe_digest,
    recipe_request,
    require_inputs,
    runner_settings,
    save_picture,
    sidecar,
    tell_repeat,
)
from flux_ft.infer.tasks import Fill, Lora, Request, TextToImage

PROMPT = "ein „Stern“, 日本の猫 🐈 <b>&\n\\u1234"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 48), Image.Resampling.BICUBIC)


def recipe(request: Request | None = None, model: str = "flux-tiny") -> dict[str, Any]:
    request = request or TextToImage(prompt=PROMPT, seed=2**63 - 1, steps=3, guidance=2.5, width=40, height=48)
    return make_recipe(
        request, model, None, [input_sha256(one.file) for one in request.loras],
        {name: input_sha256(one) if isinstance(one, Path) else "0" * 64 for name, one in request.pictures.items()},
        "cpu", "float32", {"flux_ft": "1", "torch": "2"},
    )  # fmt: skip


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """A request with a picture and two LoRAs, one of them a training's checkpoint."""
    home = tmp_path / "inputs"
    (home / "step-000100").mkdir(parents=True)
    (home / "a.safetensors").write_bytes(b"a")
    (home / "step-000100" / "manifest.json").write_bytes(b"{}")
    picture(3).save(home / "cat.png")
    loras = (Lora(file=home / "a.safetensors", strength=0.5), Lora(file=home / "step-000100"))
    return Fill(prompt="x", image=home / "cat.png", loras=loras, finetune_strength=0.5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_tells_its_request_again(tmp_path: Path, suffix: str) -> None:
    told = recipe()
    path = tmp_path / f"00000{suffix}"
    saved = save_picture(picture(), path, told)
    alone = tmp_path / f"renamed{suffix}"
    path.rename(alone)
    for source in (alone, sidecar(path)):
        again = recipe_request(read_recipe(source))
        assert again == TextToImage(prompt=PROMPT, seed=2**63 - 1, steps=3, guidance=2.5, width=40, height=48)
        assert read_recipe(source)["pixels_sha256"] == pixels_sha256(picture()) == saved["pixels_sha256"]
    with Image.open(alone) as back:
        assert (back.mode, back.size, "icc_profile" in back.info) == ("RGB", (40, 48), False)
        error = np.abs(np.asarray(back).astype(int) - np.asarray(picture()))
    assert error.max() == 0 if suffix == ".png" else 0 < error.mean() < 3


def test_jpegs_keep_colours_at_full_resolution(tmp_path: Path) -> None:
    save_picture(picture(), tmp_path / "00000.jpg", recipe())
    with Image.open(tmp_path / "00000.jpg") as back:
        assert {layer[1:3] for layer in back.layer} == {(1, 1)}  # type: ignore[attr-defined]


def test_what_a_picture_carries_along_is_left_behind(tmp_path: Path) -> None:
    image = picture().convert("RGBA")
    image.info |= {"icc_profile": b"x" * 200, "comment": b"secret", "exif": b"Exif\0\0secret"}
    for suffix in SUFFIXES:
        save_picture(image, tmp_path / f"00000{suffix}", recipe())
        data = (tmp_path / f"00000{suffix}").read_bytes()
        assert b"secret" not in data
        assert b"xxxx" not in data


def test_no_folder_goes_into_the_picture_and_the_sidecar_knows_them(tmp_path: Path, fill: Fill) -> None:
    path = tmp_path / "out" / "00000.webp"
    save_picture(picture(), path, recipe(fill, str(tmp_path / "model")))
    assert str(tmp_path).encode() not in path.read_bytes()
    told = read_recipe(path)
    found = check_inputs(told, path.parent)
    assert found.problems == ()
    wanted = {"model": str(tmp_path / "model"), "parts": None, "control": None, "redux": None}
    assert runner_settings(told, found.files) == wanted
    assert recipe_request(told, found.files) == fill
    sidecar(path).unlink()
    assert runner_settings(read_recipe(path))["model"] == "model"


def test_the_control_lora_and_redux_are_kept(tmp_path: Path, fill: Fill) -> None:
    control = fill.loras[0].file
    told = make_recipe(
        TextToImage(), "flux1-dev", None, [], {}, "cpu", "float32", {},
        control=control, control_sha=input_sha256(control), redux="some/redux",
    )  # fmt: skip
    save_picture(picture(), tmp_path / "00000.png", told)
    told = read_recipe(tmp_path / "00000.png")
    files = require_inputs(told, tmp_path)
    settings = {"model": "flux1-dev", "parts": None, "control": control, "redux": "some/redux"}
    assert runner_settings(told, files) == settings
    assert recipe_digest(told) != recipe_digest(told | {"control": None})


def test_inputs_are_found_by_their_hash(tmp_path: Path, fill: Fill) -> None:
    out = tmp_path / "out"
    save_picture(picture(), out / "00000.png", recipe(fill))
    sidecar(out / "00000.png").unlink()
    told = read_recipe(out / "00000.png")
    assert len(check_inputs(told, out).problems) == 3
    with pytest.raises(InputError, match=r"`image`: cat\.png is missing; `loras\.0`: a\.safetensors is missing"):
        require_inputs(told, out)
    (out / "cat.png").write_bytes(b"another")
    (out / "a.safetensors").write_bytes(b"another")
    (out / "renamed.safetensors").write_bytes(b"a")
    found = check_inputs(told, out, [tmp_path / "inputs" / "step-000100"])
    assert found.files == {"loras.0": out / "renamed.safetensors", "loras.1": tmp_path / "inputs" / "step-000100"}
    (problem,) = found.problems
    assert "`image`" in problem
    assert "SHA-256 differs" in problem


def test_a_foreign_recipe_leads_to_no_folder_of_its_own(tmp_path: Path, fill: Fill) -> None:
    told = recipe(fill)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"s")
    told["pictures"]["image"] = {"file": "../secret.png", "sha256": input_sha256(secret)}
    told["request"]["mask"] = str(secret)
    told.pop("paths")
    (tmp_path / "out").mkdir()
    assert "image" not in check_inputs(told, tmp_path / "out").files
    assert recipe_request(told).pictures == {"image": Path("../secret.png")}


def test_a_picture_in_memory_is_told(fill: Fill, tmp_path: Path) -> None:
    told = json.loads(json.dumps(recipe(fill.model_copy(update={"image": picture()}))))
    assert check_inputs(told, tmp_path).problems == ("`image` was a picture in memory, of which no file is known",)


def test_recipes_of_the_first_format_are_read(tmp_path: Path) -> None:
    old = {
        "request": {"prompt": "x", "seed": 4, "width_px": 64, "height_px": 48, "steps": 3, "guidance": 2.0},
        "model": "flux-tiny", "model_parts": None, "device": "cpu", "dtype": "float32", "flux_ft": "0", "torch": "2",
        "adapters": [{"file": "a.safetensors", "strength": -0.2, "sha256": "0" * 64}],
    }  # fmt: skip
    info = records.PngInfo()
    info.add_text("flux_ft", json.dumps(old))
    picture().save(tmp_path / "00000.png", pnginfo=info)
    told = read_recipe(tmp_path / "00000.png")
    assert recipe_request(told) == TextToImage(
        prompt="x", seed=4, width=64, height=48, steps=3, guidance=2.0,
        loras=(Lora(file=Path("a.safetensors"), strength=-0.2),),
    )  # fmt: skip
    assert tell_repeat(told, recipe())[0] is None


def test_a_recipe_too_long_for_a_jpeg_is_in_the_sidecar(tmp_path: Path) -> None:
    request = TextToImage(prompt="猫" * 20_000)
    for suffix in SUFFIXES:
        path = tmp_path / f"00000{suffix}"
        save_picture(picture(), path, recipe(request))
        assert recipe_request(read_recipe(path)) == request
        sidecar(path).unlink()
        if "jp" not in suffix:
            assert recipe_request(read_recipe(path)) == request
            continue
        with pytest.raises(InputError, match="does not say how it was drawn") as caught:
            read_recipe(path)
        assert "00000.json" in str(caught.value.hint)


BROKEN: dict[str, Any] = {
    "no JSON": "{",
    "a list": "[]",
    "no request": "{}",
    "deep": "[" * 100_000,
    "adapters": '{"request": {}, "adapters": [3]}',
    "strength": '{"request": {}, "adapters": [{"strength": "1"}]}',
    "endless": '{"request": {"finetune_strength": 1e999}}',
    "huge": '{"request": {}, "adapters": [{"strength": 1' + "0" * 400 + "}]}",
    "name": '{"request": {}, "adapters": [{"file": 3}]}',
    "nul": '{"request": {}, "pictures": {"image": {"file": "a\\u0000"}}}',
    "paths": '{"request": {}, "adapters": [{}], "paths": {"adapters": ["a", "b"]}}',
    "format": '{"request": {}, "format": "2"}',
    "control": '{"request": {}, "control": 3}',
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_recipes_are_refused_by_name(tmp_path: Path, case: str) -> None:
    info = records.PngInfo()
    info.add_text("flux_ft", BROKEN[case])
    picture().save(tmp_path / "00000.png", pnginfo=info)
    (tmp_path / "1.json").write_text(BROKEN[case])
    for name, hint in (("00000.png", "00000.json"), ("1.json", "the .json beside it")):
        with pytest.raises(InputError, match=name) as caught:
            read_recipe(tmp_path / name)
        assert hint in str(caught.value.hint)


def test_what_is_no_picture_or_of_a_later_format_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(path)
    for data in (b"", b"\x89PNG\r\n\x1a\n" + b"\xff" * 50, b"text"):
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot be read as PNG, JPEG or WebP"):
            read_recipe(path)
    path.with_suffix(".json").write_text(json.dumps(recipe() | {"format": 3}))
    with pytest.raises(InputError, match=r"newer flux_ft .recipe format 3"):
        read_recipe(path.with_suffix(".json"))
    with pytest.raises(ConfigError, match="`seed` is 'x'"):
        recipe_request(recipe() | {"request": {"seed": "x"}})
    with pytest.raises(ConfigError, match=r"not written as `\.gif`"):
        save_picture(picture(), tmp_path / "a.gif", recipe())


def test_the_repeat_says_whether_it_is_the_same(tmp_path: Path) -> None:
    old = save_picture(picture(), tmp_path / "00000.png", recipe())
    same = save_picture(picture(), tmp_path / "00001.jpg", recipe())
    other = save_picture(picture(1), tmp_path / "00002.png", recipe() | {"torch": "3"})
    assert tell_repeat(old, same) == (True, "the same to the pixel")
    assert tell_repeat(old, other) == (False, "not the same to the pixel; what changed: torch 2 → 3")


# --- Names, and going on. ---


def batch(number: int) -> list[dict[str, Any]]:
    return [recipe(TextToImage(prompt="x", seed=seed)) for seed in range(number)]


def draw(plan: list[Planned], recipes: list[dict[str, Any]], which: list[int]) -> None:
    for index in which:
        save_picture(picture(index), plan[index].path, recipes[index])


def names(plan: list[Planned]) -> list[str]:
    return [one.path.name for one in plan]


def test_new_pictures_take_the_next_free_numbers(tmp_path: Path) -> None:
    recipes = batch(2)
    assert names(plan_outputs(recipes, tmp_path / "none", ".png")) == ["00000.png", "00001.png"]
    for name in ("00007.webp", "00009.json", "99.png", "grid-00000.png"):
        (tmp_path / name).write_bytes(b"")
    assert next_number(tmp_path) == 10
    assert names(plan_outputs(recipes, tmp_path, ".jpg")) == ["00010.jpg", "00011.jpg"]
    assert [path.name for path in numbered_pictures(tmp_path)] == ["00007.webp"]


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_resumed_batch_is_the_one_that_was_not_interrupted(tmp_path: Path, before: int, suffix: str) -> None:
    for number in range(before):
        save_picture(picture(), tmp_path / f"{number:05d}.png", recipe(TextToImage(prompt="older", seed=number)))
    recipes = batch(5)
    wanted = plan_outputs(recipes, tmp_path, suffix)
    draw(wanted, recipes, [0, 3])
    plan = plan_outputs(recipes, tmp_path, suffix, resume=True)
    assert names(plan) == names(wanted)
    assert missing(plan) == [1, 2, 4]
    draw(plan, recipes, missing(plan))
    assert missing(plan_outputs(recipes, tmp_path, suffix, resume=True)) == []
    assert len(numbered_pictures(tmp_path)) == before + 5


@pytest.mark.parametrize("killed_at", [0, 2])
def test_a_kill_between_sidecar_and_picture_is_healed(
    tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = batch(3)
    wanted = plan_outputs(recipes, tmp_path, ".png")
    draw(wanted, recipes, list(range(killed_at)))
    write = records.write_whole

    def killed(path: Path, data: bytes) -> None:
        if path.suffix == ".png":
            raise StorageError("killed")
        write(path, data)

    monkeypatch.setattr(records, "write_whole", killed)
    with pytest.raises(StorageError):
        draw(wanted, recipes, [killed_at])
    plan = plan_outputs(recipes, tmp_path, ".png", resume=True)
    assert names(plan) == names(wanted)
    assert missing(plan) == list(range(killed_at, 3))


def test_resume_needs_the_same_recipe_and_no_sidecar(tmp_path: Path, fill: Fill) -> None:
    recipes = [recipe(fill), recipe(fill)]
    plan = plan_outputs(recipes, tmp_path / "out", ".png")
    draw(plan, recipes, [0])
    sidecar(plan[0].path).unlink()
    assert missing(plan_outputs(recipes, tmp_path / "out", ".png", resume=True)) == [1]  # one file is one picture
    fill.loras[0].file.write_bytes(b"trained on")
    plan = plan_outputs([recipe(fill)], tmp_path / "out", ".png", resume=True)
    assert (missing(plan), names(plan)) == ([0], ["00001.png"])
    (tmp_path / "out" / "00001.png").write_bytes(b"torn")
    plan = plan_outputs([recipe(fill)], tmp_path / "out", ".png", resume=True)
    assert (missing(plan), names(plan)) == ([0], ["00002.png"])


def test_the_digest_tells_what_is_drawn_and_not_where_or_by_what(tmp_path: Path, fill: Fill) -> None:
    base = recipe_digest(recipe(fill))
    moved = fill.model_copy(update={"image": (tmp_path / "inputs" / "cat.png").rename(tmp_path / "moved.png")})
    assert recipe_digest(recipe(moved) | {"device": "cuda", "torch": "9"}) == base
    for change in ({"seed": 1}, {"finetune_strength": 0.4}, {"prompt": "y"}, {"loras": fill.loras[:1]}):
        assert recipe_digest(recipe(moved.model_copy(update=change))) != base
