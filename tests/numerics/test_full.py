"""Full fine-tunes on flux-tiny: fused and plain, in bf16, stopped and resumed, in part, with a prior, and put back.

All on the CPU. "Exact" is bit by bit; elsewhere the tolerance says why it is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import (
    BF16,
    CPU,
    FP32,
    PRIOR,
    Run,
    assert_same_bits,
    changes,
    gap,
    tensors_of,
)
from accelerate.state import AcceleratorState
from torch import Tensor

from flux_ft.adapters import lora
from flux_ft.adapters.attached import attach_states
from flux_ft.adapters.jobs import open_model
from flux_ft.errors import ConfigError, NonFiniteError
from flux_ft.families.base import Family
from flux_ft.train import full as full_module
from flux_ft.train import loop, resume
from flux_ft.train import run as run_module
from flux_ft.train.loop import prior_drift
from flux_ft.train.optim import OPTIMIZERS, ROUNDINGS
from flux_ft.train.setup import fuses_backward

pytestmark = pytest.mark.usefixtures("on_cpu", "quick_collection")
Start = Callable[..., Run]
UNCLIPPED = {"max_grad_norm": None}
IN_BF16 = {"base_precision": "bf16"}


@pytest.fixture
def start_full(start: Start) -> Start:
    """`start` of a full fine-tune."""

    def begin(**overrides: Any) -> Run:
        return start(**{"finetune_type": "full", "learning_rate": 1e-4} | overrides)

    return begin


def moved(run: Run, base: dict[str, Tensor]) -> set[str]:
    """Names of weights of the whole model that are not as they were."""
    return {name for name, tensor in run.everything.items() if not torch.equal(tensor, base[name])}


def measured(run: Run) -> float:
    """The loss on some training pictures at fixed noise."""
    examples = [run.data.examples[index] for index in range(0, 10, 3)]
    return loop.validation_loss(run.state, run.family, run.config, examples)["validation_loss"]


# --- Moved in the backward pass, or after it. ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"full": {"train": "all"}, "prior": PRIOR},
        {"optim": {"name": "adafactor"}, "schedule": {"name": "cosine", "warmup_steps": 1}},
        {"memory": IN_BF16},
        {"memory": IN_BF16, "full": {"rounding": "kahan"}},
    ],
    ids=["blocks", "all with a prior", "adafactor", "bf16", "bf16 kahan"],
)
def test_fused_backward_changes_nothing(start_full: Start, settings: dict[str, Any]) -> None:
    """Exact, with clipping off; the prior's two forward passes share one backward pass."""
    optim, memory = UNCLIPPED | settings.get("optim", {}), settings.get("memory", {})
    fused = start_full(**settings | {"optim": optim})
    before = fused.everything
    plain = start_full(**settings | {"optim": optim, "memory": memory | {"fused_backward": False}})
    assert fused.state.updates.fused_backward
    assert not plain.state.updates.fused_backward
    assert_same_bits(plain.train().weights, fused.train().weights)
    assert fused.losses == plain.losses
    norms = [[result.grad_norm for result in run.results] for run in (fused, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5 if "memory" not in settings else 1e-2)
    assert moved(fused, before) >= {name for name, one in fused.state.trained.items() if one.ndim == 2}


def test_fused_backward_and_accumulation_learn_the_same(start_full: Start) -> None:
    """What three steps of four pictures change, in one pass or four. Sums in another order, and AdamW divides each
    gradient by its own size, so that where it is nearly zero its rounding error becomes a step: 1e-3 of the change."""
    whole = start_full(optim={"batch_size": 4, **UNCLIPPED})
    before = whole.weights
    whole.train()
    parts = start_full(optim={"batch_size": 1, "accumulate": 4, **UNCLIPPED}).train()
    other = start_full(optim={"batch_size": 4, **UNCLIPPED}, seed=4).train()
    assert whole.state.updates.fused_backward
    assert not parts.state.updates.fused_backward
    assert gap(changes(whole, before), changes(parts, before)) < 1e-3
    assert gap(changes(whole, before), changes(other, before)) > 0.1
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("split", [(1, 4), (2, 2)])
def test_accumulated_gradients_of_all_weights_are_the_batchs(
    start_full: Start, gradients: list[dict[str, Tensor]], everything: dict[str, Any], split: tuple[int, int]
) -> None:
    """In float64, so that the rounding of sums in another order does not show."""
    settings = {"iterations": 1, "full": {"train": "all"}, "memory": {"fused_backward": False}, **everything}
    results = []
    for batch_size, parts in ((4, 1), split):  # one after the other, since accelerate counts micro-steps for all
        run = start_full(**settings, optim={"batch_size": batch_size, "accumulate": parts, **UNCLIPPED})
        run.state.bare.double()
        results += run.train().results
    assert gradients[0].keys() == set(run.state.trained)
    assert gap(gradients[0], gradients[1]) < 1e-6
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-6)
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recompute_changes_nothing_in_a_fused_backward(start_full: Start, policy: str) -> None:
    """Exact: a block is run again before the first of its weights is moved."""
    kept = start_full(full={"train": "all"}).train()
    again = start_full(full={"train": "all"}, memory={"recompute": policy})
    assert again.state.bare.is_gradient_checkpointing
    assert_same_bits(kept.weights, again.train().weights)
    assert kept.losses == again.losses


