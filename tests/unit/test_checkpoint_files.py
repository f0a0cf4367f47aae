"""Checkpoints matrix by matrix: every layout gives the same weights, and what is not whole is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _checkpoints import is_matrix, model, planted, save_diffusers, save_original, shapes, to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ft.adapters.checkpoint_files import (
    Checkpoint,
    from_tensors,
    is_block_linear,
    open_checkpoint,
    place_of,
    require_pair,
)
from flux_ft.errors import FluxFTError, ModelError
from flux_ft.families.registry import tiny_folder


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: weight.read().float() for name, weight in checkpoint.weights.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key].float(), b[key].float()) for key in a)


Save = Callable[[Path, dict[str, Tensor]], Path]
LAYOUTS: dict[str, Save] = {
    "original": lambda folder, weights: save_original(folder / "m.safetensors", weights),
    "prefixed": lambda folder, weights: save_original(folder / "m.safetensors", weights, "model.diffusion_model."),
    "all in one": lambda folder, weights: save_original(
        folder / "m.safetensors", weights, "model.diffusion_model.", **{"vae.x": torch.zeros(3, dtype=torch.int64)}
    ),
    "folder": lambda folder, weights: save_diffusers(folder / "m", weights),
    "model root": lambda folder, weights: save_diffusers(folder / "m" / "transformer", weights).parent,
    "shards": lambda folder, weights: save_diffusers(folder / "m" / "transformer", weights, 5).parent,
    "diffusers file": lambda folder, weights: (
        save_diffusers(folder / "m", weights) / "diffusion_pytorch_model.safetensors"
    ),
}


class TestLayouts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_all_layouts_give_the_same_weights(self, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
        weights = model(dtype=dtype)
        found = open_checkpoint(LAYOUTS[name](tmp_path, weights))
        assert equal(values(found), weights)
        assert {key: weight.shape for key, weight in found.weights.items()} == shapes()
        assert {weight.dtype for weight in found.weights.values()} == {dtype}

    def test_blocks_come_in_the_order_of_the_model(self, tmp_path: Path) -> None:
        found = from_tensors(model(double=12, single=11), "m")
        indexes = [int(name.split(".")[1]) for name in found.matrices if name.startswith("double_")]
        assert indexes == sorted(indexes)
        assert len(found.matrices) == 12 * 10 + 11 * 3
        assert next(iter(found.weights)).startswith("double_blocks.0.")

    def test_flux_tiny_is_read_as_diffusers_reads_it(self) -> None:
        found = open_checkpoint(tiny_folder())
        file = load_file(tiny_folder() / "transformer" / "diffusion_pytorch_model.safetensors")
        assert equal(to_diffusers({name: one.read().grid for name, one in found.weights.items()}), file)
        assert (found.width, found.guided, len(found.matrices)) == (128, True, 2 * 10 + 4 * 3)
        assert found.config is not None

    def test_weights_in_memory(self) -> None:
        weights = model(dtype=torch.bfloat16)
        assert equal(values(from_tensors(to_diffusers(weights), "memory")), weights)
        assert equal(values(from_tensors(weights, "memory")), weights)

    def test_reading_hands_out_its_own_memory(self, tmp_path: Path) -> None:
        weights = model()
        for found in (from_tensors(weights, "m"), open_checkpoint(save_original(tmp_path / "m.safetensors", weights))):
            found.weights["img_in.weight"].read().float().zero_()
            assert found.weights["img_in.weight"].read().float().any()

    def test_parts_of_several_types(self) -> None:
        weights = to_diffusers(model())
        key = "transformer_blocks.0.attn.to_k.weight"
        weights[key] = weights[key].bfloat16()
        weight = from_tensors(weights, "m").weights["double_blocks.0.img_attn.qkv.weight"]
        assert weight.read().dtype == weight.dtype == torch.bfloat16
        assert torch.equal(weight.read().float()[16:32], weights[key].float())

    def test_without_guidance(self) -> None:
        weights = {key: tensor for key, tensor in model().items() if not key.startswith("guidance_in")}
        assert not from_tensors(weights, "schnell").guided

    @pytest.mark.parametrize(
        ("key", "name", "position", "parts"),
        [
            ("transformer_blocks.3.attn.to_k.weight", "double_blocks.3.img_attn.qkv.weight", 1, 3),
            ("single_transformer_blocks.10.proj_mlp.bias", "single_blocks.10.linear1.bias", 3, 4),
            ("single_transformer_blocks.0.proj_out.weight", "single_blocks.0.linear2.weight", 0, 1),
            ("proj_out.weight", "final_layer.linear.weight", 0, 1),
            ("transformer_blocks.0.attn.norm_added_q.weight", "double_blocks.0.txt_attn.norm.query_norm.scale", 0, 1),
        ],
    )
    def test_places(self, key: str, name: str, position: int, parts: int) -> None:
        assert place_of(key) == (name, position, parts)

    @pytest.mark.parametrize("key", ["transformer_blocks.03.attn.to_k.weight", "proj_out", "x", "norm_out.norm.weight"])
    def test_no_place(self, key: str) -> None:
        assert place_of(key) is None

    def test_block_linears(self) -> None:
        assert {name for name in shapes() if is_block_linear(name)} == {name for name in shapes() if is_matrix(name)}


class TestFp8:
    @pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    def test_scaled(self, tmp_path: Path, suffix: str, per_row: bool, dtype: torch.dtype) -> None:
        weights, extra = model(), {"scaled_fp8": torch.empty(2, dtype=dtype)}
        for key in [key for key in weights if is_matrix(key)]:
            scale = weights[key].abs().amax(1, keepdim=True) / 400 if per_row else weights[key].abs().max() / 400
            module = key.removesuffix(".weight")
            extra |= {module + suffix: scale, f"{module}.scale_input": torch.ones(())}
            weights[key] = (weights[key] / scale).to(dtype)
        path = save_original(tmp_path / "m.safetensors", weights, **extra)
        found = open_checkpoint(path)
        for key, weight in found.weights.items():
            scale = extra.get(key.removesuffix(".weight") + suffix, torch.ones(()))
            assert torch.equal(weight.read().float(), weights[key].float() * scale)
        assert "dequantised" in found.notes[0]
        assert f"{sum(map(is_matrix, weights))} tensors" in found.notes[0]

    def test_scales_of_the_parts_of_a_fused_matrix(self, tmp_path: Path) -> None:
        weights, expected = to_diffusers(model()), model()
        for part, scale in (("to_q", 0.5), ("to_k", 2.0), ("to_v", 1.0)):
            key = f"transformer_blocks.0.attn.{part}"
            weights[f"{key}.weight"] = (weights[f"{key}.weight"]).to(torch.float8_e4m3fn)
            weights[f"{key}.weight_scale"] = torch.tensor(scale)
            rows = slice(16 * ("to_q", "to_k", "to_v").index(part), None)
            expected["double_blocks.0.img_attn.qkv.weight"][rows][:16] = weights[f"{key}.weight"].float() * scale
        path = tmp_path / "m.safetensors"
        save_file(weights, path)
        assert equal(values(open_checkpoint(path)), expected)

    def test_unscaled(self, tmp_path: Path) -> None:
        weights = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in model().items()}
        found = open_checkpoint(save_original(tmp_path / "m.safetensors", weights))
        assert equal(values(found), weights)
        assert "without scales" in found.notes[0]

    @pytest.mark.parametrize(("shape", "dtype"), [((5,), torch.float8_e4m3fn), ((), torch.float32), ((), None)])
    def test_a_scale_that_does_not_fit(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        weights, key = model(), "single_blocks.0.linear2"
        weight = weights.pop(f"{key}.weight")
        weights |= {f"{key}.weight": weight.to(dtype)} if dtype else {}
        with pytest.raises(ModelError, match=r"m: `single_blocks\.0\.linear2\.scale_weight` of .* is no scale for"):
            from_tensors(weights | {f"{key}.scale_weight": torch.ones(shape)}, "m")


class TestBadInput:
    def without(self, key: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in model().items() if name != key}

    @pytest.mark.parametrize("key", list(shapes()))
    def test_a_missing_tensor(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(ModelError, match=f"lacks `{re.escape(key)}`"):
            open_checkpoint(save_original(tmp_path / "m.safetensors", self.without(key)))

    def test_a_missing_part_of_a_fused_matrix(self) -> None:
        weights = to_diffusers(model())
        del weights["single_transformer_blocks.1.proj_mlp.weight"]
        with pytest.raises(ModelError, match=r"not all parts of `single_blocks\.1\.linear1\.weight`"):
            from_tensors(weights, "m")

    def test_a_missing_block(self) -> None:
        weights = {key: tensor for key, tensor in model().items() if not key.startswith("single_blocks.0.")}
        with pytest.raises(ModelError, match=r"lacks `single_blocks\.0\.linear1\.weight`"):
            from_tensors(weights, "m")

    @pytest.mark.parametrize("key", ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_mod.lin.scale"])
    def test_an_extra_tensor(self, key: str) -> None:
        with pytest.raises(ModelError, match=rf"has a tensor that FLUX\.1 does not: `{re.escape(key)}`"):
            from_tensors(model() | {key: torch.zeros(2)}, "m")
        with pytest.raises(ModelError, match=re.escape(key)):
            from_tensors(to_diffusers(model()) | {key: torch.zeros(2)}, "m")

    def test_parts_that_do_not_fit_together(self) -> None:
        weights = to_diffusers(model())
        weights["transformer_blocks.0.attn.to_v.weight"] = torch.zeros(16, 15)
        with pytest.raises(ModelError, match=r"16×16, 16×16, 16×15"):
            from_tensors(weights, "m")

    @pytest.mark.parametrize("shape", [(), (16,), (2, 2, 2), (0, 16)])
    def test_odd_dimensions(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ModelError, match=r"img_in\.weight"):
            from_tensors(model() | {"img_in.weight": torch.zeros(shape)}, "m")

    @pytest.mark.parametrize(
        ("key", "what"),
        [
            ("double_blocks.0.img_attn.qkv.weight.absmax", "bitsandbytes"),
            ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
            ("transformer_blocks.0.attn.to_q.qweight", "nunchaku"),
            ("double_blocks.0.img_attn.qkv.weight_scale_inv", "blockwise fp8"),
        ],
    )
    def test_quantised(self, key: str, what: str) -> None:
        with pytest.raises(ModelError, match=f"quantised weights: `{re.escape(key)}`, as .*{what}"):
            from_tensors(model() | {key: torch.zeros(2)}, "m")

    def test_integer_weights(self) -> None:
        key = "double_blocks.0.img_attn.qkv.weight"
        with pytest.raises(ModelError, match=re.escape(key)):
            from_tensors(model() | {key: torch.zeros(48, 16, dtype=torch.uint8)}, "m")

    def test_a_lora(self) -> None:
        with pytest.raises(ModelError, match="is a LoRA, not a checkpoint"):
            from_tensors({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)}, "m")

    def test_gguf(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ModelError, match="GGUF"):
            open_checkpoint(path)

    @pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + bytes(50), b"\xff" * 100, (2**60).to_bytes(8, "little")])
    def test_not_safetensors(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "модель.safetensors"
        path.write_bytes(data)
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            open_checkpoint(path)

    def test_truncated(self, tmp_path: Path) -> None:
        path = save_original(tmp_path / "m.safetensors", model())
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(ModelError, match=r"m\.safetensors: not a readable"):
            open_checkpoint(path)

    def test_gone_while_reading(self, tmp_path: Path) -> None:
        path = save_original(tmp_path / "m.safetensors", model())
        found = open_checkpoint(path)
        path.unlink()
        with pytest.raises(ModelError, match="cannot be read any more"):
            found.weights["img_in.weight"].read()

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such file or folder"):
            open_checkpoint(tmp_path / "x")
        with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
            open_checkpoint(tmp_path)
        for name in ("a", "b"):
            save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match="holds 2"):
            open_checkpoint(tmp_path)
        with pytest.raises(ModelError, match=r"no FLUX\.1 transformer inside; its first tensor is `x`"):
            open_checkpoint(tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        "index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../m"}}', '{"weight_map": {"a": 3}}']
    )
    def test_a_broken_index(self, tmp_path: Path, index: str) -> None:
        folder = save_diffusers(tmp_path / "m", model(), 2)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match="not a readable index"):
            open_checkpoint(folder)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        folder = save_diffusers(tmp_path / "m", model(), 3)
        (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
        with pytest.raises(ModelError, match=r"00002-of-00003\.safetensors: missing"):
            open_checkpoint(folder)

    def test_a_tensor_that_is_not_in_its_shard(self, tmp_path: Path) -> None:
        folder = save_diffusers(tmp_path / "m", model(), 3)
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        content = json.loads(index.read_text())
        name = "diffusion_pytorch_model-00001-of-00003.safetensors"
        content["weight_map"]["img_in_extra.weight"] = name
        index.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=f"`img_in_extra.weight` is not in {name}"):
            open_checkpoint(folder)


class TestPairs:
    def test_the_same_file_twice(self, tmp_path: Path) -> None:
        path = save_original(tmp_path / "m.safetensors", model())
        link = tmp_path / "link.safetensors"
        link.symlink_to(path)
        with pytest.raises(ModelError, match="base and tuned are the same file"):
            require_pair(open_checkpoint(path), open_checkpoint(link))
        copy = tmp_path / "copy.safetensors"
        shutil.copy(path, copy)
        require_pair(open_checkpoint(path), open_checkpoint(copy))

    def test_the_same_folder_twice(self, tmp_path: Path) -> None:
        folder = save_diffusers(tmp_path / "m" / "transformer", model(), 3)
        with pytest.raises(FluxFTError, match="same file"):
            require_pair(open_checkpoint(folder), open_checkpoint(folder.parent))

    def test_one_without_guidance(self) -> None:
        schnell = {key: tensor for key, tensor in model().items() if not key.startswith("guidance_in")}
        with pytest.raises(ModelError, match=r"schnell lacks `guidance_in.*`, which dev has"):
            require_pair(from_tensors(model(), "dev"), from_tensors(schnell, "schnell"))
        with pytest.raises(ModelError, match=r"schnell lacks `guidance_in.*`, which dev has"):
            require_pair(from_tensors(schnell, "schnell"), from_tensors(model(), "dev"))

    def test_other_shapes(self) -> None:
        other = planted(model(), 1) | {"img_in.weight": torch.zeros(16, 12)}
        with pytest.raises(ModelError, match=r"`img_in\.weight` is 16×4 in dev and 16×12 in fill"):
            require_pair(from_tensors(model(), "dev"), from_tensors(other, "fill"))
