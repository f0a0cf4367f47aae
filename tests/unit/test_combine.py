"""Several LoRAs in one file: the sum of their ΔW, against ΔW that is formed; ranks; headers; refusals."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _loras import block_paths, random_lora

from flux_ft.adapters.combine import combine_files, combined
from flux_ft.adapters.compare import diff_files
from flux_ft.adapters.formats import delta_weight, fuse, read_adapter, write_adapter
from flux_ft.adapters.inspect import inspect_file
from flux_ft.errors import AdapterError, ConfigError
from flux_ft.types import AdapterState, AppliedAdapter

Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
OUT = "transformer_blocks.0.attn.to_out.0"


def saved(folder: Path, states: Sequence[AdapterState], formats: Sequence[str] = ("kohya", "diffusers")) -> list[Path]:
    paths = [folder / f"{chr(97 + index)}.safetensors" for index in range(len(states))]
    for index, (path, state) in enumerate(zip(paths, states, strict=True)):
        write_adapter(path, state, formats[index % len(formats)], torch.float32, state.metadata)
    return paths


def applied(paths: Sequence[Path], strengths: Sequence[float]) -> list[AppliedAdapter]:
    return [AppliedAdapter(path, strength) for path, strength in zip(paths, strengths, strict=True)]


def with_shared_down(state: AdapterState, paths: Sequence[str] = (Q, K, V)) -> AdapterState:
    """One `down` for these, as training on the fused matrix gives."""
    down_RI = state.layers[paths[0]].down_RI
    return replace(state, layers=state.layers | {path: replace(state.layers[path], down_RI=down_RI) for path in paths})


def worst_against_formed(got: AdapterState, states: Sequence[AdapterState], strengths: Sequence[float]) -> float:
    errors = []
    for path in {path for state in states for path in state.layers}:
        terms = [
            s * delta_weight(one.layers[path]) for one, s in zip(states, strengths, strict=True) if path in one.layers
        ]
        expected = torch.stack(terms).sum(0)
        errors.append(float((delta_weight(got.layers[path]) - expected).norm() / expected.norm()))
    assert got.layers.keys() == {path for state in states for path in state.layers}
    return max(errors)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("layout", ["flux1", "flux2"])
def test_the_file_is_the_weighted_sum(layout: str, format: str, tmp_path: Path) -> None:
    half = block_paths(layout)[::2]
    states = [
        random_lora(None, 3, 5.0, layout=layout, seed=1),
        random_lora(half, lambda path: 1 + len(path) % 4, 2.0, layout=layout, seed=2),
        random_lora(block_paths(layout, [1], [2]), 2, 2.0, layout=layout, seed=3),
    ]
    strengths = [1.0, -0.5, 0.75]
    found = combine_files(
        applied(saved(tmp_path, states), strengths), tmp_path / "o.safetensors", format=format, dtype="fp32"
    )
    got = read_adapter(found.output)
    assert got.layout == layout
    assert worst_against_formed(got, states, strengths) <= 1e-6
    assert (found.error, found.worst_error) == (0.0, 0.0)
    assert found.rounding_error <= 1e-6


def test_one_lora_at_full_strength_stays_itself(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, [random_lora(rank=5)])
    combine_files([AppliedAdapter(path)], tmp_path / "o.safetensors", dtype="fp32")
    assert diff_files(path, tmp_path / "o.safetensors").kind == "same"


@pytest.mark.parametrize(
    ("shared", "rank"),
    [((False, False), 3 * (2 + 4)), ((True, True), 2 + 4), ((True, False), 2 + 3 * 4), ((False, True), 3 * 2 + 4)],
)
def test_fused_ranks_add_up_and_shared_factors_stay_shared(shared: tuple[bool, bool], rank: int) -> None:
    states = [random_lora([Q, K, V], ranks, seed=ranks) for ranks in (2, 4)]
    states = [with_shared_down(one) if share else one for one, share in zip(states, shared, strict=True)]
    total = combined([("a", states[0], 1.0), ("b", states[1], 0.5)]).state
    assert fuse(total)["double_blocks.0.img_attn.qkv"].rank == rank
    assert worst_against_formed(total, states, [1.0, 0.5]) <= 1e-6


def test_a_shared_factor_is_kept_where_the_other_lora_lacks_a_part() -> None:
    states = [
        with_shared_down(random_lora([Q, K, V], 2, seed=1)),
        with_shared_down(random_lora([Q, V], 4, seed=2), (Q, V)),
    ]
    total = combined([("a", states[0], 1.0), ("b", states[1], 1.0)]).state
    assert fuse(total)["double_blocks.0.img_attn.qkv"].rank == 6
    assert worst_against_formed(total, states, [1.0, 1.0]) <= 1e-6


def test_split_ranks_add_up() -> None:
    states = [with_shared_down(random_lora([Q, K, V], 2, seed=1)), random_lora([Q, K, V], 4, seed=2)]
    total = combined([("a", states[0], 1.0), ("b", states[1], 1.0)], fused=False).state
    assert {layer.rank for layer in total.layers.values()} == {6}


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_reduction_keeps_the_rank_and_tells_its_error(format: str, tmp_path: Path) -> None:
    states = [random_lora(None, 6, seed=1), random_lora(None, 6, seed=2)]
    found = combine_files(
        applied(saved(tmp_path, states), [1.0, 0.3]), tmp_path / "o.safetensors", 7, format=format, dtype="fp32"
    )
    got = read_adapter(found.output)
    assert (found.rank, found.sum_rank) == (7, 12 if format == "diffusers" else 48)
    squares = []
    for path in states[0].layers:
        expected = delta_weight(states[0].layers[path]) + 0.3 * delta_weight(states[1].layers[path])
        squares.append((float((delta_weight(got.layers[path]) - expected).norm() ** 2), float(expected.norm() ** 2)))
    assert found.error == pytest.approx(
        (sum(gap for gap, _ in squares) / sum(size for _, size in squares)) ** 0.5, rel=1e-3
    )
    assert found.worst_error == pytest.approx(max((gap / size) ** 0.5 for gap, size in squares), rel=1e-3)
    assert 0 < found.error < 1
    assert "reduced from rank" in found.for_people()


def test_a_reduction_to_the_true_rank_loses_nothing(tmp_path: Path) -> None:
    """The same LoRA twice has the rank of one."""
    paths = saved(tmp_path, [random_lora([OUT], 5)] * 2)
    found = combine_files(applied(paths, [0.5, 0.5]), tmp_path / "o.safetensors", 5, dtype="fp32")
    assert (found.rank, found.sum_rank) == (5, 10)
    assert found.error <= 1e-6
    assert diff_files(paths[0], tmp_path / "o.safetensors").kind in ("same", "rounding")


def test_a_reduction_may_leave_a_trace_where_nothing_was(tmp_path: Path) -> None:
    """One part of a fused matrix does nothing; the directions of the others reach into its rows by rounding."""
    state = random_lora([Q, K, V], 3)
    silent = replace(state.layers[K], up_OR=torch.zeros_like(state.layers[K].up_OR))
    paths = saved(tmp_path, [with_shared_down(replace(state, layers=state.layers | {K: silent}))])
    found = combine_files(applied(paths, [1.0]), tmp_path / "o.safetensors", 2, dtype="fp32")
    assert 0 < found.error <= found.worst_error < 1.5


def test_the_error_is_relative_to_all_modules_also_those_that_were_small_enough(tmp_path: Path) -> None:
    state = random_lora([Q, OUT], lambda path: 2 if path == OUT else 8)
    found = combine_files(applied(saved(tmp_path, [state]), [1.0]), tmp_path / "o.safetensors", 4, dtype="fp32")
    got = read_adapter(found.output)
    deltas = [[delta_weight(one.layers[path]) for path in (Q, OUT)] for one in (state, got)]
    gap = sum(float((first - second).norm() ** 2) for first, second in zip(*deltas, strict=True))
    assert found.error == pytest.approx((gap / sum(float(one.norm() ** 2) for one in deltas[0])) ** 0.5, rel=1e-3)


def test_untrained_loras_combine_at_any_rank(tmp_path: Path) -> None:
    state = random_lora([Q, OUT], 4)
    fresh = {path: replace(one, up_OR=torch.zeros_like(one.up_OR)) for path, one in state.layers.items()}
    paths = saved(tmp_path, [replace(state, layers=fresh)] * 2)
    found = combine_files(applied(paths, [1.0, 1.0]), tmp_path / "o.safetensors", 2)
    assert (found.error, diff_files(paths[0], found.output).kind) == (0.0, "same")


def test_a_large_rank_reduces_nothing(tmp_path: Path) -> None:
    paths = saved(tmp_path, [random_lora([OUT], 3), random_lora([OUT], 4, seed=1)])
    found = combine_files(applied(paths, [1.0, 1.0]), tmp_path / "o.safetensors", 64)
    assert (found.rank, found.error) == (7, 0.0)


def test_strength_zero_leaves_a_lora_out(tmp_path: Path) -> None:
    paths = saved(tmp_path, [random_lora([OUT], 3), random_lora([OUT], 4, seed=1)])
    found = combine_files(applied(paths, [1.0, 0.0]), tmp_path / "o.safetensors", dtype="fp32")
    assert found.rank == 3
    assert diff_files(paths[0], found.output).kind == "same"


# --- The header. ---

SAID = {
    "modelspec.architecture": "flux-1-dev/lora", "modelspec.license": "FLUX.1 [dev] Non-Commercial License",
    "modelspec.resolution": "1024x1024", "ss_sd_model_name": "flux1-dev", "ss_learning_rate": "1e-4",
    "ss_steps": "900", "ss_num_train_images": "12", "ss_dataset_dirs": "{}", "modelspec.thumbnail": "data:,",
    "ss_output_name": "x", "lora_adapter_metadata": "{}",
}  # fmt: skip


def test_the_header_is_true_of_the_sum(tmp_path: Path) -> None:
    cat = SAID | {"modelspec.title": "Cat, the", "modelspec.trigger_phrase": "sks cat", "modelspec.author": "Ann"}
    dog = SAID | {"ss_tag_frequency": json.dumps({"1_zwx": {"zwx dog": 9}})}
    states = [random_lora([Q], metadata=cat), random_lora([Q], 2, metadata=dog, seed=1)]
    noon = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)
    combine_files(applied(saved(tmp_path, states), [1.0, 0.5]), tmp_path / "both.safetensors", now=lambda: noon)
    got = read_adapter(tmp_path / "both.safetensors").metadata
    assert got["modelspec.title"] == got["ss_output_name"] == "both"
    assert got["modelspec.architecture"] == "flux-1-dev/lora"
    assert got["modelspec.merged_from"] == "Cat the, b"
    assert got["modelspec.trigger_phrase"] == "sks cat, zwx dog"
    assert json.loads(got["ss_tag_frequency"]) == {"1_sks cat": {"sks cat": 1, "zwx dog": 1}}
    assert got["modelspec.license"] == SAID["modelspec.license"]
    assert got["modelspec.author"] == "Ann"
    assert got["modelspec.date"] == "2026-05-01T12:00:00+00:00"
    assert got["ss_sd_model_name"] == "flux1-dev"
    assert got["ss_network_dim"] == "6"
    left = {"ss_learning_rate", "ss_steps", "ss_num_train_images", "ss_dataset_dirs", "modelspec.thumbnail"}
    assert not left & got.keys()
    ours = json.loads(got["flux_ft.export"])
    assert ours["combined"] == [{"title": "Cat the", "strength": 1.0}, {"title": "b", "strength": 0.5}]
    assert (ours["rank"], ours["flavour"]) == (6, "kohya")
    assert inspect_file(tmp_path / "both.safetensors").hashes.sshs_model_hash is True


def test_what_the_parts_do_not_share_is_not_claimed(tmp_path: Path) -> None:
    other = SAID | {"modelspec.architecture": "flux-1-schnell/lora", "modelspec.license": "Apache-2.0"}
    other |= {"ss_sd_model_name": "flux1-schnell", "modelspec.resolution": "512x512"}
    states = [random_lora([Q], width=3072, metadata=SAID), random_lora([Q], width=3072, metadata=other)]
    combine_files(applied(saved(tmp_path, states), [1.0, 1.0]), tmp_path / "o.safetensors")
    got = read_adapter(tmp_path / "o.safetensors").metadata
    assert got["modelspec.architecture"] == "flux-1/lora"
    assert got["modelspec.license"] == "FLUX.1 [dev] Non-Commercial License; Apache-2.0"
    assert not {"ss_sd_model_name", "modelspec.resolution", "modelspec.trigger_phrase"} & got.keys()


def test_no_path_gets_into_the_header(tmp_path: Path) -> None:
    metadata = {"modelspec.title": "/data/loras/cat", "ss_sd_model_name": "C:\\models\\flux1-dev.safetensors"}
    paths = saved(tmp_path, [random_lora([Q], metadata=metadata)])
    combine_files(applied(paths, [1.0]), tmp_path / "o.safetensors", title="cat again")
    got = read_adapter(tmp_path / "o.safetensors").metadata
    assert (got["modelspec.merged_from"], got["ss_sd_model_name"]) == ("cat", "flux1-dev.safetensors")
    assert not [key for key, value in got.items() if re.search(r"tmp|data/|\\", value)]


# --- Refusals. ---


def test_different_models_are_refused(tmp_path: Path) -> None:
    flux1, flux2, wide = random_lora(), random_lora(layout="flux2"), random_lora([Q], width=24)
    with pytest.raises(AdapterError, match=r"a is for FLUX\.1, b for FLUX\.2"):
        combine_files(applied(saved(tmp_path, [flux1, flux2]), [1, 1]), tmp_path / "o.safetensors")
    with pytest.raises(AdapterError, match=r"to_q` is 24×24 in b, 16×16 in a"):
        combine_files(applied(saved(tmp_path, [flux1, wide]), [1, 1]), tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_control_loras_are_refused() -> None:
    state = replace(random_lora([Q]), extras={"transformer_blocks.0.attn.norm_q.weight": torch.ones(8)})
    with pytest.raises(AdapterError, match="norm_q"):
        combined([("a", state, 1.0)])


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, [random_lora([Q])])
    one, output = [AppliedAdapter(path)], tmp_path / "o.safetensors"
    with pytest.raises(ConfigError, match="does not end"):
        combine_files(one, tmp_path / "o.pt")
    with pytest.raises(ConfigError, match="exists"):
        combine_files(one, path)
    with pytest.raises(ConfigError, match="xlabs"):
        combine_files(one, output, format="xlabs")
    with pytest.raises(ConfigError, match="fp8"):
        combine_files(one, output, dtype="fp8")
    with pytest.raises(ConfigError, match="rank 0"):
        combine_files(one, output, 0)
    with pytest.raises(AdapterError, match="nothing to combine"):
        combine_files([], output)
    with pytest.raises(AdapterError, match="nothing to combine"):
        combine_files([AppliedAdapter(path, 0.0)], output)
    with pytest.raises(AdapterError, match="nan"):
        combine_files([AppliedAdapter(path, float("nan"))], output)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_loras_that_cancel_out_are_refused(tmp_path: Path) -> None:
    paths = saved(tmp_path, [random_lora([OUT], 3)] * 2)
    with pytest.raises(AdapterError, match="cancel"):
        combine_files(applied(paths, [1.0, -1.0]), tmp_path / "o.safetensors", dtype="fp32")


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_small_difference_of_two_large_loras_survives_rounding(format: str, tmp_path: Path) -> None:
    """As when one version of a LoRA is taken from another: bf16 of their own factors would leave noise alone."""
    first = random_lora([Q, K, OUT], 4, seed=1)
    second = {path: replace(one, up_OR=one.up_OR * 1.001) for path, one in first.layers.items() if path != OUT}
    states = [first, replace(first, layers=second | {OUT: first.layers[OUT]})]
    found = combine_files(applied(saved(tmp_path, states), [-1.0, 1.0]), tmp_path / "o.safetensors", format=format)
    got = read_adapter(found.output)
    assert got.layers.keys() == {Q, K}
    for path in (Q, K):
        expected = delta_weight(states[1].layers[path]).double() - delta_weight(first.layers[path]).double()
        assert float((delta_weight(got.layers[path]) - expected).norm() / expected.norm()) <= 1e-2


def test_the_result_is_valid_json(tmp_path: Path) -> None:
    paths = saved(tmp_path, [random_lora([OUT], 3)])
    found = combine_files(applied(paths, [1.0]), tmp_path / "o.safetensors")
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["parts"] == [{"name": "a", "strength": 1.0}]
    assert told["size_bytes"] == found.output.stat().st_size
