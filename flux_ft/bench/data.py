"""How fast pictures are read, and how near to decoding them in full. Loads without torch."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux_ft.data.buckets import bucket_for, crop_box
from flux_ft.data.folder import PICTURE_ENDINGS
from flux_ft.data.images import load_picture, read_header
from flux_ft.data.parallel import ordered_map, usable_cpus
from flux_ft.errors import DataError
from flux_ft.types import Bucket

MAX_PIXELS = 1024 * 1024
MULTIPLE = 16
QUALITY = 91
"""Of the JPEGs that are made, with colours at half the sides (4:2:0), as cameras write them."""
SYNTHETIC = 8

Job = tuple[bytes, Bucket]


def bench_pictures(
    folder: Path | None, megapixels: float, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """JPEG to `MAX_PIXELS`: Pillow's full decoding with Lanczos against ours, on one thread and on all cores.

    The pictures are those in `folder`, or eight that are made up, brought to that many megapixels and written as JPEG
    in memory. The two are timed in turns, `repeats` times each, so that what else the machine does falls on both.
    Raises DataError if the folder holds no picture that can be read.
    """
    if repeats < 1:
        raise ValueError("repeats is at least 1")
    size_px = megapixels * 1e6
    found = None if folder is None else _photographs(folder)
    pictures = made_up(size_px, SYNTHETIC) if found is None else [_brought_to(data, size_px) for data in found]
    jobs = [(data, _bucket(data)) for data in pictures]
    cores = usable_cpus()
    closeness_db = [_psnr_db(_ours(job), _pillow(job)) for job in jobs]  # warms up both, too
    return {
        "pictures": len(jobs),
        "synthetic": folder is None,
        "megapixels": round(statistics.mean(_megapixels(data) for data in pictures), 3),
        "megabytes": round(statistics.mean(len(data) for data in pictures) / 1e6, 3),
        "repeats": repeats,
        "psnr_db": {"min": round(min(closeness_db), 2), "median": round(statistics.median(closeness_db), 2)},
        "threads": [_timed(jobs, threads, repeats, clock) for threads in sorted({1, cores})],
    }


def summary_for_people(figures: dict[str, Any]) -> str:
    """What `bench_pictures` found, in a few lines."""
    kind = "made-up pictures" if figures["synthetic"] else "photographs"
    lines = [
        f"{figures['pictures']} {kind} of {figures['megapixels']:g} MP ({figures['megabytes']:g} MB as JPEG) "
        f"to at most {MAX_PIXELS:,} pixels, {figures['repeats']} rounds",
        "threads  Pillow img/s  flux_ft img/s  ratio (least to most)",
    ]
    for row in figures["threads"]:
        ratio = row["ratio"]
        lines.append(
            f"{row['threads']:7d}  {row['pillow_pictures_per_s']:12.1f}  {row['ours_pictures_per_s']:13.1f}  "
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    psnr_db = figures["psnr_db"]
    lines.append(f"PSNR against Pillow's: median {psnr_db['median']:.1f} dB, least {psnr_db['min']:.1f} dB")
    return "\n".join(lines)


def _timed(jobs: list[Job], threads: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"pillow": [], "ours": []}
    for _ in range(repeats):
        for name, load in (("pillow", _pillow), ("ours", _ours)):
            began = clock()
            for _ in ordered_map(load, jobs, threads, 2 * threads):
                pass
            rates[name].append(len(jobs) / (clock() - began))
    ratios = [ours / pillow for ours, pillow in zip(rates["ours"], rates["pillow"], strict=True)]
    return {
        "threads": threads,
        "pillow_pictures_per_s": round(statistics.median(rates["pillow"]), 2),
        "ours_pictures_per_s": round(statistics.median(rates["ours"]), 2),
        "ratio": {
            name: round(of(ratios), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))
        },
    }


def _ours(job: Job) -> NDArray[np.uint8]:
    return load_picture(*job).rgb_HW3


def _pillow(job: Job) -> NDArray[np.uint8]:
    data, bucket = job
    with Image.open(io.BytesIO(data)) as image:
        box = crop_box(*image.size, bucket)
        size = (bucket.width_px, bucket.height_px)
        return np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=box))


def _psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """10 log10(255² / mean squared error), of all values of all channels; 99 where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / error) if error else 99.0


def _bucket(data: bytes) -> Bucket:
    header = read_header(data)
    return bucket_for(header.width_px, header.height_px, MAX_PIXELS, MULTIPLE)


def _megapixels(data: bytes) -> float:
    header = read_header(data)
    return header.width_px * header.height_px / 1e6


def _photographs(folder: Path) -> list[bytes]:
    found = [data for path in sorted(folder.rglob("*")) if path.is_file() and (data := _picture(path)) is not None]
    if not found:
        raise DataError(f"`{folder}` holds no picture that can be read", hint="name a folder of photographs")
    return found


def _picture(path: Path) -> bytes | None:
    if path.suffix.lower() not in PICTURE_ENDINGS:
        return None
    data = path.read_bytes()
    try:
        header = read_header(data)
        load_picture(data, Bucket(MULTIPLE, MULTIPLE))
    except DataError:
        return None
    return data if min(header.width_px, header.height_px) >= MULTIPLE else None


def _brought_to(data: bytes, size_px: float) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        scale = math.sqrt(size_px / (image.width * image.height))
        size = (max(MULTIPLE, round(image.width * scale)), max(MULTIPLE, round(image.height * scale)))
        return _jpeg(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def made_up(size_px: float, count: int) -> list[bytes]:
    """Pictures as JPEG files: noise at every scale, its amplitude inverse to the frequency, as in photographs."""
    height = max(MULTIPLE, round(math.sqrt(size_px * 3 / 4)))
    width = round(height * 4 / 3)
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        picture = np.full((height, width, 3), 128, np.float32)
        cells = 4
        while cells < height:
            grain = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            layer = Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)
            picture += (np.asarray(layer, np.float32) - 128) * (2 / cells) ** 0.5
            cells *= 2
        made.append(_jpeg(Image.fromarray(picture.clip(0, 255).astype(np.uint8))))
    return made


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=2)
    return file.getvalue()
