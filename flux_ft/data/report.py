"""What became of every file, as report.json for programs and report.html for people. Loads without torch."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from flux_ft.data.buckets import crop_loss
from flux_ft.data.images import load_rgb
from flux_ft.errors import DataError
from flux_ft.files import write_whole
from flux_ft.types import Bucket, DatasetReport, PlacedSample, Skipped

THUMBNAIL_PX = 128
"""Longest side of a thumbnail; a picture trained smaller than this is shown at that size."""
THUMBNAILS_AT_MOST = 400
"""Pictures past this many are listed without a thumbnail, so that the page stays a few megabytes."""


def write_report(report: DatasetReport, folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder` (made if missing) and return their paths.

    Each file is replaced whole or left as it was. Raises StorageError.
    """
    json_path, html_path = folder / "report.json", folder / "report.html"
    text = json.dumps(report_json(report), indent=2, ensure_ascii=False) + "\n"
    # File names that are not valid UTF-8 must not cost the user the report.
    write_whole(json_path, text.encode("utf-8", "backslashreplace"))
    write_whole(html_path, report_html(report).encode("utf-8", "backslashreplace"))
    return json_path, html_path


def report_json(report: DatasetReport) -> dict[str, Any]:
    """Every file once, sorted by its path relative to the source, with counts that add up."""
    files = [_used_entry(one, report.source) for one in report.placed]
    files += [_skipped_entry(one, report.source) for one in report.skipped]
    files.sort(key=lambda entry: entry["path"])
    return {
        "source": report.source,
        "counts": {"files": len(files), "used": len(report.placed), "skipped": len(report.skipped)},
        "warnings": list(report.warnings),
        "files": files,
    }


def report_html(report: DatasetReport) -> str:
    """One page without outside references: thumbnails as they are cropped, and the skipped files in red."""
    used, skipped = len(report.placed), len(report.skipped)
    warnings = "".join(f"<li>{escape(text)}</li>" for text in report.warnings)
    figures = "".join(
        _figure(one, report.source, thumbnail=index < THUMBNAILS_AT_MOST) for index, one in enumerate(report.placed)
    )
    rows = "".join(
        f"<li><code>{escape(_relative(one.path, report.source))}</code> {escape(one.reason)}</li>"
        for one in report.skipped
    )
    return _PAGE.format(
        title=f"{used} pictures used, {skipped} files skipped",
        source=escape(report.source),
        warnings=f"<ul class=warnings>{warnings}</ul>" if warnings else "",
        skipped=f"<h2>Skipped</h2><ul class=skipped>{rows}</ul>" if rows else "",
        figures=figures,
    )


def _used_entry(one: PlacedSample, source: str) -> dict[str, Any]:
    sample, bucket = one.sample, one.bucket
    return {
        "path": _relative(sample.path, source),
        "source": source,
        "status": "used",
        "reason": None,
        "width_px": sample.width_px,
        "height_px": sample.height_px,
        "bucket": [bucket.width_px, bucket.height_px],
        "crop_loss": round(crop_loss(sample.width_px, sample.height_px, bucket), 6),
        "caption": sample.caption,
        "caption_source": sample.caption_source,
        "warnings": [],
    }


def _skipped_entry(one: Skipped, source: str) -> dict[str, Any]:
    unknown = ("width_px", "height_px", "bucket", "crop_loss", "caption", "caption_source")
    head = {"path": _relative(one.path, source), "source": source, "status": "skipped", "reason": one.reason}
    return {**head, **dict.fromkeys(unknown), "warnings": []}


def _relative(path: Path, source: str) -> str:
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else path.as_posix()


def _figure(one: PlacedSample, source: str, *, thumbnail: bool) -> str:
    sample, bucket = one.sample, one.bucket
    name = escape(_relative(sample.path, source), quote=True)
    picture = f'<img src="{uri}" alt="{name}">' if thumbnail and (uri := _thumbnail_uri(one)) else ""
    loss = crop_loss(sample.width_px, sample.height_px, bucket)
    sizes = f"{sample.width_px} × {sample.height_px} → {bucket.width_px} × {bucket.height_px} px"
    return (
        f"<figure>{picture}<figcaption><p>{escape(sample.caption)}</p>"
        f"<small><code>{name}</code><br>{sizes}<br>{loss:.1%} cropped</small></figcaption></figure>\n"
    )


def _thumbnail_uri(one: PlacedSample) -> str | None:
    """A JPEG data URI, cropped as in training; None when the file has gone bad since it was read."""
    longest = max(one.bucket.width_px, one.bucket.height_px)
    scale = min(1.0, THUMBNAIL_PX / longest)
    size = Bucket(max(1, round(one.bucket.width_px * scale)), max(1, round(one.bucket.height_px * scale)))
    try:
        pixels = load_rgb(one.sample.path, size)
    except DataError:
        return None
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem }}
figure {{ margin: 0; padding: .5rem; border: 1px solid #ddd; border-radius: 6px; overflow-wrap: anywhere }}
img {{ display: block; margin: 0 auto .5rem; max-width: 100% }}
p {{ margin: 0 0 .3rem }}
small {{ color: #666 }}
.warnings {{ color: #8a5a00 }}
.skipped {{ color: #b00020; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p><code>{source}</code></p>
{warnings}
{skipped}
<main>
{figures}</main>
</html>
"""
