"""Sources to a DatasetReport: every file that was found is used, or skipped with a reason. Loads without torch.

    source ─files→ FoundFile ─scan (threads; remembered in the index)→ what its pixels tell ─captions→ Sample

Pictures are read in the order of their source and decoded in worker threads, a bounded number in flight, so that a
stream is read once and memory does not grow with the set.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import Literal

from flux_ft import log
from flux_ft.config import DataConfig, SourceConfig
from flux_ft.data.buckets import bucket_for, crop_loss
from flux_ft.data.captions import Mode, bare_caption, names_trigger, place_trigger, read_metadata, tidy
from flux_ft.data.folder import PICTURE_ENDINGS, hidden_reason
from flux_ft.data.images import load_mask, load_picture, read_header
from flux_ft.data.index import Entry, ScanIndex, is_settled, scan_key
from flux_ft.data.parallel import ordered_map, usable_cpus
from flux_ft.data.signals import advice, picture_warnings, same_scene
from flux_ft.data.signals import measure as measure_signals
from flux_ft.data.sources import open_source
from flux_ft.errors import DataError, some_of
from flux_ft.types import (
    Bucket,
    CaptionCounter,
    CaptionSource,
    DatasetReport,
    Decoding,
    FoundFile,
    Sample,
    SideFile,
    Signals,
    Skipped,
    Source,
    SourceFile,
    TokenCount,
)

SCAN_VERSION = 2
"""Raise it when the same file would be scanned to other results: the index then forgets what it knows."""
DECODERS = ("pillow", "simplejpeg", "cykooz.resizer")
"""Another version of one of these may give other pixels, and another digest, for the same file."""
CAPTION_ENDINGS: tuple[tuple[str, CaptionSource], ...] = ((".txt", "txt"), (".caption", "caption"))
"""Caption files, the one that wins first."""
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MASK_SUFFIX = "_mask"
LARGEST_CAPTION_BYTES = 100_000
THUMBNAIL_PX = 224
THUMBNAILS_AT_MOST = 300
"""Pictures past this many have no thumbnail in the report, so that page and memory stay small."""
NOTABLE_CROP_LOSS = 0.1
BAR_FROM = 50
"""Sets smaller than this are scanned too fast for a progress bar."""
NAMED_AT_MOST = 5
"""How many files a message names before it only counts them."""
FEW_PIXELS = 500_000
"""Pictures of no more are measured one at a time: numpy's steps are then too short for threads to share."""

_one_small = threading.Lock()


@dataclass(frozen=True)
class Rules:
    """What decides, besides the files, which pixels are trained on."""

    areas: tuple[int, ...]
    """Largest picture areas in pixels, one for each size a picture is trained at, largest first."""
    multiple: int
    """Both sides of a bucket are multiples of this many pixels."""
    decoding: Decoding = field(default_factory=Decoding)


@dataclass(frozen=True)
class Wording:
    """What decides the captions."""

    trigger_word: str
    mode: Mode
    captioned: Mapping[str, str] = field(default_factory=dict)
    """What a captioner said before, by the content of the picture's file."""
    count_tokens: CaptionCounter | None = None
    captioner_follows: bool = False
    """Pictures without a caption are to be described later."""


def ingest(
    data: DataConfig,
    rules: Rules,
    wording: Wording,
    index: ScanIndex | None = None,
    now: Callable[[], int] = time.time_ns,
) -> DatasetReport:
    """Read every source of `data` and say what became of each file. Nothing is written but to `index`.

    A picture is known by its content, not its ending, and is decoded once to be sure that it is whole. `now` gives the
    time in nanoseconds. Raises DataError when a source can't be read or nothing usable is left, and for a bad picture
    when `data.on_bad` is "stop".
    """
    index = index or ScanIndex(None)
    parts = [
        _ingest_source(open_source(config), config, data, rules, wording, index, now) for config in data.all_sources
    ]
    samples = [sample for part in parts for sample in part.samples]
    skipped = [one for part in parts for one in part.skipped]
    if not samples:
        raise _nothing_usable([part.source.label for part in parts], skipped)
    samples = _with_tokens(samples, wording.count_tokens)
    samples, groups = _with_look_alikes(samples)
    samples = [
        replace(sample, thumbnail=None) if position >= THUMBNAILS_AT_MOST else sample
        for position, sample in enumerate(samples)
    ]
    return DatasetReport(
        sources=tuple(part.source.label for part in parts),
        samples=tuple(samples),
        side_files=tuple(one for part in parts for one in part.side_files),
        skipped=tuple(skipped),
        warnings=(
            *_caption_warnings(samples, wording, sum(part.naming for part in parts)),
            *(warning for part in parts for warning in part.warnings),
            *advice(samples, groups),
        ),
        groups=tuple(groups),
        decoding=rules.decoding,
    )


