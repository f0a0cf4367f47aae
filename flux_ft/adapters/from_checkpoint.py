"""A training's checkpoint read as the LoRA that it holds.

    checkpoints/step-000100/  weights.safetensors  `<path>.lora_A.trained.weight`, `<path>.lora_B.trained.weight`
                              optimizer.pt         with `optim.ema_decay` the averaged factors, which are what a run
                                                   exports
                              manifest.json        sizes and SHA-256 of both, the settings they were made with, sealed

Strength is alpha / rank, and alpha is in the settings: `lora.alpha`, or the rank where that is null.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ft.adapters.formats import read_adapter
from flux_ft.adapters.safe_file import open_safely
from flux_ft.errors import AdapterError, ModelError
from flux_ft.families.registry import find_variant
from flux_ft.files import unseal
from flux_ft.types import AdapterState, LoraLayer

MANIFEST, WEIGHTS, OPTIMIZER = "manifest.json", "weights.safetensors", "optimizer.pt"
_KEY = re.compile(r"(.+)\.lora_([AB])\.[^.]+\.weight")
_AGAIN = "take another checkpoint of the run, or the LoRA that it exported"


def read_lora(path: Path) -> AdapterState:
    """A LoRA file of any flavour, or a checkpoint's folder. Raises AdapterError."""
    return read_checkpoint(path) if path.is_dir() else read_adapter(path)


def read_checkpoint(folder: Path) -> AdapterState:
    """The LoRA of a checkpoint, as the run would export it then, in float32.

    Raises AdapterError for a folder that is none or not whole, and for a full fine-tune's, which holds no LoRA.
    """
    settings, files = _manifest(folder)
    if settings.get("finetune_type") != "lora":
        raise AdapterError(
            f"`{folder}` is a checkpoint of a full fine-tune and holds no LoRA",
            hint="take the LoRA that the run extracted and exported",
        )
    factors = _checked(folder, WEIGHTS, files, lambda path: open_safely(path).read_all())
    if settings.get("optim.ema_decay") is not None:
        factors = _checked(folder, OPTIMIZER, files, _average)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in factors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"`{folder}`: `{key}` is no factor of a LoRA", hint=_AGAIN)
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    alpha = settings.get("lora.alpha")
    layers = {path: _layer(folder, path, pair, alpha) for path, pair in pairs.items()}
    return AdapterState(layers, _metadata(folder, settings))


def _layer(folder: Path, path: str, pair: Mapping[str, Tensor], alpha: Any) -> LoraLayer:
    shapes = {name: tuple(tensor.shape) for name, tensor in pair.items()}
    down_RI, up_OR = pair.get("A"), pair.get("B")
    if down_RI is None or up_OR is None or down_RI.ndim != 2 or up_OR.ndim != 2 or len(down_RI) != up_OR.shape[1]:
        raise AdapterError(f"`{folder}`: the factors of `{path}` are no pair: {shapes}", hint=_AGAIN)
    return LoraLayer(down_RI, up_OR, float(len(down_RI) if alpha is None else alpha))


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings by dotted key, and what is known of the files."""
    try:
        manifest = unseal((folder / MANIFEST).read_bytes())
        settings, files = dict(manifest["fingerprint"]), dict(manifest["files"])
        if not isinstance(settings.get("lora.alpha"), (int, float, type(None))):
            raise ValueError("`lora.alpha` is no number")
        return settings, files
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"`{folder}` is no checkpoint of a training: its {MANIFEST} is missing or unreadable",
            hint="give a LoRA file, or a folder such as runs/my-cat/checkpoints/step-000100",
        ) from error


def _checked(folder: Path, name: str, files: Mapping[str, Any], read: Any) -> dict[str, Tensor]:
    """A file's tensors, once its bytes are those of the manifest."""
    try:
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"`{folder / name}` cannot be read: {error.strerror or error}", hint=_AGAIN) from error
    described = files.get(name)
    if not isinstance(described, dict) or described.get("sha256") != sha256:
        raise AdapterError(f"`{folder}` is not whole: {name} was altered", hint=_AGAIN)
    tensors: dict[str, Tensor] = read(folder / name)
    return tensors


def _average(path: Path) -> dict[str, Tensor]:
    try:
        average = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["average"]
        return {str(name): tensor.clone() for name, tensor in average.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise AdapterError(f"`{path}` holds no average of the weights", hint=_AGAIN) from error


def _metadata(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """What a LoRA's header would say of its base, where that is known here."""
    told = {"modelspec.title": folder.name}
    with suppress(ModelError, OSError):
        told["modelspec.architecture"] = find_variant(str(settings.get("model")))[0].architecture
    return told
