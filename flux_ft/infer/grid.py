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


def to_image(pixels_3HW: Tensor) -> Image.Image:
    """Pixels in [-1, 1] to a picture."""
    array = ((pixels_3HW.permute(1, 2, 0).float().cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
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
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], cell_px: int = 128
) -> Image.Image:
    """Pictures in a table, each scaled to `cell_px` wide, with a label above each column and left of each row."""
    font = ImageFont.load_default(13)
    cell_h = max(round(cell_px * image.height / image.width) for row in rows for image in row)
    row_lines = [wrap_text(label, font, MAX_LABEL_PX) for label in row_labels]
    left = 12 + max([int(font.getlength(line)) for lines in row_lines for line in lines] + [0])
    wrapped = [wrap_text(label, font, cell_px - 6) for label in column_labels]
    top = 10 + 16 * max([len(lines) for lines in wrapped] + [0])
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (cell_px + 4), top + len(rows) * (cell_h + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, lines in enumerate(wrapped):
        for line_number, line in enumerate(lines):
            draw.text((left + x * (cell_px + 4) + 2, 4 + 16 * line_number), line, fill="black", font=font)
    for y, (lines, row) in enumerate(zip(row_lines, rows, strict=True)):
        for line_number, line in enumerate(lines):
            offset = cell_h // 2 - 8 * len(lines) + 16 * line_number
            draw.text((6, top + y * (cell_h + 4) + offset), line, fill="black", font=font)
        for x, image in enumerate(row):
            cell = image.resize((cell_px, round(cell_px * image.height / image.width)), Image.Resampling.LANCZOS)
            sheet.paste(cell, (left + x * (cell_px + 4), top + y * (cell_h + 4)))
    return sheet


def wrap_text(text: str, font: Any, width_px: int) -> list[str]:
    """Break `text` at spaces into lines of at most `width_px` (a longer word stays whole)."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines
