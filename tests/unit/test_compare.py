"""What two LoRAs do differently: numbers against ΔW that is formed, and verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _loras import block_paths, random_lora

from flux_ft.adapters.compare import Difference, Products, diff_files, diff_states, norm, products
from flux_ft.adapters.formats import delta_weight, write_adapter
from flux_ft.errors import AdapterError
from flux_ft.types import AdapterState, LoraLayer

Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


def scaled(state: AdapterState, factor: float) -> AdapterState:
    return AdapterState(
        {path: LoraLayer(one.down_RI, one.up_OR, one.alpha * factor) for path, one in state.layers.items()},
        layout=state.layout,
    )


def test_products_are_those_of_formed_deltas() -> None:
    a, b = random_lora(rank=3, seed=1), random_lora(rank=5, seed=2)
    for path in a.layers:
        first, second = delta_weight(a.layers[path]).double(), delta_weight(b.layers[path]).double()
        got = products(a.layers[path], b.layers[path])
        assert got is not None
        expected = [float((one * other).sum()) for one, other in ((first, first), (first, second), (second, second))]
        assert list(got) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert got.error == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-5)
        assert got.scale == pytest.approx(float((first * second).sum() / (first**2).sum()), rel=1e-4, abs=1e-5)
        assert got.error_at(2.0) == pytest.approx(float((second - 2 * first).norm() / (2 * first).norm()), rel=1e-5)
        assert norm(a.layers[path]) == pytest.approx(float(first.norm()), rel=1e-5)


def test_products_of_nothing() -> None:
    one = random_lora([Q]).layers[Q]
    assert products(None, None) == Products(0.0, 0.0, 0.0)
    alone = products(None, one)
    assert alone is not None
    assert (alone.aa, alone.ab, alone.error, alone.scale, alone.cosine) == (0.0, 0.0, float("inf"), None, None)
    assert products(one, LoraLayer(torch.ones(1, 3), torch.ones(3, 1), 1.0)) is None


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "same"), ("fp16", "rounding"), ("bf16", "rounding")])
def test_two_flavours_of_one_lora_are_the_same(dtype: str, kind: str, tmp_path: Path) -> None:
    state, types = random_lora(rank=5), {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    write_adapter(tmp_path / "a.safetensors", state, "kohya", torch.float32, {})
    write_adapter(tmp_path / "b.safetensors", state, "diffusers", types[dtype], {})
    found = diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.kind == kind
    assert kind == "same" or f"rounding in {dtype}" in found.verdict


@pytest.mark.parametrize("factor", [0.5, 4.0, -1.0, 0.9962])
def test_one_scale_everywhere_is_told(factor: float) -> None:
    """0.9962 is an alpha of 261 read as bf16: less than bf16's rounding, but no rounding."""
    state = random_lora()
    found = diff_states(state, scaled(state, factor))
    assert (found.kind, found.verdict) == ("scaled", f"b is {factor:g} × a")


def test_a_scale_is_seen_through_rounding(tmp_path: Path) -> None:
    state = random_lora()
    write_adapter(tmp_path / "b.safetensors", scaled(state, 0.5), "kohya", torch.bfloat16, {})
    write_adapter(tmp_path / "a.safetensors", state, "kohya", torch.float32, {})
    assert diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors").verdict == (
        "b is 0.5 × a, up to rounding in bf16"
    )


def test_scales_that_differ_are_no_one_scale() -> None:
    state = random_lora([Q, K])
    halved = {Q: scaled(state, 0.5).layers[Q], K: scaled(state, 0.25).layers[K]}
    assert diff_states(state, AdapterState(halved)).kind == "different"


def test_a_single_wrong_module_is_named() -> None:
    state = random_lora()
    one = state.layers[K]
    other = AdapterState({**state.layers, K: LoraLayer(one.down_RI.roll(1, 1), one.up_OR, one.alpha)})
    found = diff_states(state, other)
    assert found.kind == "different"
    assert f"1 of {len(state.layers)} modules differ" in found.verdict
    assert found.for_people().splitlines()[4].endswith(K)


def test_modules_of_one_side_are_listed() -> None:
    whole = random_lora()
    part = AdapterState({path: one for path, one in whole.layers.items() if path != K})
    assert diff_states(whole, part).only_a == (K,)
    assert diff_states(part, whole).only_b == (K,)
    assert "not in b" in diff_states(whole, part).for_people()


def test_an_untrained_module_is_as_good_as_none() -> None:
    whole = random_lora([Q, K])
    silent = LoraLayer(whole.layers[K].down_RI, torch.zeros_like(whole.layers[K].up_OR), 1.0)
    found = diff_states(AdapterState({Q: whole.layers[Q], K: silent}), AdapterState({Q: whole.layers[Q]}))
    assert (found.kind, found.only_a, found.only_b) == ("same", (), ())


@pytest.mark.parametrize(
    ("left", "right", "kind"), [(0.0, 0.0, "same"), (0.0, 1.0, "different"), (1.0, 0.0, "different")]
)
def test_a_lora_without_effect(left: float, right: float, kind: str) -> None:
    state = random_lora([Q])
    found = diff_states(scaled(state, left), scaled(state, right))
    assert found.kind == kind
    json.dumps(found.as_json(), allow_nan=False)


def test_numbers_beyond_all_bounds_are_null_in_json() -> None:
    state = random_lora([Q])
    found = diff_states(scaled(state, 1e200), scaled(state, 1e200))
    assert found.kind == "different", "nobody can tell"
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["norm_a"] is None
    found.for_people()


def test_other_shapes_are_another_model() -> None:
    found = diff_states(random_lora([Q]), random_lora([Q], width=24))
    assert found.kind == "different"
    assert "shapes differ" in found.verdict
    json.dumps(found.as_json(), allow_nan=False)


def test_header_entries_are_compared_but_not_hashes(tmp_path: Path) -> None:
    for name, metadata in (("a", {"modelspec.title": "cat", "ss_seed": "1"}), ("b", {"modelspec.title": "dog"})):
        write_adapter(tmp_path / f"{name}.safetensors", random_lora(seed=ord(name)), "kohya", torch.float32, metadata)
    found = diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [(one.key, one.a, one.b) for one in found.header] == [
        ("modelspec.title", "cat", "dog"), ("ss_seed", "1", None),
    ]  # fmt: skip
    assert found.as_json()["header"]["ss_seed"] == {"a": "1", "b": None}
    assert "modelspec.title: cat → dog" in found.for_people()


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_adapter(tmp_path / folder / "a.safetensors", random_lora([Q]), "kohya", torch.float32, {})
    found = diff_files(tmp_path / "one" / "a.safetensors", tmp_path / "two" / "a.safetensors")
    assert found.a != found.b


def test_a_broken_file_is_an_adapter_error(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_lora([Q]), "kohya", torch.float32, {})
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match=r"b\.safetensors"):
        diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_the_total_is_over_all_modules() -> None:
    a, b = random_lora(block_paths(), seed=1), random_lora(block_paths(), seed=2)
    found: Difference = diff_states(a, b)
    flat = [torch.cat([delta_weight(state.layers[path]).flatten() for path in a.layers]) for state in (a, b)]
    assert found.total.error == pytest.approx(float((flat[0] - flat[1]).norm() / flat[0].norm()), rel=1e-5)
    assert found.as_json()["norm_a"] == pytest.approx(float(flat[0].norm()), rel=1e-5)