# --- one source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What became of the files of one source."""

    source: Source
    samples: list[Sample]
    side_files: list[SideFile]
    skipped: list[Skipped]
    warnings: list[str]
    naming: int
    """How many of the given captions name the trigger word themselves."""


@dataclass(frozen=True)
class _Listing:
    """The files of a source, sorted into what they are by their names alone."""

    pictures: list[FoundFile]
    masks: dict[str, str]
    """Picture's stem to mask's name."""
    captions: dict[str, dict[str, str]]
    """Ending to picture's stem to caption file's name."""
    metadata: list[str]
    skipped: list[FoundFile]


def _ingest_source(
    source: Source, config: SourceConfig, data: DataConfig, rules: Rules, wording: Wording, index: ScanIndex,
    now: Callable[[], int],
) -> _Part:  # fmt: skip
    side_files: list[SideFile] = []
    skipped: list[Skipped] = []
    samples: list[Sample] = []
    warnings: list[str] = []
    naming = 0
    if source.rows:
        files, listing = source.files(), _Listing([], {}, {}, [], [])
    else:
        listing = _sort_out(source.files(), masks=data.masks)
        files = iter(listing.pictures)
    skipped += [_skipped_by_listing(source, found) for found in listing.skipped]
    captions = _Captions(source, listing, config.caption_column)
    total = None if source.rows else len(listing.pictures)
    for found, result in _scan_all(source, files, listing.masks, rules, index, now, total):
        file = SourceFile(source, found.name)
        if found.skip is not None:
            skipped.append(_skipped_by_listing(source, found))
            continue
        if isinstance(result, str):
            if data.on_bad == "stop" and PurePosixPath(found.name).suffix.lower() in PICTURE_ENDINGS | {""}:
                raise _stopped(file, result)
            skipped.append(Skipped(file, result))
            continue
        try:
            words, caption_source = captions.of(found)
        except DataError as error:
            if data.on_bad == "stop":
                raise _stopped(file, error.message) from None
            skipped.append(Skipped(file, error.message))
            continue
        if caption_source == "trigger" and wording.captioned.get(result.content_digest):
            words, caption_source = wording.captioned[result.content_digest], "captioner"
        if caption_source not in ("trigger", "captioner"):
            naming += names_trigger(words, wording.trigger_word)
        mask = listing.masks.get(_stem(found.name))
        samples.append(
            Sample(
                file=file,
                caption=_final_caption(words, caption_source, wording),
                caption_source=caption_source,
                width_px=result.width_px,
                height_px=result.height_px,
                digest=result.digest,
                content_digest=result.content_digest,
                buckets=result.buckets,
                signals=result.signals,
                mask=SourceFile(source, mask) if mask else None,
                masked=result.masked,
                repeats=config.repeats,
                weight=config.weight,
                warnings=_sample_warnings(found.name, result, words, caption_source, rules),
                thumbnail=result.thumbnail if len(samples) < THUMBNAILS_AT_MOST else None,
            )
        )
    used_stems: dict[str, list[str]] = {}
    for sample in samples:
        used_stems.setdefault(_stem(sample.file.name), []).append(sample.file.name)
    picture_stems = {_stem(found.name) for found in listing.pictures}
    beside: list[tuple[str, Literal["caption", "mask"], str, bool]] = [
        *((name, "caption", stem, wins) for name, stem, wins in captions.files()),
        *((name, "mask", stem, True) for stem, name in listing.masks.items()),
    ]
    for name, role, stem, wins in beside:
        file = SourceFile(source, name)
        if stem in used_stems and wins:
            side_files.append(SideFile(file, role, f"{role} of {', '.join(used_stems[stem])}"))
        else:
            skipped.append(Skipped(file, _why_unused(role, stem in used_stems, stem in picture_stems)))
    for name in listing.metadata:
        used, missing = captions.metadata_use(name, {sample.file.name for sample in samples})
        side_files.append(
            SideFile(
                SourceFile(source, name), "metadata", f"captions of {used} {'picture' if used == 1 else 'pictures'}"
            )
        )
        if missing:
            warnings.append(f"{name} has captions for files that are not there or not used: {some_of(missing)}")
    orphans = [one.file.name for one in skipped if one.reason == ORPHAN]
    if orphans:
        warnings.append(f"captions without a picture of the same name: {some_of(orphans)}")
    skipped.sort(key=lambda one: one.file.name)
    side_files.sort(key=lambda one: one.file.name)
    return _Part(source, samples, side_files, skipped, warnings, naming)


