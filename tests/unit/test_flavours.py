"""LoRA files of every tool: read alike, written for every tool, there and back; FLUX.1 and FLUX.2.

The files are made by tests/_lora_files.py, which has the tables of names a second time.
Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers
from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ft.adapters import formats
from flux_ft.adapters.convert import convert_file
from flux_ft.adapters.flavours import READABLE
from flux_ft.adapters.formats import (
    BLOCK_FORMATS,
    FLAVOURS,
    compare_adapters,
    detect_format,
    fuse,
    losses,
    only_blocks,
    read_adapter,
    read_tensors,
    sizes_of,
    support_table,
    to_kohya,
    unfuse,
    verify_written,
    write_adapter,
)
from flux_ft.adapters.support import DROPPED_BY
from flux_ft.errors import AdapterError, ConfigError
from flux_ft.families import layout
from flux_ft.types import AdapterState, LoraLayer
from tests._lora_files import (
    FILES,
    FLUX1,
    FLUX2,
    MODELS,
    NORMS,
    H,
    Model,
    control,
    delta,
    outside_layers,
    part_rows,
    paths,
    random_layers,
    worst,
    xlabs,
)

FP32 = torch.float32


def ranks_of(model: Model, case: str) -> dict[str, int]:
    """The ranks of a case by diffusers path."""
    every = paths(model)
    match case:
        case "mixed":
            return {path: 1 + i % 7 for i, path in enumerate(every)}
        case "some parts":  # no k, no MLP part of single blocks, only one of the two double blocks
            return {
                path: 2 + i % 3
                for i, path in enumerate(every)
                if not path.endswith(("to_k", "add_q_proj", "proj_mlp")) and "transformer_blocks.1." not in path
            }
        case "two digits":
            return {path: 2 for path in paths(model, 13, 13) if ".11." in path or ".2." in path}
        case _:
            return dict.fromkeys(every, int(case))


CASES = ["1", "3", "4", "5", "12", "mixed", "some parts", "two digits"]


# --- Round trips. ---


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("family", MODELS)
def test_every_flavour_is_read_and_written_as_every_other(family: str, kind: str, case: str) -> None:
    model = MODELS[family]
    layers = random_layers(model, ranks_of(model, case))
    flavour, make = FILES[kind]
    tensors, header = make(model, layers)
    assert detect_format(tensors) == flavour
    state = read_tensors(tensors, header)
    assert (state.layout, state.extras) == (family, {})
    assert worst(layers, state.layers) <= 1e-6
    for name in BLOCK_FORMATS:
        back = read_tensors(FLAVOURS[name].write(state, FP32))
        assert back.layout == family
        assert worst(layers, back.layers) <= 1e-6
        again, header = make(model, back.layers)
        assert worst(layers, read_tensors(again, header).layers) <= 1e-6


@pytest.mark.parametrize("family", MODELS)
def test_ranks_survive_fusing_and_coming_back(family: str) -> None:
    """Block-diagonal matrices are recognised: unequal ranks, untrained parts, ranks that 3 and 4 divide or do not."""
    model = MODELS[family]
    for case in CASES:
        ranks = ranks_of(model, case)
        for kind in FILES:
            tensors, header = FILES[kind][1](model, random_layers(model, ranks))
            state = read_tensors(tensors, header)
            for name in BLOCK_FORMATS:
                back = read_tensors(FLAVOURS[name].write(state, FP32))
                assert {path: one.rank for path, one in back.layers.items()} == ranks


@pytest.mark.parametrize("name", ["kohya", "comfy"])
@pytest.mark.parametrize("family", MODELS)
def test_a_shared_down_keeps_its_rank_when_fused(family: str, name: str) -> None:
    model = MODELS[family]
    layers = {}
    for bfl, (parts, out, into) in model.lines(2, 2).items():
        rng = torch.Generator().manual_seed(out)
        down = torch.randn(6, into * H, generator=rng)
        for number, (path, rows) in enumerate(zip(parts, part_rows(model, bfl, parts, out, H), strict=True)):
            layers[path] = LoraLayer(down.clone(), torch.randn(rows, 6, generator=rng), 1.0 + number)
    tensors = FLAVOURS[name].write(AdapterState(layers, layout=family), FP32)
    downs = [tensor for key, tensor in tensors.items() if key.endswith(FLAVOURS[name].down)]
    assert {len(down) for down in downs} == {6}
    assert worst(layers, read_tensors(tensors).layers) <= 1e-6


def test_xlabs_attention_is_read() -> None:
    ranks = {path: 3 for path in paths(FLUX1) if ".attn.to_" in path or ".add_" in path or path.endswith("proj_out")}
    layers = random_layers(FLUX1, ranks)
    tensors = xlabs(layers)
    assert detect_format(tensors) == "xlabs"
    assert worst(layers, read_tensors(tensors).layers) <= 1e-6
    tensors["single_blocks.0.processor.qkv_lora.up.weight"] = torch.ones(7 * H, 9)
    with pytest.raises(AdapterError, match=r"single_blocks\.0\.processor\.qkv_lora"):
        read_tensors(tensors)


@pytest.mark.parametrize("family", MODELS)
def test_modules_outside_the_blocks_come_along(family: str) -> None:
    """Among them the last modulation, whose halves swap in the original's names: of up, and never of down."""
    model = MODELS[family]
    layers = random_layers(model, ranks_of(model, "3")) | outside_layers(model)
    for kind, (_, make) in FILES.items():
        tensors, header = make(model, layers)
        state = read_tensors(tensors, header)
        assert worst(layers, state.layers) <= 1e-6, kind
        for name in ("diffusers", "comfy"):
            assert worst(layers, read_tensors(FLAVOURS[name].write(state, FP32)).layers) <= 1e-6