def test_a_plain_backward_clips_all_gradients_together_and_a_fused_one_each_alone(start_full: Start) -> None:
    """Told by what AdamW keeps of its first step: a tenth of the gradient."""
    limit = 0.01
    firsts = {}
    for fused in (True, False):
        run = start_full(optim={"max_grad_norm": limit}, memory={"fused_backward": fused}, iterations=1).train()
        state = tensors_of(run.state.updates.state_dict()["state"])
        means = [one for key, one in state.items() if key.endswith("/exp_avg")]
        assert len(means) == len(run.state.trained)
        norms = torch.stack([one.norm() / 0.1 for one in means])
        assert run.results[0].grad_norm > 2 * limit
        firsts[fused] = norms
    assert float(firsts[False].norm()) == pytest.approx(limit, rel=1e-3)
    assert float(firsts[True].max()) == pytest.approx(limit, rel=1e-3)
    assert float(firsts[True].norm()) > 1.5 * limit


@pytest.mark.parametrize(
    ("config", "world", "fused"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"optim": {"accumulate": 2}}, 1, False),
        ({"memory": {"fused_backward": False}}, 1, False),
        ({"memory": {"fused_backward": True}}, 1, True),
        ({"memory": {"fused_backward": True}}, 2, False),
        ({"finetune_type": "lora"}, 1, False),
        ({"finetune_type": "lora", "memory": {"fused_backward": True}}, 1, False),
    ],
)
def test_where_the_backward_is_fused(
    run_settings: Callable[..., Any], tmp_path: Path, config: dict[str, Any], world: int, fused: bool
) -> None:
    assert fuses_backward(run_settings(tmp_path, **{"finetune_type": "full"} | config), world) is fused


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_no_number_moves_nothing(
    start_full: Start, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    run = start_full(memory={"fused_backward": fused})
    before = run.everything

    def odd(state: Any, *_: Any) -> Tensor:
        return torch.stack([one.sum() for one in state.trained.values()]).sum().expand(2) * torch.nan

    monkeypatch.setattr(loop, "flow_loss", odd)
    with pytest.raises(NonFiniteError, match="the loss of step 1"):
        run.train()
    assert moved(run, before) == set()


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_no_number_ends_the_run_unsaved(
    start_full: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fused: bool
) -> None:
    """A finite loss with an infinite gradient: a fused backward pass has used it by then."""
    inner = loop.flow_loss

    def odd(state: Any, *rest: Any) -> Tensor:
        loss = inner(state, *rest)
        if state.step == 1:
            weight = next(iter(state.trained.values()))
            loss = loss + (weight - weight.detach()).abs().sqrt().sum()  # zero, with a slope of infinity
        return loss

    run = start_full(memory={"fused_backward": fused})
    monkeypatch.setattr(loop, "flow_loss", odd)
    saved: list[int] = []
    with pytest.raises(NonFiniteError, match="the gradient of step 2"):
        run.train(save=lambda step, _: saved.append(step))
    assert saved == []
    assert len(run.results) == 1


# --- bf16. ---


@pytest.mark.parametrize(
    ("rounding", "name"), [*((rounding, "adamw") for rounding in ROUNDINGS), ("stochastic", "adafactor")]
)
def test_bf16_weights_learn(start_full: Start, rounding: str, name: str) -> None:
    run = start_full(memory=IN_BF16, full={"rounding": rounding}, optim={"name": name}, iterations=8)
    before, loss = run.precise, measured(run)
    run.train()
    assert {tensor.dtype for tensor in run.everything.values()} == {BF16}
    assert measured(run) < 0.95 * loss
    matrices = {key for key, tensor in before.items() if tensor.ndim == 2}
    found = {key for key, tensor in run.precise.items() if not torch.equal(tensor, before[key])}
    assert found >= (matrices if rounding == "stochastic" else set(before))


def test_the_runs_seed_keys_the_rounding(start_full: Start) -> None:
    """Equal weights and gradients: what differs is rounding's draws, and the same seed draws the same."""

    def moved(seed: int) -> list[Tensor]:
        state = start_full(seed=seed, memory={"base_precision": "bf16", "fused_backward": False}).state
        for parameter in state.trained.values():
            parameter.grad = torch.ones_like(parameter)
        state.updates.begin(0, 1e-4)
        state.updates.finish()
        return [parameter.detach().clone() for parameter in state.trained.values()]

    first, again, other = moved(3), moved(3), moved(4)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_small_steps_in_bf16_go_where_float32_goes(start_full: Start) -> None:
    """At 1e-6, where matrices of 0.1 lie 2^-11 apart: the length that bf16's change has along float32's. Only rounding
    to nearest, which is what the model's own weights are beside a remainder or a copy, loses nearly all of it."""
    settings: dict[str, Any] = {"learning_rate": 1e-6, "iterations": 8}
    wide = start_full(**settings)
    before = wide.precise
    wanted = changes(wide.train(), before)
    square = sum(float(one.square().sum()) for one in wanted.values())

    def share(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] * one).sum()) for name, one in wanted.items()) / square

    for rounding in ROUNDINGS:
        AcceleratorState._reset_state(reset_partial_state=True)  # it takes one precision a process
        run = start_full(**settings, memory=IN_BF16, full={"rounding": rounding})
        started = run.precise
        assert 0.97 < share(changes(run.train(), started)) < 1.03
        stored = {name: weight.double() - started[name].double() for name, weight in run.weights.items()}
        assert rounding == "stochastic" or abs(share(stored)) < 0.05


