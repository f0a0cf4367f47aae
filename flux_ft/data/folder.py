"""A folder as a source, and what files of folders and ZIPs have in common. Loads without torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from flux_ft.errors import DataError
from flux_ft.types import FoundFile

MAX_FILE_BYTES = 256 * 2**20
"""Largest file that is read; a picture of 89 megapixels, the most that is decoded, has as much uncompressed."""
PICTURE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif", ".jfif", ".jpe"))
"""Of names, where the content can't be asked."""
RUN_FILES = ("run.yaml", "metrics.jsonl")
"""Both are in a folder that was trained in: with the pictures of a run below its data, each start would find others."""
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
ARCHIVE_ENDINGS = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".cbz", ".cbr")

_MACOS_FOLDER = "__MACOSX"
_WINDOWS_JUNCTION = 0xA0000003
"""IO_REPARSE_TAG_MOUNT_POINT, which the module `stat` has on Windows alone."""


class FolderSource:
    """A folder of files, at any depth."""

    rows = False

    def __init__(self, root: str | os.PathLike[str], label: str) -> None:
        """Raises DataError when `root` is not a folder."""
        self.label = label
        self.identity = os.path.realpath(root)
        if not os.path.isdir(self.identity):
            raise DataError(f"`{label}` is not a folder", hint="give a folder of pictures")

    def files(self) -> Iterator[FoundFile]:
        """Every file and every folder that was not entered, sorted by name. Raises DataError for an empty folder.

        A stamp is `size:mtime_ns:ctime_ns:inode`.
        """
        found = sorted(self._walk(), key=lambda one: one.name)
        if not found:
            raise DataError(f"`{self.label}` is empty", hint="give a folder that holds JPEG, PNG or WebP pictures")
        return iter(found)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError with the reason alone."""
        path = os.path.normpath(os.path.join(self.identity, name))
        if not path.startswith(os.path.join(self.identity, "")):
            raise DataError("cannot be read: not inside the folder")
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise DataError(f"has {size / 2**20:,.0f} MiB; files up to {MAX_FILE_BYTES // 2**20} MiB are read")
                data = file.read(size + 1)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {why(error)}") from None
        if len(data) != size:
            raise DataError("cannot be read: its length changed meanwhile")
        return data

    def _walk(self) -> Iterator[FoundFile]:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(os.path.join(self.identity, folder)) as entries:
                    for entry in entries:
                        name = folder + entry.name
                        if not _is_folder(entry):
                            yield _found(name, entry)
                        elif skip := _why_not_entered(entry):
                            yield FoundFile(name + "/", skip=skip)
                        else:
                            folders.append(name + "/")
            except OSError as error:
                if not folder:
                    raise DataError(
                        f"`{self.label}` cannot be read: {why(error)}", hint="check the folder's permissions"
                    ) from None
                yield FoundFile(folder, skip=f"folder cannot be read: {why(error)}")


def hidden_reason(name: str) -> str | None:
    """Why a file was never meant as a picture, by its POSIX path alone; None when it may be one."""
    *folders, last = name.split("/")
    if _MACOS_FOLDER in folders:
        return "in a macOS resource folder"
    if any(folder.startswith(".") for folder in folders):
        return "in a hidden folder"
    if last.startswith("."):
        return "hidden file"
    return "system file" if last.lower() in SYSTEM_FILES else None


def is_archive(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return name.lower().endswith(ARCHIVE_ENDINGS)


def stat_stamp(found: os.stat_result) -> str:
    """What differs when a file was written to or replaced: `size:mtime_ns:ctime_ns:inode`."""
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_ino}"


def open_regular(path: str) -> BinaryIO:
    """Open a file for reading, never waiting for somebody at the other end of a pipe. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError("not a regular file")


def why(error: OSError | ValueError) -> str:
    """What the system says is wrong, without the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _found(name: str, entry: os.DirEntry[str]) -> FoundFile:
    if skip := hidden_reason(entry.name):
        return FoundFile(name, skip=skip)
    try:
        # Not entry.stat(), which on Windows knows no inode and may be out of date.
        status = os.stat(entry.path)
    except OSError as error:
        return FoundFile(name, skip=f"cannot be read: {why(error)}")
    if not stat.S_ISREG(status.st_mode):
        return FoundFile(name, skip="not a regular file")
    skip = "an archive in a folder is not opened; name it as a source of its own" if is_archive(name) else None
    return FoundFile(name, stat_stamp(status), skip)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _why_not_entered(entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith("."):
        return "hidden folder, not entered"
    if entry.name == _MACOS_FOLDER:
        return "macOS resource folder, not entered"
    # A link can lead round in a circle; Windows has a second kind, which Python 3.11 does not take for one.
    if entry.is_symlink() or getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0) == _WINDOWS_JUNCTION:
        return "link to a folder, not followed"
    if all(os.path.isfile(os.path.join(entry.path, name)) for name in RUN_FILES):
        return "folder of a run, not entered"
    return None
