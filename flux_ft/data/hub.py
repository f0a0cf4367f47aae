"""Datasets as sources: on the Hugging Face Hub, saved by the `datasets` library, or as parquet files.

    hf:owner/name                     the newest commit of a dataset on the Hub, its default subset
    hf:owner/name@revision            a branch, tag or commit of it
    hf:owner/name:subset              one of its subsets; hf:owner/name@revision:subset for both
                                      (a repository of picture files is a folder, as one on this machine is)
    cats.parquet                      one file
    folder                            saved by `save_to_disk`, or anything that `datasets.load_dataset` reads

Rows keep their encoded bytes: nothing is decoded here. Without `streaming` a dataset is prepared once in the cache of
the `datasets` library as memory-mapped Arrow files, where any row is at hand and listing reads no picture. Parquet has
no such access: its rows are compressed in groups, and a group may be the whole file. With `streaming` nothing is
copied, and rows come forwards only. Nothing of a dataset is ever run, and a row can't name a file outside the dataset.

Loads without `datasets` and pyarrow, which take a second to import.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ft import log
from flux_ft.config import HUB_PREFIX, SourceConfig
from flux_ft.data.captions import CAPTION_COLUMNS
from flux_ft.data.folder import MAX_FILE_BYTES, PICTURE_ENDINGS, FolderSource, stat_stamp
from flux_ft.errors import DataError, FluxFTError, StorageError, first_line
from flux_ft.types import FoundFile, Source

if TYPE_CHECKING:
    import datasets
    import pyarrow

TABLE_ENDINGS = (".parquet", ".arrow", ".tar", ".zip")
"""Files that a repository has either of: pictures themselves, or tables and archives with pictures inside."""
ROWS_AT_ONCE = 64
"""How many rows are read from a parquet file at once, and listed at once."""
ROWS_KEPT = 16
"""How many rows of a stream can be asked for again without starting over."""
LONGEST_NAME = 80

_GRAMMAR = re.compile(r"(?P<repo>[^/@:\s]+/[^/@:\s]+)(@(?P<revision>[^:\s]+))?(:(?P<subset>.+))?")
_NO_PICTURE = "row without a picture"
_NOT_FETCHED = "the row holds an address instead of a picture, and addresses are not fetched"


def open_dataset(config: SourceConfig) -> Source:
    """The dataset that `config.path` names; its other settings choose split, columns and rows.

    A dataset that isn't in the cache yet is fetched first, unless `config.streaming`. One that was saved by
    `save_to_disk` lies there as Arrow files already, so `streaming` makes no difference to it.

    Raises DataError, also for all that goes wrong inside the library, and StorageError when the disk is full.
    """
    with _told(config):
        if config.path.startswith(HUB_PREFIX):
            return _open_hub(config)
        return _open_local(config)


@dataclass(frozen=True)
class Columns:
    """Which columns are read."""

    image: str
    caption: str | None
    labels: tuple[str, ...] = ()
    """The names of the classes, where the caption column holds numbers of classes."""

    @property
    def names(self) -> list[str]:
        return [self.image, *([self.caption] if self.caption is not None and self.caption != self.image else [])]

    def caption_of(self, value: object) -> str | None:
        """A row's caption: the text, the first text of a list, or the name of the class; None for an empty one."""
        if self.labels:
            return self.labels[value] if isinstance(value, int) and 0 <= value < len(self.labels) else None
        if isinstance(value, list):
            value = next((one for one in value if one), None)
        return value if isinstance(value, str) and value.strip() else None


