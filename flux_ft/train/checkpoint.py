"""Checkpoints: all that is needed to go on, written whole or not at all.

A checkpoint is a folder `step-000100`. It is made under another name; its files are written and fsynced, then a sealed
manifest of their sizes and SHA-256; then the folder is renamed and its parent fsynced; and only then do older ones go.

    weights.safetensors  optimizer.pt      of one process, or of several that hold all weights each
    __0_0.distcp  …  .metadata             of several that hold a shard each (torch.distributed.checkpoint)
    manifest.json                          step, settings, circumstances, drift, files, digest
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flux_ft.errors import StorageError
from flux_ft.files import describe, seal, sync, unseal

T = TypeVar("T")
MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"
SHARDED = ".metadata"
"""The file that every sharded checkpoint has; it tells which shard lies where."""
SPARE_BYTES = 50_000_000
"""That a write leaves free, for what else the run writes."""
_HASHING_THREADS = 8
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container")
"""What torch's RuntimeErrors name when a disk is full."""


@dataclass(frozen=True)
class About:
    """What a manifest says besides the files."""

    step: int
    fingerprint: dict[str, Any]
    """Settings and data that the numbers follow from, by dotted key."""
    circumstances: dict[str, Any] = field(default_factory=dict)
    """Machine, software and processes, which decide about the last bits."""
    drift: list[str] = field(default_factory=list)
    """What was changed on the way, with leave."""


@dataclass(frozen=True)
class State:
    """A run's numbers, in host memory."""

    weights: dict[str, torch.Tensor]
    """What is trained, by name: a LoRA's factors, or weights of the model itself."""
    optimizer: dict[str, Any]
    """The optimizer's state, and whatever else goes with the weights."""

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in _tensors([self.weights, self.optimizer]))


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    path: Path
    about: About


def save(folder: Path, about: About, state: State, keep: int, torn: Sequence[Path] = ()) -> Path:
    """Write `folder/step-…` and remove all but the newest `keep`, and those that were found `torn`.

    Raises StorageError; older ones then stay.
    """

    def write(staging: Path) -> None:
        save_file(state.weights, staging / WEIGHTS)
        torch.save(state.optimizer, staging / OPTIMIZER)
        shutil.copymode(staging / OPTIMIZER, staging / WEIGHTS)  # safetensors lets none but the owner read

    return commit(folder, about, write, keep, state.nbytes, torn)


def commit(
    folder: Path,
    about: About,
    write: Callable[[Path], None],
    keep: int,
    need_bytes: int = 0,
    torn: Sequence[Path] = (),
) -> Path:
    """Make the checkpoint of the files that `write` puts into the folder it is given; see `save`."""
    target = folder / f"step-{about.step:06d}"
    staging = target.with_name(target.name + ".partial")
    try:
        for stray in folder.glob("step-*.partial"):  # a kill left it
            shutil.rmtree(stray, ignore_errors=True)
        is_first = not folder.exists()
        staging.mkdir(parents=True)
        if is_first:
            sync(folder.parent)
        free = shutil.disk_usage(staging).free
        if free < need_bytes + SPARE_BYTES:
            raise OSError(f"it takes {need_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free")
        write(staging)
        files = sorted(staging.iterdir())
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            described = dict(zip((path.name for path in files), pool.map(_settle, files), strict=True))
        manifest = staging / MANIFEST
        manifest.write_bytes(seal({**asdict(about), "files": described}))
        sync(manifest)
        sync(staging)
        _discard(target)
        staging.rename(target)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError, StorageError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not is_of_disk(error):
            raise
        raise StorageError(
            f"{target}: the checkpoint could not be written: {error}",
            hint="free some disk space; earlier checkpoints are untouched, and --resume goes on from the newest",
        ) from error
    for useless in torn:
        if useless != target:
            _discard(useless)
    steps = sorted(folder.glob("step-??????"))
    # What lies after this step was passed over as torn, or this step would not have been reached again.
    for old in [*steps[: max(0, steps.index(target) + 1 - keep)], *steps[steps.index(target) + 1 :]]:
        _discard(old)
    return target


def is_of_disk(error: BaseException) -> bool:
    """Whether a write has failed for want of a disk that takes it, and not of sense."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _TORCH_WRITES)
    return isinstance(error, OSError | SafetensorError)


def latest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint in `folder`, or None; and a sentence about each that was passed over as torn.

    Raises StorageError when one cannot be read: it may be whole.
    """
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-??????"), reverse=True):
        try:
            return Saved(path, _verified(path)), passed_over
        except ValueError as fault:
            passed_over.append(f"{path.name} is not whole ({fault}), so it is not used")
    return None, passed_over


def find_fault(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None when every byte is as it was written."""
    try:
        _verified(path)
    except ValueError as fault:
        return str(fault)
    return None


def _verified(path: Path) -> About:
    """What the manifest says. Raises ValueError unless it is whole and every file is as it says."""
    try:
        manifest = unseal(_there(path / MANIFEST, Path.read_bytes))
        described = dict(manifest.pop("files"))
        about = About(**manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is missing or unreadable") from error
    if f"step-{about.step:06d}" != path.name or not (described.keys() >= {WEIGHTS, OPTIMIZER} or SHARDED in described):
        raise ValueError(f"{MANIFEST} is not this checkpoint's")

    def fault(name: str) -> str | None:
        try:
            return None if _there(path / name, describe) == described[name] else f"{name} was altered"
        except ValueError as missing:
            return str(missing)

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for found in pool.map(fault, sorted(described)):
            if found:
                raise ValueError(found)
    return about


def _there(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file. Raises ValueError when there is none, StorageError when it cannot be read now."""
    try:
        return read(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror or error}", hint="see to the disk; nothing was changed on it"
        ) from error


def _discard(path: Path) -> None:
    """Remove a checkpoint; a kill may not leave half of it under its name."""
    with suppress(OSError):
        shutil.rmtree(path.rename(path.with_name(path.name + ".old.partial")))


def _settle(path: Path) -> dict[str, Any]:
    """Bring a file to the disk and describe it."""
    sync(path)
    return describe(path)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested dictionaries and lists."""
    if torch.is_tensor(tree):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for one in inner for tensor in _tensors(one)]
