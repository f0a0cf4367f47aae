"""The plan of a run at FLUX.1-dev's full size, against formulas; and what is told of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _estimator import full_size
from _random_flux import NARROW, SMALL
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from typer.testing import CliRunner

from flux_ft.bench.infer import RandomFlux1
from flux_ft.cli import app
from flux_ft.config import RunConfig
from flux_ft.errors import ModelError
from flux_ft.families.registry import FLUX1_DEV
from flux_ft.runfile import load_run
from flux_ft.train import estimate, fitting
from flux_ft.train.estimate import Estimate, Estimator
from flux_ft.train.fitting import Alternative, changed, choose
from flux_ft.train.planning import card_room, make_plan

ROOT = Path(__file__).parents[2]
TOKENS, WIDTH, BLOCKS = 512 + 64**2, 3072, 57


def config_of(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"data": "pictures", "finetune_type": "lora", "lora_rank": 16, **settings})


def needs(**settings: Any) -> Estimate:
    return full_size().estimate(config_of(**settings), 1024)


def recipes_table(names: Sequence[str]) -> str:
    """What the recipes need, by `flux-ft plan`: on the card that a name tells, else with no block streamed."""
    lines = ["| recipe | GPU | recompute, optimizer | host | disk | TFLOP a step |", "|---|---|---|---|---|---|"]
    for name in names:
        config = load_run(ROOT / "configs" / name, ()).config
        if card := re.search(r"_(\d+)gb\.", name):
            config = choose(full_size(), config, card_room(int(card[1]))).config
        one = full_size().estimate(config)
        streamed = f", {one.streamed} streamed" if one.streamed else ""
        lines.append(
            f"| `{name}` | {one.needs / 1e9:.1f} GB | {one.recompute}{streamed}, {one.optimizer} | "
            f"{one.host_needs / 1e9:.0f} GB | "
            f"{sum(one.disk.values()) / 1e9:.0f} GB | {one.flops / 1e12:.0f} |"
        )
    return "\n".join(lines)


def test_the_docs_table_is_what_plan_says() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+\.yaml)`", text, flags=re.MULTILINE)
    assert len(names) >= 4
    assert recipes_table(names) in text


def test_operations_of_a_lora_step_follow_the_formula() -> None:
    """Forward and input gradients are two linear passes, and attention's backward pass is 2.5 forwards.

    Blocks multiply each token with 12 · d² numbers. A LoRA of rank 16 adds some 1 %.
    """
    linear, attention = 2 * TOKENS * BLOCKS * 12 * WIDTH**2, 4 * TOKENS**2 * WIDTH * BLOCKS
    none, full = (needs(memory={"recompute": one}).flops for one in ("none", "full"))
    assert none == pytest.approx(2 * linear + 3.5 * attention, rel=0.02)
    assert full == pytest.approx(3 * linear + 4.5 * attention, rel=0.02)
    assert needs(memory={"recompute": "selective"}).flops == pytest.approx(none, rel=0.01)


def test_a_step_at_full_size_holds_what_it_must() -> None:
    one = needs(memory={"recompute": "full"})
    weights, block_inputs = 2 * 11_901_408_320, BLOCKS * TOKENS * WIDTH * 2
    assert one.device["weights as stored"] == weights
    assert one.device["optimizer state"] == 8 / 6 * one.device["trained copies"]  # of each number, 4 bytes and 2
    assert one.device["activations"] == pytest.approx(block_inputs, rel=0.05)
    assert one.host["weights while loading"] < 0.3e9  # one weight at a time
    selective, none = (needs(memory={"recompute": kind}) for kind in ("selective", "none"))
    assert one.training < selective.training < none.training
    assert selective.device["activations"] > 8 * block_inputs
    four = needs(memory={"recompute": "full"}, optim={"batch_size": 4})
    assert four.device["activations"] == pytest.approx(4 * one.device["activations"], rel=0.02)
    assert four.flops == pytest.approx(4 * one.flops, rel=0.01)


def test_a_prior_that_is_looked_at_in_some_steps_takes_as_much_less_time() -> None:
    plain, each, some = (
        needs(memory={"recompute": "full"}, prior=prior).flops
        for prior in ({}, {"prompts": ["a cat"]}, {"prompts": ["a cat"], "every": 4})
    )
    assert each > 1.9 * plain
    assert some == pytest.approx(plain + (each - plain) / 4)


def test_auto_is_resolved_as_training_does() -> None:
    lora, full = needs(), needs(finetune_type="full")
    assert (lora.recompute, lora.optimizer) == ("full", "adamw")
    assert (full.recompute, full.optimizer) == ("full", "adafactor")
    assert full.device["gradients"] < 1e9  # moved in the backward pass
    kept = needs(finetune_type="full", memory={"fused_backward": False}, full={"rounding": "kahan"})
    assert kept.device["gradients"] > 23e9
    assert kept.device["rounding extras"] == pytest.approx(2 * 11.83e9, rel=0.01)


def test_what_an_update_takes_for_a_moment_is_counted() -> None:
    """A bf16 weight is widened to float32, and so is its gradient; Adafactor makes its update beside them."""
    config = config_of(finetune_type="full")
    assert estimate.update_bytes(config, "adamw", torch.float32) == 0
    adamw, adafactor = (estimate.update_bytes(config, one, torch.bfloat16) for one in ("adamw", "adafactor"))
    assert 8 <= adamw < adafactor <= 32
    work = [needs(finetune_type="full", optim={"name": one}).device for one in ("adamw", "adafactor")]
    assert work[0]["recompute and workspace"] < work[1]["recompute and workspace"]


def test_streamed_blocks_leave_the_device_but_for_two() -> None:
    home, away = needs(memory={"recompute": "full"}), needs(memory={"stream_blocks": 57})
    moved = home.device["weights as stored"] - away.device["weights as stored"]
    block = 2 * 339_831_296  # the largest
    assert moved == away.host["streamed blocks"] - 2 * block
    assert away.traffic == 2 * away.host["streamed blocks"]
    assert (away.streamed, away.flops) == (57, home.flops)


@pytest.mark.parametrize(("kind", "policy"), [("lora", "selective"), ("lora", "full"), ("full", "none")])
def test_two_blocks_of_a_kind_tell_of_all(kind: str, policy: str) -> None:
    """Patterns are measured at the model's own depth; one that matches all must come to the same."""
    deep = RandomFlux1(
        FLUX1_DEV, "random", "random", tuple({**NARROW, "num_layers": 4, "num_single_layers": 5}.items())
    )
    found = []
    for which in ("blocks", [r".*transformer_blocks\..*"]):
        chosen = {"full": {"train": which}} if kind == "full" else {"lora": {"targets": which}}
        memory = {"recompute": policy, "fused_backward": False if kind == "full" else None}
        config = config_of(finetune_type=kind, memory=memory, optim={"name": "adamw"}, **chosen)
        found.append(Estimator(deep, "cuda").estimate(config, 128))
    few, whole = found
    assert few.training == pytest.approx(whole.training, rel=0.01)
    assert few.flops == pytest.approx(whole.flops, rel=0.001)


