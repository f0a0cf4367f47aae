"""What became of every file, as report.json for programs and report.html for people. Loads without torch.

The page is report.html beside this module, a style and a script, filled in here. Names, captions and reasons come from
strangers' archives: each goes through `_text` on its way into the page, and a policy in the page's head lets no script
run but its own, whatever else should go wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from flux_ft.data.buckets import crop_box, crop_loss
from flux_ft.data.captions import has_trigger, tidy
from flux_ft.files import write_whole
from flux_ft.types import Bucket, DatasetReport, Sample, SideFile, Skipped

PAGE = Path(__file__).with_name("report.html")
CAPTION_CHARS = 4000
"""Of a caption shown beside its thumbnail; more than any text encoder reads. report.json has all of it."""
ROW_CHARS = 200
"""Of a text shown in one of the many plain rows, so that 20,000 pictures stay a page that opens."""
GROUP_PICTURES = 24
"""Pictures of one group of look-alikes shown side by side."""
GROUPS_SHOWN = 12
"""Groups of look-alikes before the rest is folded away."""
SIZES_SHOWN = 12
"""Training sizes before the rest is folded away."""
FILES_OPEN = 40
"""A list of skipped files longer than this starts folded."""

_SOURCES = {
    "txt": "from its .txt",
    "caption": "from its .caption",
    "metadata": "from metadata",
    "captioner": "by the captioner",
    "trigger": "no caption of its own",
}
_GAP = "\u00a0"  # no line ends here
# Characters that turn, hide or split the text around them. Joiners stay: scripts and emoji are spelt with them.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def write_report(report: DatasetReport, folder: Path, trigger_word: str = "") -> tuple[Path, Path]:
    """Write report.json and report.html into `folder` (made if missing) and return their paths.

    `trigger_word` is marked in the page's captions. Each file is replaced whole or left as it was. Raises StorageError.
    """
    json_path, html_path = folder / "report.json", folder / "report.html"
    # File names that are not valid UTF-8 must not cost the user the report; as \udc80 they are valid JSON, too.
    write_whole(json_path, (piece.encode("utf-8", "backslashreplace") for piece in _json_pieces(report)))
    write_whole(html_path, (piece.encode("utf-8", "backslashreplace") for piece in _html_pieces(report, trigger_word)))
    return json_path, html_path


def report_json(report: DatasetReport) -> dict[str, Any]:
    """Every file once, by source and then by path, with counts that add up.

    `used + skipped = files`, `pictures + captions + masks + metadata = used`; `ignored` are those of the skipped that
    never were meant as pictures; `examples` counts a picture once for each of its sizes and repeats.
    """
    return {**_summary(report), "files": [_entry(one) for one in _in_order(report)]}


def report_html(report: DatasetReport, trigger_word: str = "") -> str:
    """One page without outside references: pictures with what is cropped, final captions, and what was left out."""
    return "".join(_html_pieces(report, trigger_word))


# ---- report.json


def _json_pieces(report: DatasetReport) -> Iterator[str]:
    """`report_json` as text, one line a file: easy to search, and never held as a whole."""
    summary = (f" {json.dumps(key)}: {_json(value)},\n" for key, value in _summary(report).items())
    yield from ("{\n", *summary, ' "files": [')
    for number, one in enumerate(_in_order(report)):
        yield f"{',' if number else ''}\n  {_json(_entry(one))}"
    yield "\n ]\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _summary(report: DatasetReport) -> dict[str, Any]:
    roles = Counter(one.role for one in report.side_files)
    used = len(report.samples) + len(report.side_files)
    return {
        "sources": list(report.sources),
        "counts": {
            "files": used + len(report.skipped),
            "used": used,
            "skipped": len(report.skipped),
            "pictures": len(report.samples),
            "captions": roles["caption"],
            "masks": roles["mask"],
            "metadata": roles["metadata"],
            "ignored": sum(one.ignored for one in report.skipped),
            "examples": sum(len(sample.buckets) * sample.repeats for sample in report.samples),
        },
        "warnings": list(report.warnings),
        "settings": {
            "background": _background(report),
            "alpha": "mask" if report.decoding.alpha_is_mask else "background",
        },
        "groups": [[report.samples[index].file.name for index in group] for group in report.groups],
    }


def _in_order(report: DatasetReport) -> list[Sample | SideFile | Skipped]:
    rank = {label: number for number, label in enumerate(report.sources)}
    every: list[Sample | SideFile | Skipped] = [*report.samples, *report.side_files, *report.skipped]
    return sorted(every, key=lambda one: (rank.get(one.file.source.label, len(rank)), one.file.name))


def _entry(one: Sample | SideFile | Skipped) -> dict[str, Any]:
    """One file; the keys are the same for all, null where they say nothing."""
    entry: dict[str, Any] = {
        "path": one.file.name,
        "source": one.file.source.label,
        "status": "skipped" if isinstance(one, Skipped) else "used",
        "role": None,
        "reason": None,
        "ignored": False,
        **dict.fromkeys(("width_px", "height_px", "bucket", "crop_loss", "caption", "caption_source")),
        "warnings": [],
        **dict.fromkeys(("buckets", "tokens", "repeats", "weight", "masked", "digest")),
    }
    if isinstance(one, Skipped):
        return entry | {"reason": one.reason, "ignored": one.ignored}
    if isinstance(one, SideFile):
        return entry | {"role": one.role, "reason": one.note}
    sizes = [[bucket.width_px, bucket.height_px] for bucket in one.buckets]
    return entry | {
        "role": "picture",
        "width_px": one.width_px,
        "height_px": one.height_px,
        "bucket": sizes[0],
        "crop_loss": round(crop_loss(one.width_px, one.height_px, one.buckets[0]), 6),
        "caption": one.caption,
        "caption_source": one.caption_source,
        "warnings": list(one.warnings),
        "buckets": sizes,
        "tokens": {count.encoder: {"tokens": count.tokens, "limit": count.limit} for count in one.tokens},
        "repeats": one.repeats,
        "weight": one.weight,
        "masked": one.masked,
        "digest": one.digest,
    }


def _background(report: DatasetReport) -> str:
    return "#" + bytes(report.decoding.background).hex()


# ---- report.html


def _html_pieces(report: DatasetReport, trigger_word: str) -> Iterator[str]:
    page = PAGE.read_text("utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head, _, foot = page.partition("<!-- body -->")
    left_out = sum(not one.ignored for one in report.skipped)
    title = f"Data report: {_count(len(report.samples), 'picture')} used, {_count(left_out, 'file')} skipped"
    yield Template(head).substitute(policy=policy, title=title)
    yield _header(report, trigger_word)
    yield _bar(report)
    yield "<main>\n"
    yield _overview(report)
    yield from _skipped(report)
    yield from _groups(report)
    yield from _pictures(report, trigger_word)
    yield from _side_files(report)
    yield "</main>"
    yield foot


def _header(report: DatasetReport, trigger_word: str) -> str:
    counts = _summary(report)["counts"]
    left_out = counts["skipped"] - counts["ignored"]
    parts = [
        ("pictures", counts["pictures"], f"picture{_s(counts['pictures'])}", "#pictures"),
        ("captions", counts["captions"], f"caption file{_s(counts['captions'])}", "#others"),
        ("masks", counts["masks"], f"mask{_s(counts['masks'])}", "#others"),
        ("metadata", counts["metadata"], f"metadata file{_s(counts['metadata'])}", "#others"),
        ("skipped", left_out, "skipped", "#skipped"),
        ("ignored", counts["ignored"], "ignored", "#skipped"),
    ]
    parts = [part for part in parts if part[1]]
    stripes = "".join(f'<i class="{kind}" style="flex:{number}"></i>' for kind, number, *_ in parts)
    legend = "".join(
        f'<li><a href="{target}"><i class="{kind}"></i><b>{number:,}</b> {words}</a></li>'
        for kind, number, words, target in parts
    )
    per_source = Counter(sample.file.source.label for sample in report.samples)
    sources = "".join(
        f'<li>{_name(label)} <span class="soft">{_count(per_source[label], "picture")}</span></li>'
        for label in dict.fromkeys(report.sources)
    )
    if counts["pictures"]:
        heading = f"{_count(counts['pictures'], 'picture')} to train on"
        heading += f", {left_out:,} left out" if left_out else ""
    else:
        heading = "There is no picture to train on"
    facts = [
        f"{_count(counts['files'], 'file')} found, each listed below",
        f"{_count(counts['examples'], 'example')} in one pass, over all sizes and repeats",
        "transparency weights the loss"
        if report.decoding.alpha_is_mask
        else f"transparent parts show {_background(report)}",
        *([f"trigger word <mark><bdi>{_text(trigger_word)}</bdi></mark>"] if trigger_word else []),
    ]
    return (
        f'<header>\n<p class="kicker">flux-ft data report</p>\n<h1>{heading}</h1>\n<ul class="sources">{sources}</ul>\n'
        f'<div class="account" aria-hidden="true">{stripes}</div>\n<ul class="legend">{legend}</ul>\n'
        f'<p class="facts">{" · ".join(facts)}</p>\n</header>\n'
    )


def _bar(report: DatasetReport) -> str:
    kinds = [
        ("used", len(report.samples)),
        ("warned", sum(bool(sample.warnings) for sample in report.samples)),
        ("skipped", sum(not one.ignored for one in report.skipped)),
        ("look-alikes", len(_grouped(report))),
    ]
    buttons = "".join(
        f'<button type="button" value="{kind}" aria-pressed="false"><kbd>{key}</kbd> {kind} <b>{number:,}</b></button>'
        for key, (kind, number) in enumerate(kinds, 1)
    )
    hints = (("/", "search"), ("j k ← →", "move"), ("1 2 3 4", "filter"), ("Esc", "clear"))
    keys = "".join(f"<span><kbd>{names.replace(' ', '</kbd> <kbd>')}</kbd> {words}</span>" for names, words in hints)
    return (
        '<div class="bar" role="search" hidden><div><input type="search" placeholder="Search names, captions, reasons"'
        f' aria-label="Search" autocomplete="off" spellcheck="false">{buttons}'
        f'<p class="hint">{keys}<output></output></p></div></div>\n'
    )


def _overview(report: DatasetReport) -> str:
    notes = "".join(f"<li>{_text(text, CAPTION_CHARS)}</li>" for text in report.warnings)
    left = f'<section><h2>Worth knowing</h2><ul class="notes">{notes}</ul></section>' if notes else ""
    counted = Counter(bucket for sample in report.samples for bucket in sample.buckets)
    if not counted:
        return f'<div class="overview">{left}</div>\n'
    sizes = sorted(counted.items(), key=lambda pair: _by_number(*pair))
    most = sizes[0][1]
    largest = max(max(bucket.width_px, bucket.height_px) for bucket, _ in sizes)
    rows = [
        f"<li>{_shape(bucket, largest)}<span>{_size(bucket)}</span>"
        f'<i style="width:{100 * number / most:.1f}%"></i><b>{number:,}</b></li>'
        for bucket, number in sizes
    ]
    folded = (
        f'<details><summary>{_count(len(rows) - SIZES_SHOWN, "more size")}</summary><ul class="sizes">'
        f"{''.join(rows[SIZES_SHOWN:])}</ul></details>"
        if len(rows) > SIZES_SHOWN
        else ""
    )
    return (
        f'<div class="overview">{left}<section><h2>Training sizes <small>pictures at each, in px</small></h2>'
        f'<ul class="sizes">{"".join(rows[:SIZES_SHOWN])}</ul>{folded}</section></div>\n'
    )


def _skipped(report: DatasetReport) -> Iterator[str]:
    if not report.skipped:
        return
    missed = [one for one in report.skipped if not one.ignored]
    ignored = [one for one in report.skipped if one.ignored]
    total = f"{_count(len(missed), 'file')}{f', and {len(ignored):,} ignored' if ignored else ''}"
    yield f'<section id="skipped" data-block><h2>Skipped <small>{total}</small></h2>\n'
    if missed:
        opened = ' open data-open="yes"' if len(missed) <= FILES_OPEN else ""
        yield f"<details{opened}><summary>{len(missed):,} could not be used</summary>"
        yield from _file_rows(((one, one.reason) for one in missed), report, "skipped", "bad")
        yield "</details>\n"
    if ignored:
        yield f"<details><summary>{len(ignored):,} ignored: hidden files, and what systems leave behind</summary>"
        yield from _file_rows(((one, one.reason) for one in ignored), report, "ignored", "soft")
        yield "</details>\n"
    yield "</section>\n"


def _side_files(report: DatasetReport) -> Iterator[str]:
    if not report.side_files:
        return
    yield '<section id="others" data-block><h2>Files beside the pictures</h2>\n'
    yield f"<details><summary>{len(report.side_files):,} that were used</summary>"
    yield from _file_rows(((one, one.note) for one in report.side_files), report, "beside", "soft")
    yield "</details></section>\n"


def _file_rows(
    rows: Iterable[tuple[SideFile | Skipped, str]], report: DatasetReport, kind: str, tone: str
) -> Iterator[str]:
    # Not <li>: browsers count those anew for each that is hidden, which takes minutes where there are thousands.
    yield '<dl class="rows files">\n'
    for one, words in rows:
        text = _text(words, ROW_CHARS)
        yield f'<div data-kind="{kind}"><dt>{_label(one, report)}</dt><dd class="{tone}">{text}</dd></div>\n'
    yield "</dl>"


def _groups(report: DatasetReport) -> Iterator[str]:
    if not report.groups:
        return
    yield (
        f'<section id="look-alikes" data-block><h2>Look-alikes <small>{_count(len(report.groups), "group")}, '
        f"{_count(len(_grouped(report)), 'picture')}</small></h2>\n"
        '<div class="groups">'
    )
    for number, group in enumerate(report.groups, 1):
        if number == GROUPS_SHOWN + 1:
            folded = _count(len(report.groups) - GROUPS_SHOWN, "more group")
            yield f'</div><details><summary>{folded}</summary><div class="groups">'
        samples = [report.samples[index] for index in group]
        same = "the same picture" if len({sample.digest for sample in samples}) == 1 else "the same scene"
        shown = "".join(_member(index, report.samples[index]) for index in group[:GROUP_PICTURES])
        rest = len(group) - GROUP_PICTURES
        more = f'<li class="soft">and {rest:,} more, marked “group {number}” below</li>' if rest > 0 else ""
        yield (
            f'<div class="group" id="g{number}" data-kind="look-alikes"><b>Group {number}</b> '
            f'<span class="soft">{same}, {len(group):,} times</span><ul>{shown}{more}</ul></div>\n'
        )
    yield f"</div>{'</details>' if len(report.groups) > GROUPS_SHOWN else ''}</section>\n"


def _member(index: int, sample: Sample) -> str:
    """A picture of a group: its thumbnail is taken from its card, so that no bytes are in the page twice."""
    if sample.thumbnail is None:
        picture = '<span class="none">no thumbnail</span>'
    else:
        picture = (
            f'<svg class="thumb" viewBox="0 0 {sample.width_px} {sample.height_px}" aria-hidden="true">'
            f'<use href="#i{index}"/></svg>'
        )
    return f'<li><a href="#p{index}">{picture}{_name(sample.file.name)}</a></li>'


def _pictures(report: DatasetReport, trigger_word: str) -> Iterator[str]:
    if not report.samples:
        return
    groups = _grouped(report)
    by_size: dict[Bucket, list[int]] = {}
    for index, sample in enumerate(report.samples):
        by_size.setdefault(sample.buckets[0], []).append(index)
    yield (
        '<section id="pictures" data-block><h2>Pictures <small>by their largest training size</small></h2>\n'
        '<div class="buckets">'
    )
    largest = max(max(bucket.width_px, bucket.height_px) for bucket in by_size)
    for bucket, indices in sorted(by_size.items(), key=lambda pair: _by_number(pair[0], len(pair[1]))):
        cards = [index for index in indices if report.samples[index].thumbnail is not None]
        rows = [index for index in indices if report.samples[index].thumbnail is None]
        yield (
            f'<section data-block style="--cards:{99 if rows else len(cards)}">'
            f"<h3>{_shape(bucket, largest)}{_size(bucket)} px <small>{_count(len(indices), 'picture')}</small></h3>\n"
        )
        if cards:
            yield '<div class="cards">\n'
            yield from (_card(report, index, groups.get(index), trigger_word) for index in cards)
            yield "</div>\n"
        if rows:
            yield '<div class="rows">\n'
            yield from (_row(report, index, groups.get(index), trigger_word) for index in rows)
            yield "</div>\n"
        yield "</section>\n"
    yield "</div></section>\n"


def _by_number(bucket: Bucket, number: int) -> tuple[int, int, Bucket]:
    """Sorts sizes: those of most pictures first, and of equals the larger."""
    return -number, -bucket.width_px * bucket.height_px, bucket


def _card(report: DatasetReport, index: int, group: int | None, trigger_word: str) -> str:
    sample = report.samples[index]
    return (
        f'<article class="card" id="p{index}" data-kind="{_kinds(sample, group)}">{_thumbnail(index, sample)}'
        f'<div class="about"><div><p class="caption" dir="auto">{_caption(sample, trigger_word, CAPTION_CHARS)}</p>'
        f'<p class="from">{_origin(sample)}</p></div>{_warnings(sample)}{_tags(sample, group)}'
        f'<div class="more">{_label(sample, report)}<p>{_sizes(sample)}</p></div></div></article>\n'
    )


def _row(report: DatasetReport, index: int, group: int | None, trigger_word: str) -> str:
    sample = report.samples[index]
    return (
        f'<article id="p{index}" data-kind="{_kinds(sample, group)}">{_label(sample, report)}'
        f'<p class="caption" dir="auto">{_caption(sample, trigger_word, ROW_CHARS)}</p>'
        f'<p class="from">{_origin(sample)} · {_sizes(sample)}</p>{_warnings(sample)}'
        f"{_tags(sample, group)}</article>\n"
    )


def _thumbnail(index: int, sample: Sample) -> str:
    """The whole picture with what its largest size cuts off in the dark; all in pixels of the picture."""
    assert sample.thumbnail is not None
    width, height = sample.width_px, sample.height_px
    left, top, right, bottom = (f"{side:.1f}" for side in crop_box(width, height, sample.buckets[0]))
    cut = (
        f'<path class="dim" d="M0 0H{width}V{height}H0zM{left} {top}H{right}V{bottom}H{left}z"/>'
        f'<path class="box" d="M{left} {top}H{right}V{bottom}H{left}z"/>'
        if crop_loss(width, height, sample.buckets[0])
        else ""
    )
    data = base64.b64encode(sample.thumbnail).decode("ascii")
    return (
        f'<svg class="thumb" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(sample.file.name)}">'
        f'<image id="i{index}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{data}"/>{cut}</svg>'
    )


def _origin(sample: Sample) -> str:
    """Where the caption comes from, and how much of each encoder's room it takes."""
    words = [_SOURCES[sample.caption_source]]
    for count in sample.tokens:
        tone = ' class="bad"' if count.tokens > count.limit else ""
        words.append(f"{_text(count.encoder)}{_GAP}<b{tone}>{count.tokens}/{count.limit}</b>")
    return " · ".join(words)


