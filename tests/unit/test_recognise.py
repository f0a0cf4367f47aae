"""What a file is, told by keys, shapes and header; and what tools make of it, by the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from _loras import LAYOUT_CASES, block_paths, edited, random_lora, renamed, shape_of, with_header
from safetensors.torch import save_file

from flux_ft.adapters.formats import write_adapter
from flux_ft.adapters.recognise import family_of, header_strength, read_contents, role_of, width_of
from flux_ft.adapters.tools import TOOLS, as_markdown, layout_of, verdicts
from flux_ft.errors import AdapterError
from flux_ft.families.layout import LAYOUTS

Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize(
    ("key", "module", "role"),
    [
        ("lora_unet_single_blocks_0_linear1.lora_down.weight", "lora_unet_single_blocks_0_linear1", "down"),
        ("transformer.x_embedder.lora_B.weight", "transformer.x_embedder", "up"),
        ("transformer_blocks.0.attn.to_q.lora_A.default.weight", Q, "down"),
        ("double_blocks.0.processor.qkv_lora1.up.weight", "double_blocks.0.processor.qkv_lora1", "up"),
        ("lora_unet_img_in.alpha", "lora_unet_img_in", "alpha"),
        ("double_blocks.0.img_attn.qkv.lora_B.bias", "double_blocks.0.img_attn.qkv", "bias"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_attn.norm.query_norm.scale", "norm"),
        ("lora_unet_img_in.dora_scale", "lora_unet_img_in", "dora"),
        ("transformer.x.lora_magnitude_vector", "transformer.x", "dora"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1_a", "lycoris_transformer_blocks_0_attn_to_q", "lokr"),
        ("lora_unet_img_in.hada_w2_b", "lora_unet_img_in", "loha"),
        ("diffusion_model.img_in.diff", "diffusion_model.img_in", "full"),
        ("diffusion_model.img_in.diff_b", "diffusion_model.img_in", "bias"),
    ],
)
def test_keys_are_taken_apart(key: str, module: str, role: str) -> None:
    assert role_of(key) == (module, role)


@pytest.mark.parametrize("key", ["", ".alpha", "double_blocks.0.img_attn.qkv.weight", "lora_down", "x.lora_C.weight"])
def test_other_keys_have_no_role(key: str) -> None:
    assert role_of(key) is None


FAMILY = "flux1", "flux2"


@pytest.mark.parametrize("layout", FAMILY)
@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("width", [24, 128])
def test_family_and_width_are_told_by_the_modules(layout: str, format: str, width: int, tmp_path: Path) -> None:
    write_adapter(
        tmp_path / "a.safetensors", random_lora(None, 2, layout=layout, width=width), format, torch.bfloat16, {}
    )
    contents = read_contents(tmp_path / "a.safetensors")
    assert (contents.family, width_of(contents.shapes)) == (layout, width)


@pytest.mark.parametrize(
    ("width", "block", "metadata", "family"),
    [
        (6144, 0, {}, "flux2"),
        (4096, 7, {}, "flux2"),
        (3072, 18, {}, "flux1"),
        (3072, 0, {}, "flux1"),
        (3072, 0, {"modelspec.architecture": "Flux.2-klein-4b/lora"}, "flux2"),
        (3072, 0, {"ss_base_model_version": "flux2_klein_4b"}, "flux2"),
        (3072, 18, {"ss_base_model_version": "flux2_klein_4b"}, "flux1"),
    ],
)
def test_modules_of_both_families_are_told_by_size_and_header(
    width: int, block: int, metadata: Mapping[str, str], family: str
) -> None:
    assert family_of({f"transformer_blocks.{block}.attn.to_q": (width, width)}, metadata) == family


def test_modules_of_no_model_are_of_an_unknown_family() -> None:
    assert family_of({"down_blocks.0.attentions.0.proj_in": (320, 320)}, {}) == "unknown"
    assert family_of({}, {"ss_base_model_version": "flux1"}) == "unknown"
    both = {"transformer_blocks.0.ff.net.2": (8, 32), "transformer_blocks.0.ff.linear_out": (8, 24)}
    assert family_of(both, {}) == "unknown"


@pytest.mark.parametrize("layout", FAMILY)
def test_width_is_that_of_every_module(layout: str) -> None:
    table = LAYOUTS[layout]
    for path in block_paths(layout):
        assert width_of({path: shape_of(path, layout, 48)}) == 48
    outside = {"x_embedder": (48, 7), "proj_out": (7, 48), "norm_out.linear": (96, 48), "context_embedder": (48, 5)}
    assert {width_of({path: shape}) for path, shape in outside.items()} == {48}
    for stream in table.streams:
        for leaf, (out, into) in stream.units.items():
            assert width_of({f"{stream.original}.3.{leaf}": (48 * out, 48 * into)}) == 48


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        read_contents(tmp_path / "a.safetensors")


def test_header_strength() -> None:
    assert header_strength({}) is None
    one = header_strength({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'})
    half = header_strength({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 2}'})
    broken = header_strength({"lora_adapter_metadata": "["})
    assert one is not None
    assert one.is_one
    assert half is not None
    assert (half.is_one, half.text) == (False, "alpha 2 at rank 4")
    assert broken is not None
    assert not broken.is_one


# --- Layouts, as tools tell them apart. ---


def layout_file(folder: Path, layout: str, family: str = "flux1") -> Path:
    format, rename = LAYOUT_CASES[layout]
    write_adapter(folder / "source.safetensors", random_lora(layout=family), format, torch.float32, {})
    return renamed(folder / "source.safetensors", folder / "a.safetensors", rename)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_layouts_are_told_apart(layout: str, family: str, tmp_path: Path) -> None:
    contents = read_contents(layout_file(tmp_path, layout, family))
    assert (layout_of(contents), contents.family) == (layout, family)


def test_rarer_layouts(tmp_path: Path) -> None:
    one = torch.ones(2, 2)
    for key, layout in {
        "double_blocks.0.processor.qkv_lora1.down.weight": "xlabs",
        "lora_unet_double_blocks_0_img_mlp_0.lokr_w1": "lokr",
        "lora_unet_double_blocks_0_img_mlp_0.dora_scale": "dora",
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": "unknown",
        "model.weight": "unknown",
    }.items():
        save_file({key: one}, tmp_path / "a.safetensors")
        assert layout_of(read_contents(tmp_path / "a.safetensors")) == layout
    control = {"double_blocks.0.img_attn.norm.query_norm.scale": one[0].clone()}
    save_file(control | {"double_blocks.0.img_mlp.0.lora_A.weight": one}, tmp_path / "a.safetensors")
    assert layout_of(read_contents(tmp_path / "a.safetensors")) == "control"


# --- The table. ---


def answers(path: Path) -> dict[str, str]:
    contents = read_contents(path)
    return {one.tool.name: one.answer for one in verdicts(contents, contents.family)}


def whole_blocks(folder: Path, format: str, family: str = "flux1", paths: list[str] | None = None) -> Path:
    paths = paths or block_paths(family, [0, 18 if family == "flux1" else 1], [0])
    write_adapter(folder / "a.safetensors", random_lora(paths, layout=family), format, torch.float32, {})
    return folder / "a.safetensors"


def test_the_universal_file_is_honoured_by_all(tmp_path: Path) -> None:
    assert set(answers(whole_blocks(tmp_path, "kohya")).values()) == {"ok"}
    assert set(answers(whole_blocks(tmp_path, "kohya", "flux2")).values()) == {"ok"}


def test_the_table_says_who_loads_nothing(tmp_path: Path) -> None:
    comfy = answers(whole_blocks(tmp_path, "comfy"))
    assert {name for name, answer in comfy.items() if answer == "nothing"} == {"diffusers", "nunchaku"}
    assert answers(layout_file(tmp_path, "bare diffusers"))["ComfyUI"] == "ok"
    assert answers(layout_file(tmp_path, "comfy down/up", "flux2")) == {"diffusers": "nothing", "ComfyUI": "ok"}
    assert answers(layout_file(tmp_path, "comfy with alpha", "flux2")) == {"diffusers": "nothing", "ComfyUI": "ok"}


def test_a_strength_in_the_header_is_wrong_elsewhere(tmp_path: Path) -> None:
    half = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 2}'}
    plain = with_header(whole_blocks(tmp_path, "diffusers"), tmp_path / "b.safetensors", half)
    got = answers(plain)
    assert got["diffusers"] == "ok"
    assert {got[name] for name in ("ComfyUI", "Forge", "sd-scripts", "InvokeAI", "nunchaku")} == {"wrong"}
    twice = answers(with_header(whole_blocks(tmp_path, "kohya"), tmp_path / "b.safetensors", half))
    assert (twice["diffusers"], twice["ComfyUI"]) == ("wrong", "ok")
    same = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'}
    assert set(answers(with_header(whole_blocks(tmp_path, "kohya"), tmp_path / "b.safetensors", same)).values()) == {
        "ok"
    }


def test_parts_outside_the_blocks_change_answers(tmp_path: Path) -> None:
    def add(names: Mapping[str, tuple[str, str]]) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors.update({key: torch.ones(2, 2) for pair in names.values() for key in pair})

    kohya = add({"img_in": ("lora_unet_img_in.lora_down.weight", "lora_unet_img_in.lora_up.weight")})
    got = answers(edited(whole_blocks(tmp_path, "kohya"), tmp_path / "b.safetensors", kohya))
    assert {name: got[name] for name in ("diffusers", "ComfyUI", "InvokeAI", "nunchaku")} == {
        "diffusers": "partial", "ComfyUI": "ok", "InvokeAI": "nothing", "nunchaku": "partial",
    }  # fmt: skip
    key = "transformer.norm_out.linear.lora"
    got = answers(
        edited(
            whole_blocks(tmp_path, "diffusers"),
            tmp_path / "b.safetensors",
            add({"": (f"{key}_A.weight", f"{key}_B.weight")}),
        )
    )
    assert (got["sd-scripts"], got["InvokeAI"], got["ComfyUI"]) == ("partial", "nothing", "ok")
    shared = "transformer.single_stream_modulation.linear.lora"
    extra = add({"": (f"{shared}_A.weight", f"{shared}_B.weight")})
    assert answers(edited(whole_blocks(tmp_path, "diffusers", "flux2"), tmp_path / "b.safetensors", extra)) == {
        "diffusers": "ok", "ComfyUI": "partial",
    }  # fmt: skip


def test_gaps_change_answers(tmp_path: Path) -> None:
    some = answers(whole_blocks(tmp_path, "diffusers", paths=[Q, K]))
    assert (some["InvokeAI"], some["stable-diffusion.cpp"], some["diffusers"]) == ("nothing", "partial", "ok")
    late = answers(whole_blocks(tmp_path, "diffusers", paths=block_paths(double=[3], single=[5])))
    assert (late["InvokeAI"], late["ComfyUI"]) == ("nothing", "ok")
    assert (
        answers(whole_blocks(tmp_path, "kohya", paths=block_paths(double=[3], single=[5])))["draw-things"] == "nothing"
    )


def test_text_encoders_and_integer_alphas_change_answers(tmp_path: Path) -> None:
    def with_tensors(source: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
        return edited(source, tmp_path / "b.safetensors", lambda found: found.update(tensors))

    t5, ones = "lora_te3_encoder_block_0_layer_0_SelfAttention_q", torch.ones(2, 2)
    got = answers(
        with_tensors(
            whole_blocks(tmp_path, "kohya"), {f"{t5}.lora_{end}.weight": ones.clone() for end in ("down", "up")}
        )
    )
    assert (got["InvokeAI"], got["diffusers"], got["ComfyUI"]) == ("nothing", "partial", "ok")
    got = answers(with_tensors(whole_blocks(tmp_path, "diffusers"), {f"transformer.{Q}.alpha": torch.tensor(4)}))
    assert (got["diffusers"], got["ComfyUI"]) == ("nothing", "ok")


def test_every_answer_says_how_it_is_known(tmp_path: Path) -> None:
    contents = read_contents(whole_blocks(tmp_path, "kohya"))
    for one in verdicts(contents, "flux1"):
        assert one.tool.version in one.evidence
        assert one.evidence.startswith("tried" if one.tried else "read from the source")
        assert one.tried == (one.tool.name not in ("stable-diffusion.cpp", "mflux", "draw-things"))
    assert verdicts(contents, "unknown") == ()


@pytest.mark.parametrize("family", FAMILY)
def test_the_table_is_rendered_with_a_cell_for_every_tool(family: str) -> None:
    lines = as_markdown(family).splitlines()  # type: ignore[arg-type]
    assert len({line.count("|") for line in lines}) == 1
    assert all(tool.version in lines[0] for tool in TOOLS[family])  # type: ignore[index]
    assert [line for line in lines if line.startswith("| kohya | ok")]
