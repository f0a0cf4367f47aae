"""A run's state and its disk: what a checkpoint is put into, what does not fit, and what is said of space before it."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux_ft.adapters import lora
from flux_ft.config import OptimConfig, RunConfig
from flux_ft.errors import ConfigError, NumbersError, StorageError
from flux_ft.train import restore as restore_module
from flux_ft.train.checkpoint import About, Saved, State, save
from flux_ft.train.optim import OPTIMIZERS, Average, Updates
from flux_ft.train.resume import require_moved, require_space, samples, snapshot
from flux_ft.train.setup import TrainState

Usage = namedtuple("Usage", "total used free")


class Model(nn.Module):
    """Two linears of a block, and something outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 6), "ff": nn.Linear(6, 4)})])
        self.proj_out = nn.Linear(4, 3)
        self.requires_grad_(False)


class Stream:
    """Stands for streamed blocks: what is asked of them, and when."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self._weights = weights
        self.before: list[dict[str, Tensor]] = []

    def flush(self) -> None:
        self.before.append({name: one.detach().clone() for name, one in self._weights.items()})


def state_of(kind: str, dtype: torch.dtype = torch.float32, rank: int = 2, average: bool = False) -> TrainState:
    """A state as `prepare_model` makes it, of a LoRA or of all weights."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    if kind == "lora":
        lora.attach_new(model, ["transformer_blocks.0.to_q", "transformer_blocks.0.ff"], rank, 3.0, 0.0, 0)
    else:
        model.requires_grad_(True)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    updates = Updates(trained, lambda given: OPTIMIZERS["adamw"].make(given, 0.1, OptimConfig()), rounding="kahan")
    kept = Average(trained, 0.9, 1) if average else None
    alone: Any = SimpleNamespace(num_processes=1)
    return TrainState(alone, model, model, trained, updates, "adamw", kept)


def step(state: TrainState) -> None:
    state.updates.begin(state.step, 0.1)
    for name, one in state.trained.items():
        one.grad = torch.ones_like(one) * (1 + len(name) % 3)
    state.updates.finish()
    state.step += 1


def made(state: TrainState) -> State:
    """A copy of a state whose average has gone its own way."""
    found = snapshot(state)
    for one in found.optimizer.get("average", {}).values():
        one += 1
    return found


def restore(state: TrainState, found: State) -> None:
    """By way of a folder."""
    with TemporaryDirectory() as folder:
        path = save(Path(folder), About(2, {}), found, keep=2)
        restore_module.restore(state, Saved(path, About(2, {})))


def config_of(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"data": "pics", **settings})


# --- Going on from a checkpoint. ---


@pytest.mark.parametrize(
    ("kind", "dtype"), [("lora", torch.float32), ("full", torch.float32), ("full", torch.bfloat16)]
)
def test_restored_is_saved(kind: str, dtype: torch.dtype) -> None:
    first, second = state_of(kind, dtype, average=True), state_of(kind, dtype, average=True)
    for _ in range(2):
        step(first)
    first.norms, first.spikes = [1.0, 2.5], 1
    before = dict(second.trained)
    found = made(first)
    restore(second, found)
    assert (second.step, second.norms, second.spikes) == (2, [1.0, 2.5], 1)
    for name, one in second.trained.items():
        assert one is before[name], "the optimizer has this one"
        assert one is dict(second.bare.named_parameters())[name]
        assert one.requires_grad
        assert torch.equal(one, first.trained[name])
        assert torch.equal(second.updates.precise(name), first.updates.precise(name))
        assert second.average is not None
        assert torch.equal(second.average.weights[name], found.optimizer["average"][name])
    for state in (first, second):
        step(state)
    assert all(torch.equal(one, first.trained[name]) for name, one in second.trained.items())


def test_a_restored_lora_is_read_off_as_it_was() -> None:
    first, second = state_of("lora"), state_of("lora")
    step(first)
    restore(second, made(first))
    ours, theirs = (lora.read_trained(state.bare).layers for state in (second, first))
    assert ours.keys() == theirs.keys()
    for path, layer in ours.items():
        assert torch.equal(layer.down_RI, theirs[path].down_RI)
        assert torch.equal(layer.up_OR, theirs[path].up_OR)
        assert layer.alpha == 3.0


