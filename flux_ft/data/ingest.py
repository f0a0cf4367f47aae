"""A folder to a DatasetReport: every file that was found is used, skipped with a reason, or ignored by rule.

Ignored: names that begin with a dot, and `__MACOSX` folders. Loads without torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flux_ft.data.buckets import bucket_for
from flux_ft.data.captions import Mode, bare_caption, has_trigger, place_trigger
from flux_ft.data.images import probe
from flux_ft.errors import DataError
from flux_ft.types import DatasetReport, PlacedSample, Sample, Skipped

IGNORED_FOLDERS = ("__MACOSX",)
NAMED_AT_MOST = 5
"""How many files a message names before it only counts them."""


@dataclass(frozen=True)
class _Listing:
    """What lies in a folder, each list sorted by POSIX path."""

    pictures: tuple[Path, ...]
    """Every file that is not a `.txt`; whether it is a picture shows when it is opened."""
    captions: dict[Path, Path]
    """The `.txt` files, keyed by their path without the ending."""
    unread: tuple[Skipped, ...]
    """Folders that were not entered, and why."""


def ingest(source: Path | str, trigger_word: str, mode: Mode, max_pixels: int, multiple: int) -> DatasetReport:
    """Read the folder `source` and place each usable picture in a bucket of at most `max_pixels` pixels.

    A picture is known by its content, not its ending, and is decoded once to be sure that it is whole. Its caption is
    the UTF-8 `.txt` of the same stem, or the bare caption of `mode`. Nothing is written. Raises DataError when
    `source` is not a folder or holds no usable picture.
    """
    root = _checked_folder(str(source))
    listing = _list_files(root)
    placed: list[PlacedSample] = []
    skipped: list[Skipped] = list(listing.unread)
    seen: dict[str, Path] = {}
    for path in listing.pictures:
        try:
            one = _examine(path, listing.captions.get(path.with_suffix("")), bucket_limits=(max_pixels, multiple))
        except DataError as error:
            skipped.append(Skipped(path, error.message.removeprefix(f"`{path}`: ")))
            continue
        first = seen.setdefault(one.sample.digest, path)
        if first != path:
            skipped.append(Skipped(path, f"same picture as `{_relative(first, root)}`"))
        else:
            placed.append(one)
    orphans = _orphans(listing)
    skipped += [Skipped(path, "caption without a picture of the same name") for path in orphans]
    if not placed:
        raise _nothing_usable(root, skipped)
    warnings = _warnings(placed, orphans, root, trigger_word, mode)
    skipped.sort(key=lambda one: one.path.as_posix())
    return DatasetReport(
        source=str(source),
        placed=tuple(_with_final_caption(one, trigger_word, mode) for one in placed),
        skipped=tuple(skipped),
        warnings=tuple(warnings),
    )


def _checked_folder(source: str) -> Path:
    if source.startswith("hf:"):
        raise DataError(
            f"`{source}`: datasets from the Hub cannot be read yet",
            hint="download it as a folder of pictures, with a .txt caption beside each, and give that folder",
        )
    root = Path(source)
    if root.is_dir():
        return root
    if not root.exists():
        raise DataError(f"`{source}`: no such folder", hint="give a folder of pictures")
    if root.suffix.lower() == ".zip":
        raise DataError(f"`{source}`: ZIP files cannot be read yet", hint="unpack it first and give the folder")
    raise DataError(f"`{source}` is a file, not a folder", hint="give the folder that holds the pictures")


def _list_files(root: Path) -> _Listing:
    pictures: list[Path] = []
    captions: dict[Path, Path] = {}
    unread: list[Skipped] = []

    def cannot_enter(error: OSError) -> None:
        unread.append(Skipped(Path(error.filename), f"folder cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(root, onerror=cannot_enter):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not _ignored(name)]
        # os.walk does not enter these, since a link can lead round in a circle.
        links = [here / name for name in subfolders if (here / name).is_symlink()]
        unread += [Skipped(link, "link to a folder, not followed") for link in links]
        for path in (here / name for name in names if not _ignored(name)):
            if path.suffix.lower() == ".txt":
                captions[path.with_suffix("")] = path
            else:
                pictures.append(path)
    pictures.sort(key=lambda path: path.relative_to(root).as_posix())
    return _Listing(tuple(pictures), captions, tuple(unread))


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS


def _examine(path: Path, caption_path: Path | None, bucket_limits: tuple[int, int]) -> PlacedSample:
    """The picture with its caption as it was given (empty when there is none). Raises DataError with the reason."""
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for ever.
        raise DataError("not a regular file")
    width, height = probe(path, decode=True)
    bucket = bucket_for(width, height, *bucket_limits)
    caption = _read_caption(caption_path) if caption_path else ""
    source = "txt" if caption_path else "trigger"
    return PlacedSample(Sample(path, caption, width, height, _sha256(path), source), bucket)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"its caption `{path.name}` is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"its caption `{path.name}` cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None


def _with_final_caption(one: PlacedSample, trigger_word: str, mode: Mode) -> PlacedSample:
    given = one.sample.caption_source == "txt"
    caption = place_trigger(one.sample.caption, trigger_word) if given else bare_caption(trigger_word, mode)
    return replace(one, sample=replace(one.sample, caption=caption))


def _orphans(listing: _Listing) -> list[Path]:
    stems = {path.with_suffix("") for path in listing.pictures}
    return [path for stem, path in sorted(listing.captions.items()) if stem not in stems]


def _warnings(
    placed: Sequence[PlacedSample], orphans: Sequence[Path], root: Path, trigger_word: str, mode: Mode
) -> list[str]:
    """What the user should know; `placed` still carries the captions as they were given."""
    found = []
    given = [one.sample.caption for one in placed if one.sample.caption_source == "txt"]
    if len(given) < len(placed):
        bare = bare_caption(trigger_word, mode)
        found.append(f'{len(placed) - len(given)} of {len(placed)} pictures have no caption; theirs is "{bare}"')
    marked = any("[trigger]" in text.lower() or has_trigger(text, trigger_word) for text in given)
    if given and trigger_word and not marked:
        found.append(f"no given caption names the trigger word `{trigger_word}`; it is put in front of each")
    if orphans:
        found.append(f"captions without a picture of the same name: {_some(orphans, root)}")
    return found


def _nothing_usable(root: Path, skipped: Sequence[Skipped]) -> DataError:
    hint = "give a folder that holds JPEG, PNG or WebP pictures"
    if not skipped:
        return DataError(f"`{root}` holds no pictures", hint=hint)
    reasons = [f"\n  {_relative(one.path, root)}: {one.reason}" for one in skipped[:NAMED_AT_MOST]]
    more = f"\n  and {len(skipped) - NAMED_AT_MOST} more" if len(skipped) > NAMED_AT_MOST else ""
    return DataError(f"`{root}` holds no usable picture:{''.join(reasons)}{more}", hint=hint)


def _some(paths: Sequence[Path], root: Path) -> str:
    named = ", ".join(_relative(path, root) for path in paths[:NAMED_AT_MOST])
    return f"{named} and {len(paths) - NAMED_AT_MOST} more" if len(paths) > NAMED_AT_MOST else named


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