def _sizes(sample: Sample) -> str:
    """The picture's own size, what its largest training size (the heading above it) cuts off, and the other sizes."""
    first, *others = sample.buckets
    loss = crop_loss(sample.width_px, sample.height_px, first)
    cut = f"{loss:.1%} cropped" if loss else "uncropped"
    also = f"<br>also at {', '.join(map(_size, others))}" if others else ""
    return f"{_size(Bucket(sample.width_px, sample.height_px))}{_GAP}px, {cut}{also}"


def _tags(sample: Sample, group: int | None) -> str:
    tags = []
    if sample.masked:
        by = _text(sample.mask.name.rpartition("/")[2], ROW_CHARS) if sample.mask else "its transparency"
        tags.append(f"masked by {by}")
    if sample.repeats != 1:
        tags.append(f"{sample.repeats} times a pass")
    if sample.weight != 1:
        tags.append(f"weight {sample.weight:g}")
    if group is not None:
        tags.append(f'<a href="#g{group}">look-alike, group {group}</a>')
    return f'<ul class="tags">{"".join(f"<li>{tag}</li>" for tag in tags)}</ul>' if tags else ""


def _warnings(sample: Sample) -> str:
    words = [_text(text, ROW_CHARS) for text in sample.warnings]
    return f'<ul class="warns">{"".join(f"<li>{text}</li>" for text in words)}</ul>' if words else ""