ORPHAN = "caption without a picture of the same name"


def _sort_out(files: Iterator[FoundFile], *, masks: bool) -> _Listing:
    listing = _Listing([], {}, {ending: {} for ending, _ in CAPTION_ENDINGS}, [], [])
    candidates: list[FoundFile] = []
    for found in files:
        path = PurePosixPath(found.name)
        ending = path.suffix.lower()
        if found.skip is not None:
            listing.skipped.append(found)
        elif path.name.lower() in METADATA_NAMES:
            listing.metadata.append(found.name)
        elif ending in listing.captions:
            former = listing.captions[ending].get(_stem(found.name))
            if former is not None:  # on a file system that tells `cat.TXT` from `cat.txt`
                listing.skipped.append(FoundFile(former, skip=f"{path.name} wins"))
            listing.captions[ending][_stem(found.name)] = found.name
        else:
            candidates.append(found)
    stems = {_stem(found.name) for found in candidates}
    for found in candidates:
        stem = _stem(found.name)
        of = stem.removesuffix(MASK_SUFFIX)
        if not masks or of == stem or of not in stems:
            listing.pictures.append(found)
        elif of in listing.masks:
            first = PurePosixPath(listing.masks[of]).name
            listing.skipped.append(replace(found, skip=f"{first} is the mask already"))
        else:
            listing.masks[of] = found.name
    return listing


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]  # asked seven times a file: pathlib would take half of a second scan's time


def _skipped_by_listing(source: Source, found: FoundFile) -> Skipped:
    # A folder that was not entered ends in a slash: with a name after it, the rule for folders speaks.
    ignored = hidden_reason(found.name + "x" * found.name.endswith("/")) is not None
    return Skipped(SourceFile(source, found.name), found.skip or "", ignored)


def _stopped(file: SourceFile, reason: str) -> DataError:
    return DataError(
        f"{file}: {reason}", hint="mend or remove the file, or set `data.on_bad: skip` to train without it"
    )


# --- one picture ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scan:
    """What the pixels of one file told."""

    width_px: int
    height_px: int
    digest: str
    content_digest: str
    buckets: tuple[Bucket, ...]
    signals: Signals
    masked: bool
    format: str
    notes: tuple[str, ...]
    thumbnail: bytes | None


@dataclass(frozen=True)
class _Job:
    """One picture on its way through the workers: known already, or with the bytes to be scanned."""

    found: FoundFile
    key: str | None = None
    known: Entry | None = None
    data: bytes = b""
    mask: bytes | None = None
    settled: bool = True
    """Whether the files have been at rest long enough for their times to tell a change; asked before they are read."""
    failed: str | None = None


