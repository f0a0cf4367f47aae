"""Parity packs: the script draws the preview again, the workflow is one that ComfyUI can load, nothing private goes in.

ComfyUI itself is not run. What is asserted of it are facts of its source, written down here a second time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from flux_ft import flow
from flux_ft.adapters.formats import compare_adapters, read_adapter, write_adapter
from flux_ft.adapters.safe_file import open_safely
from flux_ft.config import RunConfig
from flux_ft.errors import AdapterError, ConfigError, FluxFTError, InputError, StorageError
from flux_ft.families.base import Family
from flux_ft.families.registry import VARIANTS, open_family
from flux_ft.infer import comfy, pack
from flux_ft.infer.pack import Packed, pack_preview, preview_of_run
from flux_ft.infer.pack_text import ImageRequest
from flux_ft.infer.records import save_picture
from flux_ft.infer.runner import Runner, file_sha256
from flux_ft.infer.sampler import initial_noise
from flux_ft.infer.tasks import TextToImage
from flux_ft.runfile import dump_run
from flux_ft.types import AdapterState, AppliedAdapter, LoraLayer

ROOT = Path(__file__).resolve().parents[2]
PROMPT = 'a "red" circle (large), {not|a choice}: it\'s 100 % Größe 猫'
REQUEST = TextToImage(prompt=PROMPT, seed=7, width=64, height=48, steps=6, guidance=2.5)
SIGMA_NUMBER = re.compile(r"[-+]?(?:\d*\.*\d+)")
"""How ManualSigmas finds its numbers."""


def lora(family: Family, path: Path, seed: int, flavour: str) -> Path:
    """A bfloat16 LoRA on every linear in flux-tiny's blocks, strong enough to be seen."""
    denoiser = family.load_denoiser(torch.device("cpu"), torch.float32)
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for module in family.lora_targets(denoiser):
        out, into = denoiser.get_submodule(module).weight.shape
        down, up = torch.randn(4, into, generator=rng) * 0.1, torch.randn(out, 4, generator=rng) * 0.1
        layers[module] = LoraLayer(down.bfloat16(), up.bfloat16(), 4.0)
    metadata = {"modelspec.title": "Cat", "flux_ft.export": '{"flavour": "x"}'}
    write_adapter(path, AdapterState(layers), flavour, torch.bfloat16, metadata)
    return path


