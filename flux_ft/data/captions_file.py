"""What the captioner said: `captions.jsonl` in the run folder, one row a picture, made to be read and corrected.

    {"digest": …, "name": "cats/tom.jpg", "caption": "[trigger] sits on a wall.", "model": …, "mode": "character"}

Rows are only ever added, each whole before the next, and of several rows for one picture the last is true. Of a row
that a kill cut short nothing is kept. Loads without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flux_ft.data.captions import Mode, tidy
from flux_ft.errors import DataError, StorageError

CAPTIONS_FILE = "captions.jsonl"
AUTO = "auto"
"""The `captioner.model` that stands for whichever model there is room for."""


@dataclass(frozen=True)
class CaptionRow:
    """One picture's description."""

    digest: str
    """Of the picture's file, as in `Sample.content_digest`: moved, masked or trained at other sizes, it keeps its
    caption."""
    name: str
    """For people; nothing is found by it."""
    caption: str
    """`[trigger]` marks where the trigger word goes. Empty: the model had nothing to say."""
    model: str
    mode: str


def read_captions(folder: Path, model: str, mode: Mode) -> dict[str, str]:
    """Caption by digest, of the rows that `model` wrote in `mode`; with the model `auto`, of any model's.

    An empty caption means that there is nothing better than the plain one. No file means no captions. Raises DataError
    that names the line of a broken row.
    """
    rows = _rows(folder / CAPTIONS_FILE)
    return {row.digest: tidy(row.caption) for row in rows if row.mode == mode and model in (row.model, AUTO)}


@contextmanager
def appending(folder: Path) -> Iterator[Callable[[CaptionRow], None]]:
    """A function that adds one row and hands it to the operating system at once, so that a kill loses none before it.

    Makes the folder and the file. Raises StorageError.
    """
    path = folder / CAPTIONS_FILE
    with _storing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        with _storing(path):
            file.seek(0)
            data = file.read()
            kept = _without_torn_row(data)
            if len(kept) < len(data):  # otherwise leave what another process may have added meanwhile
                file.truncate(len(kept))
            if kept and not kept.endswith(b"\n"):
                file.write(b"\n")

        def append(row: CaptionRow) -> None:
            # A file name may be no text at all; here it only has to be recognised.
            line = json.dumps(asdict(row), ensure_ascii=False).encode(errors="replace")
            with _storing(path):
                try:
                    file.write(line + b"\n")
                    file.flush()
                except OSError:
                    with suppress(OSError):  # closing tries again to write what is left, and would fail without a name
                        file.close()
                    raise

        yield append


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write `{path}`: {error.strerror or error}", hint="free space there, or choose another folder"
        ) from error


def _rows(path: Path) -> Iterator[CaptionRow]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}", hint="mend or remove it") from error
    # Split as bytes: a caption may hold characters that str.splitlines takes for line ends.
    for number, line in enumerate(_without_torn_row(data.removeprefix(b"\xef\xbb\xbf")).split(b"\n"), start=1):
        if line.strip():
            yield _row(line, f"{path}:{number}")


def _row(line: bytes, where: str) -> CaptionRow:
    fields = CaptionRow.__dataclass_fields__
    try:
        values = json.loads(line.decode())
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair can be written, and is no text
    except (ValueError, RecursionError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeError) else f"is not JSON: {error}"
    else:
        if not isinstance(values, dict):
            reason = "is not a JSON object"
        elif odd := [name for name in fields if not isinstance(values.get(name), str)]:
            reason = f"has no text for `{odd[0]}`"
        else:
            return CaptionRow(**{name: values[name] for name in fields})
    raise DataError(f"{where}: the row {reason}", hint="mend the line, or delete it to have the picture described anew")


def _without_torn_row(data: bytes) -> bytes:
    """`data` less a last line that was cut short; a whole one that only lacks its line end, as editors save, stays."""
    last = data.rpartition(b"\n")[2]
    return data if last.rstrip().endswith(b"}") else data[: len(data) - len(last)]
