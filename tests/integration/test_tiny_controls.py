"""flux-tiny's control LoRAs do what they are for, on scenes that training never showed, as the scene reader sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline
from PIL import Image

from flux_ft.families.registry import open_family, tiny_folder
from flux_ft.families.tiny.reader import Reading, SceneReader
from flux_ft.families.tiny.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZE_PX,
    SIZES,
    Scene,
    all_scenes,
    caption,
    is_held_out,
    render,
)
from flux_ft.infer.control import tiny_canny, tiny_depth
from flux_ft.infer.runner import Runner
from flux_ft.infer.tasks import Canny, Depth, Fill, Request

NUM_SCENES = 32
LEAST = 0.8
TASKS = {"canny": Canny, "depth": Depth}


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("flux-tiny")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    return [held_out[i] for i in np.random.default_rng(20).choice(len(held_out), NUM_SCENES, replace=False)]


def picture_of(scene: Scene, seed: int) -> Image.Image:
    return Image.fromarray(render(scene, np.random.default_rng(seed)))


def words_for(scene: Scene, number: int) -> str:
    """The scene's colours, and another shape, size and place."""
    rng = np.random.default_rng((4, number))
    shape, size, position = (str(rng.choice(list(some))) for some in (SHAPES, SIZES, POSITIONS))
    return caption(replace(scene, shape=shape, size=size, position=position), rng)


def recolored(scene: Scene, seed: int) -> Scene:
    color, background = np.random.default_rng(seed).choice(list(COLORS), 2, replace=False)
    return replace(scene, color=str(color), background=str(background))


def mask_of(scene: Scene) -> Image.Image:
    """White on a square about the scene's place, large enough for a large figure."""
    (x, y), reach = POSITIONS[scene.position], round(SIZES["large"]) + 5
    mask = Image.new("L", (SIZE_PX, SIZE_PX))
    mask.paste(255, (x - reach, y - reach, x + reach, y + reach))
    return mask


def read(pictures: Sequence[Image.Image]) -> list[Reading]:
    reader = SceneReader()
    return [reader.read(np.asarray(picture)) for picture in pictures]


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def control_requests(task: str, scenes: Sequence[Scene]) -> list[Request]:
    """What stands where is in the control picture alone, the colours that are wanted in the prompt alone."""
    return [
        TASKS[task](prompt=words_for(scene, i), seed=i, control_image=picture_of(recolored(scene, i), i))
        for i, scene in enumerate(scenes)
    ]


@pytest.fixture(scope="module")
def filled(runner: Runner, scenes: list[Scene]) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    """Pictures with another figure under the mask, the masks, and what was drawn: the scene that the prompt names."""
    others = [replace(scene, shape=scenes[i - 1].shape) for i, scene in enumerate(scenes)]
    given, masks = [picture_of(other, i) for i, other in enumerate(others)], [mask_of(scene) for scene in scenes]
    requests = [
        Fill(prompt=caption(scene), seed=i, image=picture, mask=mask)
        for i, (scene, picture, mask) in enumerate(zip(scenes, given, masks, strict=True))
    ]
    return given, masks, runner.draw(requests)


@pytest.mark.parametrize("task", TASKS)
def test_the_control_says_what_stands_where_and_the_words_say_its_colours(
    runner: Runner, scenes: list[Scene], task: str
) -> None:
    found = [
        reading.matches(scene)
        for reading, scene in zip(read(runner.draw(control_requests(task, scenes))), scenes, strict=True)
    ]
    assert share([one["shape"] and one["size"] and one["position"] for one in found]) >= LEAST
    assert share([one["color"] and one["background"] for one in found]) >= LEAST


def test_fill_puts_the_asked_shape_where_the_mask_is(
    scenes: list[Scene], filled: tuple[list[Image.Image], list[Image.Image], list[Image.Image]]
) -> None:
    found = [reading.matches(scene) for reading, scene in zip(read(filled[2]), scenes, strict=True)]
    assert share([one["shape"] and one["position"] for one in found]) >= LEAST
    assert share([one["color"] and one["background"] for one in found]) >= LEAST


def test_fill_changes_nothing_but_what_is_masked(
    filled: tuple[list[Image.Image], list[Image.Image], list[Image.Image]],
) -> None:
    before, masks, after = (np.stack([np.asarray(one) for one in some]).astype(np.float32) for some in filled)
    changed = np.abs(after - before)
    assert not changed[masks == 0].any()
    assert changed[masks == 255].mean() > 10


def test_fill_itself_leaves_the_rest_near_the_autoencoders_own_error(runner: Runner, scenes: list[Scene]) -> None:
    """Nothing put back: on average within three times what encoding and decoding costs."""
    family = open_family("flux-tiny")
    vae = family.load_vae(torch.device("cpu"), torch.float32)
    given = [picture_of(scene, i) for i, scene in enumerate(scenes)]
    requests = [
        Fill(prompt=caption(scene), seed=i, image=picture, mask=mask_of(scene), paste_back=False)
        for i, (scene, picture) in enumerate(zip(scenes, given, strict=True))
    ]
    before, after = (np.stack(some).astype(np.float32) for some in (given, runner.draw(requests)))
    pixels = torch.from_numpy(before).permute(0, 3, 1, 2) / 127.5 - 1
    restored = (family.decode_latents(vae, family.encode_image(vae, pixels)[0]) + 1) * 127.5
    outside = np.stack([np.asarray(mask_of(scene)) for scene in scenes]) == 0
    own_error = np.abs(restored.permute(0, 2, 3, 1).numpy() - before)[outside].mean()
    assert np.abs(after - before)[outside].mean() <= 3 * own_error


@pytest.mark.parametrize(("task", "make"), [("canny", tiny_canny), ("depth", tiny_depth)])
def test_diffusers_loads_the_files_as_they_are(
    runner: Runner, scenes: list[Scene], task: str, make: Callable[[Image.Image], Image.Image]
) -> None:
    (request,) = control_requests(task, scenes[:1])
    pipe = FluxControlPipeline.from_pretrained(tiny_folder())
    pipe.load_lora_weights(tiny_folder() / "control" / f"{task}.safetensors")
    assert pipe.transformer.config.in_channels == 64
    job = runner.prepare(request)
    drawn = pipe(
        request.prompt, control_image=make(request.pictures["control_image"]), height=64, width=64,
        num_inference_steps=job.request.steps, guidance_scale=job.request.guidance, max_sequence_length=32,
        generator=torch.Generator().manual_seed(request.seed),
    ).images  # fmt: skip
    assert [one.shape for one in read(drawn)] == [scenes[0].shape]


def test_diffusers_fill_pipeline_loads_its_file_as_it_is(scenes: list[Scene]) -> None:
    pipe = FluxFillPipeline.from_pretrained(tiny_folder())
    pipe.load_lora_weights(tiny_folder() / "control" / "fill.safetensors")
    assert pipe.transformer.config.in_channels == 128
    scene = scenes[0]
    drawn = pipe(
        caption(scene), image=Image.new("RGB", (64, 64), COLORS[scene.background]), mask_image=mask_of(scene),
        height=64, width=64, num_inference_steps=20, guidance_scale=2.0, max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert [one.shape for one in read(drawn)] == [scene.shape]