def _kinds(sample: Sample, group: int | None) -> str:
    return "used" + " warned" * bool(sample.warnings) + " look-alikes" * (group is not None)


def _grouped(report: DatasetReport) -> dict[int, int]:
    """Position in `samples` → number of its group, from 1."""
    return {index: number for number, group in enumerate(report.groups, 1) for index in group}


def _caption(sample: Sample, trigger_word: str, most: int) -> str:
    """The caption as it is trained, its trigger words marked."""
    caption = sample.caption
    if not caption:
        return '<span class="soft">an empty caption</span>'
    parts, done = [], 0
    # One character past what is shown tells whether the last word ends there.
    for start, end in trigger_spans(caption[: most + 1], trigger_word):
        if end > most:
            break
        parts += [_text(caption[done:start]), f"<mark>{_text(caption[start:end])}</mark>"]
        done = end
    return "".join(parts) + _text(caption[done:], most - done)


def trigger_spans(caption: str, trigger: str) -> list[tuple[int, int]]:
    """(start, end) of each place in a tidy `caption` where `trigger` stands by the rule of `has_trigger`."""
    wanted = "".join(map(_folded, tidy(trigger)))
    if not wanted:
        return []
    # One character may fold to several ("ß" to "ss"), so each folded one remembers where it comes from.
    folded = [(char, index) for index, whole in enumerate(caption) for char in _folded(whole)]
    text = "".join(char for char, _ in folded)
    spans, start = [], text.find(wanted)
    while start >= 0:
        first, last = folded[start][1], folded[start + len(wanted) - 1][1]
        # Whether it is a word of its own depends on its two neighbours alone.
        if has_trigger(caption[max(0, first - 1) : last + 2], trigger):
            spans.append((first, last + 1))
            start = text.find(wanted, start + len(wanted))
        else:
            start = text.find(wanted, start + 1)
    return spans