def test_the_last_modulation_by_hand() -> None:
    up, down = torch.randn(2 * H, 2), torch.randn(2, H)
    state = AdapterState({"norm_out.linear": LoraLayer(down, up, 2.0)})
    tensors = FLAVOURS["comfy"].write(state, FP32)
    key = "diffusion_model.final_layer.adaLN_modulation.1"
    assert torch.equal(tensors[f"{key}.lora_B.weight"], torch.cat([up[H:], up[:H]]))
    assert torch.equal(tensors[f"{key}.lora_A.weight"], down)


def test_the_fused_view_there_and_back() -> None:
    layers = random_layers(FLUX2, ranks_of(FLUX2, "mixed"))
    modules = fuse(AdapterState(layers, layout="flux2"))
    assert {name: one.shape for name, one in modules.items()} == {
        name: (out * H, into * H) for name, (_, out, into) in FLUX2.lines(2, 2).items()
    }
    assert worst(layers, unfuse({name: one.layer() for name, one in modules.items()}, "flux2")) <= 1e-6
    with pytest.raises(AdapterError, match="img_mod"):
        unfuse({"double_blocks.0.img_mod.lin": layers[paths(FLUX2)[0]]}, "flux2")


# --- Names: golden lists. ---

DIFFUSERS_MODELS = {"flux1": FluxTransformer2DModel, "flux2": Flux2Transformer2DModel}
COUNTS = {  # (family, width, double, single) → how many block linears, BFL's and diffusers'
    ("flux1", 3072, 19, 38): (304, 494),
    ("flux2", 6144, 8, 48): (160, 192),
    ("flux2", 4096, 8, 24): (112, 144),
    ("flux2", 3072, 5, 20): (80, 100),
}


@pytest.mark.parametrize("published", COUNTS)
def test_the_keys_of_whole_models(published: tuple[str, int, int, int]) -> None:
    """At the published numbers of blocks, of a narrow model; and the shapes of every tensor."""
    family, _, double, single = published
    model = MODELS[family]
    lines = model.lines(double, single)
    every = paths(model, double, single)
    assert (len(lines), len(every)) == COUNTS[published]
    state = AdapterState(random_layers(model, dict.fromkeys(every, 1), double=double, single=single), layout=family)
    golden: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in BLOCK_FORMATS}
    for bfl, (parts, out, into) in lines.items():
        flat, rank = bfl.replace(".", "_"), len(parts)
        golden["kohya"] |= {
            f"lora_unet_{flat}.lora_down.weight": (rank, into * H),
            f"lora_unet_{flat}.lora_up.weight": (out * H, rank),
            f"lora_unet_{flat}.alpha": (),
        }
        golden["comfy"] |= {
            f"diffusion_model.{bfl}.lora_A.weight": (rank, into * H),
            f"diffusion_model.{bfl}.lora_B.weight": (out * H, rank),
        }
        for path, rows in zip(parts, part_rows(model, bfl, parts, out, H), strict=True):
            golden["diffusers"] |= {
                f"transformer.{path}.lora_A.weight": (1, into * H),
                f"transformer.{path}.lora_B.weight": (rows, 1),
            }
    for name, expected in golden.items():
        assert {key: tuple(t.shape) for key, t in FLAVOURS[name].write(state, FP32).items()} == expected


