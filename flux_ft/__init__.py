"""Fine-tune FLUX image models on your own GPUs."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_ft.infer.runner import Runner as Runner
    from flux_ft.infer.tasks import Canny as Canny
    from flux_ft.infer.tasks import Depth as Depth
    from flux_ft.infer.tasks import Edit as Edit
    from flux_ft.infer.tasks import Fill as Fill
    from flux_ft.infer.tasks import Lora as Lora
    from flux_ft.infer.tasks import Remix as Remix
    from flux_ft.infer.tasks import TextToImage as TextToImage
    from flux_ft.infer.tasks import Ultra as Ultra

__version__ = "0.1.0"

_TASKS = ("Canny", "Depth", "Edit", "Fill", "Lora", "Remix", "TextToImage", "Ultra")
_HOMES = {"Runner": "flux_ft.infer.runner"} | dict.fromkeys(_TASKS, "flux_ft.infer.tasks")
__all__ = ["Runner", "__version__", *_TASKS]


def __getattr__(name: str) -> Any:
    """The Python API, loaded when it is asked for: the command line must answer before torch is there."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    quiet_libraries()
    return getattr(import_module(_HOMES[name]), name)


def quiet_libraries() -> None:
    """Keep the libraries' bars and notices from drowning ours, before they load; a user's own settings win."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # read once, at the first product; strict training cannot do without
    }.items():
        os.environ.setdefault(name, value)
    # It warns at import of a CPU kernel that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
