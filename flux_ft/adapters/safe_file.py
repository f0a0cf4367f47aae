"""A .safetensors file from anywhere, trusted with nothing: its header is checked whole before any tensor is read.

    8 bytes: length of the header, little-endian │ header: one JSON object │ data: the tensors, end to end
    {"__metadata__": {name: text, …}, key: {"dtype": "BF16", "shape": [16, 3072], "data_offsets": [start, end]}, …}

Source: the format's own description (huggingface/safetensors). What it calls invalid is refused here, by name: spans
that overlap, leave holes or point outside the file, keys twice, metadata that is not text. So are things that it allows
and no LoRA has: empty tensors, more than MOST_DIMENSIONS, names that cannot be printed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flux_ft.errors import AdapterError

LARGEST_HEADER = 32 * 2**20
"""Bytes. Those of LoRAs have some hundred kilobytes; a picture in the metadata may add a few megabytes."""
LARGEST_TABLE = 1_000_000
"""Characters of the header outside of strings, about 40 a tensor. Parsed they can take a hundred times their size."""
MOST_DIMENSIONS = 8
LONGEST_KEY = 500
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
"""safetensors' names of dtypes, less those of complex numbers and of less than a byte."""

_METADATA = "__metadata__"
_OUTSIDE_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[ \t\r\n]++', re.DOTALL)
_PICKLE = "pickled files are not read, since they can run code: ask for .safetensors, or convert it where it was made"
_AGAIN = "the file is damaged: copy or download it again"
_CUT_SHORT = "the file is cut short: copy or download it again"
_WRITER = "the file is damaged, or the tool that wrote it has a fault: download it again, or export it anew"
_FOREIGN = (  # how other files begin → what they are, and what to do
    (b"PK\3\4", "a ZIP, as torch.save writes .pt, .ckpt and .bin files", _PICKLE),
    (b"GGUF", "a GGUF file of quantised weights", "ask its author for the .safetensors file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull"),
    (b"<", "a web page, not a LoRA", "the download failed; its page may ask for a login or a licence"),
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. `start` and `end` count bytes from the first one after the header."""

    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafeFile:
    """A file whose header holds together. Nothing is held open; each reading makes sure that it is still the same file.

    What is read has memory of its own, so that the file may be replaced or removed meanwhile.
    """

    path: Path
    entries: dict[str, Entry]
    """By key, in the order of the data."""
    metadata: dict[str, str]
    data_start: int
    data_bytes: int
    stamp: tuple[int, ...]
    """What changes when the file does."""

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, of its stored dtype. AdapterError when the file has changed or cannot be read."""
        return self._read([key])[key]

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, read in one pass. AdapterError as `read`."""
        return self._read(list(self.entries))

    def _read(self, keys: list[str]) -> dict[str, Tensor]:
        try:
            with self.path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise AdapterError(f"`{self.path}` was changed while it was read", hint="try again")
                return {key: self._tensor(file, key) for key in keys}
        except (OSError, MemoryError, RuntimeError) as error:  # torch reports want of memory as RuntimeError
            raise AdapterError(f"`{self.path}` cannot be read: {error}", hint=_AGAIN) from error

    def _tensor(self, file: BufferedReader, key: str) -> Tensor:
        entry = self.entries[key]
        dtype = DTYPES[entry.dtype]
        bytes_ = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        file.seek(self.data_start + entry.start)
        if file.readinto(bytes_.numpy().data) != len(bytes_):
            raise AdapterError(f"`{self.path}` ends inside `{key}`", hint=_AGAIN)
        # A bool of any other byte than 0 and 1 is undefined behaviour.
        return (bytes_ != 0 if dtype is torch.bool else bytes_.view(dtype)).view(entry.shape)


def open_safely(path: Path) -> SafeFile:
    """Reads and checks the header alone. AdapterError names the file, the first bad key, what was expected."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would block, a device never end
            what = "is a folder, not a LoRA file" if stat.S_ISDIR(about.st_mode) else "is no ordinary file"
            raise AdapterError(f"`{path}` {what}", hint="give the path of a .safetensors file")
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            raw = _header_bytes(path, file, about.st_size)
    except FileNotFoundError as error:
        raise AdapterError(f"`{path}` does not exist", hint="give the path of a .safetensors file") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        hint = "make sure that it is a file that you may read"
        raise AdapterError(f"`{path}` cannot be read: {_reason(error)}", hint=hint) from error
    data_bytes = about.st_size - 8 - len(raw)
    try:
        header = _parsed(raw)
        metadata = _metadata(header.pop(_METADATA, {}))
        entries = {key: _entry(key, value) for key, value in header.items()}
        entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
        _require_gapless(entries, data_bytes)
    except AdapterError as error:
        raise AdapterError(f"`{path}`: {error.message}", hint=error.hint) from error
    return SafeFile(path, entries, metadata, 8 + len(raw), data_bytes, _stamp(about))


def _stamp(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _header_bytes(path: Path, file: BufferedReader, size: int) -> bytes:
    """The JSON part. AdapterError when the file is no safetensors file, saying what it is if that can be seen."""
    begin = file.read(64)
    length = int.from_bytes(begin[:8], "little")
    if not begin:
        raise AdapterError(f"`{path}` is empty", hint=_AGAIN)
    if begin[8:9] != b"{":
        raise _not_safetensors(path, begin)
    if length > LARGEST_HEADER:
        raise AdapterError(
            f"`{path}` claims a header of {length:,} bytes; at most {LARGEST_HEADER:,} are read", hint=_AGAIN
        )
    if 8 + length > size:
        raise AdapterError(
            f"`{path}` has {size:,} bytes, too few for its header of {length:,}",
            hint=_CUT_SHORT,
        )
    file.seek(8)
    return file.read(length)


def _not_safetensors(path: Path, begin: bytes) -> AdapterError:
    for magic, what, hint in _FOREIGN:
        if begin.lstrip().startswith(magic):
            return AdapterError(f"`{path}` is {what}", hint=hint)
    if (begin[:1] == b"\x80" and begin[1:2] <= b"\5") or path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        return AdapterError(f"`{path}` is a pickled file, not .safetensors", hint=_PICKLE)
    return AdapterError(f"`{path}` is not a .safetensors file", hint=f"{_AGAIN}; {_PICKLE}")


class _Twice(ValueError):
    """A key that is in an object twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def _parsed(raw: bytes) -> dict[str, Any]:
    """The header as JSON. AdapterError when it is none, has a key twice, or has a name that cannot be printed."""
    if len(_OUTSIDE_STRINGS.sub(b"", raw)) > LARGEST_TABLE:
        raise AdapterError("its header lists more than a LoRA can have", hint=_WRITER)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _Twice as error:
        raise AdapterError(f"{_shown(str(error))} is in the header twice", hint=_WRITER) from None
    except UnicodeDecodeError:
        raise AdapterError("its header is not UTF-8", hint=_AGAIN) from None
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos:,}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise AdapterError(f"its header is not JSON{where}", hint=_AGAIN) from None
    if not isinstance(header, dict):  # it begins with a brace
        raise AdapterError("its header is no JSON object", hint=_AGAIN)
    for key in header:
        if not key or len(key) > LONGEST_KEY or not key.isprintable():
            raise AdapterError(f"a tensor is named {_shown(key)}", hint=_WRITER)
    return header


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise AdapterError(f"`{_METADATA}` is {_kind(value)}, expected an object of strings", hint=_WRITER)
    for name, text in value.items():
        if not isinstance(text, str):
            raise AdapterError(f"metadata entry {_shown(name)} is {_kind(text)}, expected a string", hint=_WRITER)
        try:
            name.encode()
            text.encode()
        except UnicodeEncodeError:
            raise AdapterError(f"metadata entry {_shown(name)} is not Unicode", hint=_WRITER) from None
    return cast(dict[str, str], value)


def _entry(key: str, value: Any) -> Entry:
    """AdapterError unless dtype, shape and span are of their kinds and say the same size."""
    if not isinstance(value, dict):
        raise AdapterError(f"`{key}` is {_kind(value)}, expected dtype, shape and data_offsets", hint=_WRITER)
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        what = _shown(dtype) if isinstance(dtype, str) else _kind(dtype)
        raise AdapterError(f"`{key}` has dtype {what}", hint=f"known: {', '.join(DTYPES)}")
    shape, span = _whole_numbers(key, value, "shape"), _whole_numbers(key, value, "data_offsets")
    if len(shape) > MOST_DIMENSIONS or 0 in shape:
        what = f"{len(shape)} dimensions" if 0 not in shape else f"shape {_listed(shape)}, which holds nothing"
        raise AdapterError(f"`{key}` has {what}", hint=_WRITER)
    if len(span) != 2 or span[0] >= span[1]:
        raise AdapterError(f"`{key}` has data_offsets {_listed(span)}, expected [start, end]", hint=_WRITER)
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != span[1] - span[0]:
        raise AdapterError(
            f"`{key}` of shape {_listed(shape)} in {dtype} takes {_number(needed)} bytes, "
            f"its data_offsets span {_number(span[1] - span[0])}",
            hint=_WRITER,
        )
    return Entry(dtype, tuple(shape), span[0], span[1])


def _whole_numbers(key: str, value: Mapping[str, Any], field: str) -> list[int]:
    numbers = value.get(field)
    # type(), because True is an int too.
    if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
        raise AdapterError(f"`{key}` has a bad `{field}`, expected a list of whole numbers from 0", hint=_WRITER)
    return numbers


def _require_gapless(entries: Mapping[str, Entry], data_bytes: int) -> None:
    """AdapterError unless the spans, given by start, follow on each other from 0 to the file's end."""
    end, before = 0, ""
    for key, entry in entries.items():
        if entry.start < end:
            raise AdapterError(f"`{key}` overlaps `{before}`", hint=_WRITER)
        if entry.start > end:
            raise AdapterError(f"bytes {end:,} to {_number(entry.start)} of the data are of no tensor", hint=_WRITER)
        if entry.end > data_bytes:
            raise AdapterError(
                f"`{key}` ends at byte {_number(entry.end)} of the data, which has {data_bytes:,}",
                hint=_CUT_SHORT,
            )
        end, before = entry.end, key
    if end < data_bytes:
        raise AdapterError(f"{data_bytes - end:,} bytes at its end are of no tensor", hint=_WRITER)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "missing or null"}
    return kinds.get(type(value), "a number")


def _shown(text: str, most: int = 80) -> str:
    """Any text from a file, quoted, short and printable."""
    return ascii(text) if len(text) <= most else f"{text[:most]!a} and so on"


def _listed(numbers: list[int], most: int = 9) -> str:
    more = ", …" if len(numbers) > most else ""
    return f"[{', '.join(map(_number, numbers[:most]))}{more}]"


def _number(value: int) -> str:
    """Thousands apart; what has thousands of digits would be refused by str()."""
    return f"{value:,}" if value < 10**20 else "more than 10^20"
