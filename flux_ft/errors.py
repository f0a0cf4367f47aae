"""What can go wrong, said so that the user can mend it.

    FluxFTError                exit code 1: the run failed
    ├── InputError             exit code 2: something given to us is wrong
    │   ├── ConfigError            the run file or an override
    │   ├── DataError              the pictures or captions
    │   ├── ModelError             a model name, folder or checkpoint
    │   └── AdapterError           a LoRA file
    ├── NumbersError           training has come to nothing
    │   └── NonFiniteError         loss or gradient is not a number; nothing of that step is saved
    ├── StorageError           the disk is full or cannot be written
    └── StoppedByUser          exit code 130: interrupted, everything reported as saved is saved

A message says what is wrong and where; the hint says what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """The gist of a library's message, which may go on for pages."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def plain(line: str, most: int = 400) -> str:
    """A line with text of a stranger's file, for a terminal: no control characters, and not endless."""
    shown = "".join(letter if letter.isprintable() else " " for letter in line[:most])
    return shown if len(line) <= most else f"{shown} …"


class FluxFTError(Exception):
    """Any failure that is told to the user in one message, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(FluxFTError):
    """Something given to us is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """The run file or an override is wrong."""


class DataError(InputError):
    """The pictures or captions are wrong."""


class ModelError(InputError):
    """A model name, folder or checkpoint is wrong."""


class AdapterError(InputError):
    """A LoRA file is wrong, or does not fit the model."""


class NumbersError(FluxFTError):
    """Training has come to nothing: nothing moves, or everything jumps."""


class NonFiniteError(NumbersError):
    """Loss or gradient is not a number; nothing of that step is saved."""


class StorageError(FluxFTError):
    """The disk is full or cannot be written."""


class StoppedByUser(FluxFTError):
    """Interrupted; everything reported as saved is saved."""

    exit_code = 130
