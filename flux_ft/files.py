"""Files are written whole or not at all: another name, fsync, rename. Loads without torch."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flux_ft.errors import StorageError

CACHE_VARIABLE = "FLUX_FT_CACHE"


def cache_folder(
    environment: Mapping[str, str] = os.environ, platform: str = sys.platform, home: Path | None = None
) -> Path | None:
    """Where we may keep what can be made again: FLUX_FT_CACHE, else in the user's cache folder; None without one."""
    if environment.get(CACHE_VARIABLE):
        return Path(environment[CACHE_VARIABLE])
    try:
        home = home or Path.home()
    except RuntimeError:
        return None
    if platform == "win32":
        base = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        given = Path(environment.get("XDG_CACHE_HOME", ""))
        base = given if given.is_absolute() else home / ".cache"
    return base / "flux_ft"


def write_whole(path: Path, data: bytes | Iterable[bytes | memoryview], mode: int | None = None) -> None:
    """Write `data` (one piece or several) to `path` and make its folder. On failure `path` is as it was.

    `mode` sets the file's permissions; None leaves them to the user's umask.

    Raises StorageError.
    """
    chunks = [data] if isinstance(data, bytes) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own per writer: two processes may write the same file at once.
        staging = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            with staging.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                staging.chmod(mode)
            staging.replace(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"cannot write `{path}`: {error.strerror or error}", hint="free space there, or choose another folder"
        ) from error


def require_writable(folder: Path, setting: str) -> None:
    """Make `folder` and try it, before hours of work are spent on what cannot be stored. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"`{setting}: {folder}` cannot be written: {error.strerror or error}",
            hint="choose a folder that can be written",
        ) from error


def sync(path: Path) -> None:
    """Make sure that a file (or, where the system allows it, a folder's entries) has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
        if sys.platform == "darwin":  # whose fsync stops at the drive's own memory
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON that tells whether it is whole: its last key, `digest`, is the SHA-256 of all before it."""
    digest = hashlib.sha256(_json(body)).hexdigest()
    return _json({**body, "digest": digest})


def unseal(data: bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError unless every byte is as `seal` wrote it."""
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        whole = seal(body) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not sealed JSON") from error
    if not whole:
        raise ValueError(f"altered since it was sealed with {digest}")
    found: dict[str, Any] = body
    return found


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode()