Q = "transformer_blocks.0.to_q.weight"


@pytest.mark.parametrize("odd", ["missing", "foreign", "of another shape", "none at all"])
def test_a_checkpoint_of_other_weights_is_refused_and_changes_nothing(odd: str) -> None:
    first, second = state_of("full"), state_of("full")
    step(first)
    found = made(first)
    if odd == "missing":
        del found.weights[Q]
    elif odd == "foreign":
        found.weights["transformer_blocks.0.to_k.weight"] = torch.zeros(6, 8)
    elif odd == "of another shape":
        found.weights[Q] = torch.zeros(6, 9)
    else:
        found.weights.clear()
    before = {name: one.detach().clone() for name, one in second.trained.items()}
    with pytest.raises(ConfigError) as caught:
        restore(second, found)
    told = {
        "missing": f"`weights/{Q}` is missing, expected (6, 8)",
        "foreign": "`weights/transformer_blocks.0.to_k.weight` is (6, 8), expected no such entry",
        "of another shape": f"`weights/{Q}` is (6, 9), expected (6, 8)",
        "none at all": "is missing",
    }
    assert told[odd] in caught.value.message
    assert "`full`" in (caught.value.hint or "")
    assert second.step == 0
    assert all(torch.equal(one, before[name]) for name, one in second.trained.items())


def test_a_lora_of_another_rank_is_refused() -> None:
    first, second = state_of("lora", rank=5), state_of("lora")
    with pytest.raises(ConfigError) as caught:
        restore(second, made(first))
    assert "transformer_blocks.0.ff.lora_A.trained.weight" in caught.value.message
    assert "(5, 6)" in caught.value.message
    assert "(2, 6)" in caught.value.message
    assert "`optim`" in (caught.value.hint or "")


def test_streamed_weights_are_brought_home_before_they_are_written_to() -> None:
    first, second = state_of("full"), state_of("full")
    step(first)
    stream: Any = Stream(second.trained)
    second.stream = stream
    untouched = {name: one.detach().clone() for name, one in second.trained.items()}
    restore(second, made(first))
    assert len(stream.before) == 1
    assert all(torch.equal(one, untouched[name]) for name, one in stream.before[0].items())


def test_a_snapshot_is_a_copy_unless_it_need_not_be() -> None:
    state = state_of("full", torch.bfloat16, average=True)
    step(state)
    kept, shared = snapshot(state), snapshot(state, copy=False)
    before = {name: one.clone() for name, one in kept.weights.items()}
    step(state)
    assert all(torch.equal(kept.weights[name], one) for name, one in before.items())
    assert not all(torch.equal(shared.weights[name], one) for name, one in before.items())
    assert kept.nbytes == shared.nbytes


def test_another_optimizer_is_refused() -> None:
    first, second = state_of("full"), state_of("full")
    step(first)
    second.optimizer = "adafactor"
    with pytest.raises(ConfigError, match="made by adamw, this run's optimizer is adafactor") as caught:
        restore(second, made(first))
    assert "`optim.name: adamw`" in (caught.value.hint or "")


def test_the_optimizers_own_settings_are_the_runs() -> None:
    """Weight decay may be changed with leave: then it must hold, and not what it was."""
    first, second = state_of("full"), state_of("full")
    step(first)
    (optimizer,) = second.updates._optimizers.values()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    restore(second, made(first))
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


# --- A run that comes to nothing. ---


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_that_never_move_are_an_error(kind: str) -> None:
    state = state_of(kind)
    first = samples(state)
    with pytest.raises(NumbersError, match="not one weight has changed"):
        require_moved(state, first)
    with torch.no_grad():
        list(state.trained.values())[-1].view(-1)[0] += 1e-6  # of a LoRA an up factor
    require_moved(state, first)


def test_a_lora_whose_up_factors_are_zero_has_not_moved() -> None:
    """Weight decay moves the down factors; times zero they are nothing."""
    state = state_of("lora")
    first = samples(state)
    with torch.no_grad():
        for name, one in state.trained.items():
            one *= 0.9 if ".lora_A." in name else 1
    with pytest.raises(NumbersError):
        require_moved(state, first)


