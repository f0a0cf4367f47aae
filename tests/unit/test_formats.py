"""LoRA files: names, round trips, what diffusers makes of them, and broken files.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ft.adapters import formats
from flux_ft.adapters.formats import (
    bfl_module,
    compare_adapters,
    delta_weight,
    detect_format,
    diffusers_modules,
    read_adapter,
    read_tensors,
    to_diffusers,
    to_kohya,
    verify_written,
    write_adapter,
)
from flux_ft.errors import AdapterError, StorageError
from flux_ft.types import AdapterState, LoraLayer

H = 16
"""Hidden width of the small models here; the MLP is four times as wide."""
Q, K, V, MLP = (f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
SHAPES_OI = {  # path inside the block → (out, in) in units of the hidden width
    "transformer_blocks": {
        **{f"attn.{part}": (1, 1) for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")},
        "attn.to_out.0": (1, 1),
        "attn.to_add_out": (1, 1),
        "ff.net.0.proj": (4, 1),
        "ff.net.2": (1, 4),
        "ff_context.net.0.proj": (4, 1),
        "ff_context.net.2": (1, 4),
        "norm1.linear": (6, 1),
        "norm1_context.linear": (6, 1),
    },
    "single_transformer_blocks": {
        **{f"attn.to_{part}": (1, 1) for part in "qkv"},
        "proj_mlp": (4, 1),
        "proj_out": (1, 5),
        "norm.linear": (3, 1),
    },
}


def shape_of(path: str, width: int = H) -> tuple[int, int]:
    blocks, _, part = path.split(".", 2)
    out, into = SHAPES_OI[blocks][part]
    return out * width, into * width


def layer(rng: torch.Generator, path: str, rank: int, alpha: float, width: int = H) -> LoraLayer:
    out, into = shape_of(path, width)
    return LoraLayer(torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng), alpha)


def state_of(ranks: Mapping[str, int], alpha: float = 5.0, seed: int = 0, width: int = H) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return AdapterState({path: layer(rng, path, rank, alpha, width) for path, rank in ranks.items()})


def all_paths(double: int = 2, single: int = 2) -> list[str]:
    counts = {"transformer_blocks": double, "single_transformer_blocks": single}
    return [
        f"{blocks}.{i}.{part}" for blocks, parts in SHAPES_OI.items() for i in range(counts[blocks]) for part in parts
    ]


def worst(a: AdapterState, b: AdapterState) -> float:
    """The largest relative error of ΔW, by forming it: a second opinion on compare_adapters."""
    errors = []
    for path in a.layers.keys() | b.layers.keys():
        deltas = [delta_weight(state.layers[path]) if path in state.layers else None for state in (a, b)]
        first, second = deltas
        if first is None or second is None:
            present = first if first is not None else second
            assert present is not None
            errors.append(0.0 if not present.any() else float("inf"))
        else:
            errors.append(float((first - second).norm() / first.norm().clamp_min(1e-30)))
    return max(errors)


CASES = {
    "one rank": {path: 4 for path in all_paths()},
    "rank one": {path: 1 for path in all_paths()},
    "divisible by 3 and 4": {path: 12 for path in all_paths()},
    "divisible by neither": {path: 5 for path in all_paths()},
    "mixed ranks": {path: 1 + i % 7 for i, path in enumerate(all_paths())},
    "q and v only": {Q: 3, V: 3},
    "q only, rank 6": {Q: 6},
    "k only, rank 3": {K: 3},
    "no proj_mlp": {Q: 4, K: 4, V: 4},
    "proj_mlp only": {MLP: 4},
    "2, 4 and 6": {Q: 2, K: 4, V: 6, MLP: 1},
    "two digits": {f"transformer_blocks.1{i}.attn.to_k": 2 for i in range(3)},
}


# --- Names. ---


@pytest.mark.parametrize(
    ("path", "kohya"),
    [
        ("transformer_blocks.0.attn.to_k", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("transformer_blocks.7.attn.add_v_proj", "lora_unet_double_blocks_7_txt_attn_qkv"),
        ("transformer_blocks.18.attn.to_out.0", "lora_unet_double_blocks_18_img_attn_proj"),
        ("transformer_blocks.1.attn.to_add_out", "lora_unet_double_blocks_1_txt_attn_proj"),
        ("transformer_blocks.1.ff.net.0.proj", "lora_unet_double_blocks_1_img_mlp_0"),
        ("transformer_blocks.1.ff.net.2", "lora_unet_double_blocks_1_img_mlp_2"),
        ("transformer_blocks.1.ff_context.net.0.proj", "lora_unet_double_blocks_1_txt_mlp_0"),
        ("transformer_blocks.1.ff_context.net.2", "lora_unet_double_blocks_1_txt_mlp_2"),
        ("transformer_blocks.1.norm1.linear", "lora_unet_double_blocks_1_img_mod_lin"),
        ("transformer_blocks.1.norm1_context.linear", "lora_unet_double_blocks_1_txt_mod_lin"),
        ("single_transformer_blocks.37.attn.to_q", "lora_unet_single_blocks_37_linear1"),
        ("single_transformer_blocks.37.proj_mlp", "lora_unet_single_blocks_37_linear1"),
        ("single_transformer_blocks.20.proj_out", "lora_unet_single_blocks_20_linear2"),
        ("single_transformer_blocks.20.norm.linear", "lora_unet_single_blocks_20_modulation_lin"),
    ],
)
def test_names_are_the_ones_other_tools_know(path: str, kohya: str) -> None:
    state = state_of({path: 2})
    assert set(to_kohya(state, torch.float32)) == {
        f"{kohya}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert set(to_diffusers(state, torch.float32)) == {
        f"transformer.{path}.lora_A.weight",
        f"transformer.{path}.lora_B.weight",
    }


@pytest.fixture(scope="module")
def flux1_dev_linears() -> dict[str, tuple[int, int]]:
    """Block linears of the 12B model, path → (out, in), from diffusers itself."""
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config({"guidance_embeds": True})
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in path
    }


def test_the_map_covers_the_12b_model(flux1_dev_linears: dict[str, tuple[int, int]]) -> None:
    places = {path: bfl_module(path) for path in flux1_dev_linears}
    fused = {place[0] for place in places.values() if place}
    assert len(places) == 494
    assert None not in places.values()
    assert len(fused) == 304
    for path, place in places.items():
        assert place is not None
        assert diffusers_modules(place[0])[place[1]] == path
        assert diffusers_modules(place[0].replace(".", "_")) == diffusers_modules(place[0])
    assert {path for name in fused for path in diffusers_modules(name)} == set(flux1_dev_linears)


def test_size_per_unit_of_rank(flux1_dev_linears: dict[str, tuple[int, int]]) -> None:
    """Expected: 5.37 M split, 4.79 M fused with a shared down, 8.52 M block-diagonal."""

    def rank_one(down: Callable[[int], float]) -> AdapterState:
        shapes = enumerate(flux1_dev_linears.items())
        return AdapterState(
            {
                path: LoraLayer(torch.full((1, into), down(i)), torch.ones(out, 1), 1.0)
                for i, (path, (out, into)) in shapes
            }
        )

    shared, own = rank_one(lambda i: 1.0), rank_one(lambda i: 1.0 + i)

    def millions(tensors: Mapping[str, Tensor]) -> float:
        return sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2) / 1e6

    assert millions(to_diffusers(own, torch.bfloat16)) == pytest.approx(5.37, abs=0.005)
    assert millions(to_kohya(shared, torch.bfloat16)) == pytest.approx(4.79, abs=0.005)
    assert millions(to_kohya(own, torch.bfloat16)) == pytest.approx(8.52, abs=0.005)


def test_unmapped_modules() -> None:
    for path in ("proj_out", "x_embedder", "transformer_blocks.0.attn.norm_q", "transformer_blocks.x.ff.net.2"):
        assert bfl_module(path) is None
    assert bfl_module("transformer_blocks.01.ff.net.2") is None
    assert diffusers_modules("double_blocks.0.linear1") == ()
    state = AdapterState({"x_embedder": LoraLayer(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    with pytest.raises(AdapterError, match="x_embedder"):
        to_kohya(state, torch.float32)
    assert compare_adapters(state, read_tensors(to_diffusers(state, torch.float32))) == {"x_embedder": 0.0}


# --- Round trips. ---


@pytest.mark.parametrize("alpha", [1.0, 2.5, 16.0])
@pytest.mark.parametrize("case", CASES)
def test_round_trips_keep_delta_and_rank(case: str, alpha: float) -> None:
    state = state_of(CASES[case], alpha)
    by_diffusers = read_tensors(to_diffusers(state, torch.float32))
    by_kohya = read_tensors(to_kohya(state, torch.float32))
    by_both = read_tensors(to_kohya(by_diffusers, torch.float32))
    back_again = read_tensors(to_diffusers(by_kohya, torch.float32))
    for other in (by_diffusers, by_kohya, by_both, back_again):
        assert other.layers.keys() == state.layers.keys()
        assert worst(state, other) <= 1e-6
        assert {path: one.rank for path, one in other.layers.items()} == CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_files_have_no_strength_of_their_own(case: str) -> None:
    state = state_of(CASES[case], alpha=2.5)
    kohya, diffusers = to_kohya(state, torch.bfloat16), to_diffusers(state, torch.bfloat16)
    for key, alpha in kohya.items():
        if key.endswith(".alpha"):
            assert alpha.dtype == torch.float32
            assert alpha.ndim == 0
            assert alpha.item() == kohya[key.removesuffix("alpha") + "lora_down.weight"].shape[0]
    assert not any(key.endswith("alpha") for key in diffusers)
    assert len({tensor.shape[0] for key, tensor in diffusers.items() if ".lora_A." in key}) == 1


def test_scale_is_folded_before_rounding() -> None:
    state = state_of({"transformer_blocks.0.attn.to_out.0": 3}, alpha=1.0)
    one = state.layers["transformer_blocks.0.attn.to_out.0"]
    got = to_kohya(state, torch.bfloat16)["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"]
    assert torch.equal(got, (one.up_OR / 3).bfloat16())


def test_block_diagonal_layout_by_hand() -> None:
    state = state_of({Q: 2, V: 3, MLP: 1}, alpha=7.0)
    tensors = to_kohya(state, torch.float32)
    up_OR, down_RI = (tensors[f"lora_unet_single_blocks_0_linear1.{end}.weight"] for end in ("lora_up", "lora_down"))
    assert up_OR.shape == (7 * H, 6)
    assert torch.equal(down_RI, torch.cat([state.layers[path].down_RI for path in (Q, V, MLP)]))
    expected_OR = torch.zeros(7 * H, 6)
    expected_OR[:H, :2] = state.layers[Q].up_OR * (7 / 2)
    expected_OR[2 * H : 3 * H, 2:5] = state.layers[V].up_OR * (7 / 3)
    expected_OR[3 * H :, 5:] = state.layers[MLP].up_OR * 7
    assert torch.equal(up_OR, expected_OR)


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 12])
def test_a_shared_down_keeps_its_rank(rank: int) -> None:
    paths = (Q, K, V, MLP)
    down_RI = torch.randn(rank, H, generator=torch.Generator().manual_seed(1))
    own = state_of({path: rank for path in paths}, alpha=2.0).layers
    state = AdapterState({path: LoraLayer(down_RI, own[path].up_OR, 2.0 + i) for i, path in enumerate(paths)})
    for only in (paths, (Q, V), (K, MLP)):
        some = AdapterState({path: state.layers[path] for path in only})
        tensors = to_kohya(some, torch.float32)
        assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (rank, H)
        assert worst(some, read_tensors(tensors)) <= 1e-6
        again = to_kohya(read_tensors(to_diffusers(some, torch.float32)), torch.float32)
        assert again["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (rank, H)


def test_dense_fused_files_of_other_trainers_split_exactly() -> None:
    rng = torch.Generator().manual_seed(3)
    down_RI, up_OR = torch.randn(6, H, generator=rng), torch.randn(7 * H, 6, generator=rng)
    key = "lora_unet_single_blocks_4_linear1"
    state = read_tensors(
        {f"{key}.lora_down.weight": down_RI, f"{key}.lora_up.weight": up_OR, f"{key}.alpha": torch.tensor(3)}
    )
    parts = [delta_weight(state.layers[path]) for path in diffusers_modules("single_blocks.4.linear1")]
    torch.testing.assert_close(torch.cat(parts), 0.5 * up_OR @ down_RI)
    without_alpha = read_tensors({f"{key}.lora_down.weight": down_RI, f"{key}.lora_up.weight": up_OR})
    assert {one.alpha for one in without_alpha.layers.values()} == {6.0}


def test_an_untrained_lora_keeps_all_its_modules() -> None:
    layers = state_of(CASES["one rank"]).layers
    fresh = AdapterState(
        {path: LoraLayer(one.down_RI, torch.zeros_like(one.up_OR), 4.0) for path, one in layers.items()}
    )
    for name in formats.BLOCK_FORMATS:
        back = read_tensors(formats.FLAVOURS[name].write(fresh, torch.float32))
        assert back.layers.keys() == fresh.layers.keys()
        assert set(compare_adapters(fresh, back).values()) == {0.0}


def test_parts_of_wrong_shape_are_refused() -> None:
    state = state_of({Q: 2, K: 2})
    bad = LoraLayer(torch.ones(2, H + 1), torch.ones(H, 2), 1.0)
    with pytest.raises(AdapterError, match="to_k"):
        to_kohya(AdapterState({**state.layers, K: bad}), torch.float32)
    with pytest.raises(AdapterError, match="to_k"):
        to_kohya(
            AdapterState({**state.layers, K: LoraLayer(torch.ones(2, H), torch.ones(2 * H, 2), 1.0)}), torch.float32
        )


# --- What diffusers makes of our files. ---


def small_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def loaded_by_diffusers(path: Path) -> dict[str, Tensor]:
    """Module path → the weight that diffusers ends up with on zero base weights."""
    model = small_flux()
    for parameter in model.parameters():
        parameter.data.zero_()
    pipe = FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    pipe.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {name.removesuffix(".weight"): value for name, value in model.state_dict().items() if value.any()}


def check_deltas(got: Mapping[str, Tensor], state: AdapterState) -> None:
    assert got.keys() == state.layers.keys()
    for path, one in state.layers.items():
        expected = delta_weight(one)
        assert float((got[path] - expected).norm() / expected.norm()) <= 1e-6, path


@pytest.mark.parametrize("case", ["one rank", "mixed ranks", "q and v only", "k only, rank 3"])
def test_diffusers_loads_the_diffusers_file(case: str, tmp_path: Path) -> None:
    state = state_of(CASES[case])
    write_adapter(tmp_path / "a.safetensors", state, "diffusers", torch.float32, {})
    check_deltas(loaded_by_diffusers(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("case", ["one rank", "mixed ranks", "divisible by 3 and 4"])
def test_diffusers_loads_the_kohya_file(case: str, tmp_path: Path) -> None:
    """Without linear1, for which diffusers has the row counts of the 12B model built in: that one is tested below."""
    ranks = CASES[case]
    state = state_of({path: ranks[path] for path in ranks if not (bfl_module(path) or ("",))[0].endswith("linear1")})
    write_adapter(tmp_path / "a.safetensors", state, "kohya", torch.float32, {})
    check_deltas(loaded_by_diffusers(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize(
    "case", ["q and v only", "q only, rank 6", "k only, rank 3", "no proj_mlp", "proj_mlp only", "2, 4 and 6"]
)
def test_diffusers_reads_linear1_at_full_width(case: str, tmp_path: Path) -> None:
    """The converter of diffusers alone, since a model of this width takes gigabytes."""
    state = state_of(CASES[case], width=3072)
    write_adapter(tmp_path / "a.safetensors", state, "kohya", torch.float32, {})
    got = read_tensors(FluxPipeline.lora_state_dict(load_file(tmp_path / "a.safetensors")))
    assert max(compare_adapters(state, got).values()) <= 1e-6


# --- Files. ---


@pytest.mark.parametrize("flavour", ["diffusers", "kohya"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3), (torch.float32, 1e-5)])
def test_written_files_verify(tmp_path: Path, flavour: str, dtype: torch.dtype, limit: float) -> None:
    path, state = tmp_path / "a.safetensors", state_of(CASES["mixed ranks"])
    write_adapter(path, state, flavour, dtype, {"modelspec.title": "Größe"})
    assert detect_format(load_file(path)) == flavour
    assert 0 < verify_written(path, state, dtype) <= limit or dtype is torch.float32
    assert read_adapter(path).metadata["modelspec.title"] == "Größe"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_adapter(tmp_path / name, state_of({Q: 2, K: 3}), "kohya", torch.bfloat16, {"z": "1", "a": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("flavour", ["diffusers", "kohya"])
def test_hashes_are_of_the_bytes_after_the_header(tmp_path: Path, flavour: str) -> None:
    path = tmp_path / "a.safetensors"
    given = {"ss_network_dim": "2", "sshs_model_hash": "old", "lora_adapter_metadata": '{"transformer.r": 2}'}
    write_adapter(path, state_of({Q: 2, K: 3, "transformer_blocks.0.ff.net.2": 1}), flavour, torch.bfloat16, given)
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    digest = hashlib.sha256(blob[start:]).hexdigest()
    metadata = json.loads(blob[8:start])["__metadata__"]
    assert start % 8 == 0
    assert metadata == {
        "format": "pt",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "ss_network_dim": "5" if flavour == "kohya" else "3",
    }


def test_verify_tells_missing_extra_and_wrong(tmp_path: Path) -> None:
    path, state = tmp_path / "a.safetensors", state_of({Q: 2, K: 2})
    write_adapter(path, state, "kohya", torch.float32, {})
    with pytest.raises(AdapterError, match=r"a\.safetensors.*to_v.*missing"):
        verify_written(path, AdapterState({**state.layers, V: state.layers[Q]}), torch.float32)
    with pytest.raises(AdapterError, match=r"to_k.*extra"):
        verify_written(path, AdapterState({Q: state.layers[Q]}), torch.float32)
    stronger = LoraLayer(state.layers[K].down_RI, state.layers[K].up_OR, 5.1)
    with pytest.raises(AdapterError, match=r"to_k.*off by 2\.0e-02"):
        verify_written(path, AdapterState({**state.layers, K: stronger}), torch.bfloat16)


def test_verify_finds_values_too_small_for_fp16(tmp_path: Path) -> None:
    one = state_of({Q: 2}).layers[Q]
    state = AdapterState({Q: LoraLayer(one.down_RI, one.up_OR * 1e-6, 1.0)})
    write_adapter(tmp_path / "a", state, "kohya", torch.float16, {})
    with pytest.raises(AdapterError) as caught:
        verify_written(tmp_path / "a", state, torch.float16)
    assert "bf16" in str(caught.value.hint)


def test_compare_agrees_with_formed_deltas() -> None:
    a, b = state_of({Q: 3, K: 2}, seed=1), state_of({Q: 5, K: 2}, seed=2)
    for path, error in compare_adapters(a, b).items():
        expected = (delta_weight(a.layers[path]) - delta_weight(b.layers[path])).norm() / delta_weight(
            a.layers[path]
        ).norm()
        assert error == pytest.approx(float(expected), rel=1e-5)
    assert max(compare_adapters(a, a).values()) < 1e-7
    zero = AdapterState({Q: LoraLayer(torch.zeros(1, H), torch.zeros(H, 1), 1.0)})
    assert compare_adapters(zero, zero) == {Q: 0.0}
    assert compare_adapters(zero, AdapterState({})) == {Q: 0.0}
    assert compare_adapters(a, zero) == pytest.approx({Q: 1.0, K: 1.0})
    assert compare_adapters(zero, a)[Q] == float("inf")
    with pytest.raises(AdapterError, match="to_q"):
        compare_adapters(a, AdapterState({Q: LoraLayer(torch.ones(1, H), torch.ones(2 * H, 1), 1.0)}))


# --- Broken files and full disks. ---


def good_tensors() -> dict[str, Tensor]:
    return to_diffusers(state_of({Q: 2, K: 2}), torch.float32)


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        tensors = good_tensors()
        change(tensors)
        save_file(tensors, path)

    return write


def kohya_pair(name: str, out: int) -> Callable[[Path], Any]:
    pair = {"lora_down.weight": torch.ones(1, 8), "lora_up.weight": torch.ones(out, 1)}
    return lambda path: save_file({f"lora_unet_{name}.{end}": tensor for end, tensor in pair.items()}, path)


A = f"transformer.{K}.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "name too long": (lambda path: None, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "garbage": (lambda path: path.write_bytes(bytes(range(200))), "is not a .safetensors file"),
    "pickle": (lambda path: torch.save(good_tensors(), path), "as torch.save writes"),
    "no tensors": (lambda path: save_file({}, path), "no tensors"),
    "nan": (changed(lambda t: t[A].fill_(float("nan"))), "to_k.lora_A"),
    "inf": (changed(lambda t: t[A].fill_(float("inf"))), "to_k.lora_A"),
    "whole numbers": (changed(lambda t: t.update({A: t[A].long()})), "int64"),
    "no partner": (changed(lambda t: t.pop(A)), "to_k.lora_A.weight` is missing"),
    "wrong rank": (changed(lambda t: t.update({A: t[A][:1].clone()})), "to_k` has factors"),
    "four dimensions": (changed(lambda t: t.update({A: t[A][:, :, None, None].clone()})), "to_k` has factors"),
    "long alpha": (changed(lambda t: t.update({f"transformer.{K}.alpha": torch.ones(2)})), "alpha` has shape"),
    "dora": (changed(lambda t: t.update({f"transformer.{K}.dora_scale": torch.ones(2)})), "dora_scale"),
    "text encoders alone": (lambda path: save_file({"lora_te1_x.alpha": torch.ones(1)}, path), "lora_te1_x.alpha"),
    "two flavours": (
        changed(lambda t: t.update({"lora_unet_single_blocks_0_linear1.alpha": torch.ones(1)})),
        "of another flavour than",
    ),
    "same module twice": (
        changed(lambda t: t.update({A.replace("A.weight", "A.default.weight"): t[A].clone()})),
        "are the same",
    ),
    "other model": (
        lambda path: save_file({"diffusion_model.x.lora_A.weight": torch.ones(1, 1)}, path),
        "diffusion_model",
    ),
    "bare": (changed(lambda t: t.update({"transformer..lora_A.weight": torch.ones(1, 1)})), "transformer..lora_A"),
    "no module of ours": (kohya_pair("down_blocks_0_attentions_0_proj_in", 8), "changes no linear of FLUX.1 or FLUX.2"),
    "both families": (
        changed(
            lambda t: t.update(
                {
                    f"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_{end}.weight": torch.ones(1, 1)
                    for end in "AB"
                }
            )
        ),
        "a LoRA is for one of them",
    ),
    "bias of another size": (
        changed(lambda t: t.update({f"transformer.{K}.lora_B.bias": torch.ones(3)})),
        "lora_B.bias` has shape (3,)",
    ),
    "another width": (kohya_pair("single_blocks_0_linear1", 24), "linear1"),
    "no thirds": (kohya_pair("double_blocks_0_img_attn_qkv", 25), "img_attn_qkv"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300 * (kind == "name too long") + "cat.safetensors")
    make, message = BROKEN[kind]
    make(path)
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    assert "cat.safetensors" in caught.value.message
    assert message in caught.value.message
    assert caught.value.hint


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file(good_tensors(), path)
    blob = path.read_bytes()
    for size in range(0, len(blob), 37):
        path.write_bytes(blob[:size])
        with pytest.raises(AdapterError, match=r"cat\.safetensors"):
            read_adapter(path)


@pytest.mark.parametrize("flavour", ["diffusers", "kohya"])
def test_any_changed_byte_gives_a_state_or_an_adapter_error(flavour: str, tmp_path: Path) -> None:
    path, rng = tmp_path / "cat.safetensors", random.Random(0)
    write_adapter(
        path, state_of({Q: 1, K: 1, "transformer_blocks.0.attn.to_out.0": 1}), flavour, torch.bfloat16, {"a": "b"}
    )
    blob = path.read_bytes()
    header = int.from_bytes(blob[:8], "little")
    refused = 0
    for turn in range(300):
        damaged = bytearray(blob)
        for _ in range(rng.randint(1, 3)):  # two of three in the header, where most can go wrong
            damaged[rng.randrange(8 + header if turn % 3 else len(blob))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            state = read_adapter(path)
            to_kohya(state, torch.float32)
        except AdapterError:
            refused += 1
    assert 100 < refused < 300


HEADERS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    # what the header says → the scale of q and of k, both of rank 2, as peft has it
    "alpha": ({"r": 2, "lora_alpha": 3}, {Q: 1.5, K: 1.5}),
    "pattern": ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"attn.to_q": 4}}, {Q: 2.0, K: 1.0}),
    "whole path": ({"r": 2, "lora_alpha": 2, "alpha_pattern": {f"^{Q}$": 4, "^to_k": 9}}, {Q: 2.0, K: 1.0}),
    "part of a name": ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"o_q": 4}}, {Q: 1.0, K: 1.0}),
    "first of two": ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_k": 1, "attn.to_k": 4}}, {Q: 1.0, K: 0.5}),
    "rank": ({"r": 8, "lora_alpha": 4, "rank_pattern": {"to_q": 2, "to_k": 2}}, {Q: 2.0, K: 2.0}),
    "rslora": ({"r": 2, "lora_alpha": 2, "use_rslora": True}, {Q: 2**0.5, K: 2**0.5}),
    "peft's own numbers": ({"r": 2}, {Q: 4.0, K: 4.0}),
}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("kind", HEADERS)
def test_a_strength_in_the_header_is_read_as_peft_would(kind: str, prefix: str, tmp_path: Path) -> None:
    fields, scales = HEADERS[kind]
    header = {prefix + name: value for name, value in fields.items()} | {"text_encoder.lora_alpha": 99}
    save_file(good_tensors(), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    state = read_adapter(tmp_path / "a.safetensors")
    for path, scale in scales.items():
        assert state.layers[path].alpha / state.layers[path].rank == pytest.approx(scale)
    assert bool(state.notes) == (set(scales.values()) != {1.0})


def test_the_strength_of_the_header_is_the_one_that_diffusers_applies(tmp_path: Path) -> None:
    paths = [path for path in all_paths() if "norm" not in path]
    entry = {
        "transformer.r": 2,
        "transformer.lora_alpha": 3.0,
        "transformer.target_modules": sorted({path.split(".", 2)[2] for path in paths}),
        "transformer.rank_pattern": {"ff.net.2": 3, r"^transformer_blocks\.1\.attn\.to_q": 4},
        "transformer.alpha_pattern": {"attn.to_k": 5.0, "single_transformer_blocks.0.proj_out": 1.0},
    }
    ranks = {path: 3 if path.endswith("ff.net.2") else 2 for path in paths}
    ranks["transformer_blocks.1.attn.to_q"] = 4
    tensors = {}
    for path, one in state_of(ranks).layers.items():
        tensors[f"transformer.{path}.lora_A.weight"], tensors[f"transformer.{path}.lora_B.weight"] = (
            one.down_RI, one.up_OR,
        )  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(entry)})
    check_deltas(loaded_by_diffusers(tmp_path / "a.safetensors"), read_adapter(tmp_path / "a.safetensors"))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"transformer.r": 8, "transformer.lora_alpha": 16}, "has rank 2, but 8"),
    "regular expression": ({"transformer.r": 2, "transformer.alpha_pattern": {"(a+)+b": 4}}, "no module's name"),
    "no number": ({"transformer.r": 2, "transformer.lora_alpha": "2"}, "is no number"),
    "no rank": ({"transformer.r": 0, "transformer.lora_alpha": 2}, "is no rank"),
    "too large": ({"transformer.r": 2, "transformer.lora_alpha": 10**400}, "configuration"),
    "dora": ({"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": True}, "DoRA"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_header_that_makes_no_sense_is_refused(kind: str, tmp_path: Path) -> None:
    entry, message = CONTRADICTIONS[kind]
    save_file(good_tensors(), tmp_path / "cat.safetensors", {"lora_adapter_metadata": json.dumps(entry)})
    with pytest.raises(AdapterError, match="lora_adapter_metadata") as caught:
        read_adapter(tmp_path / "cat.safetensors")
    assert message in caught.value.message


def test_a_strength_that_is_given_twice_must_be_the_same(tmp_path: Path) -> None:
    tensors = good_tensors() | {f"transformer.{path}.alpha": torch.tensor(4.0) for path in (Q, K)}
    for alpha in (4, 5):
        entry = json.dumps({"transformer.r": 2, "transformer.lora_alpha": alpha})
        save_file(tensors, tmp_path / f"{alpha}.safetensors", {"lora_adapter_metadata": entry})
    state = read_adapter(tmp_path / "4.safetensors")
    assert {one.alpha for one in state.layers.values()} == {4.0}
    assert state.notes == ()
    with pytest.raises(AdapterError, match=r"scaled by 2 in the tensors and by 2\.5 in the header"):
        read_adapter(tmp_path / "5.safetensors")


def test_the_header_of_a_kohya_file_has_no_strength(tmp_path: Path) -> None:
    tensors = to_kohya(state_of({Q: 2}), torch.float32)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"transformer.lora_alpha": 99}'})
    assert read_adapter(tmp_path / "a.safetensors").layers[Q].alpha == 2


@pytest.mark.parametrize("header", ["[]", "{", "3"])
def test_a_damaged_peft_header_is_refused(header: str, tmp_path: Path) -> None:
    save_file(good_tensors(), tmp_path / "cat.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(AdapterError, match="lora_adapter_metadata"):
        read_adapter(tmp_path / "cat.safetensors")


def test_a_harmless_peft_header_is_read(tmp_path: Path) -> None:
    header = {
        "transformer.r": 8,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {},
        "transformer.use_rslora": False,
    }
    save_file(good_tensors(), tmp_path / "cat.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert read_adapter(tmp_path / "cat.safetensors").layers.keys() == {Q, K}


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "a.safetensors", state_of({Q: 2})
    one = state.layers[Q]
    too_large = AdapterState({Q: LoraLayer(one.down_RI * 1e9, one.up_OR, 1.0)})
    for args in (
        (state, "xlabs", torch.float32, {}),
        (state, "kohya", torch.int8, {}),
        (AdapterState({}), "kohya", torch.float32, {}),
        (state, "kohya", torch.float32, {"steps": 3}),
        (too_large, "kohya", torch.float16, {}),
        (too_large, "diffusers", torch.float16, {}),
    ):
        with pytest.raises(AdapterError):
            write_adapter(path, *args)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a", tmp_path / "folder"):
        with pytest.raises(StorageError) as caught:
            write_adapter(path, state_of({Q: 2}), "kohya", torch.float32, {})
        assert str(path) in caught.value.message
        assert caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("call", [("os.fsync",), (Path, "replace")])
def test_a_full_disk_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, ...]
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, state_of({Q: 2}), "kohya", torch.float32, {})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*call, full)
    with pytest.raises(StorageError, match="No space left"):
        write_adapter(path, state_of({K: 3}), "diffusers", torch.float32, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
