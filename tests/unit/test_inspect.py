"""What is told of a LoRA file: facts of sound ones, sentences about odd ones, and no exception for unreadable ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _loras import block_paths, edited, random_lora, renamed, with_header
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ft.adapters.formats import delta_weight, write_adapter
from flux_ft.adapters.inspect import Inspection, inspect_file
from flux_ft.errors import AdapterError
from flux_ft.types import AdapterState, LoraLayer

HEADER = {
    "modelspec.title": "Cat", "modelspec.architecture": "flux-1-dev/lora", "modelspec.license": "Apache-2.0",
    "modelspec.trigger_phrase": "sks cat", "ss_sd_model_name": "flux1-dev", "ss_base_model_version": "flux1",
    "ss_tag_frequency": json.dumps({"1_sks cat": {"sks cat": 1}}),
    "modelspec.implementation": "https://github.com/black-forest-labs/flux",
    "flux_ft.export": json.dumps({"config": {"trigger_word": "sks cat"}}),
}  # fmt: skip
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PROJ = "lora_unet_double_blocks_0_img_attn_proj"


def saved(
    folder: Path, state: AdapterState | None = None, format: str = "kohya", dtype: torch.dtype = torch.bfloat16
) -> Path:
    write_adapter(folder / "cat.safetensors", state or random_lora(), format, dtype, HEADER)
    return folder / "cat.safetensors"


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], **kwargs: str) -> Inspection:
    path = edited(saved(folder, **kwargs), folder / "odd.safetensors", change)  # type: ignore[arg-type]
    return inspect_file(path)


# --- Sound files. ---


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("layout", ["flux1", "flux2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sound_file_is_described_without_suspicion(
    layout: str, format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = inspect_file(saved(tmp_path, random_lora(layout=layout), format, dtype))
    assert found.suspicious == ()
    assert (found.family, found.flavour, found.reader_error) == (layout, format, None)
    assert list(found.dtypes) == [{torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]]
    assert found.alpha_rule == ("rank" if format == "kohya" else "none")
    assert (found.title, found.licence, found.trigger_words) == ("Cat", "Apache-2.0", ("sks cat",))
    assert found.base_model == "flux1-dev, flux1"
    assert (found.hashes.sshs_model_hash, found.hashes.modelspec) == (True, True)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["readable"] is True
    assert "suspicious" not in found.for_people()


def test_hashes_are_of_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    blob = path.read_bytes()
    found = inspect_file(path).hashes
    assert found.file_sha256 == hashlib.sha256(blob).hexdigest()
    assert found.data_sha256 == hashlib.sha256(blob[8 + int.from_bytes(blob[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_norms_are_those_of_formed_deltas(format: str, tmp_path: Path) -> None:
    state = random_lora(block_paths("flux1", [0, 2], [1]), lambda path: 1 + len(path) % 5)
    found = inspect_file(saved(tmp_path, state, format, torch.float32))
    sizes = {path: float(delta_weight(layer).norm()) for path, layer in state.layers.items()}
    for (stream, index), size in found.block_norms.items():
        blocks = "transformer_blocks" if stream == "double" else "single_transformer_blocks"
        inside = [one for path, one in sizes.items() if path.startswith(f"{blocks}.{index}.")]
        assert size == pytest.approx(sum(one**2 for one in inside) ** 0.5, rel=1e-5)
    assert list(found.block_norms) == [("double", 0), ("double", 2), ("single", 1)]
    assert found.norm == pytest.approx(sum(one**2 for one in sizes.values()) ** 0.5, rel=1e-5)


def test_the_chart_has_a_bar_for_every_block_in_proportion(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(1, 16), torch.ones(16, 1), 1.0)
    state = AdapterState(
        {f"transformer_blocks.{i}.attn.to_out.0": replace(layer, alpha=[4.0, 2.0, 1.0][i]) for i in range(3)}
    )
    lines = [line for line in inspect_file(saved(tmp_path, state)).for_people().splitlines() if "  double " in line]
    assert [line.count("█") for line in lines] == [24, 12, 6]
    assert [line.split()[-1] for line in lines] == ["64", "32", "16"]


def test_targets_tell_what_is_missing(tmp_path: Path) -> None:
    paths = [f"transformer_blocks.{i}.attn.to_out.0" for i in (0, 1, 3)] + ["transformer_blocks.4.ff.net.2"]
    kinds = {one.kind: one for one in inspect_file(saved(tmp_path, random_lora(paths))).targets}
    assert kinds["double_blocks.*.img_attn.proj"].blocks == (0, 1, 3)
    assert kinds["double_blocks.*.img_attn.proj"].missing == (2, 4)
    assert kinds["double_blocks.*.img_mlp.2"].missing == (0, 1, 2, 3)
    found = inspect_file(saved(tmp_path, random_lora(paths), "diffusers"))
    assert "transformer_blocks.*.attn.to_q" in found.absent
    assert "transformer_blocks.*.attn.to_out.0" not in found.absent
    assert "blocks 0–1, 3; not in 2, 4" in found.for_people()


def test_missing_blocks_are_counted_to_the_model_s_end_where_its_size_is_known(tmp_path: Path) -> None:
    path = saved(tmp_path, random_lora(["transformer_blocks.1.attn.to_out.0"], 1, width=3072))
    found = inspect_file(path)
    assert found.targets[0].missing == (0, *range(2, 19))


def test_ranks_are_counted(tmp_path: Path) -> None:
    state = random_lora(
        ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"], lambda path: 2 + ("1" in path)
    )
    assert inspect_file(saved(tmp_path, state)).ranks == {2: 1, 3: 1}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "a", "trained_words": "b"}, ("a", "b")),
        ({"ss_tag_frequency": json.dumps({"1_x": {"b": 2, "a": 12, "c": 9, "d": 1}, "y": {"n": 99}})}, ("a", "c", "b")),
        ({"flux_ft.export": json.dumps({"config": {"trigger_word": "zwx"}})}, ("zwx",)),
        ({"ss_tag_frequency": "{", "flux_ft.export": "[3]"}, ()),
        ({"ss_tag_frequency": '{"x": 3}'}, ()),
    ],
)  # fmt: skip
def test_trigger_words_are_found_where_managers_look(
    metadata: dict[str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    save_file(load_file(saved(tmp_path)), tmp_path / "b.safetensors", metadata)
    assert inspect_file(tmp_path / "b.safetensors").trigger_words == words


# --- Odd files: each has its sentence. ---


def told(found: Inspection, *fragments: str) -> bool:
    return any(all(fragment in sentence for fragment in fragments) for sentence in found.suspicious)


def scale_alphas(factor: Callable[[str], float]) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(".alpha"):
                tensors[key] = tensors[key] * factor(key)

    return change


def test_a_lora_without_effect(tmp_path: Path) -> None:
    def silence(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith("lora_up.weight"):
                tensors[key].zero_()

    assert told(changed(tmp_path, silence), "ΔW is zero in all modules")


def test_modules_without_effect_are_named(tmp_path: Path) -> None:
    found = changed(tmp_path, lambda tensors: tensors[f"{PROJ}.lora_up.weight"].zero_())
    assert told(found, "ΔW is zero in 1 of 13 modules", PROJ)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(value: float, tmp_path: Path) -> None:
    found = changed(tmp_path, lambda tensors: tensors[f"{PROJ}.lora_up.weight"].fill_(value))
    assert told(found, "1 of 13 modules hold NaN or infinity", PROJ)
    assert found.reader_error is not None
    assert "NaN or infinity" in found.reader_error
    json.dumps(found.as_json(), allow_nan=False)
    assert "cannot be read as a LoRA" in found.for_people()


def test_alpha_rules(tmp_path: Path) -> None:
    constant = changed(tmp_path, scale_alphas(lambda key: 0.5))
    assert (constant.alpha_rule, constant.suspicious) == ("constant", ())
    assert "0.5 everywhere" in constant.alpha_text
    mixed = changed(tmp_path, scale_alphas(lambda key: 0.5 if "single" in key else 2.0))
    assert mixed.alpha_rule == "mixed"
    assert told(mixed, "scales of the modules differ", "0.5 to 2")
    some = changed(tmp_path, lambda tensors: tensors.pop(f"{PROJ}.alpha"))
    assert "alpha in 12 of 13 modules" in some.alpha_text
    one_alpha = changed(
        tmp_path, lambda tensors: tensors.update({key: torch.tensor(8.0) for key in tensors if key.endswith("alpha")})
    )
    assert told(one_alpha, "alpha is 8 at every rank")


def test_a_negative_alpha(tmp_path: Path) -> None:
    found = changed(tmp_path, scale_alphas(lambda key: -1.0 if PROJ in key else 1.0))
    assert told(found, "alpha is negative in 1 modules", PROJ)
    assert all(one.norm is not None and one.norm > 0 for one in found.modules)


HALF = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
SAME = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})}


def test_a_strength_in_the_header(tmp_path: Path) -> None:
    def with_(format: str, metadata: Mapping[str, str]) -> Inspection:
        return inspect_file(with_header(saved(tmp_path, format=format), tmp_path / "odd.safetensors", metadata))

    assert told(with_("kohya", HALF), "kohya", "scaled twice", "alpha 2 at rank 4")
    assert told(with_("kohya", SAME), "lora_adapter_metadata")
    assert not told(with_("kohya", SAME), "scaled twice")
    assert told(with_("diffusers", HALF), "alone", "only diffusers looks there")
    assert with_("diffusers", SAME).suspicious == ()
    assert [one.answer for one in with_("diffusers", HALF).tools if one.tool.name == "ComfyUI"] == ["wrong"]


def test_alpha_in_tensors_and_header(tmp_path: Path) -> None:
    path = saved(tmp_path, format="diffusers")
    key = "transformer.transformer_blocks.0.attn.to_q.alpha"
    edited(path, tmp_path / "odd.safetensors", lambda tensors: tensors.update({key: torch.tensor(4.0)}), SAME)
    assert told(inspect_file(tmp_path / "odd.safetensors"), "in the tensors and in the header", "diffusers refuses")


def test_whole_number_alphas(tmp_path: Path) -> None:
    key = "transformer.transformer_blocks.0.attn.to_q.alpha"
    found = changed(tmp_path, lambda tensors: tensors.update({key: torch.tensor(4)}), format="diffusers")
    assert told(found, "whole number (I64)", "diffusers refuse")


@pytest.mark.parametrize(("dtype", "alpha", "odd"), [
    (torch.bfloat16, 261.0, True), (torch.bfloat16, 256.0, False), (torch.float16, 2050.0, True),
    (torch.float16, 300.0, False), (torch.float32, 5000.0, False),
])  # fmt: skip
def test_alphas_too_large_for_their_type(dtype: torch.dtype, alpha: float, odd: bool, tmp_path: Path) -> None:
    def store(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: torch.tensor(alpha, dtype=dtype) for key in tensors if key.endswith(".alpha")})

    assert told(changed(tmp_path, store), "alpha is stored as") == odd


def test_subnormals(tmp_path: Path) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PROJ}.lora_up.weight"] = (tensors[f"{PROJ}.lora_up.weight"] * 1e-4).half()

    assert told(changed(tmp_path, shrink), "1 modules have factors with fp16 subnormals")


def test_a_single_module_that_is_far_too_strong(tmp_path: Path) -> None:
    strong = changed(tmp_path, lambda tensors: tensors[f"{PROJ}.lora_up.weight"].mul_(1000))
    assert told(strong, PROJ, "times the median")
    assert not told(changed(tmp_path, lambda tensors: tensors[f"{PROJ}.lora_up.weight"].mul_(20)), "times the median")


def test_factors_that_do_not_belong_together(tmp_path: Path) -> None:
    lonely = changed(tmp_path, lambda tensors: tensors.pop(f"{PROJ}.lora_up.weight"))
    assert told(lonely, "1 modules have one factor without the other", PROJ)
    misfit = changed(tmp_path, lambda tensors: tensors.update({f"{PROJ}.lora_up.weight": torch.ones(16, 7)}))
    assert told(misfit, "factors that do not fit together", PROJ)
    for found in (lonely, misfit):
        assert found.reader_error is not None


def test_parts_that_tools_drop(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("lora_unet_img_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
            tensors[f"{name}.lora_down.weight"] = torch.ones(2, 16)
            tensors[f"{name}.lora_up.weight"] = torch.ones(16, 2)
        tensors["lora_unet_double_blocks_0_img_attn_qkv.diff_b"] = torch.ones(48)

    found = changed(tmp_path, add)
    assert told(found, "1 modules are outside the blocks", "img_in")
    assert told(found, "1 modules are of text encoders")
    assert told(found, "1 modules have biases")
    assert "InvokeAI" in found.for_people()


def test_a_hash_that_is_not_of_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = inspect_file(with_header(path, tmp_path / "b.safetensors", {"sshs_model_hash": "0" * 64}))
    assert (found.hashes.sshs_model_hash, found.hashes.modelspec) == (False, True)
    assert told(found, "hash in the header is not that of the weights")
    assert "sshs_model_hash WRONG" in found.for_people()
    assert inspect_file(with_header(path, tmp_path / "b.safetensors", {"ss_note": "x"})).suspicious == ()


HOME = "/" + "home/ann/pictures"


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("ss_sd_model_name", f"{HOME}/flux1.safetensors", HOME),
        ("training_info", json.dumps({"folder": "C:" + "\\Users\\ann\\cats"}), "a path"),
        ("config", "data: ~/cats", "~/cats"),
        ("config", json.dumps({"output": "/workspace/out/run 3"}), "/workspace/out"),
        ("author", "ann@example.com", "a mail address"),
        ("config", "token: hf_" + "a1B2" * 8, "an access token"),
        ("sample_prompts", '["a cat"]', "wording"),
        ("ss_tag_frequency", json.dumps({"x": {f"tag {i}": 1 for i in range(9)}}), "9 words of the training captions"),
    ],
)
def test_private_things_in_the_header(key: str, value: str, fragment: str, tmp_path: Path) -> None:
    found = inspect_file(with_header(saved(tmp_path), tmp_path / "b.safetensors", {key: value}))
    assert told(found, f"`{key}`", fragment)
    assert not told(found, "a1B2")


@pytest.mark.parametrize(
    "value",
    [
        "https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        "and/or",
        "1/2",
        "16:9",
        "a: b",
    ],
)
def test_what_is_not_private(value: str, tmp_path: Path) -> None:
    metadata = {"modelspec.description": value, "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQSk/ZJRg"}
    assert inspect_file(with_header(saved(tmp_path), tmp_path / "b.safetensors", metadata)).suspicious == ()


# --- Files that cannot be read as a LoRA. ---


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"lora_unet_double_blocks_0_img_mlp_0.lokr_w1": 2, "lora_unet_double_blocks_0_img_mlp_0.lokr_w2": 2}, "LoKr"),
        (
            {"lora_unet_double_blocks_0_img_mlp_0.hada_w1_a": 2, "lora_unet_double_blocks_0_img_mlp_0.hada_w1_b": 2},
            "LoHa",
        ),
        (
            {
                f"transformer.transformer_blocks.0.attn.to_q.{end}": 2
                for end in ("lora_A.weight", "lora_B.weight", "dora_scale")
            },
            "DoRA",
        ),
    ],
)
def test_other_adapters_are_named(keys: Mapping[str, int], what: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(size, size) for key, size in keys.items()}, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert found.reader_error is not None
    assert {one.what for one in found.modules} == {what}
    assert told(found, f"1 modules are {what}")
    json.dumps(found.as_json(), allow_nan=False)
    found.for_people()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"model.weight": torch.ones(2, 2)},
        {"x": torch.ones(2, dtype=torch.int64)},
        {"lora_unet_img_in.alpha": torch.ones(3)},
        {"lora_unet_img_in.lora_down.weight": torch.tensor(1.0), "lora_unet_img_in.lora_up.weight": torch.ones(2)},
        {"lora_unet_img_in.lora_down.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)},
        {"lora_unet_img_in.lora_down.weight": torch.ones(2, 2, dtype=torch.bool)},
        {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(4)},
    ],
)
def test_any_safetensors_file_is_looked_at(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert found.reader_error is not None
    assert told(found, "no pair of LoRA factors")
    json.dumps(found.as_json(), allow_nan=False)
    found.for_people()


def test_zero_and_huge_values_do_not_break_the_numbers(tmp_path: Path) -> None:
    found = changed(tmp_path, lambda tensors: tensors.update({f"{PROJ}.alpha": torch.tensor(float("inf"))}))
    json.dumps(found.as_json(), allow_nan=False)
    found.for_people()
    huge = changed(tmp_path, lambda tensors: tensors.update({f"{PROJ}.alpha": torch.tensor(1e38)}))
    json.dumps(huge.as_json(), allow_nan=False)
    huge.for_people()


def test_tensors_under_two_spellings(tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    keys = (f"{name}.lora_A.weight", f"{name}.lora_A.default.weight", f"{name}.lora_B.weight")
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    assert told(inspect_file(tmp_path / "a.safetensors"), "second time")


def test_xlabs_is_recognised(tmp_path: Path) -> None:
    source = saved(tmp_path, random_lora(["transformer_blocks.0.attn.to_out.0"]))
    ends = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}
    renamed(
        source,
        tmp_path / "x.safetensors",
        lambda key: (
            f"double_blocks.0.processor.proj_lora1.{ends[end]}" if (end := key.split(".", 1)[1]) in ends else None
        ),
    )
    found = inspect_file(tmp_path / "x.safetensors")
    assert (found.flavour, found.family, found.reader_error) == ("xlabs", "flux1", None)


def test_a_file_that_is_no_safetensors_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        inspect_file(tmp_path / "a.safetensors")
