"""Parts that transformers and diffusers load, from a folder or the Hub, whole or not at all. Loads without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flux_ft.errors import ModelError, first_line


def is_hub_id(source: str) -> bool:
    """Whether it reads owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None


def load_part(cls: Any, source: str, subfolder: str, expected: str, dtype: Any = None) -> Any:
    """`cls.from_pretrained` of a folder or a Hub id; `expected` says in words what should be there.

    With a `dtype` it is a model, whose weights must be safetensors and complete. Raises ModelError.
    """
    path, label = Path(source).expanduser(), f"{source}: `{subfolder}`" if subfolder else source
    if not path.is_dir() and not is_hub_id(source):
        raise ModelError(
            f"`{source}` is neither a folder nor a Hub id, which reads owner/name", hint=f"give {expected}"
        )
    options: dict[str, Any] = {"subfolder": subfolder}
    if dtype is not None:
        # diffusers and transformers name the same option differently. A pickled file could run code.
        name = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
        options |= {name: dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        loaded = cls.from_pretrained(path if path.is_dir() else source, **options)
    except Exception as error:  # the Hub's client lets through its transport's own, whose classes change
        if path.is_dir():
            raise ModelError(f"{label} could not be loaded: {first_line(error)}", hint=f"give {expected}") from error
        raise ModelError(
            f"{label} could not be fetched from the Hub: {first_line(error)}",
            hint=f"check the name and the network; where https://huggingface.co/{source} asks for it, accept the "
            "licence and run `hf auth login`; or fetch it elsewhere with `hf download` and give the folder",
        ) from error
    if dtype is None:
        return loaded
    part, info = loaded
    if info["missing_keys"]:  # both libraries would make the missing weights up
        raise ModelError(
            f"{label} lacks {len(info['missing_keys'])} tensors; first: {min(info['missing_keys'])}",
            hint=f"give {expected}; if it is one, download it again",
        )
    return part