def _scan_all(
    source: Source, files: Iterator[FoundFile], masks: Mapping[str, str], rules: Rules, index: ScanIndex,
    now: Callable[[], int], total: int | None,
) -> Iterator[tuple[FoundFile, _Scan | str]]:  # fmt: skip
    """Each file with what its pixels told, or with the reason why it can't be used; in the order of `files`."""
    stamps = {} if source.rows else _mask_stamps(source, masks)
    rule = json.dumps([SCAN_VERSION, [_version(name) for name in DECODERS], asdict(rules), THUMBNAIL_PX])

    def jobs() -> Iterator[_Job]:
        for found in files:
            if found.skip is not None:
                yield _Job(found, failed=found.skip)
                continue
            mask = masks.get(_stem(found.name))
            key = None
            if found.stamp is not None:
                key = scan_key(source.identity, found.name, found.stamp, stamps.get(mask or "", ""), rule)
            known = index.get(key) if key else None
            if known is not None:
                yield _Job(found, key, known)
                continue
            stamped = [stamp for stamp in (found.stamp, stamps.get(mask or "")) if stamp]
            settled = all(is_settled(stamp, now()) for stamp in stamped)
            try:
                data = found.data if found.data is not None else source.read(found.name)
                mask_data = source.read(mask) if mask else None
                if key is None:
                    key = scan_key(_sha256(data), _sha256(mask_data or b""), rule)
                    known = index.get(key)
            except DataError as error:
                yield _Job(found, failed=error.message)
                continue
            yield _Job(replace(found, data=None), key, known, b"" if known else data, mask_data, settled)

    def work(job: _Job) -> tuple[_Job, _Scan | str]:
        if job.failed is not None:
            return job, job.failed
        if job.known is not None:
            return job, _from_entry(job.known)
        try:
            return job, _scan(job.data, job.mask, rules)
        except DataError as error:
            return job, error.message

    workers = usable_cpus()
    with log.progress("scan pictures", total) if total is None or total >= BAR_FROM else nullcontext() as bar:
        for job, result in ordered_map(work, jobs(), workers, 2 * workers):
            if job.key is not None and job.known is None and job.settled:
                index.put(job.key, _as_entry(result))
            if bar:
                bar.advance()
            yield job.found, result


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # not every machine has a wheel of each
        return ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _mask_stamps(source: Source, masks: Mapping[str, str]) -> dict[str, str]:
    wanted = set(masks.values())
    if not wanted:
        return {}
    return {found.name: found.stamp or "" for found in source.files() if found.name in wanted}


def _scan(data: bytes, mask: bytes | None, rules: Rules) -> _Scan:
    """Decode one picture, and its mask, as training will. Raises DataError with the reason."""
    header = read_header(data)
    size = header.width_px, header.height_px
    buckets = tuple(dict.fromkeys(bucket_for(*size, area, rules.multiple) for area in rules.areas))
    pixels = load_picture(data, buckets[0], rules.decoding, THUMBNAIL_PX)
    if mask is not None:
        try:
            weights = load_mask(mask, size, buckets[0])
        except DataError as error:
            raise DataError(f"its mask can't be used: {error.message}") from None
        pixels = replace(pixels, mask_HW=weights)
    if pixels.mask_HW is not None and pixels.mask_HW.mean() < 1:
        _require_weight(data, mask, size, buckets, rules)
    # Threads with few pixels hand the interpreter to and fro at every step: four of them took 2.5 times as long as one.
    with _one_small if buckets[0].width_px * buckets[0].height_px <= FEW_PIXELS else nullcontext():
        signals = measure_signals(pixels.rgb_HW3)
    return _Scan(
        header.width_px, header.height_px, pixels.digest, _sha256(data), buckets, signals,
        pixels.mask_HW is not None, header.format, header.notes, pixels.thumbnail,
    )  # fmt: skip


def _require_weight(
    data: bytes, mask: bytes | None, size: tuple[int, int], buckets: Sequence[Bucket], rules: Rules
) -> None:
    """Raises DataError when of a small or faint mask nothing is left at one of the sizes."""
    for bucket in buckets:
        mask_HW = load_mask(mask, size, bucket) if mask else load_picture(data, bucket, rules.decoding).mask_HW
        if mask_HW is None or mask_HW.any():
            continue
        at = "" if bucket == buckets[0] else f" at {bucket.width_px} × {bucket.height_px} px"
        raise DataError(f"its mask is black everywhere{at}, so nothing of it would be learned")


