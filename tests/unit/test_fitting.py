"""What a run is fitted to a card with: by the estimate at FLUX.1-dev's full size, and cards of any size."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from _estimator import full_size
from _random_flux import FULL_SIZE, SMALL

from flux_ft import log
from flux_ft.config import RunConfig
from flux_ft.errors import FluxFTError
from flux_ft.families.base import Family
from flux_ft.infer import fit
from flux_ft.runfile import load_run
from flux_ft.train import fitting, planning
from flux_ft.train import run as train_run
from flux_ft.train.estimate import Estimator
from flux_ft.train.fitting import CAREFUL, POLICIES, Room, choose, fit_run
from flux_ft.train.planning import H100_RATE, Plan, card_room, make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("flux1_*.yaml"))
GB = 1e9


def config_of(**settings: Any) -> RunConfig:
    fixed = {"data": {"path": "pictures", "resolutions": [1024]}, "finetune_type": "lora", "lora_rank": 16}
    return RunConfig.model_validate({**fixed, **settings})


def chosen(free: float, host: float = 1e12, streams: bool = True, **settings: Any) -> fitting.Choice:
    return choose(full_size(), config_of(**settings), Room(free, host, streams))


def test_the_larger_the_card_the_less_is_recomputed_and_streamed() -> None:
    found = [choose(full_size(), config_of(), card_room(card)) for card in (80, 48, 32, 24, 16, 12, 8)]
    assert [one.estimate.recompute for one in found] == ["none", "selective", *["full"] * 5]
    streamed = [one.estimate.streamed for one in found]
    assert streamed[:3] == [0, 0, 0]
    assert streamed[2:] == sorted(set(streamed))
    for one in found:
        assert one.fits
        assert one.estimate.needs <= CAREFUL * one.room.device
        assert (one.config.memory.recompute, one.config.memory.stream_blocks) == (
            one.estimate.recompute, one.estimate.streamed,
        )  # fmt: skip
        if one.faster is not None:
            assert one.faster.needs > CAREFUL * one.room.device
        if one.frugal is not None:
            assert one.frugal.needs < one.estimate.needs


def test_no_block_more_is_streamed_than_has_to_be() -> None:
    one = chosen(20 * GB)
    fewer = full_size().estimate(config_of(memory={"recompute": "full", "stream_blocks": one.estimate.streamed - 1}))
    assert one.fits
    assert fewer.needs > CAREFUL * 20 * GB


def test_a_smaller_base_takes_a_faster_rung() -> None:
    plain, held = chosen(24 * GB), chosen(24 * GB, memory={"base_precision": "int8"})
    assert plain.estimate.streamed > held.estimate.streamed == 0
    weights = {
        name: full_size().estimate(config_of(memory={"base_precision": name, "recompute": "full"})).device[
            "weights as stored"
        ]
        for name in ("bf16", "int8", "fp8", "nf4")
    }  # fmt: skip
    held_weights, others = fit.FLUX1_SIZES.held, fit.FLUX1_SIZES.denoiser - fit.FLUX1_SIZES.held
    assert weights["bf16"] == 2 * (held_weights + others)
    assert weights["int8"] == weights["fp8"] == pytest.approx(held_weights + 2 * others, rel=1e-3)
    assert weights["nf4"] == pytest.approx(0.516 * held_weights + 2 * others, rel=1e-3)


def test_what_the_run_file_says_is_kept() -> None:
    assert chosen(84 * GB, memory={"recompute": "full"}).estimate.recompute == "full"
    assert chosen(84 * GB, memory={"stream_blocks": 10}).estimate.streamed == 10
    kept = chosen(8 * GB, memory={"recompute": "selective"})  # which cannot be streamed
    assert (kept.fits, kept.estimate.recompute, kept.estimate.streamed) == (False, "selective", 0)
    resident = chosen(8 * GB, memory={"stream_blocks": 0})
    assert (resident.fits, resident.estimate.recompute, resident.estimate.streamed) == (False, "full", 0)
    in_full = chosen(8 * GB, finetune_type="full", full={"rounding": "master"})
    assert (in_full.fits, in_full.estimate.streamed) == (False, 0)


def test_blocks_wait_only_where_they_can() -> None:
    assert chosen(20 * GB, streams=False).estimate.streamed == 0
    assert not chosen(8 * GB, host=5 * GB).fits
    assert chosen(8 * GB, host=64 * GB).fits


def test_a_small_host_takes_the_blocks_that_the_device_lacks_room_for() -> None:
    one, other = chosen(24 * GB), chosen(24 * GB, host=12 * GB)
    assert other.fits
    assert other.estimate.host_needs < 12 * GB < other.frugal.host_needs  # type: ignore[union-attr]
    assert one.estimate == other.estimate
    held = chosen(12 * GB, host=9 * GB, memory={"base_precision": "int8"})
    assert held.estimate.waiting < 9 * GB  # but all are quantised before any may go on
    assert not held.fits
    short = chosen(24 * GB, host=5 * GB)  # the least that will do is warned of, and not more
    assert (short.fits, short.estimate.streamed) == (False, one.estimate.streamed)


def test_what_of_the_choice_moves_bits_is_recorded() -> None:
    assert fitting.circumstances(config_of(memory={"recompute": "full", "stream_blocks": 3})) != {}
    for free in ({"recompute": "full"}, {"recompute": "none", "stream_blocks": 0}):
        assert fitting.circumstances(config_of(memory=free)) == {}
    peft = config_of(memory={"recompute": "full", "stream_blocks": 3}, speed={"fused_lora": False})
    assert fitting.circumstances(peft) == {"speed.fused_lora": "false"}


def test_previews_are_decoded_in_tiles_where_a_whole_one_has_no_room() -> None:
    small: dict[str, Any] = {"data": {"path": "pictures", "resolutions": [512]}}
    assert chosen(12.6 * GB, **small).previews_in_tiles
    assert not chosen(84 * GB, **small).previews_in_tiles
    assert not chosen(12.6 * GB, **small, preview={"every": None}).previews_in_tiles


# --- What a start of a run makes of it. ---


def started(
    free: float | None, monkeypatch: pytest.MonkeyPatch, family: Family = FULL_SIZE, **settings: Any
) -> tuple[fitting.Fitted, list[str]]:
    """What `train` goes by where so much is free, and what it has told."""
    told: list[str] = []
    monkeypatch.setattr(log, "say", told.append)
    monkeypatch.setattr(log, "warn", lambda text: told.append(f"warning: {text}"))
    machine = fit.Machine("cuda", None if free is None else int(free), int(1e12))
    monkeypatch.setattr(fit, "machine_of", lambda device: machine)
    monkeypatch.setattr(fitting, "Estimator", lambda *given: full_size() if family is FULL_SIZE else Estimator(*given))
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    return fit_run(config_of(**settings), family, accelerator), told


def test_a_run_tells_what_it_chose_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, told = started(40 * GB, monkeypatch)
    memory = fitted.config.memory
    assert (memory.recompute, memory.stream_blocks) == ("full", 0)
    (line,) = told
    assert re.fullmatch(
        r"memory: recompute full needs [\d.]+ GB of 40.00 GB that are free; recompute selective, which is faster, "
        r"[\d.]+ GB; recompute full with 57 blocks streamed, which is slower, [\d.]+ GB", line,
    )  # fmt: skip


def test_a_run_that_is_far_too_large_is_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FluxFTError, match=r"needs [\d.]+ GB of the device's memory at the least") as caught:
        started(20 * GB, monkeypatch, memory={"stream_blocks": 0})
    assert "`memory.base_precision=int8` would need" in (caught.value.hint or "")
    assert "to try all the same, set `memory.recompute: full` and `memory.stream_blocks: 0`" in (
        caught.value.hint or ""
    )
    # Somewhat too large, or what the run file itself says, is tried.
    for free, memory in ((28 * GB, {"stream_blocks": 0}), (20 * GB, {"stream_blocks": 0, "recompute": "full"})):
        fitted, told = started(free, monkeypatch, memory=memory)
        assert fitted.config.memory.recompute == "full"
        assert "warning: by the estimate that is more than what is free" in told[-1]


def test_a_small_model_or_an_unknown_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, family in ((1 * GB, cast(Family, SMALL)), (None, cast(Family, FULL_SIZE))):
        fitted, told = started(free, monkeypatch, family)
        assert (fitted.config, fitted.previews_in_tiles, told) == (config_of(), False, [])


# --- Recipes and the plan. ---


def first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_needs_what_its_first_line_says(path: Path) -> None:
    config = load_run(path, ()).config
    card = re.search(r"_(\d+)gb$", path.stem)
    if card:
        choice = choose(full_size(), config, card_room(int(card[1])))
        assert choice.fits
        config, now = choice.config, choice.estimate
    else:
        now = full_size().estimate(config)
    expected = f"Estimated need: {now.needs / GB:.0f} GB of GPU memory"
    if card:
        flops = full_size().flops(config)
        expected += f" and {now.host_needs / GB:.0f} GB of host memory; a step is {flops / 1e12:.0f} TFLOP, at least "
        expected += f"{flops / H100_RATE:.2f} s on an H100 (neither measured yet)."
    assert expected in first_line(path)


def test_there_is_a_recipe_for_each_usual_card() -> None:
    assert {f"flux1_dev_lora_{card}gb.yaml" for card in (8, 12, 16, 24, 48, 80)} <= {path.name for path in RECIPES}


def test_the_plan_shows_priorities_cards_and_smaller_bases_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Estimator", lambda *given: full_size())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan: Plan = make_plan(config_of(data="pictures"), FULL_SIZE)
    rows = {one.name: one for one in plan.priorities}
    assert list(rows) == ["speed", "quality (run's)", "high_res_only"]
    assert [one.sides_px for one in plan.priorities] == [(768, 512), (1024, 768, 512), (1024,)]
    assert rows["speed"].flops < rows["quality (run's)"].flops < rows["high_res_only"].flops
    assert [one.name for one in plan.cards][:2] == ["8 GB", "12 GB"]
    assert all(one.fits for one in plan.cards)
    told = plan.for_people()
    assert re.search(r"\n +[\d.]+ GB +\?  +memory.base_precision=int8: the velocity is 0.4 % off on flux-tiny", told)
    assert re.search(r"\npriority  speed +768², 512² +[\d.]+ GB recompute full; a step at least 0.\d\d s", told)
    assert "\ncards     8 GB " in told
    assert make_plan(config_of(), FULL_SIZE).priorities == []  # `data.resolutions` has the last word
    assert {"needs", "fits", "flops"} <= plan.as_json()["priorities"][0].keys()


def test_the_plan_is_for_the_cpu_where_training_is_forced_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plan = make_plan(config_of(model="flux-tiny"))
    assert (plan.device, plan.estimate.overhead) == ("this CPU", 0)


def test_policies_are_in_the_order_of_what_they_keep() -> None:
    needs = [full_size().estimate(config_of(memory={"recompute": one})).needs for one in POLICIES]
    assert needs == sorted(needs, reverse=True)


def test_a_run_goes_by_what_was_fitted(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another recompute policy than by itself, and previews in tiles; its files say what the user said."""
    asked, tiled = [], []

    def fitted(config: RunConfig, family: Family, accelerator: Any, most_px: int) -> fitting.Fitted:
        asked.append(most_px)
        run = fitting.changed(config, {"memory.recompute": "full"})
        assert run is not None
        return fitting.Fitted(run, previews_in_tiles=True)

    monkeypatch.setattr(train_run, "fit_run", fitted)
    monkeypatch.setattr(train_run, "tile_vae", tiled.append)
    settings = {"model": "flux-tiny", "data": str(pictures), "output": str(tmp_path / "run"), "iterations": 1}
    train_run.train(config_of(**settings, lora_rank=2, preview={"every": 1, "prompts": ["a"], "steps": 1}))
    assert "activations are recomputed" in capsys.readouterr().err
    assert asked == [64 * 64]
    assert len(tiled) == 1
    assert "recompute: auto" in (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8")


def test_pictures_smaller_than_the_sizes_need_less() -> None:
    one, other = (Estimator(SMALL, "cuda", most_px).estimate(config_of()) for most_px in (None, 500 * 500))
    assert other.training < one.training
    assert other.training == Estimator(SMALL, "cuda").estimate(config_of(), 512).training
