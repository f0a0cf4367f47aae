"""Weights read into the system's cache before they are asked for, beside imports and encoders. Loads without torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flux_ft.errors import ModelError
from flux_ft.families.hub import weights_at_hand

ADVICE_BYTES = 128 * 2**10
"""Linux reads no more of one piece of advice than it reads ahead by itself, and this is its least usual setting."""


def read_ahead(files: Iterable[Path]) -> None:
    """Let the system read files while the caller goes on; nothing where it takes no such advice."""
    if sys.platform == "linux":
        threading.Thread(target=_advise, args=(tuple(files),), daemon=True).start()


def read_model_ahead(source: str, room_bytes: int | None) -> None:
    """Read ahead a transformer, of what `find_variant` says, if it is at hand and fits into `room_bytes` of memory.

    What is wrong with it is told by who opens it.
    """
    with suppress(ModelError, OSError, ValueError):  # the Hub's client refuses some names by the last
        files = weights_at_hand(source)
        if room_bytes is not None and sum(file.stat().st_size for file in files) <= room_bytes:
            read_ahead(files)


def _advise(files: Iterable[Path]) -> None:
    for path in files:
        with suppress(OSError), path.open("rb") as file:
            for start in range(0, path.stat().st_size, ADVICE_BYTES):
                os.posix_fadvise(file.fileno(), start, ADVICE_BYTES, os.POSIX_FADV_WILLNEED)