def _as_entry(result: _Scan | str) -> Entry:
    if isinstance(result, str):
        return Entry({"reason": result}, None)
    facts = {name: value for name, value in asdict(result).items() if name != "thumbnail"}
    return Entry(facts, result.thumbnail)


def _from_entry(entry: Entry) -> _Scan | str:
    facts = entry.facts
    if "reason" in facts:
        return str(facts["reason"])
    return _Scan(
        facts["width_px"], facts["height_px"], facts["digest"], facts["content_digest"],
        tuple(Bucket(**one) for one in facts["buckets"]),
        Signals(**facts["signals"]), facts["masked"], facts["format"], tuple(facts["notes"]), entry.thumbnail,
    )  # fmt: skip


def _sample_warnings(
    name: str, scan: _Scan, words: str, caption_source: CaptionSource, rules: Rules
) -> tuple[str, ...]:
    found = list(scan.notes)
    ending = PurePosixPath(name).suffix.lower()
    usual = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WEBP": (".webp",)}.get(scan.format)
    if ending in PICTURE_ENDINGS and usual and ending not in usual:
        found.append(f"is a {scan.format}, though its name ends in {ending}")
    loss = crop_loss(scan.width_px, scan.height_px, scan.buckets[0])
    if loss > NOTABLE_CROP_LOSS:
        found.append(f"{loss:.0%} of it is cut off to fit {scan.buckets[0].width_px} × {scan.buckets[0].height_px} px")
    if caption_source in ("txt", "caption") and not words.strip():
        found.append("its caption file is empty")
    found += picture_warnings(scan.signals, scan.width_px, scan.height_px, rules.areas[0])
    return tuple(found)


# --- captions ------------------------------------------------------------------------------------------------------


class _Captions:
    """Finds the caption that was given for a picture: a file beside it, a row of metadata, a dataset's column."""

    def __init__(self, source: Source, listing: _Listing, column: str | None) -> None:
        self._source, self._listing = source, listing
        self._metadata: dict[str, dict[str, str]] = {}
        for name in listing.metadata:
            data = SourceFile(source, name).read()
            try:
                rows = read_metadata(name, data, column)
            except DataError as error:
                raise DataError(f"{source.label}: {error.message}", hint=error.hint) from None
            folder = PurePosixPath(name).parent
            self._metadata[name] = {str(folder / row): words for row, words in rows.items()}

    def of(self, found: FoundFile) -> tuple[str, CaptionSource]:
        """The words as they were given, and where from; ("", "trigger") when there are none. Raises DataError."""
        stem = _stem(found.name)
        for ending, kind in CAPTION_ENDINGS:
            if name := self._listing.captions.get(ending, {}).get(stem):
                return self._read(name), kind
        for rows in self._metadata.values():
            if found.name in rows:
                return rows[found.name], "metadata"
        return (found.caption, "metadata") if found.caption else ("", "trigger")

    def _read(self, name: str) -> str:
        try:
            data = self._source.read(name)
        except DataError as error:
            raise DataError(f"its caption `{name}` can't be read: {error.message}") from None
        if len(data) > LARGEST_CAPTION_BYTES:
            raise DataError(f"its caption `{name}` has {len(data):,} bytes; at most {LARGEST_CAPTION_BYTES:,} are read")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"its caption `{name}` is not UTF-8 text; save it as UTF-8") from None

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """(name, stem of its picture, whether it wins) of every caption file; a `.caption` beside a `.txt` does not."""
        taken: set[str] = set()
        for kind in self._listing.captions.values():
            yield from ((name, stem, stem not in taken) for stem, name in kind.items())
            taken |= kind.keys()

    def metadata_use(self, name: str, pictures: set[str]) -> tuple[int, list[str]]:
        """How many pictures the rows of one metadata file fit, and the rows that fit none."""
        rows = self._metadata[name]
        return len(rows.keys() & pictures), sorted(rows.keys() - pictures)


