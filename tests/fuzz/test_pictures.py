"""Whatever a file holds, it is the exact pixels asked for or one reason; never a crash, nor memory without a bound.

FLUX_FT_FUZZ says how many files (300). They are read in child processes, so that a decoder that kills its process is
seen as such, with the seed of the file.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from _memory import peak_bytes
from fuzz.images import make_image

from flux_ft.data.buckets import bucket_for
from flux_ft.data.images import MOST_PIXELS, Pixels, load_mask, load_picture, read_header
from flux_ft.errors import DataError
from flux_ft.types import Decoding

CASES = int(os.environ.get("FLUX_FT_FUZZ", "300"))
CASES_A_CHILD = 500
PEAK_BYTES = 20 * MOST_PIXELS
"""As `flux_ft.data.images` states it."""
SLOWEST_S = 10.0
TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}


def test_a_picture_is_its_exact_pixels_or_one_reason() -> None:
    total: Counter[str] = Counter()
    for start in range(0, CASES, CASES_A_CHILD):
        stop = min(start + CASES_A_CHILD, CASES)
        code = f"from fuzz.test_pictures import read_all; read_all({start}, {stop})"
        child = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
        assert child.returncode == 0, f"exit code {child.returncode}\n{child.stderr[-2000:]}"
        summary = json.loads(child.stdout)
        assert summary["peak_bytes"] < PEAK_BYTES, f"{summary['peak_bytes']:,} bytes in seeds {start} to {stop}"
        total += summary["outcomes"]
    assert total.total() == CASES
    assert CASES / 10 < total["read"] < CASES * 9 / 10, f"too few pictures that are good, or that are bad: {total}"


def check(seed: int) -> str:
    """The outcome of one file; asserts all that must hold of it."""
    rng = random.Random(seed)
    data = make_image(rng)
    decoding = Decoding(background=(1, 2, 3), alpha_is_mask=rng.random() < 0.5)
    try:
        header = read_header(data)
    except DataError as error:
        require_reason(error)
        return "refused by its header"
    try:
        bucket = bucket_for(header.width_px, header.height_px, rng.choice((4096, 20_000, 2**20)), 16)
        loaded = load_picture(data, bucket, decoding, thumbnail_px=rng.choice((None, 40)))
        mask_HW = load_mask(data, (header.width_px, header.height_px), bucket)
    except DataError as error:
        require_reason(error)
        return "refused"
    require_shape(loaded, (bucket.height_px, bucket.width_px))
    assert mask_HW.shape == (bucket.height_px, bucket.width_px)
    assert (loaded.mask_HW is not None) == (decoding.alpha_is_mask and header.has_alpha)
    return "read"


def require_shape(loaded: Pixels, shape: tuple[int, int]) -> None:
    assert loaded.rgb_HW3.shape == (*shape, 3)
    assert loaded.rgb_HW3.dtype == "uint8"
    assert loaded.mask_HW is None or loaded.mask_HW.shape == shape
    assert loaded.thumbnail is None or loaded.thumbnail.startswith(b"\xff\xd8")


def require_reason(error: DataError) -> None:
    assert error.message.isprintable(), ascii(error.message)
    assert 10 < len(error.message) < 300, error.message


def read_all(start: int, stop: int) -> None:
    """Read the files of the seeds from `start` up to `stop`; a crash leaves its seed as the last line of stderr."""
    outcomes: Counter[str] = Counter()
    for seed in range(start, stop):
        print(f"make_image(random.Random({seed}))", file=sys.stderr, flush=True)
        began = time.perf_counter()
        outcomes[check(seed)] += 1
        assert time.perf_counter() - began < SLOWEST_S, "too slow"
    print(json.dumps({"outcomes": outcomes, "peak_bytes": peak_bytes()}))