@pytest.fixture(scope="module")
def loras(tiny_family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    first = lora(tiny_family, folder / "Mon Été.safetensors", 1, "diffusers")
    return first, lora(tiny_family, folder / "b-comfyui.safetensors", 2, "kohya")


@pytest.fixture(scope="module")
def drawn(loras: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of flux-tiny with two LoRAs, drawn and saved as `flux-ft generate` does."""
    runner = Runner("flux-tiny", [AppliedAdapter(loras[0], 0.8), AppliedAdapter(loras[1], -0.3)], "cpu")
    path = tmp_path_factory.mktemp("pictures") / "00000.png"
    save_picture(runner.draw([REQUEST])[0], path, runner.recipe(REQUEST))
    return path


@pytest.fixture(scope="module")
def tiny_pack(drawn: Path, loras: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_preview(drawn, loras[::-1], tmp_path_factory.mktemp("packs") / "tiny").folder


def recipe(loras: dict[Path, float], model: str = "flux1-dev", **request: Any) -> dict[str, Any]:
    """As the runner writes it, for a model that is not here."""
    values = {"prompt": PROMPT, "seed": 7, "width_px": 1024, "height_px": 768, "steps": 28, "guidance": 3.5}
    return {
        "request": values | request,
        "model": model,
        "model_parts": None,
        "adapters": [{"file": path.name, "strength": s, "sha256": file_sha256(path)} for path, s in loras.items()],
        "device": "cuda",
        "dtype": "bfloat16",
        "flux_ft": "0.1.0",
        "torch": "2.13.0",
    }


def picture(path: Path, told: Any, size: tuple[int, int] = (1024, 768)) -> Path:
    info = PngInfo()
    info.add_text("flux_ft", told if isinstance(told, str) else json.dumps(told))
    Image.new("RGB", size, "navy").save(path, pnginfo=info)
    return path


@pytest.fixture
def dev_pack(loras: tuple[Path, Path], tmp_path: Path) -> Callable[..., Packed]:
    """`dev_pack(**request)`: the pack of a picture of flux1-dev with both LoRAs."""

    def make(model: str = "flux1-dev", **request: Any) -> Packed:
        source = picture(tmp_path / "dev.png", recipe({loras[0]: 0.8, loras[1]: -0.3}, model, **request))
        return pack_preview(source, loras, tmp_path / "pack")

    return make


# --- draw.py. ---


def test_the_script_draws_the_preview_again_with_diffusers_alone(tiny_pack: Path, drawn: Path, tmp_path: Path) -> None:
    """Equal but for roundings; on this project's machines it is equal in every pixel."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tiny_pack / "draw.py"), "--output", "again.png"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (drawn, tmp_path / "again.png"))
    gap = abs(after - before)
    assert gap.max() <= 1
    assert (gap > 0).mean() < 0.005
    assert ("equal to preview.png in every pixel" in done.stdout) == (gap.max() == 0)


def test_each_lora_of_the_pack_is_seen_in_the_preview(drawn: Path, loras: tuple[Path, Path]) -> None:
    """Else the test above would hold of a script that leaves one out."""
    seen = np.asarray(Image.open(drawn)).astype(int)
    for used in ([], [AppliedAdapter(loras[0], 0.8)], [AppliedAdapter(loras[1], -0.3)]):
        other = Runner("flux-tiny", used, "cpu").draw([REQUEST])[0]
        assert abs(np.asarray(other).astype(int) - seen).mean() > 2


def test_the_script_holds_the_request_to_the_last_bit(tiny_pack: Path, tiny_family: Family) -> None:
    source = (tiny_pack / "draw.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__file__": str(tiny_pack / "draw.py")}
    exec(source.partition("def load(")[0], names)
    assert (names["PROMPT"], names["SEED"], names["WIDTH"], names["HEIGHT"]) == (PROMPT, 7, 64, 48)
    assert (names["GUIDANCE"], names["TEXT_TOKENS"], names["DEVICE"]) == (2.5, 32, "cpu")
    assert names["LORAS"] == [("mon-été.safetensors", 0.8), ("b.safetensors", -0.3)]
    sigmas = flow.sampling_sigmas(6, tiny_family.shift_mu(12, 16))
    assert torch.equal(torch.tensor(names["SIGMAS"], dtype=torch.float32), sigmas[:-1])
    assert json.loads((tiny_pack / "pack.json").read_text())["sigmas"] == sigmas.tolist()


def test_scripts_for_other_models_are_python(dev_pack: Callable[..., Packed]) -> None:
    source = (dev_pack().folder / "draw.py").read_text(encoding="utf-8")
    compile(source, "draw.py", "exec")
    assert "black-forest-labs/FLUX.1-dev" in source
    assert "flux_ft.families" not in source


# --- workflow.json. ---

STOCK: dict[str, tuple[dict[str, str], list[str], list[type]]] = {
    # ComfyUI's nodes.py and comfy_extras, v0.3.64 (ManualSigmas: v0.7.0): linked inputs, outputs, widgets in order
    "UNETLoader": ({}, ["MODEL"], [str, str]),
    "DualCLIPLoader": ({}, ["CLIP"], [str, str, str, str]),
    "VAELoader": ({}, ["VAE"], [str]),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ["MODEL"], [str, float]),
    "T5TokenizerOptions": ({"clip": "CLIP"}, ["CLIP"], [int, int]),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["CONDITIONING"], [str]),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"], [float]),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ["GUIDER"], []),
    "KSamplerSelect": ({}, ["SAMPLER"], [str]),
    "ManualSigmas": ({}, ["SIGMAS"], [str]),
    "RandomNoise": ({}, ["NOISE"], [int, str]),
    "EmptySD3LatentImage": ({}, ["LATENT"], [int, int, int]),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ["LATENT", "LATENT"],
        [],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], []),
    "SaveImage": ({"images": "IMAGE"}, [], [str]),
}