def test_attention_that_the_environment_asks_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DIFFUSERS_ATTN_BACKEND: kernels of a GPU, which take no tensors without numbers."""
    config = config_of(memory={"recompute": "full"})
    expected = Estimator(SMALL, "cuda").estimate(config, 128)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName("_native_cudnn"))
    assert Estimator(SMALL, "cuda").estimate(config, 128) == expected


def test_a_model_that_cannot_be_built_is_told_of() -> None:
    broken = RandomFlux1(FLUX1_DEV, "a folder", "random", tuple({**NARROW, "num_layers": "many"}.items()))
    with pytest.raises(ModelError, match=r"a folder: its `transformer/config.json` describes no FLUX.1 transformer"):
        Estimator(broken, "cpu")


def test_a_folder_is_a_folder_though_its_name_reads_like_one_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "models" / "small" / "transformer"
    small.mkdir(parents=True)
    FluxTransformer2DModel(**NARROW).save_config(small)
    monkeypatch.chdir(tmp_path)
    family = replace(SMALL, source="models/small", shape=())
    assert Estimator(family, "cpu").size == Estimator(SMALL, "cpu").size


def test_an_alternative_is_the_same_run_with_other_settings() -> None:
    config = config_of(optim={"batch_size": 4}, memory={"recompute": "none"})
    other = changed(config, {"memory.recompute": "full", "data.resolutions": [512]})
    assert other is not None
    assert (other.memory.recompute, other.data.resolutions, other.optim) == ("full", (512,), config.optim)
    assert changed(config, {"memory.stream_blocks": 3}) is None  # `recompute: none` cannot be meant with it
    small = Estimator(SMALL, "cuda")
    told = {str(one): one for one in fitting.alternatives(small, config)}
    assert {"memory.recompute=selective", "optim.batch_size=2", "data.resolutions=[768,512]"} <= told.keys()
    assert "memory.stream_blocks=4 memory.recompute=full" in told
    single = told["optim.batch_size=1 optim.accumulate=4"]
    assert single.flops == pytest.approx(1, rel=0.01)
    assert single.estimate.training < small.estimate(config).training


def test_a_full_card_is_told_what_to_change_and_what_that_saves() -> None:
    config = config_of(optim={"batch_size": 2}, memory={"recompute": "none"})
    error = fitting.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to"), config, SMALL)
    assert error.message.startswith("the GPU's memory is full: CUDA out of memory; by the estimate")
    told = (error.hint or "").split("; ")
    assert told[0].startswith("`optim.batch_size=1 optim.accumulate=2` saves ")
    assert told[1].startswith("`memory.recompute=selective` saves ")
    assert told[2].startswith("`memory.recompute=full` saves ")
    assert "operations a picture" in told[2]


def test_the_verdict_names_the_card_or_what_would_fit() -> None:
    plan = make_plan(config_of(model="flux-tiny"))
    assert (plan.device, plan.rate_is_measured, plan.fits) == ("this CPU", True, True)
    assert plan.rate > 1e8
    one = needs(memory={"recompute": "none"})
    other = Alternative({"memory.recompute": "full"}, needs(memory={"recompute": "full"}), 1.4)
    big = replace(plan, device="", free=None, estimate=one, others=[other])
    assert big.card_gb == 80
    assert f"this needs {one.needs / 1e9:.2f} GB" in big.for_people()
    assert "are free: too little" in replace(big, free_disk=1e6).for_people()
    small = replace(big, device="a card", free=40e9)
    assert "does not fit a card" in small.for_people()
    assert f"`memory.recompute=full` would fit with {other.estimate.needs / 1e9:.2f} GB" in small.for_people()
    assert "no change above would fit" in replace(small, free=8e9).for_people()


def test_plan_prints_one_json_object_and_reads_no_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: flux-tiny\ndata: {tmp_path.as_posix()}\nfinetune_type: lora\n")
    result = CliRunner().invoke(app, ["plan", str(run), "optim.batch_size=2", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    now = facts["estimate"]
    assert now["needs"] >= now["training"] == sum(now["device"].values())
    assert {"optim.batch_size": 1, "optim.accumulate": 2} in [one["settings"] for one in facts["others"]]
    assert facts["sides_px"] == [64]
    assert facts["least_seconds"] > 0