@dataclass(frozen=True)
class Reach:
    """Where a row that holds a path instead of bytes may point to."""

    folders: tuple[Path, ...]
    """Resolved; a relative path is looked for in the first."""
    repo: str | None = None
    """The dataset on the Hub, for rows that are streamed from it file by file."""

    def find(self, path: str) -> Path | None:
        """The file on this machine; None if it lies outside, is no regular file, or makes no sense."""
        try:
            found = (self.folders[0] / path).resolve()
            inside = any(found.is_relative_to(folder) for folder in self.folders)
            return found if inside and found.is_file() else None
        except (OSError, ValueError, RuntimeError):
            return None

    def read(self, cell: object) -> bytes:
        """The encoded picture in one cell. Raises DataError with the reason alone."""
        if isinstance(cell, bytes):
            return cell
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (None, None)
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str):
            raise DataError(_NO_PICTURE)
        # A ZIP of pictures in a dataset is read in place: zip://<inside>::<where the ZIP is>.
        inside, _, container = path.rpartition("::")
        if inside and not re.fullmatch(r"zip://[^:]*", inside):
            raise DataError(_NOT_FETCHED)
        with _reading():
            if self.repo is not None and container.startswith(f"hf://datasets/{self.repo}@"):
                return _read_file(path)
            if "://" in container:
                raise DataError(_NOT_FETCHED)
            file = self.find(container)
            if file is None:
                raise DataError("the row names a file that is not in the dataset")
            return _read_file(f"{inside}::{file}" if inside else str(file))


@dataclass(frozen=True, eq=False)
class TableSource:
    """A dataset in Arrow files on this machine, any row at hand."""

    label: str
    identity: str
    table: datasets.Dataset
    """Formatted as Arrow, with the columns that are read and no others."""
    columns: Columns
    reach: Reach
    version: str
    """Differs whenever the Arrow files may differ."""
    limit: int | None = None
    rows: bool = True

    def files(self) -> Iterator[FoundFile]:
        """Every row, in order; the pictures' bytes are not touched."""
        import pyarrow.compute as pc
        from pyarrow.types import is_struct

        last = len(self.table) if self.limit is None else min(self.limit, len(self.table))
        for start in range(0, last, ROWS_AT_ONCE):
            with _told_of(self.label):
                rows = self._rows(start, min(start + ROWS_AT_ONCE, last))
                cells = rows[self.columns.image]
                fields = [field.name for field in cells.type] if is_struct(cells.type) else []
                data = pc.struct_field(cells, "bytes") if "bytes" in fields else cells
                missing = pc.is_null(data).to_pylist()
                paths = pc.struct_field(cells, "path").to_pylist() if "path" in fields else [None] * len(missing)
                captions = [None] * len(missing)
                if self.columns.caption is not None:
                    captions = rows[self.columns.caption].to_pylist()
            for row, (no_bytes, path, caption) in enumerate(zip(missing, paths, captions, strict=True), start):
                yield FoundFile(
                    name=_row_name(row, path),
                    stamp=self._stamp(row, path if no_bytes else None),
                    skip=_NO_PICTURE if no_bytes and not isinstance(path, str) else None,
                    caption=self.columns.caption_of(caption),
                )

    def read(self, name: str) -> bytes:
        row = _row_number(name)
        if row >= len(self.table):
            raise DataError("there is no such row")
        with _reading():
            cell = self._rows(row, row + 1)[self.columns.image][0].as_py()
        return self.reach.read(cell)

    def _rows(self, start: int, stop: int) -> pyarrow.Table:
        rows = self.table[start:stop]
        # Arrow files are mapped as they are, and damaged ones can point anywhere into memory.
        rows.validate(full=True)
        return rows

    def _stamp(self, row: int, path: object) -> str | None:
        """None where the row points to a file that can't be found: the read tells why."""
        if not isinstance(path, str):
            return f"{self.version}:{row}"
        file = self.reach.find(path.rpartition("::")[2])
        try:
            return f"{self.version}:{row}:{stat_stamp(file.stat())}" if file is not None else None
        except OSError:
            return None