@cache
def _folded(char: str) -> str:
    return unicodedata.normalize("NFD", char.casefold())


def _label(one: Sample | SideFile | Skipped, report: DatasetReport) -> str:
    source = f'<p class="from">{_name(one.file.source.label)}</p>' if len(report.sources) > 1 else ""
    return f"{_name(one.file.name)}{source}"


def _name(path: str) -> str:
    """A path as it is told apart at a glance: folders soft, the last part plain."""
    folder, slash, last = path.rstrip("/").rpartition("/")
    last += "/" if path.endswith("/") else ""
    before = f"<span>{_text(folder + slash, ROW_CHARS)}</span><wbr>" if slash else ""
    return f'<bdi class="name" dir="ltr">{before}{_text(last, ROW_CHARS)}</bdi>'


def _size(bucket: Bucket) -> str:
    return f"{bucket.width_px}{_GAP}×{_GAP}{bucket.height_px}"


def _shape(bucket: Bucket, largest_px: int) -> str:
    """The size as a small outline; `largest_px` is the side that fills the drawing."""
    width, height = (max(2.0, 24 * side / largest_px) for side in (bucket.width_px, bucket.height_px))
    return (
        '<svg class="shape" viewBox="0 0 26 26" aria-hidden="true">'
        f'<rect x="{13 - width / 2:.1f}" y="{13 - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}"/></svg>'
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{_s(number)}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _text(text: str, most: int | None = None) -> str:
    """Text for the page or for a quoted attribute: what cannot be seen is spelt out, and past `most` it is cut."""
    rest = len(text) - most if most is not None else 0
    text = text[:most] if rest > 0 else text
    spelt = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return escape(spelt) + (f" … ({rest:,} more characters)" if rest > 0 else "")
