"""What the processes of `test_sharded` do: `python -m torch.distributed.run … _sharded.py JOB FOLDER`.

FOLDER holds `config.json`, the settings that all runs share, and `cache`. Each process leaves what it has found as
`JOB-RANK.pt`, and the tests judge that.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _runs import BF16, CPU, FP32, PRIOR, Run
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flux_ft.config import RunConfig
from flux_ft.errors import FluxFTError
from flux_ft.families import blocks
from flux_ft.families.registry import open_family
from flux_ft.train.checkpoint import About
from flux_ft.train.full import extract_lora
from flux_ft.train.loop import Wish
from flux_ft.train.optim import OPTIMIZERS, Updates, own_part, place_of
from flux_ft.train.restore import read_into
from flux_ft.train.resume import Keeper
from flux_ft.train.saving import Saver
from flux_ft.train.sharded import gather, snapshot, write, writing_group
from flux_ft.types import TextCond

FAMILY = open_family("flux-tiny")
CLIPPED: dict[str, Any] = {"optim": {"max_grad_norm": 0.1, "ema_decay": 0.9, "ema_every": 1}}
BF16_RUN: dict[str, Any] = {"memory": {"base_precision": "bf16"}}
SHORT: dict[str, Any] = {"global_batch": 2, "iterations": 2}
IN_PART: dict[str, Any] = {"attention alone": {"full": {"train": "attention"}}, "with a prior": {"prior": PRIOR}}
KAHAN: dict[str, Any] = {**BF16_RUN, "full": {"rounding": "kahan"}, "optim": {"ema_decay": 0.9, "ema_every": 1}}


def begin(folder: Path, global_batch: int = 4, resume: str | None = None, **overrides: Any) -> Run:
    """A run whose steps take `global_batch` pictures, whatever the processes; sections of settings merge."""
    values = json.loads((folder / "config.json").read_text())
    for key, value in overrides.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # it takes one precision a process
    values["optim"]["batch_size"] = global_batch // world // values["optim"].get("accumulate", 1)
    run = Run(FAMILY, RunConfig.model_validate(values), folder / "cache")
    if resume is not None:
        read_into(folder / resume, run.state)
    return run


def train_on(run: Run, until: int) -> Run:
    """Go on to so many steps, with a schedule as long as the run file says."""
    run.train(wish=lambda: Wish.STOP if run.state.step == until else Wish.GO_ON)
    return run


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, wherever its parts are."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def parts(run: Run) -> dict[str, Tensor]:
    """All that a run would save, as this process holds it."""
    return {key: own_part(tensor).clone() for key, tensor in snapshot(run.state).items()}


def weights(run: Run) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in run.state.trained.items()}


def facts(run: Run) -> dict[str, Any]:
    """What a run has come to, as all processes together hold it."""
    found = {"losses": run.losses, "norms": [one.grad_norm for one in run.results], "weights": weights(run)}
    if run.state.average is not None:
        averages, trained = run.state.average.weights, run.state.trained
        found["average"] = {name: whole_of(averages[name], parameter) for name, parameter in trained.items()}
    return found


def velocity(denoiser: nn.Module, dtype: torch.dtype, training: bool = False) -> Tensor:
    """What a model answers to a fixed question, as it is drawn with or as it is trained; it is left in training."""
    denoiser.train(training)
    rng = torch.Generator().manual_seed(5)
    shape = FAMILY.latent_shape(64, 64)
    config: Any = denoiser.config
    text = TextCond(
        torch.randn(1, 8, config.joint_attention_dim, generator=rng).to(dtype),
        torch.randn(1, config.pooled_projection_dim, generator=rng).to(dtype),
    )
    with torch.no_grad():
        answer = FAMILY.predict_velocity(
            denoiser, torch.randn(1, *shape, generator=rng).to(dtype), torch.tensor([0.7]), text, 1.0
        )
    denoiser.train()
    return answer


def message_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except FluxFTError as error:
        return f"{type(error).__name__}: {error.message}; {error.hint}"
    return ""


def two(folder: Path) -> dict[str, Any]:
    """All that two processes are asked."""
    found: dict[str, Any] = {}
    for accumulate in (1, 2):
        settings: dict[str, Any] = {"iterations": 20, "optim": {**CLIPPED["optim"], "accumulate": accumulate}}
        run = begin(folder, **settings)
        run.train()
        found[f"accumulate {accumulate}"] = facts(run)
    state, group = run.state, writing_group()
    found["rows"] = {name: own_part(p).shape[0] / p.shape[0] for name, p in state.trained.items()}
    stack = FAMILY.load_text(CPU, FP32)
    found["text encoders"] = {p.device.type for part in (stack.clip, stack.t5) for p in part.parameters()}
    for policy in ("none", "full", "selective"):
        found[f"recompute {policy}"] = facts(begin(folder, **SHORT, memory={"recompute": policy}).train())
    found["full disk"] = disk_of_one_is_full(run)
    for name, settings in IN_PART.items():
        found[name] = facts(begin(folder, **SHORT, **CLIPPED, **settings).train())

    for name in ("stochastic", "again"):
        found[name] = facts(begin(folder, **SHORT, **BF16_RUN).train())
    run = begin(folder, iterations=6, **KAHAN)
    uncut = FAMILY.load_denoiser(CPU, BF16)
    blocks.fuse(uncut)
    found["bf16 alike"] = all(
        torch.equal(velocity(run.state.bare, BF16, mode), velocity(uncut, BF16, mode)) for mode in (False, True)
    )
    train_on(run, 3)
    taken, then = snapshot(run.state), parts(run)
    writer = threading.Thread(target=write, args=(folder / "saved-2", taken, group))
    writer.start()
    run.train()
    writer.join()
    found["copy is of then"] = all(torch.equal(own_part(taken[key]), then[key]) for key in then)
    ahead = parts(run)
    again = begin(folder, iterations=6, resume="saved-2", **KAHAN)
    again.state.step = 3
    found["read"] = {key: torch.equal(one, then[key]) for key, one in parts(again).items()}
    again.train()
    found["gone on"] = {key: torch.equal(one, ahead[key]) for key, one in parts(again).items()}

    saved = {key: whole(tensor) for key, tensor in taken.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(saved, folder / "saved-2.pt")
    for name in ("saved-1", "saved-1-kahan"):
        other = begin(folder, resume=name, **(KAHAN if name.endswith("kahan") else CLIPPED))
        found[name] = {key: whole(tensor) for key, tensor in snapshot(other.state).items()}
    found["another optimizer"] = message_of(lambda: begin(folder, resume="saved-2", optim={"name": "adafactor"}))
    blocked = folder / "a-file"
    blocked.touch()
    found["no space"] = message_of(lambda: write(blocked / "below", taken, group))
    if OPTIMIZERS["adamw8bit"].requires is None or _installed("bitsandbytes"):
        run = begin(folder, **SHORT, optim={"name": "adamw8bit"}).train()
        write(folder / "saved-8bit", snapshot(run.state), group)
        then = parts(run)
        again = begin(folder, optim={"name": "adamw8bit"}, resume="saved-8bit")
        found["8-bit read"] = {key: torch.equal(one, then[key]) for key, one in parts(again).items()}

    run = begin(folder, iterations=6, resume="saved-2", **KAHAN)
    precise = {name: whole_of(part, run.state.trained[name]) for name, part in run.precise.items()}
    averaged = {key.split("/")[1]: whole(t) for key, t in snapshot(run.state).items() if key.startswith("average/")}
    found["before"] = velocity(run.state.bare, BF16)
    put_together = gather(run.state, FAMILY, run.config)
    found["left"] = len(run.state.trained) + len(list(run.state.bare.parameters()))
    if put_together is not None:
        found["after"] = velocity(put_together.bare, BF16)
        found["precise"] = {name: torch.equal(put_together.updates.precise(name), one) for name, one in precise.items()}
        assert put_together.average is not None
        found["average"] = {
            name: torch.equal(put_together.average.weights[name], one) for name, one in averaged.items()
        }
        found["extracted"] = len(extract_lora(put_together, run.config)[0].layers)
    found["gathered by"] = put_together is not None
    return found


def disk_of_one_is_full(run: Run) -> tuple[bool, int | None, list[str]]:
    """A save that fails in the second process alone, and one that does not.

    Whether the first is due again, the step that is saved in the end, and what lies in the folder.
    """
    saver = Saver(Keeper(run.state, run.config, About(1, {})).job, again_after=(0.0,))
    write_data = FileSystemWriter.write_data

    def full(*given: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write_data(*given)

    FileSystemWriter.write_data = full  # type: ignore[method-assign]
    saver.save(2)
    assert saver._thread is not None
    saver._thread.join(60)
    due = saver.is_due_again()
    FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    saver.save(3)
    saver.finish(3)
    torch.distributed.barrier()
    return due, saver.saved_step, sorted(path.name for path in (run.config.output_dir / "checkpoints").iterdir())


def four(folder: Path) -> dict[str, Any]:
    """All that four processes are asked, as one node and as two."""
    found: dict[str, Any] = {"row by row": uneven_rows(), "like rows": like_rows()}
    for nodes in (1, 2):
        os.environ["LOCAL_WORLD_SIZE"] = str(4 // nodes)
        run = begin(folder, **CLIPPED).train()
        group = writing_group()
        found[f"{nodes} nodes"] = facts(run)
        found[f"{nodes} nodes, places"] = place_of(next(iter(run.state.trained.values())))
        write(folder / f"saved-4-{nodes}", snapshot(run.state), group)
        if torch.distributed.get_rank() == 0:
            torch.save(weights(run), folder / f"saved-4-{nodes}.pt")
        else:
            weights(run)
        again = begin(folder, iterations=6, resume="saved-2", **KAHAN)
        found[f"{nodes} nodes read"] = {key: whole(tensor) for key, tensor in snapshot(again.state).items()}
        rounded = train_on(again, 2).state
        found[f"{nodes} nodes, own"] = {name: own_part(p).clone() for name, p in rounded.trained.items()}
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    if (folder / "saved-8bit").exists():
        found["8-bit"] = message_of(lambda: begin(folder, optim={"name": "adamw8bit"}, resume="saved-8bit"))
    return found


def uneven_rows() -> dict[str, float]:
    """Five rows over four processes, the last of which gets none: how far AdamW on them is from AdamW on all."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    gaps = {}
    for dtype in (FP32, BF16):
        torch.manual_seed(0)
        layer = nn.Linear(3, 5).to(dtype)
        plain = {name: nn.Parameter(p.detach().clone()) for name, p in layer.named_parameters()}
        fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
        sharded = dict(layer.named_parameters())
        made = [
            Updates(given, lambda some: torch.optim.AdamW(some, lr=0.1), rounding="master")
            for given in (plain, sharded)
        ]
        for step in range(3):
            for updates in made:
                updates.begin(step, 0.1)
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
            layer(inputs).square().sum().backward()
            for name, parameter in sharded.items():
                assert parameter.grad is not None
                plain[name].grad = whole(parameter.grad)
            for updates in made:
                updates.finish()
        gaps[str(dtype)] = max(float((whole(sharded[name]) - one.detach()).abs().max()) for name, one in plain.items())
    return gaps


def like_rows() -> Tensor:
    """One row of four that are alike and have the same gradient, after a step that is rounded by chance."""
    mesh = init_device_mesh("cpu", (4,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 512, dtype=BF16), mesh, [Shard(0)]))
    updates = Updates({"weight": weight}, lambda some: torch.optim.SGD(some, lr=1e-3))
    updates.begin(0, 1e-3)
    weight.grad = distribute_tensor(torch.ones(4, 512, dtype=BF16), mesh, [Shard(0)])
    updates.finish()
    return own_part(weight)


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """All of what is laid out as a parameter is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # each run's collection would go through the objects of the imports again
    job, folder = sys.argv[1], Path(sys.argv[2])
    answer = {"two": two, "four": four}[job](folder)
    torch.save(answer, folder / f"{job}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