# --- Stopping and going on. ---

RESUMED: dict[str, dict[str, Any]] = {
    "fp32 adamw": {"full": {"train": "all"}},
    "fp32 adamw plain": {"memory": {"fused_backward": False}, "optim": {"name": "adamw"}},
    "bf16 stochastic adafactor": {"memory": IN_BF16, "optim": {"name": "adafactor"}},
    "bf16 kahan adamw8bit": {"memory": IN_BF16, "optim": {"name": "adamw8bit"}, "full": {"rounding": "kahan"}},
    "bf16 master adamw, average": {
        "memory": IN_BF16, "full": {"rounding": "master"}, "optim": {"ema_decay": 0.9, "ema_every": 2},
    },
    "prior, average": {"prior": PRIOR, "optim": {"ema_decay": 0.9, "ema_every": 1}},
    "bf16 prior": {"prior": PRIOR, "memory": IN_BF16},
    "accumulated": {"optim": {"batch_size": 1, "accumulate": 2}},
}  # fmt: skip


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_resumed_is_straight(start_full: Start, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Five steps at once; or three, and two more in the same process, or from files with all loaded anew. Exact."""
    if settings.get("optim", {}).get("name") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = {"iterations": 5, "schedule": {"name": "cosine", "warmup_steps": 2}, **settings}
    straight = start_full(**settings).train()
    first = start_full(**settings).train_until(3, tmp_path)
    torch.manual_seed(99)
    second = start_full(**settings, resume=tmp_path)
    assert second.state.step == 3
    assert_same_bits(first.weights, second.weights)
    assert_same_bits(first.precise, second.precise)
    assert set(first.state.kept_velocity) >= set(second.state.kept_velocity)
    for key, velocity in second.state.kept_velocity.items():
        assert torch.equal(velocity, first.state.kept_velocity[key])
    for run in (first, second):
        run.train()
        assert_same_bits(straight.weights, run.weights)
        assert_same_bits(straight.precise, run.precise)
        assert_same_bits(*(tensors_of(one.state.updates.state_dict()) for one in (straight, run)))
        if straight.state.average is not None:
            assert run.state.average is not None
            assert_same_bits(straight.state.average.weights, run.state.average.weights)
    assert first.losses == [*first.losses[:3], *second.losses] == straight.losses


def test_the_average_is_of_precise_weights_and_is_what_is_exported(start_full: Start) -> None:
    """Each step's float32 weights, averaged by a plain loop."""
    run = start_full(
        memory=IN_BF16, full={"rounding": "master"}, optim={"ema_decay": 0.6, "ema_every": 1}, iterations=4
    )
    expected = {name: weight.double() for name, weight in run.precise.items()}

    def note(result: loop.StepResult) -> None:
        kept = min(0.6, (1 + result.step) / (10 + result.step))
        for name, weight in run.precise.items():
            expected[name].mul_(kept).add_((1 - kept) * weight.double())

    last = run.train(log=note).precise
    average = run.state.average
    assert average is not None
    for name, one in average.weights.items():
        torch.testing.assert_close(one.double(), expected[name], rtol=0, atol=1e-6)
    assert gap(last, average.weights) > 1e-4
    tuned = full_module.tuned_weights(run.state)
    fresh = full_module.from_stored(
        [
            full_module.Stored(name, tuple(one.shape), "F32", lambda one=one: one)
            for name, one in (run.everything | average.weights).items()
        ],
        "expected",
    )
    for name, weight in tuned.weights.items():
        assert torch.equal(weight.read().float(), fresh.weights[name].read().float())
    full_module.use_average(run.state)
    assert_same_bits(run.weights, {name: one.bfloat16() for name, one in average.weights.items()})


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_extracted_is_as_precise_as_it_is_known(start_full: Start, rounding: str) -> None:
    run = start_full(memory=IN_BF16, full={"rounding": rounding, "train": [r".*\.to_out\.0\.weight"]}).train()
    tuned = full_module.tuned_weights(run.state).weights
    for block in range(2):
        weight = tuned[f"double_blocks.{block}.img_attn.proj.weight"].read().float()
        name = f"transformer_blocks.{block}.attn.to_out.0.weight"
        assert torch.equal(weight, run.precise[name])
        assert torch.equal(weight, run.everything[name].float()) == (rounding == "stochastic")


# --- Parts of the model. ---


@pytest.mark.parametrize(
    ("train", "belongs"),
    [
        ("all", lambda name: True),
        ("blocks", lambda name: name.startswith(("transformer_blocks.", "single_transformer_blocks."))),
        ("attention", lambda name: ".attn." in name),
        (
            [r"x_embedder\..*", r".*\.norm_[qk]\.weight"],
            lambda name: name.startswith("x_embedder.") or name.endswith((".norm_q.weight", ".norm_k.weight")),
        ),
        ([r"single_transformer_blocks\.1\..*"], lambda name: name.startswith("single_transformer_blocks.1.")),
    ],
    ids=["all", "blocks", "attention", "patterns", "one block"],
)  # fmt: skip
def test_exactly_the_named_part_is_trained(
    start_full: Start, tiny_family: Family, train: Any, belongs: Callable[[str], bool]
) -> None:
    base = dict(tiny_family.load_denoiser(CPU, FP32).named_parameters())
    wanted = [name for name in base if belongs(name)]
    run = start_full(full={"train": train}, optim={"weight_decay": 0.1})
    assert list(run.state.trained) == wanted
    assert {name for name, one in run.state.bare.named_parameters() if one.requires_grad} == set(wanted)
    assert 0 < len(wanted) < len(base) or train == "all"
    graded: set[str] = set()
    for name, parameter in run.state.bare.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: graded.add(name))
    run.train()
    assert graded == set(wanted)
    assert moved(run, base) == set(wanted)
    assert all(parameter.grad is None for parameter in run.state.bare.parameters())