class StreamSource:
    """A dataset that is read forwards from where it is."""

    rows = True

    def __init__(
        self,
        label: str,
        identity: str,
        stream: datasets.IterableDataset,
        columns: Columns,
        reach: Reach,
        limit: int | None = None,
    ) -> None:
        self.label, self.identity = label, identity
        self._stream, self._columns, self._reach, self._limit = stream, columns, reach, limit
        self._forward, self._next = self._pass(), 0
        self._recent: deque[tuple[int, Any]] = deque(maxlen=ROWS_KEPT)

    def files(self) -> Iterator[FoundFile]:
        """Every row, in order, with its bytes: a pass of its own over the dataset."""
        for row, cells in self._pass():
            cell = cells[self._columns.image]
            data, skip = None, None
            try:
                data = self._reach.read(cell)
            except DataError as error:
                skip = error.message
            caption = cells[self._columns.caption] if self._columns.caption is not None else None
            path = cell.get("path") if isinstance(cell, Mapping) else None
            yield FoundFile(_row_name(row, path), skip=skip, caption=self._columns.caption_of(caption), data=data)

    def read(self, name: str) -> bytes:
        wanted = _row_number(name)
        for row, cell in self._recent:
            if row == wanted:
                return self._reach.read(cell)
        if wanted < self._next:
            self._forward = self._pass()
        for row, cells in self._forward:
            self._next = row + 1
            self._recent.append((row, cells[self._columns.image]))
            if row == wanted:
                return self._reach.read(cells[self._columns.image])
        raise DataError("there is no such row any more")

    def _pass(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = enumerate(islice(self._stream, self._limit))
        while True:
            with _told_of(self.label):
                found = next(rows, None)
            if found is None:
                return
            yield found


def _open_hub(config: SourceConfig) -> Source:
    import datasets
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    match = _GRAMMAR.fullmatch(config.path.removeprefix(HUB_PREFIX))
    if match is None:
        raise DataError(
            f"`{config.path}` does not name a dataset on the Hub",
            hint="write hf:owner/name, hf:owner/name@revision or hf:owner/name:subset",
        )
    repo, subset = match["repo"], match["subset"]
    # The folder of a commit in the Hub's cache. Where the Hub can't be reached, the cache remembers which commit it is.
    snapshot = Path(
        snapshot_download(repo, repo_type="dataset", revision=match["revision"], allow_patterns="README.md")
    )
    if not subset and not config.streaming and config.limit is None:
        folder = _fetch_folder(repo, snapshot, config)
        if folder is not None:
            return FolderSource(folder, _label(config))
    commit = snapshot.name
    # A commit never changes: what was prepared of it before needs no more questions to the Hub.
    builder = _prepared(repo, commit, subset or "default")
    if builder is None:
        # By this address a folder of the same name in the current directory is not taken for it.
        builder = datasets.load_dataset_builder(f"hf://datasets/{repo}", name=subset, revision=commit)
        if builder.name == "cache":
            # The Hub can't be reached. The library then takes the newest it has, of whichever commit and subset.
            builder = _prepared(repo, commit, subset)
            if builder is None:
                raise ConnectionError
            log.say(f"{config.path}: the Hub cannot be reached; subset `{builder.config.name}` is in the cache")
    hub_cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="dataset"))
    reach = Reach((hub_cache.resolve(), Path(datasets.config.EXTRACTED_DATASETS_PATH).resolve()), repo)
    return _from_builder(builder, config, f"{HUB_PREFIX}{repo}@{commit}:{builder.config.name}", reach)


def _fetch_folder(repo: str, snapshot: Path, config: SourceConfig) -> Path | None:
    """A repository whose pictures lie in it as files, brought into the Hub's cache; None for tables and archives.

    As a folder it keeps what `datasets` does not read: a `.txt` beside each picture, and masks. Where there is a folder
    named as the split, it is that one.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().dataset_info(repo, revision=snapshot.name).siblings or []
        names = [file.rfilename for file in files]
    except Exception:  # noqa: BLE001 - the Hub can't be reached; if something is missing, the download below tells
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    endings = {os.path.splitext(name)[1].lower() for name in names}
    if endings.isdisjoint(PICTURE_ENDINGS) or not endings.isdisjoint(TABLE_ENDINGS):
        return None
    within = [name for name in names if name.startswith(f"{config.split}/")]
    missing = sum(not (snapshot / name).exists() for name in within or names)
    pattern = f"{escape(config.split)}/*" if within else None
    with _fetching(f"{config.path}: fetching {missing} files" if missing else None):
        snapshot_download(repo, repo_type="dataset", revision=snapshot.name, allow_patterns=pattern)
    return snapshot / config.split if within else snapshot


def _prepared(repo: str, commit: str, subset: str | None) -> datasets.DatasetBuilder | None:
    """What the library's cache holds of this commit and subset; without a subset the only one there is."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, name = repo.split("/")
    pattern = f"{escape(subset) if subset else '*'}/*/{commit}"
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}")
    found = [path for path in folder.glob(pattern) if path.is_dir()]
    if len(found) > 1:
        raise _choose_subset(f"{HUB_PREFIX}{repo}", sorted(path.parts[-3] for path in found))
    if not found:
        return None
    subset, version, _ = found[0].parts[-3:]
    return Cache(repo_id=repo, dataset_name=name, config_name=subset, version=version, hash=commit)