def _final_caption(words: str, caption_source: CaptionSource, wording: Wording) -> str:
    if caption_source == "trigger":
        return bare_caption(wording.trigger_word, wording.mode)
    return place_trigger(words, wording.trigger_word)


def _why_unused(role: str, picture_used: bool, picture_found: bool) -> str:
    if picture_used:
        return "a .txt of the same name wins"
    if picture_found:
        return f"{role} of a picture that is skipped"
    return "mask of a mask" if role == "mask" else ORPHAN


def _with_tokens(samples: list[Sample], count: CaptionCounter | None) -> list[Sample]:
    if count is None:
        return samples
    distinct = list(dict.fromkeys(sample.caption for sample in samples))
    counts = dict(zip(distinct, count(distinct), strict=True))
    return [
        replace(sample, tokens=counts[sample.caption], warnings=(*sample.warnings, *_too_long(counts[sample.caption])))
        for sample in samples
    ]


def _too_long(counts: Sequence[TokenCount]) -> list[str]:
    over = [one for one in counts if one.tokens > one.limit]
    whole = [one.encoder.upper() for one in counts if one.tokens <= one.limit]
    but = f"; {' and '.join(whole)} read{'s' if len(whole) == 1 else ''} all of it" if whole else ""
    return [
        f"its caption has {one.tokens} {one.encoder.upper()} tokens, of which the first {one.limit} are read{but}"
        for one in over
    ]


def _with_look_alikes(samples: list[Sample]) -> tuple[list[Sample], list[tuple[int, ...]]]:
    """Exact duplicates are warned of one by one; everything that shows the same scene is grouped."""
    groups = same_scene([sample.signals.phash for sample in samples])
    first: dict[str, int] = {}
    marked = []
    for position, sample in enumerate(samples):
        original = first.setdefault(sample.digest, position)
        if original != position:
            same = f"the same picture as {samples[original].file.name}"
            sample = replace(sample, warnings=(*sample.warnings, same))
        marked.append(sample)
    return marked, groups


def _caption_warnings(samples: Sequence[Sample], wording: Wording, naming: int) -> list[str]:
    found = []
    given = [sample for sample in samples if sample.caption_source not in ("trigger", "captioner")]
    bare = sum(sample.caption_source == "trigger" for sample in samples)
    if bare:
        words = bare_caption(wording.trigger_word, wording.mode)
        theirs = f'theirs is "{words}"'
        later = ": the captioner writes them when training starts, or `flux-ft caption` now; where it can't, "
        yet, how = (" yet", later) if wording.captioner_follows else ("", "; ")
        found.append(f"{bare:,} of {len(samples):,} pictures have no caption{yet}{how}{theirs}")
    if given and tidy(wording.trigger_word) and not naming:
        found.append(f"no given caption names the trigger word `{wording.trigger_word}`; it is put in front of each")
    long: dict[tuple[str, int], list[str]] = {}
    for sample in samples:
        for count in sample.tokens:
            if count.tokens > count.limit:
                long.setdefault((count.encoder, count.limit), []).append(sample.file.name)
    for (encoder, limit), names in long.items():
        found.append(f"captions longer than the {limit} tokens that {encoder.upper()} reads: {some_of(names)}")
    return found


# --- words ---------------------------------------------------------------------------------------------------------


def _nothing_usable(labels: Sequence[str], skipped: Sequence[Skipped]) -> DataError:
    hint = "give a folder or a .zip that holds JPEG, PNG or WebP pictures"
    where = ", ".join(f"`{label}`" for label in labels)
    holds = "holds" if len(labels) == 1 else "hold"
    told = [one for one in skipped if not one.ignored]
    if not told:
        return DataError(f"{where} {holds} no pictures", hint=hint)
    reasons = [f"\n  {one.file.name}: {one.reason}" for one in told[:NAMED_AT_MOST]]
    more = f"\n  and {len(told) - NAMED_AT_MOST} more" if len(told) > NAMED_AT_MOST else ""
    return DataError(f"{where} {holds} no usable picture:{''.join(reasons)}{more}", hint=hint)