# --- Space. ---

LARGE = 10**13


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(LARGE, LARGE - int(size), int(size)))


def big_state(kind: str = "full") -> TrainState:
    """A model of 3 billion weights of which none is there: 6 GB in bf16."""
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(50_000, 30_000, bias=False), "b": nn.Linear(30_000, 50_000, bias=False)})
    model = model.to(torch.bfloat16)
    if kind == "lora":
        model.requires_grad_(False)
        with torch.device("meta"):
            model["lora"] = nn.Linear(10_000, 10_000, bias=False)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    unused: Any = None
    return TrainState(unused, model, model, trained, unused, "adafactor" if kind == "full" else "adamw")


def need_of(capsys: pytest.CaptureFixture[str], config: RunConfig, folder: Path) -> float:
    """What a run with plenty of space is told to need, in GB."""
    require_space(folder, big_state(), config)
    said = capsys.readouterr().err
    return float(said.split("this run needs about ")[1].split(" GB")[0])


def test_the_need_is_said_before_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """6 GB of bf16 weights and Adafactor's hundredth of a byte: three checkpoints at once, where two are kept."""
    free(monkeypatch, 1e12)
    require_space(tmp_path, big_state(), config_of(lora_rank=16))
    said = capsys.readouterr().err
    assert "18.09 GB" in said.split("checkpoints ")[1][:9]
    assert "2 kept, one more being written" in said
    assert "1000.00 GB are free" in said


@pytest.mark.parametrize(
    ("settings", "more_GB"),
    [
        ({"checkpoint": {"keep": 3}}, 6.03),
        ({"checkpoint": {"every": None}}, -18.09),
        ({"export": {"keep_full": True}}, 6.0),
        ({"export": {"keep_full": True, "dtype": "fp32"}}, 12.0 + 0.01),
        ({"full": {"rounding": "kahan"}}, 3 * 6.0),
        ({"full": {"rounding": "master"}}, 3 * 12.0),
    ],
)
def test_the_need_counts_what_is_kept(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, Any],
    more_GB: float,
) -> None:
    free(monkeypatch, 1e12)
    plain = need_of(capsys, config_of(lora_rank=16), tmp_path)
    assert need_of(capsys, config_of(lora_rank=16, **settings), tmp_path) - plain == pytest.approx(more_GB, abs=0.02)


@pytest.mark.parametrize("keep_full", [False, True])
def test_too_small_a_disk_is_one_message_with_figures_and_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keep_full: bool
) -> None:
    free(monkeypatch, 5e9)
    with pytest.raises(StorageError) as caught:
        require_space(tmp_path, big_state(), config_of(export={"keep_full": keep_full}))
    assert str(tmp_path) in caught.value.message
    assert "5.00 GB are free" in caught.value.message
    assert "18." in caught.value.message
    assert "`checkpoint.keep`" in (caught.value.hint or "")
    assert ("export.keep_full: false" in (caught.value.hint or "")) == keep_full
    assert caught.value.exit_code == 1


def test_just_enough_is_enough(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free(monkeypatch, 1e12)
    config = config_of(lora_rank=16)
    need = need_of(capsys, config, tmp_path)
    free(monkeypatch, (need + 0.01) * 1e9)
    require_space(tmp_path, big_state(), config)
    free(monkeypatch, (need - 0.01) * 1e9)
    with pytest.raises(StorageError):
        require_space(tmp_path, big_state(), config)


def test_a_lora_says_nothing_where_there_is_space_and_is_refused_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """100 million factors in float32 with AdamW's state: 1.2 GB a checkpoint."""
    free(monkeypatch, 1e12)
    config = config_of(finetune_type="lora")
    require_space(tmp_path, big_state("lora"), config)
    assert capsys.readouterr().err == ""
    free(monkeypatch, 4e9)
    with pytest.raises(StorageError, match=r"4\.00 GB are free"):
        require_space(tmp_path, big_state("lora"), config)