def _open_local(config: SourceConfig) -> Source:
    import datasets

    path = Path(os.path.abspath(config.path))
    if path.is_file():
        # A file has no splits; the name that is asked for is given to it, if it can be one.
        split = config.split if re.fullmatch(r"\w+", config.split) and config.split != "all" else "train"
        builder = datasets.load_dataset_builder("parquet", data_files={split: [escape(path.as_posix())]})
        _read_in_batches(builder)
        return _from_builder(builder, config, str(path), Reach((path.resolve().parent,)))
    if not path.is_dir():
        raise DataError(f"`{config.path}`: no such file or folder", hint="give a `.parquet` file or a saved dataset")
    reach = Reach((path.resolve(),))
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        builder = datasets.load_dataset_builder(str(path))
        if builder.name == "parquet":
            _read_in_batches(builder)
        return _from_builder(builder, config, str(path), reach)
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        _require_split(config, list(saved), [config.split])
        saved = saved[config.split]
    return _table_source(saved, config, str(path), reach)


def _read_in_batches(builder: datasets.DatasetBuilder) -> None:
    """Let it read files on this machine a few rows at once.

    The library decodes whole groups of rows, which its own writer keeps below 100 MB; other writers put a file into
    one. Of 20,000 pictures in one group, 1 GB, it holds 3 GB in memory, and 0.3 GB this way.
    """
    import pyarrow
    from datasets.builder import Key
    from pyarrow.parquet import ParquetFile

    def tables(files: list[str], row_groups_list: list[Any]) -> Iterator[tuple[Key, pyarrow.Table]]:
        for number, (path, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
                for position, batch in enumerate(file.iter_batches(ROWS_AT_ONCE, row_groups=groups)):
                    yield Key(number, position), builder._cast_table(pyarrow.Table.from_batches([batch]))

    builder._generate_tables = tables


def _from_builder(builder: datasets.DatasetBuilder, config: SourceConfig, place: str, reach: Reach) -> Source:
    # The library also knows `train[:100]`, `train+test` and `all`.
    wanted = re.findall(r"(?:^|\+)\s*([^+\[\s]+)", "" if config.split == "all" else config.split)
    # Before anything is downloaded.
    _require_split(config, list(builder.config.data_files or builder.info.splits or wanted), wanted)
    if not config.streaming:
        _prepare(builder, config)
        return _table_source(builder.as_dataset(split=config.split), config, place, reach)
    rows = builder.as_streaming_dataset(split=config.split).decode(False)
    columns = _columns(rows.features or {}, config)
    identity = f"{place} {config.split} {columns.image}"
    return StreamSource(_label(config), identity, rows.select_columns(columns.names), columns, reach, config.limit)


def _table_source(rows: datasets.Dataset, config: SourceConfig, place: str, reach: Reach) -> Source:
    columns = _columns(rows.features, config)
    parts = [rows._fingerprint]
    for file in rows.cache_files:
        stat = os.stat(file["filename"])
        parts += [os.path.basename(file["filename"]), str(stat.st_size), str(stat.st_mtime_ns)]
    version = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    arrow = rows.with_format("arrow", columns=columns.names)
    identity = f"{place} {config.split} {columns.image}"
    return TableSource(_label(config), identity, arrow, columns, reach, version, config.limit)


def _label(config: SourceConfig) -> str:
    """The path; and what else is chosen, since two splits or columns of one dataset are two sources."""
    chosen = [f"split {config.split}"] if config.split != SourceConfig.model_fields["split"].default else []
    chosen += [f"column {config.image_column}"] if config.image_column is not None else []
    return f"{config.path} ({', '.join(chosen)})" if chosen else config.path


def _prepare(builder: datasets.DatasetBuilder, config: SourceConfig) -> None:
    """Bring the dataset into the library's cache, if it isn't there."""
    there = os.path.isdir(builder.cache_dir)
    message = f"{config.path}: copying it into the cache of `datasets`; `streaming: true` reads it where it is"
    with _fetching(None if there else message):
        # What a dataset card says of sizes is often stale, and every row is counted in the report.
        builder.download_and_prepare(verification_mode="no_checks")


def _require_split(config: SourceConfig, available: list[str], wanted: list[str]) -> None:
    if not set(wanted) <= set(available):
        raise DataError(
            f"`{config.path}` has no split `{config.split}`; it has {_listed(available)}",
            hint=f"set `split: {available[0]}`" if available else None,
        )


def _columns(features: Mapping[str, Any], config: SourceConfig) -> Columns:
    """Which columns hold pictures and captions. Raises DataError that lists the columns."""
    import datasets

    held = f"its columns are {_listed(features)}" if features else "its columns are not known before its rows are read"

    def required(setting: str, name: str) -> Any:
        if name not in features:
            raise DataError(f"`{config.path}` has no column `{name}`, which `{setting}` names; {held}")
        return features[name]

    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    pictures = pictures or [name for name, feature in features.items() if _holds_bytes(feature)]
    if config.image_column is not None:
        feature = required("image_column", config.image_column)
        if not isinstance(feature, datasets.Image) and not _holds_bytes(feature):
            raise DataError(
                f"column `{config.image_column}` of `{config.path}` does not hold encoded pictures but {feature}",
                hint="addresses and pixel arrays are not read: use a dataset that holds JPEG, PNG or WebP pictures"
                if not pictures
                else f"set `image_column` to {_listed(pictures, ' or ')}",
            )
        image = config.image_column
    elif len(pictures) == 1:
        image = pictures[0]
    elif pictures:
        raise DataError(
            f"`{config.path}` has several columns with pictures: {_listed(pictures)}",
            hint=f"choose one: `image_column: {pictures[0]}`",
        )
    else:
        raise DataError(
            f"`{config.path}` has no column with pictures; {held}",
            hint="addresses and pixel arrays are not read: use a dataset that holds JPEG, PNG or WebP pictures",
        )

    if config.caption_column is None:
        return Columns(image, next((name for name in CAPTION_COLUMNS if _holds_text(features.get(name))), None))
    feature = required("caption_column", config.caption_column)
    if isinstance(feature, datasets.ClassLabel):
        return Columns(image, config.caption_column, tuple(feature.names))
    if not _holds_text(feature):
        raise DataError(f"column `{config.caption_column}` of `{config.path}` holds no text but {feature}")
    return Columns(image, config.caption_column)


def _holds_bytes(feature: object) -> bool:
    """A column of encoded files, or of records with one in the field `bytes`, as `datasets.Image` stores them."""
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "binary_view")