def workflow_of(packed: Packed) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((packed.folder / "workflow.json").read_text(encoding="utf-8"))
    return loaded


def widgets(graph: dict[str, Any], type: str) -> list[Any]:
    """Of all nodes of a type, one after the other."""
    return [value for node in graph["nodes"] if node["type"] == type for value in node["widgets_values"]]


@pytest.mark.parametrize("model", ["flux1-dev", "flux1-krea", "flux1-schnell"])
def test_every_node_is_stock_with_its_own_sockets_and_widgets(model: str, dev_pack: Callable[..., Packed]) -> None:
    graph = workflow_of(dev_pack(model))
    for node in graph["nodes"]:
        inputs, outputs, kinds = STOCK[node["type"]]
        assert {one["name"]: one["type"] for one in node["inputs"]} == inputs
        assert [one["type"] for one in node["outputs"]] == outputs
        assert [type(value) for value in node["widgets_values"]] == kinds
    used = {node["type"] for node in graph["nodes"]}
    assert used == STOCK.keys() - ({"FluxGuidance"} if model == "flux1-schnell" else set())


def test_every_link_joins_two_ends_of_one_type(dev_pack: Callable[..., Packed]) -> None:
    graph = workflow_of(dev_pack())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == graph["last_node_id"]
    assert [link[0] for link in graph["links"]] == list(range(1, graph["last_link_id"] + 1))
    for number, source, source_slot, target, target_slot, kind in graph["links"]:
        out, into = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert out["type"] == into["type"] == kind
        assert number in out["links"]
        assert into["link"] == number
        assert nodes[source]["order"] < nodes[target]["order"]
    links = {link[0] for link in graph["links"]}
    assert {one["link"] for node in nodes.values() for one in node["inputs"]} == links  # none is left open
    assert {link for node in nodes.values() for one in node["outputs"] for link in one["links"]} == links


def test_no_two_nodes_lie_on_each_other(dev_pack: Callable[..., Packed]) -> None:
    nodes = workflow_of(dev_pack())["nodes"]
    for index, one in enumerate(nodes):
        for other in nodes[:index]:
            apart = [abs(a - b) for a, b in zip(one["pos"], other["pos"], strict=True)]
            assert apart[0] >= one["size"][0] or apart[1] >= min(one["size"][1], other["size"][1])


def test_the_workflow_says_what_the_picture_was_drawn_with(dev_pack: Callable[..., Packed]) -> None:
    packed = dev_pack()
    graph = workflow_of(packed)
    assert widgets(graph, "LoraLoaderModelOnly") == ["mon-été-comfyui.safetensors", 0.8, "b-comfyui.safetensors", -0.3]
    assert set(widgets(graph, "LoraLoaderModelOnly")[::2]) < set(packed.files)
    assert widgets(graph, "RandomNoise") == [7, "fixed"]
    assert widgets(graph, "EmptySD3LatentImage") == [1024, 768, 1]
    assert widgets(graph, "FluxGuidance") == [3.5]
    assert widgets(graph, "T5TokenizerOptions") == [0, 512]
    assert widgets(graph, "KSamplerSelect") == ["euler"]
    sigmas = torch.FloatTensor([float(number) for number in SIGMA_NUMBER.findall(widgets(graph, "ManualSigmas")[0])])
    assert torch.equal(sigmas, flow.sampling_sigmas(28, flow.resolution_mu(64 * 48)))
    assert widgets(graph, "UNETLoader") == ["flux1-dev.safetensors", "default"]


def test_the_preview_itself_can_be_dropped_and_packed_again(
    dev_pack: Callable[..., Packed], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    packed = dev_pack()
    with Image.open(packed.folder / "preview.png") as image:
        assert json.loads(image.text["workflow"]) == workflow_of(packed)  # type: ignore[attr-defined]
    files = [packed.folder / one.diffusers_file for one in packed.loras]
    again = pack_preview(packed.folder / "preview.png", files, tmp_path / "again")
    assert workflow_of(again) == workflow_of(packed)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 28, 50])
