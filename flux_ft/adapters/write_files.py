"""Checkpoints as files, written tensor by tensor: what is in memory is one matrix, not the model.

A file or folder is there whole or not at all, and only where the disk can hold it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_ft import log
from flux_ft.adapters.checkpoint_files import DTYPES, Checkpoint, Weight
from flux_ft.errors import ConfigError, ModelError, StorageError
from flux_ft.files import write_whole

SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""How safetensors spells the dtypes that a weight may have."""
_STEM = "diffusion_pytorch_model"
_BYTES = {  # of the types that only other parts of a checkpoint have
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    key: str
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes. ModelError for a type that we do not know."""
        itemsize = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else _BYTES.get(self.dtype)
        if itemsize is None:
            raise ModelError(f"`{self.key}` is of type {self.dtype}, which cannot be copied", hint="use another base")
        return math.prod(self.shape) * itemsize


def require_free(folder: Path, need: int) -> None:
    """Raise StorageError unless `need` bytes, and a little more, are free where `folder` is or will be."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    if free < need * 1.01 + 10_000_000:
        raise StorageError(
            f"{folder}: {free / 1e9:.2f} GB are free, {need / 1e9:.2f} GB are needed",
            hint="free some disk space, or choose another output",
        )


def require_new(*outputs: Path) -> None:
    """Raise ConfigError when something would be overwritten."""
    for output in outputs:
        if output.exists():
            raise ConfigError(f"`{output}` exists already", hint="choose another output, or remove it first")


def single_file_size(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the tensors that `write_single_file` writes; the header adds some hundred kB at most."""
    return sum(entry.size for entry in _single_file_entries(checkpoint, dtype))


def write_single_file(
    checkpoint: Checkpoint, output: Path, dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> int:
    """Write the transformer to one .safetensors file in the original layout, and return its size in bytes.

    `dtype` is bf16, fp16 or fp32, whatever the tensors are stored as. `metadata` goes into the header. A file that
    `output` names is replaced in one step; mode 0644. ComfyUI, diffusers' `from_single_file` and `model:` of a run file
    read it. Raises ModelError, naming the tensor, for what is not finite in `dtype`, StorageError when the disk cannot
    hold the file.
    """
    entries = _single_file_entries(checkpoint, dtype)
    require_free(output.parent, sum(entry.size for entry in entries))

    with log.progress(f"write {output.name}", len(entries)) as bar:

        def tensors() -> Iterator[Tensor]:
            for weight in checkpoint.weights.values():
                yield _as_dtype(weight, dtype, checkpoint.label)
                bar.advance()

        write_whole(output, file_pieces(entries, tensors(), metadata), mode=0o644)
    return output.stat().st_size


def _single_file_entries(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Entry]:
    return [Entry(weight.name, DTYPE_NAMES[dtype], weight.shape) for weight in checkpoint.weights.values()]


def _as_dtype(weight: Weight, dtype: torch.dtype, label: str) -> Tensor:
    values = weight.read()
    plain = values.grid if values.scale is None else values.float()
    written = plain.to(dtype)
    if not torch.isfinite(written).all():
        if torch.isfinite(plain.float()).all():
            raise ModelError(
                f"`{weight.name}` of {label} holds numbers too large for {DTYPE_NAMES[dtype]}", hint="write bf16"
            )
        raise ModelError(f"`{weight.name}` of {label} holds NaN or infinity", hint="the training diverged")
    return written


def file_pieces(
    entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces; `tensors` come in the order of `entries`, and are asked for one by one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for entry in entries:
        end = start + entry.size
        header[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry, tensor in zip(entries, tensors, strict=True):
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert data.nbytes == entry.size, entry.key
        yield data


def write_folder(
    config: Path, output: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], shard_bytes: int
) -> list[Path]:
    """config.json, shards and their index, in a folder that gets its name when it is whole; returns the shards."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(one.size for one in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [f"{_STEM}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [f"{_STEM}.safetensors"]
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write_whole(staging / "config.json", config.read_bytes())
        for name, shard in zip(names, shards, strict=True):
            write_whole(staging / name, file_pieces(shard, (next(tensors) for _ in shard)))
        next(tensors, None)  # ends the progress bar
        if count > 1:
            where = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
            index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": where}
            write_whole(staging / f"{_STEM}.safetensors.index.json", json.dumps(index, indent=2).encode())
        staging.rename(output)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise StorageError(f"cannot write `{output}`: {error.strerror or error}") from error
        raise
    return [output / name for name in names]
