"""The contract of every family, its numbers held against the diffusers pipeline's, and broken checkpoints.

A case is a way to open a model: by name, as a folder, as one file of either layout.
Shapes in names: B batch, C latent channels, H W latent grid, N packed tokens, L text tokens, D width, P pooled width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.adapters.formats import bfl_module
from flux_ft.errors import ModelError
from flux_ft.families import layout
from flux_ft.families.base import Family
from flux_ft.families.flux1 import pack, position_ids, unpack
from flux_ft.families.registry import VARIANTS, open_family, tiny_folder
from flux_ft.infer.sampler import initial_noise, sample_latents
from flux_ft.types import TextCond

CPU, FP32 = torch.device("cpu"), torch.float32
CASES = ("flux-tiny", "schnell-like folder", "original single file", "diffusers single file")
CAPTIONS = ["a large red circle in the center on a blue background", "small green star, top left, white background", ""]
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
WEIGHTS = "diffusion_pytorch_model.safetensors"

# --- The original layout, written down a second time: what flux_ft.families.layout must undo. ---

OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
}
SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}


def to_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to the original layout. Every tensor is used, or the assertion at the end fails."""
    left = dict(weights)
    made: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for ours, theirs in OUTSIDE.items():
            if f"{ours}.{kind}" in left:
                made[f"{theirs}.{kind}"] = left.pop(f"{ours}.{kind}")
        scale, shift = left.pop(f"norm_out.linear.{kind}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for theirs, ours, linears, norms in (
        ("double_blocks", "transformer_blocks", DOUBLE, DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", SINGLE, SINGLE_NORMS),
    ):
        for index in sorted({int(name.split(".")[1]) for name in left if name.startswith(f"{ours}.")}):
            for leaf, parts in linears.items():
                for kind in ("weight", "bias"):
                    rows = [left.pop(f"{ours}.{index}.{part}.{kind}") for part in parts]
                    made[f"{theirs}.{index}.{leaf}.{kind}"] = torch.cat(rows)
            for leaf, part in norms.items():
                made[f"{theirs}.{index}.{leaf}"] = left.pop(f"{ours}.{index}.{part}")
    assert not left, f"{len(left)} tensors without a place, first {min(left)}"
    return made


# --- Cases. ---


@dataclass(frozen=True)
class Case:
    """One opened model, and the diffusers folder that must give the same pictures."""

    family: Family
    folder: Path
    denoiser: nn.Module
    vae: nn.Module
    stack: Any

    def text(self, captions: list[str]) -> TextCond:
        return self.family.encode_text(self.stack, captions)


def tiny_weights() -> dict[str, Tensor]:
    return load_file(tiny_folder() / "transformer" / WEIGHTS)


@pytest.fixture(scope="session")
def schnell_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux-tiny's folder with a random transformer that takes no guidance, and schnell's scheduler."""
    folder = tmp_path_factory.mktemp("models") / "schnell-like"
    shutil.copytree(tiny_folder(), folder, ignore=shutil.ignore_patterns("transformer"))
    config = dict(FluxTransformer2DModel.load_config(tiny_folder(), subfolder="transformer"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel.from_config(config | {"guidance_embeds": False, "num_single_layers": 2})
    model.save_pretrained(folder / "transformer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(settings | {"use_dynamic_shifting": False, "shift": 1.0}))
    return folder


@pytest.fixture(scope="session")
def single_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """flux-tiny's transformer as one file of either layout."""
    folder = tmp_path_factory.mktemp("files")
    save_file(to_original(tiny_weights()), folder / "original.safetensors")
    save_file(tiny_weights(), folder / "diffusers.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("original", "diffusers")}


@pytest.fixture(scope="session")
def cases(schnell_like: Path, single_files: dict[str, Path]) -> Callable[[str], Case]:
    """A case by name, loaded once."""
    opened: dict[str, Case] = {}
    tiny = tiny_folder()
    how: dict[str, Callable[[], tuple[Family, Path]]] = {
        "flux-tiny": lambda: (open_family("flux-tiny"), tiny),
        "schnell-like folder": lambda: (open_family(str(schnell_like)), schnell_like),
        "original single file": lambda: (open_family(str(single_files["original"]), str(tiny)), tiny),
        "diffusers single file": lambda: (open_family(str(single_files["diffusers"]), str(tiny)), tiny),
    }

    def case(name: str) -> Case:
        if name not in opened:
            family, folder = how[name]()
            opened[name] = Case(
                family, folder, family.load_denoiser(CPU, FP32), family.load_vae(CPU, FP32),
                family.load_text(CPU, FP32),
            )  # fmt: skip
        return opened[name]

    return case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def pipeline(folder: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=FP32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- The contract. ---


def test_loaded_parts_are_frozen_and_in_evaluation_mode(case: Case) -> None:
    for part in (case.denoiser, case.vae):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert {parameter.dtype for parameter in case.denoiser.parameters()} == {FP32}


@pytest.mark.parametrize(("width", "height"), [(64, 64), (48, 64), (64, 40)])
def test_latent_shape_is_the_encoders(case: Case, width: int, height: int) -> None:
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, spread = case.family.encode_image(case.vae, pixels)
    assert tuple(latents.shape[1:]) == case.family.latent_shape(width, height)
    assert spread.shape == latents.shape
    assert (spread > 0).all()
    decoded = case.family.decode_latents(case.vae, latents)
    assert decoded.shape == pixels.shape
    assert decoded.dtype == FP32
    assert decoded.abs().max() <= 1
    tokens = pack(latents)
    assert tokens.shape[1] == width * height // case.family.variant.pixel_multiple**2
    assert torch.equal(unpack(tokens, *latents.shape[2:]), latents)


def test_encoding_and_decoding_do_not_mix_rows(case: Case) -> None:
    pixels = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together, spread = case.family.encode_image(case.vae, pixels)
    alone = [case.family.encode_image(case.vae, one[None]) for one in pixels]
    torch.testing.assert_close(together, torch.cat([mean for mean, _ in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread, torch.cat([std for _, std in alone]), rtol=1e-5, atol=1e-5)
    back = case.family.decode_latents(case.vae, together)
    one_by_one = torch.cat([case.family.decode_latents(case.vae, one[None]) for one in together])
    torch.testing.assert_close(back, one_by_one, rtol=1e-5, atol=1e-5)


def test_text_shapes_and_rows(case: Case) -> None:
    together = case.text(CAPTIONS)
    length = case.family.variant.max_text_tokens
    assert together.embeds_BLD.shape == (3, length, case.denoiser.config.joint_attention_dim)
    assert together.pooled_BP.shape == (3, case.denoiser.config.pooled_projection_dim)
    for row, caption in enumerate(CAPTIONS):
        alone = case.text([caption])
        torch.testing.assert_close(together.embeds_BLD[row], alone.embeds_BLD[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.pooled_BP[row], alone.pooled_BP[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together.embeds_BLD[0], together.embeds_BLD[1], atol=1e-3)
    assert not torch.allclose(together.pooled_BP[0], together.pooled_BP[1], atol=1e-3)


def test_a_very_long_caption_is_cut(case: Case) -> None:
    text = case.text(["red circle " * 300])
    assert text.embeds_BLD.shape[1] == case.family.variant.max_text_tokens


@torch.no_grad()
def test_velocity_does_not_mix_rows(case: Case) -> None:
    z = initial_noise(case.family.latent_shape(64, 48), [0, 1, 2])
    text, sigma = case.text(CAPTIONS), torch.tensor([0.9, 0.5, 0.1])
    together = case.family.predict_velocity(case.denoiser, z, sigma, text, 2.0)
    assert together.shape == z.shape
    assert together.dtype == z.dtype
    for row in range(3):
        one = TextCond(text.embeds_BLD[row : row + 1], text.pooled_BP[row : row + 1])
        alone = case.family.predict_velocity(case.denoiser, z[row : row + 1], sigma[row : row + 1], one, 2.0)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_guidance_acts_exactly_where_it_is_embedded(case: Case) -> None:
    z, text = initial_noise(case.family.latent_shape(64, 64), [0]), case.text(CAPTIONS[:1])
    low, high = (case.family.predict_velocity(case.denoiser, z, torch.tensor([0.7]), text, g) for g in (1.0, 4.0))
    assert torch.equal(low, high) != case.family.variant.guidance_embedded


def test_lora_targets_are_the_linears_of_the_blocks(case: Case) -> None:
    targets = case.family.lora_targets(case.denoiser)
    assert len(targets) == len(set(targets)) > 0
    for path in targets:
        assert isinstance(case.denoiser.get_submodule(path), nn.Linear)
        assert path.split(".")[0] in ("transformer_blocks", "single_transformer_blocks")
        assert bfl_module(path) is not None
    blocks = [*case.denoiser.transformer_blocks, *case.denoiser.single_transformer_blocks]
    assert len(targets) == sum(isinstance(one, nn.Linear) for block in blocks for one in block.modules())
    assert targets == case.family.lora_targets(case.denoiser)


def test_blocks_run_once_each_in_the_order_in_which_they_are_told(case: Case) -> None:
    blocks = case.family.blocks(case.denoiser)
    order: list[str] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, path=path: order.append(path)) for path, block in blocks.items()
    ]
    z, text = initial_noise(case.family.latent_shape(64, 64), [0]), case.text(CAPTIONS[:1])
    case.family.predict_velocity(case.denoiser, z, torch.tensor([0.7]), text, 1.0)
    for hook in hooks:
        hook.remove()
    assert order == list(blocks)
    assert len(order) > 2


def test_blocks_hold_all_lora_targets_and_nothing_twice(case: Case) -> None:
    blocks = case.family.blocks(case.denoiser)
    assert all(case.denoiser.get_submodule(path) is block for path, block in blocks.items())
    inside = [
        f"{path}.{name}"
        for path, block in blocks.items()
        for name, one in block.named_modules()
        if isinstance(one, nn.Linear)
    ]
    assert inside == case.family.lora_targets(case.denoiser)
    weights = [id(one) for block in blocks.values() for one in block.parameters()]
    assert len(weights) == len(set(weights)) < len(list(case.denoiser.parameters()))


# --- The same numbers as the diffusers pipeline. ---


@dataclass(frozen=True)
class Drawn:
    """What the pipeline did: its picture in [-1, 1], its sigmas, and each call of its transformer with the answer."""

    pixels_3HW: Tensor
    sigmas: Tensor
    calls: list[tuple[dict[str, Any], Tensor]]


def draw_by_pipeline(case: Case, prompt: str, seed: int, steps: int, guidance: float, size: tuple[int, int]) -> Drawn:
    pipe = pipeline(case.folder)
    forward, calls = pipe.transformer.forward, []

    def listening(**given: Any) -> Any:
        answer = forward(**given)
        calls.append((given, answer[0].clone()))
        return answer

    pipe.transformer.forward = listening
    picture = pipe(
        prompt, width=size[0], height=size[1], num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed), max_sequence_length=case.family.variant.max_text_tokens,
        output_type="pt",
    ).images[0]  # fmt: skip
    return Drawn(picture * 2 - 1, pipe.scheduler.sigmas, calls)


@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
@torch.no_grad()
def test_velocity_noise_and_picture_are_the_pipelines(case: Case, size: tuple[int, int]) -> None:
    seed, steps, guidance = 11, 4, 3.5
    drawn = draw_by_pipeline(case, CAPTIONS[0], seed, steps, guidance, size)
    family, text = case.family, case.text(CAPTIONS[:1])
    shape = family.latent_shape(*size)
    noise = initial_noise(shape, [seed])
    assert len(drawn.calls) == steps
    assert torch.equal(pack(noise), drawn.calls[0][0]["hidden_states"])

    for given, answer in drawn.calls:
        assert torch.equal(given["encoder_hidden_states"], text.embeds_BLD)
        assert torch.equal(given["pooled_projections"], text.pooled_BP)
        assert torch.equal(given["txt_ids"], torch.zeros(text.embeds_BLD.shape[1], 3))
        assert torch.equal(given["img_ids"], position_ids(shape[1] // 2, shape[2] // 2, CPU))
        z = unpack(given["hidden_states"], shape[1], shape[2])
        velocity = family.predict_velocity(case.denoiser, z, given["timestep"], text, guidance)
        torch.testing.assert_close(velocity, unpack(answer, shape[1], shape[2]), rtol=1e-6, atol=1e-6)

    sigmas = flow.sampling_sigmas(steps, family.shift_mu(shape[1], shape[2]))
    assert torch.equal(sigmas, drawn.sigmas.cpu())
    latents = sample_latents(family, case.denoiser, noise, text, steps, guidance)
    pixels = family.decode_latents(case.vae, latents)[0]
    torch.testing.assert_close(pixels, drawn.pixels_3HW, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (64, 64), (128, 128), (96, 160), (128, 126)])
def test_shift_is_diffusers(grid: tuple[int, int]) -> None:
    family = open_family("flux1-dev")
    assert family.shift_mu(*grid) == pytest.approx(calculate_shift(grid[0] * grid[1] // 4, 256, 4096, 0.5, 1.15))
    assert open_family("flux1-schnell").shift_mu(*grid) == 0


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 28, 50])
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.8, 1.15])
def test_sampling_sigmas_are_the_schedulers(steps: int, mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy(), mu=mu)
    torch.testing.assert_close(flow.sampling_sigmas(steps, mu), scheduler.sigmas, rtol=1e-6, atol=1e-7)


# --- The two layouts. ---


@pytest.mark.parametrize("name", ["original", "diffusers"])
def test_a_single_file_gives_the_folders_weights_bit_by_bit(single_files: dict[str, Path], name: str) -> None:
    loaded = open_family(str(single_files[name]), str(tiny_folder())).load_denoiser(CPU, FP32).state_dict()
    folder = open_family("flux-tiny").load_denoiser(CPU, FP32).state_dict()
    assert list(loaded) == list(folder)
    assert all(torch.equal(loaded[key], folder[key]) for key in folder)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_original_to_diffusers_inverts(prefix: str) -> None:
    weights = tiny_weights()
    original = {prefix + key: tensor for key, tensor in to_original(weights).items()}
    assert layout.is_original(original)
    assert not layout.is_original(weights)
    back = layout.to_diffusers(original)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_a_single_file_takes_its_geometry_from_its_parts(single_files: dict[str, Path]) -> None:
    variant = open_family(str(single_files["original"]), str(tiny_folder())).variant
    tiny = VARIANTS["flux-tiny"]
    sizes = ("latent_channels", "pixel_multiple", "max_pixels", "training_sides_px", "sample_size_px")
    for field in (*sizes, "max_text_tokens"):
        assert getattr(variant, field) == getattr(tiny, field), field
    assert variant.guidance_embedded
    assert not variant.distilled


def test_parts_may_be_a_variants_name(single_files: dict[str, Path]) -> None:
    family = open_family(str(single_files["original"]), "flux-tiny")
    assert family.load_denoiser(CPU, FP32) is not None
    assert family.variant.latent_channels == VARIANTS["flux-tiny"].latent_channels
    assert not family.variant.free_captions


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def full_size(request: pytest.FixtureRequest) -> FluxTransformer2DModel:
    """FLUX.1 at 12B, without its weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config({"guidance_embeds": request.param})


def test_full_size_targets_and_their_names(full_size: FluxTransformer2DModel) -> None:
    targets = open_family("flux1-dev").lora_targets(full_size)
    places = [bfl_module(path) for path in targets]
    assert len(targets) == 494
    assert None not in places
    assert len({place[0] for place in places if place}) == 304


def test_full_size_has_nineteen_double_and_thirty_eight_single_blocks(full_size: FluxTransformer2DModel) -> None:
    blocks = list(open_family("flux1-dev").blocks(full_size))
    assert blocks[:2] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert blocks[18:20] == ["transformer_blocks.18", "single_transformer_blocks.0"]
    assert len(blocks) == 19 + 38


def test_full_size_original_layout_maps_onto_diffusers(full_size: FluxTransformer2DModel) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in full_size.state_dict().items()}
    original = to_original(dict(full_size.state_dict()))
    assert len(original) == (780 if full_size.config.guidance_embeds else 776)
    assert original["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    made = layout.to_diffusers(original)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == wanted


def test_values_are_those_of_diffusers_own_converter(full_size: FluxTransformer2DModel) -> None:
    # Its widths are fixed to 3072 rows, and columns pass through, so two columns are enough and small.
    rng = torch.Generator().manual_seed(0)
    original = {
        key: torch.randn(tensor.shape[0], *([2] if tensor.ndim == 2 else []), generator=rng)
        for key, tensor in to_original(dict(full_size.state_dict())).items()
        if "_blocks." not in key or "_blocks.0." in key
    }
    ours = layout.to_diffusers(original)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- What is refused. ---


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(tiny_folder(), folder)
    return folder


def load_everything(model: str, parts: str | None = None) -> None:
    family = open_family(model, parts)
    family.load_denoiser(CPU, FP32)
    family.load_vae(CPU, FP32)
    family.load_text(CPU, FP32)


def refusal(path: Path) -> ModelError:
    """The error that opening and loading `path`, a file or a whole folder, raises, which must name it."""
    with pytest.raises(ModelError) as caught:
        load_everything(str(path), None if path.is_dir() else str(tiny_folder()))
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.parametrize("original", [True, False])
def test_a_file_of_another_size_is_refused(tmp_path: Path, original: bool) -> None:
    config = dict(FluxTransformer2DModel.load_config(tiny_folder(), subfolder="transformer"))
    weights = FluxTransformer2DModel.from_config(config | {"num_attention_heads": 2}).state_dict()
    path = tmp_path / "other.safetensors"
    save_file(to_original(weights) if original else weights, path)
    error = refusal(path)
    assert "does not fit" in error.message
    assert "model_parts" in (error.hint or "")


def test_a_file_with_a_block_too_few_or_too_many_is_refused(tmp_path: Path) -> None:
    weights = tiny_weights()
    path = tmp_path / "short.safetensors"
    save_file({key: tensor for key, tensor in weights.items() if ".3." not in key[:29]}, path)
    assert "single_transformer_blocks.3" in refusal(path).message
    save_file(weights | {f"single_transformer_blocks.4.{k}.bias": torch.zeros(2) for k in ("proj_out", "x")}, path)
    assert "single_transformer_blocks.4" in refusal(path).message


@pytest.mark.parametrize("content", [b"", b"\x08", b"no tensors at all, but text", b"\xff" * 64, bytes(64)])
def test_a_garbage_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    refusal(path)


def test_a_truncated_file_is_refused(tmp_path: Path, single_files: dict[str, Path]) -> None:
    path = tmp_path / "half.safetensors"
    content = single_files["original"].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refusal(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 2)}, path)
    assert "is a LoRA, not a model" in refusal(path).message
    save_file({"decoder.conv_in.weight": torch.zeros(2, 2)}, path)
    assert "no FLUX.1 transformer inside" in refusal(path).message


def test_a_foreign_or_misshapen_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(to_original(tiny_weights()) | {"double_blocks.0.img_attn.extra.weight": torch.zeros(2, 2)}, path)
    assert "img_attn.extra" in refusal(path).message
    for shape in ((1, 1), ()):
        save_file(to_original(tiny_weights()) | {"double_blocks.0.img_attn.qkv.weight": torch.zeros(shape)}, path)
        refusal(path)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_eight_bit_weights_are_refused(tmp_path: Path, original: bool, dtype: torch.dtype) -> None:
    weights = to_original(tiny_weights()) if original else tiny_weights()
    path = tmp_path / "eight.safetensors"
    save_file({key: tensor.to(dtype) if tensor.ndim == 2 else tensor for key, tensor in weights.items()}, path)
    assert "8-bit" in refusal(path).message


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    shutil.rmtree(folder / part)
    assert part in refusal(folder).message


@pytest.mark.parametrize("part", PARTS[:4])
def test_a_part_without_its_weights_is_refused(tmp_path: Path, part: str) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    next((folder / part).glob("*.safetensors")).unlink()
    assert part in refusal(folder).message


@pytest.mark.parametrize("part", PARTS[:4])
def test_a_part_that_lacks_a_tensor_is_refused_not_made_up(tmp_path: Path, part: str) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    path = next((folder / part).glob("*.safetensors"))
    weights = load_file(path)
    del weights[max(key for key in weights if key.endswith("weight") and weights[key].ndim > 1)]
    save_file(weights, path, metadata={"format": "pt"})
    assert part in refusal(folder).message


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "SD3Transformer2DModel"}))
    assert "SD3Transformer2DModel" in refusal(folder).message


def test_missing_parts_are_refused(tmp_path: Path, single_files: dict[str, Path]) -> None:
    with pytest.raises(ModelError) as caught:
        load_everything(str(single_files["original"]), str(tmp_path / "nowhere"))
    assert "nowhere" in caught.value.message


@pytest.mark.parametrize(("name", "near"), [("flux1-dve", "flux1-dev"), ("flux-tny", "flux-tiny"), ("schnell", None)])
def test_an_unknown_name_gets_the_nearest_one(name: str, near: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        open_family(name)
    assert name in caught.value.message
    assert (f"did you mean `{near}`?" in (caught.value.hint or "")) if near else "flux1-schnell" in caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.safetensors").message
