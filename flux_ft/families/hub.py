"""Parts that transformers and diffusers load, from a folder or the Hub, whole or not at all. Loads without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flux_ft.errors import ModelError, first_line


def is_hub_id(source: str) -> bool:
    """Whether it reads owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None


def find_weights(source: str, subfolder: str, expected: str) -> tuple[Path, list[Path]]:
    """The folder of a diffusers model's part, and in it the files of weights, fetched first from a Hub id.

    `expected` says in words what should be there. Raises ModelError.
    """
    path, label = _place(source, subfolder, expected)
    if path.is_dir():
        folder = path / subfolder
        files = _files_of(folder)
    else:
        from huggingface_hub import snapshot_download

        try:
            names = [f"{subfolder}/{name}" for name in ("config.json", _INDEX)]
            snapshot = Path(snapshot_download(source, allow_patterns=names))
            folder = snapshot / subfolder
            names = [f"{subfolder}/{file.name}" for file in _files_of(folder)]
            snapshot_download(source, revision=snapshot.name, allow_patterns=names)
        except Exception as error:  # the Hub's client lets through its transport's own, whose classes change
            raise _not_fetched(label, source, error) from error
        files = _files_of(folder)
    if lost := [file for file in files if not file.is_file()]:
        raise ModelError(f"{label} lacks {lost[0].name}", hint=f"give {expected}; if it is one, download it again")
    return folder, files


def weights_at_hand(source: str) -> list[Path]:
    """The files of a transformer's weights that are on this machine; nothing is fetched.

    `source` is a folder, a Hub id, or one file. Raises ModelError for a broken index.
    """
    path = Path(source).expanduser()
    if path.suffix == ".safetensors":
        return [path] if path.is_file() else []
    folder = path / "transformer"
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "transformer/config.json") if is_hub_id(source) else None
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    return [file for file in _files_of(folder) if file.is_file()]


def load_part(cls: Any, source: str, subfolder: str, expected: str, dtype: Any = None) -> Any:
    """`cls.from_pretrained` of a folder or a Hub id; `expected` says in words what should be there.

    With a `dtype` it is a model, whose weights must be safetensors and complete. Raises ModelError.
    """
    path, label = _place(source, subfolder, expected)
    options: dict[str, Any] = {"subfolder": subfolder}
    if dtype is not None:
        # diffusers and transformers name the same option differently. A pickled file could run code.
        name = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
        options |= {name: dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        loaded = cls.from_pretrained(path if path.is_dir() else source, **options)
    except Exception as error:
        if path.is_dir():
            raise ModelError(f"{label} could not be loaded: {first_line(error)}", hint=f"give {expected}") from error
        raise _not_fetched(label, source, error) from error
    if dtype is None:
        return loaded
    part, info = loaded
    if info["missing_keys"]:  # both libraries would make the missing weights up
        raise ModelError(
            f"{label} lacks {len(info['missing_keys'])} tensors; first: {min(info['missing_keys'])}",
            hint=f"give {expected}; if it is one, download it again",
        )
    return part


_FILE = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_FILE}.index.json"


def _place(source: str, subfolder: str, expected: str) -> tuple[Path, str]:
    """Where `source` is, if that is a folder, and what messages call it."""
    path = Path(source).expanduser()
    if not path.is_dir() and not is_hub_id(source):
        raise ModelError(
            f"`{source}` is neither a folder nor a Hub id, which reads owner/name", hint=f"give {expected}"
        )
    return path, f"{source}: `{subfolder}`" if subfolder else source


def _files_of(folder: Path) -> list[Path]:
    """The files of weights that a folder has, or should have."""
    index = folder / _INDEX
    if not index.is_file():
        return [folder / _FILE]
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(named))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of weights: {first_line(error)}", hint="download it again") from error


def _not_fetched(label: str, source: str, error: Exception) -> ModelError:
    return ModelError(
        f"{label} could not be fetched from the Hub: {first_line(error)}",
        hint=f"check the name and the network; where https://huggingface.co/{source} asks for it, accept the "
        "licence and run `hf auth login`; or fetch it elsewhere with `hf download` and give the folder",
    )