def _holds_text(feature: object) -> bool:
    """A column of texts, or of lists of texts."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string", "string_view")


def _row_name(row: int, path: object) -> str:
    """`000012 cat.jpg`: the number makes it unique and finds it again; the file's own name is for people."""
    own = re.split(r"[/\\]", (path if isinstance(path, str) else "").partition("::")[0])[-1]
    own = "".join(char for char in own if char.isprintable())[-LONGEST_NAME:]
    return f"{row:06d} {own}".rstrip()


def _read_file(path: str) -> bytes:
    """A file on this machine, on the Hub or in a ZIP on either; how it unpacks is not trusted."""
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        data = bytes(file.read(MAX_FILE_BYTES + 1))
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"is larger than the {MAX_FILE_BYTES // 2**20} MiB that are read at most")
    return data


def _row_number(name: str) -> int:
    match = re.match(r"\d+", name, flags=re.ASCII)
    if match is None:
        raise DataError("there is no such row")
    return int(match[0])


def _listed(names: Mapping[str, Any] | list[str], joint: str = ", ") -> str:
    return joint.join(f"`{name}`" for name in names)


@contextmanager
def _reading() -> Iterator[None]:
    """What goes wrong with one row is a reason, without names."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library lets through what its many readers raise
        raise DataError(f"cannot be read: {first_line(error)}") from error


@contextmanager
def _told_of(label: str) -> Iterator[None]:
    """What goes wrong with the dataset itself while its rows are read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"`{label}` cannot be read on: {first_line(error)}") from error


