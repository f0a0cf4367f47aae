"""Between a run's state and its checkpoints: what is saved, what it is put back into, and whether there is space."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flux_ft import log
from flux_ft.adapters.formats import EXPORT_DTYPES
from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError, FluxFTError, NumbersError, StorageError
from flux_ft.infer.fit import host_bytes
from flux_ft.train import checkpoint, sharded
from flux_ft.train.loop import any_process
from flux_ft.train.optim import OPTIMIZERS, ROUNDINGS, own_part
from flux_ft.train.saving import Job
from flux_ft.train.setup import TrainState

T = TypeVar("T")
SAMPLE = 4096
"""Numbers of each weight that are looked at to see whether it moves."""


def require_space(folder: Path, state: TrainState, config: RunConfig) -> None:
    """Raise StorageError unless checkpoints, exports and pictures will fit; say the need where it is not small."""
    one, exports = checkpoint_bytes(state, config), export_bytes(state, config)
    present = len(list(folder.glob("checkpoints/step-??????")))  # they make room for those to come
    saved = 0 if config.checkpoint.every is None else one * max(1, config.checkpoint.keep + 1 - present)
    need = saved + exports + checkpoint.SPARE_BYTES
    free = shutil.disk_usage(folder).free
    told = (
        f"{need / 1e9:.2f} GB, of which checkpoints {saved / 1e9:.2f} GB ({config.checkpoint.keep} kept, one more "
        f"being written) and exported files {exports / 1e9:.2f} GB"
    )
    if free < need:
        raise StorageError(
            f"{folder}: {free / 1e9:.2f} GB are free, this run needs about {told}",
            hint="free some disk space, choose another `output`, or lower `checkpoint.keep`"
            + (", or set `export.keep_full: false`" if config.export.keep_full else ""),
        )
    if config.finetune_type == "full":
        log.say(f"disk: this run needs about {told}; {free / 1e9:.2f} GB are free")


def checkpoint_bytes(state: TrainState, config: RunConfig) -> float:
    """About the size of one checkpoint."""
    count = sum(parameter.numel() for parameter in state.trained.values())
    stored = sum(parameter.nbytes for parameter in state.trained.values())
    narrow = sum(parameter.numel() for parameter in state.trained.values() if parameter.dtype is torch.bfloat16)
    averaged = 0 if state.average is None else 4 * count
    return (
        stored + count * OPTIMIZERS[state.optimizer].state_bytes + narrow * ROUNDINGS[config.full.rounding].extra_bytes
        + averaged
    )  # fmt: skip


def export_bytes(state: TrainState, config: RunConfig) -> float:
    """About the size of all files that are exported."""
    itemsize = EXPORT_DTYPES[config.export.dtype].itemsize
    if config.finetune_type == "lora":
        count = sum(parameter.numel() for parameter in state.trained.values())
        return count * itemsize * 2.6  # both files; fused block-diagonally, the kohya file holds 1.6 times the numbers
    everything = list(state.bare.named_parameters())
    lora_count = sum(config.lora_rank * sum(p.shape) for _, p in everything if p.ndim == 2)
    full = sum(p.numel() for _, p in everything) if config.export.keep_full else 0
    return (2 * lora_count + full) * itemsize


def find_checkpoint(folder: Path, config: RunConfig) -> checkpoint.Saved | None:
    """The run folder's newest whole checkpoint, or None, which is said.

    Raises ConfigError when it is past the run's end, or when there is none and a finished LoRA would be lost.
    """
    found, passed_over = checkpoint.latest(folder / "checkpoints")
    for sentence in passed_over:
        log.warn(sentence)
    if found is None:
        if any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"`output: {folder}` holds a finished LoRA and no checkpoint to go on from",
                hint="choose another `output`",
            )
        log.warn(f"no whole checkpoint in {folder}; starting from step 0")
        return None
    if found.about.step > config.iterations:
        raise ConfigError(
            f"`iterations` is {config.iterations}, but the run in {folder} is at step {found.about.step} already",
            hint=f"set `iterations` to {found.about.step} or more, or choose another `output`",
        )
    return found


def decided_by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decides, in every process; a FluxFTError of it is raised in all of them."""
    outcome: list[T | FluxFTError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [decide()]
        except FluxFTError as error:
            outcome = [error]
    (decided,) = broadcast_object_list(outcome)
    if isinstance(decided, FluxFTError):
        raise decided
    return cast(T, decided)


def snapshot(state: TrainState, copy: bool = True) -> checkpoint.State:
    """All that moves during training, in host memory unless not to be copied."""
    state.settle()
    optimizer: dict[str, Any] = {
        "name": state.optimizer,
        "updates": state.updates.state_dict(),
        "norms": list(state.norms),
        "spikes": state.spikes,
    }
    if state.average is not None:
        optimizer["average"] = dict(state.average.weights)
    weights = {name: parameter.detach() for name, parameter in state.trained.items()}
    take = _copied if copy else _as_is
    return checkpoint.State(take(weights), take(optimizer))


def _copied(tree: Any) -> Any:
    """Nested dictionaries and lists with every tensor copied to host memory."""
    if torch.is_tensor(tree):
        return tree.detach().to("cpu", copy=True).contiguous()
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return type(tree)(map(_copied, tree)) if isinstance(tree, list | tuple) else tree


def _as_is(tree: Any) -> Any:
    return tree


class Keeper:
    """Makes the checkpoints of a run, each of which tells the same about it but for its step. Every process has one."""

    def __init__(self, state: TrainState, config: RunConfig, about: checkpoint.About) -> None:
        self._state, self._config, self._about = state, config, about
        self._first = None if about.step else samples(state)
        folder = config.output_dir / "checkpoints"
        # Nothing newer than what the run goes on from is whole.
        self._torn = [path for path in folder.glob("step-??????") if int(path.name[5:]) > about.step]
        self._group = sharded.writing_group() if state.shards > 1 else None

    def job(self, step: int) -> Job:
        """Writes the state of now. Raises NumbersError when nothing has moved since the run began."""
        state, config = self._state, self._config
        if self._first is not None:
            require_moved(state, self._first)
            self._first = None
        folder, about = config.output_dir / "checkpoints", replace(self._about, step=step)
        need, keep = int(checkpoint_bytes(state, config)), config.checkpoint.keep
        if state.shards > 1:
            shard = sharded.snapshot(state)
            return Job(lambda: self._write_together(folder, about, shard, keep, need))
        if not state.accelerator.is_main_process:
            return Job(lambda: None)
        # Where a copy has no room beside what is there already, as when blocks are streamed, training waits instead.
        free = host_bytes()
        beside = free is None or need * 1.2 < free
        taken = snapshot(state, copy=beside)
        return Job(lambda: checkpoint.save(folder, about, taken, keep, self._torn), beside)

    def _write_together(
        self, folder: Path, about: checkpoint.About, shard: dict[str, torch.Tensor], keep: int, need: int
    ) -> None:
        """Every process writes its shard; the main one makes a checkpoint of them, and tells how it went."""
        if not self._state.accelerator.is_main_process:
            staging = self._told(None)
            if staging is not None:
                with suppress(StorageError):  # which the main process meets too, and tells
                    sharded.write(staging, shard, self._group)
            error = self._told(None)
        else:
            began: list[Path] = []

            def write(staging: Path) -> None:
                began.append(self._told(staging))
                sharded.write(staging, shard, self._group)

            error = None
            try:
                checkpoint.commit(folder, about, write, keep, need, self._torn)
            except StorageError as failure:
                error = failure
            if not began:
                self._told(None)
            self._told(error)
        if error is not None:
            raise error

    def _told(self, word: Any) -> Any:
        """What the main process says, in every process."""
        said = [word]
        torch.distributed.broadcast_object_list(said, src=0, group=self._group)
        return said[0]


def samples(state: TrainState) -> dict[str, torch.Tensor]:
    """The first numbers of every weight that is trained, or of a LoRA's up factors, without which it is nothing."""
    state.settle()
    is_lora = any(".lora_B." in name for name in state.trained)
    return {
        name: own_part(parameter.detach()).flatten()[:SAMPLE].to("cpu", copy=True)
        for name, parameter in state.trained.items()
        if ".lora_B." in name or not is_lora
    }


def require_moved(state: TrainState, first: dict[str, torch.Tensor]) -> None:
    """Raise NumbersError if these samples are still as they were: going on would give the base model."""
    now = samples(state)
    moved = any(not torch.equal(now[name], one) for name, one in first.items())
    if not any_process(state.accelerator, moved):  # which may hold no row of what is trained
        raise NumbersError(
            f"after {state.step} steps not one weight has changed, so the result would be the base model",
            hint="raise `learning_rate`; if it is not tiny, please report this with `flux-ft doctor --bundle`",
        )
