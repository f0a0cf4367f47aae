"""What this machine is, and whether flux_ft can work on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ft.errors import ModelError

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow", "bitsandbytes")
OPTIONAL = ("bitsandbytes",)
NEEDED_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    figures: dict[str, Any] | None = None
    """What was measured, where something was."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        facts: dict[str, Any] = {"name": self.name, "ok": self.ok, "detail": self.detail}
        return facts if self.figures is None else facts | {"figures": self.figures}

    def for_people(self) -> str:
        """One line."""
        return f"{'ok     ' if self.ok else 'PROBLEM'} {self.name}: {self.detail}"


def examine() -> list[Finding]:
    """Look at everything; never raises for something that is missing."""
    python = Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")
    return [python, *(_library(name) for name in LIBRARIES), *_devices(), _tiny(), _disk(), _hub()]


def examine_gpus() -> list[Finding]:
    """Whether the GPUs, one of each kind, compute the same bits each time. About a minute each; never raises for that.

    Raises ConfigError when an environment variable keeps strict mode from working at all.
    """
    from flux_ft.train.determinism import prepare_environment

    prepare_environment()  # before anything computes on a GPU
    gpus = _gpus()
    if not gpus:
        return [Finding("gpu", False, "no GPU that torch can use, so there is nothing to repeat on one")]
    return [finding for gpu in gpus for finding in repeat_findings(gpu)]


def repeat_findings(device: torch.device, **options: Any) -> list[Finding]:
    """A finding for each pass that was repeated on this device; `options` are those of `check_repeats`."""
    from flux_ft.bench.repeat import check_repeats

    return [
        Finding(f"{device}: {row.what}", row.ok, row.for_people(), row.as_json())
        for row in check_repeats(device, **options)
    ]


def _gpus() -> list[torch.device]:
    """One of each kind."""
    import torch

    kinds = {torch.cuda.get_device_name(i): torch.device("cuda", i) for i in reversed(range(torch.cuda.device_count()))}
    found = sorted(kinds.values(), key=str)
    return [*found, *([torch.device("mps")] if torch.backends.mps.is_available() else [])]


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name, name in OPTIONAL, "not installed" + (" (only some optimizers need it)" * (name in OPTIONAL))
        )


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("device", False, f"torch cannot be loaded: {error}")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            Finding(
                f"cuda:{index}", torch.cuda.is_bf16_supported(),
                f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
                f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}",
            )
        )  # fmt: skip
    if torch.backends.mps.is_available():
        found.append(Finding("mps", True, "Apple GPU"))
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    if not found:
        threads += "; no GPU, so only flux-tiny is practical here"
    return [*found, Finding("cpu", True, threads)]


def _tiny() -> Finding:
    from flux_ft.families.tiny.weights import tiny_folder

    try:
        return Finding("flux-tiny", True, f"its weights are in {tiny_folder()}")
    except ModelError as error:
        return Finding("flux-tiny", False, f"{error.message}; {error.hint}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding("disk", free >= NEEDED_DISK_GB, f"{free:.0f} GB free in the current folder")


def _hub() -> Finding:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("hub", True, "offline by HF_HUB_OFFLINE=1: models must be local folders")
    has_token = get_token() is not None
    return Finding("hub", True, "logged in" if has_token else "not logged in; FLUX.1-dev needs `hf auth login`")
