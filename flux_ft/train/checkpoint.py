"""Checkpoints: all that is needed to go on, written whole or not at all.

A checkpoint is a folder `step-000100` with the trained weights, the optimizer's state and, written last, a manifest of
sizes and SHA-256. It is made under another name and renamed; older ones go only after the new one is in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flux_ft.errors import ConfigError, StorageError

MANIFEST = "manifest.json"
FILES = {"weights.safetensors", "optimizer.pt"}


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` optimizer steps."""

    step: int
    weights: dict[str, torch.Tensor]
    """What is trained, by name: a LoRA's factors, or weights of the model itself."""
    optimizer: dict[str, Any]
    """The optimizer's state, and whatever else goes with the weights."""
    fingerprint: dict[str, Any]
    """What must be the same for the run to go on: settings by dotted key, the data's digest."""


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-…` and remove all but the newest `keep`. Raises StorageError; older ones then stay."""
    target = folder / f"step-{checkpoint.step:06d}"
    staging = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file(checkpoint.weights, staging / "weights.safetensors")
        torch.save(checkpoint.optimizer, staging / "optimizer.pt")
        files = {path.name: _describe(path) for path in sorted(staging.iterdir())}
        manifest = {"step": checkpoint.step, "fingerprint": checkpoint.fingerprint, "files": files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in staging.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(staging, ignore_errors=True)
        raise StorageError(
            f"{target}: the checkpoint could not be written: {error}",
            hint="free some disk space and run again with --resume; earlier checkpoints are untouched",
        ) from error
    steps = sorted(folder.glob("step-??????"))
    # What lies after this step was passed over as torn, or this step would not have been reached again.
    for old in [*steps[: max(0, steps.index(target) + 1 - keep)], *steps[steps.index(target) + 1 :]]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in `folder`, or None; and a sentence about each that was passed over as torn."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-??????"), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return _read(path), passed_over
        passed_over.append(f"{path.name} is not whole ({fault}), so it is not used")
    return None, passed_over


def find_fault(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None when every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        described = dict(manifest["files"])
        is_ours = f"step-{manifest['step']:06d}" == path.name and isinstance(manifest["fingerprint"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if not is_ours or described.keys() != FILES:
        return f"{MANIFEST} is not this checkpoint's"
    for name in sorted(FILES):
        try:
            if _describe(path / name) != described[name]:
                return f"{name} was altered"
        except OSError as error:
            return f"{name} is missing or unreadable: {error.strerror}"
    return None


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError naming every key whose value differs between the checkpoint and this run."""
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    if changed:
        lines = "; ".join(f"`{key}` was {saved.get(key)!r}, is now {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"the run cannot go on from its checkpoint, because something changed: {lines}",
            hint="put it back as it was, or start a new run with another `output`",
        )


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return Checkpoint(
        step=manifest["step"],
        weights=load_file(path / "weights.safetensors"),
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        fingerprint=manifest["fingerprint"],
    )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Make sure that a file (or, where the system allows it, a folder's entries) has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