def test_any_sigmas_survive_the_way_through_the_node(steps: int) -> None:
    for mu in (0.0, 0.5, 0.9, 1.15, 3.0):
        sigmas = flow.sampling_sigmas(steps, mu)
        text = comfy.sigma_text(sigmas.tolist())
        assert torch.equal(torch.FloatTensor([float(number) for number in SIGMA_NUMBER.findall(text)]), sigmas)


def read_by_comfyui(text: str) -> str:
    """What its page and then its tokenizer make of a prompt whose words all have weight 1; fails if some have not."""
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    assert not re.search(r"(?<!\\)[{}]", text), "a choice"
    text = re.sub(r"\\([{}|])", r"\1", text)
    assert not re.search(r"(?<!\\)[()]", text), "a weight"
    return text.replace("\\)", ")").replace("\\(", "(")


@pytest.mark.parametrize(
    "prompt", [PROMPT, "", "a (((b", ":-) {a|{b}}", "(a:1.3) b", "a|b", "line\nbreak", "100 % // no", "C:\\x"]
)
def test_comfyui_reads_each_letter_or_the_pack_says_so(prompt: str) -> None:
    if comfy.is_expressible(prompt):
        assert read_by_comfyui(comfy.literal(prompt)) == prompt
    else:
        assert "//" in prompt or "\\" in prompt


def test_the_pack_notes_what_comfyui_takes_otherwise(dev_pack: Callable[..., Packed]) -> None:
    notes = dev_pack(prompt="see https://example.com", seed=2**53).notes
    assert [("2^53" in note, "//" in note) for note in notes] == [(True, False), (False, True)]


def test_a_simple_scheduler_instead_differs_as_little_as_the_readme_says() -> None:
    """ModelSamplingFlux, BasicScheduler `simple`: every (10,000 / steps)-th of 10,000 shifted times, rounded down."""
    worst = 0.0
    for tokens in (256, 1024, 2304, 4096):
        mu = flow.resolution_mu(tokens)
        table = flow.shift_sigma(torch.arange(1, 10_001) / 10_000, mu)
        for steps in range(1, 51):
            simple = torch.stack([table[-(1 + int(i * 10_000 / steps))] for i in range(steps)] + [torch.zeros(())])
            worst = max(worst, float((simple - flow.sampling_sigmas(steps, mu)).abs().max()))
    assert 1e-5 < worst < 0.0005


