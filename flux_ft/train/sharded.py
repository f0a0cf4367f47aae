"""Full fine-tunes over several processes: each holds some rows of every weight, gradient and optimizer state (FSDP2).

    main process: base in host memory ─ broadcast, weight by weight ─→ rows on every device ─ train ─→ gather
                                                                         └ snapshot ─ write ─→ folder ─ read_into ─┘

Over several nodes the rows are shared out within a node, and nodes are replicas of each other (hybrid sharding): what
is fetched for every block then stays on the fast links, and only gradients cross between nodes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from flux_ft.config import RunConfig
from flux_ft.errors import StorageError, first_line
from flux_ft.families.base import Family
from flux_ft.infer.runner import release_memory
from flux_ft.train.checkpoint import is_of_disk
from flux_ft.train.optim import OPTIMIZERS, Average, Updates, own_part, place_of

if TYPE_CHECKING:
    from flux_ft.train.setup import TrainState


def shards_wanted(config: RunConfig, world: int) -> int:
    """Over how many of `world` processes each weight is cut: 1 for a LoRA, or in one process.

    Those of a node, where there are several nodes with as many processes each, more than one; else all.
    """
    if config.finetune_type != "full" or world == 1:
        return 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    alike = world % local == 0 and nodes in (1, world // local)  # all processes must come to the same
    return local if local > 1 and alike else world


def shard_options(shards: int, world: int) -> dict[str, Any]:
    """What makes accelerate shard: the run file decides, and no setting of the user's accelerate adds to it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap", cpu_offload=False,
        activation_checkpointing=False, activation_checkpointing_offload=False, cpu_ram_efficient_loading=False,
    )  # fmt: skip
    mesh = ParallelismConfig(dp_replicate_size=world // shards, dp_shard_size=shards, tp_size=1, cp_size=1, sp_size=1)
    return {"fsdp_plugin": plugin, "parallelism_config": mesh}


def shard_on_cpu(accelerator: Accelerator, fsdp_plugin: Any, parallelism_config: Any) -> None:
    """Make accelerate shard between processes on the CPU as it does between GPUs.

    accelerate 1.15 looks at the plugin for kinds of devices that it lists, and the CPU is not among them, nor does it
    take the mesh there; all that follows is the same, and gloo does what NCCL does.
    """
    state = accelerator.state
    state.fsdp_plugin, state.parallelism_config = fsdp_plugin, parallelism_config
    state.device_mesh = parallelism_config.get_device_mesh("cpu")
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def load_once(family: Family, accelerator: Accelerator, dtype: torch.dtype) -> nn.Module:
    """The denoiser in the main process's host memory; in the others the same without values, on the meta device."""
    whole = family.load_denoiser(torch.device("cpu"), dtype) if accelerator.is_main_process else None
    made_by: list[Any] = [None if whole is None else (type(whole), dict(cast(Any, whole).config))]
    broadcast_object_list(made_by)
    if whole is not None:
        return whole
    kind, settings = made_by[0]
    return outline(kind, settings, dtype)


def outline(kind: Any, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A frozen diffusers model of this class and these settings on the meta device."""
    with torch.device("meta"):
        made: nn.Module = kind.from_config(settings)
    return made.to(dtype).eval().requires_grad_(False)


def shard(denoiser: nn.Module, blocks: Iterable[nn.Module], accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Cut the model that `load_once` gave into shards, in place: its parameters are others (DTensor) afterwards.

    Each block is put together when it is run, forward and backward, and taken apart again. Gradients are summed in
    float32. Inputs keep their dtype: positions and times are float32, and in bfloat16 they would be others.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Not when the plugin is made: that sets an environment variable, by which transformers leaves text encoders empty.
    plugin.cpu_ram_efficient_loading = True
    for told in ("FSDP2-wrapped module .* returned a view", "Slicing a flattened dim"):  # neither is ours to mend
        warnings.filterwarnings("ignore", message=told)
    # accelerate wants an optimizer beside the model; ours are made for the shards, and do not go through it.
    stand_in = torch.optim.SGD([next(p for p in denoiser.parameters() if p.requires_grad)], lr=0.0)
    sharded = accelerator.prepare(denoiser, stand_in)[0]
    # The outermost layers too, which accelerate keeps together until the backward: after a preview there is none, and
    # what a checkpoint then puts into the shards would not be what is run next.
    sharded.set_reshard_after_forward(True)


# --- Checkpoints. A key is KIND/NAME: weights/…, extra/…, average/…, optimizer/adamw/exp_avg/…; and run/norms. ---

NORMS = "norms"
"""Spikes in a row, and the last steps' norms after it."""


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """A copy of what a sharded checkpoint holds, in host memory: this process's rows, as DTensors, and single numbers.

    Weights, what is kept beside them, the average and the optimizer's state are laid out as the weights are, so any
    number of processes can read them. State in blocks, as 8-bit AdamW's, is kept a shard, with "#0of4" in its key, and
    can be read by as many shards alone.
    """
    return {key: _on_host(part, like) for key, part, like in _entries(state)}


def _entries(state: TrainState) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Key, this process's part, and the parameter whose layout it has, if any."""
    yield f"run/{NORMS}", torch.tensor([state.spikes, *state.norms], dtype=torch.float64), None
    for name, parameter in state.trained.items():
        yield f"weights/{name}", own_part(parameter), parameter
        extra = state.updates.extra(name)
        if extra is not None:
            yield f"extra/{name}", extra, parameter
        if state.average is not None:
            yield f"average/{name}", state.average.weights[name], parameter
        in_blocks = OPTIMIZERS[state.optimizer].in_blocks
        shard = f"#{place_of(parameter)[0]}of{state.shards}" if in_blocks else ""
        for key, held in state.updates.optimizer_state(name).items():
            value = as_tensor(held)
            like = parameter if value.ndim and not in_blocks else None
            yield f"optimizer/{state.optimizer}/{key}{shard}/{name}", value, like


def as_tensor(value: Any) -> Tensor:
    return value if torch.is_tensor(value) else torch.tensor(value)


def _on_host(part: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return part.detach().to("cpu", copy=True)
    held = room_like(like, part.dtype)
    own_part(held).copy_(part)
    return held


def room_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Unfilled host memory laid out as a parameter is."""
    return torch.empty_like(like.detach(), dtype=dtype, device="cpu")


def writing_group() -> Any:
    """A group of all processes, apart from the training's, whose collectives a thread can use while training goes on.

    All processes must ask for it, once.
    """
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=24))


def write(folder: Path, copy: dict[str, Tensor], group: Any) -> None:
    """Write what `snapshot` gave into `folder`: one file a process, and `.metadata` by the first, last.

    All processes must call it, each with its own snapshot, in the same order. Raises StorageError in all of them when
    one cannot write.
    """
    try:
        # All lies in host memory, so nothing is copied ahead: that would open GPU 0 in the thread of every process.
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        save(cast(dict[str, Any], copy), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not is_of_disk(cause):
            raise cause from error
        raise StorageError(
            f"{folder}: process {rank} could not write its shard: {first_line(cause)}",
            hint="free some disk space; earlier checkpoints are untouched",
        ) from error


# --- The end of a run. ---


@torch.no_grad()
def gather(state: TrainState, family: Family, config: RunConfig) -> TrainState | None:
    """Put the tuned model together in the main process alone: a whole state as of one process; None in the others.

    Weights, what is kept beside them and their average come one at a time, so no device ever holds them all but the
    main one, at last. The sharded state is taken apart and its memory given back: it cannot be used afterwards.
    """
    whole = _whole_like(state, family, config) if state.accelerator.is_main_process else None
    into = dict(whole.bare.named_parameters()) if whole else {}
    for name, parameter in state.bare.named_parameters():
        _put_together(own_part(parameter), parameter, into.get(name))
        if name not in state.trained:
            continue
        extra = state.updates.extra(name)
        if extra is not None:
            _put_together(extra, parameter, whole.updates.extra(name) if whole else None)
        if state.average is not None:
            held = whole.average.weights[name] if whole and whole.average else None
            _put_together(state.average.weights[name], parameter, held)
    state.denoiser = state.bare = nn.Module()
    state.trained, state.updates, state.average = {}, Updates({}, _never), None
    state.accelerator.free_memory()
    release_memory()
    if whole:
        whole.bare.to(whole.accelerator.device)
    return whole


def _whole_like(state: TrainState, family: Family, config: RunConfig) -> TrainState:
    """The state of one process, in host memory; its numbers are the base's."""
    dtype = next(state.bare.parameters()).dtype
    denoiser = family.load_denoiser(torch.device("cpu"), dtype)
    parameters = dict(denoiser.named_parameters())
    trained = {name: parameters[name] for name in state.trained}
    average = None
    if state.average is not None:
        average = Average(trained, config.optim.ema_decay or 0.0, config.optim.ema_every)
    updates = Updates(trained, _never, rounding=config.full.rounding)
    return replace(
        state, denoiser=denoiser, bare=denoiser, trained=trained, updates=updates, average=average, shards=1
    )  # fmt: skip


def _never(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer for weights that are not moved any more."""
    return torch.optim.SGD(parameters, lr=0.0)


def _put_together(part: Tensor, like: Any, into: Tensor | None) -> None:
    """Copy all processes' parts of what is laid out as `like` into one tensor, where there is one."""
    mesh, rows = like.device_mesh, like.placements
    whole = DTensor.from_local(part, mesh, rows, shape=like.shape, stride=like.stride()).full_tensor()
    if into is not None:
        into.copy_(whole)
