"""A run in memory, put together as `flux_ft.train.run.train` does, and what these tests compare runs by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ft.adapters import lora
from flux_ft.config import RunConfig
from flux_ft.families.base import Family
from flux_ft.plan import check_run
from flux_ft.train import checkpoint
from flux_ft.train.loop import Acts, StepResult, Wish, keep_base_velocity, train_steps
from flux_ft.train.restore import restore
from flux_ft.train.resume import snapshot
from flux_ft.train.setup import TrainData, TrainState, draw_prior, make_accelerator, prepare_data, prepare_model
from flux_ft.types import AdapterState, LoraLayer

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
Settings = Callable[..., RunConfig]
PRIOR = {"prompts": ["a small red circle in the center on a white background", "large blue star, top"]}


class Run:
    """One run in memory, with its parts in reach. It begins at the newest checkpoint in `resume`, if that is given."""

    def __init__(self, family: Family, config: RunConfig, cache: Path, resume: Path | None = None) -> None:
        self.family, self.config = family, config
        self.accelerator = make_accelerator(config, cache)
        assert self.accelerator.device.type == "cpu"
        self.data: TrainData = prepare_data(config, check_run(config).report, family, self.accelerator, cache)
        self.state: TrainState = prepare_model(config, family, self.accelerator)
        self.prior = draw_prior(config, family, self.data, self.state)
        found, passed_over = (None, []) if resume is None else checkpoint.latest(resume / "checkpoints")
        assert not passed_over
        assert (found is None) == (resume is None)
        keep_base_velocity(self.state, family, config, self.prior, found.about.step if found else 0)
        if found is not None:
            restore(self.state, found)
        self.results: list[StepResult] = []

    def acts(self, **changed: Any) -> Acts:
        quiet: dict[str, Any] = {
            "log": self.results.append, "validate": lambda step: None, "preview": lambda step: None,
            "save": lambda step, _: None, "wish": lambda: Wish.GO_ON,
        }  # fmt: skip
        return Acts(**(quiet | changed))

    def train(self, **acts: Any) -> Run:
        train_steps(self.state, self.family, self.config, self.data, self.prior, self.acts(**acts))
        return self

    def train_until(self, step: int, folder: Path) -> Run:
        """Stop after so many steps, with a checkpoint in `folder`."""
        finished = train_steps(
            self.state, self.family, self.config, self.data, self.prior,
            self.acts(
                save=lambda at, _: self.save(folder, at),
                wish=lambda: Wish.STOP if self.state.step == step else Wish.GO_ON,
            ),
        )  # fmt: skip
        assert not finished
        return self

    def save(self, folder: Path, step: int) -> None:
        checkpoint.save(folder / "checkpoints", checkpoint.About(step, {}), snapshot(self.state), keep=2)

    def stir(self) -> Run:
        """Give the LoRA values, since down has no gradient while up is zero."""
        self.state_from(random_adapter(lora.read_trained(self.state.bare), seed=5))
        return self

    def state_from(self, adapter: AdapterState) -> None:
        """Copy factors into what is trained, each by its name."""
        ends = {"lora_A": "down_RI", "lora_B": "up_OR"}
        assert len(self.state.trained) == len(ends) * len(adapter.layers)
        with torch.no_grad():
            for path, layer in adapter.layers.items():
                for end, factor in ends.items():
                    self.state.trained[f"{path}.{end}.{lora.TRAINED}.weight"].copy_(getattr(layer, factor))

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is trained: a LoRA's factors as they are read off, or weights of the model."""
        if self.config.finetune_type == "full":
            return {name: parameter.detach().clone() for name, parameter in self.state.trained.items()}
        layers = lora.read_trained(self.state.bare).layers
        pairs = ((path, layer) for path, layer in layers.items())
        return {f"{path}.{end}": t for path, one in pairs for end, t in (("down", one.down_RI), ("up", one.up_OR))}

    @property
    def precise(self) -> dict[str, Tensor]:
        """What is trained, as precisely as it is known."""
        return {name: self.state.updates.precise(name).detach().float().clone() for name in self.state.trained}

    @property
    def everything(self) -> dict[str, Tensor]:
        """All weights of the model."""
        return {name: parameter.detach().clone() for name, parameter in self.state.bare.named_parameters()}

    @property
    def losses(self) -> list[float]:
        return [result.loss for result in self.results]


def random_adapter(like: AdapterState, seed: int, alpha: float | None = None, size: float = 0.2) -> AdapterState:
    """An adapter of the same modules and ranks with random factors; ΔW is felt, and does not drown the base."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for path, one in like.layers.items():
        down = torch.randn(one.down_RI.shape, generator=rng) / one.down_RI.shape[1] ** 0.5
        up = torch.randn(one.up_OR.shape, generator=rng) * size / one.rank**0.5
        layers[path] = LoraLayer(down, up, one.alpha if alpha is None else alpha)
    return AdapterState(layers)


def tensors_of(tree: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists, by the way to them."""
    if torch.is_tensor(tree):
        return {path: tree}
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: tensor for key, one in inner for name, tensor in tensors_of(one, f"{path}/{key}").items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    odd = [key for key in a if not torch.equal(a[key], b[key])]
    assert not odd, f"{len(odd)} of {len(a)} tensors differ, first {odd[0]}"


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖a‖ over all tensors together."""
    assert a.keys() == b.keys()
    square = sum(float((a[key].double() - b[key].double()).square().sum()) for key in a)
    return (square / sum(float(tensor.double().square().sum()) for tensor in a.values())) ** 0.5


def changes(run: Run, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training has added to each weight, in float64."""
    return {name: tensor.double() - before[name].double() for name, tensor in run.precise.items()}
