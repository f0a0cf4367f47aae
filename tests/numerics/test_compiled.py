"""Compiled blocks compute what the blocks compute, by every policy, for any number of sizes; and fail aloud."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _compiler import needs_compiler
from _runs import PRIOR, Run
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flux_ft.adapters import adapted, lora
from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.families import blocks
from flux_ft.train import compiled
from flux_ft.train.compiled import CompiledBlocks, is_worthwhile, keep_compiled, prepare_compile, why_not
from flux_ft.train.determinism import Mode
from flux_ft.train.fused_update import FusedUpdate
from flux_ft.train.optim import OPTIMIZERS, Updates
from flux_ft.train.recompute import Policy, apply_recompute

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
    "in_channels": 8,
}  # fmt: skip
NO_CODE = "aot_eager_decomp_partition"
"""Traces, differentiates and divides as inductor does, and leaves the operations to torch."""
ROUNDING = 1e-5
POLICIES: list[Policy] = ["none", "selective", "full"]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)  # which has a precision of its own


def make(full: bool = False, **shape: int) -> nn.Module:
    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(**{**SHAPE, **shape}).train().requires_grad_(full)
    if not full:
        paths = [path for path, one in model.named_modules() if isinstance(one, nn.Linear) and "blocks" in path]
        lora.attach_new(model, paths, 3, 3.0, 0.0, 0, adapted.TrainedLinear)
        blocks.fuse(model, adapted.together)
        adapted.prepare(model, blocks.same_input(model), torch.float32, join=True, in_place=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
    return model


def passed(model: nn.Module, side: int, batch: int = 1) -> Tensor:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(side))
    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(side * 1.0), torch.arange(side * 1.0))
    out: Tensor = model(
        hidden_states=draw(batch, side**2, 8), encoder_hidden_states=draw(batch, 6, 24),
        pooled_projections=draw(batch, 16), timestep=torch.full((batch,), 0.5), guidance=torch.ones(batch),
        img_ids=rows, txt_ids=torch.zeros(6, 3), return_dict=False,
    )[0]  # fmt: skip
    return out


def gradients(model: nn.Module, side: int, batch: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    out = passed(model, side, batch)
    out.square().mean().backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return {"": out.detach(), **found}


def assert_near(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        assert float((one - found[name]).norm()) <= ROUNDING * float(one.norm()), name


def with_blocks(model: Any, calls: CompiledBlocks) -> CompiledBlocks:
    model.enable_gradient_checkpointing(calls)
    return calls


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_on_is_off_and_many_sizes_take_two_compilations() -> None:
    model = make(num_layers=0)
    expected = {side: gradients(model, side) for side in (3, 4, 5, 6)}
    with_blocks(model, CompiledBlocks("none", required=True, backend=NO_CODE))
    for count, side in enumerate(expected):
        assert_near(expected[side], gradients(model, side))
        assert graphs() == (1 if count == 0 else 2)  # for this size; at the second, for any
    with_blocks(model, CompiledBlocks("full", required=True, backend=NO_CODE))
    for side in expected:
        assert_near(expected[side], gradients(model, side))
    assert graphs() == 2  # the same code
    assert not counters["graph_break"]


def test_selective_in_batches_too() -> None:
    model = make(num_layers=0)
    expected = {batch: gradients(model, 3, batch) for batch in (1, 2)}
    with_blocks(model, CompiledBlocks("selective", required=True, backend=NO_CODE))
    for count, batch in enumerate(expected):
        assert_near(expected[batch], gradients(model, 3, batch))
        assert graphs() == count + 1


def test_what_trains_nothing_runs_uncompiled() -> None:
    model = make().eval()
    with torch.no_grad():
        expected = passed(model, 3)
        with_blocks(model, CompiledBlocks("none", required=True, backend=NO_CODE))
        assert torch.equal(passed(model, 3), expected)
        with lora.detached(model):
            passed(model, 4)
    assert graphs() == 0


def kept_bytes(model: nn.Module) -> int:
    parameters = {one.data_ptr() for one in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(one: Tensor) -> Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = one
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        out = passed(model, 12)
    out.sum().backward()
    return sum(one.untyped_storage().nbytes() for one in kept.values())


def test_selective_keeps_about_half_of_none() -> None:
    kept = {}
    for policy in POLICIES[:2]:
        torch.compiler.reset()
        model = make(num_layers=0)
        with_blocks(model, CompiledBlocks(policy, required=True, backend=NO_CODE))
        kept_bytes(model)  # compiles, and tries
        kept[policy] = kept_bytes(model)
    plain = kept_bytes(make(num_layers=0))
    assert kept["selective"] < 0.65 * kept["none"]
    assert kept["none"] < 1.1 * plain  # so the plan, which knows no compiler, holds


def test_a_run_of_two_sizes_takes_two_compilations_a_kind(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"finetune_type": "lora", "iterations": 4, "memory": {"recompute": "full"}, "prior": PRIOR}
    monkeypatch.setattr(compiled, "CompiledBlocks", functools.partial(CompiledBlocks, backend=NO_CODE))
    monkeypatch.setattr(compiled, "keep_compiled", lambda: None)
    runs = []
    for choice in ("off", "blocks"):
        runs.append(start(**chosen, speed={"compile": choice}).stir().train())
    sizes = {row.bucket for row in runs[0].data.examples.rows}
    assert len(sizes) == 2
    assert runs[0].state.kernels == {}
    assert runs[1].state.kernels == {"compiled": "blocks"}
    assert graphs() == 4
    for off, on in zip(runs[0].losses, runs[1].losses, strict=True):
        assert abs(on - off) <= 1e-4 * off


def test_a_full_fine_tune_in_bf16_compiles_its_update_too(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {
        "finetune_type": "full", "iterations": 3, "memory": {"base_precision": "bf16"},
        "optim": {"name": "adafactor"}, "data": {"resample_latents": False},
    }  # fmt: skip
    monkeypatch.setattr(compiled, "CompiledBlocks", functools.partial(CompiledBlocks, backend=NO_CODE))
    monkeypatch.setattr(compiled, "FusedUpdate", lambda backend: FusedUpdate(backend and NO_CODE))
    monkeypatch.setattr(compiled, "keep_compiled", lambda: None)
    off, on = (start(**chosen, speed={"compile": choice}).train() for choice in ("off", "blocks"))
    assert on.state.kernels == {"compiled": "blocks", "compiled update": "adafactor"}
    for one, other in zip(off.losses, on.losses, strict=True):
        assert abs(other - one) <= 2e-2 * one


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS["adafactor"].make(parameters, 1e-3, RunConfig(data=".").optim)


def test_a_full_fine_tune_that_moves_weights_in_the_backward_pass() -> None:
    moved = []
    for one in (None, CompiledBlocks("none", required=True, backend=NO_CODE)):
        model = make(full=True)
        if one is not None:
            with_blocks(model, one)
        trained = dict(model.named_parameters())
        updates = Updates(trained, adafactor, fused_backward=True)
        for step in range(2):
            updates.begin(step, 1e-3)
            passed(model, 3).square().mean().backward()
            updates.finish()
        moved.append({name: one.detach().clone() for name, one in trained.items()})
    assert graphs() == 2
    assert_near(*moved)


def broken(graph: Any, inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("no compiler here\nand much more")


def wrong(graph: Any, inputs: Any) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        return tuple(1.01 * one if one.is_floating_point() else one for one in graph(*given))

    return run


@pytest.mark.parametrize(
    ("policy", "backend", "why"),
    [
        ("none", broken, "no compiler here"), ("selective", broken, "no compiler here"),
        ("full", broken, "no compiler here"), ("full", wrong, "FluxSingleTransformerBlock is 2.0% off, 0.1% are"),
    ],
)  # fmt: skip
def test_what_fails_or_is_wrong_ends_it_aloud_and_the_run_goes_on(
    policy: Policy, backend: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(num_layers=0)
    apply_recompute(model, policy)
    expected = gradients(model, 3)
    ended = with_blocks(model, CompiledBlocks(policy, backend=backend))
    assert_near(expected, gradients(model, 3))
    assert ended.given_up
    told = capsys.readouterr().err
    assert told.count("warning: the blocks are not compiled") == 1
    assert why in told
    assert "much more" not in told


@pytest.mark.parametrize("backend", [broken, wrong])
def test_what_was_asked_for_and_fails_is_an_error(backend: Any) -> None:
    model = make()
    with_blocks(model, CompiledBlocks("none", required=True, backend=backend))
    with pytest.raises(ConfigError, match=r"speed\.compile` does not work here: "):
        passed(model, 3)


def config(choice: str = "auto", **more: Any) -> RunConfig:
    return RunConfig.model_validate({"data": ".", "speed": {"compile": choice}, "finetune_type": "lora", **more})


@pytest.mark.parametrize(
    ("choice", "more", "policy", "device", "mode", "options", "why"),
    [
        ("blocks", {}, "none", GPU, "strict", {}, "determinism: strict"),
        ("blocks", {}, "none", CPU, "strict", {}, None),
        ("blocks", {}, "full", CPU, "fast", {"streams": True}, "streamed"),
        ("blocks", {}, "full", CPU, "fast", {"shards": 2}, "shards"),
        ("graphs", {}, "none", CPU, "fast", {}, "need a GPU"),
        ("graphs", {}, "none", GPU, "fast", {}, None),
        ("graphs", {}, "full", GPU, "fast", {}, "memory.recompute: full"),
        ("graphs", {"optim": {"accumulate": 2}}, "none", GPU, "fast", {}, "accumulate"),
        ("graphs", {"prior": {"prompts": ["a dog"]}}, "none", GPU, "fast", {}, "prior"),
    ],
)
def test_what_cannot_be_compiled(
    choice: str, more: dict[str, Any], policy: Policy, device: torch.device, mode: Mode, options: dict[str, Any],
    why: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(compiled, "_lacks_compiler", lambda _: None)
    found = why_not(config(choice, **more), policy, device, mode, **options)
    assert found is None if why is None else why in (found or "")


def test_a_machine_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    assert "triton" in (why_not(config(), "none", GPU, "fast") or "")
    monkeypatch.setattr(compiled.sys, "platform", "linux")
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    assert "C compiler" in (why_not(config(), "none", CPU, "fast") or "")


def test_auto_compiles_large_models_in_long_runs_on_one_gpu() -> None:
    assert is_worthwhile(300, 12 * 10**9, GPU, 1)
    assert not is_worthwhile(50, 12 * 10**9, GPU, 1)
    assert not is_worthwhile(300, 10**6, GPU, 1)
    assert not is_worthwhile(300, 12 * 10**9, GPU, 2)
    assert not is_worthwhile(300, 12 * 10**9, CPU, 1)


def test_a_cpu_is_left_alone_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUX_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "keep_compiled", lambda: None)
    model: Any = make()
    for choice in ("auto", "off"):
        assert prepare_compile(model, config(choice), "none", CPU, "strict") == {}
    assert not model.is_gradient_checkpointing
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"speed\.compile: graphs` cannot be done here: .* GPU"):
        prepare_compile(model, config("graphs"), "none", CPU, "strict")
    assert prepare_compile(model, config("blocks"), "none", CPU, "strict") == {"compiled": "blocks"}
    assert isinstance(model._gradient_checkpointing_func, CompiledBlocks)


def test_what_is_compiled_is_kept_where_the_user_wishes_or_in_our_cache(tmp_path: Path) -> None:
    environment = {"FLUX_FT_CACHE": str(tmp_path), "TRITON_CACHE_DIR": "mine"}
    keep_compiled(environment)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    assert environment["TRITON_CACHE_DIR"] == "mine"
    (tmp_path / "file").write_text("")
    unwritable = {"FLUX_FT_CACHE": str(tmp_path / "file")}
    keep_compiled(unwritable)
    assert unwritable == {"FLUX_FT_CACHE": str(tmp_path / "file")}


@needs_compiler
def test_inductor_gives_the_same_within_rounding_with_the_same_draws_and_keeps_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled._lacks_compiler(CPU):
        pytest.skip("no C compiler")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLUX_FT_CACHE", str(tmp_path))
    model = make(num_layers=0)
    for path, layer in lora.layers_of(model, lora.TRAINED):
        if path.endswith("proj_mlp"):
            layer.lora_dropout[lora.TRAINED] = nn.Dropout(0.5)
    expected = gradients(model, 3)
    assert prepare_compile(model, config("blocks"), "selective", CPU, "strict") == {"compiled": "blocks"}
    assert_near(expected, gradients(model, 3))
    assert graphs() == 1
    assert any((tmp_path / "compiled").rglob("*.cpp"))
