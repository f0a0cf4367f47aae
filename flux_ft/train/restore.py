"""A checkpoint, whole or sharded, read into a run's state, whole or sharded.

A key is KIND/NAME: weights/…, extra/…, average/…, optimizer/adamw/exp_avg/…; and run/norms.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from flux_ft import log
from flux_ft.errors import ConfigError
from flux_ft.train.checkpoint import OPTIMIZER, WEIGHTS, Saved
from flux_ft.train.optim import Average, own_part, place_of
from flux_ft.train.setup import TrainState
from flux_ft.train.sharded import NORMS, as_tensor, room_like


def restore(state: TrainState, saved: Saved) -> None:
    """Bring `state` to where the checkpoint was made. Raises ConfigError when it is of other weights."""
    read_into(saved.path, state)
    state.step = saved.about.step
    log.say(f"resumed from step {state.step}")


@torch.no_grad()
def read_into(folder: Path, state: TrainState) -> None:
    """Bring weights, optimizer and average to where the checkpoint in `folder` was made.

    A sharded one and a whole one go into any number of shards or a whole state. Each process reads its rows, and none
    waits for another. The optimizer's own settings, its rates and decays, are not read: those of the run hold. Raises
    ConfigError when it does not fit.
    """
    state.settle()
    source = _read_shards if (folder / ".metadata").is_file() else _read_whole
    kept: dict[str, dict[str, Any]] = {}
    for key, part in source(folder, state):
        kind, *middle, name = key.split("/")
        if kind == "run":
            spikes, *state.norms = part.tolist()
            state.spikes = int(spikes)
        elif kind == "weights":
            own_part(state.trained[name]).copy_(part)
        elif kind == "extra":
            cast(Tensor, state.updates.extra(name)).copy_(part)
        elif kind == "average":
            cast(Average, state.average).weights[name].copy_(part)
        else:
            number = part.ndim == 0 and not part.is_floating_point()
            kept.setdefault(name, {})[middle[-1].split("#")[0]] = part.item() if number else part
    for name, values in kept.items():
        state.updates.set_optimizer_state(name, values)


class _Unpickler(pickle.Unpickler):
    """Makes what `.metadata` is made of and nothing else: a pickled file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):  # where it was written
            return PurePosixPath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


_METADATA = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), (FileSystemReader.__module__, "_StorageInfo"),
    *((Metadata.__module__, name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
}  # fmt: skip


class _Reader(FileSystemReader):
    """Reads `.metadata` as `_Unpickler` does."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                return cast(Metadata, _Unpickler(file).load())
        except pickle.UnpicklingError as error:
            raise ConfigError(f"{path}: not what a checkpoint writes: {error}", hint="start a new run") from error


def _read_shards(folder: Path, state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Key and this process's part of all that a sharded checkpoint holds for it."""
    stored: Mapping[str, Any] = _Reader(folder).read_metadata().state_dict_metadata
    sizes = {key: tuple(about.size) for key, about in stored.items()}
    _require_fit(state, sizes)
    room: dict[str, Tensor] = {}
    for key in _needed(state, sizes):
        like, dtype = state.trained.get(key.rsplit("/", 1)[1]), stored[key].properties.dtype
        if like is None or not sizes[key]:
            room[key] = torch.empty(sizes[key], dtype=dtype)
        elif key.startswith("weights/"):
            room[key] = like.detach()
        elif "#" not in key:
            room[key] = room_like(like, dtype)
        elif f"#{place_of(like)[0]}of" in key:
            room[key] = torch.empty(sizes[key], dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(cast(dict[str, Any], room), storage_reader=_Reader(folder), no_dist=True)
    yield from ((key, own_part(value)) for key, value in room.items())


def _read_whole(folder: Path, state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Key and this process's part of all that an unsharded checkpoint holds."""
    saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        sizes = {f"weights/{name}": tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        found = {f"extra/{name}": value for name, value in saved["updates"]["extra"].items()}
        found |= {f"average/{name}": value for name, value in saved.get("average", {}).items()}
        found[f"run/{NORMS}"] = torch.tensor([saved["spikes"], *saved["norms"]], dtype=torch.float64)
        for name, values in saved["updates"]["state"].items():
            found |= {f"optimizer/{saved['name']}/{key}/{name}": as_tensor(value) for key, value in values.items()}
        sizes |= {key: tuple(value.shape) for key, value in found.items()}
        _require_fit(state, sizes)
        for key in _needed(state, sizes):
            name = key.rsplit("/", 1)[1]
            whole = state.shards == 1 or name not in state.trained or not sizes[key]
            rows = slice(None) if whole else _rows(state.trained[name], state.shards)
            if key not in found:
                yield key, file.get_tensor(name) if whole else file.get_slice(name)[rows]
            else:
                yield key, (found[key] if whole else found[key][rows]).clone()


def _rows(like: Any, shards: int) -> slice:
    """The rows of a weight that this process holds: all, or its share, rounded up; the last may hold fewer."""
    first = sum(place_of(like)) * -(-like.shape[0] // shards)
    return slice(first, first + own_part(like).shape[0])


def _needed(state: TrainState, found: Iterable[str]) -> list[str]:
    """The keys that the state has a place for: an average may be left out."""
    return [key for key in found if state.average is not None or not key.startswith("average/")]


def _require_fit(state: TrainState, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError unless a checkpoint with entries of these shapes can be read into the state."""
    wanted = {key: shape for key, shape in found.items() if key.startswith("run/")}
    for name, parameter in state.trained.items():
        wanted[f"weights/{name}"] = tuple(parameter.shape)
        if state.updates.extra(name) is not None:
            wanted[f"extra/{name}"] = tuple(parameter.shape)
        if state.average is not None:
            wanted[f"average/{name}"] = tuple(parameter.shape)
    entries = {key: found[key] for key in _needed(state, found) if not key.startswith("optimizer/")}
    if entries != wanted:
        odd = min(key for key in wanted.keys() | entries.keys() if wanted.get(key) != entries.get(key))
        raise ConfigError(
            f"the checkpoint is of another run; first: `{odd}` is {entries.get(odd, 'missing')}, expected "
            f"{wanted.get(odd, 'no such entry')}",
            hint="resume with the `model`, `optim` and `full` settings that it was made with",
        )
    for key, shape in found.items():
        kind, *middle, name = key.split("/")
        if kind != "optimizer":
            continue
        if middle[0] != state.optimizer:
            raise ConfigError(
                f"the checkpoint was made by {middle[0]}, this run's optimizer is {state.optimizer}",
                hint=f"set `optim.name: {middle[0]}`",
            )
        cut = middle[1].partition("#")[2]
        in_blocks = not cut and shape not in ((), wanted[f"weights/{name}"])
        if (cut and not cut.endswith(f"of{state.shards}")) or (in_blocks and state.shards > 1):
            made_in = cut.partition("of")[2] or "1"
            raise ConfigError(
                f"the checkpoint holds {state.optimizer}'s state of `{name}` in blocks, cut for {made_in} "
                f"processes to a node, and this run has {state.shards}",
                hint="resume with as many processes, or start a new run with another `output`; adamw's state can be "
                "cut anew",
            )
