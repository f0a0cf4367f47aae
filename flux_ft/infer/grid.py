"""Tensors to pictures, pictures to files and labelled tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flux_ft.files import write_whole

MAX_LABEL_PX = 160
"""Widest label left of a row, before it is broken into lines."""
LINE_PX = 16
MAX_LINES = 12
"""Of a label above its column."""
MAX_SHEET_PIXELS = 100_000_000
"""Larger tables are drawn with smaller cells: this many pixels take 300 MB."""
MIN_CELL_PX = 16


def to_image(pixels_3HW: Tensor) -> Image.Image:
    """Pixels in [-1, 1] to a picture."""
    share = (pixels_3HW.float().cpu() / 2 + 0.5).clamp(0, 1)  # rounded as diffusers rounds it
    array = (share.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def save_png(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write whole or not at all. Raises StorageError."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    write_whole(path, buffer.getvalue())


def data_url(image: Image.Image, side_px: int = 256) -> str:
    """A JPEG of at most `side_px` on each side, in text; ModelSpec 1.0.1 asks for such a thumbnail."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def labelled_grid(
    rows: Sequence[Sequence[Image.Image | Path]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell_px: int = 128,
    title: str = "",
) -> Image.Image:
    """Pictures in a table, each scaled to `cell_px` wide, with a label above each column and left of each row.

    Pictures may be files, of which one is open at a time. Where the table would pass MAX_SHEET_PIXELS its cells are
    smaller; labels that are longer than their place are cut.
    """
    font = ImageFont.load_default(13)
    columns = max(len(row) for row in rows)
    aspect = max(height / width for row in rows for width, height in map(_size, row))
    cell_px = min(cell_px, max(MIN_CELL_PX, int((MAX_SHEET_PIXELS / (columns * len(rows) * aspect)) ** 0.5)))
    cell_h = max(1, round(cell_px * aspect))
    most_lines = max(1, cell_h // LINE_PX)
    row_lines = [_cut(wrap_text(label, font, MAX_LABEL_PX), font, MAX_LABEL_PX, most_lines) for label in row_labels]
    left = 12 + max([int(font.getlength(line)) for lines in row_lines for line in lines] + [0])
    wrapped = [_cut(wrap_text(label, font, cell_px - 6), font, cell_px - 6, MAX_LINES) for label in column_labels]
    width = left + columns * (cell_px + 4)
    head = _cut(wrap_text(title, font, width - 12), font, width - 12, MAX_LINES)
    above = LINE_PX * len(head) + (6 if head else 0)
    top = above + 10 + LINE_PX * max([len(lines) for lines in wrapped] + [0])
    sheet = Image.new("RGB", (width, top + len(rows) * (cell_h + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for line_number, line in enumerate(head):
        draw.text((6, 4 + LINE_PX * line_number), line, fill="black", font=font)
    for x, lines in enumerate(wrapped):
        for line_number, line in enumerate(lines):
            draw.text((left + x * (cell_px + 4) + 2, above + 4 + LINE_PX * line_number), line, fill="black", font=font)
    for y, (lines, row) in enumerate(zip(row_lines, rows, strict=True)):
        for line_number, line in enumerate(lines):
            offset = cell_h // 2 - LINE_PX // 2 * len(lines) + LINE_PX * line_number
            draw.text((6, top + y * (cell_h + 4) + offset), line, fill="black", font=font)
        for x, one in enumerate(row):
            image = _opened(one)
            size = cell_px, max(1, round(cell_px * image.height / image.width))
            sheet.paste(
                image.resize(size, Image.Resampling.LANCZOS), (left + x * (cell_px + 4), top + y * (cell_h + 4))
            )
    return sheet


def _size(picture: Image.Image | Path) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.size
    with Image.open(picture) as opened:
        return opened.size


def _opened(picture: Image.Image | Path) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    with Image.open(picture) as opened:
        return opened.convert("RGB")


def _cut(lines: list[str], font: Any, width_px: int, most: int) -> list[str]:
    """At most so many lines, none wider; what is cut ends in an ellipsis."""
    kept = lines[:most]
    if len(lines) > most:
        kept[-1] += " …"
    return [line if font.getlength(line) <= width_px else _shortened(line, font, width_px) for line in kept]


def _shortened(line: str, font: Any, width_px: int) -> str:
    line = line[:500]  # more fits nowhere, and every try is measured
    while line and font.getlength(line + "…") > width_px:
        line = line[:-1]
    return line + "…"


def wrap_text(text: str, font: Any, width_px: int) -> list[str]:
    """Break `text` at spaces into lines of at most `width_px` (a longer word stays whole)."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines
