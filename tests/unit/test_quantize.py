"""Weights in fewer bytes, or in host memory: how far off, how much smaller, and LoRAs on top."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _compiler import needs_compiler
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_ft.adapters import lora
from flux_ft.adapters.attached import attach_states
from flux_ft.errors import ConfigError
from flux_ft.families import quantize
from flux_ft.families.base import Family
from flux_ft.families.flux1 import Flux1
from flux_ft.families.quantize import StoredLinear, compile_blocks, hold, is_streamed, restream, store, tile_vae
from flux_ft.families.registry import open_family
from flux_ft.types import AdapterState, LoraLayer, TextCond

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
OFF = {"bf16": 0.01, "int8": 0.004, "fp8": 0.015, "nf4": 0.05}
"""The most that flux-tiny's velocity may be off, relative; measured: 0.0058, 0.0026, 0.0093, 0.0343."""
LORA_OFF = {"int8": 0.02, "fp8": 0.06, "nf4": 0.2}
"""The same of what a LoRA changes, which is 3 % of the velocity; measured: 0.011, 0.038, 0.129."""
BYTES = {"bf16": 2.0, "int8": 1.01, "fp8": 1.01, "nf4": 0.51}


def load(family: Family, **how: Any) -> Any:
    assert isinstance(family, Flux1)
    return family.load_denoiser(CPU, FP32, **how)


def velocity(family: Family, denoiser: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(denoiser, "compute_dtype", FP32)
    z = torch.randn(2, *family.latent_shape(64, 64), generator=rng).to(dtype)
    text = TextCond(
        torch.randn(2, 32, 64, generator=rng).mul(0.3).to(dtype), torch.randn(2, 64, generator=rng).mul(0.3).to(dtype)
    )
    with torch.no_grad():
        return family.predict_velocity(denoiser, z, torch.tensor([0.9, 0.4]), text, 2.0).float()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def some_lora(family: Family) -> AdapterState:
    """On every linear inside the blocks."""
    denoiser, rng = load(family), torch.Generator().manual_seed(1)
    layers = {}
    for path in family.lora_targets(denoiser):
        linear = denoiser.get_submodule(path)
        sizes = ((4, linear.in_features), (linear.out_features, 4))
        layers[path] = LoraLayer(*(torch.randn(size, generator=rng) * 0.05 for size in sizes), 4.0)
    return AdapterState(layers)


@pytest.fixture(scope="module")
def plain(tiny_family: Family) -> Tensor:
    return velocity(tiny_family, load(tiny_family))


class TestStoredLinear:
    @pytest.mark.parametrize(("storage", "most"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
    def test_each_weight_is_within_half_a_step(self, storage: str, most: float) -> None:
        weight_OI = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 16)[:, None]
        grid_OI, scale_O = store(weight_OI, storage)
        error_OI = (grid_OI.float() * scale_O[:, None] - weight_OI).abs()
        assert grid_OI.element_size() == 1
        # The scale is rounded to bf16.
        assert (error_OI / weight_OI.abs().amax(dim=1, keepdim=True)).max() <= most * (1 + 2**-8)
        assert scale_O.dtype == BF16

    @pytest.mark.parametrize("storage", ["int8", "fp8"])
    def test_rows_of_zeros_stay_zero_and_the_input_is_left_alone(self, storage: str) -> None:
        weight_OI = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
        before = weight_OI.clone()
        grid_OI, scale_O = store(weight_OI, storage)
        assert torch.equal(grid_OI.float()[0], torch.zeros(2))
        assert torch.equal(weight_OI, before)
        assert torch.isfinite(scale_O).all()

    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_computes_the_linear_of_its_weights_in_the_inputs_dtype(self, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        weight_OI, bias_O, x_BI = (torch.randn(size, generator=rng) for size in ((8, 16), (8,), (3, 16)))
        grid_OI, scale_O = store(weight_OI, "int8")
        found = StoredLinear(grid_OI, scale_O, bias_O.to(dtype))(x_BI.to(dtype))
        wanted = x_BI.to(dtype).float() @ (grid_OI.float() * scale_O[:, None]).T + bias_O.to(dtype).float()
        assert found.dtype == dtype
        assert off(found.float(), wanted) < (1e-6 if dtype == FP32 else 5e-3)


class TestHeld:
    @pytest.mark.parametrize("storage", OFF)
    def test_predicts_nearly_the_same_in_fewer_bytes(self, tiny_family: Family, plain: Tensor, storage: Any) -> None:
        full, denoiser = load(tiny_family), load(tiny_family, storage=storage)
        assert 0 < off(velocity(tiny_family, denoiser), plain) < OFF[storage]
        count, held = (
            sum(
                size(one) for block in tiny_family.blocks(model).values() for one in block.parameters() if one.ndim == 2
            )
            for model, size in ((full, Tensor.numel), (denoiser, lambda one: one.nbytes))
        )
        assert held / count <= BYTES[storage]
        assert denoiser.compute_device == CPU
        assert denoiser.compute_dtype == (BF16 if storage == "bf16" else FP32)
        assert not any(one.requires_grad for one in denoiser.parameters())

    @pytest.mark.parametrize("storage", ["int8", "fp8", "nf4"])
    def test_all_outside_the_blocks_stays_as_it_was(self, tiny_family: Family, storage: Any) -> None:
        full, denoiser = load(tiny_family), load(tiny_family, storage=storage)
        outside = {name: one for name, one in full.named_parameters() if "transformer_blocks" not in name}
        assert {"x_embedder.weight", "proj_out.weight", "context_embedder.weight"} <= outside.keys()
        for name, one in outside.items():
            assert torch.equal(denoiser.get_parameter(name), one)

    def test_fp32_is_the_plain_model(self, tiny_family: Family, plain: Tensor) -> None:
        assert torch.equal(velocity(tiny_family, load(tiny_family, storage="fp32")), plain)
        assert torch.equal(velocity(tiny_family, load(tiny_family)), plain)

    def test_folders_and_single_files_are_held_alike(self, tmp_path: Path, tiny_family: Family) -> None:
        file = tmp_path / "one.safetensors"
        save_file(load(tiny_family).state_dict(), file)
        shutil.copytree(tiny_family.source, tmp_path / "folder")
        found = [
            velocity(family, load(family, storage="int8"))
            for family in (open_family(str(file), "flux-tiny"), open_family(str(tmp_path / "folder")))
        ]
        assert torch.equal(*found)

    def test_what_cannot_be_held_is_refused(self, tiny_family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="cannot be streamed"):
            load(tiny_family, storage="nf4", stream=True)
        monkeypatch.setattr(quantize, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
            load(tiny_family, storage="nf4")
        assert quantize.why_not("fp8", "mps") is not None
        assert quantize.why_not("int8", "mps") is None


class TestLoras:
    @pytest.mark.parametrize("storage", LORA_OFF)
    def test_act_on_held_weights_as_on_plain_ones(self, tiny_family: Family, plain: Tensor, storage: Any) -> None:
        state, full, denoiser = some_lora(tiny_family), load(tiny_family), load(tiny_family, storage=storage)
        before = velocity(tiny_family, denoiser)
        attach_states(full, [("one", state, 1.0)])
        attachments = attach_states(denoiser, [("one", state, 1.0)])
        change = velocity(tiny_family, full) - plain
        assert off(velocity(tiny_family, denoiser) - before, change) < LORA_OFF[storage]
        with lora.detached(denoiser):
            assert torch.equal(velocity(tiny_family, denoiser), before)
        attachments.activate({})
        assert torch.equal(velocity(tiny_family, denoiser), before)


class TestStreamed:
    @pytest.mark.parametrize("storage", [None, "bf16", "int8", "fp8"])
    def test_computes_what_resident_weights_do(self, tiny_family: Family, storage: Any) -> None:
        state = some_lora(tiny_family)
        resident, streamed = (load(tiny_family, storage=storage, stream=stream) for stream in (False, True))
        assert (is_streamed(resident), is_streamed(streamed)) == (False, True)
        assert torch.equal(velocity(tiny_family, streamed), velocity(tiny_family, resident))
        on_both = [attach_states(model, [("one", state, 1.0)]) for model in (resident, streamed)]
        for strength in (1.0, 0.3, 0.0):
            for attachments in on_both:
                attachments.activate({"one": strength})
            restream(resident)
            restream(streamed)
            for _ in range(2):  # the order of the first pass is what later ones fetch by
                assert torch.equal(velocity(tiny_family, streamed), velocity(tiny_family, resident))
        assert is_streamed(streamed)

    def test_an_input_layer_that_was_widened_travels_too(self, tiny_family: Family) -> None:
        denoiser = load(tiny_family, stream=True)
        narrow = denoiser.x_embedder
        denoiser.x_embedder = nn.Linear(2 * narrow.in_features, narrow.out_features)
        restream(denoiser)
        groups = denoiser._diffusers_hook.get_hook("group_offloading").group.modules
        assert any(one is denoiser.x_embedder for one in groups)
        assert all(one is not narrow for one in groups)


def graphs() -> int:
    """That were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@needs_compiler
class TestCompiled:
    @pytest.mark.parametrize("how", [{}, {"storage": "int8"}, {"stream": True}], ids=str)
    def test_equals_eager(self, tiny_family: Family, how: dict[str, Any]) -> None:
        torch.compiler.reset()
        denoiser = load(tiny_family, **how)
        eager = velocity(tiny_family, denoiser)
        before = graphs()
        compile_blocks(denoiser)
        assert off(velocity(tiny_family, denoiser), eager) < 1e-5
        assert graphs() > before

    def test_strengths_do_not_compile_anew(self, tiny_family: Family) -> None:
        torch.compiler.reset()
        denoiser, same = load(tiny_family), load(tiny_family)
        attachments, eager = (attach_states(one, [("one", some_lora(tiny_family), 1.0)]) for one in (denoiser, same))
        compile_blocks(denoiser)
        counts = []
        for strength in (1.0, 0.5, 0.7, 1.3):
            attachments.activate({"one": strength})
            eager.activate({"one": strength})
            assert off(velocity(tiny_family, denoiser), velocity(tiny_family, same)) < 1e-5
            counts.append(graphs())
        assert counts[1] == counts[2] == counts[3]


def test_tiles_are_decoded_to_nearly_the_whole(tiny_family: Family) -> None:
    whole, tiled = (tiny_family.load_vae(CPU, FP32) for _ in range(2))
    tile_vae(tiled, 32)
    latents = torch.randn(1, *tiny_family.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    pixels = [tiny_family.decode_latents(vae, latents) for vae in (whole, tiled)]
    assert pixels[0].shape == pixels[1].shape
    assert not torch.equal(*pixels)
    assert float((pixels[0] - pixels[1]).abs().mean()) < 0.2
    small = latents[..., :4, :4]
    assert torch.equal(*(tiny_family.decode_latents(vae, small) for vae in (whole, tiled)))


def test_hold_takes_blocks_and_nothing_else() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "out": nn.Linear(4, 2)})
    hold(model, [model["block"]], "int8", CPU, BF16)
    assert [type(one) for one in model["block"]] == [StoredLinear, nn.LayerNorm]
    assert type(model["out"]) is nn.Linear
    assert {name: one.dtype for name, one in model.named_parameters()} == {
        "block.0.weight": torch.int8, "block.0.bias": BF16, "block.1.weight": BF16, "block.1.bias": BF16,
        "out.weight": BF16, "out.bias": BF16,
    }  # fmt: skip