@pytest.mark.parametrize("published", COUNTS)
def test_the_tables_are_those_of_diffusers_models(published: tuple[str, int, int, int]) -> None:
    family, width, double, single = published
    heads = {"num_attention_heads": width // 128, "attention_head_dim": 128}
    text = {"flux1": 4096, 6144: 15360, 4096: 12288, 3072: 7680}[width if family == "flux2" else family]
    size = {"num_layers": double, "num_single_layers": single, "joint_attention_dim": text, "guidance_embeds": True}
    with torch.device("meta"):
        model = DIFFUSERS_MODELS[family].from_config({**size, **heads})
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    named = layout.LAYOUTS[family]
    assert {path for path in linears if named.place(path) is None} == set()
    known = {part for _, (parts, _, _) in MODELS[family].lines(double, single).items() for part in parts}
    assert known | {path for path, _, _ in MODELS[family].others(text).values()} == set(linears)
    for bfl, (parts, out, into) in MODELS[family].lines(double, single).items():
        assert named.parts(bfl) == tuple(parts)
        assert named.units(bfl) == (out, into)
        assert {linears[part][1] for part in parts} == {into * width}
        assert sum(linears[part][0] for part in parts) == out * width
    norms = {key for key in model.state_dict() if ".attn.norm_" in key}
    made = {key.format(i) for key in NORMS.values() for i in range(double if key.startswith("tr") else single)}
    assert norms == made
    for bfl, diffusers in NORMS.items():
        assert named.find_norm(bfl.format(3)) == named.find_norm(diffusers.format(3)) == (
            bfl.format(3), diffusers.format(3),
        )  # fmt: skip
    sizes = [one for one in named.sizes if one.width == width]
    assert [(one.double, one.single, one.text) for one in sizes] == [(double, single, text)]


def test_names_that_mean_nothing() -> None:
    for name in (
        "double_blocks.00.img_mlp.0", "double_blocks.0.img_mlp_0", "double_blocks_0.img_mlp.0", "double_blocks.0",
        "double_blocks.0.linear1", "transformer_blocks.0.attn", "img_in.weight", "", "double_blocks.-1.img_mlp.0",
        "double_blocks.99999999999.img_mlp.0",
    ):  # fmt: skip
        assert layout.FLUX1.find(name) is None
        assert layout.FLUX1.place(name) is None
        assert layout.FLUX1.parts(name) == ()


# --- Which family. ---

ATTENTION = "double_blocks.{}.img_attn.proj"


def attention_only(width: int, index: int = 0, single: int | None = None) -> dict[str, Tensor]:
    """A file whose names both families have."""
    names = [ATTENTION.format(index)] + ([f"single_blocks.{single}.linear1"] if single is not None else [])
    return {
        f"diffusion_model.{name}.lora_{end}.weight": torch.ones(1, width) if end == "A" else torch.ones(width, 1)
        for name in names
        for end in "AB"
    }


@pytest.mark.parametrize(
    ("tensors", "header", "family"),
    [
        (attention_only(16), {}, "flux1"),
        (attention_only(16), {"modelspec.architecture": "Flux.2-klein-9b/lora"}, "flux2"),
        (attention_only(16), {"ss_base_model_version": "flux2_klein_4b"}, "flux2"),
        (attention_only(16), {"ss_base_model_version": "flux_2_9b"}, "flux2"),
        (attention_only(16), {"modelspec.implementation": "https://github.com/black-forest-labs/flux2"}, "flux2"),
        (attention_only(16), {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "x"}, "flux1"),
        (attention_only(3072), {}, "flux1"),
        (attention_only(3072), {"ss_base_model_version": "flux2_klein_4b"}, "flux2"),
        # klein 4B has five double blocks, so the header is wrong.
        (attention_only(3072, index=7), {"ss_base_model_version": "flux2_klein_4b"}, "flux1"),
        (attention_only(4096), {}, "flux2"),
        (attention_only(6144), {"modelspec.architecture": "flux-1-dev/lora"}, "flux2"),
    ],
)  # fmt: skip
def test_files_that_fit_both_families(tensors: dict[str, Tensor], header: dict[str, str], family: str) -> None:
    assert read_tensors(tensors, header).layout == family


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("leaf", ["img_mlp.0", "txt_mlp.2", "linear1", "linear2"])
def test_shapes_tell_the_family_against_the_header(family: str, leaf: str) -> None:
    other = {"flux1": "flux.2-dev/lora", "flux2": "flux-1-dev/lora"}[family]
    ends = {bfl: parts for bfl, (parts, _, _) in MODELS[family].lines(1, 1).items() if bfl.endswith(leaf)}
    layers = random_layers(MODELS[family], {path: 2 for parts in ends.values() for path in parts})
    tensors, _ = FILES["kohya"][1](MODELS[family], layers)
    state = read_tensors(tensors, {"modelspec.architecture": other})
    assert state.layout == family
    assert worst(layers, state.layers) <= 1e-6


def test_the_published_sizes_are_told() -> None:
    def architectures(width: int, index: int) -> list[str]:
        return [size.architecture for size in sizes_of(read_tensors(attention_only(width, index)))]

    assert architectures(3072, 0) == ["flux-1/lora"]
    assert architectures(4096, 7) == ["flux.2-klein-9b/lora"]
    assert architectures(6144, 7) == ["flux.2-dev/lora"]
    assert architectures(128, 1) == ["flux-tiny/lora"]
    assert architectures(3072, 19) == architectures(128, 2) == architectures(16, 0) == []
    assert sizes_of(AdapterState({})) == ()


# --- What is left out, and what is refused. ---


def flux1_state(**extra: Tensor) -> dict[str, Tensor]:
    tensors, _ = FILES["diffusers, baked"][1](FLUX1, random_layers(FLUX1, ranks_of(FLUX1, "2")))
    return tensors | extra


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("transformer.{}.dora_scale", "DoRA"),
        ("transformer.{}.lora_magnitude_vector.weight", "DoRA"),
        ("transformer.{}.lora_magnitude_vector", "DoRA"),
        ("transformer.{}.lokr_w1", "LoKr"),
        ("transformer.{}.lokr_w2_a", "LoKr"),
        ("transformer.{}.hada_w1_a", "LoHa"),
        ("transformer.{}.oft_blocks", "OFT"),
        ("transformer.{}.lora_mid.weight", "LyCORIS"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(key: str, name: str) -> None:
    key = key.format("transformer_blocks.0.attn.to_q")
    with pytest.raises(AdapterError) as caught:
        read_tensors(flux1_state(**{key: torch.ones(2)}))
    assert key in caught.value.message
    assert name in caught.value.message
    assert "flux-ft extract" in str(caught.value.hint)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    ],
)
def test_text_encoders_are_left_out_and_named(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(flux1_state(**{key: torch.ones(2, 2)}), tmp_path / "cat.safetensors")
    state = read_adapter(tmp_path / "cat.safetensors")
    assert state.layers.keys() == ranks_of(FLUX1, "2").keys()
    assert [key in note and "text encoders" in note for note in state.notes] == [True]
    printed = capsys.readouterr()
    assert key in printed.err
    assert printed.out == ""
    with pytest.raises(AdapterError, match="only parts for text encoders"):
        read_tensors({key: torch.ones(2, 2)})


@pytest.mark.parametrize("end", ["diff", "diff_b", "set_weight", "reshape_weight", "w_norm"])
def test_whole_weights_are_left_out_and_named(end: str) -> None:
    tensors, _ = FILES["comfy, A/B"][1](FLUX1, random_layers(FLUX1, ranks_of(FLUX1, "2")))
    key = f"diffusion_model.img_in.{end}"
    state = read_tensors(tensors | {key: torch.ones(2, dtype=torch.int64)})
    assert state.layers.keys() == ranks_of(FLUX1, "2").keys()
    assert [key in note and "less than its file" in note for note in state.notes] == [True]
    with pytest.raises(AdapterError, match="only parts for whole weights"):
        read_tensors({key: torch.ones(2)})


OUTSIDE = [(family, path) for family, model in MODELS.items() for path, _, _ in model.others(12).values()]


@pytest.mark.parametrize(("family", "path"), OUTSIDE)
def test_what_a_tool_drops_is_refused_in_kohya_files_and_named_in_others(
    family: str, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS[family]
    layers = random_layers(model, ranks_of(model, "2")) | {path: outside_layers(model)[path]}
    state = AdapterState(layers, layout=family)
    for name in BLOCK_FORMATS:
        found = [loss for loss in losses(state, name) if path in loss.names]
        output = tmp_path / f"{name}.safetensors"
        if name == "kohya" and found:
            with pytest.raises(AdapterError) as caught:
                write_adapter(output, state, name, FP32, {})
            assert path in caught.value.message
            assert all(tool in caught.value.message for tool in found[0].tools)
            write_adapter(output, only_blocks(state), name, FP32, {})
            capsys.readouterr()
            continue
        write_adapter(output, state, name, FP32, {})
        said = capsys.readouterr().err
        assert all(tool in said and path in said for loss in found for tool in loss.tools)
        assert found or path not in said
        assert worst(layers, read_adapter(output).layers) <= 1e-6


def test_kohya_refuses_what_diffusers_drops_in_flux2_and_nothing_else() -> None:
    """Of eleven modules: guidance (2), shared modulations (3) and the last modulation."""
    refused = [
        path
        for path, layer in outside_layers(FLUX2).items()
        if losses(AdapterState({path: layer}, layout="flux2"), "kohya")
    ]
    assert len(refused) == 6
    assert all("guidance" in path or "modulation" in path or path == "norm_out.linear" for path in refused)
    every = {path for path, _, _ in FLUX1.others(12).values()}
    dropped = {path for loss in losses(AdapterState(outside_layers(FLUX1)), "kohya") for path in loss.names}
    assert dropped == every


def test_only_blocks_says_what_it_leaves_out() -> None:
    state = AdapterState(random_layers(FLUX1, ranks_of(FLUX1, "2")), notes=("first",))
    assert only_blocks(state) == state
    more = replace(state, layers=state.layers | outside_layers(FLUX1), extras={"x.bias": torch.ones(1)})
    less = only_blocks(more)
    assert (less.layers, less.extras) == (state.layers, {})
    assert less.notes[0] == "first"
    assert "11 parts" in less.notes[1]
    with pytest.raises(AdapterError, match="nothing inside the blocks"):
        only_blocks(AdapterState(outside_layers(FLUX1)))


def test_the_table_of_the_docs_has_every_part_and_every_tool() -> None:
    text = support_table()
    tools = {tool for table in DROPPED_BY.values() for part in table.values() for tool in part}
    parts = {part for table in DROPPED_BY.values() for part in table}
    assert all(tool in text for tool in tools)
    assert all(f"| {part} |" in text for part in parts)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {6, 5}


# --- Control LoRAs. ---


def test_a_control_lora_is_read_and_written_whole(tmp_path: Path) -> None:
    tensors = control()
    state = read_tensors(tensors)
    assert detect_format(tensors) == "bfl"
    assert len([name for name in state.extras if name.endswith(".bias")]) == 2 * 14 + 2 * 6 + 10
    assert len([name for name in state.extras if not name.endswith(".bias")]) == 2 * 4 + 2 * 2
    assert [("added biases" in note, "replaced norms" in note) for note in state.notes] == [
        (True, False),
        (False, True),
    ]
    written = FLAVOURS["bfl"].write(state, FP32)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    path = tmp_path / "depth.safetensors"
    write_adapter(path, state, "bfl", torch.bfloat16, {})
    assert verify_written(path, state, torch.bfloat16) < 1e-2
    norm = next(name for name in state.extras if not name.endswith(".bias"))
    wrong = replace(state, extras=state.extras | {norm: state.extras[norm] * 1.1})
    with pytest.raises(AdapterError, match="is not what it was"):
        verify_written(path, wrong, torch.bfloat16)
    with pytest.raises(AdapterError, match="is extra"):
        verify_written(path, replace(state, extras={}), torch.bfloat16)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_other_layouts_refuse_biases_and_norms(name: str) -> None:
    state = read_tensors(control())
    with pytest.raises(AdapterError) as caught:
        FLAVOURS[name].write(state, FP32)
    assert "added biases" in caught.value.message
    assert "replaced norms" in caught.value.message
    blocks = only_blocks(state)
    assert worst(blocks.layers, read_tensors(FLAVOURS[name].write(blocks, FP32)).layers) <= 1e-6


@pytest.mark.parametrize(
    "lost", ["img_in.", "double_blocks.1.txt_mod.lin", "single_blocks.0.norm.key_norm", "final_layer.linear"]
)
def test_an_incomplete_control_lora_is_refused(lost: str) -> None:
    tensors = {key: tensor for key, tensor in control().items() if not key.startswith(lost)}
    with pytest.raises(AdapterError, match="take all or nothing") as caught:
        FLAVOURS["bfl"].write(read_tensors(tensors), FP32)
    assert lost.strip(".") in caught.value.message


def test_guidance_and_biases_may_be_missing_from_a_control_lora() -> None:
    tensors = {key: one for key, one in control().items() if "guidance" not in key and not key.endswith("bias")}
    assert FLAVOURS["bfl"].write(read_tensors(tensors), FP32).keys() == tensors.keys()


def test_control_loras_of_a_published_width_have_its_blocks() -> None:
    state = read_tensors(control(double=1, single=1, rank=1, width=3072))
    with pytest.raises(AdapterError, match=r"double_blocks\.1\.img_attn\.qkv"):
        FLAVOURS["bfl"].write(state, FP32)


def test_bfl_files_are_for_flux1() -> None:
    layers = random_layers(FLUX2, ranks_of(FLUX2, "2"))
    with pytest.raises(AdapterError, match=r"FLUX\.2"):
        FLAVOURS["bfl"].write(AdapterState(layers, layout="flux2"), FP32)


def test_diffusers_reads_a_control_lora_as_we_do() -> None:
    """At full size, since its converter has all numbers built in.

    Of the last modulation, it swaps the halves of down's ranks too (0.42.1), which `DROPPED_BY` says.
    """
    written = FLAVOURS["bfl"].write(read_tensors(control(19, 38, rank=2, width=3072)), FP32)
    state = read_tensors(written)
    theirs = _convert_bfl_flux_control_lora_to_diffusers(dict(written))
    got = read_tensors({key: tensor.contiguous() for key, tensor in theirs.items()})
    assert got.extras.keys() == state.extras.keys()
    assert all(torch.equal(got.extras[name], state.extras[name]) for name in state.extras)
    errors = compare_adapters(state, got)
    last = errors.pop("norm_out.linear")
    assert set(errors.values()) == {0.0}
    assert (last > 0.1) == ("diffusers" in DROPPED_BY["flux1", "bfl"]["final_layer.adaLN_modulation.1"])


def test_added_biases_have_the_strength_of_their_module() -> None:
    path = "transformer_blocks.0.attn.to_q"
    tensors = {
        f"transformer.{path}.lora_A.weight": torch.ones(2, H),
        f"transformer.{path}.lora_B.weight": torch.ones(H, 2),
        f"transformer.{path}.lora_B.bias": torch.full((H,), 3.0),
        f"transformer.{path}.alpha": torch.tensor(1.0),
    }
    assert torch.equal(read_tensors(tensors).extras[f"{path}.bias"], torch.full((H,), 1.5))


# --- Files. ---


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_written_headers_and_alphas(family: str, name: str, tmp_path: Path) -> None:
    """Strings alone, no strength in the header; `.alpha` in kohya files alone, float32 and equal to the rank."""
    path = tmp_path / "a.safetensors"
    given = {"lora_adapter_metadata": "{}", "sshs_legacy_hash": "old", "modelspec.title": "cat"}
    layers = random_layers(MODELS[family], ranks_of(MODELS[family], "mixed"))
    write_adapter(path, AdapterState(layers, layout=family), name, torch.bfloat16, given)
    blob = path.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    assert header.keys() == {"format", "modelspec.title", "modelspec.hash_sha256", "sshs_model_hash"}
    assert all(isinstance(value, str) for value in header.values())
    tensors = load_file(path)
    alphas = {key for key in tensors if key.endswith(".alpha")}
    assert bool(alphas) == (name == "kohya")
    for key in alphas:
        assert tensors[key].dtype == torch.float32
        assert tensors[key] == len(tensors[key.replace(".alpha", ".lora_down.weight")])
    assert {tensor.dtype for key, tensor in tensors.items() if key not in alphas} == {torch.bfloat16}


def test_alpha_above_256_is_exact_in_a_16_bit_file(tmp_path: Path) -> None:
    parts = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]
    layers = random_layers(FLUX1, dict.fromkeys(parts, 87))
    write_adapter(tmp_path / "a.safetensors", AdapterState(layers), "kohya", torch.bfloat16, {})
    assert load_file(tmp_path / "a.safetensors")["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 261.0


def test_files_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    """The same order of tensors and the same bytes after the header."""
    layers = random_layers(FLUX1, ranks_of(FLUX1, "mixed"))
    write_adapter(tmp_path / "ours", AdapterState(layers), "kohya", torch.float16, {})
    save_file(to_kohya(AdapterState(layers), torch.float16), tmp_path / "theirs", {"format": "pt"})
    data = []
    for name in ("ours", "theirs"):
        blob = (tmp_path / name).read_bytes()
        data.append(blob[8 + int.from_bytes(blob[:8], "little") :])
    assert data[0] == data[1]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_strength_is_folded_in_before_rounding(name: str) -> None:
    path = "transformer_blocks.0.attn.to_out.0"
    layers = random_layers(FLUX1, {path: 3}, alpha=1.0)
    tensors = FLAVOURS[name].write(AdapterState(layers), torch.bfloat16)
    up = next(tensor for key, tensor in tensors.items() if key.endswith(FLAVOURS[name].up))
    assert torch.equal(up, (layers[path].up_OR / 3).bfloat16())


def test_half_precision_sources_are_written_bit_by_bit() -> None:
    """At a scale of 1 and in the same dtype, nothing is computed."""
    layers = {
        path: LoraLayer(one.down_RI.bfloat16(), one.up_OR.bfloat16(), 3.0)
        for path, one in random_layers(FLUX2, ranks_of(FLUX2, "3")).items()
    }
    state = AdapterState(layers, layout="flux2")
    for name in BLOCK_FORMATS:
        back = read_tensors(FLAVOURS[name].write(state, torch.bfloat16))
        assert set(compare_adapters(state, back).values()) == {0.0}


def test_errors_of_rounding_are_measured_as_by_formed_deltas() -> None:
    layers = random_layers(FLUX1, ranks_of(FLUX1, "mixed"))
    for dtype in (torch.bfloat16, torch.float16):
        for factor in (1e-12, 1.0, 1e12):
            big = {path: replace(one, up_OR=one.up_OR * factor) for path, one in layers.items()}
            near = {
                path: replace(one, up_OR=one.up_OR.to(dtype).float() * factor, down_RI=one.down_RI.to(dtype))
                for path, one in layers.items()
            }
            for path, error in compare_adapters(AdapterState(big), AdapterState(near)).items():
                expected = (delta(big[path]) - delta(near[path])).norm() / delta(big[path]).norm()
                assert error == pytest.approx(float(expected), rel=1e-3)


PEAK = """
import sys, torch
from pathlib import Path
from flux_ft.adapters.formats import verify_written, write_adapter
from flux_ft.types import AdapterState, LoraLayer

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
row, column = torch.randn(1, 768).bfloat16(), torch.randn(768, 1).bfloat16()
layers = {
    f"transformer_blocks.{i}.attn.to_{part}": LoraLayer(row.expand(64, 768), column.expand(768, 64), 32.0)
    for i in range(300) for part in "qkv"
}
def run(count):
    state = AdapterState(dict(list(layers.items())[: 3 * count]))
    write_adapter(Path(sys.argv[1]), state, "diffusers", torch.bfloat16, {})
    verify_written(Path(sys.argv[1]), state, torch.bfloat16)
run(2)
before = peak()
run(300)
print(peak() - before, Path(sys.argv[1]).stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory from /proc")
def test_writing_and_verifying_hold_a_few_modules_and_not_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "a.safetensors")], capture_output=True, text=True, check=True
    )
    grown, size = map(int, done.stdout.split())
    assert size > 170e6
    assert grown < 0.15 * size


# --- diffusers' own FLUX.2 loader. ---


class Pipe(Flux2LoraLoaderMixin):
    """As much of a pipeline as the loader needs."""

    def __init__(self) -> None:
        self.transformer = Flux2Transformer2DModel(
            num_layers=2, num_single_layers=12, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=True,
        )  # fmt: skip
        self.hf_device_map = None
        self.components = {"transformer": self.transformer}


@pytest.mark.parametrize("case", ["5", "mixed", "some parts"])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_diffusers_loads_our_flux2_files(name: str, case: str, tmp_path: Path) -> None:
    layers = random_layers(FLUX2, ranks_of(FLUX2, case))
    if case == "5":
        layers |= random_layers(FLUX2, {"single_transformer_blocks.11.attn.to_qkv_mlp_proj": 5})
    write_adapter(tmp_path / "a.safetensors", AdapterState(layers, layout="flux2"), name, FP32, {})
    pipe = Pipe()
    for parameter in pipe.transformer.parameters():
        parameter.data.zero_()
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", local_files_only=True)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    got = {key.removesuffix(".weight"): value for key, value in pipe.transformer.state_dict().items() if value.any()}
    assert got.keys() == layers.keys()
    for path, layer in layers.items():
        assert float((got[path] - delta(layer)).norm() / delta(layer).norm()) <= 1e-6, path


# --- Converting. ---


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_file_is_converted_and_back(family: str, name: str, tmp_path: Path) -> None:
    layers = random_layers(MODELS[family], ranks_of(MODELS[family], "mixed"))
    first, second, third = (tmp_path / f"{part}.safetensors" for part in ("first", "second", "third"))
    ours = {"modelspec.title": "Größe", "flux_ft.export": '{"flavour": "diffusers", "rank": 1}'}
    write_adapter(first, AdapterState(layers, layout=family), "diffusers", FP32, ours)
    done = convert_file(first, second, format=name)
    assert (done.dtype, done.format, done.modules, done.ranks) == ("fp32", name, len(layers), (1, 7))
    assert done.size_bytes == second.stat().st_size
    assert (done.worst_error <= 1e-6, done.family) == (True, {"flux1": "FLUX.1", "flux2": "FLUX.2"}[family])
    assert json.loads(json.dumps(done.as_json()))["output"] == str(second)
    assert str(second) in done.for_people()
    found = read_adapter(second)
    assert found.metadata["modelspec.title"] == "Größe"
    assert json.loads(found.metadata["flux_ft.export"])["flavour"] == name
    convert_file(second, third, format="diffusers", dtype="fp32")
    assert worst(layers, read_adapter(third).layers) <= 1e-6
    assert load_file(third).keys() == load_file(first).keys()


def test_converting_names_the_model_where_the_file_does_not(tmp_path: Path) -> None:
    save_file(attention_only(4096), tmp_path / "a.safetensors")
    convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    header = read_adapter(tmp_path / "b.safetensors").metadata
    assert header["modelspec.architecture"] == "flux.2-klein-9b/lora"
    assert header["ss_base_model_version"] == "flux2_klein_9b"
    save_file(attention_only(4096), tmp_path / "c.safetensors", {"modelspec.architecture": "mine"})
    convert_file(tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    assert read_adapter(tmp_path / "d.safetensors").metadata["modelspec.architecture"] == "mine"


def test_converting_keeps_the_dtype_unless_told(tmp_path: Path) -> None:
    tensors, _ = FILES["kohya"][1](FLUX1, random_layers(FLUX1, ranks_of(FLUX1, "2")))
    save_file({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    assert convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers").dtype == "fp16"
    assert convert_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors", dtype="bf16").dtype == "bf16"


def test_converting_only_blocks(tmp_path: Path) -> None:
    save_file(control(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="added biases"):
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    done = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", blocks_only=True)
    assert done.modules == 40
    assert any("outside the blocks are left out" in warning for warning in done.warnings)


def test_converting_warns_of_what_a_tool_drops(tmp_path: Path) -> None:
    save_file(flux1_state(), tmp_path / "a.safetensors")
    done = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="comfy")
    assert any("diffusers loads nothing" in warning for warning in done.warnings)
    assert convert_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors").warnings == ()


def test_converting_overwrites_nothing_and_knows_its_formats(tmp_path: Path) -> None:
    save_file(flux1_state(), tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for output, options in (
        ("a.safetensors", {}),
        ("b.ckpt", {}),
        ("b.safetensors", {"format": "xlabs"}),
        ("b.safetensors", {"dtype": "int8"}),
    ):
        with pytest.raises(ConfigError):
            convert_file(tmp_path / "a.safetensors", tmp_path / output, **options)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_every_flavour_that_can_be_read_is_described() -> None:
    assert {flavour for flavour, _ in FILES.values()} | {"xlabs"} == set(READABLE)
    assert set(formats.FLAVOURS) == {"kohya", "diffusers", "comfy", "bfl"}
