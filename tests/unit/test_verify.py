"""LoRA files through the installed diffusers: sound ones act as they are, and each fault shows as what it is."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from _loras import LAYOUT_CASES, block_paths, edited, random_lora, renamed, with_header
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from flux_ft.adapters.formats import delta_weight, write_adapter
from flux_ft.adapters.recognise import read_contents
from flux_ft.adapters.tools import DIFFUSERS, verdicts
from flux_ft.adapters.verify import Verification, verify_file
from flux_ft.errors import AdapterError
from flux_ft.families.layout import FLUX1
from flux_ft.types import AdapterState, LoraLayer

REAL = 3072
"""The width of FLUX.1, whose linear1 diffusers' kohya converter has built in."""
Q = "transformer_blocks.0.attn.to_q"
OUT = "transformer_blocks.0.attn.to_out.0"
HALF = {
    "lora_adapter_metadata": json.dumps(
        {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.target_modules": ["attn.to_out.0"]}
    )
}


def saved(folder: Path, state: AdapterState, format: str = "kohya", dtype: torch.dtype = torch.float32) -> Path:
    write_adapter(folder / "cat.safetensors", state, format, dtype, {})
    return folder / "cat.safetensors"


def by_path(path: str) -> int:
    """Ranks of all kinds: 1 to 6."""
    return 1 + len(path) % 6


def diffusers_answer(found: Verification) -> str:
    return next(one.answer for one in found.tools if one.tool.name == "diffusers")


# --- Files that act as they should. ---


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "ranks",
    [lambda path: 12, lambda path: 5, by_path, lambda path: 1],
    ids=["divisible by 3 and 4", "by neither", "mixed", "one"],
)
def test_flux1_files_of_real_width_load_exactly(format: str, ranks: object, tmp_path: Path) -> None:
    state = random_lora(block_paths("flux1", [7], [20]), ranks, 2.5, width=REAL)  # type: ignore[arg-type]
    found = verify_file(saved(tmp_path, state, format))
    assert found.ok, found.for_people()
    assert len(found.modules) == 20
    assert found.worst_error <= 1e-6
    assert found.scales == pytest.approx((1.0, 1.0), abs=1e-6)
    assert diffusers_answer(found) == "ok"


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("parts", [("to_q", "to_v"), ("to_k",), ("to_q", "to_k", "to_v")])
def test_some_parts_of_linear1_load_exactly(format: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    paths = [f"single_transformer_blocks.0.attn.{part}" for part in parts]
    found = verify_file(saved(tmp_path, random_lora(paths, by_path, width=REAL), format))
    assert found.ok, found.for_people()
    assert found.worst_error <= 1e-6
    assert len(found.modules) == len(parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_load_as_they_are_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    """The measure is the file itself, so its own rounding is no error; alpha = rank leaves the bits alone."""
    found = verify_file(saved(tmp_path, random_lora(width=REAL), "kohya", dtype))
    assert found.ok
    assert found.worst_error <= 1e-6


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("ranks", [lambda path: 6, by_path], ids=["one rank", "mixed"])
def test_flux2_files_load_exactly(format: str, ranks: object, tmp_path: Path) -> None:
    """Two-digit block numbers too."""
    state = random_lora(block_paths("flux2", [0, 1], [0, 12]), ranks, 2.5, layout="flux2", width=32)  # type: ignore[arg-type]
    found = verify_file(saved(tmp_path, state, format))
    assert found.ok, found.for_people()
    assert (found.family, len(found.modules)) == ("flux2", 2 * 12 + 2 * 2)
    assert found.worst_error <= 1e-6
    assert found.scales == pytest.approx((1.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("width", [3072, 4096, 6144])
def test_flux2_files_of_published_widths_load_exactly(width: int, tmp_path: Path) -> None:
    paths = block_paths("flux2", [4], [19])
    found = verify_file(saved(tmp_path, random_lora(paths, 2, layout="flux2", width=width)))
    assert found.ok, found.for_people()
    assert found.worst_error <= 1e-6


def test_small_models_are_verified_in_the_diffusers_layout(tmp_path: Path) -> None:
    found = verify_file(saved(tmp_path, random_lora(block_paths("flux1", [0, 1], [0, 3]), width=128), "diffusers"))
    assert found.ok
    assert len(found.modules) == 40


def test_modules_outside_the_blocks_are_verified(tmp_path: Path) -> None:
    state = random_lora([Q], width=REAL)
    shapes = {"x_embedder": (REAL, 64), "context_embedder": (REAL, 4096), "norm_out.linear": (2 * REAL, REAL)}
    extra = {path: LoraLayer(torch.randn(2, into), torch.randn(out, 2), 2.0) for path, (out, into) in shapes.items()}
    found = verify_file(saved(tmp_path, replace(state, layers=state.layers | extra), "diffusers"))
    assert found.ok, found.for_people()
    assert len(found.modules) == 4


@pytest.mark.slow
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_what_is_read_back_is_what_fusing_adds_to_real_weights(format: str, tmp_path: Path) -> None:
    """The weights of one block of each kind, 2 GB, in place of factors: peft's own product, diffusers' own sum."""
    state = random_lora(block_paths(), by_path, 2.5, width=REAL)
    path = saved(tmp_path, state, format)
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    for parameter in model.parameters():
        parameter.data.zero_()
    absent = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(**absent, transformer=model)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    weights = {name.removesuffix(".weight"): value for name, value in model.state_dict().items() if value.any()}
    assert weights.keys() == state.layers.keys()
    for name, weight in weights.items():
        expected = delta_weight(state.layers[name])
        assert float((weight - expected).norm() / expected.norm()) <= 1e-6, name
        scale = float((weight * expected).sum(dtype=torch.float64) / expected.square().sum(dtype=torch.float64))
        assert scale == pytest.approx(1, abs=1e-6)
    assert verify_file(path).worst_error <= 1e-6


# --- Faults. ---


def halve_alphas(tensors: dict[str, Tensor]) -> None:
    tensors.update({key: tensor / 2 for key, tensor in tensors.items() if key.endswith(".alpha")})


def test_a_halved_alpha_shows_against_the_original(tmp_path: Path) -> None:
    original = saved(tmp_path, random_lora(width=REAL))
    changed = edited(original, tmp_path / "half.safetensors", halve_alphas)
    found = verify_file(changed, against=original)
    assert not found.ok
    assert found.scales == pytest.approx((0.5, 0.5), abs=1e-6)
    assert len(found.wrong) == len(found.modules) == 20
    assert "fitted scale 0.500" in found.for_people()
    assert verify_file(changed).ok, "by itself the file is sound: all tools honour alpha"


def test_a_strength_in_the_header_is_applied_twice(tmp_path: Path) -> None:
    path = with_header(saved(tmp_path, random_lora([OUT], width=REAL)), tmp_path / "b.safetensors", HALF)
    found = verify_file(path)
    assert found.scales == pytest.approx((0.5, 0.5), abs=1e-6)
    assert (found.ok, diffusers_answer(found)) == (False, "wrong")


def test_one_module_of_another_strength_is_named(tmp_path: Path) -> None:
    original = saved(tmp_path, random_lora([Q, OUT], width=REAL))
    key = "lora_unet_double_blocks_0_img_attn_proj.alpha"
    changed = edited(original, tmp_path / "b.safetensors", lambda tensors: tensors.update({key: tensors[key] * 0.99}))
    found = verify_file(changed, against=original)
    assert [one.path for one in found.wrong] == [OUT]
    assert found.scales == pytest.approx((0.99, 1.0), abs=1e-5)


def test_missing_and_extra_modules_are_named(tmp_path: Path) -> None:
    original = saved(tmp_path, random_lora([Q, OUT], width=REAL))
    name = "lora_unet_double_blocks_0_img_attn_proj"
    fewer = edited(
        original,
        tmp_path / "b.safetensors",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)],
    )
    assert verify_file(fewer, against=original).missing == (OUT,)
    found = verify_file(original, against=fewer)
    assert found.extra == (OUT,)
    assert not found.ok
    json.dumps(found.as_json(), allow_nan=False)


def test_what_diffusers_drops_without_a_word_is_missing(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors |= {"lora_unet_img_in.lora_down.weight": torch.ones(2, 64)}
        tensors["lora_unet_img_in.lora_up.weight"] = torch.ones(REAL, 2)

    found = verify_file(edited(saved(tmp_path, random_lora([OUT], width=REAL)), tmp_path / "b.safetensors", add))
    assert found.missing == ("x_embedder",)
    assert diffusers_answer(found) == "partial"


def test_a_layout_that_diffusers_does_not_know_loads_nothing(tmp_path: Path) -> None:
    found = verify_file(saved(tmp_path, random_lora([OUT, Q], width=REAL), "comfy"))
    assert found.missing == (OUT, Q)
    assert (found.ok, diffusers_answer(found)) == (False, "nothing")


def test_an_error_of_the_loader_is_told(tmp_path: Path) -> None:
    state = random_lora([Q, OUT], layout="flux2", width=32)
    add = {f"transformer.{Q}.alpha": torch.tensor(4.0)}
    path = edited(saved(tmp_path, state, "diffusers"), tmp_path / "b.safetensors", lambda tensors: tensors.update(add))
    found = verify_file(with_header(path, tmp_path / "c.safetensors", {"ss_base_model_version": "flux2"}))
    assert found.family == "flux2"
    assert found.loader_error is not None
    assert "ValueError" in found.loader_error
    assert (found.ok, found.untried, diffusers_answer(found)) == (False, False, "nothing")
    assert "fails in diffusers" in found.for_people()


def test_a_block_that_the_model_does_not_have_is_missing(tmp_path: Path) -> None:
    state = random_lora([OUT, OUT.replace("0", "19", 1)], width=REAL)
    found = verify_file(saved(tmp_path, state, "diffusers"))
    assert found.missing == (OUT.replace("0", "19", 1),)
    assert not found.ok


def test_kohya_files_of_another_width_are_not_tried(tmp_path: Path) -> None:
    found = verify_file(saved(tmp_path, random_lora(width=128)))
    assert (found.ok, found.untried) == (False, True)
    assert "not tried with diffusers" in found.for_people()
    assert "128 wide" in found.for_people()
    assert verify_file(saved(tmp_path, random_lora(block_paths(single=[]), width=128))).ok


def test_files_that_we_cannot_read_are_verified_no_further(tmp_path: Path) -> None:
    key = f"transformer.{Q}.dora_scale"
    path = edited(
        saved(tmp_path, random_lora([Q], width=REAL), "diffusers"), tmp_path / "b.safetensors",
        lambda tensors: tensors.update({key: torch.ones(REAL)}),
    )  # fmt: skip
    found = verify_file(path)
    assert found.reader_error is not None
    assert not found.ok
    assert any("DoRA" in message for message in found.warnings)
    assert {one.tool.name: one.answer for one in found.tools}["ComfyUI"] == "ok"
    assert "cannot read" in found.for_people()


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.weight": torch.ones(2, 2)},
        {"lora_unet_img_in.alpha": torch.ones(())},
        {},
        {"lora_unet_img_in.lokr_w1": torch.ones(2, 2)},
    ],
)
def test_files_without_a_lora_are_told(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    found = verify_file(tmp_path / "a.safetensors")
    assert not found.ok
    assert found.reader_error is not None
    json.dumps(found.as_json(), allow_nan=False)


def test_what_is_no_safetensors_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        verify_file(tmp_path / "a.safetensors")


def test_a_file_by_another_name_is_not_tried(tmp_path: Path) -> None:
    """diffusers would take it for a pickle."""
    path = saved(tmp_path, random_lora([OUT], width=REAL))
    found = verify_file(path.rename(tmp_path / "cat.bin"))
    assert (found.ok, found.untried) == (False, True)


@pytest.mark.parametrize("layout", ["flux1", "flux2"])
def test_what_would_keep_diffusers_busy_for_ever_is_not_tried(layout: str, tmp_path: Path) -> None:
    """Its converters halve a scale until it is small, which a negative one never is, and count up to the last block."""
    path = saved(tmp_path, random_lora([OUT, Q], layout=layout, width=REAL))

    def invert(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: -tensor for key, tensor in tensors.items() if key.endswith(".alpha")})

    found = verify_file(edited(path, tmp_path / "b.safetensors", invert))
    assert (found.ok, found.untried) == (False, True)
    assert "negative" in found.for_people()
    far = renamed(path, tmp_path / "c.safetensors", lambda key: key.replace("blocks_0_", "blocks_99999_"))
    assert "blocks beyond" in (verify_file(far).loader_error or "")
    wide = {"transformer.x_embedder.lora_A.weight": torch.ones(1, 2**16)}
    wide["transformer.x_embedder.lora_B.weight"] = torch.ones(2**16, 1)
    save_file(wide, tmp_path / "d.safetensors", {"ss_base_model_version": layout})
    assert "larger than any model" in (verify_file(tmp_path / "d.safetensors").loader_error or "")


def test_text_encoders_do_not_hinder(tmp_path: Path) -> None:
    names = [f"lora_te1_text_model_encoder_layers_0_self_attn_{part}_proj" for part in ("q", "k", "v", "out")]
    extra = {f"{name}.{end}": torch.ones(2, 2) for name in names for end in ("lora_down.weight", "lora_up.weight")}
    path = edited(
        saved(tmp_path, random_lora([OUT], width=REAL)),
        tmp_path / "b.safetensors",
        lambda tensors: tensors.update(extra),
    )
    found = verify_file(path)
    assert found.ok, found.for_people()


def test_an_untrained_lora_is_no_fault(tmp_path: Path) -> None:
    state = random_lora([Q, OUT], width=REAL)
    fresh = {path: replace(one, up_OR=torch.zeros_like(one.up_OR)) for path, one in state.layers.items()}
    found = verify_file(saved(tmp_path, replace(state, layers=fresh)))
    assert found.ok
    assert found.scales is None


def test_the_wrapped_layout_of_flux2(tmp_path: Path) -> None:
    path = saved(tmp_path, random_lora(layout="flux2", width=32), "comfy")
    renamed(path, tmp_path / "b.safetensors", lambda key: "base_model.model." + key.removeprefix("diffusion_model."))
    assert verify_file(tmp_path / "b.safetensors").ok


@pytest.mark.skipif(version("diffusers") != DIFFUSERS.version, reason="the table is of another version of diffusers")
@pytest.mark.parametrize("family", ["flux1", "flux2"])
@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_the_table_says_of_diffusers_what_diffusers_does(layout: str, family: str, tmp_path: Path) -> None:
    format, rename = LAYOUT_CASES[layout]
    source = saved(tmp_path, random_lora(layout=family, width=REAL if family == "flux1" else 32), format)
    path = renamed(source, tmp_path / "a.safetensors", rename)
    contents = read_contents(path)
    told = next(one.answer for one in verdicts(contents, contents.family) if one.tool == DIFFUSERS)
    # Some blocks of what it loads as a whole only: it loads nothing.
    assert diffusers_answer(verify_file(path)) == ("nothing" if told == "partial" else told)


def test_control_loras_are_compared_in_their_factors(tmp_path: Path) -> None:
    """All blocks, since diffusers takes all or nothing. 0.42.1 swaps halves of A, too, in the final adaLN."""
    state = random_lora(block_paths("flux1", range(19), range(38)), 2, 2.0, width=REAL)
    shapes = {
        "x_embedder": (REAL, 128), "context_embedder": (REAL, 4096), "proj_out": (64, REAL),
        "norm_out.linear": (2 * REAL, REAL), "time_text_embed.text_embedder.linear_1": (REAL, 768),
        **{f"time_text_embed.{name}_embedder.linear_1": (REAL, 256) for name in ("timestep", "guidance")},
        **{f"time_text_embed.{name}_embedder.linear_2": (REAL, REAL) for name in ("timestep", "text", "guidance")},
    }  # fmt: skip
    rng = torch.Generator().manual_seed(1)
    outside = {
        path: LoraLayer(torch.randn(2, into, generator=rng), torch.randn(out, 2, generator=rng), 2.0)
        for path, (out, into) in shapes.items()
    }
    norms = {
        f"{stream.diffusers}.{index}.{name}": torch.ones(128)
        for stream, count in zip(FLUX1.streams, (19, 38), strict=True)
        for index in range(count)
        for name in stream.norms.values()
    }
    layers = state.layers | outside
    biases = {f"{path}.bias": torch.zeros(layer.up_OR.shape[0]) for path, layer in layers.items()}
    path = saved(tmp_path, replace(state, layers=layers, extras=norms | biases), "bfl", torch.bfloat16)
    found = verify_file(path)
    assert (found.loader_error, found.missing, found.extra) == (None, (), ())
    assert len(found.modules) == 504
    assert {one.path for one in found.wrong} <= {"norm_out.linear"}


def test_nothing_is_left_attached_or_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger("diffusers").handlers)
    path = saved(tmp_path, random_lora([Q], width=REAL), "comfy")
    capfd.readouterr()
    first, second = verify_file(path), verify_file(path)
    assert logging.getLogger("diffusers").handlers == before
    assert first == replace(second, modules=first.modules)
    assert capfd.readouterr().err == ""


def test_parts_of_a_fused_matrix_that_were_not_trained_are_no_modules(tmp_path: Path) -> None:
    assert [one.path for one in verify_file(saved(tmp_path, random_lora([Q], width=REAL))).modules] == [Q]
