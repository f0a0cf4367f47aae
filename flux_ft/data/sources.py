"""Which kind of source a path is: a folder, a ZIP or a dataset. Loads without torch.

Every source tells the same story (`types.Source`): its files in a fixed order, hidden and unusable ones too with the
reason, and the bytes of each on demand.
"""

from __future__ import annotations

import difflib
import os
import stat

from flux_ft.config import HUB_PREFIX, SAVED_DATASET_FILES, SourceConfig
from flux_ft.data.archive import ZIP_STARTS, ZipSource
from flux_ft.data.folder import FolderSource, is_archive, open_regular, why
from flux_ft.errors import DataError
from flux_ft.types import Source


def open_source(config: SourceConfig) -> Source:
    """The source that `config.path` leads to: a folder, a ZIP (by ending or content), a parquet file, a saved dataset
    or `hf:owner/name`.

    Raises DataError when there is nothing to read at that path.
    """
    path = config.path
    if path.startswith(HUB_PREFIX):
        return _open_dataset(config)
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"`{path}`: no such file or folder", hint=_nearest(path)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` cannot be read: {why(error)}", hint="check the path and its permissions") from None
    if stat.S_ISDIR(kind):
        return _open_dataset(config) if _is_dataset(path) else FolderSource(path, path)
    if path.lower().endswith(".parquet"):
        return _open_dataset(config)
    if path.lower().endswith(".zip") or _starts_as_zip(path):
        return ZipSource(path, path)
    if is_archive(path):
        raise DataError(f"`{path}`: of archives, only ZIP is read", hint="unpack it and give the folder")
    raise DataError(
        f"`{path}` is a file, not a folder or ZIP", hint="give the folder that holds the pictures, or a ZIP of it"
    )


def _is_dataset(folder: str) -> bool:
    """Whether `datasets` made this folder: it says so, or nothing but parquet files is in it."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in SAVED_DATASET_FILES):
        return True
    has_parquet = False
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or name.upper().startswith(("README", "LICENSE")):
                continue
            if not name.lower().endswith(".parquet"):
                return False
            has_parquet = True
    return has_parquet


def _open_dataset(config: SourceConfig) -> Source:
    from flux_ft.data.hub import open_dataset  # heavy

    return open_dataset(config)


def _starts_as_zip(path: str) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(4) in ZIP_STARTS
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {why(error)}", hint="check its permissions") from None


def _nearest(path: str) -> str:
    """A hint that names what does exist in the place of the first part of `path` that does not."""
    missing = os.path.abspath(path)
    while not os.path.isdir(folder := os.path.dirname(missing)) and folder != missing:
        missing = folder
    try:
        by_lower = {name.lower(): name for name in sorted(os.listdir(folder))}
    except OSError:
        by_lower = {}
    close = difflib.get_close_matches(os.path.basename(missing).lower(), by_lower, n=1)
    if close:
        return f"did you mean `{os.path.join(folder, by_lower[close[0]])}`?"
    return f"give a folder or ZIP of pictures, or {HUB_PREFIX}owner/name"
