"""Every task that diffusers has a pipeline for draws that pipeline's picture, to the bit, on flux-tiny."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageOps
from safetensors.torch import save_file

from flux_ft.adapters.attached import Attachments, widened
from flux_ft.adapters.formats import read_adapter, write_adapter
from flux_ft.families.base import Family
from flux_ft.families.layout import FLUX1
from flux_ft.families.redux import load_redux, redux_tokens, with_redux
from flux_ft.families.registry import open_family, tiny_folder
from flux_ft.families.tiny.scenes import all_scenes, render
from flux_ft.infer.runner import Runner
from flux_ft.infer.tasks import Canny, Edit, Fill, Lora, Remix, Request, TextToImage
from flux_ft.types import AdapterState, LoraLayer
from tests._lora_files import control
from tests.unit.test_redux import save_redux

PROMPT = "a small red heart in the top left on a blue background"
SETTINGS = {"prompt": PROMPT, "seed": 7, "steps": 4, "guidance": 2.0}
SCENE = Image.fromarray(render(all_scenes()[2000]))
MASK = Image.new("L", (64, 64))
MASK.paste(255, (20, 12, 52, 48))


def pipe(kind: str, folder: Path) -> Any:
    made = getattr(diffusers, kind).from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def drawn_by(pipeline: Any, width: int = 64, height: int = 64, **settings: Any) -> Image.Image:
    """The pipeline's picture of SETTINGS."""
    return pipeline(
        prompt=PROMPT, width=width, height=height, num_inference_steps=4, guidance_scale=2.0, max_sequence_length=32,
        generator=torch.Generator().manual_seed(7), **settings,
    ).images[0]  # fmt: skip


def assert_equal(ours: Image.Image, theirs: Image.Image) -> None:
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def with_model(folder: Path, width: int | None = None, index: str | None = None) -> Path:
    """flux-tiny's folder, with further input features of random weights, or under another pipeline's name."""
    shutil.copytree(tiny_folder(), folder)
    if width is not None:
        model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        model.x_embedder = widened(model.x_embedder, width)
        with torch.no_grad():
            model.x_embedder.weight[:, 32:] = 0.1 * torch.randn(128, width - 32, generator=torch.Generator())
        model.register_to_config(in_channels=width, out_channels=32)
        model.save_pretrained(folder / "transformer")
    if index is not None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": index}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        "plain": with_model(place / "plain"),
        "control": with_model(place / "control", 64),
        "fill": with_model(place / "fill", 128),
        "kontext": with_model(place / "kontext", index="FluxKontextPipeline"),
    }