def test_the_noise_is_the_one_that_comfyui_draws() -> None:
    noise = initial_noise((16, 96, 128), [7])
    torch.manual_seed(7)
    assert torch.equal(noise, torch.randn(torch.Size([1, 16, 768 // 8, 1024 // 8]), dtype=torch.float32))


def test_flux_tiny_gets_no_workflow(tiny_pack: Path) -> None:
    assert sorted(path.name for path in tiny_pack.iterdir()) == [
        "README.md",
        "b.safetensors",
        "draw.py",
        "mon-été.safetensors",
        "pack.json",
        "preview.png",
    ]
    assert "ComfyUI cannot run this model" in (tiny_pack / "README.md").read_text(encoding="utf-8")


# --- LoRAs and other contents. ---


def test_packed_loras_have_the_same_effect_bit_for_bit(
    dev_pack: Callable[..., Packed], loras: tuple[Path, Path]
) -> None:
    packed = dev_pack()
    for path, one in zip(loras, packed.loras, strict=True):
        assert one.comfy_file is not None
        for name in (one.comfy_file, one.diffusers_file):
            assert max(compare_adapters(read_adapter(path), read_adapter(packed.folder / name)).values()) <= 1e-7
            entries = open_safely(packed.folder / name).entries
            assert {entry.dtype for key, entry in entries.items() if not key.endswith("alpha")} == {"BF16"}


def test_a_scale_is_multiplied_in_without_rounding(tiny_family: Family, tmp_path: Path) -> None:
    path = tmp_path / "third.safetensors"
    lora(tiny_family, path, 3, "kohya")
    tensors = {key: torch.tensor(1 / 3) if key.endswith("alpha") else one for key, one in load_file(path).items()}
    save_file(tensors, path)
    packed = pack_preview(picture(tmp_path / "a.png", recipe({path: 1.0})), [path], tmp_path / "pack")
    for name in ("third.safetensors", "third-comfyui.safetensors"):
        assert max(compare_adapters(read_adapter(path), read_adapter(packed.folder / name)).values()) <= 1e-6


def test_the_header_names_the_layout_that_the_file_has(dev_pack: Callable[..., Packed]) -> None:
    packed = dev_pack()
    for name, flavour in (("b.safetensors", "diffusers"), ("b-comfyui.safetensors", "kohya")):
        metadata = open_safely(packed.folder / name).metadata
        assert json.loads(metadata["flux_ft.export"])["flavour"] == flavour
        assert metadata["modelspec.title"] == "Cat"


def test_the_preview_keeps_its_pixels(tiny_pack: Path, drawn: Path) -> None:
    assert np.array_equal(np.asarray(Image.open(tiny_pack / "preview.png")), np.asarray(Image.open(drawn)))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_no_path_of_the_user_goes_in(kind: str, loras: tuple[Path, Path], tmp_path: Path) -> None:
    """A model of the user's own is named by the last part of its path, and the script asks for it."""
    private = tmp_path / "ann" / "secret"
    if kind == "folder":
        model, told = private / "my-flux", {"model_parts": None}
        (model / "transformer").mkdir(parents=True)
        (model / "vae").mkdir()
        (model / "transformer" / "config.json").write_text('{"in_channels": 64, "guidance_embeds": true}')
        (model / "vae" / "config.json").write_text('{"block_out_channels": [1, 1, 1, 1]}')
    else:
        model, told = private / "my-flux.safetensors", {"model_parts": "flux1-dev"}
        private.mkdir(parents=True)
        header = b'{"guidance_in.in_layer.weight":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        model.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    source = picture(tmp_path / "a.png", recipe({loras[0]: 1.0}, str(model)) | told)
    packed = pack_preview(source, [loras[0]], tmp_path / "pack")
    for name in packed.files:
        content = (packed.folder / name).read_bytes()
        assert b"secret" not in content
        assert str(loras[0].parent).encode() not in content
    script = (packed.folder / "draw.py").read_text(encoding="utf-8")
    assert "my-flux" in script
    assert ("MODEL = None" in script) == (kind == "folder")
    assert ("NEEDS_TRANSFORMER = True" in script) == (kind == "file")
    assert widgets(workflow_of(packed), "UNETLoader")[0] == "my-flux.safetensors"


# --- Run folders. ---


@pytest.fixture
def run_folder(run_settings: Callable[..., RunConfig], loras: tuple[Path, Path], tmp_path: Path) -> Path:
    """What a run on flux-tiny leaves, as far as a pack needs it."""
    config = run_settings(tmp_path, finetune_comment="My Cat", preview={"every": 2, "seed": 40, "steps": 5})
    folder = tmp_path / "run"
    for step in (2, 4):
        (folder / "previews" / f"step-{step:06d}").mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 64), (step, index, 0)).save(
                folder / "previews" / f"step-{step:06d}" / f"{index:02d}.png"
            )
        (folder / "previews" / f"step-{step:06d}" / "prompts.json").write_text('["a ring", "a star"]')
    (folder / "run.yaml").write_text(dump_run(config), encoding="utf-8")
    (folder / "my-cat.safetensors").write_bytes(loras[0].read_bytes())
    return folder


def test_the_last_preview_of_a_run_is_packed_with_the_lora_of_the_run(run_folder: Path, tmp_path: Path) -> None:
    assert preview_of_run(run_folder, 1).request == ImageRequest("a star", 41, 64, 64, 5, 2.0)
    packed = pack_preview(run_folder, [], tmp_path / "pack", prompt=1)
    assert np.asarray(Image.open(packed.folder / "preview.png"))[0, 0].tolist() == [4, 1, 0]
    assert "my-cat.safetensors" in packed.files
    assert "drawn while training, after 4 steps" in packed.for_people()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "my-cat.safetensors").unlink(), "holds no LoRA yet"),
        (lambda folder: (folder / "previews/step-000004/prompts.json").write_text("["), "cannot be read"),
        (lambda folder: (folder / "previews/step-000004/prompts.json").write_text("[]"), "has 0 previews"),
        (lambda folder: (folder / "run.yaml").unlink(), r"run\.yaml"),
        (lambda folder: (folder / "previews/step-000004/01.png").unlink(), "cannot be read"),
    ],
)
def test_a_run_that_lacks_something_is_refused(
    break_it: Callable[[Path], object], words: str, run_folder: Path, tmp_path: Path
) -> None:
    break_it(run_folder)
    with pytest.raises(FluxFTError, match=words):
        pack_preview(run_folder, [], tmp_path / "pack", prompt=1)
    assert not (tmp_path / "pack").exists()