@contextmanager
def _told(config: SourceConfig) -> Iterator[None]:
    """Inside, the libraries are quiet, and whatever they raise becomes one of our errors with a way out.

    `datasets` stays quiet, for its rows are read later; `huggingface_hub` is left as it was.
    """
    import datasets
    import huggingface_hub.utils.logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    verbosity, bars = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise _explained(error, config) from error
    finally:
        hub_logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


@contextmanager
def _fetching(message: str | None) -> Iterator[None]:
    """Where something is fetched or copied: one line that says so and, on a terminal, the libraries' bars."""
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if message:
        log.say(message)
        if log.console.is_terminal:
            datasets.enable_progress_bars()
            enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()
        disable_progress_bars()


def _explained(error: Exception, config: SourceConfig) -> FluxFTError:
    import datasets.exceptions as ours
    from datasets.data_files import EmptyDatasetError
    from huggingface_hub import errors as hub

    # The library wraps what went wrong while it prepared a dataset.
    if isinstance(error, ours.DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    label, text = f"`{config.path}`", first_line(error)
    if isinstance(error, OSError) and (error.errno == errno.ENOSPC or "Not enough disk space" in text):
        return StorageError(
            f"there is no room on the disk to copy {label} into the cache",
            hint="free space, set HF_HOME to a folder on a larger disk, or set `streaming: true`",
        )
    if isinstance(error, hub.GatedRepoError) or "gated dataset" in text:
        return DataError(
            f"{label} is gated: its owner gives access on request",
            hint="ask for access on its page on the Hub, run `hf auth login`, and try again",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return DataError(
            f"{label}: there is no such revision on the Hub", hint="give a branch, a tag or a full commit after the @"
        )
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError | ours.DatasetNotFoundError):
        return DataError(
            f"{label}: there is no such dataset on the Hub, or it is private",
            hint="check owner and name; for a private one run `hf auth login`",
        )
    if isinstance(error, hub.LocalEntryNotFoundError | ConnectionError) or "Couldn't find cache" in text:
        return DataError(
            f"{label} cannot be fetched from the Hub, and it is not in the cache",
            hint="connect to the network and leave HF_HUB_OFFLINE unset for the first time, or give a local copy",
        )
    if any(words in text for words in ("Config name is missing", "BuilderConfig '", "configurations in the cache")):
        known = re.search(r"vailable[^\[]*\[(.*?)\]", str(error), flags=re.DOTALL)
        return _choose_subset(config.path, re.findall(r"'([^']*)'", known[1]) if known else [])
    if "scripts are no longer supported" in text:
        return DataError(
            f"{label} is a program that makes a dataset, and programs of others are not run",
            hint="use a copy of it in parquet files, often its revision refs/convert/parquet",
        )
    if any(words in text for words in ("Bad split", "Unknown split", "Unrecognized instruction")):
        return DataError(
            f"{label} cannot be read by `split: {config.split}`: {text}",
            hint="name a whole split, and let `limit` take its first rows",
        )
    if isinstance(error, ours.DataFilesNotFoundError | EmptyDatasetError):
        return DataError(
            f"{label} holds no files that can be read as a dataset",
            hint="give one with pictures, parquet files or WebDataset archives, or one that `save_to_disk` wrote",
        )
    return DataError(
        f"{label} cannot be read as a dataset: {text}", hint="a file may be damaged: fetch it or write it again"
    )


def _choose_subset(label: str, subsets: list[str]) -> DataError:
    known = f": it has {_listed(subsets)}" if subsets else ""
    return DataError(f"`{label}` needs the name of one of its subsets{known}", hint="write hf:owner/name:subset")