@pytest.mark.parametrize("train", [["to_q"], [r".*\.attn\..*", "nothing"]])
def test_a_pattern_that_matches_no_weight_is_refused(start_full: Start, train: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        start_full(full={"train": train})
    assert repr(train[-1]) in caught.value.message
    assert "`full.train`" in caught.value.message
    assert "whole path" in (caught.value.hint or "")


# --- Prior preservation. ---


def test_the_kept_velocity_is_what_a_fresh_base_predicts(start_full: Start, start: Start) -> None:
    run = start_full(prior=PRIOR, iterations=4, optim={"batch_size": 1, "accumulate": 2}, learning_rate=1e-3)
    assert set(run.state.kept_velocity) == {(step, (slot,)) for step in range(4) for slot in range(2)}
    run.train()
    base = start(prior=PRIOR, iterations=4)  # a LoRA that changes nothing yet
    for (step, slots), kept in run.state.kept_velocity.items():
        batch, noise, sigma = loop.prior_batch(base.state, base.family, base.config, base.prior, step, slots)
        assert torch.equal(loop.predict(base.state, base.family, batch, noise, sigma), kept)
    assert len({float(one.sum()) for one in run.state.kept_velocity.values()}) == 8


def test_the_base_is_asked_for_the_steps_that_look_alone(start_full: Start) -> None:
    run = start_full(prior=PRIOR | {"every": 3}, iterations=7).train()
    assert {step for step, _ in run.state.kept_velocity} == {0, 3, 6}
    assert [one.prior_loss is not None for one in run.results] == [True, False, False, True, False, False, True]


def test_drift_of_a_full_fine_tune_is_its_distance_from_the_base(start_full: Start, start: Start) -> None:
    run = start_full(prior=PRIOR, learning_rate=1e-3)
    assert prior_drift(run.state, run.family, run.config, run.prior, (0, 1)).tolist() == [0.0, 0.0]
    run.train()
    assert run.results[0].prior_loss == 0.0
    base = start(prior=PRIOR)
    run.state.step = 2
    drift = prior_drift(run.state, run.family, run.config, run.prior, (0, 1))
    batch, noise, sigma = loop.prior_batch(base.state, base.family, base.config, base.prior, 2, (0, 1))
    ours, theirs = (loop.predict(one.state, run.family, batch, noise, sigma) for one in (run, base))
    torch.testing.assert_close(drift, (ours - theirs).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-9)
    assert float(drift.detach().min()) > 0


def test_a_prior_holds_its_prompts_in_place_in_a_full_fine_tune(start_full: Start) -> None:
    drifts = {}
    for weight in (0.01, 10.0):
        run = start_full(iterations=12, learning_rate=3e-5, prior=PRIOR | {"weight": weight}).train()
        with torch.no_grad():
            each = [
                prior_drift(run.state, run.family, run.config, run.prior, slots)
                for run.state.step, slots in run.state.kept_velocity
            ]
        drifts[weight] = float(torch.cat(each).mean())
    assert drifts[10.0] < 0.5 * drifts[0.01]


def test_without_a_prior_nothing_is_kept(start_full: Start, start: Start) -> None:
    assert start_full().state.kept_velocity == {}
    assert start_full(prior=PRIOR | {"weight": 0.0}).state.kept_velocity == {}
    assert start(prior=PRIOR).state.kept_velocity == {}, "a LoRA can be switched off and the base asked"


# --- The end of a run. ---


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_base_is_put_back_to_the_bit(start_full: Start, tiny_family: Family, dtype: torch.dtype) -> None:
    run = start_full(full={"train": "all"}, memory={"base_precision": "bf16" if dtype is BF16 else "fp32"}).train()
    base = dict(tiny_family.load_denoiser(CPU, dtype).named_parameters())
    assert moved(run, base)
    full_module.put_back(run.state, open_model("flux-tiny")[0])
    assert moved(run, base) == set()


def test_a_lora_of_full_rank_is_the_full_model(start_full: Start, start: Start) -> None:
    """Extracted at the largest rank and in float32, the LoRA holds all that attention has learned but its biases and
    norms, which the run leaves alone: 1e-4 of the change of predictions is what a float32 SVD leaves."""
    weights = [r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)\.weight"]
    run = start_full(full={"train": weights}, lora_rank=128).train()
    adapter, report = full_module.extract_lora(run.state, run.config)
    assert report.energy_kept > 1 - 1e-6
    layers = {path for path, layer in adapter.layers.items() if layer.up_OR.abs().max() > 0}
    assert layers == {name.removesuffix(".weight") for name in run.state.trained}
    base = start()
    batch, noise, sigma = loop.prior_batch(
        base.state, base.family, base.config, [run.data.examples[i] for i in range(3)], 0, (0,)
    )

    @torch.no_grad()
    def velocity(one: Run) -> Tensor:
        return loop.predict(one.state, one.family, batch, noise, sigma)

    tuned, untouched = velocity(run), velocity(base)
    full_module.put_back(run.state, open_model("flux-tiny")[0])
    attach_states(run.state.bare, [("extracted", adapter, 1.0)])
    assert float((velocity(run) - tuned).norm()) < 1e-4 * float((tuned - untouched).norm())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_model(start_full: Start, name: str) -> None:
    if OPTIMIZERS[name].requires is not None:
        pytest.importorskip(OPTIMIZERS[name].requires)
    run = start_full(optim={"name": name}, iterations=8)
    loss = measured(run)
    assert run.state.optimizer == name
    run.train()
    assert measured(run) < 0.95 * loss


# --- Space on the disk. ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": IN_BF16, "full": {"rounding": "kahan"}, "optim": {"name": "adamw8bit"}},
        {
            "memory": IN_BF16,
            "full": {"rounding": "master"},
            "optim": {"name": "adafactor", "ema_decay": 0.9, "ema_every": 1},
        },
        {"finetune_type": "lora", "lora_rank": 32},
    ],
    ids=["fp32 adamw", "kahan adamw8bit", "master adafactor average", "lora"],
)
def test_a_checkpoint_is_as_large_as_is_said_before(
    start_full: Start, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if settings.get("optim", {}).get("name") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    run = start_full(iterations=1, **settings)
    told = resume.checkpoint_bytes(run.state, run.config)
    run.train().save(tmp_path, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert size == pytest.approx(told, rel=0.04)


@pytest.mark.parametrize("settings", [{"export": {"keep_full": True, "dtype": "bf16"}}, {"finetune_type": "lora"}])
def test_exported_files_are_no_larger_than_is_said_before(start_full: Start, settings: dict[str, Any]) -> None:
    run = start_full(iterations=1, lora_rank=16, **settings).train()
    run.config.output_dir.mkdir()
    if run.config.finetune_type == "full":
        adapter = full_module.extract_lora(run.state, run.config)[0]
        full_module.keep_full(run.state, run.config, run.family.variant)
    else:
        adapter = lora.read_trained(run.state.bare)
    run_module.export(run.state, run.config, run.family, run.data, adapter, "2026-01-01T00:00:00+00:00")
    size = sum(path.stat().st_size for path in run.config.output_dir.glob("*.safetensors"))
    told = resume.export_bytes(run.state, run.config)
    assert 0.8 * told < size < 1.02 * told