# --- What is refused. ---


def test_another_lora_than_the_drawn_one_is_refused(loras: tuple[Path, Path], tmp_path: Path) -> None:
    source = picture(tmp_path / "a.png", recipe({loras[0]: 1.0}))
    for given, words in (
        ([loras[1]], "was drawn with Mon Été"),
        ([], "was drawn with Mon Été"),
        ([*loras], "was drawn without b-comfyui"),
        ([tmp_path / "none"], "cannot be read"),
    ):
        with pytest.raises(AdapterError, match=words) as caught:
            pack_preview(source, given, tmp_path / "pack")
        assert caught.value.hint
    with pytest.raises(AdapterError, match="without a LoRA"):
        pack_preview(picture(tmp_path / "b.png", recipe({})), [], tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda told: "{",
    "a list": lambda told: [],
    "no request": lambda told: told | {"request": None},
    "a field too many": lambda told: told | {"request": told["request"] | {"task": "fill"}},
    "a prompt that is a number": lambda told: told | {"request": told["request"] | {"prompt": 3}},
    "half a character": lambda told: told | {"request": told["request"] | {"prompt": "\ud800"}},
    "no width": lambda told: told | {"request": told["request"] | {"width_px": 0}},
    "steps that are true": lambda told: told | {"request": told["request"] | {"steps": True}},
    "steps without end": lambda told: told | {"request": told["request"] | {"steps": 10**12}},
    "guidance that is no number": lambda told: told | {"request": told["request"] | {"guidance": "x"}},
    "adapters of another kind": lambda told: told | {"adapters": [1]},
    "deep nesting": lambda told: "[" * 100_000,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_recipe_is_refused(case: str, loras: tuple[Path, Path], tmp_path: Path) -> None:
    source = picture(tmp_path / "a.png", BROKEN[case](recipe({loras[0]: 1.0})))
    with pytest.raises(InputError, match=r"a\.png") as caught:
        pack_preview(source, [loras[0]], tmp_path / "pack")
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_pictures_that_say_nothing_are_refused(loras: tuple[Path, Path], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    picture(tmp_path / "smaller.png", recipe({loras[0]: 1.0}), (512, 384))
    for name, words in (
        ("plain.png", "does not say"),
        ("photo.jpg", "as a PNG"),
        ("none.png", "as a PNG"),
        ("smaller.png", "is 512×384 px"),
    ):
        with pytest.raises(InputError, match=words):
            pack_preview(tmp_path / name, [loras[0]], tmp_path / "pack")


def test_nothing_is_overwritten(drawn: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match="exists already"):
            pack_preview(drawn, loras, tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert (pack_preview(drawn, loras, tmp_path / "empty").folder / "README.md").is_file()


def test_a_full_disk_leaves_nothing(
    drawn: Path, loras: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "save_png", full)
    with pytest.raises(StorageError, match="No space left"):
        pack_preview(drawn, loras, tmp_path / "deep" / "pack")
    assert list((tmp_path / "deep").iterdir()) == []


def test_variants_that_are_known_by_name_can_be_packed() -> None:
    """A variant added later needs a file for ComfyUI, or it is named after the variant."""
    for name in VARIANTS:
        family = open_family(name)
        if family.variant.image_input == "none" and pack.runs_in_comfyui(family.variant):
            assert all(model.url for model in comfy.models_for(family.variant)), name