TASKS: dict[str, tuple[str, str, Callable[[], Request], dict[str, Any]]] = {
    "text": ("plain", "FluxPipeline", lambda: TextToImage(**SETTINGS), {}),
    "another size": ("plain", "FluxPipeline", lambda: TextToImage(**SETTINGS, width=72, height=48), {}),
    "true cfg": (
        "plain", "FluxPipeline", lambda: TextToImage(**SETTINGS, negative_prompt="red", true_cfg=3),
        {"negative_prompt": "red", "true_cfg_scale": 3.0},
    ),
    "remix": (
        "plain", "FluxImg2ImgPipeline",
        lambda: Remix(**SETTINGS, image_prompt=SCENE, image_prompt_strength=0.3), {"image": SCENE, "strength": 0.7},
    ),
    "fill without a Fill model": (
        "plain", "FluxInpaintPipeline", lambda: Fill(**SETTINGS, image=SCENE, mask=MASK, paste_back=False),
        {"image": SCENE, "mask_image": MASK, "strength": 1.0},
    ),
    "fill": (
        "fill", "FluxFillPipeline", lambda: Fill(**SETTINGS, image=SCENE, mask=MASK, paste_back=False),
        {"image": SCENE, "mask_image": MASK},
    ),
    "control": (
        "control", "FluxControlPipeline", lambda: Canny(**SETTINGS, preprocessed_image=SCENE),
        {"control_image": SCENE},
    ),
    "edit": (
        "kontext", "FluxKontextPipeline", lambda: Edit(**SETTINGS, image=SCENE),
        {"image": SCENE, "_auto_resize": False, "max_area": 4096},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_its_pipelines_picture(name: str, folders: dict[str, Path]) -> None:
    model, kind, request, settings = TASKS[name]
    size = {side: getattr(request(), side, None) or 64 for side in ("width", "height")}
    ours = Runner(str(folders[model]), device="cpu").draw([request()])[0]
    assert_equal(ours, drawn_by(pipe(kind, folders[model]), **size, **settings))


def test_what_is_shown_matters(folders: dict[str, Path]) -> None:
    """Else the test above would hold of a runner, and of weights, that do not see the picture."""
    other = ImageOps.mirror(SCENE)
    for model, one, two in (
        ("control", Canny(**SETTINGS, preprocessed_image=SCENE), Canny(**SETTINGS, preprocessed_image=other)),
        ("kontext", Edit(**SETTINGS, image=SCENE), Edit(**SETTINGS, image=other)),
        ("fill", Fill(**SETTINGS, image=SCENE, mask=MASK), Fill(**SETTINGS, image=other, mask=MASK)),
        ("fill", Fill(**SETTINGS, image=SCENE, mask=MASK), Fill(**SETTINGS, image=SCENE, mask=MASK.rotate(90))),
    ):
        a, b = (np.asarray(image).astype(int) for image in Runner(str(folders[model]), device="cpu").draw([one, two]))
        assert abs(a - b).max() > 8


def control_lora(path: Path, *, bfl: bool) -> Path:
    """A control LoRA of small random factors on a wider input: of a few modules, or as complete as BFL's."""
    random = torch.Generator().manual_seed(3)
    tensors = {}
    denoiser = open_family("flux-tiny").load_denoiser(torch.device("cpu"), torch.float32)
    few = ("x_embedder", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")
    if bfl:
        for name, tensor in control(2, 4, 3, 128, 64).items():
            shape = list(tensor.shape)
            module, _, factor = name.partition(".lora_")
            if name.endswith("scale"):
                shape = [32]
            elif module in FLUX1.outside:  # of sizes that the maker does not know
                linear = denoiser.get_submodule(FLUX1.outside[module])
                shape[-1 if factor == "A.weight" else 0] = (
                    linear.out_features if factor[0] == "B" else 64 if module == "img_in" else linear.in_features
                )
            tensors[name] = 0.05 * torch.randn(shape, generator=random) + name.endswith("scale")
        save_file(tensors, path)
        return path
    layers = {}
    for name in few:
        linear = denoiser.get_submodule(name)
        down = torch.randn(4, 64 if name == "x_embedder" else linear.in_features, generator=random)
        layers[name] = LoraLayer(down * 0.1, torch.randn(linear.out_features, 4, generator=random) * 0.1, 4.0)
    write_adapter(path, AdapterState(layers), "diffusers", torch.float32, {})
    return path


@pytest.mark.parametrize("bfl", [False, True], ids=["peft", "bfl"])
def test_a_control_lora_is_put_on_as_diffusers_puts_it_on(bfl: bool, tmp_path: Path) -> None:
    file = control_lora(tmp_path / "control.safetensors", bfl=bfl)
    ours = Runner("flux-tiny", device="cpu", control=file).draw([Canny(**SETTINGS, preprocessed_image=SCENE)])[0]
    theirs = pipe("FluxControlPipeline", tiny_folder())
    theirs.load_lora_weights(as_diffusers_converts(file) if bfl else file)
    assert_equal(ours, drawn_by(theirs, control_image=SCENE))


def as_diffusers_converts(file: Path) -> dict[str, torch.Tensor]:
    """BFL's layout in PEFT's names, as diffusers' converter would say it if it knew other sizes than FLUX.1's."""
    state = read_adapter(file)
    tensors = {}
    for path, layer in state.layers.items():
        tensors |= {f"{path}.lora_A.weight": layer.down_RI, f"{path}.lora_B.weight": layer.up_OR}
    for path, value in state.extras.items():
        tensors[f"{path.removesuffix('.bias')}.lora_B.bias" if path.endswith(".bias") else path] = value
    return {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def plain_lora(path: Path) -> Path:
    random = torch.Generator().manual_seed(5)
    factors = (torch.randn(4, 128, generator=random) / 4, torch.randn(128, 4, generator=random) / 4)
    layers = {f"transformer_blocks.{i}.attn.to_q": LoraLayer(*factors, 4.0) for i in range(2)}
    write_adapter(path, AdapterState(layers), "diffusers", torch.float32, {})
    return path


def test_one_model_serves_tasks_with_and_without_control_in_any_order(tmp_path: Path) -> None:
    """Widened for one task and narrow for the next, with a user's LoRA on both, each as if it were alone."""
    lora = Lora(file=plain_lora(tmp_path / "mine.safetensors"), strength=0.5)
    file = control_lora(tmp_path / "control.safetensors", bfl=True)
    requests: list[Request] = [
        TextToImage(**SETTINGS),
        Canny(**SETTINGS, preprocessed_image=SCENE, loras=(lora,)),
        TextToImage(**SETTINGS, loras=(lora,)),
        Canny(**SETTINGS, preprocessed_image=SCENE),
        TextToImage(**SETTINGS, loras=(lora,), finetune_strength=0),
    ]
    together = Runner("flux-tiny", device="cpu", control=file).draw(requests)
    for request, image in zip(requests, together, strict=True):
        assert_equal(image, Runner("flux-tiny", device="cpu", control=file).draw([request])[0])
    assert_equal(together[0], together[4])
    assert len({image.tobytes() for image in together}) == 4


def test_a_narrow_lora_on_the_input_layer_acts_on_a_widened_one() -> None:
    family = open_family("flux-tiny")
    denoiser = family.load_denoiser(torch.device("cpu"), torch.float32)
    own, x = denoiser.x_embedder, torch.randn(2, 64)
    narrow = LoraLayer(torch.randn(2, 32), torch.randn(128, 2), 2.0)
    attached = Attachments(denoiser)
    attached.attach("wide", AdapterState({"x_embedder": LoraLayer(torch.zeros(1, 64), torch.zeros(128, 1), 1.0)}))
    attached.attach("mine", AdapterState({"x_embedder": narrow}), width=64)
    attached.activate({"wide": 1, "mine": 0.5})
    expected = own(x[:, :32]) + 0.5 * x[:, :32] @ (narrow.up_OR @ narrow.down_RI).T
    torch.testing.assert_close(denoiser.x_embedder(x), expected, rtol=1e-4, atol=1e-4)
    attached.activate({})
    assert denoiser.x_embedder is own


def test_pictures_do_not_depend_on_batch_order_or_idle_loras(tmp_path: Path) -> None:
    idle = Lora(file=plain_lora(tmp_path / "idle.safetensors"), strength=0)
    requests = [
        TextToImage(**(SETTINGS | {"seed": seed}), loras=(idle,) * (seed % 3), width=64 + 8 * (seed == 4))
        for seed in range(7)
    ]
    alone = [Runner("flux-tiny", device="cpu").draw([one.model_copy(update={"loras": ()})])[0] for one in requests]
    runner = Runner("flux-tiny", device="cpu")
    for order, size in ((range(7), 32), (range(7), 3), (reversed(range(7)), 2)):
        order = list(order)
        for place, image in zip(order, runner.draw([requests[place] for place in order], size), strict=True):
            assert_equal(image, alone[place])


def test_merged_loras_draw_the_attached_ones_picture(tmp_path: Path) -> None:
    """But for rounding; and the base model again when none is to act."""
    lora = Lora(file=plain_lora(tmp_path / "mine.safetensors"))
    requests = [TextToImage(**SETTINGS, loras=(lora,), finetune_strength=strength) for strength in (0, 0.5, 1)]
    attached = Runner("flux-tiny", device="cpu").draw(requests)
    merged = Runner("flux-tiny", device="cpu", merge=True).draw(requests)
    assert_equal(attached[0], merged[0])
    for one, two in zip(attached[1:], merged[1:], strict=True):
        assert abs(np.asarray(one).astype(int) - np.asarray(two)).max() <= 1
        assert one.tobytes() != attached[0].tobytes()


def test_remix_with_redux_shows_the_picture_beside_the_words(tmp_path: Path, tiny_family: Family) -> None:
    """As FluxPipeline draws FluxPriorReduxPipeline's embeddings, which tests/unit/test_redux.py holds to the bit."""
    stack = tiny_family.load_text(torch.device("cpu"), torch.float32)
    save_redux(tmp_path, stack.t5.config.d_model)
    request = Remix(**SETTINGS, image_prompt=SCENE, image_prompt_strength=0.8, width=64, height=64)
    runner = Runner("flux-tiny", device="cpu", redux=str(tmp_path))
    ours, ignored = runner.draw([request, request.model_copy(update={"image_prompt_strength": 0.0})])
    tokens = redux_tokens(load_redux(str(tmp_path)), SCENE)
    text = with_redux(tiny_family.encode_text(stack, [PROMPT]), tokens, 0.8)
    theirs = pipe("FluxPipeline", tiny_folder())(
        prompt_embeds=text.embeds_BLD, pooled_prompt_embeds=text.pooled_BP, width=64, height=64,
        num_inference_steps=4, guidance_scale=2.0, generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert_equal(ours, theirs)
    assert_equal(ignored, runner.draw([TextToImage(**SETTINGS)])[0])
    assert ours.tobytes() != ignored.tobytes()


def test_paste_back_keeps_every_pixel_outside_the_mask(folders: dict[str, Path]) -> None:
    fill = Fill(**SETTINGS, image=SCENE, mask=MASK)
    runner = Runner(str(folders["plain"]), device="cpu")
    kept, plain = (np.asarray(one) for one in runner.draw([fill, fill.model_copy(update={"paste_back": False})]))
    inside = np.asarray(MASK) == 255
    assert np.array_equal(kept[~inside], np.asarray(SCENE)[~inside])
    assert not np.array_equal(plain[~inside], np.asarray(SCENE)[~inside])
    assert np.array_equal(kept[24:36, 30:42], plain[24:36, 30:42])
