"""One run on 1, 2 and 4 processes: the same cache, previews and measurements to the bit, the same training."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _verbs import child_env, hashes, metrics, run_verb, write_run, write_scenes
from safetensors.torch import load_file
from torch import Tensor

from flux_ft.families.tiny.scenes import all_scenes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes is tested on Linux"),
]

GLOBAL_BATCH, STEPS = 4, 20
WORLDS = (1, 2, 4)
LORA = "together.safetensors"
SETTINGS: dict[str, Any] = {
    "finetune_comment": "together",
    "trigger_word": "TOK",
    "iterations": STEPS,
    # AdamW divides each gradient by its own size, so at first it makes whole steps of the rounding of nearly nothing.
    "schedule": {"warmup_steps": STEPS},
    # Five prompts: neither 2 nor 4 processes have equally many.
    "preview": {"every": 1000, "steps": 1, "prompts": ["a red circle", "a star", "TOK", "a blue ring", "a cross"]},
    "validation": {"every": 10, "fraction": 0.5},
    "checkpoint": {"every": None},
    "export": {"dtype": "fp32", "formats": ["diffusers"]},
}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in metrics(self.folder) if "loss" in row]

    @property
    def validation(self) -> list[dict[str, float]]:
        return [row for row in metrics(self.folder) if "validation_loss" in row]


def launcher(processes: int) -> tuple[str, ...]:
    """What comes before `-m flux_ft`."""
    if processes == 1:
        return ()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """By the number of processes; each run fills its own cache."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    importlib.import_module("torch.distributed.run")
    place = tmp_path_factory.mktemp("processes")
    env = child_env() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    data = write_scenes(place / "data", all_scenes()[:: len(all_scenes()) // 15][:15])
    run_file = write_run(place / "run.yaml", {"path": str(data), "caption_dropout": 0.2}, **SETTINGS)
    made = {}
    for world in WORLDS:
        words = ("train", run_file, f"output=on-{world}", f"optim.batch_size={GLOBAL_BATCH // world}")
        done = run_verb(*words, cwd=place, launcher=launcher(world), env=env)
        assert done.code == 0, done.stderr
        made[world] = Run(place / f"on-{world}")
    return made


several = pytest.mark.parametrize("world", WORLDS[1:])


@several
def test_the_cache_is_the_same_to_the_bit(runs: dict[int, Run], world: int) -> None:
    alone = hashes(runs[1].folder / "cache")
    assert len(alone) > 12
    assert hashes(runs[world].folder / "cache") == alone


@several
def test_previews_are_the_same_to_the_bit(runs: dict[int, Run], world: int) -> None:
    """Of the base model; what is trained differs in the last bits, as sums of gradients have another order."""
    alone = hashes(runs[1].folder / "previews" / "step-000000")
    assert set(alone) == {"00.png", "01.png", "02.png", "03.png", "04.png", "prompts.json"}
    assert hashes(runs[world].folder / "previews" / "step-000000") == alone
    last = runs[world].folder / "previews" / f"step-{STEPS:06d}"
    assert {path.name for path in last.iterdir()} == set(alone)


@several
def test_held_out_pictures_measure_the_same_to_the_bit(runs: dict[int, Run], world: int) -> None:
    alone, together = runs[1].validation, runs[world].validation
    assert [row["step"] for row in together] == [row["step"] for row in alone] == [0, 10, 20]
    assert together[0] == alone[0]
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=1e-6)


@several
def test_the_same_global_batch_trains_the_same(runs: dict[int, Run], world: int) -> None:
    """The same pictures, captions and noise; gradients are summed in another order."""
    alone, together = runs[1], runs[world]
    assert len(alone.losses) == STEPS
    assert together.losses == pytest.approx(alone.losses, rel=1e-6)
    weights, others = (load_file(run.folder / LORA) for run in (alone, together))
    assert weights.keys() == others.keys()
    size = norm(weights.values())
    assert norm(weights[key] - others[key] for key in weights) <= 1e-6 * size
    assert norm(weights[key] for key in weights if "lora_B" in key) > 0.01 * size  # was zero before the training


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
