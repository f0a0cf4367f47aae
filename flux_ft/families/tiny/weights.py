"""flux-tiny's weights: one ZIP in the package, unpacked once into the user's cache folder. Loads without torch."""

from __future__ import annotations

import atexit
import hashlib
import os
import secrets
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path

from flux_ft.errors import ModelError
from flux_ft.files import cache_folder, write_whole

ARCHIVE = Path(__file__).with_name("flux-tiny.zip")
HALVES = b"bytes at even places, then those at odd ones"
MTIME_S = 946_684_800
"""The time of every unpacked file, 2000-01-01 UTC: what was made with a file knows it by size and time."""


def tiny_folder() -> Path:
    """A folder that `FluxPipeline.from_pretrained` loads, with the control LoRAs under `control/`.

    Several processes may ask at once. A folder with a file missing, or of another size, is mended. Where the cache
    folder cannot be written it is a temporary folder, removed when the process ends.

    Raises ModelError when the package's own archive is missing or damaged.
    """
    digest, sizes = _contents()
    base = cache_folder()
    if base is not None:
        folder = base / f"flux-tiny-{digest[:16]}"
        if not damaged(folder, sizes):
            return folder
        try:
            _unpack(folder, sizes)
            return folder
        except OSError:
            pass
    folder = _temporary_folder() / "flux-tiny"
    if damaged(folder, sizes):
        _unpack(folder, sizes)
    return folder


def damaged(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Those of the files in `sizes` (bytes, by relative path) that `folder` has not, or has at another size."""
    return [name for name, size in sizes.items() if _size(folder / name) != size]


def pack_folder(folder: Path, archive: Path) -> None:
    """All files of `folder` in one ZIP; the same files give the same bytes (on one zlib). Raises StorageError.

    Of a file of weights, bytes at even places come first: bf16's exponents, by themselves, take a ninth less.
    """
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(name)  # of 1980-01-01, the earliest that a ZIP can say
            entry.external_attr = 0o644 << 16
            data = (folder / name).read_bytes()
            if name.endswith(".safetensors"):
                entry.comment, data = HALVES, data[::2] + data[1::2]
            file.writestr(entry, data, zipfile.ZIP_DEFLATED, compresslevel=9)
    write_whole(archive, buffer.getvalue(), mode=0o644)


@cache
def _contents() -> tuple[str, dict[str, int]]:
    """SHA-256 of the archive, and its files' sizes."""
    try:
        data = ARCHIVE.read_bytes()
        with zipfile.ZipFile(BytesIO(data)) as file:
            return hashlib.sha256(data).hexdigest(), {entry.filename: entry.file_size for entry in file.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise _broken(error) from error


@cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="flux_ft-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unpack(folder: Path, sizes: Mapping[str, int]) -> None:
    """Whole into a folder beside, which then takes its name. Raises OSError, ModelError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    staging.mkdir()
    try:
        with zipfile.ZipFile(ARCHIVE) as file:
            for name in sizes:
                path = staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_joined(file.read(name)) if file.getinfo(name).comment == HALVES else file.read(name))
                os.utime(path, (MTIME_S, MTIME_S))
        try:
            staging.rename(folder)
        except OSError:  # it is there: another process was faster, or it is damaged
            for name in damaged(folder, sizes):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(folder / name)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise _broken(error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _joined(halves: bytes) -> bytes:
    """Bytes in their order again."""
    whole, even = bytearray(len(halves)), (len(halves) + 1) // 2
    whole[::2], whole[1::2] = halves[:even], halves[even:]
    return bytes(whole)


def _broken(error: Exception) -> ModelError:
    return ModelError(f"{ARCHIVE}: flux-tiny's weights cannot be read: {error}", hint="install flux_ft again")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
